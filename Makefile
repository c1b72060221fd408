# make demo   everything from a fresh clone: set-up, export, server, pictures in demo/
# make test   set-up and all tests that need no GPU
# make lint   ruff, formatting, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint proto released setup clean

setup: $(STAMP)

NATIVE := $(wildcard runtime/native/*)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[export,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# For tests of graphs and plugins in TensorRT, which are skipped without: headers (of a package whose
# dependencies are not needed), two real TensorRTs and cuda-python, all for Linux on x86-64. Likewise
# the headers of ONNX Runtime, for those of its custom operators, on Debian.
TENSORRT := kernel-lens==2.0.1 \
            tensorrt-lean-cu13-bindings==11.4.0.106 tensorrt-lean-cu13-libs==11.4.0.106 \
            tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116 \
            tensorrt-rtx-cu13==1.7.1.116 \
            cuda-bindings==13.5.0 cuda-pathfinder==1.9.0
TENSORRT_STAMP := $(VENV)/.tensorrt

$(TENSORRT_STAMP): $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps $(TENSORRT)
	touch $@

build/onnxruntime:
	-plugins_trt/fetch_onnxruntime_headers.sh $@

# Clients that others wrote, which tests/interop has talk to a server. They want another protobuf than
# the server, so they have an environment of their own.
CLIENTS := tritonclient[grpc]==2.73.0 grpc-requests==0.1.21 buf-bin==1.75.0

build/clients:
	-$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet $(CLIENTS)

build/perf_analyzer:
	-PYTHON=$(PYTHON) tests/interop/fetch_perf_analyzer.sh $@

# Processes, each with whole files of tests, as what a file sets up it sets up once.
JOBS ?= 2

test: $(STAMP) $(TENSORRT_STAMP) build/onnxruntime build/clients build/perf_analyzer
	$(BIN)/python -m pytest -m "not gpu" --numprocesses $(JOBS) --dist loadfile

# mypy cannot see through an editable install, so it checks a regular one.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p nuwa

proto: $(STAMP)
	$(BIN)/python proto/generate.py
	$(BIN)/python proto/document.py

# What later interfaces may not break (tests/interop): of a version that clients have.
released: build/clients
	build/clients/bin/buf build proto --exclude-source-info --output proto/released.binpb

clean:
	rm -rf build demo
