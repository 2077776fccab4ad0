"""p(x_0) by twisted particle filters along the chain."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from scipy.special import logsumexp

from probdiff.blocks import block_size, in_blocks
from probdiff.chains import Diffusion
from probdiff.likelihood.paths import log_weight_blocks
from probdiff.likelihood.resampling import resample
from probdiff.likelihood.result import LogLikelihood, log_mean
from probdiff.likelihood.twists import FULL, Twist, fit_twists, tilted
from probdiff.locks import one_at_a_time
from probdiff.noncentred import Kernel
from probdiff.types import Data, Event, Key, Params, Time

_ROWS = 256  # triangular solves over more rows at once are many times slower on a CPU


def smc(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_particles: int, num_draws: int) -> LogLikelihood:
    """An estimate of p(x_0), unbiased, by `num_draws` particle filters of `num_particles` along the chain.

    A filter runs from x_T to x_1 with the targets p(x_t…x_T)·ψ_t(x_t) and the proposals p(x_{t−1} given x_t)·ψ_{t−1}.
    log ψ_t is a quadratic of x_t fitted, from t = 1 up, to log p(x_0 given x_1) and to
    log ∫ p(x_{t−1} given x_t)·ψ_{t−1}(x_{t−1}) dx_{t−1} at draws from q(x_t given x_0), so that ψ_t is nearly
    p(x_0 given x_t) (Guarniero, Johansen and Lee 2017; Heng et al. 2020): for linear-Gaussian chains up to the ridge of
    the fit. Beyond 16 features the quadratic has no products of two features.
    Particles are resampled, systematically, where their effective number falls below half. Where no quadratic is near
    p(x_0 given x_t), whole paths from q are the better particles: for each datum a first run of both
    finds the one of less spread, and a second run, independent of it, counts. Values are the log of the mean over
    filters, with the standard error from their spread; they are low by half its square, to first order.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    S, R, size = num_particles, num_draws, int(np.prod(d.event_shape))
    first = d.family.terminal()
    square = (size <= FULL and not d.family.support.is_discrete) or isinstance(first, dist.MultivariateNormal)
    numbers = R * S * size * (size if square else 1) * getattr(d, "components", 1)
    rows = block_size(len(x_0), max(1, min(_ROWS, 2**21 // numbers)))

    def twisted(x: Data, rng_key: Key) -> Float[np.ndarray, "R n"]:
        def run(x: Data, rng_key: Key) -> np.ndarray:
            return np.asarray(_filters(d, params, x, jax.random.split(rng_key, rows), S, R), np.float64)

        return np.concatenate([log_p[:n] for n, log_p in in_blocks(x, rng_key, run, rows)]).T

    def whole(x: Data, rng_key: Key) -> Float[np.ndarray, "R n"]:
        draws = (log_w.reshape(R, S, -1) for log_w in log_weight_blocks(d, params, x, rng_key, R * S))
        return np.concatenate([logsumexp(log_w, axis=1) - np.log(S) for log_w in draws], axis=1)

    keys = jax.random.split(rng_key, (2, 2))
    spread = [log_mean(run(x_0, key))[1] for run, key in zip((twisted, whole), keys[0], strict=True)]
    better = np.argmin(np.where(np.isnan(spread), np.inf, spread), axis=0)
    values, mcse = np.empty((2, len(x_0)))
    for i, run in enumerate((twisted, whole)):
        if np.any(better == i):
            values[better == i], mcse[better == i] = log_mean(run(x_0[better == i], keys[1, i]))
    return LogLikelihood(values, mcse, "estimate")


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 4, 5))
def _filters(
    d: Diffusion, params: Params, x_0: Data, rng_keys: Key, num_particles: int, num_draws: int
) -> Float[Array, "N R"]:
    """log p̂(x_0) of each filter, for each datum."""
    noise, kernel = handlers.substitute(d.kernels, data=params)()

    def one_datum(x_0: Event, rng_key: Key) -> Float[Array, " R"]:
        key_twists, key_filters = jax.random.split(rng_key)
        twists = fit_twists(d, noise, kernel, x_0, key_twists)
        run = partial(_filter, d, kernel, twists, x_0, num_particles=num_particles)
        return jax.vmap(lambda key: run(rng_key=key))(jax.random.split(key_filters, num_draws))

    return jax.vmap(one_datum)(jnp.asarray(x_0), rng_keys)


def _filter(
    d: Diffusion, kernel: Kernel, twists: Twist, x_0: Event, rng_key: Key, num_particles: int
) -> Float[Array, ""]:
    """log p̂(x_0) of one filter."""
    T, S = d.num_timesteps, num_particles

    def twist_at(t: Time) -> Twist:
        return jax.tree.map(lambda leaf: leaf[t - 1], twists)

    def step(carry: tuple[Array, Array, Array], args: tuple[Array, Key]) -> tuple[tuple[Array, Array, Array], None]:
        x_t, log_w, log_p = carry
        t, key = args
        key_resample, key_move = jax.random.split(key)
        p = kernel(x_t.reshape(S, *x_0.shape), t)
        proposal, log_mass = tilted(p, twist_at(jnp.maximum(t - 1, 1)))
        log_w = log_w + jnp.where(t == 1, p.log_prob(x_0), log_mass) - twist_at(t)(x_t)
        parents, log_w, log_mean_weight, _ = resample(key_resample, log_w, allowed=t > 1)
        x_prev = jax.tree.map(lambda leaf: leaf[parents], proposal).sample(key_move)
        return (x_prev, log_w, log_p + log_mean_weight), None

    key_first, key_steps = jax.random.split(rng_key)
    first, log_mass = tilted(d.family.terminal((S,)), twist_at(T))
    start = (first.sample(key_first), log_mass, jnp.zeros(()))
    (_, log_w, log_p), _ = jax.lax.scan(step, start, (jnp.arange(T, 0, -1), jax.random.split(key_steps, T)))
    return log_p + jax.nn.logsumexp(log_w) - jnp.log(S)
