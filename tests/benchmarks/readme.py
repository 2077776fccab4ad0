"""Writes the README of this folder: the tables of the committed .json files between the text of `readme.in.md`.

    python -m tests.benchmarks.readme

In the template `{{about NAME}}` stands for what a script measures, its command, and date and machine where its .json
has them, and `{{table NAME}}` for its table.
"""

import ast
import json
import re
from pathlib import Path

import pandas as pd

from tests.benchmarks import components, guidance, imputation, real_data, schedules, tables

FOLDER = Path(__file__).parent
TEMPLATE, README = FOLDER / "readme.in.md", FOLDER / "README.md"
POSTERIORS = {  # the rows of posteriors.json that are shown: their name, and how they are written
    "swiss-roll": [
        ("KS own to exact", "error of the fit: KS own to exact", ".4f"),
        ("KS particles to own", "particles: KS to own", ".4f"),
        ("KS particles to exact", "particles: KS to exact", ".4f"),
        ("particles, effective draws", "particles: effective draws", ",.0f"),
        ("particles, seconds", "particles: s", ".1f"),
        ("KS NUTS to own", "NUTS: KS to own", ".4f"),
        ("NUTS, effective draws", "NUTS: effective draws", ",.0f"),
        ("NUTS, seconds", "NUTS: s", ".0f"),
        ("log evidence", "log p(y), nats", ".4f"),
        ("log evidence mcse", "± (Monte Carlo)", ".4f"),
        ("log evidence, own", "log p(y), own, nats", ".4f"),
        ("log evidence, own, se", "± (standard error)", ".4f"),
        ("log evidence, exact", "log p(y), exact, nats", ".4f"),
        ("200 seeds, largest error", "log p(y), largest error of 200 seeds, nats", ".3f"),
        ("200 seeds, within 0.02", "seeds within 0.02 nats", "d"),
        ("200 seeds, within stated error", "seeds within their stated error", "d"),
    ],
    "mixture": [
        ("largest error of a mode's weight, mean", "largest error of a mode's weight, mean of ten problems", ".4f"),
        ("se", "± (standard error)", ".4f"),
        ("worst", "the worst of ten", ".3f"),
        ("log evidence, mean absolute error", "log p(y), mean absolute error, nats", ".3f"),
        ("seconds", "s on one core, median", ".0f"),
    ],
}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def markdown(rows):
    """A list of dicts as a table; numbers with three decimals unless they are whole."""
    frame = pd.DataFrame(rows)
    lines = [list(frame.columns), ["---"] * len(frame.columns), *(map(written, row) for row in frame.to_numpy(object))]
    return "\n".join("| " + " | ".join(str(cell).strip() for cell in line) + " |" for line in lines)


def written(value):
    if isinstance(value, float):
        return "" if value != value else f"{value:g}" if value == round(value, 2) else f"{value:.3f}"
    return value


def about(name):
    """The first sentence of a script's docstring, its first command, and date and machine of its .json file."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    sentence = " ".join(text.split("\n\n")[0].split())
    commands = [line.strip() for line in text.splitlines() if re.match(r" {4}(python|pip) ", line)]
    lines = [sentence, "", "```sh", *commands, "```"]
    found = read(name) if (FOLDER / f"{name}.json").exists() else []
    if "date" in found:
        lines += ["", f"{found['date']}; {found['machine']}."]
    return "\n".join(lines)


def seen(cells):
    rows = []
    names = [name for name in cells if name.startswith(("swiss-roll", "rings"))]
    for key, name, form in POSTERIORS["swiss-roll"]:
        rows.append({"": name} | {density: format(cells[density][key], form) for density in names})
    return markdown(rows)


def modes(cells):
    rows = []
    chains = {"T = 400, M = 1": cells["mixture"], "T = 4, M = 25": cells["mixture, T = 4, M = 25"]}
    for key, name, form in POSTERIORS["mixture"]:
        rows.append(
            {"": name}
            | {
                f"{chain}; numbers seen: {seen}": format(cell[f"M = {seen}, {key}"], form)
                for chain, cell in chains.items()
                for seen in (1, 4, 32)
            }
        )
    return markdown(rows)


def ranks(cells):
    rows = [
        {"": f"{name.removeprefix('calibration').lstrip(', ') or 'T = 10, M = 1'}, {way}"}
        | {f"p of x_{i}": f"{cell[f'{way}, x_{i}, p']:.2f}" for i in (1, 2)}
        for name, cell in cells.items()
        if name.startswith("calibration")
        for way in ("particles", "NUTS")
    ]
    return markdown(rows)


def table(name):
    """The table of a script's .json file."""
    if name in ("schedules", "components"):
        return {"schedules": schedules, "components": components}[name].table(read(name))
    if name in ("real_data", "imputation"):
        frame = {"real_data": real_data, "imputation": imputation}[name].table(read(name))
        return markdown(frame.to_dict("records"))
    if name == "tables":
        return f"{markdown(tables.table(read(name)).to_dict('records'))}\n\n{tables.summary(read(name))}."
    if name == "guidance":
        return guidance.table()
    if name == "posteriors":
        cells = read(name)
        return "\n\n".join((seen(cells), modes(cells), ranks(cells)))
    return markdown(read(name)["rows"])


def text():
    """The README as the command writes it."""
    fill = {"about": about, "table": table}
    return re.sub(r"\{\{(about|table) (\w+)\}\}", lambda found: fill[found[1]](found[2]), TEMPLATE.read_text())


def main():
    README.write_text(text())


if __name__ == "__main__":
    main()
