"""The order of the rooms: a file imports only from files above it."""

import ast
from pathlib import Path

import pytest

import probdiff

ORDER = [
    "types", "files", "datasets", "schedules", "families", "networks", "chains", "likelihood", "training",
    "diagnostics", "plots", "results", "cli",
]  # fmt: skip
PACKAGE = Path(probdiff.__file__).parent


def test_every_file_has_its_place():
    assert {path.stem for path in PACKAGE.rglob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name):
    source = (PACKAGE / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("probdiff") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probdiff":
            module = (node.module or "").split(".")[1:]
            for imported in module or [alias.name for alias in node.names]:
                assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_importing_changes_no_global_state():
    import subprocess
    import sys

    code = "import jax; before = dict(jax.config.values); import probdiff; assert before == dict(jax.config.values)"
    subprocess.run([sys.executable, "-c", code], check=True)
