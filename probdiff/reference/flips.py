"""Feller's statement N6 for bits: how far the reversed forward kernel is from a product of Bernoullis, in float64.

q(x_t given x_{t−1}) flips each bit by itself. The reversed kernel q(x_{t−1} given x_t = x) flips bit i with probability
λ_i = β·c_i·r_i to first order in β, and bits i and j both with β²·c_i·c_j·r_ij, where r_i and r_ij are q(x with these
bits flipped)/q(x), and β·c_i is the chance that the forward kernel brings bit i from its other value to x_i: c_i = π
where x_i = 1, else 1 − π. A product with the same marginals flips both with λ_i·λ_j. All else agrees to that order, so

    KL(q(x_{t−1} given x_t) ‖ its nearest product) → β²·Σ_{i<j} c_i c_j·(r_ij·log(r_ij/(r_i r_j)) − r_ij + r_i r_j).

The nearest product is that of its marginals, and the KL is the total correlation of the bits.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from probdiff.reference.quadrature import state_number, states

type States = Float[np.ndarray, "... M"]  # probabilities, M = 2^D, in the order of `states`


def step_matrix(beta: float, pi: Float[np.ndarray, " D"]) -> Float[np.ndarray, "M M"]:
    """q(x_t given x_{t−1}), N3, over all states of D bits: from the rows to the columns."""
    bits = states(len(pi)).astype(int)
    given_0, given_1 = np.stack([1 - pi * beta, pi * beta]), np.stack([(1 - pi) * beta, 1 - (1 - pi) * beta])
    of_bit = np.stack([given_0, given_1])  # (from, to, D)
    return np.prod(of_bit[bits[:, None], bits[None], np.arange(len(pi))], axis=-1)


def reversed_kernel(q: States, step: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "M M"]:
    """q(x_{t−1} given x_t) where x_{t−1} has the distribution q: a row for each x_t, by Bayes' rule."""
    joint = (q[:, None] * step).T
    return joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)


def total_correlation(p: States) -> Float[np.ndarray, "..."]:
    """KL(p ‖ the product of its marginals) of distributions over all states of some bits, nats.

    Written as Σ g·(r·log r − r + 1) ≥ 0, r = p/g, so that small values keep their digits.
    """
    bits = states(int(np.log2(p.shape[-1])))
    on, off = p @ bits, p @ (1 - bits)
    product = np.prod(np.where(bits == 1, on[..., None, :], off[..., None, :]), axis=-1)
    r = p / np.maximum(product, 1e-300)
    return np.sum(product * (r * np.log(np.maximum(r, 1e-300)) - r + 1), -1)


def rate(
    q: Float[np.ndarray, " M"], x: Float[np.ndarray, " D"], base_rate: float, betas: ArrayLike
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """For each β: the KL at x_t = x, and what theory says of it as β → 0."""
    D, n, betas = len(x), state_number(x), np.asarray(betas, np.float64)
    pi = np.full(D, base_rate)
    kl = np.array([total_correlation(reversed_kernel(q, step_matrix(beta, pi))[n]) for beta in betas])
    c = np.where(x == 1, base_rate, 1 - base_rate)

    def ratio(*flipped: int) -> float:
        y = x.copy()
        y[list(flipped)] = 1 - y[list(flipped)]
        return float(q[state_number(y)] / q[n])

    r = [ratio(i) for i in range(D)]
    limit = 0.0
    for i, j in combinations(range(D), 2):
        both, apart = ratio(i, j), r[i] * r[j]
        limit += c[i] * c[j] * (both * np.log(both / apart) - both + apart)
    return kl, betas**2 * limit


def chain_total_correlation(
    x_0: Float[np.ndarray, "N D"], beta: Float[np.ndarray, " T"], pi: Float[np.ndarray, " D"]
) -> Float[np.ndarray, " T"]:
    """E KL(q(x_{t−1} given x_t) ‖ its nearest product) for t = 1…T, where q(x_0) is that of the data x_0, nats."""
    q = np.bincount(state_number(x_0), minlength=2 ** x_0.shape[1]) / len(x_0)
    values = []
    for b in beta:
        step = step_matrix(b, pi)
        q_t = q @ step
        values.append(q_t @ total_correlation(reversed_kernel(q, step)))
        q = q_t
    return np.array(values)
