"""Linear-Gaussian chains in closed form, by recursion over D × D matrices in float64."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from probdiff.types import Key

type Means = Float[np.ndarray, "N D"]
type Matrix = Float[np.ndarray, "D D"]


@dataclass(frozen=True)
class LinearChain:
    """y_0 ~ N(mean, cov), y_k = A_k·y_{k−1} + b_k + N(0, S_k) for k = 1…T, for N data side by side.

    `mean` (N, D), `cov` (D, D), `A` (T, D, D), `b` (T, N, D), `S` (T, D, D). A known y_0 has cov = 0.
    """

    mean: Means
    cov: Matrix
    A: Float[np.ndarray, "T D D"]
    b: Float[np.ndarray, "T N D"]
    S: Float[np.ndarray, "T D D"]

    def marginals(self) -> tuple[list[Means], list[Matrix]]:
        """Mean and covariance of y_0, …, y_T."""
        means, covs = [self.mean], [self.cov]
        for A, b, S in zip(self.A, self.b, self.S, strict=True):
            means.append(means[-1] @ A.T + b)
            covs.append(A @ covs[-1] @ A.T + S)
        return means, covs

    def flipped(self) -> "LinearChain":
        """The same distribution of the path, run from y_T to y_0, by Bayes' rule."""
        means, covs = self.marginals()
        As, bs, Ss = [], [], []
        for k in range(len(self.A), 0, -1):
            gain = np.linalg.solve(covs[k], self.A[k - 1] @ covs[k - 1]).T
            As.append(gain)
            bs.append(means[k - 1] - means[k] @ gain.T)
            Ss.append(covs[k - 1] - gain @ self.A[k - 1] @ covs[k - 1])
        return LinearChain(means[-1], covs[-1], np.stack(As), np.stack(bs), np.stack(Ss))

    @property
    def noise(self) -> list[float]:
        """The mean variance of a coordinate of y_0, …, y_T."""
        return [float(np.trace(cov)) / len(cov) for cov in self.marginals()[1]]

    @property
    def full(self) -> bool:
        """Whether every y_k can follow every y_{k−1}: densities of normals are nowhere zero."""
        return True

    def log_marginal(self, k: int, y: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "N K"]:
        """log density of each y as y_k of each datum, nats."""
        means, covs = self.marginals()
        return np.stack([normal_log_prob(y, mean, covs[k]) for mean in means[k]])

    def log_kernel(self, k: int, y: Float[np.ndarray, " M"]) -> Float[np.ndarray, "M M"]:
        """log density of y_k, first axis, given y_{k−1} on the same nodes; for k = 1 given y_0 of each datum. D = 1."""
        A, b, S = self.A[k - 1], self.b[k - 1], self.S[k - 1]
        mean = (self.mean @ A.T + b).T if k == 1 else A * y + b[:1]
        return -0.5 * (y[:, None] - mean) ** 2 / S - 0.5 * np.log(2 * np.pi * S)

    def log_step(
        self, k: int, before: Float[np.ndarray, "S N D"], y: Float[np.ndarray, "S N D"]
    ) -> Float[np.ndarray, "S N"]:
        """log density of y_k given y_{k−1}, nats."""
        mean = before @ self.A[k - 1].T + self.b[k - 1]
        D = y.shape[-1]
        return normal_log_prob(y.reshape(-1, D), mean.reshape(-1, D), self.S[k - 1]).reshape(y.shape[:-1])

    def draw(self, k: int, before: Float[np.ndarray, "S N D"], rng_key: Key) -> Float[np.ndarray, "S N D"]:
        """y_k given y_{k−1}."""
        mean = before @ self.A[k - 1].T + self.b[k - 1]
        noise = np.asarray(jax.random.normal(rng_key, mean.shape), np.float64)
        return mean + noise @ np.linalg.cholesky(self.S[k - 1]).T

    def log_prob_given_first(self, path: list[Means]) -> Float[np.ndarray, " N"]:
        """log density of y_1…y_T given y_0 for each datum, nats; `path` is y_0, …, y_T."""
        steps = zip(path[:-1], path[1:], self.A, self.b, self.S, strict=True)
        return sum(normal_log_prob(y, before @ A.T + b, S) for before, y, A, b, S in steps)  # type: ignore[return-value]


def normal_log_prob(x: Means, mean: Means, cov: Matrix) -> Float[np.ndarray, " N"]:
    """log N(x given mean, cov) for each row, nats."""
    factor = np.linalg.cholesky(cov)
    z = np.linalg.solve(factor, (x - mean).T)
    return -0.5 * np.sum(z**2, 0) - np.log(np.diag(factor)).sum() - 0.5 * len(cov) * np.log(2 * np.pi)


