"""The Gaussian family: the distributions of one step."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from probdiff.checks import check_count
from probdiff.families.mixtures import MixtureKernel
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Time

Covariance = Literal["fixed", "diagonal", "full"]
_APART = 0.25  # of the variance of x_0 given x_t, what the means of several components share at the start


@dataclass(frozen=True)
class Gaussian:
    """Gaussian diffusion, N3: q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I) and p(x_T) = N(0, I).

    p(x_{t−1} given x_t) is a Gaussian, or a mixture of `components` Gaussians.
    """

    event_shape: tuple[int, ...]
    covariance: Covariance
    components: int = 1
    support = constraints.real

    def __post_init__(self) -> None:
        if self.covariance not in ("fixed", "diagonal", "full"):
            raise ValueError(f'covariance is {self.covariance!r}; it must be "fixed", "diagonal" or "full"')
        if self.covariance == "full" and len(self.event_shape) != 1:
            raise ValueError(f'event_shape is {self.event_shape}; covariance="full" wants a vector, event_shape (D,)')
        check_count(self.components, "components", 1)

    @property
    def num_outputs(self) -> int:
        """Network outputs per datum: those of each component, and a weight for each of several components."""
        return self.components * self.num_outputs_of_each + (self.components if self.components > 1 else 0)

    @property
    def num_outputs_of_each(self) -> int:
        """Of each component: D for the mean, then 0, D or D·(D+1)/2 for the covariance."""
        size = math.prod(self.event_shape)
        return size + {"fixed": 0, "diagonal": size, "full": size * (size + 1) // 2}[self.covariance]

    @property
    def offsets(self) -> np.ndarray:
        """What is added to the network's outputs, (P,), so that several components differ at the start.

        Means of x_0 given x_t are spread, and variances made less by as much where they are learned, so that the
        mixture has the variance of one Gaussian and is near it. With fixed covariances it is wider by that spread.
        """
        size, M = math.prod(self.event_shape), self.components
        each = np.zeros((M, self.num_outputs_of_each))
        if M > 1:
            z = np.random.default_rng(M).standard_normal((M, size))
            z = (z - z.mean(0)) / z.std(0)
            share = _APART / math.sqrt(size)
            each[:, :size] = math.sqrt(share) * z
            each[:, size : 2 * size] = 0.5 * math.log1p(-share)
        return np.concatenate([each.ravel(), np.zeros(self.num_outputs - each.size)])

    def network_input(self, x_t: Event) -> Event:
        """x_t itself."""
        return x_t

    def step(self, x_prev: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I), N3."""
        shrink, std = noise.step(t)
        return self._isotropic(self._wide(shrink) * x_prev, std)

    def marginal(self, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_t given x_0) = N(√ᾱ_t·x_0, (1−ᾱ_t)·I)."""
        shrink, std = noise.marginal(t)
        return self._isotropic(self._wide(shrink) * x_0, std)

    def posterior(self, x_t: Event, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution:
        """q(x_{t−1} given x_t, x_0), for t ≥ 2: Gaussian with the coefficients of `NoiseLevels.posterior`."""
        of_x_0, of_x_t, std = noise.posterior(t)
        return self._isotropic(self._wide(of_x_0) * x_0 + self._wide(of_x_t) * x_t, std)

    def terminal(self, batch_shape: tuple[int, ...] = ()) -> dist.Distribution:
        """p(x_T) = N(0, I), N7."""
        return self._isotropic(jnp.zeros(batch_shape + self.event_shape), jnp.ones(()))

    def kernel(self, x_t: Event, outputs: Float[Array, "*batch P"], noise: NoiseLevels, t: Time) -> dist.Distribution:
        """p(x_{t−1} given x_t) = N(f_μ(x_t, t), f_Σ(x_t, t)), N8, or with several components Σ_m w_m·N(f_μ,m, f_Σ,m).

        f_μ is the mean of q(x_{t−1} given x_t, x̂_0) at the `predicted` x̂_0, which at outputs of zero is exact for
        standard normal data.
        f_Σ = β_t·C·Cᵀ, C lower triangular with C_ii = √(ρ_t + (1−ρ_t)·exp(2·8·tanh(b_ii/8))) and C_ij = (1−ρ_t)·b_ij,
        ρ_t as in `NoiseLevels.noise_kept`. So f_Σ is β_t·I at b = 0, and the variance of each coordinate given those
        before it lies above β_t·ρ_t, the variance when x_0 is known. For covariance "fixed" f_Σ is β_t·I throughout.

        The w_m are the softmax of the last M outputs.
        """
        if self.components == 1:
            return self._gaussian(x_t, outputs, noise, t)
        of_each, log_w = self.split(outputs)
        parts = self._gaussian(self._beside(x_t), of_each, noise, jnp.asarray(t)[..., None])
        return MixtureKernel(dist.Categorical(logits=log_w), parts)

    def split(self, outputs: Float[Array, "*batch P"]) -> tuple[Float[Array, "*batch M Q"], Float[Array, "*batch M"]]:
        """The outputs of each of several components, and the logarithms of their weights, up to a constant."""
        of_each = outputs[..., : -self.components].reshape(*outputs.shape[:-1], self.components, -1)
        return of_each, outputs[..., -self.components :]

    def _gaussian(
        self, x_t: Event, outputs: Float[Array, "*batch Q"], noise: NoiseLevels, t: Time
    ) -> dist.Distribution:
        size = math.prod(self.event_shape)
        batch_shape = outputs.shape[:-1]
        shrink, std = noise.marginal(t)
        of_x_0, of_x_t, _ = noise.posterior(t)
        # at the predicted x_0, in two products and not four
        f_mu = self._wide(of_x_0 * shrink + of_x_t) * x_t + self._wide(of_x_0 * std) * self._direction(outputs)
        _, step_std = noise.step(t)
        if self.covariance == "fixed":
            return self._isotropic(f_mu, step_std)
        step_std, rho = jnp.asarray(step_std)[..., None], jnp.asarray(noise.noise_kept(t))[..., None]
        # bounded, so that no step of an optimiser can make the diagonal overflow or vanish
        log_diagonal = 8 * jnp.tanh(outputs[..., size : 2 * size] / 8)
        scale = jnp.sqrt(step_std**2 * rho + (step_std**2 * (1 - rho)) * jnp.exp(2 * log_diagonal))
        if self.covariance == "diagonal":
            return dist.Normal(f_mu, scale.reshape(batch_shape + self.event_shape)).to_event(len(self.event_shape))
        below = (step_std * (1 - rho)) * outputs[..., 2 * size :]
        return dist.MultivariateNormal(f_mu, scale_tril=_lower(scale, below))

    def predicted(self, x_t: Event, outputs: Float[Array, "*batch P"], shrink: Array, std: Array) -> Event:
        """x̂_0 = √ᾱ_t·x_t + √(1−ᾱ_t)·a, for `shrink` √ᾱ_t and `std` √(1−ᾱ_t), a the first D outputs.

        Of several components it is the mean of theirs.
        """
        if self.components == 1:
            return self._predicted(x_t, outputs, shrink, std)
        of_each, log_w = self.split(outputs)
        each = self._predicted(self._beside(x_t), of_each, jnp.asarray(shrink)[..., None], jnp.asarray(std)[..., None])
        weights = jax.nn.softmax(log_w).reshape(*log_w.shape, *(1,) * len(self.event_shape))
        return jnp.sum(weights * each, -1 - len(self.event_shape))

    def _predicted(self, x_t: Event, outputs: Float[Array, "*batch Q"], shrink: Array, std: Array) -> Event:
        return self._wide(shrink) * x_t + self._wide(std) * self._direction(outputs)

    def clean(
        self, x_t: Event, outputs: Float[Array, "*batch P"], noise: NoiseLevels, t: Time
    ) -> tuple[Event, Float[Array, "*batch M D D"] | None]:
        """Mean x̂_0 of x_0 given x_t, and its covariance V where the `kernel` has a full one: f_Σ = β_t·ρ_t·I + a²·V.

        Both are of each of the M components, which are an axis before those of the event.
        a is the coefficient of x_0 in the mean of q(x_{t−1} given x_t, x_0). V need not be positive. With B the part of
        C below its diagonal over 1 − ρ_t, and S its diagonal, V = (1−ᾱ_t)·(diag exp(16·tanh(b_ii/8)) + S·Bᵀ + B·S +
        (1−ρ_t)·B·Bᵀ): written out so that no digits are lost where f_Σ is nearly β_t·ρ_t·I.
        """
        outputs = outputs[..., None, :] if self.components == 1 else self.split(outputs)[0]
        t = jnp.asarray(t)[..., None]
        shrink, std = noise.marginal(t)
        mean = self._predicted(self._beside(x_t), outputs, shrink, std)
        if self.covariance != "full":
            return mean, None
        size = math.prod(self.event_shape)
        rho = jnp.asarray(noise.noise_kept(t))[..., None]
        e = jnp.exp(16 * jnp.tanh(outputs[..., size : 2 * size] / 8))
        below = _lower(jnp.zeros_like(e), outputs[..., 2 * size :])
        half = below * jnp.sqrt(rho + (1 - rho) * e)[..., None, :]
        V = e[..., None] * jnp.eye(size) + half + half.mT + (1 - rho)[..., None] * below @ below.mT
        return mean, jnp.asarray(std)[..., None, None] ** 2 * V

    def _direction(self, outputs: Float[Array, "*batch P"]) -> Event:
        return outputs[..., : math.prod(self.event_shape)].reshape(outputs.shape[:-1] + self.event_shape)

    def _isotropic(self, loc: Event, std: Float[Array, "..."]) -> dist.Distribution:
        # the same class for all five, so that KL divergences between them are closed forms
        if self.covariance == "full":
            scale_tril = jnp.asarray(std)[..., None, None] * jnp.eye(self.event_shape[0])
            return dist.MultivariateNormal(loc, scale_tril=scale_tril)
        return dist.Normal(loc, self._wide(std)).to_event(len(self.event_shape))

    def _wide(self, coefficient: Float[Array, "..."]) -> Float[Array, "..."]:
        """A coefficient per datum, with an axis of length one for each axis of the event."""
        return jnp.reshape(coefficient, jnp.shape(coefficient) + (1,) * len(self.event_shape))

    def _beside(self, x: Event) -> Event:
        """x with an axis of length one for the components."""
        return jnp.expand_dims(x, -1 - len(self.event_shape))


def _lower(diagonal: Float[Array, "*batch D"], below: Float[Array, "*batch E"]) -> Float[Array, "*batch D D"]:
    """The lower triangular matrix of a diagonal and of what is below it, row by row: a scatter would be slow."""
    size = diagonal.shape[-1]
    rows = []
    for i in range(size):
        start = i * (i - 1) // 2
        zeros = jnp.zeros((*diagonal.shape[:-1], size - i - 1), diagonal.dtype)
        rows.append(jnp.concatenate([below[..., start : start + i], diagonal[..., i : i + 1], zeros], -1))
    return jnp.stack(rows, -2)
