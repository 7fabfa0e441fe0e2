# Each target sets up its environment by itself; none needs another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLOW ?=
LOWEST := .venv-lowest
RUN := $(LOWEST)/run
DOCS := .venv-docs
# Processes that share the tests.
WORKERS ?= 2

# Where the image packs are, and which tables of docs/results.md to repeat; none: all.
DATA ?= ../shared/data
TABLES ?=

.PHONY: demo test test-lowest lint docs bench results clean

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/mae demo --out demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(SLOW)

# With the oldest versions that pyproject.toml allows: four commands on the demo's digits, then the tests. The whole
# demo would take minutes; a short one is among the tests.
test-lowest: $(LOWEST)/installed
	rm -rf $(RUN)
	$(LOWEST)/bin/mae pack digits --out $(RUN)/shards
	$(LOWEST)/bin/mae pretrain --config configs/pretrain/digits.yaml --epochs 5 --optim.warmup_epochs 1 \
		--data.shards '$(RUN)/shards/train-*.tar' --run_dir $(RUN)/pre
	$(LOWEST)/bin/mae finetune --config configs/finetune/digits.yaml --epochs 2 --optim.warmup_epochs 1 \
		--data.shards '$(RUN)/shards/train-*.tar' --eval_shards '$(RUN)/shards/test-*.tar' --init $(RUN)/pre --run_dir $(RUN)/tuned
	$(LOWEST)/bin/mae export $(RUN)/pre --to timm --out $(RUN)/encoder
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

# The site of the guides, in build/site. A warning or a broken link is an error.
docs: $(DOCS)/installed
	$(DOCS)/bin/python docs/scripts/stage.py build/docs
	$(DOCS)/bin/zensical build --clean --strict

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/trust.py

# Hours; what is measured already stays, so start it again until it ends.
results: $(VENV)/installed-dev
	$(BIN)/python benchmarks/results.py $(TABLES) --data $(DATA)

# Stale as soon as the list of dependencies changes.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@

# pip finds the newest versions only; uv finds the oldest too. trackio and Gradio allow no Pillow that the newest
# versions have.
$(LOWEST)/installed: pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -q uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python -q --resolution lowest-direct -e '.[test,trackio,explore]'
	touch $@

# Only the tools: the site is made from the sources, without torch.
$(DOCS)/installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
		| xargs $(DOCS)/bin/python -m pip install --disable-pip-version-check -q
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) demo build *.egg-info
