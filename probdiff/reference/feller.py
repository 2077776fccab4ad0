"""Feller's statement N6: how far the reversed forward kernel is from a Gaussian, in float64, in one dimension.

For q(x_{t−1}) = Σ_k w_k N(m_k, s_k²) the reversed kernel q(x_{t−1} given x_t) ∝ q(x_{t−1})·q(x_t given x_{t−1}) is
again a mixture of Gaussians, known exactly. Around x_{t−1} it has variance about β_t, and (log q)‴ gives it the third
cumulant (log q)‴·β_t³, standardised (log q)‴·β_t^{3/2}. A density with a small standardised third cumulant κ has
KL κ²/12 to the Gaussian of its mean and variance, so

    KL(q(x_{t−1} given x_t) ‖ its nearest Gaussian) → β_t³·((log q)‴)²/12   as β_t → 0.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from probdiff.reference.mixtures import components_given

type Row = Float[np.ndarray, " K"]
_UPDATES = 40  # of expectation maximisation


@dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(m_k, s_k²) on the line: `weights`, `means` and `stds`, each (K,)."""

    weights: Row
    means: Row
    stds: Row

    def third_derivative(self, x: float) -> float:
        """(log q)‴ at x, from the derivatives of the density."""
        z = (x - self.means) / self.stds
        log_terms = np.log(self.weights / self.stds) - 0.5 * z**2
        share = np.exp(log_terms - logsumexp(log_terms))
        q1, q2, q3 = (
            np.sum(share * h / self.stds**k) for k, h in ((1, -z), (2, z**2 - 1), (3, -(z**3) + 3 * z))
        )  # q′/q, q″/q, q‴/q
        return float(q3 - 3 * q1 * q2 + 2 * q1**3)

    def reversed_kernel(self, x_t: ArrayLike, beta: ArrayLike) -> "Mixture":
        """q(x_{t−1} given x_t) for q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t).

        x_t and beta of shape (…, 1) give the mixture leading axes.
        """
        x_t, beta = np.asarray(x_t), np.asarray(beta)
        log_weights, means, variance = components_given(
            self.weights, self.means, self.stds**2, x_t, np.sqrt(1 - beta), beta
        )
        weights = np.exp(log_weights - logsumexp(log_weights, axis=-1, keepdims=True))
        return Mixture(weights, means, np.broadcast_to(np.sqrt(variance), means.shape))


