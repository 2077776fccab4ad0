"""Held-out bits per image of binarised digits (8×8, ink of at least half the most): the binomial chain and two peers.

    python -m tests.benchmarks.binary_digits

A fixed split; five seeds for what is random. A mixture of products of Bernoullis by EM, its size and its prior counts
chosen on held-out training rows; a logistic autoregressive model, each pixel given those before it, in exact
likelihood, its penalty chosen likewise. The chain's figure is a lower bound. None of them compares with the bound of a
Gaussian chain on dequantised digits, which is a density.
"""

import time

import jax
import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

import probdiff
from probdiff import datasets, networks, schedules
from tests.benchmarks.timing import parser, report


def mixture(x, rng, size, count, steps=200):
    """Log weights and rates of a mixture of products of Bernoullis by EM, `count` observations of either bit added."""
    rate = np.clip(
        x[rng.choice(len(x), size, replace=False)] * 0.5 + 0.25 + rng.uniform(-0.1, 0.1, (size, x.shape[1])), 0.05, 0.95
    )
    log_weight = np.full(size, -np.log(size))
    for _ in range(steps):
        log_p = log_weight + x @ np.log(rate).T + (1 - x) @ np.log1p(-rate).T
        share = np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
        n = share.sum(0)
        rate = (share.T @ x + count) / (n[:, None] + 2 * count)
        log_weight = np.log((n + count) / (n + count).sum())
    return log_weight, rate


def mixture_log_p(fitted, x):
    log_weight, rate = fitted
    return logsumexp(log_weight + x @ np.log(rate).T + (1 - x) @ np.log1p(-rate).T, axis=1)


def autoregressive_log_p(train, test, penalty):
    log_p = np.zeros(len(test))
    for i in range(train.shape[1]):
        if i == 0 or len(np.unique(train[:, i])) == 1:
            rate = (train[:, i].sum() + 0.5) / (len(train) + 1)
            log_p += np.where(test[:, i] == 1, np.log(rate), np.log1p(-rate))
        else:
            model = LogisticRegression(C=penalty, max_iter=2000).fit(train[:, :i], train[:, i])
            log_p += model.predict_log_proba(test[:, :i])[np.arange(len(test)), test[:, i].astype(int)]
    return log_p


def main():
    small = parser(__doc__).parse_args().small
    num_seeds, num_steps = (1, 20) if small else (5, 20_000)
    parts = datasets.load("binary-digits", rng_key=jax.random.key(0))
    train, test = parts.train.astype(float), parts.test.astype(float)
    inner, held = train[: -len(train) // 6], train[-len(train) // 6 :]
    rows = []

    def add(method, log_p, note, seconds=None):
        bits = -np.stack(log_p) / np.log(2)
        means = bits.mean(1)
        rows.append({"method": method, "bits an image": f"{means.mean():.2f}",
                     "se seeds": f"{means.std(ddof=1) / np.sqrt(len(means)):.2f}" if len(means) > 1 else "",
                     "se data": f"{bits.mean(0).std(ddof=1) / np.sqrt(len(test)):.2f}", "note": note,
                     "s": "" if seconds is None else round(seconds)})  # fmt: skip
        print(rows[-1], flush=True)

    tried = {
        (size, count): mixture_log_p(mixture(inner, np.random.default_rng(0), size, count), held).mean()
        for size in ((20,) if small else (20, 40, 80, 160, 320)) for count in ((0.1,) if small else (0.1, 0.3, 1.0))
    }  # fmt: skip
    size, count = max(tried, key=tried.get)
    fits = [mixture_log_p(mixture(train, np.random.default_rng(seed), size, count), test) for seed in range(num_seeds)]
    add("mixture of Bernoullis", fits, f"{size} components, {count} added")
    tried = {
        c: autoregressive_log_p(inner, held, c).mean() for c in ((1.0,) if small else (0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
    }
    penalty = max(tried, key=tried.get)
    add("logistic autoregressive", [autoregressive_log_p(train, test, penalty)], f"C = {penalty}")
    for T in (5,) if small else (50, 200):
        for components in (1,) if small else (1, 10):
            log_p, start, steps = [], time.perf_counter(), []
            for seed in range(num_seeds):
                schedule = schedules.LearnedBetas(T, schedules.harmonic(T))
                d = probdiff.BinomialDiffusion((64,), schedule, networks.ResidualMLP(), components=components)
                fit = probdiff.fit(
                    d, parts.train, rng_key=jax.random.key(seed), num_steps=num_steps, progress_bar=False
                )
                steps.append(fit.losses.size)
                log_p.append(fit.log_likelihood(parts.test, rng_key=jax.random.key(9), num_draws=20).values)
            name = f"probdiff (lower bound), T = {T}, {components} component(s)"
            add(name, log_p, f"{int(np.median(steps))} steps", (time.perf_counter() - start) / num_seeds)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