def normal_kl(mean_q: Means, cov_q: Matrix, mean_p: Means, cov_p: Matrix) -> Float[np.ndarray, " N"]:
    """KL(N(mean_q, cov_q) ‖ N(mean_p, cov_p)) for each row, nats."""
    factor_p, factor_q = np.linalg.cholesky(cov_p), np.linalg.cholesky(cov_q)
    ratio = np.linalg.solve(factor_p, factor_q)
    z = np.linalg.solve(factor_p, (mean_q - mean_p).T)
    log_det = np.log(np.diag(factor_p)).sum() - np.log(np.diag(factor_q)).sum()
    return 0.5 * (np.sum(ratio**2) - len(cov_p) + np.sum(z**2, 0)) + log_det


def elbo(q: LinearChain, p: LinearChain, x_0: Means) -> Float[np.ndarray, " N"]:
    """N17 for each datum: q runs x_0 → x_T given x_0, p runs x_T → x_0.

    K = E_q[log p(x_T) + Σ_t log p(x_{t−1} | x_t)] + Σ_t H(q(x_t | x_{t−1})).
    """
    means, covs = q.marginals()
    T, D = len(q.A), x_0.shape[1]
    k = normal_log_prob(means[T], p.mean[:1], p.cov) - 0.5 * np.trace(np.linalg.solve(p.cov, covs[T]))
    for t in range(1, T + 1):
        A, b, S = p.A[T - t], p.b[T - t, :1], p.S[T - t]
        # x_{t−1} − A·x_t under q
        gap = np.eye(D) - A @ q.A[t - 1]
        cov = gap @ covs[t - 1] @ gap.T + A @ q.S[t - 1] @ A.T
        k = k + normal_log_prob(means[t - 1], means[t] @ A.T + b, S) - 0.5 * np.trace(np.linalg.solve(S, cov))
        k = k + 0.5 * np.linalg.slogdet(2 * np.pi * np.e * q.S[t - 1])[1]
    return k


def gap(q: LinearChain, p: LinearChain, x_0: Means) -> Float[np.ndarray, " N"]:
    """KL(q(x_1…x_T given x_0) ‖ p(x_1…x_T given x_0)) for each datum, by Bayes' rule on p, step by step.

    Σ_t E_q KL(q(x_t | x_{t−1}) ‖ p(x_t | x_{t−1})).
    """
    means, covs = q.marginals()
    bayes = p.flipped()
    total = np.zeros(len(x_0))
    for t in range(1, len(q.A) + 1):
        A, b, S = bayes.A[t - 1], bayes.b[t - 1, :1], bayes.S[t - 1]
        spread = q.A[t - 1] - A
        total += normal_kl(means[t], q.S[t - 1], means[t - 1] @ A.T + b, S)
        total += 0.5 * np.trace(np.linalg.solve(S, spread @ covs[t - 1] @ spread.T))
    return total


def dense(chain: LinearChain) -> tuple[Float[np.ndarray, "N P"], Float[np.ndarray, "P P"]]:
    """Mean and covariance of y_0…y_T as one normal of P = (T+1)·D dimensions."""
    means, covs = chain.marginals()
    T, D = len(chain.A), chain.cov.shape[0]
    cov = np.zeros(((T + 1) * D, (T + 1) * D))
    for k in range(T + 1):
        block = covs[k]
        for m in range(k, T + 1):
            if m > k:
                block = chain.A[m - 1] @ block
            cov[m * D : (m + 1) * D, k * D : (k + 1) * D] = block
            cov[k * D : (k + 1) * D, m * D : (m + 1) * D] = block.T
    return np.concatenate(means, 1), cov


def forward_covariance(beta: Float[np.ndarray, " T"]) -> Float[np.ndarray, "T T"]:
    """Cov(x_s, x_t given x_0) = √(ᾱ_t/ᾱ_s)·(1−ᾱ_s), s ≤ t, of each coordinate of the chain N3, from ᾱ alone."""
    cumulative = np.cumsum(np.log(np.maximum(1 - beta, 1e-200)))
    s, t = np.minimum.outer(range(len(beta)), range(len(beta))), np.maximum.outer(range(len(beta)), range(len(beta)))
    return np.exp((cumulative[t] - cumulative[s]) / 2) * -np.expm1(cumulative[s])
