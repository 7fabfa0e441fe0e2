# `make demo` and `make test` each set up .venv by themselves; neither needs the other.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLOW ?=
# Processes that share the tests.
WORKERS ?= 2

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/mae demo --out demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(SLOW)

lint: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/trust.py

# Stale as soon as the list of dependencies changes.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
