"""Imputation of held-out rows of real tables by the chain and its peers, scored on the entries that were hidden.

All are fitted to the training rows, which are complete, standardised by their mean and standard deviation, and
then given test rows with entries hidden: 30 % of all at random, in five masks, or a block of a third of the features.
All scores are in the training standard deviations, and their standard errors are over test rows, the masks pooled.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.imputation

| score | what |
|---|---|
| rmse | of the posterior mean, less what the finite number of draws adds |
| rmse point | of the method's own point prediction, or its exact posterior mean |
| coverage, width | of the central 90 % interval of the draws, which covers 90 % if truth and draws are exchangeable |
| log score | of each entry, nats, under the normal distribution with the mean and the variance of the draws |
| log score exact | of each entry, nats, where the method has a marginal density |
| joint | log density of the hidden entries of a row, nats, where the method has one |
| energy | score of the hidden entries of a row, from the draws, without bias; less is better |

A cell is saved in imputation.json as soon as it is done, with the scores of each test row, and not computed again.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV

import probdiff
from probdiff import datasets, networks, posterior, schedules
from probdiff.files import atomic_write
from tests.benchmarks.timing import missing, parser

BLOCKS = {"wine": range(5, 9), "breast-cancer": range(20, 30)}  # the phenols; the "worst …" features
PATTERNS = ("random/0", "random/1", "random/2", "random/3", "random/4", "block")
NUM_DRAWS = 100
FOREST_DRAWS = {13: 100, 30: 20}  # by the number of features: minutes for each mask
LEAST_STD = 0.01  # of the draws, for the log score
SUMS = {  # columns of the table: the score of a row, and what its sum is divided by
    "rmse": ("squared_error", "entries"),
    "rmse point": ("squared_error_point", "entries"),
    "coverage": ("covered", "entries"),
    "width": ("width", "entries"),
    "log score": ("log_score", "entries"),
    "log score exact": ("log_score_exact", "entries"),
    "joint": ("joint", "rows"),
    "energy": ("energy", "rows"),
}
RESULTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Imputed:
    """Draws (M, N, D) of test rows, of which the hidden entries are read, and what else a method may know.

    `log_density` (N,) is of the hidden entries of each row given the others, `marginal` (N, D) of each alone, and
    `point` (N, D) the method's own prediction.
    """

    draws: np.ndarray
    log_density: np.ndarray | None = None
    marginal: np.ndarray | None = None
    point: np.ndarray | None = None
    note: str = ""


Impute = Callable[[np.ndarray, np.ndarray, int], Imputed]  # of test rows (N, D), what is hidden of them, and a seed


def hide(source: str, pattern: str, shape: tuple[int, int]) -> np.ndarray:
    """Which entries of the test rows are hidden, (N, D)."""
    if pattern == "block":
        return np.broadcast_to(np.isin(np.arange(shape[1]), BLOCKS[source]), shape)
    return np.random.default_rng(int(pattern.removeprefix("random/"))).random(shape) < 0.3


def score(imputed: Imputed, test: np.ndarray, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of each test row (N,), summed over its hidden entries."""
    draws = imputed.draws
    mean, variance = draws.mean(0), draws.var(0, ddof=1)
    low, high = np.quantile(draws, (0.05, 0.95), axis=0, method="weibull")
    entries = {
        "entries": np.ones(test.shape),
        "squared_error": (test - mean) ** 2 - variance / len(draws),
        "covered": (low <= test) & (test <= high),
        "width": high - low,
        "log_score": norm.logpdf(test, mean, np.maximum(np.sqrt(variance), LEAST_STD)),
    }
    if imputed.point is not None:
        entries["squared_error_point"] = (test - imputed.point) ** 2
    if imputed.marginal is not None:
        entries["log_score_exact"] = imputed.marginal
    scores = {name: np.where(hidden, value, 0.0).sum(1) for name, value in entries.items()}
    scores["rows"] = hidden.any(1).astype(float)
    scores["energy"] = energy(np.where(hidden, draws, 0.0), np.where(hidden, test, 0.0))
    if imputed.log_density is not None:
        scores["joint"] = np.where(hidden.any(1), imputed.log_density, 0.0)
    return scores


