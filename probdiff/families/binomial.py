"""The binomial family: bits that flip, as NumPyro distributions (Sohl-Dickstein et al. 2015, appendix B.2)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from probdiff.checks import check_count
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Time

_MOST_LOG_ODDS = 30.0  # that a network can give a bit of x_0


class Bits(dist.BernoulliLogits):
    """Independent bits, whose draws take a byte each."""

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        return super().sample(key, sample_shape).astype(jnp.uint8)


def _above_log(u: Array) -> Array:
    """u − log(1 + u)."""
    return u - jnp.log1p(u)


def _kl(p: Bits, q: Bits) -> Array:
    """KL = p·f((q−p)/p) + (1−p)·f((p−q)/(1−p)) with f(u) = u − log(1+u) where log-odds are near, to lose no digits."""
    a, b = jnp.asarray(p.logits), jnp.asarray(q.logits)
    p_1, p_0, near = jax.nn.sigmoid(a), jax.nn.sigmoid(-a), a + jnp.clip(b - a, -0.1, 0.1)
    # q − p, from the smaller two of the four probabilities
    more = jnp.where(a > 0, p_0 - jax.nn.sigmoid(-near), jax.nn.sigmoid(near) - p_1)
    log = jax.nn.log_sigmoid
    direct = p_1 * (log(a) - log(b)) + p_0 * (log(-a) - log(-b))
    return jnp.where(jnp.abs(b - a) < 0.1, p_1 * _above_log(more / p_1) + p_0 * _above_log(-more / p_0), direct)


kl_divergence.add((Bits, Bits), _kl)


@dataclass(frozen=True)
class Binomial:
    """Binomial diffusion: q(x_t given x_{t−1}) = Bernoulli(x_{t−1}·(1−β_t) + π·β_t) of each bit, p(x_T) = Bernoulli(π).

    π is `base_rate`. p(x_{t−1} given x_t) is a product over bits, or a mixture of `components` products.
    """

    event_shape: tuple[int, ...]
    base_rate: float
    components: int
    support = constraints.boolean

    def __post_init__(self) -> None:
        rate, components = self.base_rate, self.components
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.floating) or not 0 < rate < 1:
            raise ValueError(f"base_rate is {rate!r}; it must be a number between 0 and 1")
        check_count(components, "components", 1)

    @property
    def num_outputs(self) -> int:
        """Network outputs per datum: D log-odds for each component, and a weight for each of several components."""
        M = self.components
        return M * math.prod(self.event_shape) + (M if M > 1 else 0)

    def network_input(self, x_t: Event) -> Event:
        """Bits as −1 and 1."""
        return 2 * x_t.astype(jnp.result_type(float)) - 1

    def step(self, x_prev: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_t given x_{t−1}): Bernoulli(x_{t−1}·(1−β_t) + π·β_t)."""
        return self._bits(self._log_odds(x_prev, 1.0 - x_prev, noise.beta[jnp.asarray(t) - 1]))

    def marginal(self, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_t given x_0): Bernoulli(x_0·ᾱ_t + π·(1−ᾱ_t))."""
        return self._bits(self._log_odds(x_0, 1.0 - x_0, self._noise(noise, t)))

    def posterior(self, x_t: Event, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_{t−1} given x_t, x_0), for t ≥ 2: ∝ q(x_t given x_{t−1})·q(x_{t−1} given x_0)."""
        return self._bits(self._posterior(x_t, x_0, 1.0 - x_0, noise, t))

    def terminal(self, batch_shape: tuple[int, ...] = ()) -> dist.Distribution:
        """p(x_T): Bernoulli(π)."""
        return self._bits(jnp.full(batch_shape + self.event_shape, self._base_log_odds))

    def kernel(self, x_t: Event, outputs: Float[Array, "*batch P"], noise: NoiseLevels, t: Time) -> dist.Distribution:
        """p(x_{t−1} given x_t) ∝ q(x_t given x_{t−1})·Σ q(x_{t−1} given x_0)·r(x_0), each bit of x_0 summed over.

        r = Bernoulli(σ(logit π + a)), a = 30·tanh(outputs/30): what the network says of a bit of x_0, but for what the
        same bit of x_t says. It is exact where r is the probability given all other bits of x_t; at outputs of zero for
        data of independent bits of rate π. With several components, a mixture of such products, whose weights are the
        last outputs; fixed offsets of a make the components differ at the start.
        """
        size, M, axes = math.prod(self.event_shape), self.components, len(self.event_shape)
        log_odds = outputs[..., : M * size].reshape(*outputs.shape[:-1], *((M,) if M > 1 else ()), *self.event_shape)
        if M > 1:
            log_odds = log_odds + jax.random.normal(jax.random.key(M), (M, *self.event_shape), jnp.float32)
            x_t = jnp.expand_dims(x_t, -1 - axes)
            t = jnp.asarray(t)[..., None]
        a = self._base_log_odds + _MOST_LOG_ODDS * jnp.tanh(log_odds / _MOST_LOG_ODDS)
        logits = self._posterior(x_t, jax.nn.sigmoid(a), jax.nn.sigmoid(-a), noise, t)
        return self._bits(logits) if M == 1 else self._mixture(outputs[..., M * size :], logits)

    @property
    def _base_log_odds(self) -> float:
        return math.log(self.base_rate) - math.log1p(-self.base_rate)

    def _noise(self, noise: NoiseLevels, t: Time) -> Float[Array, "..."]:
        """1 − ᾱ_t."""
        return -jnp.expm1(noise.log_alpha_bar[jnp.asarray(t)])

    def _log_odds(self, one: Array, zero: Array, b: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-odds of Bernoulli(x·(1−b) + π·b) for probabilities `one` and `zero` of x."""
        b = self._wide(b)
        return jnp.log(one * (1 - b) + self.base_rate * b) - jnp.log(zero * (1 - b) + (1 - self.base_rate) * b)

    def _posterior(self, x_t: Event, one: Array, zero: Array, noise: NoiseLevels, t: Time) -> Float[Array, "..."]:
        """Log-odds of x_{t−1} given x_t, for probabilities `one` and `zero` of x_0."""
        beta, rate = self._wide(noise.beta[jnp.asarray(t) - 1]), self.base_rate
        of_one = jnp.log1p(-(1 - rate) * beta) - jnp.log(rate * beta)
        of_zero = jnp.log((1 - rate) * beta) - jnp.log1p(-rate * beta)
        return self._log_odds(one, zero, self._noise(noise, jnp.asarray(t) - 1)) + jnp.where(x_t > 0, of_one, of_zero)

    def _bits(self, logits: Float[Array, "..."]) -> dist.Distribution:
        return Bits(logits).to_event(len(self.event_shape))

    def _mixture(self, log_weights: Array, logits: Array) -> dist.Distribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=log_weights), self._bits(logits))

    def _wide(self, coefficient: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.reshape(coefficient, jnp.shape(coefficient) + (1,) * len(self.event_shape))
