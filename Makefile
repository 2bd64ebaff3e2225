# `make demo` and `make test` work on a fresh machine with Python >= 3.11 and make: both create .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning take the cores from each other as soon as anything else runs on the machine.
export OMP_WAIT_POLICY ?= PASSIVE
FFNSKIP := $(BIN)/ffnskip
DEMO := demo
# Somewhat faster than bfloat16 on a CPU without instructions for that, and what is measured is not rounded.
DTYPE := --dtype float32

.PHONY: help demo test lint schema fuzz torture clean

help:
	@echo "make demo    calibrate, inspect, generate and bench a small real model; under 10 minutes on 2 cores"
	@echo "make test    ruff, mypy and all tests"
	@echo "make lint    ruff and mypy only"
	@echo "make schema  write profiles/schema.json from the code"
	@echo "make fuzz    feed the profile loader RUNS=1000000 broken inputs; an hour or more"
	@echo "make torture kill KILLS=100 calibrations and look at what they leave; half an hour"
	@echo "make clean   remove .venv, the demo's results and the tools' caches"

# The pinned torch goes in first and alone, so that no later requirement can pull another build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ffnskip needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	@echo "== 1/4  Calibrate: one measurement, two profiles; on less text than by default =="
	$(FFNSKIP) calibrate demo --dataset demo --target-flops 0.10,0.15 --output $(DEMO) \
	    --tokens 4096 --eval-tokens 4096 --warm-up 16 $(DTYPE)
	@echo "== 2/4  Inspect the second one =="
	$(FFNSKIP) inspect $(DEMO)/flops-0.15.yaml --plot $(DEMO)/profile.html
	@echo "== 3/4  Generate, next to the dense model =="
	$(FFNSKIP) generate demo "Explain in three sentences why the sky is blue." --profile $(DEMO)/flops-0.15.yaml \
	    --max-new-tokens 96 --compare $(DTYPE)
	@echo "== 4/4  Bench: quality on held-out text, speed along it =="
	$(FFNSKIP) bench demo --profile $(DEMO)/flops-0.15.yaml --measure quality,speed --eval-tokens 4096 --new-tokens 128 $(DTYPE)
	@echo "Profiles and picture are in $(DEMO)/:" && ls $(DEMO)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

schema: .venv/installed
	$(BIN)/python -m ffnskip.profiles > profiles/schema.json

# Outside CI. atheris guides the inputs by coverage; where it has no wheel, they are drawn blindly.
fuzz: .venv/installed
	-$(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: -c constraints.txt atheris
	$(BIN)/python tests/torture/fuzz_loader.py $(or $(RUNS),1000000)

torture: .venv/installed
	$(BIN)/python tests/torture/kills.py $(or $(KILLS),100)

clean:
	rm -rf .venv $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis
