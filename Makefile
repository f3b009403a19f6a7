# make demo   environment, install, dense against ToDo on the shipped pipeline; prints where the images are
# make test   environment, install, lint, types, all tests
# make docs   these pages and the API reference, in build/docs/README.html; fails on any warning
# make wheel  a wheel in dist/ with the compiled libraries; TODO_ATTN_CUDA and TODO_ATTN_CUDA_ARCHS as in setup.py
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: env demo lint test docs wheel clean

# torch first and alone: the other packages must not bring a torch of their own choice, and csrc/ is compiled against it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch 'setuptools>=77'
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

env: $(VENV)/.ready

demo: env
	$(VENV)/bin/todo-attn compare --out demo --overwrite

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n auto --dist loadgroup

$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/docs
	@echo build/docs/README.html

# setuptools would put what lies in build/ into the wheel.
wheel: env
	rm -rf build
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info demo todo_attn/*.so
