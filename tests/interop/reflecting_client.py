"""Drives a server with grpc-requests, which knows its methods by reflection alone.

usage: reflecting_client.py ADDRESS    prints one line of JSON: what it saw.
"""

import json
import sys

from grpc_requests import Client

GENERATION = "nuwa.v1.GenerationService"
KSERVE = "inference.GRPCInferenceService"


def main():
    client = Client.get_by_endpoint(sys.argv[1])
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
