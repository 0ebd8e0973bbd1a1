# One machine, Python 3.11 to 3.13 and make: nothing else is needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# TORCH=cpu asks for the small CPU build of torch, where its index can be reached.
TORCH  ?=
STAMP  := $(VENV)/.installed-$(or $(TORCH),default)
UV     := $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)

.PHONY: demo check test learning lint format hooks up down install

demo: install
	@$(BIN)/sidstream demo

# In minutes: without the tests that train, in two processes of one thread each.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 -m "not learning" tests/unit

test: lint
	$(BIN)/pytest

# What is learned must hold in the arithmetic of a processor without AVX-512 and bfloat16, too.
learning: install
	SIDSTREAM_TRAINER__ARITHMETIC=float32 ATEN_CPU_CAPABILITY=avx2 $(BIN)/pytest -m learning tests/unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: install
	$(BIN)/pre-commit install

up: install
	@$(BIN)/sidstream up

down: install
	@$(BIN)/sidstream down

install: $(STAMP)

# The lock's hashes are those of the default build of torch; the CPU build has its own index, so there the
# lock serves as constraints. Where that index cannot be reached, the default build serves as well.
$(STAMP): requirements.lock pyproject.toml
	@echo "installing into $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] < (3, 14) or sys.exit( \
	    "sidstream needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x "$(UV)" || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@set -e; \
	cpu() { \
	    sed -e '/--hash=/d' -e 's/ \\$$//' requirements.lock > $(VENV)/constraints.txt; \
	    $(UV) pip install --quiet --python $(BIN)/python --torch-backend cpu \
	        --constraint $(VENV)/constraints.txt --editable '.[train,local,dev]'; \
	}; \
	locked() { \
	    $(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock; \
	    $(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	}; \
	if [ "$(TORCH)" = cpu ]; then \
	    cpu 2> $(VENV)/torch-cpu.log || { \
	        echo "torch's CPU build could not be had ($(VENV)/torch-cpu.log says why): the default build instead"; \
	        locked; \
	    }; \
	else \
	    locked; \
	fi
	@rm -f $(VENV)/.installed-*; touch $@