@cache
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss–Hermite quadrature under N(0, 1)."""
    z, weights = hermegauss(nodes)
    return z, weights / np.sqrt(2 * np.pi)


def non_gaussianity(q: Mixture, nodes: int = 100) -> Float[np.ndarray, "..."]:
    """KL(q ‖ the Gaussian of its mean and variance), nats, by Gauss–Hermite quadrature; the leading axes of q are kept.

    Written with the integrand g·(r·log r − r + 1) ≥ 0, r = q/g, so that small values keep their digits.
    """
    mean = np.sum(q.weights * q.means, -1)
    std = np.sqrt(np.sum(q.weights * (q.stds**2 + (q.means - mean[..., None]) ** 2), -1))
    z, weights = _hermite(nodes)
    x = mean[..., None] + std[..., None] * z
    log_q = logsumexp(
        -0.5 * ((x[..., None] - q.means[..., None, :]) / q.stds[..., None, :]) ** 2 - np.log(q.stds)[..., None, :],
        b=q.weights[..., None, :],
        axis=-1,
    )
    log_r = log_q + 0.5 * z**2 + np.log(std)[..., None]
    return np.sum((np.exp(log_r) * log_r - np.expm1(log_r)) * weights, -1)


def rate(q: Mixture, x: float, betas: ArrayLike) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """For each β: the KL at x_t = √(1−β)·x, and what theory says of it as β → 0, β³·((log q)‴(x))²/12."""
    betas = np.asarray(betas, np.float64)
    kl = np.array([float(non_gaussianity(q.reversed_kernel(np.sqrt(1 - b) * x, b))) for b in betas])
    return kl, betas**3 * q.third_derivative(x) ** 2 / 12


def distance_to_a_mixture(q: Mixture, components: int) -> Float[np.ndarray, "..."]:
    """KL(q ‖ a mixture of so many Gaussians that is fitted to q), nats: zero where q has no more, else near the least.

    Expectation maximisation under q itself, from its nodes in order, cut into parts of equal weight, with variances no
    less than the least of q's components, as reverse kernels have. Expectations are Gauss–Hermite's over each of those,
    which leaves the KL right to about one per cent or 2e-4.
    """
    if q.weights.shape[-1] <= components:
        return np.zeros(q.weights.shape[:-1])
    z, of_node = _hermite(11)
    x = (q.means[..., None] + q.stds[..., None] * z).reshape(*q.means.shape[:-1], -1)
    mass = (q.weights[..., None] * of_node).reshape(x.shape)
    order = np.argsort(x, -1)
    x, mass = np.take_along_axis(x, order, -1), np.take_along_axis(mass, order, -1)
    log_q = _log_density(q.weights, q.means, q.stds, x)
    part = np.minimum((components * (np.cumsum(mass, -1) - mass / 2)).astype(int), components - 1)
    share = part[..., None, :] == np.arange(components)[:, None]  # (…, components, nodes)
    least = np.min(q.stds, -1)[..., None] ** 2
    for _ in range(_UPDATES):
        held = mass[..., None, :] * share
        weights = np.maximum(held.sum(-1), 1e-12)
        means = np.sum(held * x[..., None, :], -1) / weights
        variances = np.maximum(np.sum(held * (x[..., None, :] - means[..., None]) ** 2, -1) / weights, least)
        log_joint = _log_joint(weights, means, np.sqrt(variances), x)
        log_p = logsumexp(log_joint, -2)
        share = np.exp(log_joint - log_p[..., None, :])
    return np.sum(mass * (log_q - log_p), -1)


def _log_joint(weights: np.ndarray, means: np.ndarray, stds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log w_k·N(x given m_k, s_k²), (…, K, nodes)."""
    z = (x[..., None, :] - means[..., None]) / stds[..., None]
    return np.log(np.maximum(weights, 1e-300) / stds)[..., None] - 0.5 * z**2 - 0.5 * np.log(2 * np.pi)


def _log_density(weights: np.ndarray, means: np.ndarray, stds: np.ndarray, x: np.ndarray) -> np.ndarray:
    return logsumexp(_log_joint(weights, means, stds, x), -2)


def chain_non_gaussianity(x_0: Row, log_alpha_bar: Row, beta: Row, components: int = 1) -> Float[np.ndarray, " T"]:
    """E KL(q(x_{t−1} given x_t) ‖ its nearest Gaussian) for t = 2…T of one coordinate whose data are x_0, nats.

    With several `components`, to a mixture of so many as `distance_to_a_mixture` finds it. q(x_{t−1}) is the mixture of
    N(√ᾱ_{t−1}·x_0, 1−ᾱ_{t−1}) over the data; `log_alpha_bar` is that of t = 0…T.
    """

    def distance(q: Mixture) -> np.ndarray:
        return non_gaussianity(q) if components == 1 else distance_to_a_mixture(q, components)

    values = []
    z, weights = _hermite(9)
    share = np.full(len(x_0), 1 / len(x_0))
    for t in range(2, len(beta) + 1):
        kept, b = np.exp(log_alpha_bar[t - 1]), beta[t - 1]
        q = Mixture(share, np.sqrt(kept) * x_0, np.full(len(x_0), np.sqrt(1 - kept)))
        if b == 1:
            values.append(float(distance(q)))
            continue
        # x_t given each datum, on Gauss–Hermite nodes
        x_t = np.sqrt(1 - b) * q.means[:, None] + np.sqrt((1 - b) * (1 - kept) + b) * z
        kl = distance(q.reversed_kernel(x_t[..., None], b))
        values.append(float(np.mean(kl @ weights)))
    return np.array(values)
