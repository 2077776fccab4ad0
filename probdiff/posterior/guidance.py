"""The guided forms of a likelihood g(x_0): twists ψ_t(x_t) ≈ E[g(x_0) given x_t], and guided proposals.

A user states a likelihood (`observations`); here is the form of it that the filters are given. Each class is the
likelihood of one datum for x_0 as a vector in the chain's own units. Given x_t, x_0 is taken to be N(m, F·Fᵀ), with
m (S, D) and F (D, D) or (S, D, D), for S particles at once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from probdiff.types import Key

DEFENSIVE = 0.1  # share of a proposal that is the kernel itself (Hesterberg 1995)
_NEWTON_STEPS = 5
_STEP_SIZES = np.array([1.0, 0.5, 0.2, 0.05, 0.0])
_NODES = 16
_MOST_NUMBERS = 2**20  # in the matrices of a block of particles of one filter
_FEW_ROWS = 4  # up to which triangular systems are solved row by row
_LOWEST = -1e4  # the least log ψ: where it is −∞ particles could not be told apart


class Guidance(NamedTuple):
    """What a likelihood says at x_t: log ψ_t(x_t) in nats, and how it changes N(m, F·Fᵀ), the law of x_0 given x_t.

    `mean_shift` is added to the mean m, and `covariance_reduction` is taken from the covariance F·Fᵀ.
    """

    log_psi: Float[Array, " S"]
    mean_shift: Float[Array, "S D"]
    covariance_reduction: Float[Array, "*S D D"]


class GuidedLikelihood(Protocol):
    """The likelihood g of one datum, in the form that a filter is given."""

    def guidance(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> Guidance:
        """What g says at x_t of S particles, where x_0 given x_t is N(m, F·Fᵀ)."""
        ...

    def propose_x_0(
        self, mean: Float[Array, "S D"], F: Float[Array, "S D *D"], rng_key: Key
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        """A draw of x_0 (S, D) from a proposal r for each particle, and log N(x_0; m, F·Fᵀ)·g(x_0)/r(x_0) (S,).

        F may be the diagonals of diagonal ones, (S, D).
        """
        ...


class GuidedLinearGaussian(eqx.Module):
    """y = A·x_0 + ε with ε ~ N(0, R), R = noise·noiseᵀ, which may be zero: everything is in closed form."""

    y: Float[Array, " M"]
    A: Float[Array, "M D"]
    noise: Float[Array, "M M"]
    constant: Float[Array, ""]  # added to log g

    def guidance(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> Guidance:
        whiten, gain = self._gain(F)
        w = _times(whiten, self.y - mean @ self.A.T)
        log_det = jnp.sum(jnp.log(jnp.diagonal(whiten, axis1=-2, axis2=-1)), -1)
        log_psi = self.constant + log_det - 0.5 * (jnp.sum(w**2, -1) + self.y.size * math.log(2 * math.pi))
        return Guidance(log_psi, _times(gain.mT, w), gain.mT @ gain)

    def propose_x_0(
        self, mean: Float[Array, "S D"], F: Float[Array, "S D *D"], rng_key: Key
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        """A draw of x_0 given y, exact: a joint draw of both is conditioned on y (Matheron's rule); r ∝ N·g."""
        key_x, key_noise = jax.random.split(rng_key)
        z = jax.random.normal(key_x, mean.shape)
        noise = jax.random.normal(key_noise, (len(mean), self.y.size)) @ self.noise.T

        def draw(F: Array, mean: Array, z: Array, noise: Array) -> tuple[Array, Array]:
            whiten, gain = self._gain(F)
            x_0 = mean + _times(F, z)
            y = x_0 @ self.A.T + noise
            return x_0 + _times(gain.mT, _times(whiten, self.y - y)), self.guidance(mean, F).log_psi

        return _in_blocks(draw, F, mean, z, noise)

    def _gain(self, F: Float[Array, "*S D D"]) -> tuple[Float[Array, "*S M M"], Float[Array, "*S M D"]]:
        """L⁻¹ and L⁻¹·A·V, where V = F·Fᵀ and L·Lᵀ = A·V·Aᵀ + R."""
        AF = self.A @ F
        L = jnp.linalg.cholesky(AF @ AF.mT + self.noise @ self.noise.T)
        whiten = solve_lower(L, jnp.broadcast_to(jnp.eye(self.y.size), L.shape))
        return whiten, whiten @ AF @ F.mT


class GuidedMissing(eqx.Module):
    """A·x_0 is `y` in the entries that are `known`, without noise; y is zero in the others.

    A is `axes`, or the identity where that is None.
    """

    y: Float[Array, " D"]
    known: Bool[Array, " D"]
    constant: Float[Array, ""]  # added to log g
    axes: Float[Array, "D D"] | None = None

    def guidance(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> Guidance:
        return self._linear().guidance(mean, F)

    def propose_x_0(
        self, mean: Float[Array, "S D"], F: Float[Array, "S D *D"], rng_key: Key
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        """A draw of x_0 given y, exact, as that of `GuidedLinearGaussian`; entry by entry where A·F is diagonal."""
        if F.ndim == 3 or self.axes is not None:
            return self._linear().propose_x_0(mean, F, rng_key)
        z = jax.random.normal(jax.random.split(rng_key)[0], mean.shape)
        standard = jnp.where(self.known, (self.y - mean) / F, 0.0)
        log_scale = jnp.where(self.known, jnp.log(F), 0.0)
        log_psi = self.constant + jnp.sum(jax.scipy.stats.norm.logpdf(standard) - log_scale, -1)
        return jnp.where(self.known, self.y, mean + F * z), log_psi

    def _linear(self) -> GuidedLinearGaussian:
        """The same with a measurement of each entry, those that are not known being noise alone."""
        eye = jnp.eye(self.y.size)
        A = eye if self.axes is None else self.axes
        return GuidedLinearGaussian(self.y, self.known[:, None] * A, ~self.known[:, None] * eye, self.constant)


class GuidedSmooth(eqx.Module):
    """Any log g that can be differentiated twice.

    ψ_t is the mean of Laplace's approximation at the largest g(x_0)·N(x_0; m, F·Fᵀ), found by Newton, which is right
    for a narrow g, and of the mean of g over fixed nodes, which sees a g of several modes.
    """

    datum: Any
    log_g: Callable[[Float[Array, " D"], Any], Float[Array, ""]] = eqx.field(static=True)

    def guidance(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> Guidance:
        log_psi, z, values, vectors = self._laplace(mean, F)
        log_mean_at_nodes = GuidedBlackBox(self.datum, self.log_g).guidance(mean, F).log_psi
        root = F @ (vectors * jnp.sqrt(1 - 1 / values)[:, None, :])
        log_psi = jnp.logaddexp(jnp.maximum(log_psi, _LOWEST), log_mean_at_nodes) - math.log(2)
        return Guidance(log_psi, _times(F, z), root @ root.mT)

    def propose_x_0(
        self, mean: Float[Array, "S D"], F: Float[Array, "S D *D"], rng_key: Key
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        """A draw of x_0 from a mixture of Laplace's approximation and N(m, F·Fᵀ): no weight is above g/`DEFENSIVE`."""
        key_z, key_which = jax.random.split(rng_key)
        noise = jax.random.normal(key_z, mean.shape)
        defensive = jax.random.bernoulli(key_which, DEFENSIVE, (len(mean), 1))

        def draw(F: Array, mean: Array, noise: Array, defensive: Array) -> tuple[Array, Array]:
            _, mode, values, vectors = self._laplace(mean, F)
            z = jnp.where(defensive, noise, mode + _times(vectors, noise / jnp.sqrt(values)))
            x_0 = mean + _times(F, z)
            from_mode = jnp.squeeze((z - mode)[:, None, :] @ vectors, 1)
            log_laplace = 0.5 * jnp.sum(jnp.log(values) - values * from_mode**2, -1)
            log_p = -0.5 * jnp.sum(z**2, -1)
            log_r = jnp.logaddexp(math.log1p(-DEFENSIVE) + log_laplace, math.log(DEFENSIVE) + log_p)
            return x_0, jax.vmap(lambda x: self.log_g(x, self.datum))(x_0) + log_p - log_r

        return _in_blocks(draw, F, mean, noise, defensive)

    def _laplace(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> tuple[Array, Array, Array, Array]:
        """log ∫ g·N, and at the mode m + F·z: z, and eigenvalues and eigenvectors of the precision, in units of F."""

        def laplace(mean: Float[Array, " D"], F: Float[Array, "D D"]) -> tuple[Array, Array, Array, Array]:
            def log_g(z: Float[Array, " D"]) -> Float[Array, ""]:
                return self.log_g(mean + F @ z, self.datum)

            def precision(z: Float[Array, " D"]) -> tuple[Array, Array]:
                # convex parts of log g are left out, so that the mode is approached uphill
                hessian = jnp.nan_to_num(jax.hessian(log_g)(z), posinf=0.0, neginf=0.0)
                values, vectors = jnp.linalg.eigh(-hessian)
                return 1 + jnp.maximum(values, 0), vectors

            def newton(z: Float[Array, " D"], _: None) -> tuple[Float[Array, " D"], None]:
                values, vectors = precision(z)
                gradient = jnp.nan_to_num(jax.grad(log_g)(z), posinf=0.0, neginf=0.0) - z
                tried = z + _STEP_SIZES[:, None] * (vectors @ ((vectors.T @ gradient) / values))
                height = jax.vmap(log_g)(tried) - 0.5 * jnp.sum(tried**2, -1)
                return tried[jnp.argmax(jnp.where(jnp.isnan(height), -jnp.inf, height))], None

            z, _ = jax.lax.scan(newton, jnp.zeros_like(mean), length=_NEWTON_STEPS)
            values, vectors = precision(z)
            return log_g(z) - 0.5 * jnp.sum(z**2 + jnp.log(values)), z, values, vectors

        return jax.vmap(laplace, in_axes=(0, None if F.ndim == 2 else 0))(mean, F)


class GuidedBlackBox(eqx.Module):
    """log g of which only values are known: ψ_t is the mean of g over fixed nodes, and the kernel is the proposal."""

    datum: Any
    log_g: Callable[[Float[Array, " D"], Any], Float[Array, ""]] = eqx.field(static=True)

    def guidance(self, mean: Float[Array, "S D"], F: Float[Array, "*S D D"]) -> Guidance:
        nodes = jax.random.normal(jax.random.key(0), (_NODES, mean.shape[1]))
        log_g = jax.vmap(lambda z: self._values(mean + _times(F, jnp.broadcast_to(z, mean.shape))))(nodes)
        log_psi = jax.nn.logsumexp(jnp.maximum(log_g, _LOWEST), 0) - math.log(_NODES)
        return Guidance(log_psi, jnp.zeros_like(mean), jnp.zeros((mean.shape[1],) * 2))

    def propose_x_0(
        self, mean: Float[Array, "S D"], F: Float[Array, "S D *D"], rng_key: Key
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        def draw(F: Array, mean: Array, z: Array) -> tuple[Array, Array]:
            x_0 = mean + _times(F, z)
            return x_0, self._values(x_0)

        return _in_blocks(draw, F, mean, jax.random.normal(rng_key, mean.shape))

    def _values(self, x_0: Float[Array, "S D"]) -> Float[Array, " S"]:
        return jax.vmap(lambda x: self.log_g(x, self.datum))(x_0)


def as_matrix(scale: Float[Array, "S D *D"]) -> Float[Array, "S D D"]:
    """Standard deviations as diagonal matrices; matrices as they are."""
    return scale if scale.ndim == 3 else scale[..., None] * jnp.eye(scale.shape[-1])


def _in_blocks(
    draw: Callable[..., tuple[Array, Array]], F: Float[Array, "S D *D"], *of_particles: Float[Array, "S _"]
) -> tuple[Array, Array]:
    """`draw` for all particles, so many at once that their matrices are of `_MOST_NUMBERS` at most."""
    block = max(1, _MOST_NUMBERS // F.shape[-1] ** 2)
    if block >= len(F):
        return draw(as_matrix(F), *of_particles)

    def of_one(particle: tuple[Array, ...]) -> tuple[Array, Array]:
        F, *arrays = (array[None] for array in particle)
        return jax.tree.map(lambda leaf: leaf[0], draw(as_matrix(F), *arrays))

    return jax.lax.map(of_one, (F, *of_particles), batch_size=block)


def _times(matrix: Float[Array, "*S P Q"], vectors: Float[Array, "S Q"]) -> Float[Array, "S P"]:
    """One matrix for all vectors, or one for each, times each vector."""
    return vectors @ matrix.mT if matrix.ndim == 2 else jnp.einsum("spq,sq->sp", matrix, vectors)


def solve_lower(L: Float[Array, "*S P P"], b: Float[Array, "*S P Q"]) -> Float[Array, "*S P Q"]:
    """L⁻¹·b for lower triangular L; for a few rows by substitution, since XLA is slow to compile many small solves."""
    if L.shape[-1] > _FEW_ROWS:
        return solve_triangular(L, b, lower=True)
    rows: list[Array] = []
    for i in range(L.shape[-1]):
        solved = sum((L[..., i, j, None] * row for j, row in enumerate(rows)), start=jnp.zeros(()))
        rows.append((b[..., i, :] - solved) / L[..., i, i, None])
    return jnp.stack(rows, -2)
