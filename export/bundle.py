"""Checkpoint folder -> bundle folder, all or nothing."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from nuwa.spec.manifest import MANIFEST, TEXT_TOKENIZER, Manifest, graph_file
from nuwa.spec.plan import cache_entries
from nuwa.training.checkpoint import load_checkpoint

from .graphs import OPSET, graphs, write_graph


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "fp32",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    loaded = load_checkpoint(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    for graph in graphs(loaded, precision):
        write_graph(graph, folder / graph_file(graph.name))
    loaded.text_tokenizer.save(folder / TEXT_TOKENIZER)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    count = sum(p.numel() for m in (loaded.nuwa, loaded.vqgan) for p in m.parameters())
    manifest = Manifest(
        name=loaded.config.name,
        config=loaded.config,
        tasks=loaded.config.tasks,
        precision=precision,
        opset=OPSET,
        cache_entries=cache_entries(loaded.config.decoder),
        files=files,
        parity={},
        parameter_count=count,
        licence=loaded.provenance.get("licence", "not stated"),
        training_data=loaded.provenance.get("data", "not stated"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    return manifest
