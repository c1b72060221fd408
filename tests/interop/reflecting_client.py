"""Drives a server with grpc-requests, which knows its methods by reflection alone.

usage: reflecting_client.py ADDRESS [METHOD [SECONDS]]    prints one line of JSON: what it saw.

With METHOD it makes one call only, of this method of nuwa.v1, with a deadline if there is one.
"""

import json
import sys

import grpc
from grpc_requests import Client

GENERATION = "nuwa.v1.GenerationService"
KSERVE = "inference.GRPCInferenceService"


def call(client, method, seconds=None):
    """The name of the status that a call ends with."""
    asked = {"task": f"TASK_T2{method.removeprefix('Generate')[0]}", "prompt": "a 3"}
    try:
        answer = client.request(GENERATION, method, asked, timeout=seconds and float(seconds))
        if not isinstance(answer, dict):
            list(answer)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def main():
    client = Client.get_by_endpoint(sys.argv[1])
    if sys.argv[2:]:
        print(json.dumps(call(client, *sys.argv[2:])))
        return
    image = client.request(
        GENERATION,
        "GenerateImage",
        {"task": "TASK_T2I", "prompt": "a 3", "request_id": "mine", "sampling": {"seed": 7}},
    )
    clip = client.request(
        GENERATION,
        "GenerateVideo",
        {"task": "TASK_T2V", "prompt": "a 3", "frame_count": 3, "sampling": {"seed": 7}},
    )
    metadata = client.request(KSERVE, "ModelMetadata", {"name": "fake_t2v"})
    print(
        json.dumps(
            {
                "services": sorted(client.service_names),
                "image": [image["request_id"], image["seed"], image["frame"]["format"]],
                "events": [next(iter(event)) for event in clip],
                "inputs": [each["name"] for each in metadata["inputs"]],
            }
        )
    )


if __name__ == "__main__":
    main()
