"""p(x_0) of a chain without Monte Carlo: closed form for linear-Gaussian chains, quadrature in one dimension."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from probdiff.chains import GaussianDiffusion
from probdiff.derivation.linear import LinearChain, normal_log_prob
from probdiff.derivation.quadrature import Grid, num_nodes
from probdiff.likelihood import LogLikelihood
from probdiff.types import Data, Params

_PROBES = 8
_LINEAR = 1e-9  # relative departure from a straight line that is rounding
_ACCURACY = 1e-5  # nats


def exact(d: GaussianDiffusion, params: Params, x_0: Data) -> LogLikelihood:
    """log p(x_0), N12, worked out in float64: Monte Carlo error zero.

    x_0 (N, *event_shape) in the chain's own units; nats. Raises `ValueError` where the chain is neither
    linear-Gaussian nor of one dimension, or where its quadrature is not right to 1e-5 nats.
    """
    x_0 = np.asarray(x_0, np.float64)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        values = _linear(d, params, x_0.reshape(len(x_0), -1))
        if values is None:
            if x_0[0].size > 1:
                raise ValueError(
                    'method "exact" is for linear-Gaussian chains and for chains of one dimension; '
                    f'this one has event_shape {d.event_shape}: use "iwae" or "smc"'
                )
            values = _quadrature(d, params, x_0)
    return LogLikelihood(values, np.zeros_like(values), "exact")


def _linear(d: GaussianDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray | None:
    """In closed form, where each kernel's mean is linear and its covariance constant at random probes."""
    size, times = x_0.shape[1], jnp.arange(d.num_timesteps, 0, -1)
    _, kernel = handlers.substitute(d.components, data=params)()
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


def _quadrature(d: GaussianDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray:
    _, kernel = handlers.substitute(d.components, data=params)()
    shape, times = (-1, *d.event_shape), jnp.arange(1, d.num_timesteps + 1)

    reach = max(8.0, 1.2 * float(np.abs(x_0).max()))
    coarse = jnp.linspace(-reach, reach, 2001).reshape(shape)
    narrowest = float(jnp.sqrt(jax.lax.map(lambda t: kernel(coarse, t).variance.min(), times).min()))
    nodes = num_nodes(d.num_timesteps, reach, narrowest)
    if nodes is None:
        raise ValueError(
            f'method "exact" would need too large a grid: T = {d.num_timesteps}, and the narrowest reverse kernel has '
            f'standard deviation {narrowest:.2g}: use "iwae" or "smc"'
        )
    y = np.linspace(-reach, reach, nodes)
    x = jnp.asarray(y).reshape(shape)

    @jax.jit
    def log_kernel(to: Array, t: Array) -> Array:
        return jax.vmap(lambda one: kernel(x, t).log_prob(one.reshape(d.event_shape)))(to)

    kernels = np.asarray(jax.lax.map(lambda t: log_kernel(jnp.asarray(y), t), times))
    log_prior = np.asarray(d.family.prior((nodes,)).log_prob(x))
    grid = Grid(y, log_prior, kernels, np.asarray(log_kernel(jnp.asarray(x_0), 1)))
    error = max(np.abs(coarse.log_p - grid.log_p).max() for coarse in grid.coarser())
    if not error < _ACCURACY:
        raise ValueError(f"the quadrature of p(x_0) is right to {error:.1g} nats only, where {_ACCURACY:g} is wanted")
    return grid.log_p
