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
from probdiff.likelihood.resampling import normalised, resample, systematic
from probdiff.locks import one_at_a_time
from probdiff.posterior.guidance import DEFENSIVE, GuidedLikelihood, as_matrix, solve_lower
from probdiff.types import Key, Params

_DRAWS = 2048
_DIAGONAL_SHARE = 0.02  # share of the diagonal in a covariance, so that few draws leave it positive


class Filtered(NamedTuple):
    """What filters leave, each leaf with leading axes (N, M) for N data and M filters of S particles.

    `x_0` (S, D) holds equally weighted draws in the chain's own units, and `log_evidence` () is log p̂(y) in nats. `ess`
    (T,) is the number of effective particles over S at t = T…2 and 0; `log_weight` (S,) are the weights where it was
    least.
    """

    x_0: Float[Array, "S D"]
    log_evidence: Float[Array, ""]
    ess: Float[Array, " T"]
    log_weight: Float[Array, " S"]


class _State(NamedTuple):
    """What each particle at x_t has: p(x_{t−1} given x_t) and the proposal of x_{t−1}, and log ψ_t(x_t).

    Both normals are held by their mean and their standard deviation or Cholesky factor.
    """

    loc: Float[Array, "S D"]
    scale: Float[Array, "S D *D"]
    proposal_loc: Float[Array, "S D"]
    proposal_scale: Float[Array, "S D *D"]
    log_psi: Float[Array, " S"]


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def spread(d: GaussianDiffusion, params: Params, rng_key: Key) -> Float[Array, "T D D"]:
    """Cholesky factors of E Cov(x_0 given x_t) under p at t = 1…T, from draws of p."""
    paths = Predictive(d.reverse, params=params, num_samples=_DRAWS, parallel=True)(rng_key, stacked=True)
    _, predict = handlers.substitute(d.predictions, data=params)()

    def cholesky(args: tuple[Array, Array]) -> Float[Array, "D D"]:
        x_t, t = args
        residual = (paths["x_0"] - predict(x_t, t)[1][0]).reshape(_DRAWS, -1)
        covariance = residual.T @ residual / _DRAWS
        diagonal = jnp.diag(jnp.diag(covariance))
        return jnp.linalg.cholesky((1 - _DIAGONAL_SHARE) * covariance + _DIAGONAL_SHARE * diagonal)

    x = jnp.moveaxis(paths["x"], 1, 0)[::-1]  # t = 1…T
    return jax.lax.map(cholesky, (x, jnp.arange(1, d.num_timesteps + 1)))


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 5))
def filters(
    d: GaussianDiffusion,
    params: Params,
    factors: Float[Array, "T D D"] | None,
    likelihoods: GuidedLikelihood,
    rng_keys: Key,
    num_particles: int,
) -> Filtered:
    """One filter for each likelihood (N,) and key (N, M).

    The targets p(x_T)·∏ p(x_{s−1} given x_s)·ψ_t(x_t), s > t, end at p(x_0…x_T)·g(x_0). A proposal is p(x_{t−1} given
    x_t) with its x_0 conditioned on the likelihood, or that kernel as it is for a share of the particles, so that no
    weight of a step is large where the guidance misses something. `factors` are those of `spread`, None where kernels
    are full.
    """

    def one_filter(likelihood: GuidedLikelihood, rng_key: Key) -> Filtered:
        return _filter(d, params, factors, likelihood, rng_key, num_particles)

    return jax.vmap(jax.vmap(one_filter, in_axes=(None, 0)))(likelihoods, rng_keys)


