"""The best ELBO that bitwise-independent reverse kernels can reach on finitely many sequences of bits, in float64.

Given q, the best product of Bernoullis p(x_{t−1} given x_t) has the marginals of q(x_{t−1} given x_t) =
Σ_m q(m given x_t)·q(x_{t−1} given x_t, x_0 = m). So the terms of N17 become

    K* = −E KL(q(x_T given x_0) ‖ p(x_T))
         − Σ_t E_{x_t} Σ_m q(m given x_t)·KL(q(x_{t−1} given x_t, m) ‖ p(x_{t−1} given x_t)),

q(x_0 given x_1, m) being m itself. x_t is drawn, and x_0 given x_t is summed out.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import rel_entr, softmax, xlog1py, xlogy

from probdiff.checks import check_bits, check_count


def best_terms(
    sequences: ArrayLike, beta: ArrayLike, *, num_draws: int, base_rate: float = 0.5, seed: int = 0
) -> tuple[Float[np.ndarray, " T+1"], Float[np.ndarray, " T+1"]]:
    """The terms of −K* where x_0 is any of `sequences` (M, D) alike, and their standard errors; (T+1,) each, nats.

    The first term is that of x_T, in closed form, the others are those of t = 1…T, each from `num_draws` draws of
    x_t. `beta` (T,). Raises `ValueError` or `TypeError` for sequences that are no bits, for a β_t outside (0, 1], a
    base_rate outside (0, 1) and fewer than two draws.
    """
    if np.ndim(sequences) != 2:
        raise ValueError(f"sequences has shape {np.shape(sequences)}; it must be (M, D)")
    x_0, beta = check_bits(sequences, np.shape(sequences)[1:], "sequences").astype(float), np.asarray(beta, float)
    if beta.ndim != 1 or not np.all((beta > 0) & (beta <= 1)):
        raise ValueError(f"beta is {beta}; it must have shape (T,) and numbers above 0, at most 1")
    if not 0 < base_rate < 1:
        raise ValueError(f"base_rate is {base_rate}; it must be between 0 and 1")
    check_count(num_draws, "num_draws", 2)
    rng, alpha_bar = np.random.default_rng(seed), np.cumprod(np.append(1.0, 1 - beta))
    rates = x_0 * alpha_bar[:, None, None] + base_rate * (1 - alpha_bar[:, None, None])  # (T+1, M, D), of x_t given m
    last = rates[-1]
    terminal = rel_entr(last, base_rate) + rel_entr(1 - last, 1 - base_rate)
    terms, errors = [terminal.sum(-1).mean()], [0.0]
    for t in range(1, len(beta) + 1):
        x_t = (rng.uniform(size=(num_draws, x_0.shape[1])) < rates[t, rng.integers(0, len(x_0), num_draws)])[:, None]
        share = softmax((xlogy(x_t, rates[t]) + xlog1py(1 - x_t, -rates[t])).sum(-1), axis=1)  # (S, M)
        of_one, of_zero = (1 - beta[t - 1]) + base_rate * beta[t - 1], base_rate * beta[t - 1]  # x_t = 1, given x_{t−1}
        one, zero = np.where(x_t, of_one, 1 - of_one), np.where(x_t, of_zero, 1 - of_zero)
        one, zero = one * rates[t - 1], zero * (1 - rates[t - 1])
        kl = np.zeros(share.shape)
        for part in (one, zero):  # each by itself, so that small probabilities keep their digits
            of_m = part / np.where(one + zero > 0, one + zero, 1.0)  # of x_{t−1}; (S, M, D)
            kl += rel_entr(of_m, np.einsum("sm,smd->sd", share, of_m)[:, None]).sum(-1)
        draws = np.sum(share * np.where(share > 0, kl, 0.0), axis=1)  # a sequence that x_t excludes has no share
        terms.append(draws.mean())
        errors.append(draws.std(ddof=1) / np.sqrt(num_draws))
    return np.array(terms), np.array(errors)
