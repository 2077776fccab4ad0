"""The probability-flow ODE of a chain: the likelihood of a deterministic flow with the chain's own network."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers

from probdiff.blocks import block_size, in_blocks
from probdiff.chains import Diffusion, GaussianDiffusion
from probdiff.likelihood.result import LogLikelihood, log_mean
from probdiff.locks import one_at_a_time
from probdiff.types import Data, Event, Key, Params

_ROWS = 64
_EXACT = 16  # features up to which the divergence is summed exactly
_TOLERANCE = 1e-5


def ode(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int) -> LogLikelihood:
    """The likelihood of the probability flow, which is another model than the chain with the same network.

    p_flow(x_0) = ∫ p(x_0 given x_1)·p_flow(x_1) dx_1: the chain's last reverse step, and for x_1 the flow
    dx/dλ = ½·√ᾱ·(x̂_0(x, λ) − √ᾱ·x) in the log-SNR λ from N(0, I) at λ_T to λ_1, with x̂_0 the network's prediction
    (Song et al. 2021, eq. 13, in λ). log p_flow(x_1) = log N(x_T given 0, I) − ∫ div dλ from λ_T to λ_1; the
    divergence is exact up to 16 features, and the integral over x_1 importance-weighted over `num_draws` draws from
    q(x_1 given x_0). Beyond, the divergence is Hutchinson's estimate, unbiased in log p_flow(x_1), so the mean of
    log p(x_0 given x_1) + log p_flow(x_1) − log q(x_1 given x_0) is given, a lower bound of log p_flow(x_0).
    The network is called at log-SNRs between those it was fitted at, so with few steps the flow is a rough one.
    x_0 (N, *event_shape) in the chain's own units; nats. Raises `TypeError` for a diffusion that is not Gaussian.
    """
    if not isinstance(d, GaussianDiffusion):
        raise TypeError('method "ode" is for Gaussian diffusions: bits have no probability flow')

    def run(x: Data, key: Key) -> np.ndarray:
        return np.asarray(_log_draws(d, params, x, jax.random.split(key, (num_draws, len(x)))), np.float64)

    exact = np.prod(d.event_shape) <= _EXACT
    summary = log_mean if exact else lambda draws: (draws.mean(0), draws.std(0, ddof=1) / np.sqrt(num_draws))
    blocks = [summary(draws[:, :n]) for n, draws in in_blocks(x_0, rng_key, run, block_size(len(x_0), _ROWS))]
    values, mcse = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return LogLikelihood(values, mcse, "estimate" if exact else "lower bound")


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def _log_draws(d: GaussianDiffusion, params: Params, x_0: Data, rng_keys: Key) -> Float[Array, "S N"]:
    """log p(x_0 given x_1) + log p_flow(x_1) − log q(x_1 given x_0) at draws of x_1, for each datum."""
    noise, kernel = handlers.substitute(d.kernels, data=params)()
    first, last = jnp.clip(noise.log_snr[jnp.array([0, -1])], -30.0, 30.0)

    def one(x_0: Event, rng_key: Key) -> Array:
        key_x, key_probe = jax.random.split(rng_key)
        q = d.family.marginal(x_0, noise, 1)
        x_1 = q.sample(key_x)
        log_p = _log_flow(d, params, x_1, first, last, key_probe)
        return kernel(x_1, 1).log_prob(x_0) + log_p - q.log_prob(x_1)

    return jax.lax.map(lambda keys: jax.vmap(one)(jnp.asarray(x_0), keys), rng_keys)


def _log_flow(d: GaussianDiffusion, params: Params, x_1: Event, first: Array, last: Array, rng_key: Key) -> Array:
    import diffrax  # slow to import, and only this wants it

    denoiser = handlers.substitute(d.denoiser, data=params)()
    probe = jax.random.rademacher(rng_key, x_1.shape, x_1.dtype)

    def velocity(log_snr: Array, x: Event) -> Event:
        shrink = jnp.sqrt(jax.nn.sigmoid(log_snr))
        return 0.5 * shrink * (denoiser(x, log_snr) - shrink * x)

    def field(log_snr: Any, state: tuple[Event, Array], _: Any) -> tuple[Event, Array]:
        x, _ = state
        along = partial(velocity, log_snr)
        if x.size <= _EXACT:
            jacobian = jax.jacfwd(along)(x).reshape(x.size, x.size)
            return along(x), jnp.trace(jacobian)
        v, pushed = jax.jvp(along, (x,), (probe,))
        return v, jnp.sum(probe * pushed)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        first,
        last,
        None,
        (x_1, jnp.zeros(())),
        stepsize_controller=diffrax.PIDController(rtol=_TOLERANCE, atol=_TOLERANCE),
        max_steps=10_000,
    )
    x_T, backward = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    # ∫ from λ_1 to λ_T is minus the integral from λ_T to λ_1
    return d.family.terminal().log_prob(x_T) + backward
