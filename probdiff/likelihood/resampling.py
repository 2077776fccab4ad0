"""Systematic resampling of the particles of a filter, where too few of them are effective."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from probdiff.types import Key

LEAST_SIZE = 0.5  # effective particles over particles below which they are resampled


class Resampled(NamedTuple):
    """Which particles go on, their log weights, and the ESS over S before.

    `log_mean_weight` is log of the mean weight where particles were resampled, and zero where they were not: it is the
    factor of log p̂ that the new weights have lost.
    """

    parents: Int[Array, " S"]
    log_w: Float[Array, " S"]
    log_mean_weight: Float[Array, ""]
    ess: Float[Array, ""]


def resample(rng_key: Key, log_w: Float[Array, " S"], allowed: bool | Bool[Array, ""] = True) -> Resampled:
    """Resamples S particles where fewer than `LEAST_SIZE`·S are effective, and leaves them alone elsewhere."""
    S = len(log_w)
    shares, ess = normalised(log_w)
    few = allowed & (ess < LEAST_SIZE)
    parents = jnp.where(few, systematic(rng_key, shares), jnp.arange(S))
    log_mean_weight = jnp.where(few, jax.nn.logsumexp(log_w) - jnp.log(S), 0.0)
    return Resampled(parents, jnp.where(few, 0.0, log_w), log_mean_weight, ess)


def normalised(log_w: Float[Array, " S"]) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """Weights of sum one, even ones where none is positive, and the share of particles that are effective."""
    alive = jnp.isfinite(log_w.max())
    shares = jax.nn.softmax(jnp.where(alive, log_w, 0.0))
    return shares, jnp.where(alive, 1 / jnp.sum(shares**2) / len(log_w), 0.0)


def systematic(rng_key: Key, shares: Float[Array, " S"]) -> Int[Array, " S"]:
    """Indices of S particles, each as often as its share says, up to one."""
    from blackjax.smc.resampling import systematic as draw  # slow to import, and only this wants it

    return draw(rng_key, shares, len(shares))
