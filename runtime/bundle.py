"""Opens a bundle folder and refuses one that is not whole: a missing or changed file.

Reads the manifest and the text tokenizer; graphs are only hashed. Knows neither ONNX nor any
backend.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nuwa.spec.manifest import (
    MANIFEST,
    TEXT_TOKENIZER,
    BundleError,
    Manifest,
    file_hash,
    graph_file,
)
from nuwa.spec.text import TextTokenizer

_MANIFEST_LIMIT = 16 << 20  # bytes; a manifest has a few kilobytes


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. hash: SHA-256 of the manifest, which names every other file's; of every
    export another one, unlike the manifest's contents_hash.
    """

    path: Path
    manifest: Manifest
    hash: str

    def graph(self, name: str) -> Path:
        """The file of a graph; ValueError naming those there are otherwise."""
        graphs = self.manifest.graphs
        if name not in graphs:
            raise ValueError(f"this bundle has no graph {name!r}; it has {', '.join(graphs)}")
        return self.path / graph_file(name)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The prompt tokenizer, read once; BundleError if it does not fit the model."""
        return _text_tokenizer(self.path / TEXT_TOKENIZER, self.manifest)


def open_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Opens the bundle folder `path`; BundleError says what is wrong and what to do.

    verify=False skips hashing the files, which reads all of them; everything else is checked.
    """
    folder = Path(path)
    data = _read_manifest(folder)
    bundle = Bundle(folder, Manifest.from_json(data.decode()), hashlib.sha256(data).hexdigest())
    for name, digest in bundle.manifest.files.items():
        _check_file(folder, name, digest if verify else None)
    bundle.text_tokenizer  # noqa: B018  read now, so that a bad one is refused here
    return bundle


def manifest_hash(folder: Path) -> str:
    """That of the bundle in a folder, which is another one if anything in it is. BundleError."""
    return hashlib.sha256(_read_manifest(folder)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """That of the bundle in a folder; nothing else of the bundle is looked at. BundleError."""
    return Manifest.from_json(_read_manifest(folder).decode())


def _read_manifest(folder: Path) -> bytes:
    if not folder.exists():
        raise BundleError(f"{folder} does not exist; `nuwa export` makes bundles")
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; a checkpoint becomes a bundle with "
            f"`nuwa export`"
        )
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{path} is too large to be a manifest; export the bundle again")
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not UTF-8 text; copy or export the bundle again") from None
    return data


def _check_file(folder: Path, name: str, digest: str | None) -> None:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{folder} lacks {name}; copy the whole folder, or export it again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} leads out of the bundle; copy the file itself, not a link to it")
    if digest is not None and file_hash(path) != digest:
        raise BundleError(
            f"{path} is not the file that the manifest names (its SHA-256 differs): it was "
            f"changed or cut short; copy or export the bundle again"
        )


def _text_tokenizer(path: Path, manifest: Manifest) -> TextTokenizer:
    try:
        tokenizer = TextTokenizer.from_file(path)
    except ValueError as error:
        raise BundleError(f"{error}; export the bundle again") from None
    text = manifest.config.text
    have = (tokenizer.vocabulary_size, tokenizer.length)
    if have != (text.vocabulary_size, text.length):
        raise BundleError(
            f"{path} has {have[0]} ids and texts of {have[1]}, the model {text.vocabulary_size} "
            f"and {text.length}; export the bundle again"
        )
    return tokenizer
