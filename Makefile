# `make demo` and `make test` are all that a fresh machine needs; both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint install clean

install: $(VENV)/installed

# What the commands need, which is all in wheels.
$(VENV)/product: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What the tests need too. One of it, zipfile-deflate64 of isic-challenge-scoring, is compiled.
$(VENV)/installed: $(VENV)/product
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Trains a tiny teacher on made-up images, distils a student from it and compares the two.
demo: $(VENV)/product
	$(BIN)/python run.py experiment=demo_teacher
	$(BIN)/python run.py experiment=demo_efkd

# Two processes of one thread each: starting Python takes most of the time.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

# Kills, several processes and long matrices.
test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) cache runs .pytest_cache .ruff_cache *.egg-info
