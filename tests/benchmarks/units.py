"""Features with outlying values or heavy tails, in units of their standard deviation and in robust ones.

    python -m tests.benchmarks.units

5,000 rows of one column to fit, 10,000 to score, T = 40, 3,000 steps, three seeds. "bulk" are the rows within ten times
the range of the middle nine tenths; the range of draws is that of the middle nine tenths over that of the data.
"""

import warnings
from functools import partial
from unittest import mock

import jax
import numpy as np

import probdiff
from probdiff import networks, schedules
from probdiff.units import ROBUST, chain_units
from tests.benchmarks.timing import parser, report

ROWS, SCORED = 5_000, 10_000
SEEDS = range(3)
COLUMNS = {
    "log-normal, σ = 2": lambda rng, n: rng.lognormal(0, 2, n),
    "Cauchy": lambda rng, n: rng.standard_cauchy(n),
    "Student's t, 2 degrees": lambda rng, n: rng.standard_t(2, n),
    "normal, one in 1,000 at 100": lambda rng, n: outlying(rng, n, 1e2),
    "normal, one in 1,000 at 10⁴": lambda rng, n: outlying(rng, n, 1e4),
    "normal, one in 1,000 at 10⁸": lambda rng, n: outlying(rng, n, 1e8),
}
UNITS = {"standard deviation": np.inf, f"robust from {ROBUST:g} times on": ROBUST, "robust": 0.0}


def outlying(rng, n, at):
    return rng.normal(size=n) + at * rng.permutation(np.arange(n) < n // 1000)


def score(x, robust, seed, steps):
    """K of all rows and of the bulk, nats, and how wide the draws are."""
    fitted, scored = x[:ROWS, None], x[ROWS:, None]
    d = probdiff.GaussianDiffusion((1,), schedules.LearnedBetas(40), networks.ResidualMLP(width=32, depth=2))
    units = mock.patch("probdiff.fitting.fit.chain_units", partial(chain_units, robust=robust))
    with units, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = probdiff.fit(d, fitted, rng_key=jax.random.key(seed), num_steps=steps, progress_bar=False)
    K = fit.log_likelihood(scored, rng_key=jax.random.key(1)).values
    low, median, high = np.quantile(scored, [0.05, 0.5, 0.95])
    drawn = np.quantile(fit.sample(jax.random.key(2), 5_000), [0.05, 0.95])
    bulk = np.abs(scored[:, 0] - median) < 10 * (high - low)
    return K.mean(), K[bulk].mean(), (drawn[1] - drawn[0]) / (high - low)


def cell(scores):
    return f"{np.mean(scores):.3f} ({np.min(scores):.3f} to {np.max(scores):.3f})"


def main():
    small = parser(__doc__).parse_args().small
    rows = []
    for column, draw in COLUMNS.items():
        for name, robust in UNITS.items():
            scores = [
                score(draw(np.random.default_rng(seed), ROWS + SCORED), robust, seed, 50 if small else 3_000)
                for seed in (SEEDS[:1] if small else SEEDS)
            ]
            K, bulk, width = map(cell, np.transpose(scores))
            row = {"column": column, "units": name, "K, nats": K, "K of the bulk, nats": bulk, "range of draws": width}
            rows.append(row)
            print(row, flush=True)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
