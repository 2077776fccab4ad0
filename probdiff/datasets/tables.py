"""The numbers in a user's file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from probdiff.datasets.text import read_text
from probdiff.types import Key

WRITTEN = (".npy", ".csv", ".parquet")  # the suffixes of tables that are written
READERS = (*WRITTEN, ".tsv", ".csv.gz", ".tsv.gz")  # and of those that are read


def read_table(
    path: str | Path,
    columns: Sequence[str] | None = None,
    dequantise_key: Key | None = None,
    integers: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """The numbers in a .npy, .csv, .tsv or .parquet file as an array (N, D), and the names of its columns.

    The columns of a .npy file, an array (N, D), are called "0" to "D−1"; the first row of a text file names its
    columns, and its fields are separated by commas, semicolons, tabs or bars. With `dequantise_key`, columns of
    integers are dequantised; without it they are refused, since a density has no upper bound on them, unless
    `integers` are wanted as they are.
    Raises `ValueError` for a file that cannot be read, a column that is not there and a column that is not of
    numbers. Missing entries come back as NaN.
    """
    frame = read_frame(path, columns)
    array = frame_numbers(frame, str(path), integers=dequantise_key is not None or integers)
    if dequantise_key is not None:
        for i in np.flatnonzero(integer_columns(frame)).tolist():
            array[:, i] = dequantise(array[:, i], jax.random.fold_in(dequantise_key, i))
    return array, list(frame.columns)


def integer_columns(frame: Any) -> np.ndarray:
    """Which columns of a data frame hold integers or truth values by their dtype, so that they are dequantised."""
    from pandas.api import types as kinds

    return np.array([kinds.is_integer_dtype(kind) or kinds.is_bool_dtype(kind) for kind in frame.dtypes])


def whole_columns(path: str | Path, columns: Sequence[str]) -> tuple[str, ...]:
    """Which of these columns of a table hold integers."""
    held = integer_columns(read_frame(path, columns))
    return tuple(column for column, is_whole in zip(columns, held, strict=True) if is_whole)


def table_suffix(path: str | Path) -> str:
    """The end of a file's name that tells how it is read, in lower case: that of `a.CSV.gz` is ".csv.gz"."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read_frame(path: str | Path, columns: Sequence[str] | None) -> Any:
    """The data frame in a file, with these columns or all; raises as `read_table`."""
    import pandas as pd

    path, suffix = Path(path), table_suffix(path)
    if suffix not in READERS:
        raise ValueError(f"{path} ends in {suffix!r}; the files read are {', '.join(READERS)}")
    if columns and len(set(columns)) < len(columns):
        raise ValueError(f"columns are {', '.join(columns)}; each must be named once")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 2:
                raise ValueError(f"its array has shape {array.shape}; it must be (N, D)")
            frame = pd.DataFrame(array, columns=[str(i) for i in range(array.shape[1])])
        else:
            frame = pd.read_parquet(path) if suffix == ".parquet" else read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} could not be read: its text is not in UTF-8; save it in that encoding") from error
    except Exception as error:  # each reader has errors of its own, and all mean the same to the user
        first_line = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} could not be read: {first_line}") from error
    frame.columns = [str(name) for name in frame.columns]
    if columns:
        missing = [name for name in columns if name not in frame.columns]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(frame.columns)}")
        frame = frame[list(columns)]
    if not len(frame):
        raise ValueError(f"{path} has 0 row(s) of data")
    return frame


def frame_numbers(frame: Any, name: str, integers: bool = False) -> np.ndarray:
    """The numbers of a data frame as float64. Raises `ValueError` for words, and unless meant for integers."""
    from pandas.api import types as kinds

    words = [column for column in frame.columns if not kinds.is_numeric_dtype(frame[column])]
    if words:
        first = frame[words[0]].dropna().head(1).tolist()
        such = f" ({first[0]!r})" if first else ""
        raise ValueError(
            f"{name}: column {words[0]!r} does not hold numbers{such}; leave it out, naming the columns to use"
        )
    whole = frame.columns[integer_columns(frame)]
    if len(whole) and not integers:
        raise ValueError(
            f"{name}: column {whole[0]!r} holds integers, and a density wants continuous data: "
            "dequantise them (--dequantise), leave them out, or write them with decimals if they were measured; "
            "a table of bits is --binary"
        )
    return frame.to_numpy(np.float64, copy=True, na_value=np.nan)


def dequantise(x: ArrayLike, rng_key: Key) -> np.ndarray:
    """x + u, u uniform on [0, 1): a density of x + u bounds the probability of the integers x from below.

    x of integers, any shape; raises `ValueError` where it holds anything else.
    """
    x = np.asarray(x, dtype=np.float64)
    if not np.array_equal(x, np.floor(x)):
        raise ValueError("x holds numbers that are not integers; dequantising is for integer data")
    return x + np.asarray(jax.random.uniform(rng_key, x.shape))
