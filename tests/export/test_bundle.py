"""export_bundle: what it writes, what it refuses, and that it is all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
import onnxruntime  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from nuwa.export import bundle as export  # noqa: E402
from nuwa.export import graphs  # noqa: E402
from nuwa.export.bundle import export_bundle  # noqa: E402
from nuwa.export.parity import LIMITS, ExportError  # noqa: E402
from nuwa.runtime.bundle import open_bundle  # noqa: E402
from nuwa.runtime.engine import load_engine  # noqa: E402
from nuwa.runtime.errors import UnavailableError  # noqa: E402
from nuwa.spec.manifest import (  # noqa: E402
    DECODER_STEP,
    GRAPHS,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    MANIFEST,
    TEXT_ENCODER,
    BundleError,
    graph_file,
    graph_names,
)
from nuwa.spec.plan import cache_entries  # noqa: E402
from nuwa.spec.sampling import Sampling  # noqa: E402
from nuwa.spec.tasks import Task  # noqa: E402
from nuwa.training.checkpoint import load_checkpoint  # noqa: E402
from nuwa.training.ranker import Ranker, save_ranker  # noqa: E402


def reusing(monkeypatch, bundle: Path, special: str, write: Callable) -> None:
    """Exports copy the files of a bundle, which is much faster, but for one graph's."""

    def write_graph(exported, path: Path) -> None:
        if exported.name == special:
            write(exported, path)
        else:
            shutil.copy(bundle / path.name, path)

    monkeypatch.setattr(export, "write_graph", write_graph)


def perturbing(monkeypatch, bundle: Path, graph: str) -> None:
    """Exports write the largest weight of one graph 2 % too large."""

    def write_perturbed(exported, path: Path) -> None:
        model = onnx.load(bundle / path.name)
        weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
        scaled = numpy_helper.to_array(weight) * np.float32(1.02)
        weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
        onnx.save(model, path)

    reusing(monkeypatch, bundle, graph, write_perturbed)


