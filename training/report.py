"""Turns an evaluation report into Markdown.

Knows the shape of the report; measures, draws and writes nothing (sheets.py, report_folder.py do).
"""

from __future__ import annotations

import json
from typing import Any

NOTES = """\
- real, VQ: what the judge makes of real answers to the same questions, as they are and after a
  round trip through the image tokenizer (known pixels put back); model / VQ is the share of that
  ceiling that the model reaches. visible (i2i): what it makes of the visible half alone.
- Intervals are 95 % bootstrap intervals over the questions; where every sample is right, or every
  one wrong, Wilson's stand in. Those of the ceilings are in report.json.
- A bar holds or not by the numbers measured, against the VQ ceiling; the last column says the same
  against real clips. margin: the interval of value less threshold, both from the same resampled
  questions; "within noise" is said where its other end says the opposite. A bar that is a share of
  the VQ ceiling holds only if that ceiling is at least 0.95 of the real clips' score.
- class and colour are right only where at least 0.9 of the judged frames show a sprite.
- miou is the IoU over the pixels of all samples together (one confusion matrix, as PASCAL VOC does
  it), averaged over the classes that occur, background included; miou_sample is the mean over
  samples of each one's own. Pixels of at least half ink are the sprite's, their label is the class
  that the judge reads in that frame. sprite_iou is the IoU of those pixels whatever their class,
  averaged over samples.
- edited_X counts the samples whose caption changes X, kept_X those whose caption does not.
  joint_off_cells counts those whose box cuts through the tokenizer's cells.
- class_cut (i2i) counts the pictures with at least a quarter of the sprite hidden.
- known_identical is the share of samples whose known pixels come back bit for bit.
- fid_judge is a Fréchet distance on the judge's mean features of shape; fvd_judge is one on those,
  their mean absolute changes from frame to frame and the steps of the sprite's centroid in pixels
  (lower is better). They are not FID and FVD, and they depend on the number of samples: the
  reference are real answers to as many other questions (256 at least).
- psnr and ssim are of the frames that are predicted, or of all that is drawn from a sketch.
- v2v is told by nothing but its two frames whether the sprite will turn; at level digits the place
  where it starts mostly tells. v2v_captioned is a supplement: the caption says that it does not.
- v2v_long, v2v_long_captioned: X_first and X_last are the first and last windows of the 100-frame
  clips; the given frames are part of the first window. Without a caption nothing but the last few
  frames tells what the sprite is; the caption says that, and not how it moves.
"""


def format_report(report: dict) -> str:
    """The report as Markdown: scores, bars, the long clips, and the notes it takes to read them."""
    title = (
        f"# Sprites: level {report['level']}, split {report['split']}, "
        f"{report['samples']} samples a part, seed {report['seed']}"
    )
    about = [f"- {name}: {_plain(value)}" for name, value in report["about"].items()]
    if report["ranking"]:
        about.append(f"- ranking, where there is a prompt: {_plain(report['ranking'])}")
    if report["unfinished"]:
        about.append(f"- NOT MEASURED YET: {', '.join(report['unfinished'])}")
    asks = [f"- **{part}**: {_asks(result)}." for part, result in report["tasks"].items()]
    sections = [[title], about, asks, _scores(report), _remarks(report), _bars(report["bars"])]
    sections += [_long(name, long) for name, long in report["long"].items()]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n\n" + NOTES


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _asks(result: dict[str, Any]) -> str:
    count = result["samples_per_prompt"]
    return result["asks"] + (f" (the best of {count} is scored)" if count > 1 else "")


def _remarks(report: dict) -> list[str]:
    """What must be said of single scores."""
    return [
        f"- {part}, {name}: {score['note']}."
        for part, result in report["tasks"].items()
        for name, score in result["scores"].items()
        if "note" in score
    ]


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
        "| part | bar | value | ceiling | threshold | margin | samples | verdict | by real clips |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for bar in bars:
        digits = _digits(bar["score"])
        value, ceiling, threshold, low, high = (
            _number(bar[key], digits)
            for key in ("value", "ceiling", "threshold", "margin_low", "margin_high")
        )
        margin = f"{low} .. {high}" if low != "-" else "-"
        real = {True: "yes", False: "no", None: "-"}[bar["holds_against_real"]]
        verdict = f"**{bar['verdict']}**" if bar["holds"] is False else bar["verdict"]
        lines.append(
            f"| {bar['part']} | {bar['bar']} | {value} | {ceiling} | {threshold} | {margin} "
            f"| {bar['samples']} | {verdict} | {real} |"
        )
    return lines


def _long(name: str, long: dict[str, Any]) -> list[str]:
    window, count = long["window"], long["frames"] // long["window"]
    spans = [f"{w * window} .. {(w + 1) * window - 1}" for w in range(count)]
    lines = [
        f"{name}: {long['samples']} clips of {long['asks']}; change: the last {long['ends']} "
        f"windows less the first {long['ends']}.",
        "",
        f"| score, frames | {' | '.join(spans)} | change (95 % interval) |",
        f"| --- |{' ---: |' * count} ---: |",
    ]
    for name, score in long["scores"].items():
        for kind in ("model", "real", "reconstructed"):
            if kind not in score:
                continue
            values = " | ".join(f"{value:.3f}" for value in score[kind])
            change = "-"
            if kind == "model":
                low, high = score["change_low"], score["change_high"]
                change = f"{score['change']:+.3f} ({low:+.3f} .. {high:+.3f})"
            lines.append(f"| {name}, {kind} | {values} | {change} |")
    return lines


def _digits(score: str) -> int:
    return 1 if score.startswith("psnr") else 3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
