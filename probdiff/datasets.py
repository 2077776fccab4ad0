"""Seeded data sets, with their exact log density wherever there is one, and reading a user's table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from probdiff.types import Key


class Density(Protocol):
    """A data set that can be drawn from and whose log density is known."""

    def sample(self, rng_key: Key, n: int) -> Array: ...
    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]: ...


@dataclass(frozen=True)
class SwissRoll:
    """The swiss roll's spiral in the plane, scaled to unit variance.

    x = (s·cos s, s·sin s) + `noise`·ε with s uniform on [3π/2, 9π/2] and ε standard normal, then less
    the mean and over the standard deviation of each coordinate, both exact. `noise` is in the units
    of scikit-learn's `make_swiss_roll`. Raises `ValueError` where it is not positive.
    """

    noise: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is {self.noise}; it must be positive and finite")

    def sample(self, rng_key: Key, n: int) -> Float[Array, "n 2"]:
        """n draws, shape (n, 2)."""
        key_s, key_noise = jax.random.split(rng_key)
        s = jax.random.uniform(key_s, (n, 1), minval=1.5 * math.pi, maxval=4.5 * math.pi)
        spiral = jnp.concatenate([s * jnp.cos(s), s * jnp.sin(s)], axis=1)
        return (spiral + self.noise * jax.random.normal(key_noise, (n, 2)) - self._mean) / self._std

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """log ∫ N(x given spiral(s), noise) ds / 3π in nats, by Gauss–Legendre panels finer than the noise."""
        panels = math.ceil(90 / self.noise) + 8  # the spiral is 89 long
        nodes, weights = np.polynomial.legendre.leggauss(8)
        edges = np.linspace(1.5 * np.pi, 4.5 * np.pi, panels + 1)
        s = (0.5 * (edges[1:] + edges[:-1])[:, None] + 0.5 * np.diff(edges)[:, None] * nodes).ravel()
        log_weights = jnp.asarray(np.log(np.tile(weights / 2 / panels, panels)))
        centres = jnp.asarray((np.stack([s * np.cos(s), s * np.sin(s)], 1) - self._mean) / self._std)
        scale = jnp.asarray(self.noise / self._std)
        log_normaliser = -math.log(2 * math.pi) - math.log(scale[0] * scale[1])

        def one(point: Float[Array, " 2"]) -> Float[Array, ""]:
            squared = jnp.sum(((point - centres) / scale) ** 2, axis=-1)
            return jax.nn.logsumexp(log_weights - 0.5 * squared) + log_normaliser

        x = _points(x, 2)
        flat = jax.lax.map(one, x.reshape(-1, 2), batch_size=1024)
        return flat.reshape(x.shape[:-1])

    @property
    def _mean(self) -> np.ndarray:
        # E[s·cos s] and E[s·sin s] over [3π/2, 9π/2]
        return np.array([2.0, 2 / (3 * math.pi)])

    @property
    def _std(self) -> np.ndarray:
        def second_moments(s: float) -> np.ndarray:  # ∫ s² cos² s and ∫ s² sin² s
            wave = (2 * s**2 - 1) * math.sin(2 * s) / 8 + s * math.cos(2 * s) / 4
            return np.array([s**3 / 6 + wave, s**3 / 6 - wave])

        moments = (second_moments(4.5 * math.pi) - second_moments(1.5 * math.pi)) / (3 * math.pi)
        return np.sqrt(moments - self._mean**2 + self.noise**2)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Σ_k w_k N(m_k, S_k) in any D.

    `weights` (K,), positive and summing to 1; `means` (K, D); `covariances` (K, D, D), positive definite.
    Raises `ValueError` where they are not.
    """

    weights: ArrayLike
    means: ArrayLike
    covariances: ArrayLike

    def __post_init__(self) -> None:
        weights, means, covariances = (np.asarray(a, float) for a in (self.weights, self.means, self.covariances))
        k = weights.size
        if weights.ndim != 1 or k == 0 or np.any(weights <= 0) or abs(weights.sum() - 1) > 1e-6:
            raise ValueError(f"weights is {weights}; it must be a vector of positive numbers that sum to 1")
        if means.ndim != 2 or len(means) != k:
            raise ValueError(f"means has shape {means.shape}; with {k} weights it must be ({k}, D)")
        if covariances.shape != (*means.shape, means.shape[1]):
            raise ValueError(f"covariances has shape {covariances.shape}; it must be {(*means.shape, means.shape[1])}")
        if not np.allclose(covariances, np.swapaxes(covariances, 1, 2)) or np.linalg.eigvalsh(covariances).min() <= 0:
            raise ValueError("covariances must be symmetric and positive definite")

    @property
    def distribution(self) -> dist.Distribution:
        """The mixture as a NumPyro distribution."""
        components = dist.MultivariateNormal(jnp.asarray(self.means), jnp.asarray(self.covariances))
        return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(self.weights)), components)

    def sample(self, rng_key: Key, n: int) -> Float[Array, "n D"]:
        """n draws, shape (n, D)."""
        return self.distribution.sample(rng_key, (n,))

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """log Σ_k w_k N(x given m_k, S_k), nats."""
        return self.distribution.log_prob(_points(x, np.shape(self.means)[1]))


