# Everything from a fresh clone with Python >= 3.10: `make demo` shows it, `make test` proves it. `make sanitize` runs the
# C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; it needs CMake and GCC or Clang only.

PYTHON ?= python3
VENV ?= .venv
# what `make demo ARGS="--context 4096"` hands to the program
ARGS ?=
WORKERS ?= auto
# a wheel of this tree, where one has been built already: the tests then build none of their own
WHEEL ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
# one thread per test process: the processes already fill the machine
# long tests stand together at the end: whoever is idle takes of what others have not begun
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: demo test fast slow aot lint matrix optional sanitize tiles wheel install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/hici demo $(ARGS)

test: fast slow

fast: $(STAMP)
	$(PYTEST) -m "not slow"

slow: $(STAMP)
	$(PYTEST) -m slow $(if $(WHEEL),--wheel=$(WHEEL))

# every kernel configuration for every target, without a GPU; what the committed report proves is not compiled again
aot: $(STAMP)
	$(BIN)/python -m hici_kernels.aot --report benchmarks/aot.json

# the oldest and the newest transformers that pyproject.toml allows, each beside the environment, not in it
TRANSFORMERS ?= 5.14.1 5.23.0
matrix: $(STAMP)
	@for version in $(TRANSFORMERS); do \
		echo "transformers $$version" && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade \
			--target build/transformers-$$version transformers==$$version && \
		PYTHONPATH=build/transformers-$$version $(PYTEST) tests/transformers_models tests/train || exit 1; \
	done

# the tests of what few install: DeepSpeed's engines and the standard evaluation harness, beside the environment
optional: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/optional \
		lm_eval einops hjson msgpack ninja psutil py-cpuinfo pydantic
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/optional --no-deps deepspeed
	PYTHONPATH=build/optional $(PYTEST) tests/train tests/evaluate/test_harness.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# address space randomisation off: ThreadSanitizer of older compilers does not start under that of newer kernels
DRIVER = build/driver-$(1)/driver
NO_ASLR := $(shell setarch -R true 2>/dev/null && echo setarch -R)
CASES ?= 40

sanitize:
	@$(MAKE) --no-print-directory build/driver-plain build/driver-memory build/driver-threads
	$(call DRIVER,plain) $(CASES)
	$(call DRIVER,memory) $(CASES)
	$(NO_ASLR) $(call DRIVER,threads) $(CASES)

build/driver-plain: SANITIZE :=
build/driver-memory: SANITIZE := address,undefined
build/driver-threads: SANITIZE := thread
.PHONY: build/driver-plain build/driver-memory build/driver-threads
build/driver-plain build/driver-memory build/driver-threads:
	@cmake -S csrc/driver -B $@ -DHICI_SANITIZE=$(SANITIZE) > /dev/null
	@cmake --build $@ --parallel $(shell nproc 2>/dev/null || echo 2)

# attention on the path of tiles without its products, then without moves of tiles too: benchmarks/tiles
tiles:
	@cmake -S benchmarks/tiles -B build/tiles > /dev/null
	@cmake --build build/tiles --parallel $(shell nproc 2>/dev/null || echo 2)
	@build/tiles/tiles
	@build/tiles/tiles-still

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

install: $(STAMP)

# torch first and by its exact version: as a mere dependency, pip may choose a build that brings gigabytes of GPU
# libraries. A CPU build is taken where pip's own configuration offers one.
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc build_backend -type f 2>/dev/null)
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing torch (a few minutes, depending on the network)"
	@$(PIP) torch==2.13.0
	@echo "Building and installing hici-kernels"
	@$(PIP) --editable '.[charts,dev,triton]'
	@touch $@

clean:
	rm -rf $(VENV) dist build/driver-* src/*.egg-info src/hici_kernels/libhici_native.so .pytest_cache .hypothesis .ruff_cache .mypy_cache
