"""The tables of scores of README and docs/measured.md, from the report.json of `nuwa evaluate`.

Of one report: the scores that have to reach something; those that need not, and distances; those of
clips far beyond the trained length. Of two: what has to be reached, side by side.

    nuwa evaluate BUNDLE --split test --long 128 --out runs/test
    python benchmarks/scores.py runs/test/report.json
    python benchmarks/scores.py runs/test/report.json runs/novel/report.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "v2v_captioned": "V2V with caption",
    "v2v_long": "V2V, 100 frames",
    "v2v_long_captioned": "V2V, 100 frames, an image's caption",
}
FURTHER = ("fid_judge", "fvd_judge", "psnr", "ssim", "psnr_one_way", "ssim_one_way", "motion")
FURTHER += ("class_cut", "joint_off_cells")
NEVER_MISSED = "known_identical"  # has a sentence of its own
ALWAYS_MET = (NEVER_MISSED, "kept_background")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="of another split")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    if options.other:
        lines = side_by_side(report, json.loads(options.other.read_text()))
    else:
        lines = [*bars(report), "", *further(report)]
        if report["long"]:
            lines += ["", *long_bars(report)]
    print("\n".join(lines))
    return 0


def bars(report: dict[str, Any]) -> list[str]:
    """The scores that have to reach something; those that no sample has are left out."""
    lines = [
        "| task | score | model | 95 % interval | real | VQ | samples | bar | met |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for bar in report["bars"]:
        name = bar["score"]
        score = report["tasks"].get(bar["part"], {}).get("scores", {}).get(name)
        if score is None or name == NEVER_MISSED:
            continue
        must = wanted(bar)
        if must.endswith(" visible"):
            must += f", which is {shown(name, score['visible'])}"
        lines.append(row(bar["part"], name, score, must, met(bar)))
    return lines


def long_bars(report: dict[str, Any]) -> list[str]:
    """What the first and the last of 100 frames have to reach: means of three windows each."""
    lines = [
        "| task | score | model | samples | bar | met |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for bar in report["bars"]:
        if bar["part"] in report["long"]:
            name = bar["score"]
            cells = [NAMES[bar["part"]], name.replace("_", " "), shown(name, bar["value"])]
            cells += [
                str(bar["samples"]),
                f"{wanted(bar)}: {shown(name, bar['threshold'])}",
                met(bar),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def side_by_side(report: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Each bar of a task in two reports: the score, and in brackets what it has to reach."""
    lines = [
        f"| task | score | bar | {report['split']} | {other['split']} |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    found = {_key(bar): bar for bar in other["bars"]}
    for bar in report["bars"]:
        if bar["part"] in report["tasks"] and bar["score"] not in ALWAYS_MET:
            title = NAMES.get(bar["part"], bar["part"].upper())
            name = bar["score"].replace("_", " ")
            cells = [title, name, wanted(bar), _beside(bar), _beside(found.get(_key(bar)))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _key(bar: dict[str, Any]) -> tuple[str, str]:
    return bar["part"], bar["bar"].split("0.")[0]  # the factor may differ from split to split


def _beside(bar: dict[str, Any] | None) -> str:
    if bar is None or bar["value"] is None:
        return ""
    name = bar["score"]
    numbers = f"{shown(name, bar['value'])} ({shown(name, bar['threshold'])})"
    return f"**{numbers}: no**" if bar["holds"] is False else numbers


def wanted(bar: dict[str, Any]) -> str:
    return bar["bar"].removeprefix(f"{bar['score']} ")


def met(bar: dict[str, Any]) -> str:
    noise = ", within noise" if "within noise" in bar["verdict"] else ""
    return ("**no**" if bar["holds"] is False else "yes") + noise


def further(report: dict[str, Any]) -> list[str]:
    """Scores without a bar, and distances, for which lower is better."""
    lines = [
        "| task | score | model | 95 % interval | real | VQ | samples |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    barred = {(bar["part"], bar["score"]) for bar in report["bars"]}
    for part, result in report["tasks"].items():
        for name in FURTHER:
            if name in result["scores"] and (part, name) not in barred:
                lines.append(row(part, name, result["scores"][name]))
    return lines


def row(part: str, name: str, score: dict[str, Any], *more: str) -> str:
    low, high = shown(name, score["low"]), shown(name, score["high"])
    numbers = [shown(name, score["model"]), f"{low} .. {high}" if low else ""]
    numbers += [shown(name, score["real"]), shown(name, score["reconstructed"])]
    title = NAMES.get(part, part.upper())
    cells = [title, name.replace("_", " "), *numbers, str(score["samples"]), *more]
    return f"| {' | '.join(cells)} |"


def shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if name.startswith(("psnr", "fid", "fvd")) else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
