# make demo   environment, install, dense against ToDo on the shipped pipeline; prints where the images are
# make test   environment, install, lint, types, all tests
# make docs   these pages and the API reference, in build/docs/README.html; fails on any warning
# make wheel  a wheel and an sdist in dist/, audited; TODO_ATTN_CUDA and TODO_ATTN_CUDA_ARCHS as in setup.py
# make wheels the same, then the ops' tests on it in fresh environments; PYTHONS="3.10 3.13" TORCHES="2.10 2.13"
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: env demo lint test docs wheel test-wheel wheels clean

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

$(VENV)/.nox: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt nox
	touch $@

wheel: $(VENV)/.nox
	$(PY) -m nox --session build

test-wheel: $(VENV)/.nox
	$(PY) -m nox --session tests command

wheels: wheel
	$(MAKE) test-wheel

clean:
	rm -rf $(VENV) .nox build dist *.egg-info demo todo_attn/*.so
