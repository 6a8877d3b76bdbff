# make demo: the whole job on generated data, on a machine without a GPU.
# make test: lint, types and the test suite.
# make bench: read speed beside peers and memcpy, in three minutes.
# All set up $(VENV) by themselves.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(BIN)/align demo --out demo

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

test-slow: $(READY)
	$(BIN)/pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(PEERS)
	$(BIN)/python benchmarks/bench_store.py --quick --out build/bench/store.jsonl
	$(BIN)/python benchmarks/plot.py store build/bench/store.jsonl build/bench/store.png
	$(BIN)/python benchmarks/plot.py store benchmarks/results/store.jsonl docs/images/store.png

$(READY): pyproject.toml setup.py featcache/_gather.c constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "featcache needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(PEERS): $(READY) benchmarks/peers.txt
	$(BIN)/pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $@

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache
	rm -f featcache/_gather.*.so