def _filter(
    d: GaussianDiffusion,
    params: Params,
    factors: Float[Array, "T D D"] | None,
    likelihood: GuidedLikelihood,
    rng_key: Key,
    num_particles: int,
) -> Filtered:
    T, S, size = d.num_timesteps, num_particles, math.prod(d.event_shape)
    # features that are known are no axes of the chain, so that given them its axes hang together
    turned = factors is not None and getattr(likelihood, "axes", None) is not None
    noise, predict = handlers.substitute(d.predictions, data=params)()

    def state(x_t: Float[Array, "S D"], t: Any) -> _State:
        p, (mean, V) = predict(x_t.reshape(S, *d.event_shape), t)
        loc, mean = p.mean.reshape(S, -1), mean.reshape(S, -1)
        x_0_weight, _, std = noise.posterior(t)
        if V is None:
            guidance = likelihood.guidance(mean, factors[t - 1])  # type: ignore[index]
            variance = p.variance.reshape(S, -1)
            guided = variance - x_0_weight**2 * jnp.diagonal(guidance.covariance_reduction, axis1=-2, axis2=-1)
            scale, proposal = jnp.sqrt(variance), jnp.sqrt(jnp.maximum(guided, std**2))
            if turned:
                left = factors[t - 1] @ factors[t - 1].T - guidance.covariance_reduction  # type: ignore[index]
                whole = jnp.linalg.cholesky(std**2 * jnp.eye(size) + x_0_weight**2 * left)
                # rounding may leave it singular
                proposal = jnp.where(jnp.isfinite(whole).all(), whole, as_matrix(proposal))
        else:
            guidance = likelihood.guidance(mean, _factor(V, (std / x_0_weight) ** 2))
            scale = p.scale_tril
            guided = jnp.linalg.cholesky(p.covariance_matrix - x_0_weight**2 * guidance.covariance_reduction)
            # rounding may leave it singular
            proposal = jnp.where(jnp.isfinite(guided).all((-2, -1), keepdims=True), guided, scale)
        return _State(loc, scale, loc + x_0_weight * guidance.mean_shift, proposal, guidance.log_psi)

    def move(carry: Any, rng_key: Key) -> tuple[tuple[Float[Array, "S D"], Array, Array, Any], Float[Array, ""]]:
        """Particles resampled where too few are effective, and moved one step down, to be weighted by ψ there."""
        now, log_w, log_evidence, worst = carry
        key_resample, key_move, key_which = jax.random.split(rng_key, 3)
        parents, log_w_left, log_mean_weight, ess = resample(key_resample, log_w)
        worst = jax.tree.map(partial(jnp.where, ess < worst[0]), (ess, log_w), worst)
        log_evidence = log_evidence + log_mean_weight
        now = jax.tree.map(lambda leaf: leaf[parents], now)
        kernel, guided = (now.loc, now.scale), (now.proposal_loc, now.proposal_scale)
        z = jax.random.normal(key_move, now.loc.shape)
        # one particle in ten, evenly spread from a random start: each is as likely
        defensive = (jnp.arange(S)[:, None] * DEFENSIVE + jax.random.uniform(key_which)) % 1 < DEFENSIVE
        x = jnp.where(defensive, _draw(*kernel, z), _draw(*guided, z))
        log_p = _log_normal(*kernel, x)
        log_r = jnp.logaddexp(math.log1p(-DEFENSIVE) + _log_normal(*guided, x), math.log(DEFENSIVE) + log_p)
        return (x, log_w_left + log_p - log_r - now.log_psi, log_evidence, worst), ess

    def down(carry: Any, args: tuple[Array, Key]) -> tuple[Any, Float[Array, ""]]:
        t, key = args
        (x_t, log_w, *rest), ess = move(carry, key)
        now = state(x_t, t)
        return (now, _never_nan(log_w + now.log_psi), *rest), ess

    key_steps, key_last, key_resample, key_order = jax.random.split(rng_key, 4)
    keys = jax.random.split(key_steps, T)
    # above x_T: its "kernel" is p(x_T)
    zeros, ones = jnp.zeros((S, size)), jnp.ones((S, size))
    scale = ones if factors is not None else as_matrix(ones)
    above = _State(zeros, scale, zeros, as_matrix(ones) if turned else scale, jnp.zeros(S))
    carry = (above, jnp.zeros(S), jnp.zeros(()), (jnp.ones(()), jnp.zeros(S)))
    carry, ess = jax.lax.scan(down, carry, (jnp.arange(T, 1, -1), keys[1:]))
    (x_1, log_w, log_evidence, worst), ess_above = move(carry, keys[0])
    p = predict(x_1.reshape(S, *d.event_shape), 1)[0]  # of x_0 given x_1, normal exactly
    scale = p.scale_tril if factors is None else jnp.sqrt(p.variance).reshape(S, -1)
    x_0, log_new = likelihood.propose_x_0(p.mean.reshape(S, -1), scale, key_last)
    log_w = _never_nan(log_w + log_new)
    shares, last = normalised(log_w)
    worst = jax.tree.map(partial(jnp.where, last < worst[0]), (last, log_w), worst)
    log_evidence = log_evidence + jax.nn.logsumexp(log_w) - jnp.log(S)
    ess = jnp.concatenate([ess, jnp.stack([ess_above, last])])[1:]
    chosen = systematic(key_resample, shares)
    # from a random place, so that each draw by itself is one from the posterior; equal ones stay side by side, for ESS
    chosen = jnp.roll(chosen, jax.random.randint(key_order, (), 0, S))
    return Filtered(x_0[chosen], log_evidence, ess, worst[1])


def _never_nan(log_w: Float[Array, " S"]) -> Float[Array, " S"]:
    return jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)


def _draw(loc: Float[Array, "S D"], scale: Float[Array, "S D *D"], z: Float[Array, "S D"]) -> Float[Array, "S D"]:
    return loc + (scale * z if scale.ndim == loc.ndim else jnp.einsum("sij,sj->si", scale, z))


def _log_normal(loc: Float[Array, "S D"], scale: Float[Array, "S D *D"], x: Float[Array, "S D"]) -> Float[Array, " S"]:
    if scale.ndim == loc.ndim:
        return dist.Normal(loc, scale).to_event(1).log_prob(x)
    z = jnp.squeeze(solve_lower(scale, (x - loc)[..., None]), -1)
    log_det = jnp.sum(jnp.log(jnp.diagonal(scale, axis1=-2, axis2=-1)), -1)
    return jnp.sum(jax.scipy.stats.norm.logpdf(z), -1) - log_det


def _factor(V: Float[Array, "S D D"], room: Float[Array, ""]) -> Float[Array, "S D D"]:
    """F with F·Fᵀ the positive part of V, its eigenvalues above a floor that is small beside V and V + room·I."""
    values, vectors = jnp.linalg.eigh(V)
    largest = values[:, -1:]
    floor = jnp.maximum(0.5 * jnp.minimum(0.01 * largest, room + values[:, :1]), 1e-6 * largest)
    return vectors * jnp.sqrt(jnp.maximum(values, floor))[:, None, :]
