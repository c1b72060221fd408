"""The folder of an evaluation: report.json, report.md and contact sheets, written part by part.

An evaluation with the same settings goes on where an earlier one in the same folder stopped; one
with others is refused, for what it would replace may have taken hours. Knows files; measures
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nuwa.spec.files import make_writable, write_text

from .pictures import save_png
from .report import format_report
from .sheets import LongSpecimen, Specimen, contact_sheet, long_sheet
from .stored import read_object

RESULTS = ("tasks", "bars", "long")  # of a report; all else in it are settings
REPORT, TABLE = "report.json", "report.md"
FILES = "about.files"  # SHA-256 of all of a bundle's, beside which its name and its hash tell ...
ASIDE = {"about.bundle", "about.bundle_hash"}  # ... nothing more than how and when it was exported


class ReportFolder:
    """Makes the folder `path`; OSError if nothing can be written there."""

    def __init__(self, path: Path) -> None:
        self.path = make_writable(path)

    def earlier(
        self, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> tuple[dict[str, Any], str]:
        """What the report that is there has of RESULTS, and a sentence on it, or ({}, "").

        ValueError if it is of other settings or cannot be read; with `overwrite` nothing is taken
        from it then, and it will be replaced.
        """
        path = self.path / REPORT
        if not path.exists():
            return {}, ""
        try:
            found = read_object(path)
            if differing := _differing(found, json.loads(json.dumps(settings))):
                raise ValueError(f"{path} differs in {', '.join(differing)}")
        except ValueError as error:
            if not overwrite:
                raise ValueError(f"{error}; give another folder, or --overwrite") from None
            return {}, f"{error} and is replaced"
        results = {name: found[name] for name in RESULTS if name in found}
        parts = [name for part in ("tasks", "long") for name in results.get(part, {})]
        return results, f"{path} has the same settings; kept as measured: {', '.join(parts)}"

    def add_sheet(self, part: str, specimens: list[Specimen]) -> None:
        """Writes PART.png."""
        save_png(self.path / f"{part}.png", np.asarray(contact_sheet(specimens)))

    def add_long_sheet(self, part: str, specimens: list[LongSpecimen]) -> None:
        """Writes PART.png."""
        save_png(self.path / f"{part}.png", np.asarray(long_sheet(specimens)))

    def write(self, report: dict[str, Any]) -> None:
        """Writes report.json and report.md; whoever is killed meanwhile leaves the ones before."""
        text = json.dumps(report, indent=2, allow_nan=False)
        write_text(self.path / TABLE, format_report(report))
        write_text(self.path / REPORT, text + "\n")


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings of `now` that are others in the report of before."""
    found, asked = _one_by_one(before), _one_by_one(now)
    names = dict.fromkeys([*asked, *(name for name in found if name.startswith("about."))])
    if FILES in asked:
        names = {name: None for name in names if name not in ASIDE}
    return [name for name in names if found.get(name) != asked.get(name)]


def _one_by_one(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `about` beside the others, as "about.NAME"."""
    about = settings.get("about")
    if not isinstance(about, dict):
        return settings
    others = {name: value for name, value in settings.items() if name != "about"}
    return others | {f"about.{name}": value for name, value in about.items()}
