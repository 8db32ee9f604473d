# SPDX-License-Identifier: Apache-2.0
#
# Needs python3 (3.11 or newer, with venv) and make; everything else goes into a virtual environment beside this file.
#     PYTHON=python3.13 make test     with another Python, in an environment of its own (.venv-3.13)
#     make test ARGS="-k journal -x"  more words for pytest

export PYTHON
ARGS =
JOBS = 2

VENV := .venv$(if $(PYTHON),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
BIN := $(VENV)/bin

help:
	@echo 'make demo       a whole live update on the embedded kernel, checked to the last byte'
	@echo 'make test       the fast suite: tests, types, lint, docs'
	@echo 'make lab-test   the suite on real kernels in QEMU'
	@echo 'make bench      the measurements'
	@echo 'make docs       the documentation, in docs/_build/html'
	@echo 'make format     put the code into shape'
	@echo 'make dist       wheel and source distribution, in dist/'
	@echo 'make lock       pin the dependencies anew (make lock ARGS=--upgrade)'
	@echo 'make clean      remove what the above have made'
	@echo 'Words for the program go into ARGS, another Python into PYTHON.'

runtime:
	@.ci/venv $(VENV) requirements.lock

dev:
	@.ci/venv $(VENV) requirements-dev.lock

demo: runtime
	@$(BIN)/luoctl demo $(ARGS)

test: dev
	@$(BIN)/pytest -m 'not lab' -n $(JOBS) --dist loadfile $(ARGS)

lab-test: dev
	@$(BIN)/pytest -m lab -n $(JOBS) --dist loadfile $(ARGS)

bench: dev
	@$(BIN)/python -m bench $(ARGS)

docs: dev
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

format: dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

dist: dev
	@$(BIN)/python -m build --no-isolation $(ARGS)

lock:
	@PYTHON="$$(.ci/python)" .ci/lock $(ARGS)

clean:
	rm -rf .venv .venv-* build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help runtime dev demo test lab-test bench docs format dist lock clean
