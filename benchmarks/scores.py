"""README's tables of scores, from the report.json of a `nuwa evaluate`.

Scores that need not reach anything, and distances, are in a second one.

    nuwa evaluate BUNDLE --split test --out runs/test
    python benchmarks/scores.py runs/test/report.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"v2v_captioned": "V2V with caption"}
FURTHER = ("fid_judge", "fvd_judge", "psnr", "ssim", "psnr_one_way", "ssim_one_way", "motion")
FURTHER += ("class_cut", "joint_off_cells")
NEVER_MISSED = "known_identical"  # has a sentence of its own


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    report = json.loads(parser.parse_args().report.read_text())
    print("\n".join([*bars(report), "", *further(report)]))
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
        must = bar["bar"].removeprefix(f"{name} ")
        if must.endswith(" visible"):
            must += f", which is {shown(name, score['visible'])}"
        met = "**no**" if bar["holds"] is False else "yes"
        met += ", within noise" if "within noise" in bar["verdict"] else ""
        lines.append(row(bar["part"], name, score, must, met))
    return lines


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
