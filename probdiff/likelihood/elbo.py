"""The ELBO of a chain per datum, in its named parts."""

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

from probdiff.blocks import block_size, in_blocks
from probdiff.chains import Diffusion, GaussianDiffusion
from probdiff.families.base import expected_log_ratio
from probdiff.families.mixtures import MixtureKernel
from probdiff.likelihood.result import LogLikelihood
from probdiff.locks import one_at_a_time
from probdiff.schedules import NoiseLevels
from probdiff.types import Data, Event, Key, Params, Time

_ROWS = 2048  # rows of data to one compiled call
PARTS = ("terminal", "steps", "reconstruction")


@dataclass(frozen=True)
class ELBOParts:
    """The ELBO in three parts, in nats: K = reconstruction − Σ_{t≥2} steps − terminal.

    `terminal` (…, N): KL(q(x_T given x_0) ‖ p(x_T)). `steps` (…, N, T−1): E KL(q(x_{t−1} given x_t, x_0) ‖
    p(x_{t−1} given x_t)), t = 2…T. `reconstruction` (…, N): E log p(x_0 given x_1).
    A fit of several chains has them as a leading axis. Of mixtures of Gaussians the KLs are estimates along paths of
    log q − log p, which may be negative.
    """

    terminal: np.ndarray
    steps: np.ndarray
    reconstruction: np.ndarray

    @property
    def elbo(self) -> np.ndarray:
        return self.reconstruction - self.steps.sum(-1) - self.terminal

    @property
    def prior(self) -> np.ndarray:
        """`terminal`, by the name that the notes give the term."""
        return self.terminal


def elbo_term(
    d: Diffusion, noise: NoiseLevels, kernel: Callable[[Event, Time], Any], x_0: Event, rng_key: Key, t: Time
) -> Array:
    """log p(x_0 given x_1) where t = 1, else KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t)); (N,)."""
    family, T = d.family, d.num_timesteps
    x_t = family.marginal(x_0, noise, t).sample(rng_key)
    q, p = family.posterior(x_t, x_0, noise, jnp.minimum(jnp.maximum(t, 2), T)), kernel(x_t, t)
    if isinstance(p, MixtureKernel):
        p = p.with_key(jax.random.fold_in(rng_key, 2))
    ratio, _ = expected_log_ratio(q, p, lambda: q.sample(jax.random.fold_in(rng_key, 1)))
    return jnp.where(t == 1, p.log_prob(x_0), -ratio)


@one_at_a_time
@partial(jax.jit, static_argnums=0)
def _parts(d: Diffusion, params: Params, x_0: Event, rng_key: Key) -> tuple[Array, Array]:
    """KL of the terminal (N,), and the terms t = 1…T, (T, N): log p(x_0 given x_1), then the KLs."""

    def program() -> tuple[Array, Array]:
        q, T = d.family, d.num_timesteps
        noise, kernel = d.kernels()
        keys, times = jax.random.split(rng_key, T), jnp.arange(1, T + 1)
        if of_mixtures(d):
            return _along_path(d, noise, kernel, x_0, keys)
        terms = jax.lax.map(lambda args: elbo_term(d, noise, kernel, x_0, *args), (keys, times))
        return kl_divergence(q.marginal(x_0, noise, T), q.terminal(x_0.shape[:1])), terms

    return handlers.substitute(program, data=params)()


def of_mixtures(d: Diffusion) -> bool:
    """Whether the kernels are mixtures of Gaussians: then draws of `elbo_draws` are log weights of whole paths, N14."""
    return isinstance(d, GaussianDiffusion) and d.components > 1


def _along_path(
    d: Diffusion, noise: NoiseLevels, kernel: Callable[[Event, Time], Any], x_0: Event, rng_keys: Key
) -> tuple[Float[Array, " N"], Float[Array, "T N"]]:
    """As `_parts`, with log q − log p along one path of each datum in place of every KL.

    Where p is nearly the reversal of q, the terms of one path all but cancel out, and those of draws apart do not.
    """
    q, T = d.family, d.num_timesteps

    def step(x_t: Event, args: tuple[Array, Key]) -> tuple[Event, Array]:
        t, key = args
        of_x_prev = q.posterior(x_t, x_0, noise, t)
        x_prev = of_x_prev.sample(key)
        return x_prev, of_x_prev.log_prob(x_prev) - kernel(x_t, t).log_prob(x_prev)

    of_x_T = q.marginal(x_0, noise, T)
    x_T = of_x_T.sample(rng_keys[0])
    x_1, terms = jax.lax.scan(step, x_T, (jnp.arange(T, 1, -1), rng_keys[1:]))
    log_ratio = of_x_T.log_prob(x_T) - q.terminal(x_0.shape[:1]).log_prob(x_T)
    return log_ratio, jnp.concatenate([kernel(x_1, 1).log_prob(x_0)[None], terms[::-1]])


def _elbo_blocks(
    d: Diffusion, params: Params, x_0: Data, rng_key: Key, num_draws: int
) -> Iterator[tuple[ELBOParts, Float[np.ndarray, "S n"]]]:
    """The parts of each block of rows, and the estimates of their sum that each draw gives."""

    def compute(x_0: Data, rng_key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean: Any = 0.0
        terminals, totals = [], []
        for key in jax.random.split(rng_key, num_draws):
            terminal, terms = (np.asarray(part, np.float64) for part in _parts(d, params, x_0, key))
            mean = mean + terms / num_draws
            terminals.append(terminal)
            totals.append(terms[0] - terms[1:].sum(0) - terminal)
        return np.mean(terminals, 0), mean, np.stack(totals)

    rows = block_size(len(x_0), max(16, min(_ROWS, 2**22 // d.num_timesteps)))
    for n, (terminal, mean, totals) in in_blocks(x_0, rng_key, compute, rows):
        yield ELBOParts(terminal[:n], mean[1:, :n].T, mean[0, :n]), totals[:, :n]


def elbo_draws(
    d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int
) -> tuple[ELBOParts, Float[np.ndarray, "S N"]]:
    """The parts of N17 per datum of one chain, and the estimates of their sum that each draw gives, (S, N).

    K = E log p(x_0 given x_1) − Σ_{t≥2} E KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t))
    − KL(q(x_T given x_0) ‖ p(x_T)): KLs in closed form, expectations over x_t from `num_draws` draws for each t. Where
    kernels are mixtures of Gaussians log q − log p is taken along `num_draws` whole paths instead.
    x_0 (N, *event_shape) in the chain's own units; nats.
    """
    parts, draws = zip(*_elbo_blocks(d, params, x_0, rng_key, num_draws), strict=True)
    whole = ELBOParts(*(np.concatenate([getattr(one, name) for one in parts]) for name in PARTS))
    return whole, np.concatenate(draws, axis=1)


def elbo(d: Diffusion, params: Params, x_0: Data, *, rng_key: Key, num_draws: int) -> LogLikelihood:
    """K of `elbo_draws` per datum, a lower bound, in memory that does not grow with N·T."""
    draws = np.concatenate([draws for _, draws in _elbo_blocks(d, params, x_0, rng_key, num_draws)], axis=1)
    return LogLikelihood(draws.mean(0), draws.std(0, ddof=1) / np.sqrt(num_draws), "lower bound")
