"""Ancestral draws of the reverse chain, and draws of the forward chain."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer import Predictive

from probdiff.blocks import block_size
from probdiff.chains import Diffusion
from probdiff.locks import one_at_a_time
from probdiff.progress import of_long_work
from probdiff.schedules import NoiseLevels
from probdiff.types import Data, Key, Params

_ROWS = 2048  # paths to one compiled call


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 3, 4))
def _reverse_block(d: Diffusion, params: Params, rng_key: Key, n: int, times: tuple[int, ...]) -> Array:
    draws = Predictive(d.reverse, params=params, num_samples=n, parallel=True)(rng_key, stacked=True)
    if times == (0,):  # and no path is kept
        return draws["x_0"][:, None]
    path = jnp.concatenate([draws["x"], draws["x_0"][:, None]], axis=1)  # t = T…0
    return path[:, jnp.asarray([d.num_timesteps - t for t in times])]


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 4))
def _forward_block(d: Diffusion, params: Params, x_0: Data, rng_key: Key, times: tuple[int, ...]) -> Array:
    program = handlers.substitute(handlers.seed(d.forward, rng_key), data=params)
    path = handlers.trace(program).get_trace(x_0, stacked=True)["x"]["value"]  # t = 1…T
    return jnp.moveaxis(jnp.concatenate([x_0[None], path])[jnp.asarray(times)], 0, 1)


def reverse_draws(d: Diffusion, params: Params, rng_key: Key, n: int, times: Sequence[int]) -> np.ndarray:
    """n paths drawn from p (N13) by ancestral sampling, at `times`; (n, len(times), *event_shape), chain units."""
    most = 2**17 if tuple(times) == (0,) and jax.default_backend() != "cpu" else _ROWS  # to keep a GPU busy
    rows = block_size(n, most)
    keys = jax.random.split(rng_key, -(-n // rows))
    return np.concatenate(
        [_reverse_block(d, params, key, rows, tuple(times)) for key in of_long_work(keys, unit="block", desc="sample")]
    )[:n]


def forward_draws(d: Diffusion, params: Params, x_0: Data, rng_key: Key, times: Sequence[int]) -> np.ndarray:
    """One path drawn from q (N5) for each row of x_0, at `times`; (N, len(times), *event_shape), chain units."""
    return np.asarray(_forward_block(d, params, jnp.asarray(x_0), rng_key, tuple(times)))


def one_fit(stacked_params: Params, c: int) -> Params:
    """The params of one of several fits, in the precision that JAX has now."""
    return in_precision(jax.tree.map(lambda leaf: leaf[c], stacked_params))


def in_precision(params: Params) -> Params:
    """The params in the precision that JAX has now, whichever they were fitted in."""
    wanted = jnp.result_type(float)

    def cast(leaf: Array) -> Array:
        if leaf.dtype in (np.float32, np.float64) and leaf.dtype != wanted:
            return jnp.asarray(np.asarray(leaf), wanted)
        return leaf

    return jax.tree.map(cast, params)


@one_at_a_time
def noise_levels(d: Diffusion, stacked_params: Params, num_fits: int) -> NoiseLevels:
    """The noise levels of several fits, each leaf with a leading axis of them."""
    levels = [handlers.substitute(d.schedule, data=one_fit(stacked_params, c))() for c in range(num_fits)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *levels)
