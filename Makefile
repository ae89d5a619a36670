# kitout: everything from a fresh clone. Needs python3 (>= 3.10) with venv, make and git; all else goes into .venv.
# `make` or `make help` lists the targets. Every target sets up what it needs first and can be interrupted and rerun.
#
# TORCH is installed first, and only if the environment holds no torch yet, so any build you put there stays. On Linux
# the default index serves the CUDA build (several GB). For another one give pip's arguments, for example
#   make test TORCH="torch==2.13.0 --index-url <the index of the CPU builds that pytorch.org names>"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
MODEL  ?=
DATA   ?=

BIN   := $(VENV)/bin
PY    := $(BIN)/python
PIP   := $(PY) -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.kitout-ready

.DEFAULT_GOAL := help
.PHONY: help setup test test-plain test-device test-slow package demo demo-vision demo-align bench lint format types clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install kitout with what tests and demo need

# The stamp is written last. An interrupted set-up runs again, and pip skips what is already there.
# timm asks for torchvision, whose published builds refuse to import beside a CPU build of torch, and a broken
# torchvision breaks transformers too. So timm comes without its requirements (transformers and pillow cover the rest)
# and tests/torchvision_stub.py has the few names it needs.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kitout needs Python 3.10 or newer; '$(PYTHON)' is older. Try: make PYTHON=python3.12"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -c 'import torch; torch.ones(1)' >/dev/null 2>&1 || $(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps timm
	@touch $@

test: lint types  ## set up, lint, type-check and run the tests
	$(PY) -m pytest -n 2 -q $(ARGS)

# 20 s: one model and the method with most fast paths, through every law, and the test of the switch itself.
test-plain: $(STAMP)  ## some of the laws with every fast path off
	KITOUT_FAST=off $(PY) -m pytest -n 2 -q tests/test_fast.py tests/laws -k 'test_fast or [llama-lora] or llama-lora-' $(ARGS)

# 45 s: two of the models, where all take minutes. The laws run there as well: KITOUT_TEST_DEVICE=emulated.
test-device: $(STAMP)  ## what a GPU would launch, wait for and refuse, on a device without hardware
	KITOUT_TEST_DEVICE=emulated $(PY) -m pytest -n 2 -q tests/test_emulated_device.py tests/predict/test_conversation.py -k 'not test_a_training and not test_rows or llama- or gpt-neox-' $(ARGS)

test-slow: $(STAMP)  ## the tests marked slow or assets (downloads models and data once)
	$(PY) -m pytest -n 2 -q -m 'slow or assets' $(ARGS)

# Slow tests, so `make test` leaves them out: a strict type check from the installed wheel is half of their time.
package: $(STAMP)  ## build wheel and sdist into dist/, install both and check them
	$(PY) -m pytest -q -m slow tests/test_package.py
	$(PY) -m build --no-isolation

# Threads that spin while they wait (OpenMP's habit) halve the demo's speed on a machine that has other work.
demo: $(STAMP)  ## train an adapter on a real small model, evaluate it, prove its merge; MODEL=... DATA=... choose others
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/kitout demo text $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(ARGS)

demo-vision: $(STAMP)  ## compare eight methods on an image model; MODEL=... DATA=... choose others
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/kitout demo vision $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(ARGS)

demo-align: $(STAMP)  ## teach a language model sums by rewards, and preferences; MODEL=... chooses another
	$(PIP) install -q -c constraints.txt -e '.[align]'
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/kitout demo align $(if $(MODEL),--model '$(MODEL)') $(ARGS)

bench: $(STAMP)  ## install the peers, print ratios against them, fail where one is worse than its bound; ARGS=--full for hours
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	$(PY) benchmarks/run.py $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

format: $(STAMP)  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
