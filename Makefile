# make demo   environment, install, dense against ToDo on the shipped pipeline; prints where the pictures are
# make test   environment, install, lint, types, all tests
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: env demo lint test clean

# torch first and alone: the other packages must not bring a torch of their own choice.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

env: $(VENV)/.ready

demo: env
	$(VENV)/bin/todo-attn compare --out demo

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n auto --dist loadgroup

clean:
	rm -rf $(VENV) build dist *.egg-info demo
