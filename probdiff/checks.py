"""Errors at the door: what was given, in which argument, and what is wanted."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from probdiff.types import Key


def warn(message: str) -> None:
    """Warns; what is shown is the line outside of this package from which it was called."""
    warnings.warn(message, skip_file_prefixes=(f"{Path(__file__).parent}{os.sep}",))


def check_key(rng_key: Key | None) -> Key:
    """A typed key of `rng_key`, which may be an old-style one. Raises `TypeError` where it is no key."""
    dtype = getattr(rng_key, "dtype", None)
    if (
        rng_key is not None
        and dtype is not None
        and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        and rng_key.shape == ()
    ):
        return rng_key
    if rng_key is not None and dtype == jnp.uint32 and rng_key.shape in ((2,), (4,)):
        return jax.random.wrap_key_data(rng_key, impl="threefry2x32" if rng_key.shape == (2,) else "rbg")
    raise TypeError(f"rng_key is {rng_key!r}; it must be one key, such as jax.random.key(0)")


def check_count(value: int, name: str, least: int) -> None:
    """Raises `ValueError` where `value` is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


def labels(features: Sequence[str] | None, size: int) -> np.ndarray:
    """The names of features, or without names the numbers from 0."""
    return np.array([str(i) for i in range(size)] if features is None else list(features))


def feature_names(x: Any, name: str) -> tuple[str, ...] | None:
    """The names of a data frame's columns, None of what is no frame. Raises `ValueError` where they name no column."""
    if not is_frame(x):
        return None
    levels = getattr(x.columns, "nlevels", 1)
    if levels > 1:
        raise ValueError(
            f"{name} has names of {levels} levels over its columns; one is wanted, such as "
            f'{name}.set_axis(["_".join(map(str, levels)) for levels in {name}.columns], axis=1)'
        )
    names = tuple(str(column) for column in x.columns)
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise ValueError(f"{name} has several columns called {twice[0]!r}")
    return names


def frame_values(x: Any, name: str, features: Sequence[str] | None = None, allow_integers: bool = True) -> Any:
    """The numbers of a data frame as an array, its columns in the order of `features`; what is no frame, as it is.

    Raises `ValueError` for columns that are not those of `features`, and `TypeError` for one that holds no numbers, or
    integers where they are not allowed.
    """
    names = feature_names(x, name)
    if names is None:
        return x
    from pandas.api.types import is_numeric_dtype

    wanted = names if features is None else tuple(features)
    for kind, wrong in (("no column", set(wanted) - set(names)), ("a column", set(names) - set(wanted))):
        if wrong:
            why = "which this fit was made with" if kind == "no column" else "which this fit was not made with"
            raise ValueError(f"{name} has {kind} {min(wrong)!r}, {why}; its features are {some(wanted)}")
    frame = x if hasattr(x, "iloc") else x.to_pandas()
    columns = [frame.iloc[:, names.index(column)] for column in wanted]
    for column, label in zip(columns, wanted, strict=True):
        if not is_numeric_dtype(column):
            raise TypeError(f"column {label!r} of {name} has dtype {column.dtype}; it must hold numbers")
        if not allow_integers and _numpy_dtype(column.dtype).kind in "biu":
            raise TypeError(f"column {label!r} of {name} has {_wants_floats(_numpy_dtype(column.dtype))}")
    arrays = [
        column.to_numpy(np.float64, na_value=np.nan) if column.hasnans else column.to_numpy(_numpy_dtype(column.dtype))
        for column in columns
    ]
    return np.column_stack(arrays) if arrays else np.zeros((len(frame), 0))


def is_frame(x: Any) -> bool:
    """Whether x is a data frame, of pandas or one that turns into one."""
    return hasattr(x, "columns") and (hasattr(x, "iloc") or hasattr(x, "to_pandas"))


