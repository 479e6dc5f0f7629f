# make demo    set up, then learn to segment from captions and show the result
# make test    set up, then run the tests          make lint    style of Python and C++
# make build   compile what changed                make bench   measure everything, in 15 minutes
# make clean   remove what was built (not .venv, not runs)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
SOURCES := setup.py CMakeLists.txt $(wildcard build_support/*.py csrc/* kernels/*)

# By environment, so that the pins also hold where pip builds in isolation.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint build bench sanitize clean

demo: build
	$(BIN)/python -m groupvit_fast.train --amp

test: build
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# JSON, report and plots in build/bench; BENCH="--keep" writes to benchmarks/results/ of this machine.
bench: build
	$(BIN)/python benchmarks/bench.py $(BENCH)

# The CUDA kernels under compute-sanitizer; needs a GPU.
sanitize: build
	$(BIN)/python tests/sanitize.py

build: $(VENV)/.built

# torch first: the package compiles against the one that is there.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -c "import groupvit_fast as g; print('groupvit_fast', g.build_info())"
	touch $@

clean:
	rm -rf build groupvit_fast/*.so *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
