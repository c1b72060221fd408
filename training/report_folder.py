"""The folder of an evaluation: report.json, report.md and contact sheets, written part by part.

An evaluation with the same settings goes on where an earlier one in the same folder stopped. Knows
files; measures nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import format_report
from .sheets import LongSpecimen, Specimen, contact_sheet, long_sheet

RESULTS = ("tasks", "bars", "long")  # of a report; all else in it are settings
REPORT, TABLE = "report.json", "report.md"


class ReportFolder:
    """Makes the folder `path`; OSError if that cannot be."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def earlier(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """What the report that is there has of RESULTS, and a sentence on it, or ({}, "").

        Nothing is taken from a report of other settings; it will be overwritten.
        """
        try:
            found = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}, ""
        except ValueError:
            return {}, f"{self.path / REPORT} cannot be read and is replaced"
        asked = json.loads(json.dumps(settings))
        differing = [name for name in asked if found.get(name) != asked[name]]
        if differing:
            return {}, f"{self.path / REPORT} differs in {', '.join(differing)} and is replaced"
        results = {name: found[name] for name in RESULTS if name in found}
        parts = [*results["tasks"], *results.get("long", {})]
        kept = f"{self.path / REPORT} has the same settings; kept as measured: {', '.join(parts)}"
        return results, kept

    def add_sheet(self, part: str, specimens: list[Specimen]) -> None:
        """Writes PART.png."""
        contact_sheet(specimens).save(self.path / f"{part}.png")

    def add_long_sheet(self, part: str, specimens: list[LongSpecimen]) -> None:
        """Writes PART.png."""
        long_sheet(specimens).save(self.path / f"{part}.png")

    def write(self, report: dict[str, Any]) -> None:
        """Writes report.json and report.md; whoever is killed meanwhile leaves the ones before."""
        text = json.dumps(report, indent=2, allow_nan=False)
        self._replace(TABLE, format_report(report))
        self._replace(REPORT, text + "\n")

    def _replace(self, name: str, text: str) -> None:
        new = self.path / f"{name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.path / name)
