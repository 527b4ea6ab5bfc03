# Everything sets itself up: `make demo` and `make test` need Python 3.11+, a C/C++ compiler and a package registry.
.PHONY: help demo docs test test-quick test-slow lint fuzz bench clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)-docs
# A process per core, each kept to its own (tests/conftest.py), a test file at a time.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

help:
	@echo "make demo       a backdoor that rounding wakes; then a real model, hardened, verified, with a report"
	@echo "make test       lint, type-check and run the whole test suite"
	@echo "make test-quick the tests that neither train nor build anything, without lint"
	@echo "make test-slow  the longer studies"
	@echo "make fuzz       hostile files, servers and moments against the commands, an hour; MINUTES=N, SEED=N"
	@echo "make lint       ruff and mypy only"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make bench      benchmarks (tables on standard output)"

$(READY): pyproject.toml scripts/setup_env.sh
	PYTHON="$(PYTHON)" bash scripts/setup_env.sh $(VENV)
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python scripts/demo.py

$(DOCS)/.ready: pyproject.toml scripts/setup_env.sh
	PYTHON="$(PYTHON)" bash scripts/setup_env.sh $(DOCS) docs
	@touch $(DOCS)/.ready

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(WORKERS)

test-quick: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not training and not build"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

MINUTES ?= 60
SEED ?= 1
fuzz: $(READY)
	$(BIN)/python -m tests.hostile.campaign --minutes $(MINUTES) --seed $(SEED) --state build/fuzz-$(SEED).json

bench: $(READY)
	$(BIN)/python scripts/bench/bench_grids.py
	$(BIN)/python scripts/bench/bench_convert.py

clean:
	rm -rf $(VENV) $(DOCS) demo-output build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
