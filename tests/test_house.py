"""The order of the rooms: a file imports only from files above it."""

import ast
from pathlib import Path

import pytest

import probdiff

ORDER = [
    "types", "files", "datasets", "streams", "schedules", "families", "binomial", "networks", "prior", "chains",
    "guidance", "filters", "likelihood", "particles", "flow", "devices", "checkpoints", "training", "diagnostics",
    "plots",
    "derivation.statements", "derivation.ledger", "derivation.estimates", "derivation.pair", "derivation.gradient",
    "derivation.score", "derivation.linear", "derivation.two_state", "derivation.quadrature", "derivation.feller",
    "derivation.flips", "derivation.oracle", "derivation.oracle_of_bits", "derivation.bernoulli", "derivation.evidence",
    "derivation.gaussian", "derivation.bits", "derivation.chain_rows", "derivation.bound_rows", "derivation", "exact",
    "results", "observations", "posterior", "imputation", "processes", "cli",
]  # fmt: skip
PACKAGE = Path(probdiff.__file__).parent


def test_every_file_has_its_place():
    assert {name_of(path) for path in PACKAGE.rglob("*.py")} == {*ORDER, ""}


def name_of(path):
    """ "chains" of probdiff/chains.py, "derivation" of probdiff/derivation/__init__.py, "" of probdiff/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name):
    source = next(path for path in PACKAGE.rglob("*.py") if name_of(path) == name).read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("probdiff") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probdiff":
            module = (node.module or "").removeprefix("probdiff").removeprefix(".")
            below = [alias.name if not module else f"{module}.{alias.name}" for alias in node.names]
            for imported in [one if one in ORDER else module for one in below]:
                assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_importing_changes_no_global_state():
    import subprocess
    import sys

    code = "import jax; before = dict(jax.config.values); import probdiff; assert before == dict(jax.config.values)"
    subprocess.run([sys.executable, "-c", code], check=True)
