"""The ELBO of a chain per datum, in its named parts, and what every log-likelihood of a chain is reported as."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from scipy.special import logsumexp

from probdiff.chains import Diffusion
from probdiff.families import expected_log_ratio
from probdiff.schedules import NoiseLevels
from probdiff.types import Data, Event, Key, Params, Time

_ROWS = 2048  # rows of data to one compiled call
_TERMS, _RANGES = 8192, 64


@dataclass(frozen=True)
class ELBOParts:
    """The ELBO in three parts, in nats: K = reconstruction − Σ_{t≥2} steps − prior.

    `prior` (…, N): KL(q(x_T given x_0) ‖ p(x_T)). `steps` (…, N, T−1): E KL(q(x_{t−1} given x_t, x_0) ‖
    p(x_{t−1} given x_t)), t = 2…T. `reconstruction` (…, N): E log p(x_0 given x_1).
    A fit of several chains has them as a leading axis.
    """

    prior: np.ndarray
    steps: np.ndarray
    reconstruction: np.ndarray

    @property
    def elbo(self) -> np.ndarray:
        return self.reconstruction - self.steps.sum(-1) - self.prior


PARTS = ("prior", "steps", "reconstruction")
Kind = Literal["lower bound", "upper bound", "estimate", "exact"]


@dataclass(frozen=True)
class LogLikelihood:
    """A log-likelihood per datum in nats, in the data's own units.

    `values` (N,) or (C, N); `mcse` is the Monte Carlo standard error of `mean` given the data, and
    `standard_error` that of `mean` as an estimate for the population that the data come from: floats, or (C,).
    `kind` is "lower bound", "upper bound", "estimate" or "exact": for a bound, of the mean over the method's own draws.
    `pareto_k` is k̂ of each datum's importance weights, where the method has such weights.
    """

    values: np.ndarray
    values_mcse: np.ndarray
    kind: Kind
    pareto_k: np.ndarray | None = None

    @property
    def mean(self) -> Any:
        return self.values.mean(-1)

    @property
    def mcse(self) -> Any:
        return np.sqrt(np.sum(self.values_mcse**2, -1)) / self.values.shape[-1]

    @property
    def standard_error(self) -> Any:
        n = self.values.shape[-1]
        return self.values.std(-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(self.values.shape[:-1], np.nan)

    @property
    def elpd(self) -> az.ELPDData:
        """Values of held-out data as they stand, summed over data, for `az.compare` and its errors of differences.

        No leave-one-out correction: the fit has not seen the data. Raises `ValueError` for several chains at once.
        """
        if self.values.ndim != 1:
            raise ValueError(
                f"values has shape {self.values.shape}; az.compare wants one chain, such as fit.chain(fit.best)"
            )
        n = len(self.values)
        return az.ELPDData(
            elpd=self.values.sum(),
            se=n * self.standard_error,
            p=0.0,  # nothing was fitted to these data
            n_samples=1,
            n_data_points=n,
            scale="log",
            warning=False,
            good_k=np.nan,
            elpd_i=xr.DataArray(self.values, dims="datum"),
        )


def _term(
    d: Diffusion, noise: NoiseLevels, kernel: Callable[[Event, Time], Any], x_0: Event, rng_key: Key, t: Time
) -> Array:
    """log p(x_0 given x_1) where t = 1, else KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t)); (N,)."""
    family, T = d.family, d.num_timesteps
    x_t = family.marginal(x_0, noise, t).sample(rng_key)
    q, p = family.posterior(x_t, x_0, noise, jnp.minimum(jnp.maximum(t, 2), T)), kernel(x_t, t)
    ratio, _ = expected_log_ratio(q, p, lambda: q.sample(jax.random.fold_in(rng_key, 1)))
    return jnp.where(t == 1, p.log_prob(x_0), -ratio)


def time_probs(d: Diffusion, params: Params, x: Data, num_rows: int, rng_key: Key) -> Float[Array, " T"]:
    """π_t ∝ √E[L_t²], a tenth of it uniform: the importance weights of Nichol and Dhariwal 2021, eq. 18.

    L_t is the term of the ELBO at t. Its mean square is taken over 8,192 draws of the `num_rows` rows of x, each at
    one t: for each t up to 64 of them, and for longer chains in at most 64 ranges of t, of one t at the start and wider
    later on.
    """
    T = d.num_timesteps
    edges = np.unique(np.geomspace(1, T + 1, 65).round()) if T > _RANGES else np.arange(1, T + 2)
    widths = np.diff(edges).astype(int)
    key_rows, key_t, key_x = jax.random.split(rng_key, 3)
    at = jnp.arange(_TERMS) % len(widths)
    t = jnp.asarray(edges)[at] + jnp.floor(jax.random.uniform(key_t, (_TERMS,)) * jnp.asarray(widths)[at])
    x_0 = x[jax.random.randint(key_rows, (_TERMS,), 0, num_rows)]
    terms = handlers.substitute(
        lambda: _term(d, *d.kernels(), x_0, key_x, jnp.minimum(t.astype(int), T)), data=params
    )()
    largest = jnp.max(jnp.abs(terms))
    squares = jnp.zeros(len(widths)).at[at].add((terms / largest) ** 2) / jnp.bincount(at, length=len(widths))
    probs = jnp.sqrt(squares)[np.repeat(np.arange(len(widths)), widths)]
    known = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(known, 0.9 * probs / probs.sum(), 0.9 / T) + 0.1 / T


@partial(jax.jit, static_argnums=0)
def _parts(d: Diffusion, params: Params, x_0: Event, rng_key: Key) -> tuple[Array, Array]:
    """KL of the prior (N,), and the terms t = 1…T, (T, N): log p(x_0 given x_1), then the KLs."""

    def program() -> tuple[Array, Array]:
        q, T = d.family, d.num_timesteps
        noise, kernel = d.kernels()
        terms = jax.lax.map(
            lambda args: _term(d, noise, kernel, x_0, *args), (jax.random.split(rng_key, T), jnp.arange(1, T + 1))
        )
        return kl_divergence(q.marginal(x_0, noise, T), q.prior(x_0.shape[:1])), terms

    return handlers.substitute(program, data=params)()


def block_size(num_rows: int, most: int = _ROWS) -> int:
    """Rows to a block: a power of two, at most `most`, so that few sizes are compiled."""
    return min(most, 1 << (num_rows - 1).bit_length())


def in_blocks(x_0: Data, rng_key: Key, compute: Callable[[Data, Key], Any], rows: int) -> Iterator[tuple[int, Any]]:
    """Calls `compute` on blocks of `rows` rows, the last one padded; gives how many rows count, and the result."""
    for i, start in enumerate(range(0, len(x_0), rows)):
        block = x_0[start : start + rows]
        padded = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
        yield len(block), compute(jnp.asarray(padded), jax.random.fold_in(rng_key, i))


def log_mean(log_draws: Float[np.ndarray, "S N"]) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the mean of exp over S draws, and its standard error to first order; (N,) each."""
    values = logsumexp(log_draws, axis=0) - np.log(len(log_draws))
    return values, np.exp(log_draws - values).std(0, ddof=1) / np.sqrt(len(log_draws))


