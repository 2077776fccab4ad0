"""Chains of one dimension by quadrature and of few bits by enumeration: p(x_0), K and the gap between them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import logsumexp

from probdiff.types import Key

MOST_BITS = 12  # whose states are enumerated
NODES_PER_STD = 1.6  # the trapezium rule on a Gaussian is then right to 11 digits
_ENTRIES = 2**18  # of a matrix that are summed at once, to stay in the cache


class Closed(Protocol):
    """A chain y_0…y_T in closed form for N data, y_0 being known: `LinearChain` and `TwoStateChain`."""

    @property
    def noise(self) -> list[float]: ...
    @property
    def full(self) -> bool: ...
    def flipped(self) -> "Closed": ...
    def log_marginal(self, k: int, y: np.ndarray) -> np.ndarray: ...
    def log_kernel(self, k: int, y: np.ndarray) -> np.ndarray: ...
    def log_step(self, k: int, before: np.ndarray, y: np.ndarray) -> np.ndarray: ...
    def draw(self, k: int, before: np.ndarray, rng_key: Key) -> np.ndarray: ...


@dataclass(frozen=True)
class Grid:
    """p on the nodes `y`: log p(x_T), (M,), and log p(x_{t−1} = y_i given x_t = y_j), (T, M, M).

    y is (M,) with spacing h on the line, or all states of D bits (M, D), each counted as it is. `log_reconstruction`
    (N, M) is log p(x_0 given x_1 = y_j) of each datum. Nats.
    """

    y: Float[np.ndarray, "M *D"]
    log_terminal: Float[np.ndarray, " M"]
    log_kernels: Float[np.ndarray, "T M M"]
    log_reconstruction: Float[np.ndarray, "N M"]

    @property
    def of_states(self) -> bool:
        return self.y.ndim == 2

    @property
    def route(self) -> str:
        return "enumeration" if self.of_states else "quadrature"

    @property
    def log_h(self) -> float:
        return 0.0 if self.of_states else float(np.log(self.y[1] - self.y[0]))

    @cached_property
    def log_marginals(self) -> list[Float[np.ndarray, " M"]]:
        """log p(x_t) on the nodes, for t = 0…T."""
        log_p = [self.log_terminal]
        for log_kernel in self.log_kernels[::-1]:
            log_p.append(log_marginal_below(log_kernel, log_p[-1], self.log_h))
        return log_p[::-1]

    @property
    def log_p(self) -> Float[np.ndarray, " N"]:
        """log p(x_0) of each datum, N12."""
        return log_marginal_below(self.log_reconstruction, self.log_marginals[1], self.log_h)

    @property
    def mass(self) -> float:
        """∫ p(x_0) dx_0."""
        return float(np.exp(logsumexp(self.log_marginals[0]) + self.log_h))

    def largest_gap(self, x: Float[np.ndarray, "S D"]) -> float:
        """The largest gap between the distribution functions of draws and of p(x_0), states in the order of `y`."""
        if not self.of_states:
            return float(stats.kstest(x[:, 0], self.cdf).statistic)
        counts = np.bincount(state_number(x), minlength=len(self.y))
        return float(np.abs(np.cumsum(counts / len(x) - np.exp(self.log_marginals[0]))).max())

    def cdf(self, x: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
        """The distribution function of p(x_0) on the line."""
        density = np.exp(self.log_marginals[0] + self.log_h)
        return np.interp(x, self.y, np.cumsum(density) - density / 2)

    def coarser(self) -> list["Grid"]:
        """Every other node, and the inner nine tenths: how their results differ bounds the error. None of states."""
        if self.of_states:
            return []
        return [
            Grid(self.y[k], self.log_terminal[k], self.log_kernels[:, k, k], self.log_reconstruction[:, k])
            for k in coarser_parts(len(self.y))
        ]

    def elbo_and_gap(self, q: Closed) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """K of N17 for each datum, and E_q KL(q(x_1…x_T given x_0) ‖ p(x_1…x_T given x_0)) by Bayes' rule on p.

        K = E_q[log p(x_T)] + Σ_t E_q[log p(x_{t−1} given x_t) − log q(x_t given x_{t−1})];
        the gap is Σ_t E_q[log q(x_t given x_{t−1}) − log p(x_t given x_{t−1})], each p normalised on the nodes.
        """
        T, h = len(self.log_kernels), np.exp(self.log_h)
        log_q_t = q.log_kernel(1, self.y)  # (M, N), now t = 1
        elbo = np.sum(np.exp(log_q_t) * (self.log_reconstruction.T - log_q_t), 0) * h
        bayes = self.log_reconstruction.T + self.log_marginals[1][:, None]
        bayes = bayes - logsumexp(bayes, axis=0) - self.log_h
        gap = np.sum(np.exp(log_q_t) * (log_q_t - bayes), 0) * h
        for t in range(2, T + 1):
            log_step = q.log_kernel(t, self.y)  # (M of x_t, M of x_{t−1})
            step, q_prev = np.exp(log_step), np.exp(log_q_t)
            to = self.log_kernels[t - 1].T  # (M of x_t, M of x_{t−1})
            elbo += np.sum(step * (to - log_step), 0) @ q_prev * h**2
            bayes = to + self.log_marginals[t][:, None]
            bayes = bayes - logsumexp(bayes, axis=0) - self.log_h
            gap += np.sum(step * (log_step - bayes), 0) @ q_prev * h**2
            log_q_t = np.log(np.maximum(step @ q_prev * h, 1e-300))
        return elbo + self.log_terminal @ np.exp(log_q_t) * h, gap


def log_marginal_below(
    log_kernel: Float[np.ndarray, "K M"], log_p: Float[np.ndarray, " M"], log_h: float = 0.0
) -> Float[np.ndarray, " K"]:
    """log p(x_{t−1}) by p(x_{t−1}) = ∫ p(x_{t−1} given x_t)·p(x_t) dx_t: one step of N12, nats.

    `log_p` is log p(x_t) on M nodes of spacing h, and `log_kernel` is log p(x_{t−1} = y_i given x_t = y_j) for K values
    y_i and the nodes y_j. Of states h is 1.
    """
    rows = max(1, _ENTRIES // log_kernel.shape[1])
    blocks = (log_kernel[i : i + rows] for i in range(0, len(log_kernel), rows))
    return np.concatenate([logsumexp(block + log_p, axis=1) for block in blocks]) + log_h


def coarser_parts(nodes: int) -> list[slice]:
    """Every other node, and the inner nine tenths: results on the parts of a grid bound the error on all of it."""
    return [slice(None, None, 2), slice(nodes // 20, nodes - nodes // 20)]


def num_nodes(reach: float, narrowest: float) -> int:
    """How many nodes `line` has."""
    return 1 + 200 * int(np.ceil(NODES_PER_STD * reach / narrowest / 100))  # few sizes, so few compilations


def line(reach: float, narrowest: float) -> Float[np.ndarray, " M"]:
    """Nodes from −reach to reach, fine enough for kernels of std `narrowest`."""
    return np.linspace(-reach, reach, num_nodes(reach, narrowest))


def states(size: int) -> Float[np.ndarray, "M D"]:
    """All M = 2^D states of D bits; the first bit counts one, the next two, and so on."""
    return (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(np.float64)


def state_number(x: Float[np.ndarray, "... D"]) -> np.ndarray:
    """Where bits stand among `states`."""
    return (x @ 2.0 ** np.arange(x.shape[-1])).astype(int)
