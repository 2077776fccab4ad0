"""Held-out log-likelihood of real tables: chains of 40 and of 8 steps, and their peers.

One split into training and test rows for each data set, the same for all; digits are dequantised once. The peers get
the training rows standardised, and all densities are in the data's own units. A chain's figure is the lower bound K,
its peers' are exact. T = 40 is fitted with even times, T = 8 with the default options. The peers' choices, by their
own rules on the training rows: the components and the covariance type of the mixture by BIC, the bandwidth of the
kernel density by cross-validation, the size of the flow by the validation rows on which it stops early.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.real_data

A cell is saved in real_data.json as soon as it is done, with the log density of each test row, and not computed again.
"""

import json
import os
import time
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
import pandas as pd
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.datasets import transforms
from probdiff.files import atomic_write
from tests.benchmarks.timing import missing, parser

SOURCES = ("wine", "breast-cancer", "digits")
RESULTS = Path(__file__).with_suffix(".json")


def chain(train, test, seed, num_steps=20_000):
    d = probdiff.GaussianDiffusion((train.shape[1],), schedules.LearnedBetas(40), networks.ResidualMLP())
    fit = probdiff.fit(d, train, rng_key=jax.random.key(seed), num_steps=num_steps, times="even", progress_bar=False)
    bound = fit.log_likelihood(test, rng_key=jax.random.key(1000 + seed), num_draws=20)
    return bound.values, f"{len(fit.losses)} steps"


def short_chain(train, test, seed):
    d = probdiff.GaussianDiffusion((train.shape[1],), schedules.LearnedBetas(8), networks.ResidualMLP(), components=4)
    fit = probdiff.fit(d, train, rng_key=jax.random.key(seed), progress_bar=False)
    bound = fit.log_likelihood(test, rng_key=jax.random.key(1000 + seed), num_draws=20)
    return bound.values, f"{len(fit.losses)} steps"


def short_chain_of_transformed(train, test, seed):
    """As `short_chain`, of columns that are each brought near a normal by the transform that their rows choose."""
    chosen = [transforms.choose(column) for column in train.T]
    e, e_test = (np.stack([f(x) for f, x in zip(chosen, rows.T, strict=True)], 1) for rows in (train, test))
    values, note = short_chain(e, e_test, seed)
    log_slope = sum(f.log_slope(x) for f, x in zip(chosen, test.T, strict=True))
    return values + log_slope, note


def gaussian(estimator):
    def log_density(train, test, seed):
        fitted = estimator.fit(train)
        return multivariate_normal(fitted.location_, fitted.covariance_).logpdf(test), ""

    return log_density


def mixture(train, test, seed):
    candidates = [
        GaussianMixture(k, covariance_type=kind, reg_covar=1e-4, n_init=3, random_state=seed).fit(train)
        for k, kind in product((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96), ("full", "tied", "diag", "spherical"))
        if k < len(train) / 4
    ]
    best = min(candidates, key=lambda candidate: candidate.bic(train))
    return best.score_samples(test), f"{best.n_components} components, {best.covariance_type}"


def kernel_density(train, test, seed):
    search = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.05, 2, 40)}, cv=5).fit(train)
    return search.best_estimator_.score_samples(test), f"bandwidth {search.best_params_['bandwidth']:.2f}"


