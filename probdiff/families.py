"""A family of diffusions: its forward kernel and what follows from it, as NumPyro distributions.

The chains know a family by five distributions: `step` q(x_t given x_{t−1}), `marginal` q(x_t given
x_0), `posterior` q(x_{t−1} given x_t, x_0), `prior` p(x_T), and `kernel` p(x_{t−1} given x_t), which
reads the `num_outputs` numbers that the network gives for each x_t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from numpyro.distributions.kl import kl_divergence

from probdiff.datasets import check_data, check_varies
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Key, Time

Covariance = Literal["fixed", "diagonal", "full"]


class Family(Protocol):
    """What the chains know of a family; `Gaussian` and `binomial.Binomial` are two."""

    reparametrised: bool  # whether draws of it carry a gradient

    @property
    def dtype(self) -> Any: ...  # of x_t
    @property
    def num_outputs(self) -> int: ...
    @property
    def options(self) -> dict[str, Any]: ...
    def checked(self, x: ArrayLike, name: str, minimum: int = 1) -> np.ndarray: ...
    def units(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def state(self, x: Any) -> Event: ...
    def network_input(self, x_t: Event) -> Event: ...
    def step(self, x_prev: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def marginal(self, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def posterior(self, x_t: Event, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def prior(self, batch_shape: tuple[int, ...] = ()) -> dist.Distribution: ...
    def as_kernel(self, prior: dist.Distribution) -> dist.Distribution: ...
    def kernel(self, x_t: Event, outputs: Array, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def twist_points(
        self, x_0: Event, noise: NoiseLevels, t: Time, rng_key: Key, n: int
    ) -> tuple[Array, Array, Array]: ...
    def twist_products(self, most: int) -> tuple[Array, Array]: ...
    def tilted(self, p: dist.Distribution, twist: "Twist") -> tuple[dist.Distribution, Array]: ...


class Twist(NamedTuple):
    """log ψ(x) = constant + linear·z − ½ zᵀ·curvature·z at z = (x − loc)/std, x flat of size D.

    `loc` (D,), `std` () or (D,), `linear` (D,); `curvature` (D, D), or (D,) where it is diagonal, not negative.
    """

    loc: Float[Array, " D"]
    std: Float[Array, "*D"]
    constant: Float[Array, ""]
    linear: Float[Array, " D"]
    curvature: Float[Array, "D *D"]

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        z = (x - self.loc) / self.std
        bent = z * self.curvature if self.curvature.ndim == 1 else z @ self.curvature
        return self.constant + z @ self.linear - 0.5 * jnp.sum(bent * z, -1)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian diffusion, N3: q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I) and p(x_T) = N(0, I)."""

    event_shape: tuple[int, ...]
    covariance: Covariance
    reparametrised = True

    def __post_init__(self) -> None:
        if self.covariance not in ("fixed", "diagonal", "full"):
            raise ValueError(f'covariance is {self.covariance!r}; it must be "fixed", "diagonal" or "full"')
        if self.covariance == "full" and len(self.event_shape) != 1:
            raise ValueError(f'event_shape is {self.event_shape}; covariance="full" wants a vector, event_shape (D,)')

    @property
    def options(self) -> dict[str, Any]:
        """What tells one Gaussian family from another."""
        return {"covariance": self.covariance}

    def checked(self, x: ArrayLike, name: str, minimum: int = 1) -> np.ndarray:
        """Data as the family wants them, (N, *event_shape); raises as `datasets.check_data`."""
        return check_data(x, self.event_shape, name, minimum)

    def units(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the chain's own units have zero and one: mean and standard deviation of each feature of x.

        Raises `ValueError` for a feature that does not vary.
        """
        check_varies(x, "x")
        return x.mean(0), x.std(0)

    @property
    def num_outputs(self) -> int:
        """Network outputs per datum: D for the mean, then 0, D or D·(D+1)/2 for the covariance."""
        size = math.prod(self.event_shape)
        return size + {"fixed": 0, "diagonal": size, "full": size * (size + 1) // 2}[self.covariance]

    @property
    def dtype(self) -> Any:
        return jnp.result_type(float)

    def state(self, x: Any) -> Event:
        """x as the chain keeps it. Raises `TypeError` for integers."""
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"x_0 has dtype {jnp.result_type(x)}; a Gaussian diffusion wants floating-point data")
        return jnp.asarray(x, self.dtype)

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

    def prior(self, batch_shape: tuple[int, ...] = ()) -> dist.Distribution:
        """p(x_T) = N(0, I), N7."""
        return self._isotropic(jnp.zeros(batch_shape + self.event_shape), jnp.ones(()))

    def as_kernel(self, prior: dist.Distribution) -> dist.Distribution:
        """The prior in the form of a kernel, for a site that is the one or the other."""
        return prior

    def kernel(self, x_t: Event, outputs: Float[Array, "*batch P"], noise: NoiseLevels, t: Time) -> dist.Distribution:
        """p(x_{t−1} given x_t) = N(f_μ(x_t, t), f_Σ(x_t, t)), N8.

        f_μ is the mean of q(x_{t−1} given x_t, x̂_0) at the `predicted` x̂_0, which at outputs of zero is exact for
        standard normal data.
        f_Σ = β_t·M·Mᵀ, M lower triangular with M_ii = √(ρ_t + (1−ρ_t)·exp(2·8·tanh(b_ii/8))) and M_ij = (1−ρ_t)·b_ij,
        ρ_t as in `NoiseLevels.noise_kept`. So f_Σ is β_t·I at b = 0, and the variance of each coordinate given those
        before it lies above β_t·ρ_t, the variance when x_0 is known. For covariance "fixed" f_Σ is β_t·I throughout.
        """
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
        rows, columns = jnp.tril_indices(size, -1)
        below = (step_std * (1 - rho)) * outputs[..., 2 * size :]
        scale_tril = scale[..., None] * jnp.eye(size)
        return dist.MultivariateNormal(f_mu, scale_tril=scale_tril.at[..., rows, columns].set(below))

    def predicted(self, x_t: Event, outputs: Float[Array, "*batch P"], shrink: Array, std: Array) -> Event:
        """x̂_0 = √ᾱ_t·x_t + √(1−ᾱ_t)·a, for `shrink` √ᾱ_t and `std` √(1−ᾱ_t), a the first D outputs."""
        return self._wide(shrink) * x_t + self._wide(std) * self._direction(outputs)

    def clean(
        self, x_t: Event, outputs: Float[Array, "*batch P"], noise: NoiseLevels, t: Time
    ) -> tuple[Event, Float[Array, "*batch D D"] | None]:
        """Mean x̂_0 of x_0 given x_t, and its covariance V where the `kernel` has a full one: f_Σ = β_t·ρ_t·I + a²·V.

        a is the coefficient of x_0 in the mean of q(x_{t−1} given x_t, x_0). V need not be positive. With B the part of
        M below its diagonal over 1 − ρ_t, and S its diagonal, V = (1−ᾱ_t)·(diag exp(16·tanh(b_ii/8)) + S·Bᵀ + B·S +
        (1−ρ_t)·B·Bᵀ): written out so that no digits are lost where f_Σ is nearly β_t·ρ_t·I.
        """
        shrink, std = noise.marginal(t)
        mean = self.predicted(x_t, outputs, shrink, std)
        if self.covariance != "full":
            return mean, None
        size = math.prod(self.event_shape)
        rho = jnp.asarray(noise.noise_kept(t))[..., None]
        e = jnp.exp(16 * jnp.tanh(outputs[..., size : 2 * size] / 8))
        rows, columns = jnp.tril_indices(size, -1)
        below = jnp.zeros((*e.shape, size)).at[..., rows, columns].set(outputs[..., 2 * size :])
        half = below * jnp.sqrt(rho + (1 - rho) * e)[..., None, :]
        V = e[..., None] * jnp.eye(size) + half + half.mT + (1 - rho)[..., None] * below @ below.mT
        return mean, jnp.asarray(std)[..., None, None] ** 2 * V

    def twist_points(
        self, x_0: Event, noise: NoiseLevels, t: Time, rng_key: Key, n: int
    ) -> tuple[Float[Array, "n D"], Float[Array, " D"], Float[Array, ""]]:
        """n draws of x_t, flat, from q(x_t given x_0), and their mean and standard deviation; see `Twist`."""
        shrink, std = noise.marginal(t)
        loc = shrink * jnp.ravel(x_0)
        return loc + std * jax.random.normal(rng_key, (n, x_0.size)), loc, std

    def twist_products(self, most: int) -> tuple[Array, Array]:
        """Pairs of features whose products a `Twist` may have: all for at most `most` features, else squares alone."""
        size = math.prod(self.event_shape)
        return jnp.triu_indices(size) if size <= most else (jnp.arange(size), jnp.arange(size))

    def tilted(self, p: dist.Distribution, twist: Twist) -> tuple[dist.Distribution, Float[Array, "*batch"]]:
        """p(x)·ψ(x)/∫p·ψ, over x as a vector, and log ∫ p(x)·ψ(x) dx, for a `kernel` or a `prior` p: again a Gaussian.

        In z, where p has mean m and covariance V = L·Lᵀ, the covariance becomes V̂ = (V⁻¹ + curvature)⁻¹ =
        L·(I + Lᵀ·curvature·L)⁻¹·Lᵀ and the mean m + V̂·(linear − curvature·m).
        """
        loc, std, b, A = twist.loc, twist.std, twist.linear, twist.curvature
        flat = (*p.batch_shape, -1)
        m, v = (p.mean.reshape(flat) - loc) / std, p.variance.reshape(flat) / std**2
        full = isinstance(p, dist.MultivariateNormal)
        if A.ndim == 1 and not full:
            g = 1 + A * v
            slope = b - A * m
            log_mass = jnp.sum(m * (b - 0.5 * A * m) + 0.5 * (v * slope**2 / g - jnp.log(g)), -1)
            tilted = dist.Normal(loc + std * (m + v * slope / g), std * jnp.sqrt(v / g)).to_event(1)
            return tilted, twist.constant + log_mass
        A = jnp.diag(A) if A.ndim == 1 else A
        L = p.scale_tril / std if full else jnp.sqrt(v)[..., None] * jnp.eye(loc.size)
        slope = b - m @ A
        R = jnp.linalg.cholesky(jnp.eye(loc.size) + L.mT @ A @ L)
        F = solve_triangular(R, L.mT, lower=True).mT  # F·Fᵀ = V̂
        u = jnp.squeeze(slope[..., None, :] @ F, -2)
        log_det = jnp.sum(jnp.log(jnp.diagonal(R, axis1=-2, axis2=-1)), -1)
        log_mass = jnp.sum(m * (b - 0.5 * m @ A), -1) + 0.5 * jnp.sum(u**2, -1) - log_det
        mean = m + jnp.squeeze(F @ u[..., None], -1)
        tril = jnp.linalg.qr(F.mT, mode="r").mT  # not the Cholesky factor of F·Fᵀ, which rounding can make singular
        tril = tril * jnp.where(jnp.diagonal(tril, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
        return dist.MultivariateNormal(loc + std * mean, scale_tril=std * tril), twist.constant + log_mass

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


def expected_log_ratio(
    q: dist.Distribution, p: dist.Distribution, draw: Callable[[], Event]
) -> tuple[Array, Array | float]:
    """E_q[log p(x) − log q(x)] in closed form and zero; where there is none, its value at a draw, and log q of that."""
    try:
        return -kl_divergence(q, p), 0.0
    except NotImplementedError:
        x = draw()
        log_q = q.log_prob(x)
        return p.log_prob(x) - log_q, log_q


class ForwardStep(dist.Independent):
    """q(x_t given x_{t−1}) at a site of the forward order, whose KL divergence to p's kernel is no term of the ELBO.

    `TraceMeanField_ELBO` would take it for one with no more than a warning, so it is refused here.
    """

    def __init__(self, step: dist.Distribution) -> None:
        super().__init__(step, 0)

    def expand(self, batch_shape: tuple[int, ...]) -> "ForwardStep":
        return ForwardStep(self.base_dist.expand(batch_shape))


def _refuse_forward_order(q: ForwardStep, p: dist.Distribution) -> Array:
    raise ValueError(
        "TraceMeanField_ELBO needs a guide in the order of the model, x_T to x_1: "
        "use forward_posterior as the guide, or Trace_ELBO with forward"
    )


# one entry for each second argument that NumPyro has a rule for, so that no rule is ambiguous
for _kind in {dist.Distribution, *(p for _, p in kl_divergence.funcs)}:
    kl_divergence.add((ForwardStep, _kind), _refuse_forward_order)
