"""The distributions of a family, each compiled on its own.

A program that runs without `jit`, as in a notebook or the ledger, then compiles one kernel of each kind and not T.
"""

from functools import partial

import jax
import numpyro.distributions as dist

from probdiff.families.base import Family
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Time


@partial(jax.jit, static_argnums=0)
def step(q: Family, x_prev: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
    """q(x_t given x_{t−1})."""
    return q.step(x_prev, noise, t)


@partial(jax.jit, static_argnums=0)
def marginal(q: Family, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
    """q(x_t given x_0)."""
    return q.marginal(x_0, noise, t)


@partial(jax.jit, static_argnums=0)
def posterior(q: Family, x_t: Event, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
    """q(x_{t−1} given x_t, x_0)."""
    return q.posterior(x_t, x_0, noise, t)


@partial(jax.jit, static_argnums=(0, 1))
def terminal(p: Family, batch_shape: tuple[int, ...]) -> dist.Distribution:
    """p(x_T)."""
    return p.terminal(batch_shape)