def energy(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """E|X − y| − ½ E|X − X′| of draws (M, N, D) for each of N rows, without bias for any M."""
    spread = sum(np.linalg.norm(draws - draw, axis=-1).sum(0) for draw in draws) / len(draws) / (len(draws) - 1)
    return np.linalg.norm(draws - truth, axis=-1).mean(0) - spread / 2


def mixture_imputer(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray, note: str = "") -> Impute:
    """The exact conditional of a mixture of Gaussians, of one or more components."""

    def impute(test, hidden, seed):
        rng = np.random.default_rng(seed)
        draws = np.tile(test, (NUM_DRAWS, 1, 1))
        joint, marginal, point = np.zeros(len(test)), np.zeros(test.shape), test.copy()
        for i, (row, h) in enumerate(zip(test, hidden, strict=True)):
            if not h.any():
                continue
            o, log_weights, parts = ~h, np.log(weights), []
            for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
                if o.any():
                    log_weights[k] += multivariate_normal(mean[o], covariance[np.ix_(o, o)]).logpdf(row[o])
                gain = np.linalg.solve(covariance[np.ix_(o, o)], covariance[np.ix_(o, h)]).T
                rest = covariance[np.ix_(h, h)] - gain @ covariance[np.ix_(o, h)]
                parts.append((mean[h] + gain @ (row[o] - mean[o]), (rest + rest.T) / 2))
            log_weights -= logsumexp(log_weights)
            locs, variances = np.array([m for m, _ in parts]), np.array([np.diag(c) for _, c in parts])
            joint[i] = logsumexp(log_weights + [multivariate_normal(m, c).logpdf(row[h]) for m, c in parts])
            each = norm.logpdf(row[h], locs, np.sqrt(variances))
            marginal[i, h] = logsumexp(log_weights[:, None] + each, axis=0)
            point[i, h] = np.exp(log_weights) @ locs
            counts = rng.multinomial(NUM_DRAWS, np.exp(log_weights))
            chosen = [rng.multivariate_normal(m, c, n, method="eigh") for (m, c), n in zip(parts, counts, strict=True)]
            draws[:, i, h] = np.concatenate(chosen)
        return Imputed(draws, joint, marginal, point, note)

    return impute


def gaussian(estimator):
    def fit(train):
        fitted = estimator.fit(train)
        note = f"shrinkage {fitted.shrinkage_:.3f}" if hasattr(fitted, "shrinkage_") else ""
        return mixture_imputer(np.ones(1), fitted.location_[None], fitted.covariance_[None], note)

    return fit


def mixture(train):
    """Components, their covariances and the ridge on them by the held-out likelihood in five folds."""
    grid = {
        "n_components": (1, 2, 3, 4, 6, 8, 12, 16),
        "covariance_type": ("full", "tied", "diag"),
        "reg_covar": (1e-4, 1e-3, 1e-2, 1e-1),
    }
    best = GridSearchCV(GaussianMixture(n_init=2, random_state=0), grid, cv=5).fit(train).best_estimator_
    expand = {
        "full": lambda c: c,
        "tied": lambda c: np.tile(c, (best.n_components, 1, 1)),
        "diag": lambda c: c[:, :, None] * np.eye(train.shape[1]),
    }
    covariances = expand[best.covariance_type](best.covariances_)
    note = f"{best.n_components} components, {best.covariance_type}, ridge {best.reg_covar:g}"
    return mixture_imputer(best.weights_, best.means_, covariances, note)


def chained_equations(rounds):
    """scikit-learn's `IterativeImputer` with its Bayesian ridge regressions; all draws are of one call."""

    def fit(train):
        # with tol=0 as many rounds for the point prediction, which on complete training rows would stop after one
        one = IterativeImputer(max_iter=rounds, tol=0.0, random_state=0).fit(train)
        many = IterativeImputer(max_iter=rounds, sample_posterior=True, random_state=0).fit(train)

        def impute(test, hidden, seed):
            masked = np.where(hidden, np.nan, test)
            many.random_state_ = np.random.RandomState(seed)
            draws = many.transform(np.tile(masked, (NUM_DRAWS, 1))).reshape(NUM_DRAWS, *test.shape)
            return Imputed(draws, point=one.transform(masked), note=f"{rounds} rounds")

        return impute

    return fit


def forest(**settings):
    """ForestDiffusion's variance preserving diffusion of boosted trees, imputing with RePaint."""

    def fit(train):
        from ForestDiffusion import ForestDiffusionModel

        cores = len(os.sched_getaffinity(0))
        model = ForestDiffusionModel(train, diffusion_type="vp", n_jobs=cores, nthread=1, seed=0, **settings)

        def impute(test, hidden, seed):
            np.random.seed(seed)  # noqa: NPY002
            m = FOREST_DRAWS[test.shape[1]]
            masked = model.scaler.transform(np.where(hidden, np.nan, test))  # `impute` expects its own scale
            draws = model.impute(X=np.tile(masked, (m, 1)), repaint=True, r=5, j=0.1)
            return Imputed(draws.reshape(m, *test.shape), note=", ".join(f"{k} {v}" for k, v in settings.items()))

        return impute

    return fit


def chain(train, num_timesteps=40, num_steps=20_000, num_particles=500):
    """`probdiff.fit` with no option of its own, and `posterior.sample` of rows with `Missing` entries."""
    d = probdiff.GaussianDiffusion((train.shape[1],), schedules.LearnedBetas(num_timesteps), networks.ResidualMLP())
    fit = probdiff.fit(d, train, rng_key=jax.random.key(0), num_steps=num_steps, progress_bar=False)

    def impute(test, hidden, seed):
        keys = jax.random.split(jax.random.key(seed))
        seen = posterior.Missing(np.where(hidden, np.nan, test))
        dt = posterior.sample(fit, seen, rng_key=keys[0], num_particles=num_particles)
        draws = dt["posterior"].dataset["x_0"].to_numpy()  # chain, draw, datum, feature
        whole = posterior.log_evidence(fit, posterior.Missing(test), rng_key=keys[1], num_particles=num_particles)
        joint = whole.values - dt["evidence"].dataset["log_evidence"].to_numpy()
        apart = draws.shape[1] // -(-NUM_DRAWS // len(draws))  # neighbours may be equal
        few = draws[:, ::apart].swapaxes(0, 1).reshape(-1, *test.shape)[:NUM_DRAWS]
        return Imputed(few, joint, point=draws.mean((0, 1)))

    return impute


METHODS = {
    "probdiff": chain,
    "Gaussian": gaussian(EmpiricalCovariance()),
    "Gaussian, Ledoit–Wolf": gaussian(LedoitWolf()),
    "Gaussian mixture": mixture,
    "IterativeImputer": chained_equations(10),
    "IterativeImputer, 100 rounds": chained_equations(100),
    "ForestDiffusion": forest(n_t=50, duplicate_K=100),  # its defaults; too long for the breast cancers
    "ForestDiffusion, smaller": forest(n_t=50, duplicate_K=20, max_bin=64, n_batch=0),
}


def estimate(total, count, root):
    """Σ total / Σ count over rows (N,), or the root of it, and the influence of each row on it."""
    value = total.sum() / count.sum()
    influence = (total - value * count) / count.sum()
    return (np.sqrt(value), influence / (2 * np.sqrt(value))) if root else (value, influence)


def table(cells, against=None):
    """A line for each method, with standard errors; or all less those of the method `against`, paired by row."""
    lines = []
    for source, pattern, method in product(BLOCKS, ("random", "block"), METHODS):
        masks = [p for p in PATTERNS if p.startswith(pattern) and f"{source}/{method}/{p}" in cells]
        masks = [p for p in masks if against is None or f"{source}/{against}/{p}" in cells]
        if not masks:
            continue
        sums, base = (pooled([cells[f"{source}/{m}/{p}"] for p in masks]) if m else {} for m in (method, against))
        line = {"data": source, "hidden": pattern, "masks": len(masks), "method": method}
        for name, (total, count) in SUMS.items():
            if total in sums and (not base or total in base):
                value, influence = estimate(sums[total], sums[count], name.startswith("rmse"))
                if base:
                    theirs = estimate(base[total], base[count], name.startswith("rmse"))
                    value, influence = value - theirs[0], influence - theirs[1]
                error = np.sqrt(len(influence) / (len(influence) - 1) * (influence**2).sum())
                line[name] = f"{value:.3f} ± {error:.3f}"
        parts = [cells[f"{source}/{method}/{p}"] for p in masks]
        line |= {"draws": parts[0]["draws"], "fit, s": parts[0]["fit_seconds"]}
        line |= {"a mask, s": round(np.mean([part["seconds"] for part in parts]), 1), "note": parts[0]["note"]}
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def pooled(parts):
    """The scores of each row (N,), summed over masks."""
    return {name: np.sum([part["scores"][name] for part in parts], axis=0) for name in parts[0]["scores"]}


def save(key, cell):
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cells[key] = cell
    lines = [f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(value)}" for name, value in cells.items()]
    with atomic_write(RESULTS) as file:
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(source, method, patterns, make=None, num_rows=None, keep=save):
    """Computes cells of a method, made by `make` if not as in the table, on the first rows, and keeps each."""
    split = datasets.load(source, rng_key=jax.random.key(0))
    loc, scale = split.train.mean(0), split.train.std(0)
    train, test = (split.train - loc) / scale, (split.test[:num_rows] - loc) / scale
    start = time.perf_counter()
    impute = (make or METHODS[method])(train)
    fit_seconds = round(time.perf_counter() - start, 1)
    for seed, pattern in enumerate(PATTERNS):
        if pattern not in patterns:
            continue
        hidden = hide(source, pattern, test.shape)
        start = time.perf_counter()
        imputed = impute(test, hidden, seed)
        seconds = round(time.perf_counter() - start, 1)
        scores = {name: np.round(value, 4).tolist() for name, value in score(imputed, test, hidden).items()}
        cell = {"note": imputed.note, "draws": len(imputed.draws), "fit_seconds": fit_seconds, "seconds": seconds}
        keep(f"{source}/{method}/{pattern}", cell | {"scores": scores})
        print(f"{source}/{method}/{pattern}: fit {fit_seconds} s, imputed in {seconds} s", flush=True)


def main():
    options = parser(__doc__)
    options.add_argument(
        "--only", default="", help="a part of the names of the cells to compute, such as wine/Gaussian"
    )
    options.add_argument("--against", choices=METHODS, help="print the differences from this method, paired by row")
    args = options.parse_args()
    if args.small:
        cells = {}
        few = {"Gaussian": None, "probdiff": partial(chain, num_timesteps=3, num_steps=20, num_particles=25)}
        for method, make in few.items():
            run("wine", method, ["block"], make, 3, cells.__setitem__)
        print(table(cells).to_string(index=False))
        return
    absent = missing("ForestDiffusion")
    for method in METHODS:
        if absent and method.startswith("ForestDiffusion"):
            continue
        for source in BLOCKS:
            cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            keys = {p: f"{source}/{method}/{p}" for p in PATTERNS}
            if wanted := [p for p, key in keys.items() if key not in cells and args.only in key]:
                run(source, method, wanted)
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    print(table(cells, args.against).to_string(index=False))


if __name__ == "__main__":
    main()
