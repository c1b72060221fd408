"""Turns an evaluation report into tables and files.

Knows the shape of the report; measures nothing and draws nothing (sheets.py does).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .sheets import LongSpecimen, Specimen, contact_sheet, long_sheet

NOTES = """\
- real, VQ: what the judge makes of real answers to the same questions, as they are and after a
  round trip through the image tokenizer (known pixels put back); model / VQ is the share of that
  ceiling that the model reaches. visible (i2i): what it makes of the visible half alone.
- A bar holds or not against the VQ ceiling; the last column says the same against real clips.
- miou is the mean over samples of the mean IoU over the classes present, background included;
  pixels of at least half ink are the sprite's, their label is the class that the judge reads.
  sprite_iou is the IoU of those pixels whatever their class.
- edited_X counts the samples whose caption changes X, kept_X those whose caption does not.
- known_identical is the share of samples whose known pixels come back bit for bit.
- fid_judge is a Fréchet distance on the judge's mean features of shape; fvd_judge is one on those,
  their mean absolute changes from frame to frame and the steps of the sprite's centroid in pixels
  (lower is better). They are not FID and FVD, and they depend on the number of samples: the
  reference are real answers to as many other questions (256 at least).
- psnr and ssim are of the frames that are predicted, or of all that is drawn from a sketch.
- v2v is not told whether the sprite will turn: even a perfect predictor misses some motions.
"""


def format_report(report: dict) -> str:
    """The report as Markdown: scores, bars, the long clips, and the notes it takes to read them."""
    title = (
        f"# Sprites: level {report['level']}, split {report['split']}, "
        f"{report['samples']} samples a part, seed {report['seed']}"
    )
    about = [f"- {name}: {value}" for name, value in report["about"].items()]
    asks = [f"- **{part}**: {result['asks']}." for part, result in report["tasks"].items()]
    sections = [[title], about, asks, _scores(report), _bars(report["bars"])]
    if "long" in report:
        sections.append(_long(report["long"]))
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n\n" + NOTES


def _scores(report: dict) -> list[str]:
    lines = [
        "| part | score | model | 95 % interval | real | VQ | model / VQ | samples |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part, result in report["tasks"].items():
        for name, score in result["scores"].items():
            digits = _digits(name)
            model, low, high, real, ceiling = (
                _number(score[key], digits)
                for key in ("model", "low", "high", "real", "reconstructed")
            )
            interval = f"{low} .. {high}" if low != "-" else "-"
            if score.get("visible") is not None:
                real += f" (visible {_number(score['visible'], digits)})"
            ratio, samples = _number(score["ratio"], 3), score["samples"] or "-"
            lines.append(
                f"| {part} | {name} | {model} | {interval} | {real} | {ceiling} | {ratio} "
                f"| {samples} |"
            )
    return lines


def _bars(bars: list[dict[str, Any]]) -> list[str]:
    if not bars:
        return []
    lines = [
        "| part | bar | value | ceiling | threshold | holds | against real clips |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for bar in bars:
        value, ceiling, threshold = (
            _number(bar[key], _digits(bar["score"])) for key in ("value", "ceiling", "threshold")
        )
        real = {True: "yes", False: "no", None: "-"}[bar["holds_against_real"]]
        lines.append(
            f"| {bar['part']} | {bar['bar']} | {value} | {ceiling} | {threshold} "
            f"| {'yes' if bar['holds'] else '**no**'} | {real} |"
        )
    return lines


def _long(long: dict[str, Any]) -> list[str]:
    window, count = long["window"], long["frames"] // long["window"]
    spans = [f"{w * window} .. {(w + 1) * window - 1}" for w in range(count)]
    lines = [
        f"{long['samples']} clips of {long['asks']}; the bar: {long['bar']}.",
        "",
        f"| score, frames | {' | '.join(spans)} | change (95 % interval) | holds |",
        f"| --- |{' ---: |' * count} ---: | --- |",
    ]
    for name, score in long["scores"].items():
        for kind in ("model", "real", "reconstructed"):
            if kind not in score:
                continue
            values = " | ".join(f"{value:.3f}" for value in score[kind])
            change, holds = "-", "-"
            if kind == "model":
                low, high = score["change_low"], score["change_high"]
                change = f"{score['change']:+.3f} ({low:+.3f} .. {high:+.3f})"
                holds = "yes" if score["holds"] else "**no**"
            lines.append(f"| {name}, {kind} | {values} | {change} | {holds} |")
    return lines


def _digits(score: str) -> int:
    return 1 if score.startswith("psnr") else 3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_report(
    out: Path,
    report: dict,
    specimens: dict[str, list[Specimen]],
    long_specimens: list[LongSpecimen],
) -> None:
    """Writes report.json, report.md, PART.png for each part and, if any, v2v_long.png to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(format_report(report), encoding="utf-8")
    for part, rows in specimens.items():
        contact_sheet(rows).save(out / f"{part}.png")
    if long_specimens:
        long_sheet(long_specimens).save(out / "v2v_long.png")
