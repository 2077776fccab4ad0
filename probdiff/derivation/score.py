"""The gradient of K where draws carry none, as of bits: by the score function, and by enumeration of all paths."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.derivation.gradient import Directions, double
from probdiff.derivation.pair import Chain, Pair, Path
from probdiff.derivation.sites import log_prob
from probdiff.types import Event, Key, Params


@dataclass(frozen=True)
class MeanSlope:
    """dK/du along one direction of the param `name`: the mean of draws with its standard error, and exactly; nats."""

    param: str
    name: str
    drawn: float
    error: float
    exact: float


def reweighted_elbo(pair: Pair, path: Path) -> Callable[[Params, Key], Array]:
    """Σ_n (q_u/q)·(log p_u − log q_u) on one path x_0…x_T of each datum, q being that at the pair's own params.

    For paths from q it is an unbiased estimate of K(u), and smooth in u: its gradient at u = the pair's params has the
    score-function term. Wants double precision.
    """
    log_q_drawn = _log_prob(pair.q, path, jax.tree.map(double, pair.params))

    def elbo(params: Params, rng_key: Key | None = None) -> Array:
        log_q, log_p = (_log_prob(chain, path, params) for chain in (pair.q, pair.p))
        return jnp.sum(jnp.exp(log_q - log_q_drawn) * (log_p - log_q))

    return elbo


def gradient_draws(pair: Pair, paths: Path, along: Directions, baseline: Float[Array, " N"]) -> Float[Array, "S K"]:
    """Of dK/du along each of K directions, for each of S paths (S, N, *event): the score-function estimate.

    `baseline` is taken off log p − log q of each datum where it meets the score, whose mean is zero.
    """
    where = along.params(along.u)

    def one(path: Path) -> Float[Array, " K"]:
        log_q_drawn = _log_prob(pair.q, path, where)

        def estimate(leaves: Params) -> Array:
            params = along.params(leaves)
            log_q, log_p = (_log_prob(chain, path, params) for chain in (pair.q, pair.p))
            weight = jnp.exp(log_q - log_q_drawn)
            return jnp.sum(weight * (log_p - log_q - baseline) + baseline)

        slope = jax.linearize(estimate, along.u)[1]
        return jax.vmap(slope)(along.moves)

    return jax.lax.map(one, paths, batch_size=100)


def enumerated_elbo(pair: Pair, states: Event, params: Params) -> Float[Array, " N"]:
    """K of each datum, N17, summed over all paths through `states` (M, *event), in the order of the guide, nats."""
    (N, M), T, event = (len(pair.x), len(states)), pair.num_timesteps, pair.x.shape[1:]
    x_0 = jnp.repeat(pair.x, M, axis=0)
    before = jnp.tile(states, (N, *[1] * len(event)))  # the neighbour of x_t, in q and in p
    path = {t: before if t else x_0 for t in range(T + 1)}
    log_q, log_p = (
        {t: log_prob(kernel, states[:, None]).reshape(M, N, M) for t, kernel in chain.kernels(path, params).items()}
        for chain in (pair.q, pair.p)
    )  # (x_t, datum, the neighbour)
    reconstruction = log_prob(pair.p.kernels(path, params)[0], x_0).reshape(N, M)
    total, marginal, last = jnp.zeros(N), None, 0
    for t in pair.q.times:
        if marginal is None:
            marginal = jnp.exp(log_q[t][:, :, 0]).T  # (datum, x_t)
            total -= _sum(marginal, log_q[t][:, :, 0].T, 1)
        else:
            joint = jnp.exp(log_q[t]) * marginal  # (x_t, datum, the one before it)
            of_p = log_p[t] if t < last else jnp.swapaxes(log_p[last], 0, 2)
            total += _sum(joint, of_p - log_q[t], (0, 2))
            marginal = joint.sum(2).T
        if t == 1:
            total += _sum(marginal, reconstruction, 1)
        if t == T:
            total += _sum(marginal, log_p[T][:, :, 0].T, 1)
        last = t
    return total


def _sum(weights: Array, values: Array, axis: int | tuple[int, ...]) -> Array:
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis)


def _log_prob(chain: Chain, path: Path, params: Params) -> Float[Array, " N"]:
    """Of the sites of the chain on a path, for each datum."""
    first, *others = (log_prob(kernel, path[t]) for t, kernel in chain.kernels(path, params).items())
    return sum(others, first)
