"""Latency of images that come after a pause, as they do from people, and of the steps they take.

Threads that have slept have to be woken, and processors with them: what a closed loop of requests
never shows. The last line is JSON.

    python benchmarks/pauses.py BUNDLE
    python benchmarks/pauses.py BUNDLE --pauses 0 0.02 0.1 1 --images 30
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from hardware import hardware

from nuwa.runtime.backends.base import AUTO, BACKENDS
from nuwa.runtime.client import LocalClient
from nuwa.runtime.engine import load_engine

PROMPT = "a red 3 on a black background"
WARM_UP = 5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pauses", type=float, nargs="+", default=[0.0, 0.02, 0.1], help="seconds")
    parser.add_argument("--images", type=int, default=100, help="after each pause")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    engine = load_engine(options.bundle, threads=options.threads, backend=options.backend)
    steps: list[float] = []
    engine.on_step = lambda rows, seconds: steps.append(seconds)
    report = {
        "hardware": hardware(options.threads),
        "bundle": engine.info.name,
        "precision": engine.info.precision,
        "backend": engine.info.backend,
        "pauses": [],
    }
    print("pause     images: p50       p90       p99   steps: p50       p90       p99")
    with LocalClient(engine) as client:
        for pause in options.pauses:
            images = []
            for number in range(WARM_UP + options.images):
                if number == WARM_UP:
                    steps.clear()
                time.sleep(pause)
                began = time.perf_counter()
                client.generate_image("t2i", PROMPT, seed=number)
                images.append(time.perf_counter() - began)
            row = {"seconds": pause, "images": len(images) - WARM_UP}
            for name, values in (("latency", images[WARM_UP:]), ("step", steps)):
                for quantile in (0.5, 0.9, 0.99):
                    row[f"{name}_p{100 * quantile:.0f}"] = float(np.quantile(values, quantile))
            report["pauses"].append(row)
            told = [1e3 * value for name, value in row.items() if "_p" in name]
            print(
                f"{pause:5} s "
                + " ".join(f"{value:6.1f} ms" for value in told[:3])
                + "    "
                + " ".join(f"{value:6.2f} ms" for value in told[3:]),
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
