"""The manifest's round trip, and what its reader refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from nuwa.spec.config import PRESETS, VisualConfig
from nuwa.spec.manifest import (
    FORMAT_VERSION,
    GRAPHS,
    BundleError,
    Manifest,
    decoder_step_inputs,
    decoder_step_outputs,
    file_hash,
    graph_file,
    graph_names,
)
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task


def example() -> Manifest:
    names = graph_names(PRESETS["sprites"], ranker=True)
    files = dict.fromkeys((*map(graph_file, names), "tokenizer.json"), "0" * 64)
    return Manifest(
        name="sprites",
        config=PRESETS["sprites"],
        tasks=(Task.T2I, Task.S2I, Task.V2V),
        precision="fp16",
        opset=20,
        cache_entries=222,
        files=files,
        parity={"decoder_step": {"logits_relative": 1e-6, "token_mismatches": 0}},
        parameter_count=123,
        licence="Apache-2.0",
        training_data="captioned moving sprites; Nünchen, 猫",
        created="2026-01-02T03:04:05+00:00",
        rankers=("clip",),
        sampling={Task.S2I: Sampling(temperature=0.5), Task.V2V: Sampling(top_k=3)},
    )


def changed(**values) -> str:
    data = json.loads(example().to_json())
    for name, value in values.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    return json.dumps(data)


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset):
    manifest = dataclasses.replace(example(), config=PRESETS[preset])
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_hash_of_contents_is_of_what_is_computed():
    """Not of when it was exported, nor of how exact it was found to be."""
    manifest = example()
    assert len(manifest.contents_hash) == 64
    assert Manifest.from_json(manifest.to_json()).contents_hash == manifest.contents_hash
    again = dataclasses.replace(manifest, created="2027-01-02T03:04:05+00:00", parity={})
    assert again.contents_hash == manifest.contents_hash
    others = (
        {"files": manifest.files | {"tokenizer.json": "1" * 64}},
        {"precision": "fp32"},
        {"config": PRESETS["base"]},
        {"sampling": {}},
    )
    hashes = {dataclasses.replace(manifest, **other).contents_hash for other in others}
    assert len(hashes | {manifest.contents_hash}) == 1 + len(others)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "names no format_version"),
        ('{"name": "x"}', "names no format_version"),
        (changed(format_version=FORMAT_VERSION + 1), "format version 4, this nuwa-runtime reads 3"),
        (changed(format_version=1), "format version 1, .* export the checkpoint again"),
        (changed(format_version="2"), "format version '2'"),
        (changed(licence=None), r"lacks \['licence'\]"),
        (changed(surprise=1), r"unknown fields \['surprise'\]"),
        (changed(name=3), "name is 3, not a string"),
        (changed(precision="fp4"), "precision is 'fp4'"),
        (changed(opset=0), "opset is 0, not a positive integer"),
        (changed(cache_entries=True), "cache_entries is True"),
        (changed(cache_entries="222"), "cache_entries is '222'"),
        (changed(parity=[1]), r"parity is \[1\]"),
        (changed(parity={"decoder_step": 1}), "parity is"),
        (changed(config={"name": "x", "colour": 1}), "cannot be used: .*colour"),
        (changed(config=7), "cannot be used"),
        (changed(tasks=["t2x"]), "cannot be used: .*t2x"),
        (changed(tasks=5), "cannot be used"),
        (changed(files=["decoder_step.onnx"]), "files is"),
        (changed(files={}), "complete: .*decoder_step.onnx.* missing"),
        (changed(rankers=["best"]), r"rankers is \['best'\], not \[\] or \['clip'\]"),
        (changed(rankers="clip"), "rankers is 'clip'"),
        (changed(rankers=None), r"lacks \['rankers'\]"),
        (changed(sampling=None), r"lacks \['sampling'\]"),
        (changed(sampling=[]), "sampling defaults are \\[\\], not an object"),
        (changed(sampling={"t2x": {}}), "sampling defaults of 't2x'; the model does t2i"),
        (changed(sampling={"t2i": {"seed": 3}}), "they may set temperature, top_k, top_p, guid"),
        (changed(sampling={"t2i": {"temperature": "1"}}), "temperature '1' is not a number"),
        (changed(sampling={"t2i": {"top_k": 2.0}}), "top_k 2.0 is not a whole number"),
        (changed(sampling={"t2i": {"top_p": 0}}), r"top_p 0 is not in \(0, 1\]"),
    ],
)
def test_refusals_say_what_is_wrong(text, message):
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", "/etc/passwd", "a\\b", "", ".hidden", "manifest.json", "C:x", "a\n", "-rf"],
)
def test_file_names_stay_inside_the_folder(name):
    files = example().files | {name: "0" * 64}
    with pytest.raises(BundleError, match="plain file names inside the folder"):
        Manifest.from_json(changed(files=files))


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, 5])
def test_hashes_look_like_hashes(digest):
    with pytest.raises(BundleError, match="SHA-256 in hexadecimal"):
        Manifest.from_json(changed(files=example().files | {"tokenizer.json": digest}))


def test_graphs_follow_the_model():
    visual, plain = PRESETS["sprites"], PRESETS["base"]
    blind = dataclasses.replace(visual, sketch=None)
    assert graph_names(plain) == GRAPHS
    assert graph_names(plain, ranker=True) == (*GRAPHS, "ranker")
    assert graph_names(blind) == (*GRAPHS, "visual_encoder")
    assert graph_names(visual) == (*GRAPHS, "visual_encoder", "sketch_tokenizer")
    assert example().graphs == (*graph_names(visual), "ranker")


@pytest.mark.parametrize("graph", ["visual_encoder", "sketch_tokenizer", "ranker"])
def test_every_graph_of_the_model_has_its_file(graph):
    files = {name: digest for name, digest in example().files.items() if graph not in name}
    with pytest.raises(BundleError, match=rf"complete: \['{graph}.onnx'\] missing"):
        Manifest.from_json(changed(files=files))


def test_names_of_the_decoder_steps_border():
    decoder = dataclasses.replace(PRESETS["base"].decoder, layers=2)
    config = dataclasses.replace(PRESETS["base"], decoder=decoder)
    inputs, outputs = decoder_step_inputs(config), decoder_step_outputs(2)
    assert inputs[:2] == ["tokens", "coordinates"] and inputs[13] == "ranks"
    assert inputs[14:17] == ["key_cache_0", "key_cache_1", "value_cache_0"]
    assert inputs[-1] == "cross_value_1" and len(inputs) == len(set(inputs)) == 22
    seeing = decoder_step_inputs(dataclasses.replace(config, visual=VisualConfig()))
    assert seeing == [*inputs[:14], "cross_columns", *inputs[14:]]
    assert outputs[:3] == ["next_tokens", "logits", "key_cache_0_out"]
    caches = {name.removesuffix("_out") for name in outputs[2:]}
    assert caches == {name for name in inputs if "_cache_" in name}


def test_file_hash_is_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1_000_000)
    assert file_hash(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
