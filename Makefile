PYTHON ?= .venv/bin/python

.PHONY: test slow lint types notebooks bench readme ci

test:
	.venv/bin/pytest

slow:
	.venv/bin/pytest -m slow

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	.venv/bin/mypy

notebooks:
	PYTHONPATH=tests .venv/bin/pytest --nbmake notebooks -o addopts= -o filterwarnings=default -n 2 -p pinned

bench:
	for name in overhead peers growth evaluation quality streaming variance naive; do \
		$(PYTHON) -m tests.benchmarks.$$name || exit 1; done

readme:
	$(PYTHON) -m tests.benchmarks.readme

ci:
	.ci/run
