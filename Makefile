# `make` prints the targets. Everything happens in .venv; nothing is installed outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?=
ARGS ?=
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help chat serve tune test test-slow lint bench setup setup-dev native clean

help: ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

chat: $(VENV)/.installed ## set up, fetch the default model once, chat (PROMPT="..." or a pipe: answer once and exit)
	@$(BIN)/dapji chat $(ARGS) $(if $(PROMPT),-- "$$PROMPT")

serve: $(VENV)/.installed ## set up, fetch the default model once, serve it: a page to chat, and the APIs
	$(BIN)/dapji pull qwen2.5-coder-0.5b
	$(BIN)/dapji serve qwen2.5-coder-0.5b $(ARGS)

tune: $(VENV)/.installed-train ## set up with torch, teach the small model a support FAQ, examine it before and after
	$(BIN)/dapji pull smollm2-135m
	@PATH="$(CURDIR)/$(BIN):$$PATH" runs/support-faq/run.sh

test: $(VENV)/.installed-dev lint ## set up, lint, type-check and run the default tests (offline once set up)
	$(BIN)/dapji pull smollm2-135m
	$(BIN)/pytest $(ARGS)

test-slow: $(VENV)/.installed-dev ## the long tests: perplexity, golden text, fuzzing
	$(BIN)/dapji pull qwen2.5-coder-0.5b || echo "without it, tests of its calls are skipped"
	$(BIN)/pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## speed of this machine beside llama.cpp, where that is built
	$(BIN)/pip install -q --group benchmarks
	$(BIN)/python benchmarks/cpu.py $(ARGS)

setup: $(VENV)/.installed ## create .venv with what running needs
setup-dev: $(VENV)/.installed-dev ## create .venv with what developing needs

native: ## compile the C++ core again
	$(BIN)/pip install -q --no-build-isolation -e .

clean: ## remove .venv and build folders
	rm -rf $(VENV) build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml CMakeLists.txt $(wildcard src/native/*)
	$(BIN)/pip install -q "scikit-build-core>=0.11" "nanobind>=2.9" ninja $$(command -v cmake >/dev/null || echo cmake)
	@echo "compiling the native core (about a minute)"
	$(BIN)/pip install -q --no-build-isolation -e ".[hub,serve]"
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install -q --no-build-isolation -e ".[train]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install -q --group dev --group oracles
	$(BIN)/python tests/oracles.py
	@touch $@
