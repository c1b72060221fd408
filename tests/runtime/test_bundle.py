"""open_bundle: a whole bundle opens; anything else is refused with a sentence that helps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from nuwa.runtime.bundle import open_bundle
from nuwa.spec.config import PRESETS
from nuwa.spec.manifest import BundleError, Manifest, file_hash, graph_file, graph_names
from nuwa.training.text import train_text_tokenizer

GRAPHS = graph_names(PRESETS["sprites"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose graphs are a few bytes: opening reads none of them."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    tokenizer = train_text_tokenizer(["a red digit"], 270)
    tokenizer.save(bundle / "tokenizer.json")
    for name in GRAPHS:
        (bundle / graph_file(name)).write_bytes(name.encode() * 100)
    write_manifest(bundle, tokenizer.vocabulary_size)
    return bundle


def write_manifest(bundle: Path, vocabulary_size: int, **changes) -> None:
    config = PRESETS["sprites"]
    text = dataclasses.replace(config.text, vocabulary_size=vocabulary_size)
    names = (*map(graph_file, GRAPHS), "tokenizer.json")
    manifest = Manifest(
        name="sprites",
        config=dataclasses.replace(config, text=text),
        tasks=config.tasks,
        precision="fp32",
        opset=20,
        cache_entries=222,
        files={name: file_hash(bundle / name) for name in names},
        parity={},
        parameter_count=1,
        licence="CC0-1.0",
        training_data="none",
        created="2026-01-02T03:04:05+00:00",
    )
    text_of_it = dataclasses.replace(manifest, **changes).to_json()
    (bundle / "manifest.json").write_text(text_of_it, encoding="utf-8")


def edit_manifest(bundle: Path, **changes) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_bundle_opens(folder):
    bundle = open_bundle(folder)
    assert bundle.manifest.name == "sprites"
    assert bundle.graph("decoder_step") == folder / "decoder_step.onnx"
    assert bundle.hash == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    ids = bundle.text_tokenizer.encode("a red digit")
    assert ids.shape == (77,) and ids[0] == bundle.text_tokenizer.bos
    assert open_bundle(str(folder)) == bundle


def test_exported_bundle_opens(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.config.name == "tiny"
    assert bundle.manifest.graphs == (*GRAPHS, "ranker")
    assert all(bundle.graph(name).is_file() for name in bundle.manifest.graphs)
    assert bundle.text_tokenizer.vocabulary_size == bundle.manifest.config.text.vocabulary_size


def test_hash_depends_on_every_file(folder):
    before = open_bundle(folder).hash
    (folder / "text_encoder.onnx").write_bytes(b"another one")
    write_manifest(folder, open_bundle(folder, verify=False).text_tokenizer.vocabulary_size)
    assert open_bundle(folder).hash != before


@pytest.mark.parametrize("name", ["vae", "ranker"])
def test_graphs_that_are_not_there_are_refused(folder, name):
    said = f"this bundle has no graph '{name}'; it has {', '.join(GRAPHS)}"
    with pytest.raises(ValueError, match=said):
        open_bundle(folder).graph(name)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", [*map(graph_file, GRAPHS), "tokenizer.json"])
def test_missing_file_is_named(folder, name, verify):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}; copy the whole folder, or export"):
        open_bundle(folder, verify=verify)


@pytest.mark.parametrize("name", [*map(graph_file, GRAPHS), "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "bit", "longer"])
def test_damaged_file_is_named(folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    damaged = {"cut": data[:-1], "emptied": b"", "bit": flipped, "longer": data + b"x"}[damage]
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{name} is not the file that the manifest names"):
        open_bundle(folder)


def test_verify_false_skips_the_hashes_only(folder):
    (folder / "decoder_step.onnx").write_bytes(b"changed")
    assert open_bundle(folder, verify=False).manifest.name == "sprites"


def test_folder_in_place_of_a_file_is_refused(folder):
    (folder / "decoder_step.onnx").unlink()
    (folder / "decoder_step.onnx").mkdir()
    with pytest.raises(BundleError, match=r"lacks decoder_step\.onnx"):
        open_bundle(folder)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match="nowhere does not exist; `nuwa export` makes bundles"):
        open_bundle(tmp_path / "nowhere")


def test_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(tmp_path)


def test_file_in_place_of_the_folder(folder):
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(folder / "decoder_step.onnx")


def test_manifest_of_another_version(folder):
    edit_manifest(folder, format_version=1)
    with pytest.raises(BundleError, match="format version 1, .* reads 3; install"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b'{"format_version": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"null", "names no format_version"),
    ],
)
def test_unreadable_manifest(folder, data, message):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_giant_manifest_is_not_read(folder):
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match="too large to be a manifest"):
        open_bundle(folder)


def test_paths_out_of_the_folder_are_refused(folder):
    secret = folder.parent / "secret"
    secret.write_text("x")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {"../secret": file_hash(secret)})
    with pytest.raises(BundleError, match="plain file names inside the folder"):
        open_bundle(folder)


def test_link_out_of_the_folder_is_refused(folder):
    path = folder / "text_encoder.onnx"
    shutil.move(path, folder.parent / "elsewhere.onnx")
    path.symlink_to(folder.parent / "elsewhere.onnx")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(folder)


def test_linked_bundle_folder_opens(folder):
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert open_bundle(link).manifest.name == "sprites"


def test_tokenizer_of_another_model_is_refused(folder):
    write_manifest(folder, 300)
    with pytest.raises(BundleError, match="ids and texts of 77, the model 300 and 77"):
        open_bundle(folder)


def test_tokenizer_without_a_vocabulary_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text('{"format": "nuwa-text-tokenizer/1", "length": 77, "bpe": {}}')
    write_manifest(folder, 270)
    with pytest.raises(BundleError, match="no usable BPE model: .*; export the bundle again"):
        open_bundle(folder)
