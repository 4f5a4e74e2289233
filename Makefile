# Each target sets up what it needs in a virtual environment of its own; re-running is fast.
PYTHON ?= python3
CHECKPOINT ?= agentlans/multilingual-e5-small-refusal-classifier
OUT ?= models/bundle
# int8 with a vocabulary pruned to the 37 languages, verified on as many texts as the embedded bundle.
EXPORT_FLAGS ?= --variants int8 --vocabulary languages37 --eval benchmarks/data

EMBEDDED_FLAGS := --variants int8 --model-version 0.4.0 --eval benchmarks/data

# The peers need the checkpoint; other bundles run beside the embedded one.
BENCH_FLAGS ?= $(if $(wildcard models/refusal-e5-small),--checkpoint models/refusal-e5-small) \
  $(if $(wildcard models/edge),--bundle edge=models/edge)

RUN := .venv
DEV := .venv-dev
EXPORT := .venv-export
BENCH := .venv-bench
PIP_FLAGS := --quiet --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard runtime/refusal_runtime/*.py runtime/refusal_runtime/model/*)

.PHONY: run test lint checkpoint export embedded edge bench-accuracy bench bench-full clean

run: $(RUN)/.done  ## classify the example conversations with the embedded model
	$(RUN)/bin/refusal classify --format table examples/conversations.jsonl

test: lint .wheelhouse/.done  ## the full suite
	$(DEV)/bin/python -m pytest

lint: $(DEV)/.done  ## style and types
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

checkpoint: $(EXPORT)/.done  ## the PyTorch checkpoint behind the embedded bundle -> models/refusal-e5-small
	$(EXPORT)/bin/python training/checkpoint.py models/refusal-e5-small

export: $(EXPORT)/.done  ## CHECKPOINT -> OUT
	$(EXPORT)/bin/refusal-export $(CHECKPOINT) $(OUT) $(EXPORT_FLAGS)

embedded: checkpoint  ## the embedded bundle again -> models/embedded
	$(EXPORT)/bin/refusal-export models/refusal-e5-small models/embedded $(EMBEDDED_FLAGS) \
	  --profiles default=256,fast=192,thorough=512 \
	  --name refusal-e5-small --scores training/scores.json --notes docs/embedded-model.md

edge: $(EXPORT)/.done training/weights/edge.safetensors training/scores-edge.json  ## the small, fast bundle -> models/edge
	$(EXPORT)/bin/python training/checkpoint.py models/refusal-e5-edge \
	  --weights training/weights/edge.safetensors
	$(EXPORT)/bin/refusal-export models/refusal-e5-edge models/edge $(EMBEDDED_FLAGS) \
	  --profiles fast=128 --name refusal-e5-edge --scores training/scores-edge.json --notes docs/edge-model.md

bench-accuracy: $(DEV)/.done  ## DATA=labelled.jsonl, else the project's own 37 languages
	$(DEV)/bin/python benchmarks/accuracy.py $(DATA)

bench: $(BENCH)/.done  ## speed in minutes; BENCH_FLAGS="--checkpoint FOLDER --bundle NAME=FOLDER"
	$(BENCH)/bin/python benchmarks/bench.py --save bench $(BENCH_FLAGS)

bench-full: $(BENCH)/.done  ## the same in hours, up to a million rows
	$(BENCH)/bin/python benchmarks/bench.py --full --save bench-full $(BENCH_FLAGS)

$(RUN)/.done: $(SOURCES)
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/pip install $(PIP_FLAGS) '.[cpu]'
	touch $@

# Editable, so that changes to the code need no new installation.
$(DEV)/.done: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install $(PIP_FLAGS) -c constraints-dev.txt -e '.[dev]'
	touch $@

$(EXPORT)/.done: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/pip install $(PIP_FLAGS) -c constraints-dev.txt -e '.[export]'
	touch $@

# Where the peers cannot be installed the benchmark names them as skipped.
$(BENCH)/.done: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install $(PIP_FLAGS) -c constraints-dev.txt -e '.[bench]'
	-$(BENCH)/bin/pip install $(PIP_FLAGS) -c constraints-dev.txt -e '.[bench,bench-peers]'
	touch $@

# The runtime's dependencies as wheels, so that the test of the built wheel needs no network.
.wheelhouse/.done: pyproject.toml $(DEV)/.done
	rm -rf .wheelhouse
	$(DEV)/bin/pip download $(PIP_FLAGS) -d .wheelhouse '.[cpu]'
	rm -f .wheelhouse/refusal_runtime*
	touch $@

clean:
	rm -rf $(RUN) $(DEV) $(EXPORT) $(BENCH) .wheelhouse build/bench
