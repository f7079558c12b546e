# Every target creates .venv if it is absent, with plain python3 -m venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What pip builds the C++ engine from; without a compiler it installs without the engine.
CSRC := src/fasternet/csrc
SOURCES := pyproject.toml $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h) $(CSRC)/CMakeLists.txt
ARM := aarch64-linux-gnu

.PHONY: quickstart test check test-slow test-min test-gpu test-sanitize test-aarch64 bench-gpu install

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

# The C++ engine under AddressSanitizer and UBSan.
test-sanitize: $(STAMP)
	@command -v cmake >/dev/null || { echo "test-sanitize needs cmake"; exit 1; }
	cmake -S $(CSRC) -B build/sanitize -DFASTERNET_SANITIZE=ON
	cmake --build build/sanitize --target fasternet fasternet_selfcheck
	build/sanitize/fasternet_selfcheck
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1 FASTERNET_NATIVE_LIBRARY=build/sanitize/libfasternet.so \
	$(BIN)/pytest tests/test_native.py tests/test_native_errors.py

# The C++ engine's self-check, compiled for another processor and run in an emulator.
test-aarch64:
	@command -v cmake >/dev/null || { echo "test-aarch64 needs cmake"; exit 1; }
	@command -v $(ARM)-g++ >/dev/null || { echo "test-aarch64 needs $(ARM)-g++ (Debian: g++-$(ARM))"; exit 1; }
	@command -v qemu-aarch64 >/dev/null || { echo "test-aarch64 needs qemu-aarch64 (Debian: qemu-user)"; exit 1; }
	cmake -S $(CSRC) -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$(ARM)-g++
	cmake --build build/aarch64 --target fasternet_selfcheck
	qemu-aarch64 -L /usr/$(ARM) build/aarch64/fasternet_selfcheck

# The oldest torch that is supported, in an environment of its own.
test-min: .venv-min/.installed
	.venv-min/bin/pytest

install: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-min/.installed: $(SOURCES)
	test -x .venv-min/bin/python || $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet 'torch==2.11.*' 'torchvision==0.26.*' --editable '.[dev]'
	touch $@
