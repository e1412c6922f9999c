# From a fresh clone; needs Python 3.10+, a C++ compiler and make. Each target does the set-up it needs.
#
#   make demo        train, sample and draw the flight trajectories
#   make test        lint, types and tests
#   make test-full   the same, with the long matrix
#   make bench       timings
#   make lint        ruff, mypy, clang-format; changes nothing
#   make format      let ruff and clang-format rewrite the code
#   make clean       remove all that make made
#
# ARGS goes to the command: make demo ARGS="--steps 10", make test ARGS="-k guided". PYTHON is the interpreter
# that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CSRC = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: setup demo test test-full bench lint format clean

setup: .venv/extension.stamp

# torch first and without build isolation: pip would fetch another, larger torch only to build against it.
.venv/packages.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch setuptools ninja pybind11
	FLOWMATCH_KERNELS_NO_EXT=1 $(PIP) --no-build-isolation --editable '.[demo,test,lint]'
	touch $@

.venv/extension.stamp: .venv/packages.stamp setup.py $(CSRC)
	FLOWMATCH_KERNELS_REQUIRE_EXT=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/python -m flowmatch_kernels demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-full: lint
	$(BIN)/python -m pytest -m "" $(ARGS)

bench: setup
	$(BIN)/python -m bench $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf .venv build dist *.egg-info flowmatch_kernels/_C.* .pytest_cache .hypothesis .mypy_cache .ruff_cache
