"""The chain's own units, and those of the data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.chains import Diffusion
from probdiff.checks import check_varies, labels, some, warn
from probdiff.families.base import state_dtype

_MOST_OF_BULK = 2.5  # times the bulk's standard deviation: a feature whose own is larger may be warned of
_EXTREME = 75.0  # of the bulk's standard deviations: it is warned of if a value is further out
ROBUST = 4.0  # times the bulk's standard deviation: beyond, the unit of a feature that is warned of is robust
_MOST_ROTATED = 128  # features
_LEAST_VARIANCE = 1e-6  # of features with unit variance
_FARTHEST = 8.0  # of the chain's units, in a covariance
_COUNTED, _REPEATED = 5_000, 5  # rows whose distinct values are counted, and how often each is there in levels
_FINEST = 1e-3  # of the chain's unit, between neighbouring numbers of the data
_MARGIN = 0.4  # z of more than the largest number of a precision to this power is refused: z²/β_t must be finite


class Units(NamedTuple):
    """x = loc + scale·(A·z), z in the chain's own units; A (D, D) is `axes`, of features that are a vector, or none.

    loc and scale are (*event_shape). The columns of A are the axes of the chain: directions that may differ in length.
    """

    loc: np.ndarray
    scale: np.ndarray
    axes: np.ndarray | None = None

    def to_data(self, z: Any) -> Any:
        """z (…, *event_shape) in the data's own units."""
        return self.loc + self.scale * self.to_features(z)

    def to_features(self, z: Any) -> Any:
        """A·z."""
        return z if self.axes is None else z @ self.axes.T

    def to_chain(self, x: Any) -> Any:
        """x (…, *event_shape) in the chain's own units."""
        z = (x - self.loc) / self.scale
        return z if self.axes is None else z @ np.linalg.inv(self.axes).T

    @property
    def flat(self) -> "Units":
        """The same of features that are flattened."""
        return self._replace(loc=self.loc.ravel(), scale=self.scale.ravel())

    @property
    def log_det(self) -> float:
        """Of a density in the chain's units over that in the data's, nats."""
        of_axes = 0.0 if self.axes is None else np.linalg.slogdet(self.axes)[1]
        return float(np.log(self.scale).sum() + of_axes)


def chain_units(
    d: Diffusion, x: np.ndarray, features: Sequence[str] | None = None, robust: float = ROBUST
) -> tuple[np.ndarray, np.ndarray]:
    """The zero and the one of the chain's units in those of x (N, *event_shape), each (*event_shape).

    They are the mean and the standard deviation of each feature. A warning says where outlying values or a heavy tail
    make the standard deviation several times that of the bulk, which is that of the normal with the same quantiles of
    5 and 95 %. Where it is more than `robust` times that, and the schedule is learned, so that it can adapt to values
    far out, the units are the median and the geometric mean of the two standard deviations. What is discrete stays as
    it is. Raises `ValueError` for a feature that does not vary.
    """
    if d.family.support.is_discrete:
        return np.zeros(d.event_shape), np.ones(d.event_shape)
    check_varies(x, "x", features)
    outlying, bulk = warn_of_outliers(x, features)
    loc, std = x.mean(0), x.std(0)
    median = np.where(outlying, np.median(x, axis=0), loc)
    warn_of_precision(median, np.where(outlying, bulk, std), features)
    learned = set(jax.eval_shape(d.initial_params, jax.random.key(0))) > {"network$params"}
    far = outlying & (std > robust * bulk) & learned
    return np.where(far, median, loc), np.where(far, np.sqrt(bulk * std), std)


def warn_of_levels(x: np.ndarray, features: Sequence[str] | None = None) -> None:
    """Warns of features of x (N, *event_shape) whose values are each there five times or more, on average."""
    some_rows = x[:_COUNTED].reshape(min(len(x), _COUNTED), -1)
    distinct = np.array([len(np.unique(column)) for column in some_rows.T])
    levels = distinct * _REPEATED <= len(some_rows)
    if levels.any():
        names, i = labels(features, x[0].size), int(np.argmin(distinct))
        warn(
            f"feature(s) {some(names[levels])} look like levels and not like measurements: '{names[i]}' has "
            f"{distinct[i]} distinct values in {len(some_rows):,} rows. Their density has no bound, so a fit can grow "
            "for ever on them, and log densities of two fits cannot be compared. Add noise as wide as the distance of "
            "two levels, leave them out, or dequantise integers"
        )


