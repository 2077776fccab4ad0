"""Linear-Gaussian problems on a mixture of 25 Gaussians in 64 dimensions, with their exact posteriors.

    python tests/benchmarks/guidance_problems.py

After Cardoso et al. (2023, MCGDiff): component means (8i, 8j, 8i, 8j, …) for i, j in -2…2, covariance I, weights ∝
χ²(1), all standardised feature by feature; y = A x + σ ε, where A (M, D) has random singular vectors and singular
values from U(0, 1). There are two levels of noise: "wide", σ = u · sd(A x) with u from U(0.1, 1), and "narrow", as in
their code, where A acts on x before standardising and σ = u · max(singular values) with u from U(0, 1), some 0.05 of
the sd of A x. A file runs/guidance/LEVEL_M.npz holds ten problems for the NumPy, PyTorch and JAX sides, and
tune_LEVEL_M.npz three others.
"""

import json
from pathlib import Path

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

FOLDER = Path("runs/guidance")
LEVELS = ("wide", "narrow")
D, PROBLEMS, DRAWS = 64, 10, 1000


def prior(seed=0):
    """Weights (25,), means (25, D), variances (D,) of the standardised mixture, and the sd (D,) it was divided by."""
    rng = np.random.default_rng(seed)
    grid = 8.0 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])
    means = np.tile(grid, (1, D // 2))
    weights = rng.chisquare(1, 25)
    weights /= weights.sum()
    centre = weights @ means
    sd = np.sqrt(weights @ (means - centre) ** 2 + 1)
    return weights, (means - centre) / sd, 1 / sd**2, sd


def draw(rng, weights, means, covariance, n):
    """n draws (n, D) of a mixture whose components share one covariance (D, D)."""
    at = rng.choice(len(weights), n, p=weights)
    return means[at] + rng.normal(size=(n, means.shape[1])) @ np.linalg.cholesky(covariance).T


def posterior(weights, means, variances, A, noise, y):
    """Weights (25,), means (25, D) and shared covariance (D, D) of x given y, and log p(y)."""
    spread = A * variances
    of_y = spread @ A.T + noise**2 * np.eye(len(y))
    log_w = np.log(weights) + [multivariate_normal.logpdf(y, A @ m, of_y) for m in means]
    log_evidence = logsumexp(log_w)
    gain = np.linalg.solve(of_y, spread).T
    covariance = np.diag(variances) - gain @ spread
    means = means + (y - means @ A.T) @ gain.T
    return np.exp(log_w - log_evidence), means, (covariance + covariance.T) / 2, log_evidence


def problems(M, level, seed=0, count=PROBLEMS):
    weights, means, variances, sd = prior()
    rows = []
    for n in range(count):
        rng = np.random.default_rng([seed, M, n])
        u, _, vt = np.linalg.svd(rng.normal(size=(M, D)), full_matrices=False)
        values = np.sort(rng.uniform(size=M))[::-1]
        A = u * values @ vt
        x_0 = draw(rng, weights, means, np.diag(variances), 1)[0]
        if level == "wide":
            within = np.sum(A**2 * variances, 1)
            between = weights @ (means @ A.T) ** 2 - (weights @ means @ A.T) ** 2
            noise = rng.uniform(0.1, 1) * np.sqrt(np.mean(within + between))
        else:
            noise = rng.uniform() * values.max() / sd.mean()
            A = A * sd / sd.mean()
        y = A @ x_0 + noise * rng.normal(size=M)
        rows.append((A, noise, y, x_0, *posterior(weights, means, variances, A, noise, y)))
    names = "A", "noise", "y", "x_0", "post_weights", "post_means", "post_covariance", "log_evidence"
    columns = {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return {"weights": weights, "means": means, "variances": variances} | columns


def path(level, M):
    return FOLDER / f"{level}_{M}.npz"


def save(library, level, M, K, draws, meta):
    """Adds draws and how they were made, each by sampler, to those of a cell."""
    file = FOLDER / f"draws_{library}_{level}_{M}_{K}.npz"
    if file.exists():
        draws, meta = dict(np.load(file)) | draws, json.loads(file.with_suffix(".json").read_text()) | meta
    np.savez(file, **draws)
    file.with_suffix(".json").write_text(json.dumps(meta, indent=1))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for level in LEVELS:
        for M in (1, 4, 32):
            p = problems(M, level)
            np.savez(path(level, M), **p)
            np.savez(FOLDER / f"tune_{level}_{M}.npz", **problems(M, level, seed=1, count=3))
            modes = np.exp(-np.sum(p["post_weights"] * np.log(p["post_weights"] + 1e-300), 1))
            print(level, M, "effective modes", modes.round(1), "noise", p["noise"].round(3))