@dataclass(frozen=True)
class Heartbeat:
    """`length` bits with a pulse at every `period`-th, at a random phase (Sohl-Dickstein et al. 2015).

    `period` sequences are equally likely, so the entropy is log `period` nats. Raises `ValueError` where `period` is
    not between 2 and `length`.
    """

    length: int = 20
    period: int = 5

    def __post_init__(self) -> None:
        if not 2 <= self.period <= self.length:
            raise ValueError(f"period is {self.period}; it must be from 2 to length, {self.length}")

    @property
    def sequences(self) -> np.ndarray:
        """All of them, (period, length), bytes."""
        return (np.arange(self.length) % self.period == np.arange(self.period)[:, None]).astype(np.uint8)

    def sample(self, rng_key: Key, n: int) -> Array:
        """n draws, shape (n, length), bytes."""
        return jnp.asarray(self.sequences)[jax.random.randint(rng_key, (n,), 0, self.period)]

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """−log `period` of one of the sequences, −∞ of others; nats."""
        is_one = jnp.all(_points(x, self.length)[..., None, :] == self.sequences, -1).any(-1)
        return jnp.where(is_one, -math.log(self.period), -jnp.inf)


def _points(x: ArrayLike, size: int) -> Float[Array, "*batch D"]:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(f"x has shape {x.shape}; its last axis must be of length {size}")
    return x


def eight_gaussians(radius: float = 2.0, scale: float = 0.15) -> GaussianMixture:
    """Eight equal Gaussians of standard deviation `scale`, evenly spaced on a circle of `radius`."""
    angle = np.arange(8) * np.pi / 4
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return GaussianMixture(np.full(8, 1 / 8), means, np.tile(scale**2 * np.eye(2), (8, 1, 1)))


def dequantise(x: ArrayLike, rng_key: Key) -> np.ndarray:
    """x + u, u uniform on [0, 1): a density of x + u bounds the probability of the integers x from below.

    x of integers, any shape; raises `ValueError` where it holds anything else.
    """
    x = np.asarray(x, dtype=np.float64)
    if not np.array_equal(x, np.floor(x)):
        raise ValueError("x holds numbers that are not integers; dequantising is for integer data")
    return x + np.asarray(jax.random.uniform(rng_key, x.shape))


@dataclass(frozen=True, eq=False)
class Split:
    """Data in two parts, (N, D) each, the names of the D features, and the exact density where it is known."""

    train: np.ndarray
    test: np.ndarray
    features: tuple[str, ...]
    density: Density | None = None


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
    synthetic: dict[str, Callable[[], Density]] = {
        "swiss-roll": lambda: SwissRoll(noise),
        "8-gaussians": eight_gaussians,
        "heartbeat": Heartbeat,
    }
    if source in synthetic:
        if columns or dequantised or binary:
            raise ValueError(f"{source} is synthetic; columns, dequantise and binary are for tables")
        density = synthetic[source]()
        x = np.asarray(density.sample(key_data, 110_000))
        names = ("x", "y") if x.shape[1] == 2 else tuple(f"bit_{i}" for i in range(x.shape[1]))
        return Split(x[:100_000], x[100_000:], names, density)
    if source in ("digits", "binary-digits", "wine", "breast-cancer"):
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, "load_" + source.removeprefix("binary-").replace("-", "_"))()
        if columns or dequantised or binary:
            raise ValueError(f"{source} is used as it is; columns, dequantise and binary are for tables")
        x, features = bunch.data, [str(name) for name in bunch.feature_names]
        if source == "binary-digits":
            return split((x >= 8).astype(np.uint8), features, key_split, test_fraction)
        x = dequantise(x, key_data) if source == "digits" else x
    elif Path(source).suffix in READERS:
        if binary and dequantised:
            raise ValueError("bits are not dequantised; leave out binary or dequantise")
        x, features = read_table(source, columns, key_data if dequantised else None, integers=binary)
        if binary:
            return split(check_bits(x, x.shape[1:], source, 2), features, key_split, test_fraction)
    else:
        known = ", ".join([*synthetic, "digits", "binary-digits", "wine", "breast-cancer"])
        raise ValueError(f"no data set is called {source!r}; there are {known}, and files in {', '.join(READERS)}")
    x = check_data(x, x.shape[1:], source, 2, features)
    check_varies(x, source, features)
    return split(x, features, key_split, test_fraction)


