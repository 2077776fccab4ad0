"""The chain's own units, and those of the data."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from probdiff.chains import Diffusion
from probdiff.checks import check_varies, some, warn
from probdiff.families.base import state_dtype

_MOST_OF_BULK = 2.5  # standard deviations of the bulk in that of all
_EXTREME = 75.0  # and at least one value this many of those away
_FAR_MORE = 4.0  # of the same, from where the unit is robust
_FINEST = 1e-3  # of a standard deviation, between neighbouring numbers
_FARTHEST = 0.4  # power of the largest number of a precision: of a larger one no square over β_t is finite


def units(d: Diffusion, x: np.ndarray, features: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The zero and the one of the chain's units in those of x (N, *event_shape), each (*event_shape).

    They are the mean and the standard deviation of each feature. A warning says where outlying values or a heavy tail
    make the standard deviation several times that of the bulk, which is that of the normal with the same quantiles of
    5 and 95 %; from four times on the median and the geometric mean of the two standard deviations take their place.
    What is discrete stays as it is. Raises `ValueError` for a feature that does not vary.
    """
    if d.family.support.is_discrete:
        return np.zeros(d.event_shape), np.ones(d.event_shape)
    check_varies(x, "x", features)
    flat = x.reshape(len(x), -1)
    loc, std = flat.mean(0), flat.std(0)
    low, median, high = np.quantile(flat, [0.05, 0.5, 0.95], axis=0)
    bulk = (high - low) / (2 * 1.645)
    extreme = np.abs(flat - median).max(0)
    outlying = (bulk > 0) & (std > _MOST_OF_BULK * bulk) & (extreme > _EXTREME * bulk)
    if outlying.any():
        names = np.array([str(i) for i in range(len(loc))] if features is None else list(features))
        i = np.flatnonzero(outlying)[np.argmax(std[outlying] / bulk[outlying])]
        share = np.mean(np.abs(flat[:, i] - median[i]) > 5 * bulk[i])
        warn(
            f"feature(s) {some(names[outlying])} have outlying values or heavy tails: in '{names[i]}', {share:.2g} of "
            f"the rows are far outside, and the standard deviation, {std[i]:.3g}, is {std[i] / bulk[i]:.3g} times that "
            "of the bulk of the rows, so that no unit of the chain serves both. Look at these rows, or fit a logarithm "
            "or an arcsinh of the feature"
        )
    robust = outlying & (std > _FAR_MORE * bulk)
    loc, scale = np.where(robust, median, loc), np.where(robust, np.sqrt(bulk * std), std)
    return loc.reshape(d.event_shape), scale.reshape(d.event_shape)


def to_chain(d: Diffusion, x: np.ndarray, loc: np.ndarray, scale: np.ndarray, name: str = "x") -> np.ndarray:
    """x (…, *event_shape) in the chain's own units, (x − loc)/scale.

    Raises `ValueError` for entries so far out that their densities cannot be computed in this precision.
    """
    z, precision = (x - loc) / scale, state_dtype(d.family)
    farthest = np.inf if d.family.support.is_discrete else float(jnp.finfo(precision).max) ** _FARTHEST
    if np.any(np.abs(z) > farthest):
        rows = np.unique(np.nonzero(np.abs(z) > farthest)[0])
        raise ValueError(
            f"{name} has entries in row(s) {some(rows)} more than {farthest:.0e} standard deviations from the mean of "
            f"what was fitted, where no density can be computed in {jnp.dtype(precision).name}"
        )
    return z.astype(precision)


def warn_of_precision(loc: np.ndarray, scale: np.ndarray, features: Sequence[str] | None = None) -> None:
    """Warns where neighbouring numbers of JAX's precision are far apart at `loc`, as against `scale`."""
    loc, scale, precision = loc.ravel(), scale.ravel(), jnp.result_type(float)
    spacing = np.spacing(np.abs(loc).astype(precision)).astype(np.float64)
    coarse = np.flatnonzero(spacing > _FINEST * scale)
    if coarse.size:
        names = np.array([str(i) for i in range(len(loc))] if features is None else list(features))
        i = coarse[np.argmax(spacing[coarse] / scale[coarse])]
        warn(
            f"feature(s) {some(names[coarse])} lie far from zero for {precision}: '{names[i]}' has mean "
            f"{loc[i]:.6g} and standard deviation {scale[i]:.3g}, and neighbouring numbers there are {spacing[i]:.2g} "
            "apart, in what fit.prior() returns and in what a function that is given as a likelihood gets. Subtract an "
            'origin, or jax.config.update("jax_enable_x64", True)'
        )
