# make demo   quantize the model inside the package, print a table, write a plot
# make test   all checks: lint, format, types, tests
# Both make their own environment in $(VENV) first, once.
#
# PYTHON=python3.12          another interpreter (3.10 or newer)
# TORCH="torch==2.13.0 --index-url URL"    another build of torch (see README)
# VENV=path                  another place for the environment
# WORKERS=2                  processes that run the tests, one thread each

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := pyproject.toml CMakeLists.txt $(shell find iqtorch/cpu_ext/csrc -type f)

.PHONY: demo test test-oldest check setup clean

demo: $(READY)
	$(BIN)/iqtorch demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# The tests of docs/huggingface.md and of GGUF files with the oldest transformers that pyproject.toml allows, and of GPU kernels with its
# oldest Triton (whose interpreter needs a NumPy of its time); all else is shared with $(VENV).
test-oldest: $(READY)
	test -x $(VENV)/oldest/bin/python || $(BIN)/python -m venv $(VENV)/oldest
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' > $$(echo $(VENV)/oldest/lib/python*/site-packages)/shared.pth
	$(VENV)/oldest/bin/pip install -q 'transformers==5.4.*' 'triton==3.6.*' 'numpy==2.2.*'
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -q -p no:cacheprovider tests/test_triton_compile.py -k "every_kernel or vector_kernel or matrix_kernel or two_seconds or amd"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -q -p no:cacheprovider tests/triton_cases.py -k "(iq2_kl or iq3_kt or q4_k) and not experts"
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -q -p no:cacheprovider tests/test_hf.py tests/test_hf_placement.py tests/test_hf_gpu.py tests/test_training.py \
		tests/test_gguf.py tests/test_gguf_load.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# torch comes first: the extension is compiled against it, and nothing after this may replace it.
$(READY): $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo 'error: no venv; on Debian and Ubuntu: apt install python3-venv g++' >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis iqtorch-demo*.png
	find . -name __pycache__ -prune -exec rm -rf {} +
