# The journey and the checks, each one command. Override PYTHON or VENV on the command line: make test VENV=.ci-venv

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
MINUTES ?= 2
PROMPT ?= def read_lines(path):

BIN := $(VENV)/bin
# A run extra is installed once per pyproject.toml: the stamp is older than the file only after it changed.
PLOT_STAMP := $(VENV)/.installed-plot
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: help quickstart test test-slow bench lint clean

help:
	@echo "make quickstart   train a tiny V4 on Python's own standard library and let it write (about $(MINUTES) minutes)"
	@echo "make test         the test suite; make test-slow runs the long tests as well"
	@echo "make bench        speed of this model beside the transformers implementation"
	@echo "make lint         ruff and pyright"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(PLOT_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .[plot]
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .[dev]
	@touch $@

# Made again it goes on where it was stopped, and a finished one is not trained twice; remove $(RUN) to start over.
quickstart: $(PLOT_STAMP)
	@if [ -f $(RUN)/config.json ]; then \
		$(BIN)/longreach pretrain --out $(RUN) --resume; \
	else \
		$(BIN)/longreach pretrain --preset tiny --data stdlib --minutes $(MINUTES) --out $(RUN); \
	fi
	@echo
	@$(BIN)/longreach generate $(RUN) "$(PROMPT)" --max-tokens 160 --temperature 0.7 --seed 1
	@echo
	@echo 'Now type:  $(BIN)/longreach generate $(RUN) "class Stack:"'

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -q

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -q -m "slow or not slow"

bench: $(DEV_STAMP)
	$(BIN)/longreach bench model --against transformers

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
