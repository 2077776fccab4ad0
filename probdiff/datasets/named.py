"""Data sets by name, and files, in a part to train and a part to test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from probdiff.checks import check_bits, check_data, check_varies
from probdiff.datasets.synthetic import Density, Heartbeat, SwissRoll, eight_gaussians
from probdiff.datasets.tables import READERS, dequantise, read_table, table_suffix, whole_columns
from probdiff.types import Key

BITS = ("heartbeat", "binary-digits")  # of those that `load` knows by name


@dataclass(frozen=True, eq=False)
class Split:
    """Data in two parts, (N, D) each, the names of the D features, and the exact density where it is known.

    `whole` are the features that were integers before they were dequantised.
    """

    train: np.ndarray
    test: np.ndarray
    features: tuple[str, ...]
    density: Density | None = None
    whole: tuple[str, ...] = ()


_SYNTHETIC: dict[str, Callable[[float], Density]] = {
    "swiss-roll": SwissRoll,
    "8-gaussians": lambda _: eight_gaussians(),
    "heartbeat": lambda _: Heartbeat(),
}


def density(source: str, noise: float = 0.5) -> Density | None:
    """The exact density of the synthetic data set called `source`; None of real ones and of files."""
    return _SYNTHETIC[source](noise) if source in _SYNTHETIC else None


def split(x: np.ndarray, features: Sequence[str], rng_key: Key, test_fraction: float = 0.2) -> Split:
    """A seeded random split of the rows of x (N, D). Raises `ValueError` where a part would have fewer than 2 rows."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must lie strictly between 0 and 1")
    num_test = round(test_fraction * len(x))
    if min(num_test, len(x) - num_test) < 2:
        raise ValueError(f"the data have {len(x)} row(s); a split into training and test data needs more")
    order = np.asarray(jax.random.permutation(rng_key, len(x)))
    return Split(x[order[num_test:]], x[order[:num_test]], tuple(features))


def load(
    source: str,
    *,
    rng_key: Key,
    noise: float = 0.5,
    columns: Sequence[str] | None = None,
    dequantised: bool = False,
    binary: bool = False,
    test_fraction: float = 0.2,
) -> Split:
    """The data set called `source`, or the table in the file `source`, split into training and test rows.

    Synthetic: "swiss-roll" (with `noise`), "8-gaussians" and, of bits, "heartbeat", 100,000 rows to train and 10,000 to
    test. Real, from scikit-learn: "digits" (8×8, always dequantised), "binary-digits" (bits: ink of at least half the
    most), "wine" and "breast-cancer". Else a file for `read_table`, of bits where `binary`.
    """
    key_data, key_split = jax.random.split(rng_key)
    exact = density(source, noise)
    if exact is not None:
        if columns or dequantised or binary:
            raise ValueError(f"{source} is synthetic; columns, dequantise and binary are for tables")
        x = np.asarray(exact.sample(key_data, 110_000))
        names = ("x", "y") if x.shape[1] == 2 else tuple(f"bit_{i}" for i in range(x.shape[1]))
        return Split(x[:100_000], x[100_000:], names, exact)
    if source in ("digits", "binary-digits", "wine", "breast-cancer"):
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, "load_" + source.removeprefix("binary-").replace("-", "_"))()
        if columns or dequantised or binary:
            raise ValueError(f"{source} is used as it is; columns, dequantise and binary are for tables")
        x, features = bunch.data, [str(name) for name in bunch.feature_names]
        if source == "binary-digits":
            return split((x >= 8).astype(np.uint8), features, key_split, test_fraction)
        whole = tuple(features) if source == "digits" else ()
        x = dequantise(x, key_data) if whole else x
    elif table_suffix(source) in READERS:
        if binary and dequantised:
            raise ValueError("bits are not dequantised; leave out binary or dequantise")
        x, features = read_table(source, columns, key_data if dequantised else None, integers=binary)
        whole = whole_columns(source, features) if dequantised else ()
        if binary:
            return split(check_bits(x, x.shape[1:], source, 2), features, key_split, test_fraction)
    else:
        known = ", ".join([*_SYNTHETIC, "digits", "binary-digits", "wine", "breast-cancer"])
        raise ValueError(f"no data set is called {source!r}; there are {known}, and files in {', '.join(READERS)}")
    x = check_data(x, x.shape[1:], source, 2, features)
    check_varies(x, source, features)
    return replace(split(x, features, key_split, test_fraction), whole=whole)