def read_table(
    path: str | Path,
    columns: Sequence[str] | None = None,
    dequantise_key: Key | None = None,
    integers: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """The numbers in a .npy, .csv or .parquet file as an array (N, D), and the names of its columns.

    The columns of a .npy file, an array (N, D), are called "0" to "D−1". With `dequantise_key`, columns of integers
    are dequantised; without it they are refused, since a density has no upper bound on them, unless `integers` are
    wanted as they are.
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


def read_frame(path: str | Path, columns: Sequence[str] | None) -> Any:
    """The data frame in a file, with these columns or all; raises as `read_table`."""
    import pandas as pd

    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}; the files read are {', '.join(READERS)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 2:
                raise ValueError(f"its array has shape {array.shape}; it must be (N, D)")
            frame = pd.DataFrame(array, columns=[str(i) for i in range(array.shape[1])])
        else:
            frame = getattr(pd, READERS[path.suffix])(path)
    except Exception as error:  # each reader has errors of its own, and all mean the same to the user
        raise ValueError(
            f"{path} could not be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
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
        raise ValueError(f"{name}: column {words[0]!r} does not hold numbers; leave it out, naming the columns to use")
    whole = frame.columns[integer_columns(frame)]
    if len(whole) and not integers:
        raise ValueError(
            f"{name}: column {whole[0]!r} holds integers, and a density wants continuous data: "
            "dequantise them (--dequantise), leave them out, or write them with decimals if they were measured; "
            "a table of bits is --binary"
        )
    return frame.to_numpy(np.float64, copy=True)


BITS = ("heartbeat", "binary-digits")  # of those that `load` knows by name
READERS = {".npy": "load", ".csv": "read_csv", ".parquet": "read_parquet"}


def check_data(
    x: ArrayLike, event_shape: tuple[int, ...], name: str, minimum: int = 1, features: Sequence[str] | None = None
) -> np.ndarray:
    """x as a float64 array (N, *event_shape) of finite numbers with at least `minimum` rows.

    Raises `ValueError` or `TypeError` that says what is wrong, with the rows and the columns where it is.
    """
    if np.ma.is_masked(x):
        raise ValueError(f"{name} is masked in places; complete rows are wanted")
    array = np.asarray(x)
    if array.shape[1:] != event_shape or array.ndim != len(event_shape) + 1:
        raise ValueError(
            f"{name} has shape {array.shape}; this diffusion wants (N, {', '.join(map(str, event_shape))})"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"{name} has dtype {array.dtype}; a density wants floating-point data: dequantise integers "
            "(datasets.dequantise, --dequantise), or convert what is not counted with astype(float)"
        )
    if len(array) < minimum:
        raise ValueError(f"{name} has {len(array)} row(s); it must have at least {minimum}")
    rows, columns = np.nonzero(~np.isfinite(array.reshape(len(array), -1)))
    if len(rows):
        names = [features[i] if features else str(i) for i in np.unique(columns).tolist()]
        raise ValueError(
            f"{name} has {len(rows)} entries that are NaN or infinite, in row(s) {some(np.unique(rows))} "
            f"and column(s) {some(names)}"
        )
    return array.astype(np.float64)


def check_bits(x: ArrayLike, event_shape: tuple[int, ...], name: str, minimum: int = 1) -> np.ndarray:
    """x as bytes (N, *event_shape) that are 0 or 1, of any dtype, at least `minimum` rows; raises as `check_data`."""
    array = np.asanyarray(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; bits are wanted, 0 or 1")
    array = check_data(array.astype(np.float64), event_shape, name, minimum)
    rows = np.nonzero(((array != 0) & (array != 1)).reshape(len(array), -1))[0]
    if len(rows):
        values = np.setdiff1d(array, [0.0, 1.0])
        raise ValueError(
            f"{name} has entries {some(values)} in row(s) {some(np.unique(rows))}; bits are wanted, 0 or 1"
        )
    return array.astype(np.uint8)


def check_varies(x: np.ndarray, name: str, features: Sequence[str] | None = None) -> None:
    """Raises `ValueError` where a feature of x (N, *event_shape) is constant, so that it cannot be standardised."""
    flat = x.reshape(len(x), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        std = flat.std(0)
    out_of_range = np.flatnonzero((np.ptp(flat, axis=0) > 0) & ~((std > 0) & np.isfinite(std)))
    if out_of_range.size:
        names = [features[i] if features else str(i) for i in out_of_range.tolist()]
        raise ValueError(
            f"{name} is too large or too small to standardise in feature(s) {some(names)}; change their units"
        )
    constant = np.flatnonzero(np.ptp(flat, axis=0) == 0)
    if constant.size:
        names = [features[i] if features else str(i) for i in constant.tolist()]
        raise ValueError(
            f"{name} has the same value in every row of feature(s) {some(names)}; leave constant features out"
        )


def some(values: Sequence[Any] | np.ndarray) -> str:
    """The first five of some values, and how many more there are."""
    listed = ", ".join(str(value) for value in values[:5])
    return listed + (f" and {len(values) - 5} more" if len(values) > 5 else "")
