"""Tables in text files: how their fields are separated, how their numbers are written, and what their columns are."""

import csv
import gzip
from pathlib import Path
from typing import Any

_SEPARATORS = (";", "\t", "|")  # besides commas, which numbers may hold
_DECIMAL_COMMA = r"[-+]?(?:\d+,?\d*|,\d+)(?:[eE][-+]?\d+)?"


def read_text(path: Path) -> Any:
    """The data frame in a text file whose first row names the columns; it may be compressed by gzip.

    Fields are separated by commas, semicolons, tabs or bars. Except between commas, numbers may have decimal commas.
    Raises `ValueError` for a first row of numbers, a name that stands for two columns, and rows of more fields than
    there are names.
    """
    import pandas as pd

    separator, names = _first_row(path)
    _check_names(names, separator)
    frame = _named(pd.read_csv(path, sep=separator), len(names))
    if separator != "," and any(_has_decimal_commas(frame[column]) for column in frame.columns):
        frame = _named(pd.read_csv(path, sep=separator, decimal=","), len(names))
    return frame


def _first_row(path: Path) -> tuple[str, list[str]]:
    """The separator that parts every row into as many fields as the first, or more; and the fields of the first."""
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = [line for line in (file.readline() for _ in range(100)) if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    for separator in _SEPARATORS:
        first, *others = csv.reader(lines, delimiter=separator)
        if len(first) > 1 and all(len(row) >= len(first) for row in others):
            return separator, first
    return ",", next(csv.reader(lines))


def _check_names(names: list[str], separator: str) -> None:
    named = [name.strip() for name in names if name.strip()]
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


def _named(frame: Any, num_names: int) -> Any:
    """The frame with each name over its own column: pandas takes fields for which no name is left for an index."""
    import pandas as pd

    if isinstance(frame.index, pd.RangeIndex):
        return frame
    every = frame.reset_index()
    if not every.iloc[:, num_names:].isna().all(axis=None):
        raise ValueError(f"its rows have {every.shape[1]} fields, and its first row has {num_names} names")
    return every.iloc[:, :num_names].set_axis(frame.columns, axis=1)  # rows that end in a separator


def _has_decimal_commas(column: Any) -> bool:
    if column.dtype.kind in "biuf":
        return False
    words = column.dropna().astype(str).str.strip()
    return bool(len(words)) and bool(words.str.fullmatch(_DECIMAL_COMMA).all())
