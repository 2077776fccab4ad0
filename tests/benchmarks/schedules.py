"""What learning β_t buys: the held-out gap L − K of learned and fixed schedules, T by T.

    python -m tests.benchmarks.schedules            # about two hours on two cores; goes on where it stopped
    python -m tests.benchmarks.schedules --table    # prints the table of the cells that are done
    python -m tests.benchmarks.schedules --scan     # settings of the fixed schedules at T = 10, a trial each

Each cell is a data set, T, covariance and schedule. Every schedule has the same budget: four trials of 3,000 steps,
judged on 10,000 validation data, then three fits of 20,000 steps with the best of them, judged on 10,000 test data. The
trials are of two settings (the offset of a cosine, the start of learned betas, the knots of a learned log-SNR) with two
learning rates each; for the linear schedule of four settings of its last β, on which it depends most, with the better
rate; for the harmonic one, which has nothing to set, of four rates. The settings of the fixed schedules are the best of
a wider scan, `--scan`, since those published for T = 1000 lose much at these T. K is the mean of log w over whole paths
drawn from q (N17), and L the exact log density of the same data, so the gap's error is that of a paired difference.
A cell's figures go to `schedules.json` beside this file, written whole or not at all.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.files import atomic_write
from probdiff.likelihood import paths
from tests.benchmarks.timing import parser

RESULTS = Path(__file__).with_suffix(".json")
DATA = {"swiss-roll": datasets.SwissRoll(0.5), "8-gaussians": datasets.eight_gaussians()}


def linear(last):
    return f"last {last:g}", lambda T: schedules.linear(T, 1e-4, last)


def cosine(offset):
    return f"offset {offset:g}", lambda T: schedules.cosine(T, offset)


SCAN = [linear(last) for last in (0.02, 0.01, 0.005, 0.0025, 0.00125, 0.000625, 0.0003125)] + [
    cosine(offset) for offset in (0.1, 0.05, 0.02, 0.008, 0.0)
]
TRIALS = {
    "linear": [linear(last) for last in (0.0025, 0.00125, 0.000625, 0.0003125)],
    "cosine": [cosine(offset) for offset in (0.008, 0.0)],
    "harmonic": [("", schedules.harmonic)],
    "LearnedBetas": [("", schedules.LearnedBetas),
                     ("from cosine", lambda T: schedules.LearnedBetas(T, schedules.cosine(T)))],
    "LearnedSNR": [(f"{k} knots", lambda T, k=k: schedules.LearnedSNR(T, k)) for k in (8, 16)],
}  # fmt: skip
RATES = {"linear": (4e-3,), "harmonic": (2e-3, 4e-3, 1e-3, 5e-4)}  # elsewhere 2e-3 and 4e-3
CELLS = [
    *(("swiss-roll", T, "full", name) for T in (5, 10, 20, 40) for name in TRIALS),
    *(("swiss-roll", T, "diagonal", name) for T in (5, 10, 20, 40) for name in ("cosine", "LearnedBetas")),
    *(("8-gaussians", 10, "full", name) for name in TRIALS),
]


def trials(name):
    """Four pairs of a setting and a learning rate."""
    return [(setting, rate) for rate in RATES.get(name, (2e-3, 4e-3)) for setting in TRIALS[name]]


def bound(fit, c, x, rng_key, num_draws):
    """Σ_s log w_s / S for each datum, in the data's units."""
    one = fit.chain(c) if fit.num_chains > 1 else fit
    log_w = paths.log_importance_weights(
        one.diffusion, one.params, one.standardise(x), rng_key=rng_key, num_draws=num_draws
    )
    return log_w.mean(0) - fit.units.log_det


def fit_one(data, schedule, covariance, rate, num_steps, num_chains, x):
    network = networks.ResidualMLP(128, 3) if num_steps > 100 else networks.ResidualMLP(8, 1)
    d = probdiff.GaussianDiffusion((2,), schedule, network, covariance)
    return probdiff.fit(
        d, x, rng_key=jax.random.key(1), num_steps=num_steps, num_chains=num_chains, learning_rate=rate,
        progress_bar=False, check_every=1000, times="even",
    )  # fmt: skip


def samples(density, sizes=(100_000, 10_000, 10_000)):
    """Training, validation and test data."""
    return [np.asarray(density.sample(jax.random.key(i), n), np.float64) for i, n in enumerate(sizes)]


def trial(cell, make, rate, train, validation, num_steps=3000):
    """The bound of each validation datum after a short fit."""
    data, T, covariance, _ = cell
    fit = fit_one(data, make(T), covariance, rate, num_steps, 1, train)
    return bound(fit, 0, validation, jax.random.key(2), 2)


