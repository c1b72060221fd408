"""An OpenMoji drawing (SVG) as a picture and a class map of any size.

OpenMoji draws in named layers: filled areas (`color`, `hair`, `skin`, ...) and the line art, which
alone is its black-and-white version. A class map says of each pixel what is there:

    0 background   nothing is drawn
    1 line         line art, whether or not a filled area of the coloured version covers it
    2 interior     a filled area without a line

Knows layers and pixels; knows nothing of names, files, or of which drawings there are.

Legend: H = W the resolution in pixels.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ("background", "line", "interior")
LINE_LAYERS = ("line", "line-supplement")
# A line of 2 units, the usual one, is 1.8 pixels wide at resolution 64; a fine one, of 1 unit, half
# of that. The least coverage that makes a line is low enough that fine lines do not break.
LINE_COVERAGE = 102
INTERIOR_COVERAGE = 128
_SVG = "http://www.w3.org/2000/svg"

ET.register_namespace("", _SVG)


def line_art(svg: str) -> str:
    """The drawing with its line layers only. ValueError if it is no SVG or has no line art."""
    try:
        root = ET.fromstring(svg)
    except ET.ParseError as error:
        raise ValueError(f"the drawing is not an SVG: {error}") from None
    lines = 0
    for child in list(root):
        if child.tag == f"{{{_SVG}}}defs":
            continue
        if child.get("id") in LINE_LAYERS:
            lines += len(child)
        else:
            root.remove(child)
    if not lines:
        raise ValueError(f"the drawing has no line art: no layer {' or '.join(LINE_LAYERS)}")
    return ET.tostring(root, encoding="unicode")


def rasterize(svg: str, resolution: int) -> npt.NDArray[np.uint8]:
    """u8 [H, W, 4]: RGB and alpha, not multiplied. Needs the package resvg-py."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=resolution, height=resolution, skip_system_fonts=True
    )
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def over(
    pixels_HW4: npt.NDArray[np.uint8], background: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """u8 [H, W, 3]: the drawing on a plain background."""
    alpha = pixels_HW4[..., 3:].astype(np.int32)
    mixed = pixels_HW4[..., :3] * alpha + np.array(background) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def class_map(
    alpha_HW: npt.NDArray[np.uint8], line_alpha_HW: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """u8 [H, W] of CLASSES, from the coverage of the whole drawing and of its line art."""
    interior = np.where(alpha_HW >= INTERIOR_COVERAGE, CLASSES.index("interior"), 0)
    lines = line_alpha_HW >= LINE_COVERAGE
    return np.where(lines, CLASSES.index("line"), interior).astype(np.uint8)
