PYTHON ?= .venv/bin/python

.PHONY: test lint types notebooks bench ci

test:
	.venv/bin/pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	.venv/bin/mypy

notebooks:
	.venv/bin/pytest --nbmake notebooks -o addopts= -o filterwarnings=default

bench:
	for name in overhead peers growth evaluation quality streaming variance naive; do \
		$(PYTHON) -m tests.benchmarks.$$name || exit 1; done

ci:
	.ci/run
