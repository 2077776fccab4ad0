"""p(x_0) of a chain without Monte Carlo: closed form for linear-Gaussian chains, quadrature, enumeration of bits."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from scipy.special import logsumexp

from probdiff.chains import BinomialDiffusion, Diffusion, GaussianDiffusion
from probdiff.families.mixtures import components_of
from probdiff.likelihood.result import LogLikelihood
from probdiff.locks import one_at_a_time
from probdiff.reference.linear_gaussian import LinearChain, normal_log_prob
from probdiff.reference.quadrature import MOST_BITS, coarser_parts, line, log_marginal_below, num_nodes, states
from probdiff.sampling import reverse_draws
from probdiff.types import Data, Params

_PROBES = 8
_LINEAR = 1e-9  # relative departure from a straight line that is rounding
_ACCURACY = 1e-5  # nats
_MOST_NODES = 5001
_MOST_WAYS = 4096  # down a linear chain of mixtures
_ROWS = 2048  # of data at once


@one_at_a_time
def exact(d: Diffusion, params: Params, x_0: Data) -> LogLikelihood:
    """log p(x_0), N12, worked out in float64: Monte Carlo error zero.

    x_0 (N, *event_shape) in the chain's own units; nats. Raises `ValueError` where a Gaussian chain is neither linear,
    with no more than 4,096 ways from component to component, nor of one dimension, or its quadrature is not right to
    1e-5 nats, and for more than 12 bits.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        if isinstance(d, BinomialDiffusion):
            return _without_error(_enumeration(d, params, np.asarray(x_0)))
        if not isinstance(d, GaussianDiffusion):
            raise TypeError(f'method "exact" is for Gaussian and binomial diffusions, not {type(d).__name__}')
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
    """In closed form, where means are linear, and covariances and weights constant, at random probes.

    Of M components to a kernel p(x_0) is a mixture of M^T Gaussians, one for each way down the chain.
    """
    size, times = x_0.shape[1], jnp.arange(d.num_timesteps, 0, -1)
    if d.components**d.num_timesteps > _MOST_WAYS:
        return None
    _, kernel = handlers.substitute(d.kernels, data=params)()
    probes = jnp.concatenate([jnp.zeros((1, size)), 2 * jax.random.normal(jax.random.key(0), (_PROBES, size))])

    def moments(x: Array, t: Array) -> tuple[Array, Array, Array]:
        mixture = kernel(x.reshape(d.event_shape), t)
        log_w = jax.nn.log_softmax(mixture.log_weights) if d.components > 1 else jnp.zeros(1)
        p = components_of(mixture)
        variance = p.variance.reshape(-1, size)
        covariance = p.covariance_matrix if d.covariance == "full" else variance[..., None] * jnp.eye(size)
        return p.mean.reshape(-1, size), covariance.reshape(-1, size, size), log_w

    @jax.jit
    def linearised(t: Array) -> tuple[Array, ...]:
        slope = jax.jacfwd(lambda x: moments(x, t)[0])(probes[0])
        return slope, *jax.vmap(lambda x: moments(x, t))(probes)

    A, mean, cov, log_w = (np.asarray(part) for part in jax.lax.map(linearised, times))
    b, S, log_w_0 = mean[:, 0], cov[:, 0], log_w[:, 0]
    straight = np.einsum("tmij,pj->tpmi", A, probes) + b[:, None]
    for value, predicted in ((mean, straight), (cov, S[:, None]), (log_w, log_w_0[:, None])):
        if not np.abs(value - predicted).max() <= _LINEAR * (1 + np.abs(value).max()):
            return None
    values = []
    for way in product(range(d.components), repeat=len(A)):
        steps, chosen = np.arange(len(A)), np.array(way)
        chain = LinearChain(
            np.zeros((1, size)), np.eye(size), A[steps, chosen], b[steps, None, chosen], S[steps, chosen]
        )
        means, covs = chain.marginals()
        values.append(log_w_0[steps, chosen].sum() + normal_log_prob(x_0, means[-1], covs[-1]))
    return logsumexp(values, axis=0)


