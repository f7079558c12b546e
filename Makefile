# Every target creates .venv if it is absent, with plain python3 -m venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check test-slow test-min test-gpu bench-gpu install

quickstart: $(STAMP)
	$(BIN)/fasternet quickstart

test: $(STAMP)
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow or multiprocess"

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

bench-gpu: $(STAMP)
	$(BIN)/fasternet bench operators --device cuda
	$(BIN)/fasternet bench operators --device cuda --batch-size 32
	$(BIN)/fasternet bench networks --device cuda --engines eager,compile --precisions fp32,bf16
	$(BIN)/fasternet bench networks --device cuda --engines eager,compile --precisions fp32,bf16 --batch-size 32
	$(BIN)/fasternet bench deploy --device cuda --batch-size 32
	$(BIN)/fasternet bench sweeps --device cuda --engines eager,compile
	$(BIN)/fasternet bench steps --device cuda
	$(BIN)/fasternet bench training fasternet_t0 --data digits --device cuda

# The oldest torch that is supported, in an environment of its own.
test-min: .venv-min/.installed
	.venv-min/bin/pytest

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-min/.installed: pyproject.toml
	test -x .venv-min/bin/python || $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet 'torch==2.11.*' 'torchvision==0.26.*' --editable '.[dev]'
	touch $@
