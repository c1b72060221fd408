"""The Open Inference Protocol: models, tensors, parameters, streams, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime import media
from nuwa.runtime.kserve import stream
from nuwa.runtime.kserve.tensors import set_parameters
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine, expected_pixels, expected_tokens
from .messages import CLIP, PICTURE, details, wait_until, wait_until_told_to_cancel

MASK = np.zeros((8, 8), bool)
MASK[:4] = True


@pytest.fixture
def stub(channel):
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def text(prompt: str = "a 3") -> tuple[str, list[int], bytes]:
    data = prompt.encode()
    return "BYTES", [1], len(data).to_bytes(4, "little") + data


def array(values: np.ndarray) -> tuple[str, list[int], bytes]:
    return values.dtype.name.upper(), list(values.shape), values.tobytes()


def ask(task: str, parameters: dict | None = None, **inputs) -> pb.ModelInferRequest:
    """A request with raw contents; inputs by name: (datatype, shape, raw)."""
    request = pb.ModelInferRequest(model_name=f"fake_{task}", id="mine")
    set_parameters(request.parameters, parameters or {})
    for name, (datatype, shape, raw) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def pixels(response: pb.ModelInferResponse) -> np.ndarray:
    return np.frombuffer(response.raw_output_contents[0], np.uint8).reshape(
        response.outputs[0].shape
    )


def value(response: pb.ModelInferResponse, name: str):
    parameter = response.parameters[name]
    return getattr(parameter, parameter.WhichOneof("parameter_choice"))


def clip(seed: int, frames: int) -> np.ndarray:
    return np.stack([expected_pixels(expected_tokens(seed, f)) for f in range(frames)])


def refused(call, code=grpc.StatusCode.INVALID_ARGUMENT) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    return caught.value.details(), details(caught.value)[1]


def test_the_server_and_its_models_are_ready(stub, server):
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="fake_t2i")).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="fake_t2i", version="1")).ready
    for name, version in (("fake_s2i", ""), ("other", ""), ("fake_t2i", "2")):
        assert not stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready
    about = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert about.name == "nuwa" and about.version
    index = stub.RepositoryIndex(pb.RepositoryIndexRequest())
    names = {each.name for each in index.models}
    assert names == {f"fake_{task}" for task in Task if task is not Task.S2I}
    assert {each.state for each in index.models} == {"READY"}
    server._on_death()
    assert not stub.ServerReady(pb.ServerReadyRequest()).ready
    assert not stub.ServerLive(pb.ServerLiveRequest()).live
    assert {e.state for e in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models} == {
        "UNAVAILABLE"
    }
    assert not stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models


def test_a_server_is_live_while_its_engine_returns():
    with Server() as server, grpc.insecure_channel(server.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def states() -> tuple[bool, bool]:
            live = stub.ServerLive(pb.ServerLiveRequest()).live
            return live, stub.ServerReady(pb.ServerReadyRequest()).ready

        assert states() == (True, False), "no model"
        server.host.add(FakeEngine())
        assert states() == (True, True)
        server._on_health(False)
        assert states() == (False, False), "the engine hangs"
        server._on_health(True)
        assert states() == (True, True)


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("t2i", {"PROMPT": ("BYTES", [1])}),
        ("i2i", {"IMAGE": ("UINT8", [8, 8, 3]), "MASK": ("BOOL", [8, 8])}),
        (
            "tv2v",
            {
                "PROMPT": ("BYTES", [1]),
                "VIDEO": ("UINT8", [-1, 8, 8, 3]),
                "MASK": ("BOOL", [8, 8]),
            },
        ),
        ("s2v", {"PROMPT": ("BYTES", [1]), "SKETCH": ("UINT8", [-1, 8, 8])}),
    ],
)
def test_metadata_and_config_say_what_a_task_takes_and_gives(stub, task, inputs):
    name = f"fake_{task}"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=name))
    assert {e.name: (e.datatype, list(e.shape)) for e in metadata.inputs} == inputs
    config = stub.ModelConfig(pb.ModelConfigRequest(name=name)).config
    assert {e.name: list(e.dims) for e in config.input} == {n: s for n, (_, s) in inputs.items()}
    assert {e.name for e in config.input if e.optional} == ({"PROMPT"} if task == "s2v" else set())
    video = Task(task).is_video
    assert config.model_transaction_policy.decoupled == video and config.max_batch_size == 0
    made = [(e.name, e.datatype, list(e.shape)) for e in metadata.outputs]
    assert made[0] == ("VIDEO" if video else "IMAGE", "UINT8", [-1, 8, 8, 3])
    assert made[1] == ("TOKENS", "INT32", [-1, -1, -1])


def test_an_image(stub):
    request = ask("t2i", {"seed": 7, "temperature": 1}, PROMPT=text())
    response = stub.ModelInfer(request)
    assert (pixels(response) == clip(7, 1)).all()
    assert (response.id, response.model_name, response.model_version) == ("mine", "fake_t2i", "1")
    assert value(response, "seed") == 7 and value(response, "sample_index") == 0
    assert 0 < value(response, "decode_ns") <= value(response, "total_ns")
    assert [each.name for each in response.outputs] == ["IMAGE"]


def test_typed_contents_are_as_good_as_raw_ones(stub):
    request = pb.ModelInferRequest(model_name="fake_ti2i")
    for name, datatype, shape, contents in (
        ("PROMPT", "BYTES", [1], {"bytes_contents": [b"a 3"]}),
        ("IMAGE", "UINT8", [8, 8, 3], {"uint_contents": PICTURE.flatten().tolist()}),
        ("MASK", "BOOL", [8, 8], {"bool_contents": MASK.flatten().tolist()}),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=shape, contents=contents)
    set_parameters(request.parameters, {"seed": 3})
    typed = stub.ModelInfer(request)
    raw = ask("ti2i", {"seed": 3}, PROMPT=text(), IMAGE=array(PICTURE), MASK=array(MASK))
    assert (pixels(typed) == pixels(stub.ModelInfer(raw))).all()


def test_given_pictures_and_masks_arrive_as_they_were_sent(stub, engine):
    file = media.encode_picture(PICTURE, "png")
    as_file = "BYTES", [1], len(file).to_bytes(4, "little") + file
    for given in (array(PICTURE), as_file):
        stub.ModelInfer(ask("i2i", IMAGE=given, MASK=array(MASK)))
        assert (engine.admitted[-1].frames == PICTURE[None]).all()
        assert (engine.admitted[-1].mask == MASK).all()
    sketch = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8) % 5
    stub.ModelInfer(ask("s2v", SKETCH=array(sketch)))
    assert (engine.admitted[-1].sketch == sketch).all() and engine.admitted[-1].prompt == ""
    stub.ModelInfer(ask("v2v", {"frame_count": 5}, VIDEO=array(CLIP)))
    assert (engine.admitted[-1].frames == CLIP).all() and engine.admitted[-1].frame_count == 5


def test_a_clip_in_one_answer_and_frame_by_frame(stub):
    request = ask("t2v", {"seed": 5, "frame_count": 3}, PROMPT=text())
    assert (pixels(stub.ModelInfer(request)) == clip(5, 3)).all()
    answers = [each.infer_response for each in stub.ModelStreamInfer(iter([request]))]
    assert [value(each, "frame_index") for each in answers] == [0, 1, 2]
    assert [value(each, "triton_final_response") for each in answers] == [False, False, True]
    assert (np.concatenate([pixels(each) for each in answers]) == clip(5, 3)).all()
    assert {each.id for each in answers} == {"mine"}
    set_parameters(request.parameters, {"triton_enable_empty_final_response": True})
    answers = [each.infer_response for each in stub.ModelStreamInfer(iter([request]))]
    assert [value(each, "triton_final_response") for each in answers] == [False] * 3 + [True]
    assert not answers[-1].outputs and value(answers[-1], "total_ns") > 0


def test_several_samples_the_best_ones_first(stub):
    options = {"seed": 1, "sample_count": 4, "rank_by": "first", "return_count": 2}
    response = stub.ModelInfer(ask("t2i", options, PROMPT=text()))
    assert (pixels(response) == np.concatenate([clip(4, 1), clip(3, 1)])).all()
    assert value(response, "sample_index") == 3 and value(response, "score") == 4.0
    all_of_them = ask("t2i", {"seed": 1, "sample_count": 3}, PROMPT=text())
    expected = np.concatenate([clip(seed, 1) for seed in (1, 2, 3)])
    assert (pixels(stub.ModelInfer(all_of_them)) == expected).all()
    clips = ask("t2v", {"sample_count": 2}, PROMPT=text())
    message, fields = refused(lambda: stub.ModelInfer(clips))
    assert "parameters.return_count" in fields and "ModelStreamInfer" in message
    answers = [each.infer_response for each in stub.ModelStreamInfer(iter([clips]))]
    assert len(answers) == 20 and {value(each, "sample_index") for each in answers} == {0, 1}


@pytest.mark.parametrize("streamed", [False, True])
def test_all_images_of_an_answer_are_no_more_than_may_be_unread(stub, server, streamed):
    server.intake._most_unread = 1000  # 8 x 8 pixels: 192 bytes a frame
    request = ask("t2i", {"sample_count": 6}, PROMPT=text())
    if streamed:
        [answer] = stub.ModelStreamInfer(iter([request]))
        message = answer.error_message
    else:
        message, fields = refused(lambda: stub.ModelInfer(request))
        assert "parameters.sample_count" in fields
    assert message.startswith("6 samples of 1 frame would have to be kept for one answer")
    assert "Stream" not in message, "a stream would hold as much"
    clips = ask("t2v", {"frame_count": 6}, PROMPT=text())
    assert "or with ModelStreamInfer" in refused(lambda: stub.ModelInfer(clips))[0]
    assert len(list(stub.ModelStreamInfer(iter([clips])))) == 6


def test_tokens_where_they_are_asked_for(stub):
    request = ask("t2v", {"seed": 2, "frame_count": 2}, PROMPT=text())
    request.outputs.add(name="TOKENS")
    response = stub.ModelInfer(request)
    tokens = response.outputs[1]
    assert (tokens.name, tokens.datatype, list(tokens.shape)) == ("TOKENS", "INT32", [2, 4, 4])
    found = np.frombuffer(response.raw_output_contents[1], "<i4").reshape(2, 4, 4)
    assert (found == np.stack([expected_tokens(2, f) for f in range(2)])).all()


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (ask("t2i"), "inputs.PROMPT", "prompt is empty"),
        (ask("t2i", PROMPT=text(), IMAGE=array(PICTURE)), "inputs.IMAGE", "it takes PROMPT"),
        (ask("t2i", {"sede": 1}, PROMPT=text()), "parameters.sede", "no parameter 'sede'; it has"),
        (ask("t2i", {"seed": "1"}, PROMPT=text()), "parameters.seed", "'1' is not of type int"),
        (ask("t2i", {"seed": -1}, PROMPT=text()), "parameters.seed", "seed -1 is not in"),
        (ask("t2i", {"top_k": 2**40}, PROMPT=text()), "parameters.top_k", "is too large"),
        (ask("t2i", {"top_p": 2.0}, PROMPT=text()), "parameters.top_p", "top_p 2.0 is not in"),
        (ask("t2i", {"frame_count": 2}, PROMPT=text()), "parameters.frame_count", "no parameter"),
        (
            ask("t2v", {"frame_count": 11}, PROMPT=text()),
            "parameters.frame_count",
            "not in [1, 10]",
        ),
        (ask("t2i", {"timeout": 0}, PROMPT=text()), "parameters.timeout", "is not above 0"),
        (ask("t2i", {"schedule": "up"}, PROMPT=text()), "parameters.schedule", "wave, raster"),
        (ask("t2i", {"rank_by": "x"}, PROMPT=text()), "parameters.rank_by", "'x'"),
        (ask("t2i", PROMPT=("BYTES", [1], b"\x05\0\0\0abc")), "inputs.PROMPT", "within an element"),
        (ask("t2i", PROMPT=("BYTES", [2], text()[2])), "inputs.PROMPT", "its shape [2] says 2"),
        (ask("t2i", PROMPT=("BYTES", [1], b"\1\0\0\0\xff")), "inputs.PROMPT", "not valid UTF-8"),
        (ask("t2i", PROMPT=("FP16", [1], b"ab")), "inputs.PROMPT", "UINT8, BOOL, BYTES"),
        (ask("t2i", PROMPT=("UINT8", [2], b"ab")), "inputs.PROMPT", "one element of BYTES"),
        (
            ask("i2i", IMAGE=array(PICTURE[:4]), MASK=array(MASK)),
            "inputs.IMAGE",
            "image is 8 x 4 pixels; this model takes 8 x 8",
        ),
        (
            ask("i2i", IMAGE=array(PICTURE[..., 0]), MASK=array(MASK)),
            "inputs.IMAGE",
            "its last size is 3",
        ),
        (
            ask("i2i", IMAGE=array(PICTURE), MASK=array(~MASK & MASK)),
            "inputs.MASK",
            "dark everywhere",
        ),
        (
            ask("i2i", IMAGE=("UINT8", [8, -1, 3], b""), MASK=array(MASK)),
            "inputs.IMAGE",
            "1 or more",
        ),
        (ask("v2v", VIDEO=array(PICTURE[0, 0])), "inputs.VIDEO", "see the model's metadata"),
    ],
)
def test_what_is_wrong_is_named(stub, request_, field, message):
    told, fields = refused(lambda: stub.ModelInfer(request_))
    assert message in told and list(fields) == [field]
    [answer] = stub.ModelStreamInfer(iter([request_]))
    assert answer.error_message == told and answer.infer_response.id == "mine"
    assert value(answer.infer_response, "triton_final_response") is True


def test_contradictions_between_tensors_are_named(stub):
    request = ask("t2i", PROMPT=text())
    request.raw_input_contents.append(b"")
    assert "raw_input_contents" in refused(lambda: stub.ModelInfer(request))[1]
    request = ask("t2i", PROMPT=text())
    request.inputs[0].contents.bytes_contents.append(b"a 3")
    assert "both contents and raw" in refused(lambda: stub.ModelInfer(request))[0]
    request = ask("t2i", PROMPT=text())
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    assert "given twice" in refused(lambda: stub.ModelInfer(request))[0]
    request = ask("t2i", PROMPT=text())
    set_parameters(request.inputs[0].parameters, {"shared_memory_region": "x"})
    assert "take no parameters" in refused(lambda: stub.ModelInfer(request))[0]
    request = ask("t2i", PROMPT=text())
    request.outputs.add(name="LOGITS")
    assert "it gives IMAGE, TOKENS" in refused(lambda: stub.ModelInfer(request))[0]
    wrong = pb.ModelInferRequest(model_name="fake_t2i")
    wrong.inputs.add(name="PROMPT", datatype="BYTES", shape=[1], contents={"int_contents": [1]})
    told = refused(lambda: stub.ModelInfer(wrong))[0]
    assert "contents of BYTES are bytes_contents, not int_contents" in told


@pytest.mark.parametrize(
    "method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"]
)
def test_unknown_models_and_versions_are_not_found(stub, method):
    name = "model_name" if method == "ModelInfer" else "name"
    version = "model_version" if method == "ModelInfer" else "version"
    kind = getattr(pb, f"{method}Request")
    for fields, told in (
        ({name: "other"}, "no model 'other'; this server has fake_t2i, "),
        ({name: "fake_t2i", version: "3"}, "no version '3'; it has 1"),
    ):
        message, _ = refused(
            lambda fields=fields: getattr(stub, method)(kind(**fields)), grpc.StatusCode.NOT_FOUND
        )
        assert told in message


def test_statistics_count_what_was_done(stub, engine):
    def of(task: str) -> pb.ModelStatistics:
        request = pb.ModelStatisticsRequest(name=f"fake_{task}")
        return stub.ModelStatistics(request).model_stats[0]

    assert of("t2i").inference_count == 0 and of("t2i").last_inference == 0
    for _ in range(2):
        stub.ModelInfer(ask("t2i", PROMPT=text()))
    engine.step_error = RuntimeError("a fault")
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(ask("t2i", PROMPT=text()))
    found = of("t2i")
    assert (found.inference_count, found.execution_count) == (2, 8)
    stats = found.inference_stats
    assert (stats.success.count, stats.fail.count) == (2, 1)
    assert stats.success.ns >= stats.compute_infer.ns > 0 and stats.compute_infer.count == 2
    assert found.last_inference > 1.7e12
    assert of("t2v").inference_count == 0
    everything = stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert len(everything) == 7


def test_one_stream_answers_several_requests_side_by_side(stub, engine, server):
    engine.slots = 2
    engine.gate.clear()
    several = [ask("t2v", {"seed": seed, "frame_count": 3}, PROMPT=text()) for seed in (1, 2)]
    for number, request in enumerate(several):
        request.id = str(number)

    def requests():
        yield from several
        wait_until(lambda: server.scheduler.active >= 1)  # or the queue might be full
        yield ask("t2v", {"seed": -1}, PROMPT=text())

    answers = stub.ModelStreamInfer(requests())
    first = next(answers)
    assert "seed -1" in first.error_message and first.infer_response.id == "mine"
    wait_until(lambda: server.scheduler.active + server.scheduler.queued == 2)
    engine.gate.set()
    ids = [each.infer_response.id for each in answers]
    assert sorted(ids) == ["0"] * 3 + ["1"] * 3


def test_a_client_may_have_errors_end_its_stream(stub):
    metadata = [("triton_grpc_error", "true")]
    calls = [ask("t2i", {"seed": -1}, PROMPT=text())]
    message, fields = refused(lambda: list(stub.ModelStreamInfer(iter(calls), metadata=metadata)))
    assert "parameters.seed" in fields and "seed -1" in message


def test_an_id_that_is_too_long_is_refused_first_and_not_sent_back(stub, engine):
    long = ask("t2i", {"seed": -1}, PROMPT=text())
    long.id, long.model_name = "x" * 129, "other"
    [answer] = stub.ModelStreamInfer(iter([long]))
    assert answer.error_message == "id is not at most 128 printable ASCII characters"
    assert answer.infer_response.id == "" and answer.infer_response.parameters
    long.id = "x" * 128
    [answer] = stub.ModelStreamInfer(iter([long]))
    assert answer.infer_response.id == long.id and "no model" in answer.error_message
    metadata = [("triton_grpc_error", "true")]
    long.id = "x" * 129
    _, fields = refused(lambda: list(stub.ModelStreamInfer(iter([long]), metadata=metadata)))
    assert set(fields) == {"id"}


def test_internal_faults_are_told_without_their_details(stub, engine):
    engine.step_error = RuntimeError("secret")
    [answer] = stub.ModelStreamInfer(iter([ask("t2i", PROMPT=text())]))
    assert "internal error" in answer.error_message and "secret" not in answer.error_message


def test_leaving_a_stream_cancels_what_it_asked_for(stub, engine, server):
    engine.gate.clear()
    hold = threading.Event()

    def requests():
        yield ask("t2v", PROMPT=text())
        hold.wait(20)

    answers = stub.ModelStreamInfer(requests())
    wait_until(lambda: server.scheduler.active == 1)
    answers.cancel()
    wait_until_told_to_cancel(server)
    engine.gate.set()
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)
    hold.set()
    assert engine.steps < 40


def test_a_long_stream_keeps_nothing_of_what_is_over(stub, server):
    hold = threading.Event()

    def requests():
        for _ in range(30):
            yield ask("t2i", PROMPT=text())
            threading.Event().wait(0.005)
        hold.wait(20)

    answers = stub.ModelStreamInfer(requests())
    for _ in range(30):
        next(answers)
    wait_until(lambda: server.intake.open_calls == 0)
    assert [len(each) for each in server.intake._live.values()] == [0], "one call, still open"
    hold.set()
    assert list(answers) == []
    wait_until(lambda: not server.intake._live)


def test_a_timeout_stops_one_request_of_a_stream_and_no_other(stub, engine, server):
    engine.gate.clear()
    late = ask("t2v", {"timeout": 2_000_000}, PROMPT=text())
    late.id = "late"
    answers = stub.ModelStreamInfer(iter([late, ask("t2i", {"seed": 3}, PROMPT=text())]))
    wait_until(lambda: server.scheduler.active + server.scheduler.queued == 2)
    threading.Timer(2.1, engine.gate.set).start()
    found = {each.infer_response.id: each for each in answers}
    assert "was not finished within 2 s" in found["late"].error_message
    assert (pixels(found["mine"].infer_response) == clip(3, 1)).all()


def test_streams_and_their_requests_are_limited(stub, engine, monkeypatch):
    monkeypatch.setattr(stream, "CALLS_PER_STREAM", 1)
    engine.gate.clear()
    requests = [ask("t2v", {"frame_count": 1}, PROMPT=text()) for _ in range(2)]
    requests[1].id = "second"
    answers = stub.ModelStreamInfer(iter(requests))
    refusal = next(answers)
    assert refusal.infer_response.id == "second" and "at most 1 requests" in refusal.error_message
    engine.gate.set()
    assert [each.infer_response.id for each in answers] == ["mine"]


def test_a_stream_that_goes_on_for_ever_ends_with_the_server(stub, engine, server):
    engine.gate.clear()
    hold, late = threading.Event(), threading.Event()

    def requests():
        yield ask("t2i", PROMPT=text())
        late.wait(20)
        yield ask("t2i", PROMPT=text())
        hold.wait(20)

    busy = stub.ModelStreamInfer(requests())
    idle = stub.ModelStreamInfer(iter(hold.wait, 20))
    wait_until(lambda: server.scheduler.active == 1)
    wait_until(lambda: len(server._inference._streams) == 2)
    stopping = threading.Thread(target=server.stop, args=(20,))
    stopping.start()
    assert idle.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in idle.details() and stopping.is_alive()
    late.set()
    refusal = next(busy)
    assert "shutting down" in refusal.error_message
    engine.gate.set()
    answer = next(busy)
    assert not answer.error_message and answer.infer_response.id == "mine"
    assert busy.code() is grpc.StatusCode.UNAVAILABLE
    stopping.join(10)
    assert not stopping.is_alive()
    hold.set()


UNKNOWN = b"\xa0\x06\x01"  # field 100, of no message


@pytest.mark.parametrize(
    "method",
    [
        "ServerMetadata",
        "ModelMetadata",
        "ModelConfig",
        "ModelStatistics",
        "ModelInfer",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    ],
)
def test_fields_that_are_not_known_are_refused(stub, server, method):
    request = ask("t2i", PROMPT=text()) if method == "ModelInfer" else None
    request = request or getattr(pb, f"{method}Request")()
    for field in ("name", "model_name"):
        if field in request.DESCRIPTOR.fields_by_name:
            setattr(request, field, "fake_t2i")
    request.MergeFromString(UNKNOWN)
    told, _ = refused(lambda: getattr(stub, method)(request))
    assert told == (
        f"field number 100 of inference.{method}Request is not known to this server, which may be "
        "older than the client"
    )
    assert [each.title for each in server.host.loaded] == ["fake/1"], "it did nothing"


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ModelReady"])
def test_probes_are_answered_whatever_else_they_say(stub, method):
    request = getattr(pb, f"{method}Request").FromString(UNKNOWN)
    if method == "ModelReady":
        request.name = "fake_t2i"
    answer = getattr(stub, method)(request)
    assert answer.live if method == "ServerLive" else answer.ready


@pytest.fixture
def bundled():
    """A stub, and its server, which has opened its engine itself and so can do it again."""
    with (
        Server(open_engine=lambda path: FakeEngine()) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.load("", Path("b/fake"))
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), server


def titles(server: Server) -> list[str]:
    return [each.title for each in server.host.loaded]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("config", {"string_param": "{}"}),
        ("config", {"string_param": ""}),
        ("file:1/model.onnx", {"bytes_param": b"x" * 1000}),
        ("other", {}),
    ],
)
def test_loading_takes_no_parameters(bundled, name, given):
    stub, server = bundled
    request = pb.RepositoryModelLoadRequest(model_name="fake_t2i")
    request.parameters[name].MergeFrom(pb.ModelRepositoryParameter(**given))
    told, fields = refused(lambda: stub.RepositoryModelLoad(request))
    assert list(fields) == [f"parameters.{name}"] and "as it is" in told and name in told
    assert titles(server) == ["fake/1"]
    del request.parameters[name]
    stub.RepositoryModelLoad(request)
    assert titles(server) == ["fake/2"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("unload_dependants", {"bool_param": True}, "it has unload_dependents"),
        ("unload_dependents", {"int64_param": 1}, "1 is not of type bool"),
        ("unload_dependents", {}, "has no value"),
    ],
)
def test_unloading_takes_one_parameter(bundled, name, given, message):
    stub, server = bundled
    request = pb.RepositoryModelUnloadRequest(model_name="fake_t2i")
    request.parameters[name].MergeFrom(pb.ModelRepositoryParameter(**given))
    told, fields = refused(lambda: stub.RepositoryModelUnload(request))
    assert list(fields) == [f"parameters.{name}"] and message in told
    assert titles(server) == ["fake/1"]


def blames_the_name(call) -> str:
    told, fields = refused(call)
    assert fields == {"model_name": told}
    return told


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_loading_and_unloading_need_a_name(bundled, method):
    stub, server = bundled
    request = getattr(pb, f"{method}Request")()
    told = blames_the_name(lambda: getattr(stub, method)(request))
    assert told.startswith("model_name is empty; say which model is to be ")
    assert titles(server) == ["fake/1"], "nothing was done to the default model"


def test_what_cannot_be_loaded_is_told_by_the_name_of_its_field(bundled, stub):
    ours, _ = bundled
    request = pb.RepositoryModelLoadRequest(model_name="fake/1")
    told = blames_the_name(lambda: ours.RepositoryModelLoad(request))
    assert told == "model_name 'fake/1' has a version; give it without"
    request = pb.RepositoryModelLoadRequest(model_name="fake_t2i")
    told = blames_the_name(lambda: stub.RepositoryModelLoad(request))
    assert told == "model 'fake' was not loaded from a bundle"


@pytest.mark.parametrize("path", ["inputs.0", "outputs.0", "parameters.seed", "inputs.0.contents"])
def test_nor_are_they_inside(stub, path):
    request = ask("t2i", {"seed": 3}, PROMPT=text())
    request.outputs.add(name="IMAGE")
    inner = request
    for name in path.split("."):
        if name.isdigit():
            inner = inner[int(name)]
        else:
            inner = inner[name] if inner is request.parameters else getattr(inner, name)
    inner.MergeFromString(UNKNOWN)
    told, _ = refused(lambda: stub.ModelInfer(request))
    assert f"field number 100 of {inner.DESCRIPTOR.full_name} is not known" in told


def test_no_more_outputs_are_asked_for_than_there_are(stub):
    request = ask("t2i", PROMPT=text())
    for _ in range(3):
        request.outputs.add(name="IMAGE")
    told, fields = refused(lambda: stub.ModelInfer(request))
    assert told == "3 outputs are asked for; fake_t2i has 2" and fields == {"outputs": told}


def test_a_seed_that_is_not_set_does_not_follow_from_the_id(stub):
    """Clients number their requests from 0 on, and mean nothing by it."""
    request = ask("t2i", PROMPT=text())
    seeds = {value(stub.ModelInfer(request), "seed") for _ in range(4)}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("loaded", [True, False])
def test_one_of_a_bundles_models_is_not_taken_away_by_itself(bundled, loaded):
    stub, server = bundled
    if not loaded:
        server.host.unload("fake")
    request = pb.RepositoryModelUnloadRequest(model_name="fake_t2i")
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryModelUnload(request)
    if loaded:
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "unload 'fake'" in details(caught.value)[1]["model_name"]
        assert len(server.host.loaded) == 1
    else:
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, "no model is loaded"


class Ended:
    """A context of a call that is over."""

    def is_active(self):
        return False


def test_a_stream_that_ends_while_the_server_shuts_down_does_not_stop_it():
    """stop() dismisses streams that it knew of a moment before, some of which have ended."""
    found = stream.Stream(lambda *_: iter(()), Ended(), lambda error, _: error)
    gate = threading.Event()
    found.start(iter(gate.wait, True))  # reads until the gate opens
    found.close()
    found.dismiss()
    gate.set()


@pytest.mark.parametrize("dependents", [True, False])
def test_dependents_are_none_so_that_unloading_them_changes_nothing(bundled, dependents):
    stub, server = bundled
    request = pb.RepositoryModelUnloadRequest(model_name="fake")
    request.parameters["unload_dependents"].bool_param = dependents
    stub.RepositoryModelUnload(request)
    assert titles(server) == []


@pytest.mark.parametrize(
    "method", ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"]
)
def test_there_are_no_repositories(bundled, method):
    stub, server = bundled
    request = getattr(pb, f"{method}Request")(repository_name="mine")
    if method != "RepositoryIndex":
        request.model_name = "fake_t2i"
    told, fields = refused(lambda: getattr(stub, method)(request))
    assert list(fields) == ["repository_name"] and "no repository 'mine'" in told
    assert titles(server) == ["fake/1"]


def test_reflection_and_health_know_it(channel):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"inference.GRPCInferenceService", "nuwa.v1.GenerationService"} <= set(
        database.get_services()
    )
    file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    assert file.package == "inference" and "nuwa/inference/model_config.proto" in file.dependency
    assert database.FindFileByName("nuwa/inference/model_config.proto").package == "inference"
    assert database.FindFileContainingSymbol("nuwa.v1.GenerationService").package == "nuwa.v1"
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
