"""How often a row's logits change their bits with the number of rows in its call.

Not at all, if a request is to draw the same tokens in any company. Every row of a call of 256 is
computed again in calls of other sizes, on every CPU backend, with one thread and with all. The last
line is JSON; the exit code is 1 if a row changed.

    python benchmarks/batch_invariance.py BUNDLE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from hardware import hardware
from steps import PROMPT, synthetic_stream

from nuwa.runtime.backends.base import NATIVE_CPU, ONNXRUNTIME_CPU, Part
from nuwa.runtime.backends.choice import make_backend
from nuwa.runtime.bundle import open_bundle
from nuwa.spec.grid import MASKED

MOST = 256
SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 23, 32, 48, 64, 100, 255)
PLACES = 6  # where in the call of MOST rows a smaller one begins


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=(NATIVE_CPU, ONNXRUNTIME_CPU), nargs="+")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    report: dict = {"hardware": hardware(cores), "bundle": options.bundle.name, "changed": {}}
    for backend in options.backend or (NATIVE_CPU, ONNXRUNTIME_CPU):
        for threads in sorted({1, cores}):
            changed, total = count_changes(options.bundle, backend, threads)
            report["changed"][f"{backend}, {threads} threads"] = changed / total
            print(f"{backend}, {threads} threads: {changed} of {total} rows changed", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return int(any(report["changed"].values()))


def count_changes(folder: Path, name: str, threads: int) -> tuple[int, int]:
    """Rows whose logits were not the same bits as in the call of MOST rows, of how many."""
    bundle = open_bundle(folder)
    backend = make_backend(
        name, bundle, cache_slots=1, condition_slots=1, threads=threads, logits=True
    )
    backend.encode_text(bundle.text_tokenizer.encode(PROMPT)[None], [0], 0)
    draw = np.random.default_rng(0)
    for array in backend.caches.values():
        array[:] = draw.standard_normal(array.shape)
    stream = synthetic_stream(bundle.manifest.config, MOST)
    unwritten = np.full(MOST, MASKED, np.int32)  # so that every call meets the same caches
    stream.rows = dataclasses.replace(stream.rows, write_index=unwritten)
    backend.open(stream)
    backend.step([Part(stream, 0, MOST)])
    whole, changed, total = backend.logits.copy(), 0, 0
    for size in SIZES:
        for first in np.linspace(0, MOST - size, PLACES).astype(int).tolist():
            backend.step([Part(stream, first, size)])
            changed += int((backend.logits != whole[first : first + size]).any(axis=1).sum())
            total += size
    return changed, total


if __name__ == "__main__":
    raise SystemExit(main())
