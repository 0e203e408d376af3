# Each target is one command on a fresh machine: it makes .venv and installs into it when needed.
PYTHON ?= python3
REWARD ?= ink
# Processes of the tests; a file of tests stays in one of them, because its fixtures are made once.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECOGNISERS := $(VENV)/.recognisers

# Nothing here downloads a model or reports usage; what is needed is in the repository.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Everything here is small: a second thread mostly waits for the first, and burns the core that another process could use.
export OMP_NUM_THREADS ?= 1

.PHONY: demo words test test-slow lint docs bench clean

demo: $(INSTALLED)
	REWARD=$(REWARD) $(BIN)/python examples/digits/demo.py

words: $(RECOGNISERS)
	$(BIN)/torchrun --standalone --nproc_per_node 2 examples/words/demo_words.py

test: $(RECOGNISERS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(RECOGNISERS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable silences a notice about another program's future; everything else stops the build.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/discretisation.py

clean:
	rm -rf $(VENV) build dist out src/*.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch alone first: the pinned release is taken from wherever pip is told to look, a local CPU build included,
# before anything else can ask for another one.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	touch $@

# The recognisers of examples/words, of which only the weights are read: without what their programs need, onnxruntime and
# OpenCV, and on Python 3.13 too, for which rapidocr-onnxruntime has no release.
$(RECOGNISERS): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --ignore-requires-python rapidocr rapidocr-onnxruntime
	touch $@
