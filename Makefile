# make demo   everything from a fresh clone: set-up, export, server, pictures in demo/
# make test   set-up and all tests that need no GPU
# make lint   ruff, formatting, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint proto setup clean

setup: $(STAMP)

NATIVE := $(wildcard runtime/native/*)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[export,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu"

# mypy cannot see through an editable install, so it checks a regular one.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p nuwa

proto: $(STAMP)
	$(BIN)/python proto/generate.py

clean:
	rm -rf build demo