def _enumeration(d: BinomialDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray:
    """Σ over all states of every x_t in turn, from x_T down."""
    size = x_0[0].size
    if size > MOST_BITS:
        raise ValueError(
            f'method "exact" sums over all states of at most {MOST_BITS} bits, not {size}: use "iwae" or "smc"'
        )
    y = jnp.asarray(states(size).reshape(-1, *d.event_shape), jnp.uint8)
    return _log_p(d, params, y, x_0, [(slice(None), 0.0)])[0]


def _quadrature(d: GaussianDiffusion, params: Params, x_0: np.ndarray) -> np.ndarray:
    """On a grid as wide and as fine as draws from p ask for, checked against coarser parts of it."""
    draws = reverse_draws(d, params, jax.random.key(0), 1024, range(d.num_timesteps + 1))
    reach = 1 + 1.6 * max(np.abs(draws).max(), np.abs(x_0).max())
    narrowest = float(_narrowest(d, params, jnp.moveaxis(jnp.asarray(draws[:, 1:]), 1, 0)))
    nodes = num_nodes(reach, narrowest)
    if nodes > _MOST_NODES:
        raise ValueError(
            f'method "exact" would need a grid of {nodes:,} nodes, since a reverse kernel has standard deviation '
            f'{narrowest:.2g}; {_MOST_NODES:,} is the most: use "iwae" or "smc"'
        )
    y = line(reach, narrowest)
    parts = [(part, float(np.log(np.diff(y[part])[0]))) for part in (slice(None), *coarser_parts(nodes))]
    values, *coarser = _log_p(d, params, jnp.asarray(y.reshape(-1, *d.event_shape)), x_0, parts)
    error = max(np.abs(other - values).max() for other in coarser)
    if not error < _ACCURACY:
        raise ValueError(f"the quadrature of p(x_0) is right to {error:.1g} nats only; {_ACCURACY:g} is wanted")
    return values


def _log_p(
    d: Diffusion, params: Params, y: Array, x_0: np.ndarray, parts: list[tuple[slice, float]]
) -> list[np.ndarray]:
    """log p(x_0), (N,), on each part of the nodes or states y, whose spacing has the logarithm that stands beside it.

    The parts go side by side, so that each kernel is worked out once and one alone is in memory.
    """
    log_p = [np.asarray(d.family.terminal(y.shape[:1]).log_prob(y))[part] for part, _ in parts]
    for t in range(d.num_timesteps, 1, -1):
        log_kernel = np.asarray(_log_kernel(d, params, y, y, jnp.asarray(t)))
        log_p = [
            log_marginal_below(log_kernel[part, part], one, log_h)
            for one, (part, log_h) in zip(log_p, parts, strict=True)
        ]
    values: list[list[np.ndarray]] = [[] for _ in parts]
    for i in range(0, len(x_0), _ROWS):
        log_kernel = np.asarray(_log_kernel(d, params, y, jnp.asarray(x_0[i : i + _ROWS]), jnp.asarray(1)))
        for found, one, (part, log_h) in zip(values, log_p, parts, strict=True):
            found.append(log_marginal_below(log_kernel[:, part], one, log_h))
    return [np.concatenate(found) for found in values]


@partial(jax.jit, static_argnums=0)
def _log_kernel(d: Diffusion, params: Params, x_t: Array, x_prev: Array, t: Array) -> Array:
    """log p(x_{t−1} given x_t), each x_{t−1} a row and each x_t a column."""
    _, kernel = handlers.substitute(d.kernels, data=params)()
    p = kernel(x_t, t)
    return jax.lax.map(p.log_prob, x_prev, batch_size=64)


@partial(jax.jit, static_argnums=0)
def _narrowest(d: Diffusion, params: Params, draws: Array) -> Array:
    """The least standard deviation of the kernels at draws of x_1…x_T, (T, S, *event_shape)."""
    _, kernel = handlers.substitute(d.kernels, data=params)()
    times = jnp.arange(1, d.num_timesteps + 1)
    return jax.lax.map(lambda args: jnp.sqrt(components_of(kernel(*args)).variance.min()), (draws, times)).min()
