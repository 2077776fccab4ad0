"""What bitwise-independent reverse kernels can reach at all on data of finitely many sequences of bits."""

import numpy as np


def best_elbo(sequences, beta, num_draws):
    """K* of the best bitwise-independent kernels for equally likely `sequences` (M, D), and its standard error, nats.

    The best p(x_{t−1} given x_t) has the marginals of q(x_{t−1} given x_t) = Σ_m q(m given x_t)·q(x_{t−1} given x_t,
    x_0 = m). So each term of K is E_{x_t} Σ_m q(m given x_t)·KL(q(x_{t−1} given x_t, m) ‖ p(x_{t−1} given x_t)): x_t is
    drawn, and x_0 given x_t is summed out. q(x_T) must be π in every bit, so that K has no prior term.
    """
    base_rate = 0.5
    rng, (M, D), T = np.random.default_rng(0), sequences.shape, len(beta)
    x_0 = sequences.astype(float)
    keep = np.concatenate([[1.0], np.cumprod(1 - beta)])
    if keep[-1] > 1e-12:
        raise ValueError("q(x_T) still depends on x_0")
    total, variance = 0.0, 0.0
    for t in range(1, T + 1):
        rate = x_0 * keep[t] + base_rate * (1 - keep[t])  # (M, D), of x_t
        x_t = (rng.uniform(size=(num_draws, D)) < rate[rng.integers(0, M, num_draws)]).astype(float)
        log_q = x_t @ np.log(rate).T + (1 - x_t) @ np.log1p(-rate).T
        weight = np.exp(log_q - log_q.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)  # (S, M)
        before = x_0 * keep[t - 1] + base_rate * (1 - keep[t - 1])
        on = (1 - beta[t - 1]) + base_rate * beta[t - 1], base_rate * beta[t - 1]  # of x_t = 1 given x_{t−1} = 1 and 0
        like = [np.where(x_t == 1, rate_of_one, 1 - rate_of_one)[:, None] for rate_of_one in on]
        one, zero = like[0] * before, like[1] * (1 - before)
        kl = 0.0
        for part in (one, zero):
            q = part / (one + zero)  # (S, M, D), of x_{t−1} given x_t and m
            p = np.einsum("sm,smd->sd", weight, q)[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = kl + np.where((q > 0) & (weight[..., None] > 0), q * (np.log(q) - np.log(p)), 0.0)
        term = np.einsum("sm,smd->s", weight, kl)
        total -= term.mean()
        variance += term.var() / num_draws
    return total, np.sqrt(variance)
