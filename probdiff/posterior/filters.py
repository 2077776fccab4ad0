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
from probdiff.families.mixtures import components_of
from probdiff.likelihood.resampling import normalised, resample, systematic
from probdiff.locks import one_at_a_time
from probdiff.posterior.guidance import DEFENSIVE, GuidedLikelihood, as_matrix, solve_lower
from probdiff.types import Key, Params

_DRAWS = 2048
_LOWEST = -1e30  # of a log weight that can be drawn by
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


class _Mixture(NamedTuple):
    """Σ_m w_m·N(m) for each particle, in means and standard deviations or Cholesky factors."""

    log_weight: Float[Array, "S M"]
    loc: Float[Array, "S M D"]
    scale: Float[Array, "S M D *D"]

    def draw(self, z: Float[Array, "S D"], rng_key: Key) -> Float[Array, "S D"]:
        """One for each particle, from standard normals and a key for the components."""
        m = jax.random.categorical(rng_key, self.log_weight)
        loc, scale = (jax.vmap(lambda array, m: array[m])(array, m) for array in (self.loc, self.scale))
        return loc + (scale * z if scale.ndim == loc.ndim else jnp.einsum("sij,sj->si", scale, z))

    def log_prob(self, x: Float[Array, "S D"]) -> Float[Array, " S"]:
        return jax.nn.logsumexp(self.log_weight + _log_normal(self.loc, self.scale, x[:, None]), -1)


