"""The binary heartbeat: K against the best that reverse kernels can reach, and draws against the five sequences.

    python -m tests.benchmarks.heartbeat

Sohl-Dickstein et al. 2015 report −2.414 bits with T = 2000; the truth is log2(1/5) = −2.3219. K* is that of the best
bitwise-independent kernels for the same β_t (`derivation.oracle_of_bits`). K is the mean over the five sequences, 400
of each; ± is the Monte Carlo error. Of 10,000 draws, those that are one of the sequences, and the p-value of equal
shares among them.
"""

import time

import jax
import numpy as np
from scipy import stats

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.reference.oracle_of_bits import best_terms
from tests.benchmarks.timing import parser, report

RUNS = [
    ("harmonic", 50, 1), ("learned", 50, 1), ("harmonic", 200, 1), ("learned", 200, 1), ("harmonic", 2000, 1),
    ("harmonic", 50, 5),
]  # fmt: skip


def main():
    small = parser(__doc__).parse_args().small
    heart, rows = datasets.Heartbeat(), []
    num_steps, each, num_draws, num_terms = (20, 2, 100, 100) if small else (20_000, 400, 10_000, 1_000_000)
    x = np.asarray(heart.sample(jax.random.key(0), 100_000))
    test = np.repeat(heart.sequences, each, axis=0)
    for name, T, components in [("harmonic", 5, 1)] if small else RUNS:
        schedule = schedules.harmonic(T) if name == "harmonic" else schedules.LearnedBetas(T, schedules.harmonic(T))
        d = probdiff.BinomialDiffusion((20,), schedule, networks.ResidualMLP(), components=components)
        start = time.perf_counter()
        fit = probdiff.fit(d, x, rng_key=jax.random.key(1), num_steps=num_steps, progress_bar=False)
        seconds = time.perf_counter() - start
        bound = fit.log_likelihood(test, rng_key=jax.random.key(2), num_draws=2 if small else max(8, 4000 // T))
        draws = fit.sample(jax.random.key(3), num_draws)
        counts = (draws[:, None] == heart.sequences).all(-1).sum(0)
        terms, errors = best_terms(
            heart.sequences, fit.beta, num_draws=num_terms if small else max(2000, num_terms // T)
        )
        row = {
            "schedule": name,
            "T": T,
            "components": components,
            "K, bits": f"{bound.mean / np.log(2):.4f} ± {bound.mcse / np.log(2):.4f}",
            "K*, bits": f"{-terms.sum() / np.log(2):.4f} ± {np.sqrt(np.sum(errors**2)) / np.log(2):.4f}",
        }
        row |= {"valid draws": f"{counts.sum() / num_draws:.4f}",
                "p, equal shares": f"{stats.chisquare(counts).pvalue:.2f}",
                "s to fit": round(seconds), "ms a step": f"{1e3 * seconds / fit.losses.size:.2f}"}  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
