"""Which times t a step of SVI draws."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers

from probdiff.chains import Diffusion
from probdiff.likelihood.elbo import elbo_term
from probdiff.types import Data, Key, Params

_TERMS, _RANGES = 8192, 64


def time_probs(d: Diffusion, params: Params, x: Data, num_rows: int, rng_key: Key) -> Float[Array, " T"]:
    """π_t ∝ √E[L_t²], a tenth of it uniform: the importance weights of Nichol and Dhariwal 2021, eq. 18.

    L_t is the term of the ELBO at t. Its mean square is taken over 8,192 draws of the `num_rows` rows of x, each at
    one t: for each t up to 64 of them, and for longer chains in at most 64 ranges of t, of one t at the start and wider
    later on.
    """
    T = d.num_timesteps
    edges = np.unique(np.geomspace(1, T + 1, 65).round()) if T > _RANGES else np.arange(1, T + 2)
    widths = np.diff(edges).astype(int)
    key_rows, key_t, key_x = jax.random.split(rng_key, 3)
    at = jnp.arange(_TERMS) % len(widths)
    t = jnp.asarray(edges)[at] + jnp.floor(jax.random.uniform(key_t, (_TERMS,)) * jnp.asarray(widths)[at])
    x_0 = x[jax.random.randint(key_rows, (_TERMS,), 0, num_rows)]
    terms = handlers.substitute(
        lambda: elbo_term(d, *d.kernels(), x_0, key_x, jnp.minimum(t.astype(int), T)), data=params
    )()
    largest = jnp.max(jnp.abs(terms))
    squares = jnp.zeros(len(widths)).at[at].add((terms / largest) ** 2) / jnp.bincount(at, length=len(widths))
    probs = jnp.sqrt(squares)[np.repeat(np.arange(len(widths)), widths)]
    known = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(known, 0.9 * probs / probs.sum(), 0.9 / T) + 0.1 / T
