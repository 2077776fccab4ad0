"""Monotone transforms of one column towards a standard normal, chosen on rows that are held out."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtri

from probdiff.checks import some

type Base = Literal["identity", "log", "arcsinh", "logit"]

_KNOTS = (0, 5, 10, 20, 40)
_FOLDS = 5
_LEAST_OF_TAIL = 10  # rows beyond the outermost knots
_LEAST_ROWS = 8  # to each knot
_CLOSE = 1e-9  # of the range, between two knots
_ENOUGH = 20_000  # rows that are enough to choose by


@dataclass(frozen=True)
class Monotone:
    """e(x) = s(b(x)): b is the `base`, and s a rational quadratic spline with knots at `at` and values `scores`.

    b(x) is x, log(x − low), −log(high − x), arcsinh((x − shift)/width) or log(x − low) − log(high − x). Its
    `parameters` are: none; low and 1; high and −1; shift and width; low and high. Beyond its outermost knots s is a
    straight line; with two knots it is one throughout. `slopes` are those of s at its knots.
    Source of the spline: Gregory and Delbourgo 1982.
    """

    base: Base
    parameters: tuple[float, ...]
    at: tuple[float, ...]
    scores: tuple[float, ...]
    slopes: tuple[float, ...]

    def __call__(self, x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """e(x)."""
        return self._spline(_based(self.base, self.parameters, x)[0])[0]

    def log_slope(self, x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """log de/dx."""
        y, log_slope = _based(self.base, self.parameters, x)
        return log_slope + np.log(self._spline(y)[1])

    def inverse(self, e: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """x, of which this is e."""
        at, scores, d = (np.array(held) for held in (self.at, self.scores, self.slopes))
        inside = np.clip(e, scores[0], scores[-1])
        k, width, height = _between(scores, inside, at, scores)
        s, rise = height / width, inside - scores[k]
        bend = rise * (d[k + 1] + d[k] - 2 * s)
        a, b, c = height * (s - d[k]) + bend, height * d[k] - bend, -s * rise
        xi = 2 * c / (-b - np.sqrt(np.maximum(b**2 - 4 * a * c, 0.0)))
        y = at[k] + width * xi
        y = y + np.minimum(e - scores[0], 0.0) / d[0] + np.maximum(e - scores[-1], 0.0) / d[-1]
        return _unbased(self.base, self.parameters, y)

    def _spline(self, y: Float[np.ndarray, " N"]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """s(y) and its slope."""
        at, scores, d = (np.array(held) for held in (self.at, self.scores, self.slopes))
        inside = np.clip(y, at[0], at[-1])
        k, width, height = _between(at, inside, at, scores)
        s, xi = height / width, (inside - at[k]) / width
        both = xi * (1 - xi)
        below = s + (d[k + 1] + d[k] - 2 * s) * both
        value = scores[k] + height * (s * xi**2 + d[k] * both) / below
        slope = s**2 * (d[k + 1] * xi**2 + 2 * s * both + d[k] * (1 - xi) ** 2) / below**2
        value = value + d[0] * np.minimum(y - at[0], 0.0) + d[-1] * np.maximum(y - at[-1], 0.0)
        return value, slope


def standardised(
    x: Float[np.ndarray, " N"], base: Base = "identity", parameters: tuple[float, ...] = (), num_knots: int = 0
) -> Monotone:
    """The transform of that base which gives x a mean of 0 and a standard deviation of 1, or with knots normal scores.

    Knots lie at quantiles of x, in the tails down to those beyond which ten rows lie. Raises `ValueError` where x does
    not vary.
    """
    y = _based(base, parameters, x)[0]
    mean, std = float(y.mean()), float(y.std())
    if not std > 0 or not math.isfinite(std):
        raise ValueError("x has the same value in every row, or values that are too large or too small")
    line = Monotone(base, parameters, (mean - std, mean + std), (-1.0, 1.0), (1 / std, 1 / std))
    if not num_knots:
        return line
    levels = (np.arange(num_knots) + 0.5) / num_knots
    num_thirds = max(0, int(math.log(len(y) * levels[0] / _LEAST_OF_TAIL) / math.log(3)))
    tail = levels[0] / 3.0 ** np.arange(1, num_thirds + 1)
    levels = np.sort(np.concatenate([levels, tail, 1 - tail]))
    at, scores = np.quantile(y, levels), ndtri(levels)
    apart = np.concatenate([[True], np.diff(at) > _CLOSE * np.ptp(y)])
    group = np.cumsum(apart) - 1  # a value that is often there has the mean of its scores
    at, scores = at[apart], np.bincount(group, scores) / np.bincount(group)
    if len(at) < 2:
        return line
    slopes = PchipInterpolator(at, scores).derivative()(at)
    secants = np.diff(scores) / np.diff(at)
    slopes[0], slopes[-1] = secants[0], secants[-1]
    return Monotone(base, parameters, *(tuple(held.tolist()) for held in (at, scores, slopes)))


def choose(x: Float[np.ndarray, " N"], low: float = -math.inf, high: float = math.inf) -> Monotone:
    """The transform of values in (low, high) under which rows that are held out are most likely to be normal.

    Its base is the identity, an arcsinh or a logarithm, of an interval the logit, and its knots are 0 to 40: the
    simplest that is within one standard error of the best of the paired differences, in five folds. A base that does
    not keep draws in (low, high) is none of the candidates. log p(x) is then log N(e(x); 0, 1) + `log_slope`(x), or of
    a fit to several such columns what it says of their e, plus the sum of their log slopes.
    It is for measurements: of levels, each in many rows, no density has a bound.
    Raises `ValueError` where x is no column of finite numbers in (low, high), or does not vary.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(f"x has shape {x.shape} or entries that are not finite; a column (N,) of numbers is wanted")
    if outside := np.flatnonzero((x <= low) | (x >= high)).tolist():
        raise ValueError(f"x has values outside of ({low}, {high}), in row(s) {some(outside)}")
    every = max(1, len(x) // _ENOUGH)
    order = np.random.default_rng(0).permutation(len(x))[::every]
    held = x[order]
    fold = np.arange(len(held)) % _FOLDS
    found = []
    for (base, parameters), num_knots in product(_bases(x, low, high), _KNOTS):
        if num_knots * _LEAST_ROWS > len(held):
            continue
        log_p = np.empty(len(held))
        try:
            for i in range(_FOLDS):
                one = standardised(held[fold != i], base, parameters, num_knots)
                rest = held[fold == i]
                log_p[fold == i] = -0.5 * one(rest) ** 2 + one.log_slope(rest)
        except ValueError:
            continue
        if np.isfinite(log_p).all():
            found.append((log_p, base, parameters, num_knots))
    if not found:
        base, parameters = _bases(x, low, high)[0]
        return standardised(x, base, parameters)
    best = max(found, key=lambda one: one[0].mean())[0]

    def is_near(log_p: np.ndarray) -> bool:
        loss = best - log_p
        return bool(loss.mean() <= loss.std() / math.sqrt(len(loss)))

    # the fewest knots come first, and of bases the plainest
    near = (one for one in sorted(found, key=lambda one: one[3]) if is_near(one[0]))
    _, base, parameters, num_knots = next(near)
    return standardised(x, base, parameters, num_knots)


def _between(knots: np.ndarray, values: np.ndarray, *of_knots: np.ndarray) -> tuple[np.ndarray, ...]:
    """The knot at or below each value, and how far each of `of_knots` rises from there to the next."""
    k: np.ndarray = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, len(knots) - 2)
    return k, *(np.diff(held)[k] for held in of_knots)