def flow(train, test, seed):
    """flowjax's masked autoregressive flow of rational quadratic splines; the identity outside of [−5, 5]."""
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    best = None
    for layers, width in ((2, 32), (5, 64)):
        flow_key, fit_key = jax.random.split(jax.random.key(seed))
        untrained = masked_autoregressive_flow(
            flow_key,
            base_dist=Normal(np.zeros(train.shape[1])),
            transformer=RationalQuadraticSpline(knots=8, interval=5),
            flow_layers=layers,
            nn_width=width,
        )
        trained, losses = fit_to_data(
            fit_key,
            untrained,
            train.astype(np.float32),
            learning_rate=1e-3,
            batch_size=min(100, len(train) // 5),
            val_prop=0.15,  # as the chain
            max_epochs=500,
            max_patience=20,
            show_progress=False,
        )
        if best is None or min(losses["val"]) < best[0]:
            best = min(losses["val"]), trained, f"{layers} layers of {width}, {len(losses['val'])} epochs"
    return np.asarray(best[1].log_prob(test.astype(np.float32)), np.float64), best[2]


CHAIN = "probdiff (lower bound)"
METHODS = {  # and the number of seeds: 1 where nothing is random
    "Gaussian": (gaussian(EmpiricalCovariance()), 1),
    "Gaussian, Ledoit–Wolf": (gaussian(LedoitWolf()), 1),
    "kernel density": (kernel_density, 1),
    "Gaussian mixture": (mixture, 5),
    "spline flow": (flow, 5),
    "probdiff, T = 8, M = 4 (lower bound)": (short_chain, 5),
    "probdiff, T = 8, M = 4, transformed (lower bound)": (short_chain_of_transformed, 5),
    CHAIN: (chain, 5),
}


def compute(source, method, seed, fit=None):
    split = datasets.load(source, rng_key=jax.random.key(0))
    train, test, log_det = split.train, split.test, 0.0
    if not method.startswith("probdiff"):  # `fit` standardises
        loc, scale = train.mean(0), train.std(0)
        train, test, log_det = (train - loc) / scale, (test - loc) / scale, np.log(scale).sum()
    start = time.perf_counter()
    values, note = (fit or METHODS[method][0])(train, test, seed)
    return {
        "values": np.round(values - log_det, 4).tolist(),
        "note": note,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(cells):
    """Nats per datum, more is better; for digits bits per dimension, less is better."""
    rows = []
    for source in SOURCES:
        unit = -1 / (64 * np.log(2)) if source == "digits" else 1.0
        values = {
            method: unit
            * np.array([cells[key]["values"] for seed in range(n) if (key := f"{source}/{method}/{seed}") in cells])
            for method, (_, n) in METHODS.items()
        }
        for method, v in values.items():
            if not len(v):
                continue
            row = {"data": source, "method": method, "unit": "bits/dim" if source == "digits" else "nats"}
            row |= {"mean": v.mean(), "seeds": len(v)}
            row["se seeds"] = standard_error(v.mean(1)) if len(v) > 1 else np.nan
            row["se data"] = standard_error(v.mean(0))
            if len(values[CHAIN]):
                difference = values[CHAIN].mean(0) - v.mean(0)
                row |= {"chain less this": difference.mean(), "se paired": standard_error(difference)}
            row["note"] = next(cell["note"] for key, cell in cells.items() if key.startswith(f"{source}/{method}/"))
            rows.append(row)
    return pd.DataFrame(rows)


def show(cells):
    print(table(cells).to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def standard_error(values):
    return values.std(ddof=1) / np.sqrt(len(values))


def main():
    options = parser(__doc__)
    options.add_argument("--only", default="", help="a part of the names of the cells to compute, such as wine or flow")
    args = options.parse_args()
    if args.small:
        fits = {"Gaussian": None, CHAIN: partial(chain, num_steps=20)}
        show({f"wine/{method}/0": compute("wine", method, 0, fit) for method, fit in fits.items()})
        return
    absent = missing("flowjax")
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for method, source in product(METHODS, SOURCES):
        for seed in range(METHODS[method][1]):
            key = f"{source}/{method}/{seed}"
            if key in cells or args.only not in key or (absent and method == "spline flow"):
                continue
            cells[key] = compute(source, method, seed)
            lines = [f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(cell)}" for name, cell in cells.items()]
            with atomic_write(RESULTS) as file:
                file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            print(
                f"{key}: {np.mean(cells[key]['values']):.3f} nats, {cells[key]['note']}, {cells[key]['seconds']} s",
                flush=True,
            )
    show(cells)


if __name__ == "__main__":
    main()
