"""β_t, ᾱ_t and the log-SNR of a forward chain: fixed schedules and learned ones.

A schedule is called inside a NumPyro program. It declares its parameters, if any, and returns
the chain's `NoiseLevels`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from probdiff.checks import check_count
from probdiff.types import Time

_LARGEST_BETA = 0.999  # of the schedules that rise to 1
# of a learned schedule: where β_t is near 1 the step keeps no signal and the ELBO is flat, so that β_t would stay there
_LARGEST_INITIAL_BETA = 0.5
_LEAST_NOISE = 1e-10  # of a learned schedule's first step: with less, float32 has no digits for x_1 − x_0


class Schedule(Protocol):
    """What gives the noise levels of a chain, called without arguments inside a NumPyro program."""

    @property
    def num_timesteps(self) -> int: ...
    def __call__(self) -> "NoiseLevels": ...


class NoiseLevels(eqx.Module):
    """The noise of a forward chain at t = 1…T, in log space.

    ᾱ_t = ∏_{s≤t} (1 − β_s), ᾱ_0 = 1; log-SNR_t = log ᾱ_t − log(1 − ᾱ_t).

    `beta` and `log_alpha` = log(1 − β_t) have shape (T,), `log_alpha_bar` has shape (T + 1,).
    Methods take t as an integer or an integer array and return an array of t's shape.
    """

    beta: Float[Array, " T"]
    log_alpha: Float[Array, " T"]
    log_alpha_bar: Float[Array, " T+1"]

    @property
    def alpha_bar(self) -> Float[Array, " T+1"]:
        return jnp.exp(self.log_alpha_bar)

    @property
    def log_snr(self) -> Float[Array, " T"]:
        """Log-SNR at t = 1…T, shape (T,)."""
        log_alpha_bar = self.log_alpha_bar[..., 1:]
        return log_alpha_bar - jnp.log(-jnp.expm1(log_alpha_bar))

    def step(self, t: Time) -> tuple[Array, Array]:
        """√(1−β_t) and √β_t: mean coefficient and standard deviation of q(x_t given x_{t−1}), N3."""
        index = jnp.asarray(t) - 1
        return jnp.exp(0.5 * self.log_alpha[index]), jnp.sqrt(self.beta[index])

    def marginal(self, t: Time) -> tuple[Array, Array]:
        """√ᾱ_t and √(1−ᾱ_t): mean coefficient and standard deviation of q(x_t given x_0)."""
        log_alpha_bar = self.log_alpha_bar[jnp.asarray(t)]
        return jnp.exp(0.5 * log_alpha_bar), jnp.sqrt(-jnp.expm1(log_alpha_bar))

    def noise_kept(self, t: Time) -> Float[Array, "..."]:
        """ρ_t = (1−ᾱ_{t−1}) / (1−ᾱ_t), so that q(x_{t−1} given x_t, x_0) has variance β_t·ρ_t."""
        index = jnp.asarray(t)
        return jnp.expm1(self.log_alpha_bar[index - 1]) / jnp.expm1(self.log_alpha_bar[index])

    def posterior(self, t: Time) -> tuple[Array, Array, Array]:
        """Coefficients of x_0 and x_t in the mean of q(x_{t−1} given x_t, x_0), and its standard deviation.

        √ᾱ_{t−1}·β_t / (1−ᾱ_t), √(1−β_t)·ρ_t and √(β_t·ρ_t) with ρ_t = (1−ᾱ_{t−1}) / (1−ᾱ_t).
        At t = 1 they are 1, 0 and 0.
        """
        index = jnp.asarray(t)
        beta, rho = self.beta[index - 1], self.noise_kept(t)
        coefficient_of_x_0 = jnp.exp(0.5 * self.log_alpha_bar[index - 1]) * beta / -jnp.expm1(self.log_alpha_bar[index])
        # √0 has no gradient, and at t = 1 none is wanted
        variance = beta * rho
        std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
        return coefficient_of_x_0, jnp.exp(0.5 * self.log_alpha[index - 1]) * rho, std


@jax.jit
def from_beta(beta: Float[Array, " T"]) -> NoiseLevels:
    """Noise levels of β_1…β_T, shape (T,)."""
    log_alpha = jnp.log1p(-beta)
    return NoiseLevels(beta, log_alpha, jnp.concatenate([jnp.zeros_like(beta[:1]), jnp.cumsum(log_alpha)]))


def _checked_beta(beta: object) -> np.ndarray:
    array = np.asarray(beta, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"beta has shape {array.shape}; it must be (T,) with T at least 1")
    outside = np.flatnonzero(~((array > 0) & (array < 1)))
    if outside.size:
        t = int(outside[0])
        raise ValueError(f"beta[{t}] is {array[t]:g}; every β_t must lie strictly between 0 and 1")
    return array


@dataclass(frozen=True, eq=False)
class Fixed:
    """A schedule whose β_t are given and not learned.

    `beta` has shape (T,), each in (0, 1), else `ValueError`. The coefficients are worked out in
    float64 and rounded once.
    """

    beta: np.ndarray

    def __init__(self, beta: object) -> None:
        object.__setattr__(self, "beta", _checked_beta(beta))

    @property
    def num_timesteps(self) -> int:
        return len(self.beta)

    def __call__(self) -> NoiseLevels:
        return _constant_levels(self.beta)


def _constant_levels(beta: np.ndarray) -> NoiseLevels:
    with np.errstate(divide="ignore"):  # the harmonic schedule ends at β_T = 1
        log_alpha = np.log1p(-beta)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(log_alpha)])
    dtype = jnp.result_type(float)
    return NoiseLevels(jnp.asarray(beta, dtype), jnp.asarray(log_alpha, dtype), jnp.asarray(log_alpha_bar, dtype))


def linear(num_timesteps: int, first: float = 1e-4, last: float = 0.02) -> Fixed:
    """β_t linear in t from `first` to `last`, both scaled by 1000/T (Ho, Jain and Abbeel 2020).

    The scaling keeps ᾱ_T near that of T = 1000; a β_t that would pass 0.999 is held there.
    Raises `ValueError` where T < 1 or an end point is outside (0, 1).
    """
    check_count(num_timesteps, "num_timesteps", 1)
    first, last = _checked_beta([first, last]).tolist()
    return Fixed(np.minimum(np.linspace(first, last, num_timesteps) * 1000 / num_timesteps, _LARGEST_BETA))


def cosine(num_timesteps: int, offset: float = 0.008) -> Fixed:
    """ᾱ_t = f(t)/f(0), f(t) = cos²(π/2·(t/T + s)/(1 + s)), β_t at most 0.999 (Nichol and Dhariwal 2021, eq. 17).

    Raises `ValueError` where T < 1 or the offset s is negative.
    """
    check_count(num_timesteps, "num_timesteps", 1)
    if not offset >= 0:
        raise ValueError(f"offset is {offset}; it must not be negative")
    angle = 0.5 * np.pi * (np.arange(num_timesteps + 1) / num_timesteps + offset) / (1 + offset)
    alpha_bar = np.cos(angle) ** 2
    return Fixed(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], _LARGEST_BETA))


def log_snr_linear(num_timesteps: int, first: float = 5.0, last: float = -2.0) -> Fixed:
    """log-SNR_t linear in t from `first` at t = 1 to `last` at t = T.

    Raises `ValueError` where T < 1 or the log-SNR would not fall.
    """
    check_count(num_timesteps, "num_timesteps", 1)
    if not first > last:
        raise ValueError(f"first is {first} and last is {last}; the log-SNR must fall")
    log_snr = np.linspace(first, last, num_timesteps) if num_timesteps > 1 else np.array([last])
    alpha_bar = np.concatenate([[1.0], 1 / (1 + np.exp(-log_snr))])
    return Fixed(1 - alpha_bar[1:] / alpha_bar[:-1])


@dataclass(frozen=True, eq=False)
class _Harmonic:
    num_timesteps: int

    @property
    def beta(self) -> np.ndarray:
        return 1.0 / np.arange(self.num_timesteps, 0, -1)

    def __call__(self) -> NoiseLevels:
        return _constant_levels(self.beta)


def harmonic(num_timesteps: int) -> _Harmonic:
    """β_t = 1/(T − t + 1), which removes an equal share 1/T of the data at each step (Sohl-Dickstein et al. 2015).

    β_T = 1 exactly, so x_T is noise alone and the terminal term of the ELBO is zero.
    Raises `ValueError` where T < 1.
    """
    check_count(num_timesteps, "num_timesteps", 1)
    return _Harmonic(int(num_timesteps))


@dataclass(frozen=True, eq=False)
class LearnedBetas:
    """One free parameter per step: the NumPyro param "beta" of shape (T,), constrained to (10⁻¹⁰, 1), N4.

    `initial` is a schedule, such as `cosine(num_timesteps)`, or T values in (0, 1), by default `log_snr_linear`, which
    begins at 5, and at 1 + T where that is less.
    A schedule's β_t above 0.5 start there; T values start where they are, or at 2·10⁻¹⁰.
    Raises `ValueError` where T < 1 or `initial` does not fit.
    """

    num_timesteps: int
    initial: Any = None

    def __post_init__(self) -> None:
        check_count(self.num_timesteps, "num_timesteps", 1)
        first = min(5.0, 1.0 + self.num_timesteps)
        initial = log_snr_linear(self.num_timesteps, first) if self.initial is None else self.initial
        beta = np.minimum(initial.beta, _LARGEST_INITIAL_BETA) if hasattr(initial, "beta") else initial
        beta = np.maximum(_checked_beta(beta), 2 * _LEAST_NOISE)
        if len(beta) != self.num_timesteps:
            raise ValueError(f"initial has {len(beta)} values; num_timesteps is {self.num_timesteps}")
        object.__setattr__(self, "initial", beta)

    def __call__(self) -> NoiseLevels:
        # with its dtype: JAX knows a constant by identity, in the precision of the program that had it first
        initial = jnp.asarray(self.initial, jnp.result_type(float))
        return from_beta(numpyro.param("beta", initial, constraint=constraints.interval(_LEAST_NOISE, 1.0)))


@dataclass(frozen=True, eq=False)
class LearnedSNR:
    """A monotone learned log-SNR γ(t/T) with learned end points, usable at any T without new parameters.

    γ(u) = γ_0 − s·F(u), where F is a piecewise linear distribution function on [0, 1] with
    `num_knots` pieces of learned mass. Then ᾱ_t = σ(γ(t/T)) and
    β_t = (1 − ᾱ_t)·(1 − exp(γ(t/T) − γ((t−1)/T))) (Kingma et al. 2021, appendix A), β_1 = 1 − ᾱ_1.

    NumPyro params: "log_snr_start" γ_0, "log_snr_span" s > 0, "log_snr_shares" (num_knots,) on the simplex.
    The initial γ is linear from 8 to −2; as γ_0 rises beyond 22, γ is bent to begin below 23.03 (1 − ᾱ of 10⁻¹⁰).
    Raises `ValueError` where T < 1 or num_knots < 2.
    """

    num_timesteps: int
    num_knots: int = 16

    def __post_init__(self) -> None:
        check_count(self.num_timesteps, "num_timesteps", 1)
        check_count(self.num_knots, "num_knots", 2)

    def __call__(self) -> NoiseLevels:
        start = numpyro.param("log_snr_start", jnp.asarray(8.0))
        start -= jax.nn.softplus(8 * (start + np.log(_LEAST_NOISE))) / 8
        span = numpyro.param("log_snr_span", jnp.asarray(10.0), constraint=constraints.positive)
        uniform = jnp.full(self.num_knots, 1 / self.num_knots)
        shares = numpyro.param("log_snr_shares", uniform, constraint=constraints.simplex)
        # the share of each piece that lies in each step is known exactly, so that the drop
        # of the log-SNR in a step is never a difference of two nearly equal numbers
        grid = np.arange(self.num_timesteps + 1)[:, None] / self.num_timesteps * self.num_knots
        covered = np.clip(grid - np.arange(self.num_knots), 0.0, 1.0)
        drop = span * (jnp.asarray(np.diff(covered, axis=0)) @ shares)
        log_snr = start - span * (jnp.asarray(covered[1:]) @ shares)
        beta = jax.nn.sigmoid(-log_snr) * jnp.where(jnp.arange(self.num_timesteps) == 0, 1.0, -jnp.expm1(-drop))
        log_alpha_bar = jnp.concatenate([jnp.zeros(1), jax.nn.log_sigmoid(log_snr)])
        # each where it has its digits and a gradient: β_t may round to 1
        log_alpha = jnp.where(beta < 0.5, jnp.log1p(-jnp.minimum(beta, 0.5)), jnp.diff(log_alpha_bar))
        return NoiseLevels(beta, log_alpha, log_alpha_bar)
