# make demo   set up and run the main job on the embedded tiny checkpoint
# make test   set up and run the suite, with the native kernels and without them
# make interpret  the GPU kernels' values in Triton's interpreter, on the CPU
# make lint   format, style, types, and the order of packages
# make sanitize  the C++ core and the tests of its kernels under AddressSanitizer and UBSan
# make arm    the C++ core for aarch64, tested under qemu; skipped where either is missing
# make aot    compile every GPU kernel for six architectures and compare with the checked-in table
# make dist   build the source distribution and the wheel into dist/, check them and try them in empty environments
# make bench  full-size surgery beside cp (needs root, 45 GB and some ten minutes)
# make pictures  the pictures in README.md again (needs chromium)
# make gpu    every GPU test and benchmark with the torch and triton that PYTHON has (no set-up, no network)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
NATIVE_SOURCES := $(wildcard csrc/*.cpp $(foreach d,isa mxfp4 q8_0 cpu residency,$(addprefix csrc/$(d)/,*.cpp *.hpp *.inl)))
# What converts, with the extension where there is one: tested without it as well.
CONVERTING := tests/formats $(addprefix tests/surgery/,test_equivalence.py test_producer.py verify/test_source.py)
# Files in their order: by number of tests, which is the default, the slow ones with few tests come last.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
# The core without Python: what each self-test is made of.
CORE_TESTS := mxfp4 cpu
mxfp4_SOURCES := csrc/isa/isa.cpp csrc/mxfp4/tests/selftest.cpp $(filter-out csrc/mxfp4/bindings.cpp,$(wildcard csrc/mxfp4/*.cpp))
cpu_SOURCES := csrc/isa/isa.cpp csrc/cpu/tests/selftest.cpp $(filter-out csrc/cpu/bindings.cpp,$(wildcard csrc/cpu/*.cpp))
CORE_FLAGS := -std=c++17 -ffp-contract=off -pthread -Icsrc
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
WORK ?= $(or $(TMPDIR),/var/tmp)/moe-surgery-bench

.PHONY: demo test interpret lint sanitize arm aot dist bench pictures gpu clean

demo: $(SETUP)
	rm -rf build/demo
	$(BIN)/moe-surgery demo --output build/demo

# Bytecode is kept, so that neither commands that tests start nor the second run compile all modules again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(SETUP)
	$(BIN)/python -m pytest $(PARALLEL)
	MOE_SURGERY_NATIVE=0 $(BIN)/python -m pytest $(PARALLEL) $(CONVERTING) --ignore tests/formats/test_native.py

interpret: $(SETUP)
	$(BIN)/python -m pytest -n auto -m "interpreter and not slow" tests/kernels/triton tests/kernels/triton_decode

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Imports are appended to the path, so that the tests find the sanitized package before this folder's.
sanitize: $(SETUP)
	rm -rf build
	mkdir -p build
	$(foreach t,$(CORE_TESTS),c++ $(CORE_FLAGS) -O1 $(SANITIZERS) $($(t)_SOURCES) -o build/$(t)-selftest && build/$(t)-selftest &&) true
	MOE_SURGERY_SANITIZE=1 $(BIN)/python -m pip install --quiet --no-deps --target build/sanitized .
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
		$(BIN)/pytest -n auto --import-mode=append tests/kernels/test_native*.py tests/runtime/test_native_stack.py tests/formats

arm:
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then \
		mkdir -p build && set -e; \
		$(foreach t,$(CORE_TESTS),aarch64-linux-gnu-g++ $(CORE_FLAGS) -O2 -static $($(t)_SOURCES) -o build/$(t)-selftest-arm; \
		qemu-aarch64 build/$(t)-selftest-arm;) \
	else echo "arm: skipped, needs aarch64-linux-gnu-g++ and qemu-aarch64 (g++-aarch64-linux-gnu, qemu-user)"; fi

aot: $(SETUP)
	$(BIN)/python -m benchmarks.kernels.aot --compare

# A list of files left by an earlier build would be packed again: it is removed first.
dist: $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	rm -rf dist *.egg-info
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/packaging

bench: $(SETUP)
	$(BIN)/python -m benchmarks.surgery_budgets --work $(WORK)

# README's pictures, from the results that are there and a run of the demo.
pictures: $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report]'
	$(BIN)/python -m benchmarks.pictures

gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu

# Set up again only when what is installed would change.
$(SETUP): pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info moe_surgery/*.so
