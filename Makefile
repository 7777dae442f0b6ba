# Everything happens in this folder: the environment in .venv, results in runs/, local clusters in .moelastic/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Installed first and by exact version: an open range pulls gigabytes of CUDA. The README says how to get another build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
BENCH_INSTALLED := $(VENV)/bench.stamp
PYTEST_FLAGS ?= -q

PROTOS := $(wildcard protos/moelastic/*/v1/*.proto)
GENERATED := $(PROTOS:.proto=_pb2.py) $(PROTOS:.proto=_pb2.pyi) $(PROTOS:.proto=_pb2_grpc.py)

.PHONY: help install demo bench test check chaos protos clean

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything that development needs; skipped when it is up to date

demo: $(INSTALLED) ## Start a local cluster, serve the shipped model on it, score and generate text, stop everything
	$(BIN)/python -m examples.demo

chaos: $(INSTALLED) ## Lose actors, GPUs and nodes under load, record what callers notice in docs/failover (REPETITIONS=n SCENARIOS="a b")
	$(BIN)/python -m examples.failover --repetitions $(or $(REPETITIONS),0) $(SCENARIOS)

bench: $(BENCH_INSTALLED) ## Measure ours beside its peers, everything that `moelastic bench` knows: up to 40 minutes, on a quiet machine
	timeout 2400 $(BIN)/moelastic bench -- --full

test: $(INSTALLED) ## Run every test a fresh machine can run
	$(BIN)/pytest $(PYTEST_FLAGS)

check: $(INSTALLED) ## Lint, format, types, import contract, generated protos equal
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT; \
	$(BIN)/python -m grpc_tools.protoc -I . --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" $(PROTOS); \
	for file in $(GENERATED); do cmp "$$file" "$$fresh/$$file" || { echo "$$file is not what its .proto says; run: make protos"; exit 1; }; done
	@echo "protos: generated code is up to date"

protos: $(INSTALLED) ## Generate the code of protos/ again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

clean: ## Remove the environment, caches and results; end local clusters first with `moelastic down --local`
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BENCH_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $(BENCH_INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=...")'
	mkdir -p $(VENV) && date +%s > $(VENV)/install_began
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	touch $(INSTALLED)
