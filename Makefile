# One verb: `make check`. It uses the Python that is active; CONTRIBUTING.md says how to set one up.
PYTHON ?= python

.PHONY: check lint types test slow examples docs lower-bounds
check: lint types test slow

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n auto -m "not slow"

slow:
	$(PYTHON) -m pytest -m slow $(TESTS)

examples:
	$(PYTHON) -m pytest -m slow tests/test_examples.py tests/test_quickstart.py

docs:
	$(PYTHON) -m sphinx -W --keep-going -q docs docs/_build

lower-bounds:
	.ci/lower-bounds

python-%:
	.ci/pythons $*
