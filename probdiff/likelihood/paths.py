"""p(x_0) from whole weighted paths: multi-sample lower and upper bounds."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer.elbo import get_importance_log_probs
from scipy.special import logsumexp

from probdiff.blocks import block_size, in_blocks
from probdiff.chains import Diffusion
from probdiff.likelihood.result import LogLikelihood, log_mean
from probdiff.locks import one_at_a_time
from probdiff.psis import k_of_draws
from probdiff.types import Data, Event, Key, Params

_ROWS = 256  # triangular solves over more rows at once are many times slower on a CPU


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def _log_weights(d: Diffusion, params: Params, x_0: Data, rng_keys: Key) -> Float[Array, "S N"]:
    def one(rng_key: Key) -> Float[Array, " N"]:
        key_p, key_q = jax.random.split(rng_key)
        model = handlers.seed(partial(d.reverse, stacked=True), key_p)
        guide = handlers.seed(partial(d.forward_posterior, stacked=True), key_q)
        log_p, log_q = get_importance_log_probs(model, guide, (x_0,), {}, params)
        return _sum_over_sites(log_p) - _sum_over_sites(log_q)

    # few rows alone would be all overhead
    return jax.lax.map(one, rng_keys, batch_size=max(1, _ROWS // len(x_0)))


def _sum_over_sites(log_probs: dict[str, Array]) -> Any:
    """The log density of whole paths, (N,), from those of their sites, some of which have an axis of time."""
    return sum(log_prob if log_prob.ndim == 1 else log_prob.sum(0) for log_prob in log_probs.values())


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def _log_weights_of_paths(d: Diffusion, params: Params, paths: Float[Array, "N T+1 *event"]) -> Float[Array, " N"]:
    """log p(x_0…x_T) − log q(x_1…x_T given x_0) of given paths, as N13 and N5 have it."""
    noise, kernel = handlers.substitute(d.kernels, data=params)()
    x = jnp.moveaxis(paths, 1, 0)

    def term(args: tuple[Event, Event, Array]) -> Float[Array, " N"]:
        x_prev, x_t, t = args
        return kernel(x_t, t).log_prob(x_prev) - d.family.step(x_prev, noise, t).log_prob(x_t)

    terms = jax.lax.map(term, (x[:-1], x[1:], jnp.arange(1, d.num_timesteps + 1)))
    return d.family.terminal(x.shape[1:2]).log_prob(x[-1]) + terms.sum(0)


def log_weight_blocks(
    d: Diffusion, params: Params, x_0: Data, rng_key: Key, num_draws: int
) -> Iterator[Float[np.ndarray, "S n"]]:
    """The log weights of `num_draws` paths from q for each datum, N14, one block of rows after the other."""

    def draw(x_0: Data, rng_key: Key) -> np.ndarray:
        return np.asarray(_log_weights(d, params, x_0, jax.random.split(rng_key, num_draws)))

    for n, log_w in in_blocks(x_0, rng_key, draw, block_size(len(x_0), _ROWS)):
        yield log_w[:, :n].astype(np.float64)


def log_importance_weights(
    d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> Float[np.ndarray, "S N"]:
    """log w = log p(x_0…x_T) − log q(x_1…x_T given x_0) for `num_draws` paths per datum, N14; shape (S, N), nats."""
    return np.concatenate(list(log_weight_blocks(d, params, x_0, rng_key, num_draws)), axis=1)


def iwae(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_particles: int) -> LogLikelihood:
    """The multi-sample bound E log (1/S) Σ_s w_s ≤ log p(x_0), w of N14 from S whole paths (Burda et al. 2016).

    It rises to log p(x_0) with S, from the ELBO at S = 1; here S is at least 2.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    blocks = [
        (*log_mean(log_w), k_of_draws(log_w)) for log_w in log_weight_blocks(d, params, x_0, rng_key, num_particles)
    ]
    values, mcse, k = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LogLikelihood(values, mcse, "lower bound", k)


def upper(
    d: Diffusion,
    params: Params,
    paths: Float[np.ndarray, "N T+1 *event"],
    *,
    rng_key: Key,
    num_particles: int,
) -> LogLikelihood:
    """The upper bound log p(x_0) ≤ E log (1/S) Σ_s w_s in which the first path is drawn from p(x_1…x_T given x_0).

    The other S − 1 are drawn from q (bidirectional Monte Carlo: Grosse, Ghahramani and Adams 2015).
    `paths` (N, T+1, *event_shape), x_0 first, must be ancestral draws from p: then x_1…x_T is an exact posterior draw
    given its x_0. For other x_0 no such draw is known, and there is no bound. S is at least 3. The stated error of the
    first weight is extrapolated from the others, and not to be relied on where their k̂ is high.
    Chain's own units; nats.
    """
    blocks, S = [], num_particles
    rows = block_size(len(paths), _ROWS)
    of_p = in_blocks(paths, rng_key, lambda x, _: np.asarray(_log_weights_of_paths(d, params, x)), rows)
    of_q = log_weight_blocks(d, params, paths[:, 0], rng_key, S - 1)
    for (n, first), others in zip(of_p, of_q, strict=True):
        log_w = np.concatenate([first[None, :n], others])
        values = logsumexp(log_w, axis=0) - np.log(S)
        w = np.exp(log_w - values)
        posterior = w / w.sum(0)
        # of the first weight; equal weights leave rounding of either sign
        spread = np.maximum(np.sum(posterior * w**2, 0) - np.sum(posterior * w, 0) ** 2, 0.0)
        blocks.append((values, np.sqrt(spread + (S - 1) * w[1:].var(0, ddof=1)) / S, k_of_draws(others)))
    values, mcse, k = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LogLikelihood(values, mcse, "upper bound", k)
