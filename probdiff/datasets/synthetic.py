"""Seeded data sets whose exact log density is known."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from probdiff.types import Key


class Density(Protocol):
    """A data set that can be drawn from and whose log density is known."""

    def sample(self, rng_key: Key, n: int) -> Array: ...
    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]: ...


@dataclass(frozen=True)
class SwissRoll:
    """The swiss roll's spiral in the plane, scaled to unit variance.

    x = (s·cos s, s·sin s) + `noise`·ε with s uniform on [3π/2, 9π/2] and ε standard normal, then less
    the mean and over the standard deviation of each coordinate, both exact. `noise` is in the units
    of scikit-learn's `make_swiss_roll`. Raises `ValueError` where it is not positive.
    """

    noise: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is {self.noise}; it must be positive and finite")

    def sample(self, rng_key: Key, n: int) -> Float[Array, "n 2"]:
        """n draws, shape (n, 2)."""
        key_s, key_noise = jax.random.split(rng_key)
        s = jax.random.uniform(key_s, (n, 1), minval=1.5 * math.pi, maxval=4.5 * math.pi)
        spiral = jnp.concatenate([s * jnp.cos(s), s * jnp.sin(s)], axis=1)
        return (spiral + self.noise * jax.random.normal(key_noise, (n, 2)) - self._mean) / self._std

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """log ∫ N(x given spiral(s), noise) ds / 3π in nats, by Gauss–Legendre panels finer than the noise."""
        panels = math.ceil(90 / self.noise) + 8  # the spiral is 89 long
        nodes, weights = np.polynomial.legendre.leggauss(8)
        edges = np.linspace(1.5 * np.pi, 4.5 * np.pi, panels + 1)
        s = (0.5 * (edges[1:] + edges[:-1])[:, None] + 0.5 * np.diff(edges)[:, None] * nodes).ravel()
        log_weights = jnp.asarray(np.log(np.tile(weights / 2 / panels, panels)))
        centres = jnp.asarray((np.stack([s * np.cos(s), s * np.sin(s)], 1) - self._mean) / self._std)
        scale = jnp.asarray(self.noise / self._std)
        log_normaliser = -math.log(2 * math.pi) - math.log(scale[0] * scale[1])

        def one(point: Float[Array, " 2"]) -> Float[Array, ""]:
            squared = jnp.sum(((point - centres) / scale) ** 2, axis=-1)
            return jax.nn.logsumexp(log_weights - 0.5 * squared) + log_normaliser

        x = _points(x, 2)
        flat = jax.lax.map(one, x.reshape(-1, 2), batch_size=1024)
        return flat.reshape(x.shape[:-1])

    @property
    def _mean(self) -> np.ndarray:
        # E[s·cos s] and E[s·sin s] over [3π/2, 9π/2]
        return np.array([2.0, 2 / (3 * math.pi)])

    @property
    def _std(self) -> np.ndarray:
        def second_moments(s: float) -> np.ndarray:  # ∫ s² cos² s and ∫ s² sin² s
            wave = (2 * s**2 - 1) * math.sin(2 * s) / 8 + s * math.cos(2 * s) / 4
            return np.array([s**3 / 6 + wave, s**3 / 6 - wave])

        moments = (second_moments(4.5 * math.pi) - second_moments(1.5 * math.pi)) / (3 * math.pi)
        return np.sqrt(moments - self._mean**2 + self.noise**2)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Σ_k w_k N(m_k, S_k) in any D.

    `weights` (K,), positive and summing to 1; `means` (K, D); `covariances` (K, D, D), positive definite.
    Raises `ValueError` where they are not.
    """

    weights: ArrayLike
    means: ArrayLike
    covariances: ArrayLike

    def __post_init__(self) -> None:
        weights, means, covariances = (np.asarray(a, float) for a in (self.weights, self.means, self.covariances))
        k = weights.size
        if weights.ndim != 1 or k == 0 or np.any(weights <= 0) or abs(weights.sum() - 1) > 1e-6:
            raise ValueError(f"weights is {weights}; it must be a vector of positive numbers that sum to 1")
        if means.ndim != 2 or len(means) != k:
            raise ValueError(f"means has shape {means.shape}; with {k} weights it must be ({k}, D)")
        if covariances.shape != (*means.shape, means.shape[1]):
            raise ValueError(f"covariances has shape {covariances.shape}; it must be {(*means.shape, means.shape[1])}")
        if not np.allclose(covariances, np.swapaxes(covariances, 1, 2)) or np.linalg.eigvalsh(covariances).min() <= 0:
            raise ValueError("covariances must be symmetric and positive definite")

    @property
    def distribution(self) -> dist.Distribution:
        """The mixture as a NumPyro distribution."""
        components = dist.MultivariateNormal(jnp.asarray(self.means), jnp.asarray(self.covariances))
        return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(self.weights)), components)

    def sample(self, rng_key: Key, n: int) -> Float[Array, "n D"]:
        """n draws, shape (n, D)."""
        return self.distribution.sample(rng_key, (n,))

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """log Σ_k w_k N(x given m_k, S_k), nats."""
        return self.distribution.log_prob(_points(x, np.shape(self.means)[1]))


@dataclass(frozen=True)
class Heartbeat:
    """`length` bits with a pulse at every `period`-th, at a random phase (Sohl-Dickstein et al. 2015).

    `period` sequences are equally likely, so the entropy is log `period` nats. Raises `ValueError` where `period` is
    not between 2 and `length`.
    """

    length: int = 20
    period: int = 5

    def __post_init__(self) -> None:
        if not 2 <= self.period <= self.length:
            raise ValueError(f"period is {self.period}; it must be from 2 to length, {self.length}")

    @property
    def sequences(self) -> np.ndarray:
        """All of them, (period, length), bytes."""
        return (np.arange(self.length) % self.period == np.arange(self.period)[:, None]).astype(np.uint8)

    def sample(self, rng_key: Key, n: int) -> Array:
        """n draws, shape (n, length), bytes."""
        return jnp.asarray(self.sequences)[jax.random.randint(rng_key, (n,), 0, self.period)]

    def log_prob(self, x: ArrayLike) -> Float[Array, "*batch"]:
        """−log `period` of one of the sequences, −∞ of others; nats."""
        is_one = jnp.all(_points(x, self.length)[..., None, :] == self.sequences, -1).any(-1)
        return jnp.where(is_one, -math.log(self.period), -jnp.inf)


def _points(x: ArrayLike, size: int) -> Float[Array, "*batch D"]:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(f"x has shape {x.shape}; its last axis must be of length {size}")
    return x


def eight_gaussians(radius: float = 2.0, scale: float = 0.15) -> GaussianMixture:
    """Eight equal Gaussians of standard deviation `scale`, evenly spaced on a circle of `radius`."""
    angle = np.arange(8) * np.pi / 4
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return GaussianMixture(np.full(8, 1 / 8), means, np.tile(scale**2 * np.eye(2), (8, 1, 1)))
