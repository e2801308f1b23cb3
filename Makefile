# Lorikeet: `make help` lists the targets. Needs GNU make, bash and Python 3.11 or later; everything else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
# The first interpreter that runs and is new enough: a name on PATH can be a shim without a Python behind it.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# `make test-gpu PY=python3` takes an environment as it is and installs nothing.
ifdef PY
RUN_READY :=
DEV_READY :=
# It need not have this checkout installed: a link makes it importable under its name, and nothing else of the root.
export PYTHONPATH := $(shell mkdir -p .cache/import && ln -sfn ../.. .cache/import/lorikeet)$(CURDIR)/.cache/import$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
RUN_READY := $(VENV)/.installed-run
DEV_READY := $(VENV)/.installed-dev
endif
# Where its scripts lie, with the slash; empty when PY itself comes from PATH.
BIN = $(if $(findstring /,$(PY)),$(dir $(PY)))

# Small tensors: more threads would mostly wait for one another, and badly so on a shared machine.
TEST_THREADS ?= 1
# Processes that share the tests of `make test`, file by file.
TEST_WORKERS ?= 2
# Where tests marked `gpu` are. Processes that share them: what takes time is compiling kernels and launching small ones.
GPU_TESTS = tests/gpu tests/kernels tests/engine tests/base tests/golden
GPU_TEST_WORKERS ?= $(shell n=$$(nproc); echo $$((n < 12 ? n : 12)))
GPU_TEST_OPTIONS = $(shell "$(PY)" -P -c 'import xdist' 2>/dev/null && echo '-n $(GPU_TEST_WORKERS) --dist loadgroup') \
	$(if $(OUT),--junitxml="$(OUT)/test-gpu.xml")
# The demo base comes from a package; nothing here asks a model hub.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup proto docs lint format type test test-gpu sanitize-gpu soak bench bench-loading bench-trace bench-serving bench-front bench-engine bench-prefix bench-merge profile bench-gpu fidelity run demo clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		while IFS=$$'\t' read -r name what; do printf '  make %-14s %s\n' "$$name" "$$what"; done
	@echo
	@echo '  ARGS="..."          options for run, bench, bench-gpu: make run ARGS="--port 0"'
	@echo '  PYTEST_ARGS="..."   options for test, test-gpu: make test PYTEST_ARGS="-x tests/kernels"'
	@echo '  OUT=DIR             where bench and bench-gpu write [benchmarks/results], and test-gpu and sanitize-gpu, if given'
	@echo '  PYTHON=python3.12   the Python to make .venv with;  PY=python3 uses an environment as it is'

# --- environment ------------------------------------------------------------------------------------------------------

# Asked for first: without ensurepip, `venv` fails half-way and leaves a folder behind.
$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo 'make: no Python 3.11 or later found. Install one, or name it: make run PYTHON=/path/to/python3.12' >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'make: $(PYTHON) is not Python 3.11 or later. Name one that is: make run PYTHON=/path/to/python3.12' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'make: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }

# $(1): the extra of pyproject.toml. On a terminal pip's bars show how long it takes; in a log they would be noise.
define install
	@echo 'Installing the locked dependencies (constraints.txt) into $(VENV); the first time takes minutes'
	@PYTHONWARNINGS=ignore "$(PY)" -m pip install $$([ -t 1 ] || echo --quiet) --disable-pip-version-check -c constraints.txt -e '.[$(1)]' || { \
		echo 'make: the installation failed; pip says why above. Behind a proxy or mirror, set HTTPS_PROXY or PIP_INDEX_URL.' >&2; \
		exit 1; }
	@# A process that may not write bytecode would compile all of it at each start: a second or two.
	@"$(PY)" -m compileall -q __init__.py adapters kernels protos server
endef

