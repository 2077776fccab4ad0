"""Chains of one dimension by quadrature: p(x_0), K and the gap between them, on a grid over every x_t."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from probdiff.derivation.linear import LinearChain
from probdiff.derivation.pair import Pair

_MOST = 5e7  # entries of the kernels on the nodes, T·M²
NODES_PER_STD = 1.6  # the trapezium rule on a Gaussian is then right to 11 digits


@dataclass(frozen=True)
class Grid:
    """p on the nodes `y` (M,) with spacing h: log p(x_T), (M,), and log p(x_{t−1} = y_i given x_t = y_j), (T, M, M).

    `log_reconstruction` (N, M) is log p(x_0 given x_1 = y_j) of each datum. Nats.
    """

    y: Float[np.ndarray, " M"]
    log_prior: Float[np.ndarray, " M"]
    log_kernels: Float[np.ndarray, "T M M"]
    log_reconstruction: Float[np.ndarray, "N M"]

    @property
    def log_h(self) -> float:
        return float(np.log(self.y[1] - self.y[0]))

    @cached_property
    def log_marginals(self) -> list[Float[np.ndarray, " M"]]:
        """log p(x_t) on the nodes, for t = 0…T."""
        log_p = [self.log_prior]
        for kernel in self.log_kernels[::-1]:
            log_p.append(logsumexp(kernel + log_p[-1], axis=1) + self.log_h)
        return log_p[::-1]

    @property
    def log_p(self) -> Float[np.ndarray, " N"]:
        """log p(x_0) of each datum, N12."""
        return logsumexp(self.log_reconstruction + self.log_marginals[1], axis=1) + self.log_h

    @property
    def mass(self) -> float:
        """∫ p(x_0) dx_0."""
        return float(np.exp(logsumexp(self.log_marginals[0]) + self.log_h))

    def cdf(self, x: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
        """The distribution function of p(x_0)."""
        density = np.exp(self.log_marginals[0] + self.log_h)
        return np.interp(x, self.y, np.cumsum(density) - density / 2)

    def coarser(self) -> list["Grid"]:
        """Every other node, and the inner nine tenths: how their results differ bounds the error."""
        inner = slice(len(self.y) // 20, len(self.y) - len(self.y) // 20)
        return [
            Grid(self.y[k], self.log_prior[k], self.log_kernels[:, k, k], self.log_reconstruction[:, k])
            for k in (slice(None, None, 2), inner)
        ]

    def elbo_and_gap(self, q: LinearChain) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """K of N17 for each datum, and E_q KL(q(x_1…x_T given x_0) ‖ p(x_1…x_T given x_0)) by Bayes' rule on p.

        K = E_q[log p(x_T)] + Σ_t E_q[log p(x_{t−1} given x_t) − log q(x_t given x_{t−1})];
        the gap is Σ_t E_q[log q(x_t given x_{t−1}) − log p(x_t given x_{t−1})], each p normalised on the nodes.
        """
        T, y, h = len(q.A), self.y[:, None], np.exp(self.log_h)
        log_q_t = _log_normal(y, (q.mean @ q.A[0].T + q.b[0]).T, q.S[0])  # (M, N), now t = 1
        elbo = np.sum(np.exp(log_q_t) * (self.log_reconstruction.T - log_q_t), 0) * h
        bayes = self.log_reconstruction.T + self.log_marginals[1][:, None]
        bayes = bayes - logsumexp(bayes, axis=0) - self.log_h
        gap = np.sum(np.exp(log_q_t) * (log_q_t - bayes), 0) * h
        for t in range(2, T + 1):
            mean = q.A[t - 1] * self.y + q.b[t - 1, :1]
            log_step = _log_normal(y, mean, q.S[t - 1])  # (M of x_t, M of x_{t−1})
            step, q_prev = np.exp(log_step), np.exp(log_q_t)
            to = self.log_kernels[t - 1].T  # (M of x_t, M of x_{t−1})
            elbo += np.sum(step * (to - log_step), 0) @ q_prev * h**2
            bayes = to + self.log_marginals[t][:, None]
            bayes = bayes - logsumexp(bayes, axis=0) - self.log_h
            gap += np.sum(step * (log_step - bayes), 0) @ q_prev * h**2
            log_q_t = np.log(np.maximum(step @ q_prev * h, 1e-300))
        return elbo + self.log_prior @ np.exp(log_q_t) * h, gap


def grid(pair: Pair, reach: float, narrowest: float) -> Grid | None:
    """The chain p of a pair on nodes from −reach to reach, fine enough for kernels of std `narrowest`.

    None where that takes too much memory.
    """
    nodes = 1 + 200 * int(np.ceil(NODES_PER_STD * reach / narrowest / 100))  # few sizes, so few compilations
    if pair.num_timesteps * nodes**2 > _MOST:
        return None
    y = np.linspace(-reach, reach, nodes)
    to = jnp.asarray(y).reshape(-1, 1, *pair.x.shape[1:])
    one = pair.x[:1]

    def columns(x_t: jax.Array) -> dict[int, jax.Array]:
        path = {t: jnp.broadcast_to(x_t, one.shape) for t in pair.p.times}
        return {t: kernel.log_prob(to)[:, 0] for t, kernel in pair.p.kernels(path).items()}

    log_p = {t: np.asarray(block, np.float64) for t, block in jax.vmap(columns)(jnp.asarray(y)).items()}
    T = pair.num_timesteps
    kernels = np.stack([log_p[t].T for t in range(T)])
    return Grid(y, log_p[T][0], kernels, pair.log_p_given_x_1(y.reshape(-1, *pair.x.shape[1:])).T)


def _log_normal(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
