"""Units in which draws have the moments of the rows: a network that saw few rows takes too much for known."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from probdiff.results import Fit
from probdiff.types import Key
from probdiff.units import Units

type Kind = Literal["features", "axes"]

_DRAWS = 20_000
_ERRORS = 2.0  # standard errors by which held-out rows must be less likely to speak against it


def kinds(units: Units) -> tuple[Kind, ...]:
    """What can be matched, in the order of preference."""
    return ("features",) if units.axes is None else ("features", "axes")


def stretched(units: Units, rows: np.ndarray, draws: np.ndarray, kind: Kind) -> Units:
    """Units in which `draws`, made in `units`, of each feature or on each axis, have the mean and sd of the `rows`."""
    if kind == "axes":
        rows, draws = units.to_chain(rows), units.to_chain(draws)
    scale = rows.std(0) / draws.std(0)
    loc = rows.mean(0) - scale * draws.mean(0)
    if kind == "features":
        return units._replace(loc=loc + scale * units.loc, scale=scale * units.scale)
    assert units.axes is not None
    return units._replace(loc=units.loc + units.scale * (units.axes @ loc), axes=units.axes * scale)


def no_worse(loss: np.ndarray) -> bool:
    """Whether rows that are held out lose no more than two standard errors of their `loss`, nats."""
    return bool(loss.mean() <= _ERRORS * loss.std(ddof=1) / math.sqrt(loss.size))


def match(fit: Fit, rows: np.ndarray, kind: Kind, rng_key: Key) -> Fit:
    """The fit in units that are `stretched` for the rows, in the data's units."""
    draws = replace(fit, whole=None).sample(rng_key, _DRAWS).reshape(-1, *fit.loc.shape)
    return replace(fit, **stretched(fit.units, rows, draws, kind)._asdict())


def match_unless_worse(fit: Fit, rows: np.ndarray, held_out: np.ndarray, rng_key: Key) -> Fit:
    """The fit matched by features, or by axes, or as it is: the first that rows held out do not speak against."""
    K = fit.log_likelihood(held_out, rng_key=rng_key, num_draws=2).values
    for kind in kinds(fit.units):
        matched = match(fit, rows, kind, rng_key)
        if no_worse(K - matched.log_likelihood(held_out, rng_key=rng_key, num_draws=2).values):
            return matched
    return fit