def scan():
    cell = "swiss-roll", 10, "full", None
    density = DATA["swiss-roll"]
    train, validation, _ = samples(density)
    exact = np.asarray(density.log_prob(validation), np.float64)
    for setting, make in SCAN:
        gap = exact - trial(cell, make, 2e-3, train, validation)
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        print(f"{setting:15} gap {gap.mean():.4f} ± {error:.4f} after a trial", flush=True)


def run(cell, small=False):
    data, T, covariance, name = cell
    density, start = DATA[data], time.perf_counter()
    train, validation, test = samples(density, *[(1000, 100, 100)] * small)
    found = []
    for (setting, make), rate in trials(name)[: 1 if small else None]:
        k = trial(cell, make, rate, train, validation, num_steps=20 if small else 3000)
        found.append((k.mean(), setting, make, rate))
    _, setting, make, rate = max(found, key=lambda trial: trial[0])
    fit = fit_one(data, make(T), covariance, rate, 20 if small else 20_000, 3, train)
    exact = np.asarray(density.log_prob(test), np.float64)
    per_datum = np.stack([exact - bound(fit, c, test, jax.random.key(3), 8) for c in range(3)])
    gaps = per_datum.mean(1)
    result = {
        "gap": gaps.mean(),
        "gap_se": np.hypot(gaps.std(ddof=1) / np.sqrt(3), per_datum.mean(0).std(ddof=1) / np.sqrt(len(test))),
        "gaps": gaps.tolist(),
        "setting": setting,
        "learning_rate": rate,
        "trials": [[setting, rate, float(value)] for value, setting, _, rate in found],
        "beta": np.asarray(fit.beta, np.float64).tolist(),
        "seconds": time.perf_counter() - start,
    }
    if name == "LearnedSNR" and covariance == "full" and data == "swiss-roll" and not small:
        result["at other T"] = {str(other): elsewhere(fit, make(other), test, exact) for other in (5, 10, 20, 40, 80)}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in result.items()}


def elsewhere(fit, schedule, test, exact):
    """The gap and its error with the params of each fit in a chain of another T."""
    d = probdiff.GaussianDiffusion((2,), schedule, fit.diffusion.network, fit.diffusion.covariance)
    moved = replace(fit, diffusion=d)
    per_datum = np.stack([exact - bound(moved, c, test, jax.random.key(3), 4) for c in range(3)])
    gaps = per_datum.mean(1)
    return [gaps.mean().item(), np.hypot(gaps.std(ddof=1) / 3**0.5, per_datum.mean(0).std() / len(test) ** 0.5).item()]


def key_of(cell):
    return " ".join(map(str, cell))


def table(results):
    """Rows: data, covariance and schedule; columns: T; entries: gap ± standard error, nats."""
    done = [(cell, results[key_of(cell)]) for cell in CELLS if key_of(cell) in results]
    if not done:
        return "no cell is done"
    frame = pd.DataFrame(
        [
            {
                "data": data,
                "covariance": covariance,
                "schedule": name,
                "T": T,
                "gap": f"{r['gap']:.4f} ± {r['gap_se']:.4f}",
            }
            for (data, T, covariance, name), r in done
        ]
    )
    wide = frame.pivot(index=["data", "covariance", "schedule"], columns="T", values="gap").fillna("")
    lines = ["| data | covariance | schedule | " + " | ".join(f"T = {T}" for T in wide.columns) + " |"]
    lines.append("|" + "---|" * (3 + len(wide.columns)))
    lines += [
        f"| {' | '.join(index)} | {' | '.join(row)} |" for index, row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    for (_, T, _, _), r in done:
        if "at other T" in r:
            others = ", ".join(f"{other}: {gap:.4f} ± {se:.4f}" for other, (gap, se) in r["at other T"].items())
            lines.append(f"\nLearnedSNR fitted at T = {T}, evaluated at T = {others}")
    return "\n".join(lines)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--table", action="store_true", help="print the table of the cells that are done")
    arguments.add_argument("--scan", action="store_true", help="try settings of the fixed schedules; saves nothing")
    arguments.add_argument("--only", help="cells whose name contains this, such as '10 full'")
    options = arguments.parse_args()
    if options.scan:
        scan()
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.small:
        print(json.dumps(run(("swiss-roll", 5, "full", "LearnedBetas"), small=True), indent=1))
        return
    for cell in CELLS:
        if options.table or key_of(cell) in results or (options.only and options.only not in key_of(cell)):
            continue
        results[key_of(cell)] = run(cell)
        with atomic_write(RESULTS) as file:
            file.write_text(json.dumps(results, indent=1))
        r = results[key_of(cell)]
        print(f"{key_of(cell)}: {r['gap']:.4f} ± {r['gap_se']:.4f} ({r['setting']}, {r['seconds']:.0f} s)", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
