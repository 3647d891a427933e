# Two commands: `make demo` shows what magmax does on a real model, `make test` checks it. Both set everything up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-extras lint bench docs tutorial clean

demo: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python examples/newsgroups.py

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-extras: $(READY) # an environment for each extra: some minutes, and as much disk as torch takes
	$(BIN)/python tools/try_extras.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/deptry src
	$(BIN)/python tools/measure_layout.py

bench: $(READY)
	$(BIN)/python benchmarks/merge.py

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

tutorial: $(READY)
	MAGMAX_TUTORIAL=1 $(BIN)/python -m pytest tests/test_docs.py -k tutorial

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache demo site benchmarks/.work
