"""What a published number belongs to: processor, cores, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import onnxruntime as ort


def hardware(threads: int) -> dict:
    """JSON fields that every report of a benchmark starts with."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            r.split(":")[1].strip() for r in cpuinfo.read_text().splitlines() if "model name" in r
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "date": datetime.date.today().isoformat(),
    }
