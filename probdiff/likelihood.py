"""The ELBO of a fitted chain per datum, in its named parts, and log importance weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer.elbo import get_importance_log_probs

from probdiff.chains import GaussianDiffusion
from probdiff.types import Data, Event, Key, Params

_ROWS = 2048  # rows of data to one compiled call


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


@dataclass(frozen=True)
class LogLikelihood:
    """A log-likelihood per datum in nats, in the data's own units.

    `values` (N,) or (C, N); `mcse` is the Monte Carlo standard error of `mean` given the data, and
    `standard_error` that of `mean` as an estimate for the population that the data come from: floats, or (C,).
    `kind` is "lower bound", "upper bound", "estimate" or "exact".
    """

    values: np.ndarray
    values_mcse: np.ndarray
    kind: str

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


@partial(jax.jit, static_argnums=0)
def _parts(d: GaussianDiffusion, params: Params, x_0: Event, rng_key: Key) -> tuple[Array, Array]:
    """KL of the prior (N,), and the terms t = 1…T, (T, N): log p(x_0 given x_1), then the KLs."""

    def program() -> tuple[Array, Array]:
        q, T = d.family, d.num_timesteps
        noise, kernel = d.components()

        def term(rng_key: Key, t: Array) -> Array:
            x_t = q.marginal(x_0, noise, t).sample(rng_key)
            p = kernel(x_t, t)
            kl = kl_divergence(q.posterior(x_t, x_0, noise, jnp.minimum(jnp.maximum(t, 2), T)), p)
            return jnp.where(t == 1, p.log_prob(x_0), kl)

        terms = jax.lax.map(lambda args: term(*args), (jax.random.split(rng_key, T), jnp.arange(1, T + 1)))
        return kl_divergence(q.marginal(x_0, noise, T), q.prior(x_0.shape[:1])), terms

    return handlers.substitute(program, data=params)()


@partial(jax.jit, static_argnums=0)
def _log_weights(d: GaussianDiffusion, params: Params, x_0: Data, rng_key: Key) -> Float[Array, " N"]:
    key_p, key_q = jax.random.split(rng_key)
    model = handlers.seed(partial(d.reverse, stacked=True), key_p)
    guide = handlers.seed(partial(d.forward_posterior, stacked=True), key_q)
    log_p, log_q = get_importance_log_probs(model, guide, (x_0,), {}, params)

    def path(log_probs: dict[str, Array]) -> Array:
        return sum(v if v.ndim == 1 else v.sum(0) for v in log_probs.values())  # type: ignore[return-value]

    return path(log_p) - path(log_q)


def _in_chunks(x_0: Data, rng_key: Key, compute: Callable[[Data, Key], Any]) -> Iterator[tuple[int, Any]]:
    """Calls `compute` on blocks of rows of one size, the last one padded, so that it is compiled once."""
    n = len(x_0)
    rows = min(_ROWS, 1 << (n - 1).bit_length())
    for i, start in enumerate(range(0, n, rows)):
        block = x_0[start : start + rows]
        padded = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
        yield len(block), compute(jnp.asarray(padded), jax.random.fold_in(rng_key, i))


def elbo_draws(
    d: GaussianDiffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> tuple[ELBOParts, Float[np.ndarray, "S N"]]:
    """The parts of N17 per datum of one chain, and the estimates of their sum that each draw gives, (S, N).

    K = E log p(x_0 given x_1) − Σ_{t≥2} E KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t))
    − KL(q(x_T given x_0) ‖ p(x_T)): KLs in closed form, expectations over x_t from `num_draws` draws for each t.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    priors, means, totals = [], [], []
    for n, (prior, draws) in _in_chunks(x_0, rng_key, partial(_parts_of_draws, d, params, num_draws)):
        priors.append(prior[:n])
        means.append(sum(terms[:, :n] for terms in draws) / num_draws)
        totals.append(np.stack([(terms[0] - terms[1:].sum(0) - prior)[:n] for terms in draws]))
    terms = np.concatenate(means, axis=1)
    return ELBOParts(np.concatenate(priors), terms[1:].T, terms[0]), np.concatenate(totals, axis=1)


def _parts_of_draws(
    d: GaussianDiffusion, params: Params, num_draws: int, x_0: Data, rng_key: Key
) -> tuple[np.ndarray, list[np.ndarray]]:
    draws = [_parts(d, params, jnp.asarray(x_0), key) for key in jax.random.split(rng_key, num_draws)]
    return np.asarray(draws[0][0], np.float64), [np.asarray(terms, np.float64) for _, terms in draws]


def elbo_parts(
    d: GaussianDiffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> tuple[ELBOParts, Float[np.ndarray, " N"]]:
    """The parts of `elbo_draws`, and the Monte Carlo standard error of their sum per datum, (N,)."""
    parts, draws = elbo_draws(d, params, x_0, rng_key=rng_key, num_draws=num_draws)
    return parts, draws.std(0, ddof=1) / np.sqrt(num_draws)


def log_importance_weights(
    d: GaussianDiffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> Float[np.ndarray, "S N"]:
    """log w = log p(x_0…x_T) − log q(x_1…x_T given x_0) for `num_draws` paths per datum, N14; shape (S, N), nats."""
    blocks = [
        np.stack(draws)[:, :n]
        for n, draws in _in_chunks(
            x_0,
            rng_key,
            lambda x, key: [np.asarray(_log_weights(d, params, x, k)) for k in jax.random.split(key, num_draws)],
        )
    ]
    return np.concatenate(blocks, axis=1)