def warn_of_outliers(x: np.ndarray, features: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Warns of features of x (N, *event_shape) with values far out; which they are, and all their bulk's deviations."""
    low, median, high = np.quantile(x, [0.05, 0.5, 0.95], axis=0)
    std, bulk = x.std(0), (high - low) / (2 * 1.645)
    outlying = (bulk > 0) & (std > _MOST_OF_BULK * bulk) & (np.abs(x - median).max(0) > _EXTREME * bulk)
    if outlying.any():
        names, ratio = labels(features, std.size), np.where(outlying, std / np.where(bulk > 0, bulk, 1), 0).ravel()
        i = int(np.argmax(ratio))
        share = np.mean(np.abs(x - median).reshape(len(x), -1)[:, i] > 5 * bulk.flat[i])
        warn(
            f"feature(s) {some(names[outlying.ravel()])} have outlying values or heavy tails: in '{names[i]}', "
            f"{share:.2g} of the rows are far outside, and the standard deviation, {std.flat[i]:.3g}, is "
            f"{ratio[i]:.3g} times that of the bulk of the rows, so that no unit of the chain serves both. Look at "
            "these rows, or fit a logarithm or an arcsinh of the feature"
        )
    return outlying, bulk


def principal_axes(z: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The axes R (D, D) on which z (N, *event_shape) is uncorrelated, and its variances there.

    Both are of the covariance that Ledoit and Wolf shrink, of z that are cut at 8, or where units are robust at 8
    standard deviations of the bulk, lest a few values far out make a Gaussian that is none of the others'. Of one
    feature, of more than 128 and of arrays that are no vectors there is no R, and the variances are those of the
    features.
    """
    low, high = np.quantile(z, [0.05, 0.95], axis=0)
    robust = z.std(0) > 0.75 * math.sqrt(ROBUST)  # it is 1, or more than √ROBUST in units that are robust
    farthest = _FARTHEST * np.where(robust & (high > low), (high - low) / (2 * 1.645), 1.0)
    z = np.clip(z, -farthest, farthest)
    if z.ndim != 2 or not 1 < z.shape[1] <= _MOST_ROTATED:
        return None, np.maximum(z.var(0), _LEAST_VARIANCE)
    from sklearn.covariance import LedoitWolf

    variance, rotation = np.linalg.eigh(LedoitWolf().fit(z).covariance_)
    return rotation, np.maximum(variance, _LEAST_VARIANCE)


def to_chain(d: Diffusion, x: np.ndarray, units: Units, name: str = "x") -> np.ndarray:
    """x (N, …, *event_shape) in the chain's own units, A⁻¹·(x − loc)/scale; NaN where x is.

    Raises `ValueError` for entries so far out that their densities cannot be computed in this precision.
    """
    z, precision = units.to_chain(x), state_dtype(d.family)
    if not d.family.support.is_discrete:
        farthest = float(jnp.finfo(precision).max) ** _MARGIN
        if np.any(np.abs(z) > farthest):
            rows = np.unique(np.nonzero(np.abs(z) > farthest)[0])
            raise ValueError(
                f"{name} has entries in row(s) {some(rows)} that lie more than {farthest:.2g} of the chain's units "
                f"from its zero, where no density can be computed in {jnp.dtype(precision).name}"
            )
    return z.astype(precision)


def warn_of_precision(loc: np.ndarray, scale: np.ndarray, features: Sequence[str] | None = None) -> None:
    """Warns where neighbouring numbers of JAX's precision are more than a thousandth of `scale` apart at `loc`."""
    loc, scale, precision = loc.ravel(), scale.ravel(), jnp.result_type(float)
    spacing = np.spacing(np.abs(loc).astype(precision)).astype(np.float64)
    coarse = np.flatnonzero(spacing > _FINEST * scale)
    if coarse.size:
        names, i = labels(features, len(loc)), coarse[np.argmax(spacing[coarse] / scale[coarse])]
        or_double = ', or jax.config.update("jax_enable_x64", True)' if precision == np.float32 else ""
        warn(
            f"feature(s) {some(names[coarse])} lie far from zero for {precision}: '{names[i]}' is near {loc[i]:.6g} "
            f"and varies by {scale[i]:.3g}, and neighbouring numbers there are {spacing[i]:.2g} apart, in what "
            "fit.prior() returns and in what a function that is given as a likelihood gets. Subtract an "
            f"origin{or_double}"
        )
