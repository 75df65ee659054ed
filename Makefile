# make demo   set up and run the main job on the embedded tiny checkpoint
# make test   set up and run the suite, with the native kernels and without them
# make lint   format, style, types, and the order of rooms
# make aot    compile every GPU kernel for six architectures and compare with the checked-in table
# make bench  full-size surgery beside cp (needs root, 45 GB and some ten minutes)
# make gpu    every GPU test and benchmark with the torch and triton that PYTHON has (no set-up, no network)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
NATIVE_SOURCES := $(wildcard $(addprefix csrc/,*.cpp *.hpp *.inl cpu/*.cpp cpu/*.hpp cpu/*.inl))
WORK ?= $(or $(TMPDIR),/var/tmp)/moe-surgery-bench

.PHONY: demo test lint aot bench gpu clean

demo: $(SETUP)
	$(BIN)/moe-surgery demo

test: $(SETUP)
	$(BIN)/python -m pytest -n auto --dist loadfile
	MOE_SURGERY_NATIVE=0 $(BIN)/python -m pytest -n auto --dist loadfile tests/formats tests/surgery

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

aot: $(SETUP)
	$(BIN)/python -m benchmarks.kernels.aot --compare

bench: $(SETUP)
	$(BIN)/python benchmarks/surgery_budgets.py --work $(WORK)

gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu

# Set up again only when what is installed would change.
$(SETUP): pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info moe_surgery/*.so
