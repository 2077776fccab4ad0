"""Particle filters down the reverse chain whose targets are its paths weighed by a likelihood of x_0."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import Predictive

from probdiff.chains import GaussianDiffusion
from probdiff.guidance import DEFENSIVE, Observation
from probdiff.types import Key, Params

_LEAST_SIZE = 0.5  # effective particles over particles below which they are resampled
_DRAWS = 2048
_OWN_VARIANCE = 0.02  # share of the diagonal in a covariance, so that few draws leave it positive


class Filtered(NamedTuple):
    """What filters leave, each leaf with leading axes (N, M) for N data and M filters of S particles.

    `x_0` (S, D) equally weighted, in the chain's own units; `log_evidence` (); `ess` (T + 1,) at t = T…0, effective
    particles over S; `log_weight` (S,) where that was least.
    """

    x_0: Float[Array, "S D"]
    log_evidence: Float[Array, ""]
    ess: Float[Array, " T+1"]
    log_weight: Float[Array, " S"]


class _State(NamedTuple):
    """Of each particle at x_t: p(x_{t−1} given x_t), the proposal, each by its mean and std or Cholesky factor, ψ_t."""

    loc: Float[Array, "S D"]
    scale: Float[Array, "S D *D"]
    proposal_loc: Float[Array, "S D"]
    proposal_scale: Float[Array, "S D *D"]
    log_psi: Float[Array, " S"]


@partial(jax.jit, static_argnums=0)
def spread(d: GaussianDiffusion, params: Params, rng_key: Key) -> Float[Array, "T D D"]:
    """Cholesky factors of E Cov(x_0 given x_t) under p at t = 1…T, from draws of p."""
    paths = Predictive(d.reverse, params=params, num_samples=_DRAWS, parallel=True)(rng_key, stacked=True)
    _, predict = handlers.substitute(d.predictions, data=params)()

    def factor(args: tuple[Array, Array]) -> Float[Array, "D D"]:
        x_t, t = args
        residual = (paths["x_0"] - predict(x_t, t)[1][0]).reshape(_DRAWS, -1)
        covariance = residual.T @ residual / _DRAWS
        own = jnp.diag(jnp.diag(covariance))
        return jnp.linalg.cholesky((1 - _OWN_VARIANCE) * covariance + _OWN_VARIANCE * own)

    x = jnp.moveaxis(paths["x"], 1, 0)[::-1]  # t = 1…T
    return jax.lax.map(factor, (x, jnp.arange(1, d.num_timesteps + 1)))


@partial(jax.jit, static_argnums=(0, 5))
def filters(
    d: GaussianDiffusion,
    params: Params,
    factors: Float[Array, "T D D"] | None,
    observations: Observation,
    rng_keys: Key,
    num_particles: int,
) -> Filtered:
    """One filter for each observation (N,) and key (N, M).

    The targets p(x_T)·∏ p(x_{s−1} given x_s)·ψ_t(x_t), s > t, end at p(x_0…x_T)·g(x_0). A proposal is p(x_{t−1} given
    x_t) with its x_0 conditioned on the observation, or for a share of the particles as it is, so that no weight of a
    step is large where the guide misses something. `factors` are those of `spread`, None where kernels are full.
    """
    one = lambda observation, key: _filter(d, params, factors, observation, key, num_particles)  # noqa: E731
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(observations, rng_keys)


def _filter(
    d: GaussianDiffusion,
    params: Params,
    factors: Float[Array, "T D D"] | None,
    observation: Observation,
    rng_key: Key,
    num_particles: int,
) -> Filtered:
    from blackjax.smc.resampling import systematic  # slow to import, and only this wants it

    T, S = d.num_timesteps, num_particles
    noise, predict = handlers.substitute(d.predictions, data=params)()

    def state(x_t: Float[Array, "S D"], t: Any) -> _State:
        p, (mean, V) = predict(x_t.reshape(S, *d.event_shape), t)
        loc, mean = p.mean.reshape(S, -1), mean.reshape(S, -1)
        of_x_0, _, std = noise.posterior(t)
        if V is None:
            guide = observation.guide(mean, factors[t - 1])  # type: ignore[index]
            variance = p.variance.reshape(S, -1)
            guided = variance - of_x_0**2 * jnp.diagonal(guide.fall, axis1=-2, axis2=-1)
            scale, proposal = jnp.sqrt(variance), jnp.sqrt(jnp.maximum(guided, std**2))
        else:
            guide = observation.guide(mean, _factor(V, (std / of_x_0) ** 2))
            scale = p.scale_tril
            guided = jnp.linalg.cholesky(p.covariance_matrix - of_x_0**2 * guide.fall)
            # rounding may leave it singular
            proposal = jnp.where(jnp.isfinite(guided).all((-2, -1), keepdims=True), guided, scale)
        return _State(loc, scale, loc + of_x_0 * guide.shift, proposal, guide.log_psi)

    def last_state(x_1: Float[Array, "S D"]) -> _State:
        """Where x_0 given x_t is normal exactly."""
        p = predict(x_1.reshape(S, *d.event_shape), 1)[0]
        loc = p.mean.reshape(S, -1)
        scale = p.scale_tril if factors is None else jnp.sqrt(p.variance).reshape(S, -1)
        return _State(loc, scale, loc, scale, observation.guide(loc, _matrix(scale)).log_psi)

    def resampled(carry: Any, rng_key: Key) -> tuple[Any, Array]:
        now, log_w, log_evidence, worst = carry
        shares, ess = _shares(log_w)
        worst = jax.tree.map(partial(jnp.where, ess < worst[0]), (ess, log_w), worst)
        parents = jnp.where(ess < _LEAST_SIZE, systematic(rng_key, shares, S), jnp.arange(S))
        log_evidence = log_evidence + jnp.where(ess < _LEAST_SIZE, jax.nn.logsumexp(log_w) - jnp.log(S), 0.0)
        log_w = jnp.where(ess < _LEAST_SIZE, 0.0, log_w)
        return (jax.tree.map(lambda leaf: leaf[parents], now), log_w, log_evidence, worst), ess

    def move(carry: Any, key: Key, to: Any) -> tuple[Any, Array]:
        key_resample, key_move, key_kernel, key_which = jax.random.split(key, 4)
        (now, log_w, log_evidence, worst), ess = resampled(carry, key_resample)
        kernel, guided = _normal(now.loc, now.scale), _normal(now.proposal_loc, now.proposal_scale)
        defensive = jax.random.bernoulli(key_which, DEFENSIVE, (S, 1))
        x = jnp.where(defensive, kernel.sample(key_kernel), guided.sample(key_move))
        log_p = kernel.log_prob(x)
        log_r = jnp.logaddexp(math.log1p(-DEFENSIVE) + guided.log_prob(x), math.log(DEFENSIVE) + log_p)
        then = to(x)
        log_w = log_w + log_p - log_r + then.log_psi - now.log_psi
        return (then, jnp.where(jnp.isnan(log_w), -jnp.inf, log_w), log_evidence, worst), ess

    key_first, key_steps, key_last, key_resample = jax.random.split(rng_key, 4)
    keys = jax.random.split(key_steps, T)
    x_T = jax.random.normal(key_first, (S, math.prod(d.event_shape)))
    first = last_state(x_T) if T == 1 else state(x_T, T)
    carry = (first, first.log_psi, jnp.zeros(()), (jnp.ones(()), jnp.zeros(S)))
    ess = jnp.zeros(0)
    if T > 1:
        down = lambda carry, args: move(carry, args[1], lambda x: state(x, args[0]))  # noqa: E731
        carry, ess = jax.lax.scan(down, carry, (jnp.arange(T - 1, 1, -1), keys[2:]))
        carry, one = move(carry, keys[1], last_state)
        ess = jnp.append(ess, one)
    (now, log_w, log_evidence, worst), one = resampled(carry, keys[0])
    x_0, log_new = observation.finish(now.loc, _matrix(now.scale), key_last)
    log_w = log_w + log_new - now.log_psi
    log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
    shares, last = _shares(log_w)
    worst = jax.tree.map(partial(jnp.where, last < worst[0]), (last, log_w), worst)
    log_evidence = log_evidence + jax.nn.logsumexp(log_w) - jnp.log(S)
    x_0 = x_0[systematic(key_resample, shares, S)]
    return Filtered(x_0, log_evidence, jnp.append(ess, jnp.stack([one, last])), worst[1])


def _shares(log_w: Float[Array, " S"]) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """Normalised weights, even ones where none is positive, and the share of particles that are effective."""
    shares = jax.nn.softmax(jnp.where(jnp.isfinite(log_w.max()), log_w, 0.0))
    return shares, 1 / jnp.sum(shares**2) / len(log_w)


def _normal(loc: Float[Array, "S D"], scale: Float[Array, "S D *D"]) -> dist.Distribution:
    if scale.ndim == loc.ndim:
        return dist.Normal(loc, scale).to_event(1)
    return dist.MultivariateNormal(loc, scale_tril=scale)


def _matrix(scale: Float[Array, "S D *D"]) -> Float[Array, "S D D"]:
    return scale if scale.ndim == 3 else scale[..., None] * jnp.eye(scale.shape[-1])


def _factor(V: Float[Array, "S D D"], room: Float[Array, ""]) -> Float[Array, "S D D"]:
    """F, F·Fᵀ the positive part of V, with V + room·I still above F·Fᵀ less its least eigenvalue."""
    values, vectors = jnp.linalg.eigh(V)
    largest = values[:, -1:]
    floor = jnp.maximum(0.5 * jnp.minimum(0.01 * largest, room + values[:, :1]), 1e-6 * largest)
    return vectors * jnp.sqrt(jnp.maximum(values, floor))[:, None, :]