def _bases(x: Float[np.ndarray, " N"], low: float, high: float) -> list[tuple[Base, tuple[float, ...]]]:
    """The bases whose inverse ends in (low, high), the plainest first, with their parameters."""
    if math.isfinite(low) and math.isfinite(high):
        return [("logit", (low, high))]
    if math.isfinite(low):
        return [("log", (low, 1.0))]
    if math.isfinite(high):
        return [("log", (high, -1.0))]
    quarter, middle, three = np.quantile(x, [0.25, 0.5, 0.75])
    width = (three - quarter) / 1.349 or float(x.std())
    return [("identity", ()), ("arcsinh", (float(middle), float(width)))]


def _based(base: Base, parameters: tuple[float, ...], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """b(x) and log db/dx."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if base == "log":
            end, sign = parameters
            y = sign * np.log(sign * (x - end))
            return y, -sign * y
        if base == "logit":
            low, high = parameters
            below, above = np.log(x - low), np.log(high - x)
            return below - above, math.log(high - low) - below - above
        if base == "arcsinh":
            z = (x - parameters[0]) / parameters[1]
            return np.arcsinh(z), -math.log(parameters[1]) - 0.5 * np.log1p(z**2)
        return x, np.zeros_like(x)


def _unbased(base: Base, parameters: tuple[float, ...], y: np.ndarray) -> np.ndarray:
    """x, of which y is b(x)."""
    with np.errstate(over="ignore"):
        if base == "log":  # rounding must not end at the end itself
            end, sign = parameters
            x = end + sign * np.exp(sign * y)
            return np.maximum(x, np.nextafter(end, np.inf)) if sign > 0 else np.minimum(x, np.nextafter(end, -np.inf))
        if base == "logit":
            low, high = parameters
            x = low + (high - low) / (1 + np.exp(-y))
            return np.clip(x, np.nextafter(low, high), np.nextafter(high, low))
        if base == "arcsinh":
            return parameters[0] + parameters[1] * np.sinh(y)
        return y