def _elbo_blocks(
    d: Diffusion, params: Params, x_0: Data, rng_key: Key, num_draws: int
) -> Iterator[tuple[ELBOParts, Float[np.ndarray, "S n"]]]:
    """The parts of each block of rows, and the estimates of their sum that each draw gives."""

    def compute(x_0: Data, rng_key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean: Any = 0.0
        totals = []
        for key in jax.random.split(rng_key, num_draws):
            prior, terms = (np.asarray(part, np.float64) for part in _parts(d, params, x_0, key))
            mean = mean + terms / num_draws
            totals.append(terms[0] - terms[1:].sum(0) - prior)
        return prior, mean, np.stack(totals)

    rows = block_size(len(x_0), max(16, min(_ROWS, 2**22 // d.num_timesteps)))
    for n, (prior, mean, totals) in in_blocks(x_0, rng_key, compute, rows):
        yield ELBOParts(prior[:n], mean[1:, :n].T, mean[0, :n]), totals[:, :n]


def elbo_draws(
    d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> tuple[ELBOParts, Float[np.ndarray, "S N"]]:
    """The parts of N17 per datum of one chain, and the estimates of their sum that each draw gives, (S, N).

    K = E log p(x_0 given x_1) − Σ_{t≥2} E KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t))
    − KL(q(x_T given x_0) ‖ p(x_T)): KLs in closed form, expectations over x_t from `num_draws` draws for each t.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    parts, draws = zip(*_elbo_blocks(d, params, x_0, rng_key, num_draws), strict=True)
    whole = ELBOParts(*(np.concatenate([getattr(one, name) for one in parts]) for name in PARTS))
    return whole, np.concatenate(draws, axis=1)


def elbo(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int) -> LogLikelihood:
    """K of `elbo_draws` per datum, a lower bound, in memory that does not grow with N·T."""
    draws = np.concatenate([draws for _, draws in _elbo_blocks(d, params, x_0, rng_key, num_draws)], axis=1)
    return LogLikelihood(draws.mean(0), draws.std(0, ddof=1) / np.sqrt(num_draws), "lower bound")
