"""Missing values in real tables: draws of the hidden entries given the others, by the chain and by its peers.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.imputation [METHOD …]

The training rows of `real_data` are whole; of the test rows 30 % of the entries are hidden at random (three masks), or
a block: "flavanoids" to "hue" of wine, the ten "worst …" features of breast cancer. Scores are of the hidden entries,
each divided by the standard deviation of its feature over the training rows, with the standard error over the test
rows, the masks of a row taken together: RMSE of the mean of 100 draws (of ForestDiffusion 20), coverage of the central
90 % of them, log score of a normal with their mean and variance, and, where there is a density, the joint log density
of a row's hidden entries.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
import pandas as pd
from scipy.stats import multivariate_normal, norm
from sklearn.covariance import LedoitWolf
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer

import probdiff
from probdiff import datasets, networks, posterior, schedules
from probdiff.files import atomic_write

RESULTS = Path(__file__).with_suffix(".json")
BLOCKS = {"wine": ("flavanoids", "hue"), "breast-cancer": ("worst radius", "worst fractal dimension")}
NUM_DRAWS, MASKS, LEVEL = 100, 3, 0.9


def chain(train, holes, x):
    """`probdiff.fit` with no option, and `posterior.sample` of the rows with `Missing` entries."""
    d = probdiff.GaussianDiffusion((train.shape[1],), schedules.LearnedBetas(40), networks.ResidualMLP())
    fit = probdiff.fit(d, train, rng_key=jax.random.key(0), progress_bar=False)
    draws, log_density = [], []
    for i, table in enumerate(holes):
        dt = posterior.sample(fit, posterior.Missing(table), rng_key=jax.random.key(i), num_particles=500)
        of_chain = dt["posterior"].dataset["x_0"].transpose("draw", "chain", "datum", "feature").to_numpy()
        draws.append(of_chain.reshape(-1, *x.shape)[:: 4000 // NUM_DRAWS])
        both = posterior.log_evidence(fit, posterior.Missing(x), rng_key=jax.random.key(100 + i), num_particles=500)
        log_density.append(both.values - dt["evidence"].dataset["log_evidence"].to_numpy())
    return np.stack(draws), np.stack(log_density)


def gaussian(train, holes, x):
    """A normal with Ledoit and Wolf's covariance, conditioned exactly."""
    fitted, rng = LedoitWolf().fit(train), np.random.default_rng(0)
    m, S = fitted.location_, fitted.covariance_
    draws = np.repeat(holes[:, None], NUM_DRAWS, 1)
    log_density = np.zeros(holes.shape[:2])
    for i, j in np.ndindex(holes.shape[:2]):
        h = np.isnan(holes[i, j])
        if not h.any():
            continue
        gain = S[np.ix_(h, ~h)] @ np.linalg.inv(S[np.ix_(~h, ~h)])
        given = multivariate_normal(m[h] + gain @ (x[j, ~h] - m[~h]), S[np.ix_(h, h)] - gain @ S[np.ix_(~h, h)])
        draws[i, :, j, h] = np.reshape(given.rvs(NUM_DRAWS, random_state=rng), (NUM_DRAWS, -1)).T
        log_density[i, j] = given.logpdf(x[j, h])
    return draws, log_density


def iterative(train, holes, x):
    """scikit-learn's `IterativeImputer`, Bayesian ridge regressions in turn, one run for each draw."""
    draws = []
    for table in holes:
        runs = [
            IterativeImputer(sample_posterior=True, max_iter=20, random_state=m).fit(train).transform(table)
            for m in range(NUM_DRAWS)
        ]
        draws.append(np.stack(runs))
    return np.stack(draws), None


def forest(train, holes, x):
    """ForestDiffusion's imputation with RePaint, fitted to the training rows and those with holes, as it asks."""
    from ForestDiffusion import ForestDiffusionModel

    draws = []
    for table in holes:
        both = np.concatenate([train, table])
        model = ForestDiffusionModel(both, n_t=50, duplicate_K=50, diffusion_type="vp", bin_indexes=[], cat_indexes=[],
                                     int_indexes=[], n_jobs=2)  # fmt: skip
        filled = model.impute(repaint=True, r=10, j=5, k=20)
        draws.append(np.stack(filled)[:, len(train) :])
    return np.stack(draws), None


METHODS = {
    "probdiff": chain,
    "Gaussian, Ledoit–Wolf": gaussian,
    "IterativeImputer": iterative,
    "ForestDiffusion": forest,
}


def tables(source, pattern):
    """Training and test rows in standard deviations of the former, and the latter with holes, (masks, N, D)."""
    data = datasets.load(source, rng_key=jax.random.key(0))
    mean, sd = data.train.mean(0), data.train.std(0)
    train, x = (data.train - mean) / sd, (data.test - mean) / sd
    if pattern == "random":
        hidden = np.random.default_rng(0).random((MASKS, *x.shape)) < 0.3
    else:
        first, last = (data.features.index(name) for name in BLOCKS[source])
        hidden = np.zeros((1, *x.shape), bool)
        hidden[..., first : last + 1] = True
    return train, x, np.where(hidden, np.nan, x)


def scores(draws, log_density, holes, x):
    """Means over hidden entries, with standard errors over rows."""
    hidden = np.isnan(holes)
    mean, sd = draws.mean(1), draws.std(1, ddof=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    per_row = lambda values: np.where(hidden, values, 0).sum((0, 2))  # noqa: E731
    count = hidden.sum((0, 2))

    def ratio(values):
        total, n = per_row(values), len(x)
        estimate = total.sum() / count.sum()
        return estimate, np.std(total - estimate * count, ddof=1) * np.sqrt(n) / count.sum()

    square, square_se = ratio((mean - x) ** 2)
    covered, covered_se = ratio((low <= x) & (x <= high))
    log_score, log_se = ratio(norm.logpdf(x, mean, np.maximum(sd, 1e-6)))
    row = {"RMSE": np.sqrt(square), "RMSE se": square_se / 2 / np.sqrt(square), "coverage": covered,
           "coverage se": covered_se, "log score": log_score, "log score se": log_se}  # fmt: skip
    if log_density is not None:
        joint = log_density.mean(0)
        row |= {"joint": joint.mean(), "joint se": joint.std(ddof=1) / np.sqrt(len(x))}
    return {name: float(value) for name, value in row.items()}


if __name__ == "__main__":
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for method in sys.argv[1:] or METHODS:
        for source in BLOCKS:
            for pattern in ("random", "block"):
                train, x, holes = tables(source, pattern)
                start = time.perf_counter()
                with warnings.catch_warnings(record=True) as told:
                    draws, log_density = METHODS[method](train, holes, x)
                for one in {str(w.message) for w in told if "collapsed" in str(w.message)}:
                    print(f"{method}, {source}, {pattern}: {one}")
                cell = {"data": source, "hidden": pattern, "method": method}
                cells = [c for c in cells if {k: c[k] for k in cell} != cell]
                seconds = time.perf_counter() - start
                cells.append(cell | scores(draws, log_density, holes, x) | {"seconds": seconds})
                with atomic_write(RESULTS) as file:
                    file.write_text(json.dumps(cells, indent=1))
    frame = pd.DataFrame(cells).sort_values(["data", "hidden"], ascending=False, kind="stable")
    for name in ("RMSE", "coverage", "log score", "joint"):
        errors = frame.pop(f"{name} se")
        frame[name] = ["" if np.isnan(v) else f"{v:.3f} ± {e:.3f}" for v, e in zip(frame[name], errors, strict=True)]
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.0f}"))
