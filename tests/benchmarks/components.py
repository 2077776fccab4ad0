"""Mixtures of Gaussians as reverse kernels: the held-out gap L − K by the number of steps T and of components M.

    python -m tests.benchmarks.components                 # some ten hours on two cores; goes on where it stopped
    python -m tests.benchmarks.components --only "4 16"   # cells whose name contains this
    python -m tests.benchmarks.components --table         # prints the table of the cells that are done

Each cell is a data set, T and M, with full covariances and learned β_t: three fits of 20,000 steps with the default
options to 100,000 data, judged on 10,000 others by K of 8 draws, or of 64 where M = 1. L is the exact log density of
the same data, so the gap's error is that of a paired difference, and of the spread of the three fits. Cells are done in
the order of what is asked of them first. Their figures go to `components.json` beside this file, written whole or not
at all.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.special import i0e, logsumexp

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.files import atomic_write
from tests.benchmarks.timing import parser


@dataclass(frozen=True)
class Rings:
    """Two rings of radii 0.7 and 1.6 in the plane, equally likely, with noise of 0.08."""

    radii: tuple[float, ...] = (0.7, 1.6)
    noise: float = 0.08

    def sample(self, rng_key, n):
        key_radius, key_angle, key_noise = jax.random.split(rng_key, 3)
        radius = jax.random.choice(key_radius, jnp.asarray(self.radii), (n,))
        angle = jax.random.uniform(key_angle, (n,), maxval=2 * np.pi)
        circle = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], 1)
        return circle + self.noise * jax.random.normal(key_noise, (n, 2))

    def log_prob(self, x):
        """Of each ring N(x given 0, noise²·I)·exp(−R²/2·noise²)·I_0(r·R/noise²), I_0 the Bessel function."""
        r = np.linalg.norm(np.asarray(x, np.float64), axis=-1)[..., None]
        R, variance = np.asarray(self.radii), self.noise**2
        each = -((r - R) ** 2) / (2 * variance) + np.log(i0e(r * R / variance)) - np.log(2 * np.pi * variance)
        return logsumexp(each, axis=-1) - np.log(len(R))


RESULTS = Path(__file__).with_suffix(".json")
DATA = {"swiss-roll": datasets.SwissRoll(0.5), "rings": Rings()}
FIRST = [("swiss-roll", 4, 16), ("swiss-roll", 3, 16), ("swiss-roll", 5, 16), ("swiss-roll", 10, 8), ("rings", 5, 8)]
GRID = [
    *(("swiss-roll", T, M) for M in (16, 8, 4, 1, 2) for T in (4, 2, 1, 10, 3, 5, 20, 40)),
    *(("rings", T, M) for T in (5, 2, 10) for M in (8, 4, 1)),
]
CELLS = FIRST + [cell for cell in GRID if cell not in FIRST]
FITS = 3


def run(cell, small=False):
    """The gap of a cell, its error, and what each fit learned."""
    data, T, M = cell
    density, start = DATA[data], time.perf_counter()
    num_rows, num_test, num_steps = (1000, 100, 20) if small else (100_000, 10_000, 20_000)
    x, test = (np.asarray(density.sample(jax.random.key(i), n), np.float64) for i, n in enumerate((num_rows, num_test)))
    exact = np.asarray(density.log_prob(test), np.float64)
    d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas(T), networks.ResidualMLP(), "full", M)
    fit = probdiff.fit(
        d, x, rng_key=jax.random.key(2), num_steps=num_steps, num_chains=FITS, check_every=1000, progress_bar=False
    )
    bounds = [
        fit.chain(c).log_likelihood(test, rng_key=jax.random.key(3), num_draws=8 if M > 1 else 64) for c in range(FITS)
    ]
    per_datum = np.stack([exact - bound.values for bound in bounds])
    gaps = per_datum.mean(1)
    return {
        "gap": gaps.mean().item(),
        "gap_se": np.hypot(gaps.std(ddof=1) / FITS**0.5, per_datum.mean(0).std(ddof=1) / len(test) ** 0.5).item(),
        "gaps": gaps.tolist(),
        "mcse": [bound.mcse for bound in bounds],
        "beta": np.asarray(fit.beta, np.float64).tolist(),
        "seconds": time.perf_counter() - start,
    }


def key_of(cell):
    return " ".join(map(str, cell))


def table(results):
    """Rows: data and M; columns: T; entries: gap ± standard error, nats."""
    rows = [
        {"data": data, "M": M, "T": T, "gap": f"{r['gap']:.4f} ± {r['gap_se']:.4f}"}
        for data, T, M in CELLS
        if (r := results.get(key_of((data, T, M))))
    ]
    if not rows:
        return "no cell is done"
    wide = pd.DataFrame(rows).pivot(index=["data", "M"], columns="T", values="gap").fillna("")
    lines = ["| data | M | " + " | ".join(f"T = {T}" for T in wide.columns) + " |", "|" + "---|" * (2 + wide.shape[1])]
    lines += [
        f"| {data} | {M} | {' | '.join(row)} |" for (data, M), row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return "\n".join(lines)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--table", action="store_true", help="print the table of the cells that are done")
    arguments.add_argument("--only", help="cells whose name contains this, such as '4 16'")
    options = arguments.parse_args()
    if options.small:
        print(json.dumps(run(("swiss-roll", 3, 4), small=True), indent=1))
        return
    for cell in CELLS:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if options.table or key_of(cell) in results or (options.only and options.only not in key_of(cell)):
            continue
        r = run(cell)
        results[key_of(cell)] = r
        with atomic_write(RESULTS) as file:
            file.write_text(json.dumps(results, indent=1))
        print(f"{key_of(cell)}: {r['gap']:.4f} ± {r['gap_se']:.4f} ({r['seconds']:.0f} s)", flush=True)
    print(table(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}))


if __name__ == "__main__":
    main()
