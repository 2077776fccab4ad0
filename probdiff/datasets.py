"""Seeded data sets, with their exact log density wherever there is one, and reading a user's table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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

    def sample(self, rng_key: Key, n: int) -> Float[Array, "n D"]: ...
    def log_prob(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]: ...


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

    def log_prob(self, x: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
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

        x = jnp.asarray(x)
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
