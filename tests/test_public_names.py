"""Every name of the package that the READMEs and the notebooks use is reached after `import probdiff` alone."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
ROOMS = (
    "datasets",
    "derivation",
    "diagnostics",
    "likelihood",
    "networks",
    "plots",
    "posterior",
    "schedules",
    "streams",
)
# names are attributes, all the way: no import but the first may be needed
RESOLVE = """
import sys
import probdiff
print(probdiff.__version__)
for dotted in sys.argv[1:]:
    found = probdiff
    try:
        for name in dotted.split(".")[1:]:
            found = getattr(found, name)
    except AttributeError:
        print(dotted)
"""


def code_of(page):
    """The Python of a page: code cells, blocks of code, and a line for each `dotted.name` in its prose."""
    text = page.read_text()
    code = []
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        sources = {
            kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind] for kind in ("code", "markdown")
        }
        code, text = sources["code"], "\n\n".join(sources["markdown"])
    code += re.findall(r"```python\n(.*?)```", text, re.S)
    prose = re.findall(
        rf"`((?:probdiff|{'|'.join(ROOMS)})\.[A-Za-z_][\w.]*)", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    prose = {name.strip(".").removeprefix("probdiff.") for name in prose if not name.endswith(".py")}
    lines = "\n".join(code).splitlines()
    lines = [line for line in lines if not line.lstrip().startswith("%")]
    return "\n".join([*lines, *(f"probdiff.{name}" for name in sorted(prose))])


def names_in(code):
    """The dotted names, from `probdiff` on, that are imported or read as attributes."""
    tree, known, names = ast.parse(code), {"probdiff": "probdiff"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "probdiff"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probdiff":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= set(known.values())
    for node in ast.walk(tree):
        chain, end = [], node
        while isinstance(end, ast.Attribute):
            chain.append(end.attr)
            end = end.value
        if isinstance(end, ast.Name) and end.id in known and end.id not in assigned:
            names.add(".".join([known[end.id], *reversed(chain)]))
    return names


def version_and_unresolved(names):
    """The version, and those of the names that a fresh process does not find after `import probdiff`."""
    command = [sys.executable, "-c", RESOLVE, *sorted(names)]
    found, *wrong = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    return found, wrong


def test_names_are_read():
    code = "import probdiff\nfrom probdiff import plots as p, datasets\nfrom probdiff.derivation import oracle\n"
    code += "datasets = datasets.load(x)\nprobdiff.Fit.load(p.loss(dt).axes, oracle)"
    wanted = {"probdiff.Fit.load", "probdiff.plots.loss", "probdiff.derivation.oracle", "probdiff.datasets"}
    assert wanted <= names_in(code)
    assert "probdiff.datasets.load" not in names_in(code)  # the name was given to something else


def test_every_name_of_the_pages_is_public():
    used = {page: names_in(code_of(page)) for page in PAGES}
    for page in PAGES[:1] + PAGES[2:]:
        assert len(used[page]) >= 3, page
    no_names = {"probdiff.nothing", "probdiff.plots.nothing"}  # which are found out
    found, wrong = version_and_unresolved(set().union(*used.values()) | no_names)
    assert found == version("probdiff")
    assert set(wrong) == no_names, {name: [page.name for page in PAGES if name in used[page]] for name in wrong}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", PAGES[1]], ids=str)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 130