def _numpy_dtype(dtype: Any) -> np.dtype:
    """Of a column's dtype, one of NumPy's, pandas' nullable or sparse ones or Arrow's."""
    return np.dtype(getattr(dtype, "numpy_dtype", getattr(dtype, "subtype", dtype)))


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
    if not jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 too
        raise TypeError(f"{name} has {_wants_floats(array.dtype)}")
    if len(array) < minimum:
        raise ValueError(f"{name} has {len(array)} row(s); it must have at least {minimum}")
    rows, columns = np.nonzero(~np.isfinite(array.reshape(len(array), -1)))
    if len(rows):
        names = labels(features, array[0].size)[np.unique(columns)]
        raise ValueError(
            f"{name} has {len(rows)} entries that are NaN or infinite, in row(s) {some(np.unique(rows))} "
            f"and column(s) {some(names)}"
        )
    return array.astype(np.float64)


def _wants_floats(dtype: np.dtype) -> str:
    """What is wrong with data of a dtype that is no float's, after "has"."""
    said = f"dtype {dtype}; a density wants floating-point data"
    if dtype.kind not in "biu":
        return said
    return (
        f"{said}: dequantise integers (datasets.dequantise, --dequantise), or convert what is no count by astype(float)"
    )


def described(support: constraints.Constraint) -> str:
    """What a discrete support wants, in words."""
    if support is constraints.boolean:
        return "bits are wanted, 0 or 1"
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return f"{support} is wanted" if high is None else f"integers from {low} to {high} are wanted"


def check_support(
    x: ArrayLike,
    event_shape: tuple[int, ...],
    support: constraints.Constraint,
    name: str,
    minimum: int = 1,
    features: Sequence[str] | None = None,
) -> np.ndarray:
    """x as an array (N, *event_shape) of numbers in `support`, at least `minimum` rows.

    A data frame's columns are put in the order of `features`, by name. Raises as `check_data` and `frame_values`.
    As float64 where the support is continuous, else as integers, whatever dtype they came in.
    """
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced by JAX, as by jit or grad, and what a fit says of data is computed outside of them. The "
            "programs can be traced, by NumPyro: log_density(d.reverse, (x_0,), {'stacked': True}, {**params, "
            "'x': path}) of numpyro.infer.util, or Trace_ELBO().loss(rng_key, params, d.reverse, d.forward, x_0)"
        )
    features = feature_names(x, name) if features is None else features
    x = frame_values(x, name, features, allow_integers=support.is_discrete)
    if not support.is_discrete:
        return check_data(x, event_shape, name, minimum, features)
    array = np.asanyarray(x)
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}; {described(support)}")
    array = check_data(array.astype(np.float64), event_shape, name, minimum, features)
    outside = ~(np.asarray(support(array), bool) & (array == np.floor(array)))
    if outside.any():
        rows = np.nonzero(outside.reshape(len(array), -1))[0]
        values = np.unique(array[outside])
        raise ValueError(f"{name} has entries {some(values)} in row(s) {some(np.unique(rows))}; {described(support)}")
    return array.astype(np.uint8 if array.max(initial=0) < 256 and array.min(initial=0) >= 0 else np.int64)


def check_bits(x: ArrayLike, event_shape: tuple[int, ...], name: str, minimum: int = 1) -> np.ndarray:
    """x as bytes (N, *event_shape) that are 0 or 1, of any dtype, at least `minimum` rows; raises as `check_data`."""
    return check_support(x, event_shape, constraints.boolean, name, minimum)


def check_varies(x: np.ndarray, name: str, features: Sequence[str] | None = None) -> None:
    """Raises `ValueError` where a feature of x (N, *event_shape) is constant, so that it cannot be standardised."""
    flat = x.reshape(len(x), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        std = flat.std(0)
    out_of_range = np.flatnonzero((np.ptp(flat, axis=0) > 0) & ~((std > 0) & np.isfinite(std)))
    if out_of_range.size:
        names = labels(features, flat.shape[1])[out_of_range]
        raise ValueError(
            f"{name} is too large or too small to standardise in feature(s) {some(names)}; change their units"
        )
    constant = np.flatnonzero(np.ptp(flat, axis=0) == 0)
    if constant.size:
        names = labels(features, flat.shape[1])[constant]
        raise ValueError(
            f"{name} has the same value in every row of feature(s) {some(names)}; leave constant features out"
        )


def some(values: Sequence[Any] | np.ndarray) -> str:
    """The first five of some values, and how many more there are."""
    listed = ", ".join(str(value) for value in values[:5])
    return listed + (f" and {len(values) - 5} more" if len(values) > 5 else "")
