"""Units in which draws have the moments of the rows: a network that saw few rows takes too much for known."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from probdiff.fitting import devices
from probdiff.results import Fit
from probdiff.types import Key
from probdiff.units import Units

type Along = Literal["features", "axes"]

_DRAWS = 20_000
_ERRORS, _LOSS = 2.0, 0.25  # standard errors, and nats, by which rows held out must be less likely to speak against it
_LEAST = 1e-6  # of the standard deviation of draws: rows that vary less do not stretch them


def choices(units: Units) -> tuple[Along, ...]:
    """Along what units can be stretched, in the order of preference."""
    return ("features",) if units.axes is None else ("features", "axes")


def stretched(
    units: Units, rows: Float[np.ndarray, "N *event"], draws: Float[np.ndarray, "S *event"], along: Along
) -> Units:
    """Units in which `draws` of each feature, or on each axis, have the mean and the standard deviation of the `rows`.

    Both are in the data's units, and the draws were made in `units`. What hardly varies in the rows or in the draws is
    moved, and not stretched.
    """
    if along == "axes":
        rows, draws = units.to_chain(rows), units.to_chain(draws)
    wanted, std = rows.std(0), draws.std(0)
    varies = (wanted > _LEAST * std) & (std > _LEAST * wanted)
    scale = np.where(varies, wanted, 1.0) / np.where(varies, std, 1.0)
    loc = rows.mean(0) - scale * draws.mean(0)
    if along == "features":
        return units._replace(loc=loc + scale * units.loc, scale=scale * units.scale)
    assert units.axes is not None
    return units._replace(loc=units.loc + units.scale * (units.axes @ loc), axes=units.axes * scale)


def no_worse(loss: Float[np.ndarray, " M"]) -> bool:
    """Whether rows that were held out lose at most two standard errors of their mean `loss`, and 0.25 nats."""
    return bool(loss.mean() <= min(_ERRORS * loss.std(ddof=1) / math.sqrt(loss.size), _LOSS))


def match(fit: Fit, rows: Float[np.ndarray, "N *event"], along: Along, rng_key: Key) -> Fit:
    """The fit in units that are `stretched` for the rows, by 20,000 draws of each chain."""
    return replace(fit, **stretched(fit.units, rows, _draws(fit, rng_key), along)._asdict())


def match_unless_worse(
    fit: Fit,
    rows: Float[np.ndarray, "N *event"],
    held_out: Float[np.ndarray, "M *event"],
    rng_key: Key,
) -> Fit:
    """The fit matched along its features, or its axes, or as it is: the first that rows held out do not speak against.

    `rows` are those that were fitted.
    """
    draws = _draws(fit, rng_key)
    fits = [replace(fit, **stretched(fit.units, rows, draws, along)._asdict()) for along in choices(fit.units)]

    def K(one: Fit) -> np.ndarray:
        return np.atleast_2d(one.log_likelihood(held_out, rng_key=rng_key, num_draws=2).values).mean(0)

    def first(K_of_fit: np.ndarray) -> int:
        return next((i for i, one in enumerate(fits) if no_worse(K_of_fit - K(one))), -1)

    return [*fits, fit][devices.from_first_process(partial(first, K(fit)))]


def _draws(fit: Fit, rng_key: Key) -> Float[np.ndarray, "S *event"]:
    """Of all chains, as rows are that were dequantised."""
    return replace(fit, whole=None).sample(rng_key, _DRAWS).reshape(-1, *fit.loc.shape)
