"""Checkpoint folder -> bundle folder, all or nothing: a bundle exists only if its numbers agree."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from nuwa.spec.manifest import (
    MANIFEST,
    PRECISIONS,
    RANKERS,
    TEXT_TOKENIZER,
    Manifest,
    file_hash,
    graph_file,
)
from nuwa.spec.plan import cache_entries
from nuwa.training.checkpoint import Checkpoint, load_checkpoint

from .graphs import OPSET, graphs, write_graph
from .verify import verify

# What is being done, how many steps are behind, how many there are.
Progress = Callable[[str, int, int], None]
NOT_STATED = "not stated"


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "fp32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Exports, verifies and writes a bundle; returns its manifest.

    Works in a folder beside `out` and renames it at the end; whatever goes wrong, `out` stays as it
    was and nothing else is left. ValueError for an unknown precision, if `out` exists (with
    overwrite: if it is no bundle), or if it is a mount point; what `load_checkpoint` raises;
    ExportError if a graph's numbers are too far from PyTorch's.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    out = out.resolve()  # of a link, what it points to
    _check_target(out, overwrite)
    loaded = load_checkpoint(checkpoint)
    _check_text(loaded)
    _check_ranker(loaded)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)
        manifest = _write(loaded, partial, precision, progress or _silent)
        _check_target(out, overwrite)  # again: an export takes a while
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> Manifest:
    exported, done = graphs(checkpoint, precision), 0
    steps = 2 * len(exported) + 1
    for graph in exported:
        progress(f"exporting {graph.name}", done, steps)
        write_graph(graph, folder / graph_file(graph.name))
        done += 1

    def verifying(name: str) -> None:
        nonlocal done
        progress(f"verifying {name}", done, steps)
        done += 1

    parity = verify(checkpoint, folder, precision, verifying)
    progress("writing the manifest", done, steps)
    checkpoint.text_tokenizer.save(folder / TEXT_TOKENIZER)
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    manifest = _manifest(checkpoint, precision, files, parity)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    progress("done", steps, steps)
    return manifest


def _manifest(checkpoint: Checkpoint, precision: str, files: dict, parity: dict) -> Manifest:
    optional = (checkpoint.sketch_vqgan, checkpoint.ranker)
    models = [checkpoint.nuwa, checkpoint.vqgan, *(m for m in optional if m is not None)]
    return Manifest(
        name=checkpoint.config.name,
        config=checkpoint.config,
        tasks=checkpoint.config.tasks,
        precision=precision,
        opset=OPSET,
        cache_entries=cache_entries(checkpoint.config.decoder),
        files=files,
        parity=parity,
        parameter_count=sum(p.numel() for model in models for p in model.parameters()),
        licence=str(checkpoint.provenance.get("licence", NOT_STATED)),
        training_data=str(checkpoint.provenance.get("data", NOT_STATED)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rankers=() if checkpoint.ranker is None else RANKERS,
        sampling=checkpoint.sampling,
    )


def _check_text(checkpoint: Checkpoint) -> None:
    tokenizer, config = checkpoint.text_tokenizer, checkpoint.config.text
    have = (tokenizer.vocabulary_size, tokenizer.length)
    wanted = (config.vocabulary_size, config.length)
    if have != wanted:
        raise ValueError(
            f"the checkpoint's text tokenizer has {have[0]} ids and texts of {have[1]}, its config "
            f"says {wanted[0]} and {wanted[1]}"
        )


def _check_ranker(checkpoint: Checkpoint) -> None:
    ranker, config = checkpoint.ranker, checkpoint.config
    if ranker is None:
        return
    have = (ranker.config.text.vocabulary_size, ranker.config.text.length, ranker.config.resolution)
    wanted = (config.text.vocabulary_size, config.text.length, config.image.resolution)
    if have != wanted:
        raise ValueError(
            f"the checkpoint's ranker is made for {have[0]} text ids, texts of {have[1]} and "
            f"pictures of {have[2]} pixels, its config says {wanted[0]}, {wanted[1]} and "
            f"{wanted[2]}; train a ranker for this model"
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_mount():  # which nothing can take the place of
        raise ValueError(f"{out} is a mount point; name a folder in it, such as {out / 'bundle'}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for the bundle")
    if not overwrite:
        raise ValueError(f"{out} exists; choose another folder, or allow it to be overwritten")
    if not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} is not a bundle (it has no {MANIFEST}) and is not overwritten; choose another "
            f"folder"
        )


def replace_folder(partial: Path, out: Path) -> None:
    """Puts `partial` in the place of `out`; if that fails, `out` is as before."""
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _silent(what: str, done: int, steps: int) -> None:
    """No progress is shown."""
