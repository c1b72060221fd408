"""Memory of one more sequence, measured against the formula; long clips: see long_clip.py.

A process that has decoded guided clips in every slot of a small engine, against one with more
slots: what each slot adds, over what its caches, its condition slot and its rows of a step are said
to take. The last line is JSON.

    python benchmarks/memory.py BUNDLE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from hardware import hardware

from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import cache_slots, condition_slots, load_engine
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.manifest import MANIFEST, Manifest
from nuwa.spec.plan import widest_wave
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

PROMPT = "a red 3 on a black background moving left ."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", type=int, nargs=2, default=[18, 34], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each size")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--alone", type=int, help="measure in this process, JSON only")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(decode_in_all_slots(options.bundle, options.alone, options.threads)))
        return 0
    few, many = options.slots
    held = {
        slots: min(in_a_process(options, slots) for _ in range(options.repeats))
        for slots in (few, many)
    }
    measured = (held[many] - held[few]) / (many - few)
    expected = slot_bytes(options.bundle)
    report = {
        "hardware": hardware(options.threads),
        "bundle": options.bundle.name,
        "resident_bytes": held,
        "bytes_per_slot": measured,
        "expected_bytes_per_slot": expected,
        "ratio": measured / expected,
    }
    for slots, size in held.items():
        print(f"{slots:3} slots: {size / 1e6:8.1f} MB")
    print(
        f"one more slot: {measured / 1e6:.2f} MB, by the formula {expected / 1e6:.2f} MB, "
        f"ratio {measured / expected:.3f}"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def slot_bytes(bundle: Path) -> int:
    """fp32 keys and values of all layers: two cache slots, for guidance, and a condition slot.

    And what a step computes by row, for the widest wave of both: residual stream, its norm,
    queries, what attention gives, the feed-forward's hidden values, logits.
    """
    manifest = Manifest.from_json((bundle / MANIFEST).read_text())
    config = manifest.config
    decoder = config.decoder
    caches = cache_slots(1) * manifest.cache_entries
    conditions = (condition_slots(2) - condition_slots(1)) * ConditionLayout.of(config).entries
    kept = (caches + conditions) * decoder.layers * 2 * decoder.width
    rows = cache_slots(1) * widest_wave(decoder)
    hidden = decoder.ff_multiplier * decoder.width
    computed = rows * (4 * decoder.width + hidden + config.image.codebook_size)
    return 4 * (kept + computed)


def in_a_process(options: argparse.Namespace, slots: int) -> int:
    """Resident bytes of a fresh process that decodes in so many slots."""
    command = [sys.executable, __file__, str(options.bundle), "--alone", str(slots)]
    command += ["--threads", str(options.threads)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def decode_in_all_slots(bundle: Path, slots: int, threads: int) -> int:
    """Resident bytes once every slot has been used, and every condition slot filled."""
    engine = load_engine(bundle, slots=slots, threads=threads)
    for array in engine._backend.conditions.values():
        array[:] = 1.0  # a visual volume fills them; a text alone does not
    request = GenerationRequest(
        Task.T2V, PROMPT, frame_count=engine.info.max_frames, sampling=Sampling(guidance_scale=2.0)
    )
    with Scheduler(engine) as scheduler:
        for handle in [scheduler.submit(request, samples=slots)]:
            handle.result()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell a process how much memory it has")


if __name__ == "__main__":
    raise SystemExit(main())
