"""p(x_0) of a chain without Monte Carlo: closed form for linear-Gaussian chains, quadrature, enumeration of bits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from probdiff.chains import BinomialDiffusion, Diffusion, GaussianDiffusion
from probdiff.likelihood.result import LogLikelihood
from probdiff.reference.linear_gaussian import LinearChain, normal_log_prob
from probdiff.reference.quadrature import MOST_BITS, NODES_PER_STD, states
from probdiff.sampling import reverse_draws
from probdiff.types import Data, Params

_PROBES = 8
_LINEAR = 1e-9  # relative departure from a straight line that is rounding
_ACCURACY = 1e-5  # nats
_MOST_NODES = 5001


def exact(d: Diffusion, params: Params, x_0: Data) -> LogLikelihood:
    """log p(x_0), N12, worked out in float64: Monte Carlo error zero.

    x_0 (N, *event_shape) in the chain's own units; nats. Raises `ValueError` where a Gaussian chain is neither
    linear-Gaussian nor of one dimension, or its quadrature is not right to 1e-5 nats, and for more than 12 bits.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        if isinstance(d, BinomialDiffusion):
            return _without_error(_enumeration(d, params, np.asarray(x_0)))
        if not isinstance(d, GaussianDiffusion):
            raise TypeError(f'method "exact" is for Gaussian and binomial diffusions, not {d}')
        x_0 = np.asarray(x_0, np.float64)
        values = _linear(d, params, x_0.reshape(len(x_0), -1))
        if values is None:
            if x_0[0].size > 1:
                raise ValueError(
                    'method "exact" is for linear-Gaussian chains and for chains of one dimension; '
                    f'this one has event_shape {d.event_shape}: use "iwae" or "smc"'
                )
            values = _quadrature(d, params, x_0)
    return _without_error(values)


def _without_error(values: np.ndarray) -> LogLikelihood:
    return LogLikelihood(values, np.zeros_like(values), "exact")


def _linear(d: GaussianDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray | None:
    """In closed form, where each kernel's mean is linear and its covariance constant at random probes."""
    size, times = x_0.shape[1], jnp.arange(d.num_timesteps, 0, -1)
    _, kernel = handlers.substitute(d.kernels, data=params)()
    probes = jnp.concatenate([jnp.zeros((1, size)), 2 * jax.random.normal(jax.random.key(0), (_PROBES, size))])

    def moments(x: Array, t: Array) -> tuple[Array, Array]:
        p = kernel(x.reshape(d.event_shape), t)
        full = d.covariance == "full"
        return p.mean.reshape(-1), p.covariance_matrix if full else jnp.diag(p.variance.reshape(-1))

    @jax.jit
    def linearised(t: Array) -> tuple[Array, ...]:
        slope = jax.jacfwd(lambda x: moments(x, t)[0])(probes[0])
        return slope, *jax.vmap(lambda x: moments(x, t))(probes)

    A, mean, cov = (np.asarray(part) for part in jax.lax.map(linearised, times))
    b, S = mean[:, 0], cov[:, 0]
    straight = np.einsum("tij,pj->tpi", A, probes) + b[:, None]
    for value, predicted in ((mean, straight), (cov, S[:, None])):
        if not np.abs(value - predicted).max() <= _LINEAR * (1 + np.abs(value).max()):
            return None
    chain = LinearChain(np.zeros((1, size)), np.eye(size), A, b[:, None], S)
    means, covs = chain.marginals()
    return normal_log_prob(x_0, means[-1], covs[-1])


def _enumeration(d: BinomialDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray:
    """Σ over every x_t in turn, from x_T down."""
    size, T = x_0[0].size, d.num_timesteps
    if size > MOST_BITS:
        raise ValueError(
            f'method "exact" sums over all states of at most {MOST_BITS} bits, not {size}: use "iwae" or "smc"'
        )
    x = jnp.asarray(states(size).reshape(-1, *d.event_shape), jnp.uint8)
    _, kernel = handlers.substitute(d.kernels, data=params)()

    @jax.jit
    def log_p(x_0: Array) -> Array:
        def carried(log_p_t: Array, t: Array, to: Array) -> Array:
            """log Σ p(to given x_t)·p(x_t)."""
            p = kernel(x, t)
            return jax.lax.map(lambda x_prev: jax.nn.logsumexp(p.log_prob(x_prev) + log_p_t), to, batch_size=64)

        times = jnp.arange(T, 1, -1)
        start = d.family.terminal(x.shape[:1]).log_prob(x)
        log_p_1, _ = jax.lax.scan(lambda log_p_t, t: (carried(log_p_t, t, x), None), start, times)
        return carried(log_p_1, jnp.asarray(1), x_0)

    return np.asarray(log_p(jnp.asarray(x_0)))


def _quadrature(d: GaussianDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray:
    """On a grid as wide and as fine as draws from p ask for, checked against one of every other node."""
    draws = reverse_draws(d, params, jax.random.key(0), 1024, range(d.num_timesteps + 1))
    _, kernel = handlers.substitute(d.kernels, data=params)()
    stds = jax.lax.map(
        lambda args: jnp.sqrt(kernel(*args).variance.min()),
        (jnp.moveaxis(jnp.asarray(draws[:, 1:]), 1, 0), jnp.arange(1, d.num_timesteps + 1)),
    )
    reach, narrowest = 1 + 1.6 * max(np.abs(draws).max(), np.abs(x_0).max()), float(stds.min())
    nodes = 1 + 200 * int(np.ceil(NODES_PER_STD * reach / narrowest / 100))  # few sizes, so few compilations
    if nodes > _MOST_NODES:
        raise ValueError(
            f'method "exact" would need a grid of {nodes:,} nodes, since a reverse kernel has standard deviation '
            f'{narrowest:.2g}; {_MOST_NODES:,} is the most: use "iwae" or "smc"'
        )

    @jax.jit
    def log_p(y: Array) -> Array:
        x, log_h = y.reshape(-1, *d.event_shape), jnp.log(y[1] - y[0])

        def carried(log_p_t: Array, t: Array, to: Array) -> Array:
            """log ∫ p(to given x_t)·p(x_t) dx_t."""
            p = kernel(x, t)
            one = lambda x_prev: jax.nn.logsumexp(p.log_prob(x_prev) + log_p_t) + log_h  # noqa: E731
            return jax.lax.map(one, to, batch_size=64)

        log_p_T = d.family.terminal(y.shape).log_prob(x)
        times = jnp.arange(d.num_timesteps, 1, -1)
        log_p_1, _ = jax.lax.scan(lambda log_p_t, t: (carried(log_p_t, t, x), None), log_p_T, times)
        return carried(log_p_1, jnp.asarray(1), jnp.asarray(x_0))

    y = jnp.linspace(-reach, reach, nodes)
    values = np.asarray(log_p(y))
    error = max(np.abs(log_p(some) - values).max() for some in (y[::2], y[nodes // 20 : -(nodes // 20)]))
    if not error < _ACCURACY:
        raise ValueError(f"the quadrature of p(x_0) is right to {error:.1g} nats only; {_ACCURACY:g} is wanted")
    return values
