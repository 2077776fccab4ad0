"""The parts of the at-time pair: one t per datum, and the gradient of K through draws that carry none."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff.families.base import expected_log_ratio
from probdiff.types import Event, Time


def draw_times(T: int, batch_shape: tuple[int, ...], time_probs: Float[Array, " T"] | None) -> tuple[Time, Any]:
    """One t per datum, evenly spread over a batch, and 1/π_t, which scales its term: sites u and t."""
    if time_probs is not None and jnp.shape(time_probs) != (T,):
        raise ValueError(f"time_probs has shape {jnp.shape(time_probs)}; this diffusion has {T} time steps")
    u = numpyro.sample("u", dist.Uniform(0.0, 1.0))
    B = math.prod(batch_shape)
    if time_probs is None:
        t = jnp.floor(T * ((jnp.arange(B) / B + u) % 1.0)).astype(int)
    else:
        # the number of t whose cumulative probability is at most the quantile (i/B + u) mod 1, for sorted quantiles
        # first; `searchsorted`, unrolled, is slow to compile for long chains
        first, shift = jnp.floor(B * u).astype(int), (B * u) % 1.0
        starts = jnp.clip(jnp.ceil(B * jnp.cumsum(jnp.asarray(time_probs)) - shift), 0, B).astype(int)
        t = jnp.cumsum(jnp.zeros(B + 1, int).at[starts].add(1))[(jnp.arange(B) + first) % B]
    t = numpyro.deterministic("t", jnp.minimum(1 + t, T).reshape(batch_shape))
    return t, T if time_probs is None else 1 / jnp.asarray(time_probs)[t - 1]


def score_term(
    t: Time,
    x_0: Event,
    x_t: Event,
    x_prev: Event | None,
    q_of_x_0: dist.Distribution,
    q_of_x_t: dist.Distribution,
    p_of_x_t: dist.Distribution,
) -> Array:
    """Zero, whose gradient is (L_t − b)·∇log q of what was drawn: the score-function term of the gradient of K.

    L_t is the term of K at t. The baseline b of a datum is the term of the next one, whose t is nearly the same.
    """
    term, log_q = p_of_x_t.log_prob(x_0), q_of_x_0.log_prob(x_t)
    if x_prev is not None:
        ratio, log_q_prev = expected_log_ratio(q_of_x_t, p_of_x_t, lambda: x_prev)
        term, log_q = jnp.where(t == 1, term, ratio), log_q + jnp.where(t == 1, 0.0, log_q_prev)
    baseline = jnp.roll(term, -1) if jnp.size(term) > 1 else 0.0
    return jax.lax.stop_gradient(term - baseline) * (log_q - jax.lax.stop_gradient(log_q))
