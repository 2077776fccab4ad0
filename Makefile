.PHONY: test lint types notebooks ci

test:
	.venv/bin/pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	.venv/bin/mypy

notebooks:
	.venv/bin/pytest --nbmake notebooks -o addopts= -o filterwarnings=default

ci:
	.ci/run
