"""Tables in text files: how their fields are separated, how their numbers are written, and what their columns are."""

import csv
import gzip
from itertools import islice
from pathlib import Path
from typing import Any

_SEPARATORS = (";", "\t", "|")  # besides commas, which numbers may hold
_DECIMAL_COMMA = r"[-+]?(?:\d+,?\d*|,\d+)(?:[eE][-+]?\d+)?"


def read_text(path: Path) -> Any:
    """The data frame in a text file whose first row names the columns; it may be compressed by gzip.

    Fields are separated by commas, semicolons, tabs or bars. Except between commas, numbers may have decimal commas.
    Rows may end in a separator. Raises `ValueError` for a first row of numbers, a name that stands for two columns, and
    rows of more fields than there are names.
    """
    separator, (first, *others) = _rows(path)
    names = [name.strip() for name in first]
    _check_names(names, separator)
    too_many = max([len(names), *map(len, others)]) - len(names)
    frame = _read(path, separator, ".", names, too_many)
    if separator != "," and any(_has_decimal_commas(frame[column]) for column in frame.columns):
        frame = _read(path, separator, ",", names, too_many)
    return frame


def _read(path: Path, separator: str, decimal: str, names: list[str], too_many: int) -> Any:
    """The frame with each name over its own column: left to itself pandas takes fields without a name for an index."""
    import pandas as pd

    columns = [name or f"Unnamed: {i}" for i, name in enumerate([*names, *[""] * too_many])]
    frame = pd.read_csv(path, sep=separator, decimal=decimal, header=0, names=columns, index_col=False)
    if not frame.iloc[:, len(names) :].isna().all(axis=None):
        raise ValueError(f"its rows have {len(columns)} fields, and its first row has {len(names)} names")
    without_name = [column for column, name in zip(columns, [*names, *[""] * too_many], strict=True) if not name]
    return frame.drop(columns=[column for column in without_name if frame[column].isna().all()])


def _rows(path: Path) -> tuple[str, list[list[str]]]:
    """The separator, and the fields of the first hundred rows.

    It is the one that is in the first row, if there is one alone; else one that parts every row into as many fields as
    the first, or more.
    """
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = [line for line in islice(file, 100) if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    by_separator = {separator: list(csv.reader(lines, delimiter=separator)) for separator in (*_SEPARATORS, ",")}
    parting = [separator for separator, rows in by_separator.items() if len(rows[0]) > 1]
    even = [
        one for one in parting if one != "," and all(len(row) >= len(by_separator[one][0]) for row in by_separator[one])
    ]
    separator = parting[0] if len(parting) == 1 else [*even, ","][0]
    return separator, by_separator[separator]


def _check_names(names: list[str], separator: str) -> None:
    named = [name for name in names if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    numbers = [_number(name, separator) for name in named]
    counted = [list(range(first, first + len(named))) for first in (0, 1)]  # as pandas and R call columns of arrays
    if named and None not in numbers and numbers not in counted:
        shown = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
        raise ValueError(f"its first row holds numbers, {shown}, where the names of the columns are wanted")
    if twice:
        raise ValueError(f"two of its columns are called {twice[0]!r}")


def _number(text: str, separator: str) -> float | None:
    try:
        return float(text if separator == "," else text.replace(",", "."))
    except ValueError:
        return None


def _has_decimal_commas(column: Any) -> bool:
    if column.dtype.kind in "biuf":
        return False
    words = column.dropna().astype(str).str.strip()
    return bool(len(words)) and bool(words.str.fullmatch(_DECIMAL_COMMA).all())
