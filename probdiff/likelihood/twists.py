"""Twists ψ_t(x_t) ≈ p(x_0 given x_t) of a particle filter, and kernels tilted by them in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from probdiff.chains import Diffusion
from probdiff.noncentred import Kernel
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Key

FULL = 16  # features up to which a twist has all products of two features
_POINTS = 8  # for each coefficient of a twist


class Twist(NamedTuple):
    """log ψ(x) = constant + linear·z − ½ zᵀ·curvature·z at z = (x − loc)/std, x flat of size D.

    `loc`, `std` and `linear` (D,); `curvature` (D, D), or (D,) where it is diagonal, not negative.
    """

    loc: Float[Array, " D"]
    std: Float[Array, " D"]
    constant: Float[Array, ""]
    linear: Float[Array, " D"]
    curvature: Float[Array, "D *D"]

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        z = (x - self.loc) / self.std
        bent = z * self.curvature if self.curvature.ndim == 1 else z @ self.curvature
        return self.constant + z @ self.linear - 0.5 * jnp.sum(bent * z, -1)


def tilted(p: dist.Distribution, twist: Twist) -> tuple[dist.Distribution, Float[Array, "*batch"]]:
    """p(x)·ψ(x)/∫p·ψ, over x as a vector, and log ∫ p(x)·ψ(x) dx: again a distribution of p's kind.

    p is a normal, a product of Bernoullis, or a mixture of such; raises `TypeError` for any other.
    """
    if isinstance(p, dist.MixtureSameFamily):
        components, log_mass = tilted(p.component_distribution, twist)
        log_weights = jax.nn.log_softmax(p.mixing_distribution.logits) + log_mass
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=log_weights), components)
        return mixture, jax.nn.logsumexp(log_weights, -1)
    base = p.base_dist if isinstance(p, dist.Independent) else p
    if isinstance(base, dist.BernoulliLogits):
        return _tilted_bits(base, p.batch_shape, twist)
    if isinstance(base, dist.Normal | dist.MultivariateNormal):
        return _tilted_normal(p, twist)
    raise TypeError(f'method "smc" knows no twist of a {type(base).__name__}; use "elbo" or "iwae"')


def _tilted_bits(
    p: dist.BernoulliLogits, batch_shape: tuple[int, ...], twist: Twist
) -> tuple[dist.Distribution, Float[Array, "*batch"]]:
    logits = p.logits.reshape(*batch_shape, -1)
    shift = twist.linear / twist.std
    constant = twist.constant - shift @ twist.loc
    log_mass = constant + jnp.sum(jax.nn.softplus(logits + shift) - jax.nn.softplus(logits), -1)
    return type(p)(logits + shift).to_event(1), log_mass


def _tilted_normal(p: dist.Distribution, twist: Twist) -> tuple[dist.Distribution, Float[Array, "*batch"]]:
    """In z, where p has mean m and covariance V = L·Lᵀ, the covariance becomes V̂ = (V⁻¹ + curvature)⁻¹.

    V̂ = L·(I + Lᵀ·curvature·L)⁻¹·Lᵀ, and the mean becomes m + V̂·(linear − curvature·m).
    """
    loc, std, b, A = twist.loc, twist.std, twist.linear, twist.curvature
    flat = (*p.batch_shape, -1)
    m, v = (p.mean.reshape(flat) - loc) / std, p.variance.reshape(flat) / std**2
    full = isinstance(p, dist.MultivariateNormal)
    if A.ndim == 1 and not full:
        g = 1 + A * v
        slope = b - A * m
        log_mass = jnp.sum(m * (b - 0.5 * A * m) + 0.5 * (v * slope**2 / g - jnp.log(g)), -1)
        new = dist.Normal(loc + std * (m + v * slope / g), std * jnp.sqrt(v / g)).to_event(1)
        return new, twist.constant + log_mass
    A = jnp.diag(A) if A.ndim == 1 else A
    L = p.scale_tril / std[:, None] if full else jnp.sqrt(v)[..., None] * jnp.eye(loc.size)
    slope = b - m @ A
    R = jnp.linalg.cholesky(jnp.eye(loc.size) + L.mT @ A @ L)
    F = solve_triangular(R, L.mT, lower=True).mT  # F·Fᵀ = V̂
    u = jnp.squeeze(slope[..., None, :] @ F, -2)
    log_det = jnp.sum(jnp.log(jnp.diagonal(R, axis1=-2, axis2=-1)), -1)
    log_mass = jnp.sum(m * (b - 0.5 * m @ A), -1) + 0.5 * jnp.sum(u**2, -1) - log_det
    mean = m + jnp.squeeze(F @ u[..., None], -1)
    tril = jnp.linalg.qr(F.mT, mode="r").mT  # not the Cholesky factor of F·Fᵀ, which rounding can make singular
    tril = tril * jnp.where(jnp.diagonal(tril, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
    new = dist.MultivariateNormal(loc + std * mean, scale_tril=std[:, None] * tril)
    return new, twist.constant + log_mass


def products_of_features(discrete: bool, size: int) -> tuple[Array, Array]:
    """Pairs of features whose products a twist has: all of them for few features, else squares alone.

    None for bits, so that a tilted product of Bernoullis is one again.
    """
    if discrete:
        return jnp.arange(0), jnp.arange(0)
    return jnp.triu_indices(size) if size <= FULL else (jnp.arange(size), jnp.arange(size))


def fit_twists(d: Diffusion, noise: NoiseLevels, kernel: Kernel, x_0: Event, rng_key: Key) -> Twist:
    """ψ_1…ψ_T, each leaf with a leading axis of T."""
    size = x_0.size
    rows, columns = products_of_features(d.family.support.is_discrete, size)
    full = len(rows) > size or size == 1
    num_points = max(500, _POINTS * (1 + size + len(rows)))

    def fit(below: Twist, args: tuple[Array, Key]) -> tuple[Twist, Twist]:
        t, key = args
        q = d.family.marginal(x_0, noise, t)
        x = q.sample(key, (num_points,)).reshape(num_points, -1)
        loc, std = jnp.ravel(q.mean), jnp.ravel(jnp.sqrt(q.variance))
        z = (x - loc) / std
        p = kernel(x.reshape(num_points, *x_0.shape), t)
        wanted = jnp.where(t == 1, p.log_prob(x_0), tilted(p, below)[1])
        # orthogonal at draws from q(x_t given x_0): Hermite polynomials where that is Gaussian
        products = z[:, rows] * z[:, columns] - (rows == columns)
        features = jnp.concatenate([jnp.ones((num_points, 1)), z, products], 1)
        gram = features.T @ features / num_points + 1e-4 * jnp.eye(features.shape[1])
        mean = wanted.mean()  # solved for apart, to keep digits
        solution = jnp.linalg.solve(gram, features.T @ (wanted - mean) / num_points)
        constant, linear, bend = solution[0] + mean, solution[1 : 1 + size], solution[1 + size :]
        constant = constant - jnp.sum(jnp.where(rows == columns, bend, 0))
        # held convex, so that every tilted kernel is a density
        if full:
            curvature = jnp.zeros((size, size)).at[rows, columns].add(-bend).at[columns, rows].add(-bend)
            values, vectors = jnp.linalg.eigh(curvature)
            curvature = (vectors * jnp.maximum(values, 0)) @ vectors.T
        else:
            curvature = jnp.maximum(-2 * bend, 0) if len(rows) else jnp.zeros(size)
        twist = Twist(loc, std, constant, linear, curvature)
        return twist, twist

    blank = jnp.zeros((size, size) if full else size)
    start = Twist(jnp.zeros(size), jnp.ones(size), jnp.zeros(()), jnp.zeros(size), blank)
    T = d.num_timesteps
    return jax.lax.scan(fit, start, (jnp.arange(1, T + 1), jax.random.split(rng_key, T)))[1]