# What the C++ kernels are built from.
NATIVE = $(wildcard kernels/native/*.cpp kernels/native/*.h)

$(VENV)/.installed-run: pyproject.toml setup.py constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(call install,demo)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(call install,dev)
	@touch $@ $(VENV)/.installed-run

setup: $(DEV_READY) ## the development environment (.venv with everything that the other targets need)
	@echo 'Ready. `make test` runs the tests; `. $(VENV)/bin/activate` puts `lorikeet` on your PATH.'

# --- use --------------------------------------------------------------------------------------------------------------

run: $(RUN_READY) ## the demo: one NF4 base, four adapters, gRPC on 127.0.0.1:50051
	@exec "$(BIN)lorikeet" serve --model demo --adapters examples/adapters $(ARGS)

demo: $(RUN_READY)
	@"$(BIN)lorikeet" prepare-demo

# --- checks -----------------------------------------------------------------------------------------------------------

# -P: with the root on sys.path, our kernels/ would be importable as `kernels`, a package that transformers probes for.
test: $(DEV_READY) ## the whole test suite on the CPU
	@$(MAKE) demo PY="$(PY)" || echo 'make: no demo base; the tests that need it will skip and say so'
	@OMP_NUM_THREADS=$(TEST_THREADS) $(OFFLINE) "$(PY)" -P -m pytest -m 'not gpu' -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

soak: $(DEV_READY) ## an hour of random loads, replacements, cancels, faults and kills; every invariant holds, nothing is left
	@OMP_NUM_THREADS=$(TEST_THREADS) LORIKEET_SOAK_SECONDS=$${LORIKEET_SOAK_SECONDS:-3600} $(OFFLINE) "$(PY)" -P -m pytest -q -s \
		--timeout 0 tests/soak $(PYTEST_ARGS)

# Without what an environment taken as it is (PY=...) may lack: its pytest may know fewer options than pyproject.toml sets.
test-gpu: $(DEV_READY) ## the tests that need a CUDA device, in a few minutes; with OUT=DIR also as JSON
	@OMP_NUM_THREADS=$(TEST_THREADS) $(OFFLINE) "$(PY)" -P -m pytest -q -m gpu -o addopts=--import-mode=importlib -p no:logging -rfE \
		--disable-warnings $(GPU_TEST_OPTIONS) $(GPU_TESTS) $(PYTEST_ARGS)

sanitize-gpu: $(DEV_READY) ## compute-sanitizer over some cases of every kernel test
	@$(OFFLINE) "$(PY)" -P tests/gpu/sanitize.py $(ARGS)

lint: $(DEV_READY) type ## style, types, stub drift, protobuf and deployment files
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" protos/generate.py --check
	@"$(PY)" docs/generate.py --check
	@"$(PY)" protos/generate.py --imports .cache/googleapis
	@"$(BIN)buf" lint
	@PATH="$(if $(BIN),$(abspath $(BIN)):)$$PATH" deploy/lint.sh

type: $(DEV_READY) ## mypy --strict on server/ and adapters/, and what they import here
	@mkdir -p .cache/typing && ln -sfn ../.. .cache/typing/lorikeet
	@"$(PY)" -m mypy -p lorikeet.server -p lorikeet.adapters | sed 's|^\.cache/typing/lorikeet/||'

format: $(DEV_READY) ## put the code into the project's style
	@"$(PY)" -m ruff check --fix-only --quiet .
	@"$(PY)" -m ruff format .

proto: $(DEV_READY) ## generate the stubs from protos/v1/*.proto
	@"$(PY)" protos/generate.py

docs: $(DEV_READY) ## generate docs/adapter_formats.md from the code's list of formats
	@"$(PY)" docs/generate.py

# --- measurements -----------------------------------------------------------------------------------------------------

bench: $(DEV_READY) ## Lorikeet beside PEFT and llama.cpp, and what each adapter format costs (ARGS="--only formats"); on this CPU
	@$(OFFLINE) "$(PY)" benchmarks/bench.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-loading: $(DEV_READY) ## time between tokens while large adapters come in, and what a load takes
	@$(OFFLINE) "$(PY)" benchmarks/adapter_loading.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-trace: $(DEV_READY) ## S-LoRA's trace over 5 to 2,000 adapters with memory for 50 (3 GB of temporary disk)
	@$(OFFLINE) "$(PY)" benchmarks/adapter_trace.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-serving: $(DEV_READY) ## S-LoRA's trace over gRPC with 1 to 2,000 adapters: times to tokens, goodput (2 GB of temporary disk)
	@$(OFFLINE) "$(PY)" benchmarks/serving.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-front: $(DEV_READY) ## what gRPC and streaming cost before the engine, at 64 to 512 streams
	@$(OFFLINE) "$(PY)" benchmarks/front.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-merge: $(DEV_READY) ## time between tokens while the server merges adapters, and compares the result
	@$(OFFLINE) "$(PY)" benchmarks/merge_serving.py $(if $(OUT),--out "$(OUT)") $(ARGS)

fidelity: $(DEV_READY) ## what each way of deploying the demo's adapters costs; goes on where it was interrupted (about an hour)
	@$(OFFLINE) "$(PY)" benchmarks/fidelity.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-engine: $(DEV_READY) ## what the engine's bookkeeping costs a step, without a model, and how that grows
	@$(OFFLINE) "$(PY)" benchmarks/engine_costs.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-prefix: $(DEV_READY) ## prompts that begin alike and chats of several turns, with the prefix cache and without
	@$(OFFLINE) "$(PY)" benchmarks/prefix_cache.py $(if $(OUT),--out "$(OUT)") $(ARGS)

profile: $(DEV_READY) ## where the time of a decode step goes on this CPU
	@$(OFFLINE) "$(PY)" benchmarks/step_profile.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench-gpu: $(DEV_READY) ## decode at Llama-3-8B shapes on a CUDA device, beside what its bandwidth allows; under ten minutes
	@$(OFFLINE) "$(PY)" benchmarks/bench_gpu.py $(if $(OUT),--out "$(OUT)") $(ARGS)

clean: ## remove caches and build products (the environment stays: rm -r .venv)
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
