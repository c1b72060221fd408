"""The command `nuwa bench`: what is wrong is told first, and what was measured is never lost."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nuwa.runtime.bench import html, loadgen, making, measure, schema
from nuwa.runtime.bench.card import evaluation_of
from nuwa.runtime.bundle import read_manifest
from nuwa.runtime.cli import main
from nuwa.runtime.commands import bench, bench_against, bench_launches, bench_options
from nuwa.runtime.server import Server

from .fake_engine import FakeEngine

SHORT = ["--task", "t2v", "--frames", "2", "--seconds", "1", "--rounds", "3", "--no-rates"]


@pytest.fixture(scope="module")
def address():
    with Server(FakeEngine(), queue_size=8) as server:
        yield server.address


@pytest.fixture(scope="module")
def result(address, tmp_path_factory) -> Path:
    """Of a server, as a file."""
    out = tmp_path_factory.mktemp("bench")
    assert main(["bench", "--server", address, *SHORT, "--out", str(out)]) == 0
    return out / "result.json"


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda *a, **named: pytest.fail("it measured"))


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "name one thing to measure"),
        ("a b", "name one thing to measure"),
        ("a --preset sprites", "name one thing to measure"),
        ("a --seconds 0", "--seconds 0.0 is not above 0"),
        ("a --scenario server --percentile 100", "--percentile 100.0 is not between 0 and 100"),
        ("a --scenario server", "needs a bound"),
        ("a --scenario server --rate -1", "--rate -1.0 is not above 0"),
        ("a --rate 1", "--rate is of --scenario server, not single-stream"),
        ("a --scenario offline --bound=1", "--bound is of --scenario server, not offline"),
        ("a --streams 8", "--streams is of --scenario multi-stream, not single-stream"),
        ("a --slots-of 1,2", "--slots-of is of `sweep`, and not heeded beside a bundle"),
        ("a --tls", "--tls: of --server"),
        ("a --model m", "--model is of --server"),
        ("--server h:1 --slots 1", "--slots is of a bundle or --preset, and not heeded beside"),
        ("--server h:1 --threads 2", "--threads: of a bundle, and a server has its own"),
        ("sweep a --rounds 3", "--rounds is of a bundle or --preset, --server, and not heeded"),
        ("sweep a --slots 3", "and not heeded beside `sweep`; a sweep has --slots-of"),
        ("--compare a b --out o", "--out is of a bundle or --preset, --server, `sweep`, and not"),
        ("c --compare a b", "--compare is of two results, and measures no c"),
        ("a --least 5000 --queries 10", "--least 5000 are more than --queries 10"),
        ("a --least 5000 --profile edge", "more than --queries 2000 of --profile edge"),
        ("a --threshold -1 --baseline b", "--threshold -1.0 is not at least 0"),
        ("a --threshold nan --baseline b", "--threshold nan is not at least 0"),
        ("a --threshold 0.1", "--threshold is of a comparison: of --compare, --baseline and"),
        ("--server h:1 --threshold=0.1", "--threshold is of a comparison"),
        ("a --task x", "'x'"),
        ("a --samples 3", "--samples (above 1) and --rank-by go together"),
        ("a --out /proc/x", "/proc/x cannot be written to"),
        ("a --loadgen /proc/x", "/proc/x cannot be written to"),
        ("a --precision int8", "a bundle has its own"),
        ("a --checkpoint c", "--checkpoint is of `sweep`"),
        ("a --metrics x:1", "--metrics is of --server"),
        ("a --launches 2 --loadgen x", "LoadGen's logs are of one"),
        ("a --launches 2 --scenario server --bound 1", "a search for the highest rate is of one"),
        ("--server h:1 --launches 2", "servers are launched by who has them"),
        ("sweep a --launches 2", "and not heeded beside `sweep`"),
        ("a --baseline /nowhere", "/nowhere"),
        ("--preset sprites --scores x", "random weights have none"),
        ("/nowhere", "does not exist"),
        ("--compare /nowhere /nowhere", "/nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(words, problem, capsys, unmeasured):
    assert main(["bench", *words.split()]) == 2
    assert problem in capsys.readouterr().err


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.command(parser)
    args = parser.parse_args(words)
    args.words = list(words)
    return args


def test_of_every_option_it_is_known_where_it_is_heeded():
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug")
    bench.command(parser)
    (access,) = [each for each in parser._action_groups if each.title == "access to a server"]
    theirs = {word for each in access._group_actions for word in each.option_strings}
    known = {word for each in parser._actions for word in each.option_strings}
    places = {f"--{name}" for name in bench_options.PLACES}
    assert places == known - theirs - {"-h", "--help"}


def test_a_percentile_is_the_share_that_was_said():
    words = ["a", "--scenario", "server", "--bound", "1", "--seconds", "1", "--rounds", "1"]
    assert bench._settings(parsed(*words, "--percentile", "99.9")).share == 0.999
    assert bench._settings(parsed(*words)).share == 0.99


def test_help_tells_the_defaults_of_profiles():
    parser = argparse.ArgumentParser()
    bench.command(parser)
    told = " ".join(parser.format_help().split())
    assert "(default: 60; --profile edge: 30, server: 120)" in told
    assert "(default: 1; --profile server: 8)" in told and "default: None" not in told


@pytest.mark.parametrize(("bound", "status"), [("1e-6", 1), ("60", 0)])
def test_a_rate_that_misses_its_bound_has_a_status_of_its_own(address, bound, status, capsys):
    """One of which it is not known does not."""
    words = ["--scenario", "server", "--rate", "60", "--bound", bound, "--percentile", "50"]
    assert main(["bench", "--server", address, *SHORT, *words]) == status
    (point,) = last_line(capsys)["load"]
    assert point["met"] is (False if status else None)


def test_loadgen_that_is_not_there_is_told_first(tmp_path, monkeypatch, capsys, unmeasured):
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "/nowhere", "--loadgen", str(tmp_path)]) == 2
    assert "LoadGen is not installed" in capsys.readouterr().err


def test_a_server_is_measured_and_results_are_compared(address, result, tmp_path, capsys):
    whole = schema.read(result)
    assert "<html" in (result.parent / "report.html").read_text()
    words = ["--server", address, *SHORT, "--out", str(tmp_path), "--threshold", "9"]
    assert main(["bench", *words, "--baseline", str(result)]) == 0
    last = last_line(capsys)
    assert last["schema"] == schema.SCHEMA and "rounds" not in last
    assert last["metrics"].keys() == whole["metrics"].keys()
    assert last["comparison"]["status"] == 0 and last["comparison"]["threshold"] == 9.0
    assert "comparison" not in schema.read(tmp_path / "result.json")
    assert main(["bench", "--compare", str(result), str(tmp_path / "result.json")]) == 0
    told = last_line(capsys)
    assert told["schema"] == "nuwa-bench-compare/1" and told["a"] == str(result)
    assert told["differences"][0]["name"] == "latency"
    assert {"verdict", "ratio", "low", "high"} <= told["differences"][0].keys()


def test_a_run_in_launches_is_one_result(tiny_bundle, tmp_path, capfd):
    short = ["--task", "t2i", "--seconds", "0.6", "--rounds", "4", "--no-rates", "--launches", "2"]
    words = [str(tiny_bundle), *short, "--out"]
    assert main(["bench", *words, str(tmp_path / "a")]) == 0
    printed = capfd.readouterr()
    assert "launch 2 of 2" in printed.err and "Launches" in printed.out
    last = json.loads(printed.out.splitlines()[-1])
    assert "each_launch" not in last and "launch " in last["notes"][0]
    whole = schema.read(tmp_path / "a/result.json")
    each = [schema.read(tmp_path / f"a/launch-{number}/result.json") for number in (1, 2)]
    assert [one["rounds"] for one in whole["each_launch"]] == [one["rounds"] for one in each]
    assert whole["outcomes"]["ok"] == sum(one["outcomes"]["ok"] for one in each)
    assert whole["scenario"]["rounds"] == 2 and whole["scenario"]["seconds"] == 0.3
    assert "--launches 2" in whole["command"]
    words = [*words, str(tmp_path / "b"), "--baseline", str(tmp_path / "a/result.json")]
    assert main(["bench", *words, "--threshold", "9"]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    latency = last["comparison"]["differences"][0]
    assert (latency["name"], latency["verdict"], latency["reason"]) == (
        *("latency", "no difference"),
        "",
    )


def test_a_launch_without_a_result_is_told(tiny_bundle, tmp_path, monkeypatch, capsys):
    """The second one does not start."""
    program, starts = tmp_path / "program.py", tmp_path / "starts"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom nuwa.runtime.cli import main\n"
        f"starts = Path({str(starts)!r})\nstarts.open('a').write('.')\n"
        "sys.exit('no memory') if len(starts.read_text()) > 1 else sys.exit(main(sys.argv[1:]))\n"
    )
    monkeypatch.setattr(bench_against, "PYTHON", [sys.executable, str(program)])
    words = [str(tiny_bundle), "--task", "t2i", "--seconds", "0.3", "--rounds", "3", "--no-rates"]
    words += ["--launches", "3"]
    assert main(["bench", *words]) == 1
    printed = capsys.readouterr()
    assert "launch 2 of 3 has no result" in printed.err and starts.read_text() == ".."
    assert json.loads(printed.out.splitlines()[-1])["outcomes"]["ok"]
    assert main(["bench", *words]) == 2
    assert "the first launch has no result" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_is_passed_on_to_a_launch(tmp_path, monkeypatch):
    """Once, and what it does then is waited for."""
    began, heard = tmp_path / "began", tmp_path / "heard"
    program = (
        "import time\nfrom pathlib import Path\n"
        f"try:\n    Path({str(began)!r}).touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        f"    time.sleep(0.2)\n    Path({str(heard)!r}).touch()\n"
    )

    waits, wait = threading.Event(), subprocess.Popen.wait

    def waited(process, timeout=None):
        waits.set()
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waited)

    def interrupt():
        assert waits.wait(60)
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert bench_launches._waited([sys.executable, "-c", program])
    assert heard.exists()


def test_ctrl_c_before_a_launch_has_anything_ends_all(result, tmp_path, monkeypatch, capsys):
    """As while it warms up: those before are the result, and nothing is compared."""
    whole = schema.read(result)
    launches = iter([(whole, False), (None, True)])
    monkeypatch.setattr(bench_launches, "_launched", lambda *a: next(launches))
    words = ["bench", "a", *SHORT, "--launches", "3"]
    assert main([*words, "--baseline", str(result), "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert "has no result" not in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert last["interrupted"] and "comparison" not in last and last["outcomes"]["ok"]
    launches = iter([(None, True)])
    assert main(words) == 130


def test_a_baseline_of_something_else_is_refused_before_measuring(
    address, result, capsys, unmeasured
):
    words = ["--server", address, "--baseline", str(result), *SHORT]
    assert main(["bench", *words, "--scenario", "offline"]) == 2
    assert "scenario.name: single-stream, offline" in capsys.readouterr().err
    assert main(["bench", *words, "--frames", "3"]) == 2
    assert "workload.frames: 2, 3" in capsys.readouterr().err


def test_scores_are_checked_before_measuring(address, tiny_bundle, tmp_path, capsys, unmeasured):
    for path in ("/nowhere", str(tmp_path)):
        words = [str(tiny_bundle), "--task", "t2i", "--scores", path]
        assert main(["bench", *words]) == 2
        assert f"--scores: {path} has none of" in capsys.readouterr().err
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"about": {"bundle_hash": "f" * 64}, "tasks": {}}))
    words = [str(tiny_bundle), "--task", "t2i", "--scores", str(scores)]
    assert main(["bench", *words]) == 2
    assert "--scores: scores.json is of bundle ffff" in capsys.readouterr().err
    assert main(["bench", "--server", address, "--scores", str(scores)]) == 2
    assert "name the server's bundle, too" in capsys.readouterr().err


def test_scores_of_another_export_count_if_its_files_are_the_same(tiny_bundle, tmp_path):
    manifest = read_manifest(tiny_bundle)
    scores = tmp_path / "scores.json"

    def evaluated(files: dict[str, str]) -> None:
        about = {"bundle_hash": "f" * 64, "files": files}
        tasks = {"t2i": {"scores": {"joint": {"model": 0.9}}}}
        scores.write_text(json.dumps({"about": about, "tasks": tasks}))

    evaluated(manifest.files)
    found, remark = evaluation_of(tiny_bundle, scores)
    assert found["t2i"]["scores"] == {"joint": {"model": 0.9}}
    assert remark == "scores.json is of another export with the same files"
    evaluated(manifest.files | {"decoder_step.onnx": "0" * 64})
    found, reason = evaluation_of(tiny_bundle, scores)
    assert found is None and reason.startswith("scores.json is of bundle ffff")


def test_what_cannot_be_compared_in_the_end_is_told_with_the_result(address, result, capsys):
    """The baseline lost its rounds, which is seen only beside those of the result."""
    other = schema.read(result) | {"rounds": {}}
    other["metrics"].pop("throughput")
    path = result.with_name("without.json")
    schema.write(path, other)
    assert main(["bench", "--server", address, *SHORT, "--baseline", str(path)]) == 1
    printed = capsys.readouterr()
    assert "not compared: results that cannot be compared" in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert last["outcomes"]["ok"] and last["comparison"]["differences"] == []


def test_the_last_line_is_there_even_if_nothing_can_be_written(
    address, tmp_path, capsys, monkeypatch
):
    def full(path, result):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(html, "write", full)
    assert main(["bench", "--server", address, *SHORT, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["outcomes"]["ok"]
    assert schema.read(tmp_path / "result.json")["outcomes"]["ok"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_with_what_was_measured(address, tmp_path):
    words = ["--server", address, *SHORT, "--seconds", "600", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "nuwa.runtime", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while process.stderr.readline().strip() != "single-stream":
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    last = json.loads(out.splitlines()[-1])
    assert last["interrupted"] and last["outcomes"]["ok"] > 1
    assert any(note.startswith("Interrupted") for note in last["notes"])
    written = schema.read(tmp_path / "result.json")
    assert written["outcomes"] == last["outcomes"]
    assert sorted(os.listdir(tmp_path)) == ["report.html", "result.json"]


def test_random_weights_are_made_by_another_process(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="--preset none-such: unknown preset 'none-such'"):
        making.random_bundle("none-such", tmp_path / "bundle", "fp32")
    with pytest.raises(ValueError, match="/nowhere is not a checkpoint folder"):
        making.export(Path("/nowhere"), tmp_path / "bundle", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_what_makes_bundles_is_not_part_of_this_process(tmp_path, monkeypatch):
    older = tmp_path / "bundle"
    older.mkdir()
    (older / "manifest.json").write_text("{}")
    words = []

    def run(command, **named):
        words.extend(command)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(making.subprocess, "run", run)
    making.random_bundle("base", tmp_path / "bundle", "fp16")
    assert words == [
        *(sys.executable, "-m", making.__name__),
        *("base", str(tmp_path / "bundle"), "fp16"),
    ]
    assert not older.exists(), "a bundle of an earlier command is replaced"
