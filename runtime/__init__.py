"""What serves: engine, scheduler, gRPC server, clients, benchmark."""

import os

# ONNX Runtime's wheels for Linux report to their maker unless they are told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
