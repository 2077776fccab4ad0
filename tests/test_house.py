"""The order of the rooms: a folder imports only from those above it."""

import ast
from pathlib import Path

import pytest

import probdiff

# the rooms from top to bottom; those of one floor do not know of each other
FLOORS = [
    ["types", "progress", "identity"],
    ["checks", "files", "psis", "blocks", "locks"],
    ["datasets", "baselines", "faithfulness"],
    ["schedules", "networks"],
    ["families"],
    ["at_time", "noncentred", "stacked"],
    ["chains"],
    ["sampling", "reference", "units"],
    ["likelihood"],
    ["diagnostics"],
    ["plots", "results"],
    ["fitting", "posterior"],
    ["derivation", "runs"],
    ["cli"],
]
PACKAGE = Path(probdiff.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """The modules of the package that a file imports, as ("probdiff", "families", "base")."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("probdiff") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probdiff":
            for alias in node.names:
                yield (*node.module.split("."), alias.name)


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in FILES} == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    assert len(path.read_text().splitlines()) <= 400
    room = room_of(path)
    for _, imported, *_ in imports_of(path):
        assert imported == room or floor_of(imported) < floor_of(room), f"{room} imports {imported}"


def test_the_files_of_a_room_import_each_other_in_one_direction():
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in FILES if path.name != "__init__.py"}
    above = {}
    for name, path in files.items():
        imported = [names[1:] for names in imports_of(path) if names[1] == name[0]]
        above[name] = {one[:k] for one in imported for k in (1, 2, 3) if one[:k] in files} - {name}
    while above:
        first = [name for name, wanted in above.items() if not wanted & set(above)]
        assert first, f"these import each other: {above}"
        above = {name: wanted for name, wanted in above.items() if name not in first}


IMPORTING = """
import sys
import jax
from numpyro.distributions.kl import kl_divergence

config, registry = dict(jax.config.values), set(kl_divergence.funcs)
import probdiff

assert config == dict(jax.config.values)
added = set(kl_divergence.funcs) - registry
assert added
assert all(any(kind.__module__.startswith("probdiff.") for kind in kinds) for kinds in added)
# what one feature needs is imported by that feature
assert not {"grain", "sklearn", "orbax", "diffrax", "blackjax"} & set(sys.modules)
"""


def test_importing_changes_no_global_state_but_numpyros_registry_of_kl_divergences():
    """Which gains entries for the package's own distributions alone, so no KL of others changes."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", IMPORTING], check=True)


def test_importing_after_arviz_leaves_numpyro_whole():
    import subprocess
    import sys

    whole = "import arviz, probdiff, numpyro; numpyro.distributions.distribution.Unit(0.0)"
    subprocess.run([sys.executable, "-c", whole], check=True)