def skip_verification(monkeypatch) -> None:
    """For tests of files and folders, which need no real graphs."""
    monkeypatch.setattr(export, "verify", lambda *arguments: {})
    monkeypatch.setattr(export, "write_graph", lambda graph, path: path.write_bytes(b"graph"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_manifest_says_what_was_exported(tiny_bundle, tiny_checkpoint):
    bundle, checkpoint = open_bundle(tiny_bundle), load_checkpoint(tiny_checkpoint)
    manifest = bundle.manifest
    assert (manifest.name, manifest.precision, manifest.opset) == ("tiny", "fp32", graphs.OPSET)
    assert manifest.config == checkpoint.config and manifest.tasks == checkpoint.config.tasks
    assert manifest.cache_entries == cache_entries(checkpoint.config.decoder)
    names = graph_names(checkpoint.config, ranker=True)
    assert set(names) > set(GRAPHS) and manifest.graphs == names
    assert set(manifest.files) == {*map(graph_file, names), "tokenizer.json"}
    assert manifest.rankers == ("clip",)
    assert (manifest.licence, manifest.training_data) == ("CC0-1.0", "random weights, untrained")
    models = (checkpoint.nuwa, checkpoint.vqgan, checkpoint.sketch_vqgan, checkpoint.ranker)
    count = sum(value.numel() for model in models for value in model.parameters())
    assert manifest.parameter_count == count
    assert set(manifest.parity) == {*names, "versions"}
    assert manifest.parity["versions"]["onnxruntime"] == onnxruntime.__version__
    step = manifest.parity["decoder_step"]
    assert 0 < step["logits_relative"] < LIMITS["fp32"]["relative"] / 10
    assert step["token_mismatches"] == step["overwritten_entries"] == 0
    assert set(tree(tiny_bundle)) == {MANIFEST, *manifest.files}


def test_model_without_visual_encoder_has_four_graphs(plain_bundle):
    manifest = open_bundle(plain_bundle).manifest
    assert (manifest.graphs, manifest.rankers) == (GRAPHS, ())
    assert set(tree(plain_bundle)) == {MANIFEST, *map(graph_file, GRAPHS), "tokenizer.json"}


def test_folder_has_the_usual_permissions(tiny_bundle, tmp_path):
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(tiny_bundle.stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("graph", ["decoder_step", "text_encoder", "visual_encoder"])
def test_wrong_numbers_are_refused_and_nothing_is_left(
    tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch, graph
):
    perturbing(monkeypatch, tiny_bundle, graph)
    with pytest.raises(ExportError, match=rf"{graph}\.onnx disagrees with PyTorch"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_refused_export_leaves_the_old_bundle(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    perturbing(monkeypatch, tiny_bundle, "text_encoder")
    with pytest.raises(ExportError, match="text_encoder"):
        export_bundle(tiny_checkpoint, out, overwrite=True)
    assert tree(out) == tree(tiny_bundle)
    assert list(tmp_path.iterdir()) == [out]


def test_interrupted_export_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    skip_verification(monkeypatch)
    monkeypatch.setattr(export, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, tmp_path / "deep" / "bundle")
    assert list((tmp_path / "deep").iterdir()) == []


def test_overwrite_replaces_a_bundle_and_its_old_files(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    out = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, out)
    (out / "old.onnx.data").write_bytes(b"left over")
    export_bundle(tiny_checkpoint, out, overwrite=True)
    assert "old.onnx.data" not in tree(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_stays_one_and_its_bundle_is_replaced(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    out, link = tmp_path / "v1", tmp_path / "current"
    export_bundle(tiny_checkpoint, out)
    link.symlink_to(out)
    (out / "old.onnx.data").write_bytes(b"left over")
    export_bundle(tiny_checkpoint, link, overwrite=True)
    assert link.is_symlink() and "old.onnx.data" not in tree(out)
    assert sorted(tmp_path.iterdir()) == [link, out]


def test_what_another_export_works_on_is_left_alone(tiny_checkpoint, tmp_path, monkeypatch):
    """Process numbers come again, in containers with each start."""
    skip_verification(monkeypatch)
    other = tmp_path / f".bundle.{os.getpid()}.partial"
    (other / "of_another").mkdir(parents=True)
    export_bundle(tiny_checkpoint, tmp_path / "bundle")
    assert (other / "of_another").is_dir()


def test_a_mount_point_is_refused_before_the_work(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_checkpoint", None)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="is a mount point; name a folder in it, such as .*bundle"):
        export_bundle(tiny_checkpoint, tmp_path)


def test_existing_folder_needs_leave(tiny_checkpoint, tiny_bundle):
    before = tree(tiny_bundle)
    with pytest.raises(ValueError, match="exists; choose another folder, or allow"):
        export_bundle(tiny_checkpoint, tiny_bundle)
    assert tree(tiny_bundle) == before


def test_folder_that_is_no_bundle_is_never_overwritten(tiny_checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tiny_checkpoint, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="is not a bundle|is a file"):
            export_bundle(tiny_checkpoint, out, overwrite=True)
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


def test_empty_folder_is_used(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    out = tmp_path / "empty"
    out.mkdir()
    export_bundle(tiny_checkpoint, out)
    assert open_bundle(out).manifest.name == "tiny"


def test_unknown_precision_names_the_choices(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="'int3'; choose one of fp32, fp16"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", precision="int3")


def test_incomplete_checkpoint_is_named(tiny_checkpoint, tmp_path):
    broken = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "nuwa.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"nuwa\.safetensors is missing"):
        export_bundle(broken, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [broken]


def test_tokenizer_that_does_not_fit_the_config_is_refused(plain_checkpoint, tmp_path):
    broken = tmp_path / "checkpoint"
    shutil.copytree(plain_checkpoint, broken)
    path = broken / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"length": 50}))
    with pytest.raises(ValueError, match="texts of 50, its config says 270 and 77"):
        export_bundle(broken, tmp_path / "bundle")


def test_ranker_that_does_not_fit_the_model_is_refused(tiny_checkpoint, tmp_path):
    broken = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, broken)
    ranker = load_checkpoint(tiny_checkpoint).ranker
    save_ranker(Ranker(dataclasses.replace(ranker.config, resolution=32)), broken)
    with pytest.raises(ValueError, match="pictures of 32 pixels, its config says 270, 77 and 16"):
        export_bundle(broken, tmp_path / "bundle")


def test_progress_names_every_step_in_order(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    monkeypatch.setattr(
        export,
        "verify",
        lambda checkpoint, folder, precision, progress: {
            name: {} for name in graph_names(checkpoint.config, ranker=True) if not progress(name)
        },
    )
    seen = []
    export_bundle(tiny_checkpoint, tmp_path / "b", progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert {steps for *_, steps in seen} == {len(seen) - 1}
    assert seen[0][0] == "exporting decoder_step" and seen[-1][0] == "done"


def test_licence_that_was_not_stated_is_not_invented(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    anonymous = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, anonymous)
    (anonymous / "training.json").unlink()
    manifest = export_bundle(anonymous, tmp_path / "bundle")
    assert (manifest.licence, manifest.training_data) == ("not stated", "not stated")


def test_sampling_defaults_travel_from_the_checkpoint(tiny_checkpoint, tmp_path, monkeypatch):
    skip_verification(monkeypatch)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    assert load_checkpoint(checkpoint).sampling == {}
    (checkpoint / "sampling.json").write_text('{"v2v": {"temperature": 0.2, "top_k": 4}}')
    manifest = export_bundle(checkpoint, tmp_path / "bundle")
    assert manifest.sampling == {Task.V2V: Sampling(temperature=0.2, top_k=4)}
    (checkpoint / "sampling.json").write_text('{"v2v": {"temperature": -1}}')
    with pytest.raises(ValueError, match=r"sampling.json: .* of v2v: temperature -1 is not in"):
        load_checkpoint(checkpoint)


def test_external_weights_belong_to_the_bundle(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    write = export.write_graph
    split = "text_encoder"
    reusing(monkeypatch, tiny_bundle, split, lambda graph, path: write(graph, path, 10_000))
    out = tmp_path / "bundle"
    manifest = export_bundle(tiny_checkpoint, out)
    assert "text_encoder.onnx.data" in manifest.files
    assert manifest.parity == open_bundle(tiny_bundle).manifest.parity
    assert open_bundle(out).manifest == manifest
    (out / "text_encoder.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"lacks text_encoder\.onnx\.data"):
        open_bundle(out)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_bundle_of_bf16_has_fp16_tokenizers(tiny_checkpoint, tmp_path, precision):
    """With fp8, the matrices of decoder_step are that, and it needs a GPU."""
    out = tmp_path / "bundle"
    manifest = export_bundle(tiny_checkpoint, out, precision=precision)
    kinds = {}
    for name in manifest.graphs:
        weights = onnx.load(out / graph_file(name)).graph.initializer
        kinds[name] = {w.data_type for w in weights if np.prod(w.dims) > 1000}
    types = onnx.TensorProto
    assert kinds[TEXT_ENCODER] == {types.BFLOAT16}
    eighths = {types.FLOAT8E4M3FN} if precision == "fp8" else set()
    assert kinds[DECODER_STEP] == {types.BFLOAT16} | eighths
    assert kinds[IMAGE_DETOKENIZER] == {types.FLOAT16} < kinds[IMAGE_TOKENIZER]
    for backend in ("auto", "native-cpu", "onnxruntime-cpu"):
        if precision == "bf16":
            assert load_engine(out, backend=backend).info.precision == "bf16"
            continue
        with pytest.raises(UnavailableError, match="of fp32, fp16, bf16 and int8, .* is of fp8"):
            load_engine(out, backend=backend)
