"""Drives a server with Triton's own client, in an environment of its own (see Makefile).

usage: triton_client.py ADDRESS [repository]    prints one line of JSON: what it saw.

With `repository` it has models loaded and taken away.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL = "fake_t2v"


def prompt(text="a 3"):
    tensor = triton.InferInput("PROMPT", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


def picture(name, values):
    kind = "BOOL" if values.dtype == bool else "UINT8"
    tensor = triton.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values)
    return tensor


def metadata(client):
    config = client.get_model_config(MODEL, as_json=True)["config"]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready() and client.is_model_ready(MODEL),
        "not_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata().name,
        "inputs": [each.name for each in client.get_model_metadata(MODEL).inputs],
        "decoupled": config["model_transaction_policy"]["decoupled"],
        "models": sorted(each.name for each in client.get_model_repository_index().models),
    }


def unary(client):
    clip = client.infer(
        MODEL,
        [prompt()],
        request_id="mine",
        outputs=[triton.InferRequestedOutput("VIDEO"), triton.InferRequestedOutput("TOKENS")],
        parameters={"seed": 5, "frame_count": 2, "temperature": 0.5},
    )
    half = np.zeros((8, 8), bool)
    half[:4] = True
    given = [picture("IMAGE", np.full((8, 8, 3), 9, np.uint8)), picture("MASK", half)]
    image = client.infer("fake_i2i", given, parameters={"seed": 3})
    return {
        "id": clip.get_response().id,
        "clip": clip.as_numpy("VIDEO").tolist(),
        "tokens": clip.as_numpy("TOKENS").tolist(),
        "image": image.as_numpy("IMAGE").tolist(),
        "executed": client.get_inference_statistics(MODEL).model_stats[0].inference_count,
    }


def errors(client):
    found = {}
    for name, options in (
        ("parameter", {"parameters": {"sede": 1}}),
        ("deadline", {"client_timeout": 1e-9}),
        ("timeout", {"timeout": 1}),
        ("model", {"model_name": "other"}),
    ):
        try:
            client.infer(**({"model_name": MODEL, "inputs": [prompt()]} | options))
        except InferenceServerException as error:
            found[name] = [error.status(), error.message()]
    return found


def stream(client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    frames = []
    for number in range(2):
        client.async_stream_infer(
            MODEL,
            [prompt()],
            request_id=str(number),
            enable_empty_final_response=True,
            parameters={"seed": number, "frame_count": 2},
        )
    finals = 0
    while finals < 2:
        result, error = answers.get(timeout=30)
        if error is not None:
            raise error
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        finals += final
        if not final:
            index = response.parameters["frame_index"].int64_param
            frames.append([response.id, index, result.as_numpy("VIDEO").tolist()])
    client.async_stream_infer(MODEL, [prompt("refused")])
    _, error = answers.get(timeout=30)
    client.stop_stream()
    return {"frames": sorted(frames), "error": error.message()}


def cancelled(client):
    answers = queue.Queue()
    call = client.async_infer(
        MODEL,
        [prompt()],
        lambda result, error: answers.put(error),
        parameters={"seed": 1, "sample_count": 64, "rank_by": "first"},
    )
    call.cancel()
    error = answers.get(timeout=30)
    return "" if error is None else error.message()


def repository(client):
    refused = {}
    for name, options in (
        ("config", {"config": "{}"}),
        ("files", {"files": {"file:1/model.onnx": b"x"}}),
        ("both", {"config": "{}", "files": {"file:1/model.onnx": b"x"}}),
    ):
        try:
            client.load_model("fake_t2i", **options)
        except InferenceServerException as error:
            refused[name] = [error.status(), error.message()]
    versions = [list(client.get_model_metadata("fake_t2i").versions)]
    client.load_model("fake_t2i")
    versions.append(list(client.get_model_metadata("fake_t2i").versions))
    try:
        client.unload_model("fake_t2i")
    except InferenceServerException as error:
        refused["part"] = [error.status(), error.message()]
    client.unload_model("fake", unload_dependents=True)
    ready = client.is_model_ready("fake_t2i")
    client.load_model("fake_t2i")
    client.unload_model("fake")
    left = len(client.get_model_repository_index().models)
    return {"refused": refused, "versions": versions, "ready": ready, "left": left}


def main():
    with triton.InferenceServerClient(sys.argv[1]) as client:
        parts = (metadata, unary, errors, stream, cancelled)
        if sys.argv[2:]:
            parts = (repository,)
        print(json.dumps({part.__name__: part(client) for part in parts}))


if __name__ == "__main__":
    main()
