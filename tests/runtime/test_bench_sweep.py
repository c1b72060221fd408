"""`nuwa bench sweep`: what is worth having, what is written, and what is made for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from pathlib import Path

import pytest

from nuwa.runtime.bench import making, sweep
from nuwa.runtime.bench.sweep_report import sections
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.cli import main
from nuwa.runtime.client import LocalClient
from nuwa.runtime.errors import UnavailableError
from nuwa.runtime.settings import read
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine


def choice(name: str) -> sweep.Choice:
    return sweep.Choice(name, "auto", None, 2)


def outcome(
    name: str, latency: float, throughput: float, noise: float = 0.0, **others
) -> sweep.Outcome:
    """Both known to within the share `noise`."""
    return sweep.Outcome(
        choice(name),
        "fp32",
        latency,
        throughput,
        latency_low=latency * (1 - noise),
        latency_high=latency * (1 + noise),
        throughput_low=throughput * (1 - noise),
        throughput_high=throughput * (1 + noise),
        **others,
    )


def worth(*outcomes: sweep.Outcome) -> list[str]:
    return sorted(one.choice.bundle for one in sweep.ranked(outcomes) if one.worth)


@contextlib.contextmanager
def opened(path, *, slots, threads, backend, queue_size):
    """As targets.in_process, for a fake engine."""
    if backend == "gpu":
        raise UnavailableError("there is no GPU")
    engine = FakeEngine(slots)
    with LocalClient(engine, queue_size=queue_size) as client:
        yield Target(client, engine.info, IN_PROCESS, None, engine.slots, None)


def test_settings_that_others_beat_are_not_worth_having():
    outcomes = sweep.ranked(
        [
            outcome("slow", 3.0, 1.0),
            outcome("quick", 1.0, 2.0),
            outcome("wide", 2.5, 9.0),
            outcome("middle", 1.1, 5.0),
            outcome("same", 1.1, 5.0),
            sweep.Outcome(choice("gone"), problem="no such processor"),
        ]
    )
    names = [one.choice.bundle for one in outcomes]
    assert names == ["quick", "middle", "same", "wide", "slow", "gone"]
    assert [one.worth for one in outcomes] == [True, True, True, True, False, False]
    assert sweep.best(outcomes, "latency").choice.bundle == "quick"
    assert sweep.best(outcomes, "throughput").choice.bundle == "wide"
    assert sweep.best(outcomes, "balance").choice.bundle == "middle"
    with pytest.raises(ValueError, match="settings could be measured: gone.*no such processor"):
        sweep.best(outcomes[-1:], "latency")
    with pytest.raises(ValueError, match="'x' is not one of latency"):
        sweep.best(outcomes, "x")


def test_noise_does_not_decide_what_is_worth_having():
    assert worth(outcome("a", 1.0, 5.0, 0.05), outcome("b", 1.02, 4.9, 0.05)) == ["a", "b"]
    assert worth(outcome("a", 1.0, 5.0, 0.05), outcome("b", 1.3, 4.9, 0.05)) == ["a"]
    assert worth(outcome("a", 1.0, 5.0, 0.05), outcome("b", 1.3, 5.1, 0.05)) == ["a"], (
        "surely later, and not surely more"
    )
    assert worth(outcome("a", 1.0, 5.0, 0.05), outcome("b", 1.3, 7.0, 0.05)) == ["a", "b"]
    without = dataclasses.replace(outcome("b", 1.3, 4.9), throughput_low=None)
    assert worth(outcome("a", 1.0, 5.0, 0.01), without) == ["a"], "then the value stands for itself"
    unsure = dataclasses.replace(outcome("b", 1.3, 4.9, 0.05), latency_low=None, latency_high=None)
    assert worth(outcome("a", 1.0, 5.0, 0.05), unsure) == ["a", "b"], "b may be the quicker one"
    assert worth(outcome("a", 1.0, 9.0, 0.05), unsure) == ["a"], "which has surely more throughput"


def test_the_best_settings_are_what_a_server_reads_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "here" / "b").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = sweep.Outcome(sweep.Choice("b", "auto", 2, 4), "fp32", 0.5, 3.0)
    Path("server.toml").write_text(sweep.to_toml(found))
    monkeypatch.chdir(tmp_path / "there")
    settings = read({}, Path("../here/server.toml"), {})
    assert settings.bundle == tmp_path / "here" / "b" and settings.bundle.is_dir()
    assert (settings.threads, settings.slots) == (2, 4)
    made = dataclasses.replace(found, folder=str(tmp_path / "engines"))
    assert f'"{tmp_path / "engines"}"' in sweep.to_toml(made)


def test_buckets_are_of_backends_that_have_them():
    made = list(sweep.choices(["b"], ["auto", "tensorrt"], [None], [1], [(64,), (16, 64)]))
    assert [(each.backend, each.buckets) for each in made] == [
        ("auto", None),
        ("tensorrt", (64,)),
        ("tensorrt", (16, 64)),
    ]
    assert sweep.told(made[2]) == "b, tensorrt, threads one a core, slots 1, buckets 16 64"
    assert [each.buckets for each in sweep.choices(["b"], ["tensorrt"], [None], [1])] == [None]


def test_a_sweep_measures_each(monkeypatch):
    monkeypatch.setattr(sweep, "in_process", opened)
    wanted = list(sweep.choices(["b"], ["cpu", "gpu"], [None], [1, 2]))
    found = sweep.sweep(wanted, Workload(Task.T2I), 0.4)
    assert len(found) == 4
    assert sorted(one.problem for one in found) == [
        "",
        "",
        *["UnavailableError: there is no GPU"] * 2,
    ]
    for one in found[:2]:
        if one.latency_low is not None:  # this machine may have had a slow moment
            assert one.latency_low <= one.latency <= one.latency_high
        assert one.requests >= sweep.LEAST
        if one.throughput_low is not None:
            assert one.throughput_low <= one.throughput_high
        assert one.throughput > 1
        assert one.answers > 1 and one.outcomes["ok"] >= one.requests + one.answers
        assert one.model["bundle_hash"] == "0" * 64 and one.model["evaluation"] is None
        assert one.folder == str(Path("b").resolve())


def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch):
    @contextlib.contextmanager
    def stopped(path, *, slots, **others):
        if slots == 2:
            raise KeyboardInterrupt
        with opened(path, slots=slots, **others) as target:
            yield target

    monkeypatch.setattr(sweep, "in_process", stopped)
    wanted = list(sweep.choices(["b"], ["cpu"], [None], [1, 2, 4]))
    found = sweep.sweep(wanted, Workload(Task.T2I), 0.2)
    assert [one.problem for one in found] == ["", sweep.INTERRUPTED, sweep.INTERRUPTED]
    assert found[0].worth
    assert sweep.notes(found)[0] == "Interrupted: 2 of 3 settings were not measured."


def test_what_was_measured_is_written_after_each(tmp_path, monkeypatch):
    """As if it were the last one: who is killed leaves what Ctrl-C leaves."""
    kept = []

    def killed(path, *, slots, **others):
        if slots == 4:
            kept.append(json.loads((tmp_path / "sweep.json").read_text()))
            raise SystemExit  # which nothing catches, as nothing does a kill
        return opened(path, slots=slots, **others)

    monkeypatch.setattr(sweep, "in_process", killed)
    words = ["sweep", "b", "--task", "t2i", "--slots-of", "1,2,4", "--seconds", "0.2"]
    main(["bench", *words, "--out", str(tmp_path)])
    (left,) = kept
    assert left == json.loads((tmp_path / "sweep.json").read_text()) and left["interrupted"]
    assert [one["problem"] for one in left["outcomes"]] == ["", "", sweep.INTERRUPTED]
    assert left["best"]["choice"]["slots"] in (1, 2)
    assert left["notes"] == ["Interrupted: 1 of 3 settings were not measured."]


def test_a_precision_that_cannot_be_exported_is_an_outcome(tmp_path, capsys, monkeypatch):
    """Told once for each of its settings, and tried once."""
    tried = []

    def export(checkpoint, out, precision):
        tried.append(precision)
        if precision == "int8":
            raise ValueError("numbers disagree")
        return out

    monkeypatch.setattr(making, "export", export)
    monkeypatch.setattr(sweep, "in_process", opened)
    words = ["--checkpoint", "c", "--precision", "fp32,int8", "--slots-of", "1,2", "--task", "t2i"]
    assert main(["bench", "sweep", *words, "--seconds", "0.2", "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    problems = sorted(one["problem"] for one in last["outcomes"])
    assert problems == ["", "", *["ValueError: numbers disagree"] * 2]
    assert tried == ["fp32", "int8"]


def test_a_faster_bundle_with_worse_scores_shows_both():
    scored = [
        outcome(name, latency, 3.0, model={"bundle_hash": name, "evaluation": {"t2i joint": joint}})
        for name, latency, joint in (("fp32", 2.0, 0.95), ("int8", 1.0, 0.71))
    ]
    settings, scores = sections(sweep.ranked(scored), "t2i")
    assert [row[0].partition(",")[0] for row in settings.rows] == ["int8", "fp32"]
    assert [(row[0], row[-1]) for row in scores.rows] == [
        ("int8", "joint 0.710"),
        ("fp32", "joint 0.950"),
    ]
    assert len(sections(scored, "t2v")) == 1
    assert "worse pictures, as scores say" in sweep.notes(scored)[0]
    unknown = dataclasses.replace(scored[1], model={"bundle_hash": "x", "evaluation": None})
    assert "No scores are known of int8" in sweep.notes([scored[0], unknown])[0]
    assert sweep.notes(scored[:1]) == []


def measured(name: str, latency: float, throughput: float) -> sweep.Outcome:
    return outcome(name, latency, throughput, 0.01, requests=9, answers=20, outcomes={"ok": 29})


def test_a_sweep_writes_what_it_found(tmp_path, capsys, monkeypatch):
    made = [
        measured("quick", 0.1, 2.0),
        measured("wide", 0.25, 9.0),
        sweep.Outcome(choice("<gone>"), problem="no such processor"),
    ]
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **named: sweep.ranked(made))
    words = ["sweep", "b", "--slots-of", "2", "--out", str(tmp_path), "--prefer", "throughput"]
    assert main(["bench", *words]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["best"]["choice"]["bundle"] == "wide" and last["prefer"] == "throughput"
    assert "no such processor" in printed and "250 ms" in printed
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<circle") >= 2 and "<gone>" not in page and "&lt;gone&gt;" in page
    assert f'bundle = "{Path("wide").resolve()}"' in (tmp_path / "server.toml").read_text()
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written == last and len(written["outcomes"]) == 3
    assert written["schema"] == "nuwa-bench-sweep/1" and written["machine"]["processor"]
    assert written["command"] == shlex.join(["nuwa", "bench", *words])
    assert written["when"] and not written["interrupted"]


def test_a_sweep_of_which_nothing_could_be_measured_is_told_all_the_same(
    tmp_path, capsys, monkeypatch
):
    gone = sweep.Outcome(choice("b"), problem="no such processor")
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **named: [gone])
    assert main(["bench", "sweep", "b", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["best"] is None
    assert "none of the settings could be measured" in printed.err
    assert sorted(os.listdir(tmp_path)) == ["sweep.html", "sweep.json"]


def test_an_interrupted_sweep_says_so(tmp_path, capsys, monkeypatch):
    found = [measured("a", 0.1, 2.0), sweep.Outcome(choice("b"), problem=sweep.INTERRUPTED)]
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **named: sweep.ranked(found))
    assert main(["bench", "sweep", "a", "b", "--out", str(tmp_path)]) == 130
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["interrupted"] and last["best"]["choice"]["bundle"] == "a"
    assert json.loads((tmp_path / "sweep.json").read_text())["interrupted"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "which bundles?"),
        ("a --slots-of 1,x", "--slots-of '1,x' is not N,N,..."),
        ("a --threads-of 0", "--threads-of '0': at least 1 each"),
        ("a --backends gpu", "backend 'gpu' is not one of"),
        ("a --server x:1", "--server is of --server, and not heeded beside `sweep`"),
        ("a --backend native-cpu", "--backend is of a bundle or --preset, --server, and not"),
        ("a --precision int8", "--precision is of --checkpoint and --preset"),
        ("--checkpoint c --precision int4 --out o", "--precision 'int4' is not one of"),
        ("--checkpoint c", "need --out"),
        ("a --buckets-of 16,64", "of auto steps have any number of rows"),
        ("a --backends tensorrt --buckets-of 16,64", "need --out"),
        ("a --scores /nowhere", "there is no such file"),
        ("a --out /proc/x", "/proc/x cannot be written to"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_told_before_anything_is_measured(
    words, problem, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **named: pytest.fail("it measured"))
    assert main(["bench", "sweep", *words.split()]) == 2
    assert problem in capsys.readouterr().err


def test_each_precision_of_a_checkpoint_is_exported_once(tmp_path, capsys, monkeypatch):
    ran, swept = [], []
    monkeypatch.setattr(making, "_run", lambda words, what: ran.append(words))

    def kept(wanted, *arguments, folder, **named):
        swept.extend(wanted)
        for each in wanted:
            folder(each)
        return sweep.ranked([measured("a", 0.1, 2.0)])

    monkeypatch.setattr(sweep, "sweep", kept)
    words = ["--checkpoint", "c", "--precision", "fp32,int8", "--slots-of", "1,2"]
    assert main(["bench", "sweep", *words, "--out", str(tmp_path)]) == 0
    assert [each[-2] for each in ran] == ["fp32", "int8"], "--overwrite is last"
    assert all(each[:2] == ["nuwa.runtime", "export"] for each in ran)
    folders = [str(tmp_path / "bundles" / name) for name in ("fp32", "int8")]
    assert [each.bundle for each in swept] == [folder for folder in folders for _ in (1, 2)]


def test_engines_are_built_once_for_each_list_of_buckets(tmp_path, monkeypatch):
    from nuwa.runtime.commands.bench_sweep import Folders

    ran = []
    monkeypatch.setattr(making, "_run", lambda words, what: ran.append(words))
    bundle = tmp_path / "bundle"
    (bundle / "engines").mkdir(parents=True)
    (bundle / "decoder_step.onnx").write_bytes(b"graph")
    folder = Folders(tmp_path / "out", {})
    plain = sweep.Choice(str(bundle), "tensorrt", None, 2)
    assert folder(plain) == bundle and not ran
    first = dataclasses.replace(plain, buckets=(16, 64))
    made = folder(first)
    assert made == folder(dataclasses.replace(first, threads=4)) and len(ran) == 1
    assert ran[0][-5:] == ["--slots", "2", "--rows", "16", "64"]
    assert [path.name for path in made.iterdir()] == ["decoder_step.onnx"], "no older engines"
    assert folder(dataclasses.replace(first, buckets=(64,))) != made and len(ran) == 2
