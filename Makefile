# Everything runs in .venv. It is made once, and again when requirements.txt or setup.py change; the stamp is written
# last, so that an installation that failed or was stopped is taken up again.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/installed-peers

.PHONY: help setup demo test soak bench bench-gpu costs lint clean

help: ## list these targets
	@echo "usage: make TARGET [PYTHON=python3.12]      PYTHON: what .venv is made with (3.11 or newer)"
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | \
		while read -r name text; do printf '  %-9s %s\n' "$$name" "$$text"; done

setup: $(INSTALLED) ## make .venv with all that is needed (about 7 GB, a few minutes the first time)

demo: $(INSTALLED) ## train MoCo on small real images and measure it (about 3 minutes on two cores)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/torchrun --standalone --nproc-per-node 1 tools/train.py --config demo.yaml

test: lint ## lint, then run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

soak: $(INSTALLED) ## the long fault tests, with the counts of docs/reliability.md; figures go to build/soak.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --soak -o faulthandler_timeout=3600 --durations 0

bench: $(PEERS) ## compare speed and memory with others, on the CPU; IMAGES=photos ROOT=cifar: real data
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --images '$(IMAGES)' --root '$(ROOT)'

bench-gpu: $(PEERS) ## the same on a GPU, in slices of under 9 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --device cuda --images '$(IMAGES)' --root '$(ROOT)'

costs: $(INSTALLED) ## write the counts of operators and bytes that tests/test_costs.py holds the code to
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.costs --write

lint: $(INSTALLED) ## check style and types (ruff, mypy)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove .venv, caches and build leftovers; runs/ is kept
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks common configs instdisc metric_learning moco tests tools -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt setup.py
	@command -v $(PYTHON) >/dev/null || { \
		echo "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12"; \
		exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is older. Name another: make PYTHON=/path/to/python3.12"; \
		exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv or ensurepip to make .venv with. On Debian or Ubuntu: apt install python3-venv"; \
		exit 1; } >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test,dev,fast,export]'
	@touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[bench]'
	@touch $@
