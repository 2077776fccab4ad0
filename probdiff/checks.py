"""Errors at the door: what was given, in which argument, and what is wanted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from probdiff.types import Key


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
    if rng_key is not None and dtype == jnp.uint32 and rng_key.shape == (2,):
        return jax.random.wrap_key_data(rng_key)
    raise TypeError(f"rng_key is {rng_key!r}; it must be one key, such as jax.random.key(0)")


def check_count(value: int, name: str, least: int) -> None:
    """Raises `ValueError` where `value` is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


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


def described(support: constraints.Constraint) -> str:
    """What a discrete support wants, in words."""
    if support is constraints.boolean:
        return "bits are wanted, 0 or 1"
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return f"{support} is wanted" if high is None else f"integers from {low} to {high} are wanted"


def check_support(
    x: ArrayLike, event_shape: tuple[int, ...], support: constraints.Constraint, name: str, minimum: int = 1
) -> np.ndarray:
    """x as an array (N, *event_shape) of numbers in `support`, at least `minimum` rows; raises as `check_data`.

    As float64 where the support is continuous, else as integers, whatever dtype they came in.
    """
    if not support.is_discrete:
        return check_data(x, event_shape, name, minimum)
    array = np.asanyarray(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; {described(support)}")
    array = check_data(array.astype(np.float64), event_shape, name, minimum)
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
