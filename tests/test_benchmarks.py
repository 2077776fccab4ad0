"""The benchmarks start, and their README has what the committed files have."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
OF_OTHERS = {"bare_torch", "guidance_jax", "guidance_torch"}  # need other libraries
HELPERS = {"bare", "bare_torch", "readme", "timing"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_the_readme_is_what_the_command_writes():
    from tests.benchmarks import readme

    assert readme.README.read_text() == readme.text()


def test_the_readme_has_every_script_and_every_table():
    text, template = (FOLDER / "README.md").read_text(), (FOLDER / "readme.in.md").read_text()
    for name in set(SCRIPTS) - HELPERS:
        assert f"tests.benchmarks.{name}" in text or f"benchmarks/{name}.py" in text, name
    for path in FOLDER.glob("*.json"):
        assert f"{{{{table {path.stem}}}}}" in template, path.stem


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OF_OTHERS])
def test_a_benchmark_is_imported(name):
    importlib.import_module(f"tests.benchmarks.{name}")