class _State(NamedTuple):
    """What each particle at x_t has: p(x_{t−1} given x_t) and the proposal of x_{t−1}, and log ψ_t(x_t)."""

    kernel: _Mixture
    proposal: _Mixture
    log_psi: Float[Array, " S"]


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def spread(d: GaussianDiffusion, params: Params, rng_key: Key) -> Float[Array, "T D D"]:
    """Cholesky factors of E Cov(x_0 given x_t) under p at t = 1…T, from draws of p; of mixtures within a component."""
    paths = Predictive(d.reverse, params=params, num_samples=_DRAWS, parallel=True)(rng_key, stacked=True)
    _, predict = handlers.substitute(d.predictions, data=params)()

    def cholesky(args: tuple[Array, Array, Array]) -> Float[Array, "D D"]:
        x_t, x_prev, t = args
        p, (mean, _) = predict(x_t, t)
        M = d.components
        # √ of the probability of each component, given where the path went
        share = jnp.exp(jax.nn.log_softmax(p.component_log_probs(x_prev)) / 2) if M > 1 else jnp.ones((_DRAWS, 1))
        apart = paths["x_0"].reshape(_DRAWS, 1, -1) - mean.reshape(_DRAWS, M, -1)
        residual = (share[..., None] * apart).reshape(_DRAWS * M, -1)
        covariance = residual.T @ residual / _DRAWS
        diagonal = jnp.diag(jnp.diag(covariance))
        return jnp.linalg.cholesky((1 - _DIAGONAL_SHARE) * covariance + _DIAGONAL_SHARE * diagonal)

    x = jnp.moveaxis(paths["x"], 1, 0)[::-1]  # t = 1…T
    x_prev = jnp.concatenate([paths["x_0"][None], x[:-1]])
    return jax.lax.map(cholesky, (x, x_prev, jnp.arange(1, d.num_timesteps + 1)))


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
    T, S, M, size = d.num_timesteps, num_particles, d.components, math.prod(d.event_shape)
    # features that are known are no axes of the chain, so that given them its axes hang together
    turned = factors is not None and getattr(likelihood, "axes", None) is not None
    noise, predict = handlers.substitute(d.predictions, data=params)()

    def of_components(p: dist.Distribution) -> _Mixture:
        parts = components_of(p)
        log_weight = jax.nn.log_softmax(p.log_weights) if M > 1 else jnp.zeros((S, 1))
        square = (size,) if factors is None else ()
        scale = parts.scale_tril if factors is None else jnp.sqrt(parts.variance)
        return _Mixture(log_weight, parts.mean.reshape(S, M, size), scale.reshape(S, M, size, *square))

    def state(x_t: Float[Array, "S D"], t: Any) -> _State:
        p, (mean, V) = predict(x_t.reshape(S, *d.event_shape), t)
        kernel, mean = of_components(p), mean.reshape(S * M, size)
        flat = kernel.scale.reshape(S * M, *kernel.scale.shape[2:])
        x_0_weight, _, std = noise.posterior(t)
        if V is None:
            guidance = likelihood.guidance(mean, factors[t - 1])  # type: ignore[index]
            guided = flat**2 - x_0_weight**2 * jnp.diagonal(guidance.covariance_reduction, axis1=-2, axis2=-1)
            proposal = jnp.sqrt(jnp.maximum(guided, std**2))
            if turned:
                left = factors[t - 1] @ factors[t - 1].T - guidance.covariance_reduction  # type: ignore[index]
                whole = jnp.linalg.cholesky(std**2 * jnp.eye(size) + x_0_weight**2 * left)
                # rounding may leave it singular
                proposal = jnp.where(jnp.isfinite(whole).all(), whole, as_matrix(proposal))
        else:
            guidance = likelihood.guidance(mean, _factor(V.reshape(S * M, size, size), (std / x_0_weight) ** 2))
            guided = jnp.linalg.cholesky(flat @ flat.mT - x_0_weight**2 * guidance.covariance_reduction)
            # rounding may leave it singular
            proposal = jnp.where(jnp.isfinite(guided).all((-2, -1), keepdims=True), guided, flat)
        log_joint = kernel.log_weight + guidance.log_psi.reshape(S, M)
        shift = x_0_weight * guidance.mean_shift.reshape(S, M, size)
        guided_loc, guided_scale = kernel.loc + shift, proposal.reshape(S, M, *proposal.shape[1:])
        guided_kernel = _Mixture(jax.nn.log_softmax(log_joint), guided_loc, guided_scale)
        return _State(kernel, guided_kernel, jax.nn.logsumexp(log_joint, -1))

    def move(carry: Any, rng_key: Key) -> tuple[tuple[Float[Array, "S D"], Array, Array, Any], Float[Array, ""]]:
        """Particles resampled where too few are effective, and moved one step down, to be weighted by ψ there."""
        now, log_w, log_evidence, worst = carry
        key_resample, key_move, key_which, key_component = jax.random.split(rng_key, 4)
        parents, log_w_left, log_mean_weight, ess = resample(key_resample, log_w)
        worst = jax.tree.map(partial(jnp.where, ess < worst[0]), (ess, log_w), worst)
        log_evidence = log_evidence + log_mean_weight
        now = jax.tree.map(lambda leaf: leaf[parents], now)
        z = jax.random.normal(key_move, (S, size))
        # one particle in ten, evenly spread from a random start: each is as likely
        defensive = (jnp.arange(S)[:, None] * DEFENSIVE + jax.random.uniform(key_which)) % 1 < DEFENSIVE
        x = jnp.where(defensive, now.kernel.draw(z, key_component), now.proposal.draw(z, key_component))
        log_p, log_guided = now.kernel.log_prob(x), now.proposal.log_prob(x)
        log_r = jnp.logaddexp(math.log1p(-DEFENSIVE) + log_guided, math.log(DEFENSIVE) + log_p)
        return (x, log_w_left + log_p - log_r - now.log_psi, log_evidence, worst), ess

    def down(carry: Any, args: tuple[Array, Key]) -> tuple[Any, Float[Array, ""]]:
        t, key = args
        (x_t, log_w, *rest), ess = move(carry, key)
        now = state(x_t, t)
        return (now, _never_nan(log_w + now.log_psi), *rest), ess

    key_steps, key_last, key_resample, key_order, key_component = jax.random.split(rng_key, 5)
    keys = jax.random.split(key_steps, T)
    # above x_T: its "kernel" is p(x_T)
    zeros, ones = jnp.zeros((S, M, size)), jnp.ones((S, M, size))
    matrix = ones[..., None] * jnp.eye(size)
    even = jnp.full((S, M), -math.log(M))
    first = _Mixture(even, zeros, ones if factors is not None else matrix)
    above = _State(first, first._replace(scale=matrix) if turned else first, jnp.zeros(S))
    carry = (above, jnp.zeros(S), jnp.zeros(()), (jnp.ones(()), jnp.zeros(S)))
    carry, ess = jax.lax.scan(down, carry, (jnp.arange(T, 1, -1), keys[1:]))
    (x_1, log_w, log_evidence, worst), ess_above = move(carry, keys[0])
    last_kernel = of_components(predict(x_1.reshape(S, *d.event_shape), 1)[0])  # of x_0 given x_1, exactly
    flat = last_kernel.scale.reshape(S * M, *last_kernel.scale.shape[2:])
    x_0, log_new = likelihood.propose_x_0(last_kernel.loc.reshape(S * M, size), flat, key_last)
    # one proposal for each component, of which one is chosen by its weight
    log_new = _never_nan(last_kernel.log_weight + log_new.reshape(S, M))
    chosen = jax.random.categorical(key_component, jnp.maximum(log_new, _LOWEST))
    x_0 = jax.vmap(lambda array, m: array[m])(x_0.reshape(S, M, size), chosen)
    log_w = _never_nan(log_w + jax.nn.logsumexp(log_new, -1))
    shares, last = normalised(log_w)
    worst = jax.tree.map(partial(jnp.where, last < worst[0]), (last, log_w), worst)
    log_evidence = log_evidence + jax.nn.logsumexp(log_w) - jnp.log(S)
    ess = jnp.concatenate([ess, jnp.stack([ess_above, last])])[1:]
    chosen = systematic(key_resample, shares)
    # from a random place, so that each draw by itself is one from the posterior; equal ones stay side by side, for ESS
    chosen = jnp.roll(chosen, jax.random.randint(key_order, (), 0, S))
    return Filtered(x_0[chosen], log_evidence, ess, worst[1])


def _never_nan(log_w: Float[Array, "S *M"]) -> Float[Array, "S *M"]:
    return jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)


def _log_normal(
    loc: Float[Array, "S M D"], scale: Float[Array, "S M D *D"], x: Float[Array, "S 1 D"]
) -> Float[Array, "S M"]:
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
