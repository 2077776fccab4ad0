"""Posteriors on a Gaussian mixture in 64 dimensions beside azula's and diffuse-jax's samplers, all with one denoiser.

    python tests/benchmarks/guidance_problems.py
    python tests/benchmarks/guidance_torch.py wide 4 300      # in an environment with azula, and so on
    python tests/benchmarks/guidance_jax.py wide 4 300        # in one with diffuse-jax
    python -m tests.benchmarks.guidance wide 4 300            # our draws of this cell, and its scores
    python -m tests.benchmarks.guidance                       # the table of the cells in guidance.json

K denoiser evaluations for each of 1,000 draws: K // 100 filters of 1,000 particles down a chain of T = 100, of which
1,000 draws are picked. SW is the sliced Wasserstein-1 distance over 1,000 directions between 1,000 draws and as many
exact ones, TV the total variation between the weights of the modes, both with the standard error over ten problems.
"""

import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from probdiff import GaussianDiffusion, posterior, schedules
from probdiff.families.gaussian import Gaussian
from probdiff.results import Fit
from tests.benchmarks.guidance_problems import DRAWS, D, draw, path, problems
from tests.benchmarks.timing import parser

CELLS = Path(__file__).with_suffix(".json")
T = 100


class Mixture(eqx.Module):
    """A mixture of Gaussians that share the covariance diag(variances)."""

    log_weights: jax.Array
    means: jax.Array
    variances: jax.Array

    def given(self, x_t: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of x_0 given x_t: the logarithms of the weights, up to a constant, the means, and the shared variances."""
        signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        total = signal * self.variances + noise
        residual = x_t - jnp.sqrt(signal) * self.means
        log_weights = self.log_weights - 0.5 * jnp.sum(residual**2 / total, 1)
        means = self.means + jnp.sqrt(signal) * self.variances / total * residual
        return log_weights, means, noise * self.variances / total


def outputs(x_t, log_snr, mean, variance):
    """Outputs of a network as `families.Gaussian.kernel` reads them: of the mean, and of the standard deviation."""
    signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    of_mean = (mean - jnp.sqrt(signal) * x_t) / jnp.sqrt(noise)
    return jnp.concatenate([of_mean, jnp.broadcast_to(8 * jnp.arctanh(jnp.log(variance / noise) / 16), mean.shape)], -1)


class MixtureDenoiser(Mixture):
    """E[x_0 given x_t], and the variances of x_0 given x_t."""

    def __call__(self, x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
        log_weights, each, within = self.given(x_t, log_snr)
        weights = jax.nn.softmax(log_weights)
        mean = weights @ each
        return outputs(x_t, log_snr, mean, weights @ (each - mean) ** 2 + within)


class MixtureReversal(Mixture):
    """Of each component its own mean and variances of x_0 given x_t, and its weight: the reversal is exact."""

    def __call__(self, x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
        log_weights, each, within = self.given(x_t, log_snr)
        found = jnp.concatenate([outputs(x_t, log_snr, each, within).ravel(), log_weights])
        return found - Gaussian(x_t.shape, "diagonal", len(each)).offsets  # which every network's outputs have added


def exact_fit(weights, means, variances, num_timesteps=T, components=1):
    """The chain whose network is the exact denoiser of the mixture, or with its `components` the exact reversal."""
    network = MixtureDenoiser if components == 1 else MixtureReversal
    network = network(*(jnp.asarray(a, jnp.float32) for a in (np.log(weights), means, variances)))
    size = np.shape(means)[1]
    schedule = schedules.log_snr_linear(num_timesteps, 9.0, -8.0)
    d = GaussianDiffusion((size,), schedule, network, "diagonal", components)
    params = jax.tree.map(lambda leaf: leaf[None], d.initial_params(jax.random.key(0)))
    return Fit(d, params, np.zeros((1, 1)), np.zeros((1, 0)), np.zeros(size), np.ones(size))


def ours(p, K, T=T):
    """1,000 draws for each problem (problems, 1000, D), and seconds a problem, by chains of T steps."""
    fit, draws, seconds = exact_fit(p["weights"], p["means"], p["variances"], T), [], 0.0
    for n in range(len(p["y"])):
        likelihood = posterior.LinearGaussian(p["y"][n], p["A"][n], p["noise"][n])
        start = time.perf_counter()
        dt = posterior.sample(fit, likelihood, rng_key=jax.random.key(n), num_filters=max(2, K // T))
        x = dt["posterior"].dataset["x_0"].to_numpy()[: K // T, :, 0]
        seconds += (time.perf_counter() - start) * (n > 0) / (len(p["y"]) - 1)
        draws.append(x.reshape(-1, D)[:: K // T])
    return np.stack(draws), seconds


def projected(x, directions):
    """Sorted projections (directions, n) of draws x (n, D)."""
    return np.sort(directions @ x.T, 1)


def mode_error(x, weights, means, covariance, largest=False):
    """Total variation, or largest error, of the mode weights of draws x (n, D); a draw is of its likeliest mode."""
    precision = np.linalg.inv(covariance)
    logits = np.log(weights + 1e-300) - 0.5 * np.sum(means @ precision * means, 1) + x @ precision @ means.T
    shares = np.bincount(logits.argmax(1), minlength=len(weights)) / len(x)
    errors = np.abs(shares - weights)
    return errors.max() if largest else 0.5 * errors.sum()


class Score:
    """Scores of draws (problems, n, D) against the exact posteriors of the problems in a file."""

    def __init__(self, p):
        self.directions = np.random.default_rng(1).normal(size=(1000, D))
        self.directions /= np.linalg.norm(self.directions, axis=1, keepdims=True)
        self.exact = list(zip(p["post_weights"], p["post_means"], p["post_covariance"], strict=True))
        rngs = [np.random.default_rng([2, n]) for n in range(len(self.exact))]
        reference, self.fresh = ([draw(r, *e, DRAWS) for r, e in zip(rngs, self.exact, strict=True)] for _ in range(2))
        self.reference = [projected(x, self.directions) for x in reference]

    def __call__(self, draws):
        """Means and standard errors over problems of SW and TV, and how many diverged (data have unit variance)."""
        rows = np.array([self.row(*args) for args in zip(draws, self.exact, self.reference, strict=True)])
        diverged = int(np.isinf(rows[:, 0]).sum())
        mean, error = rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))
        named = {"SW": mean[0], "SW se": error[0], "TV": mean[1], "TV se": error[1]} if not diverged else {}
        return {"diverged": diverged} | named

    def row(self, x, exact, reference):
        if not np.abs(x).max() < 100:
            return np.inf, np.inf
        gaps = np.abs(projected(x.astype(float), self.directions) - reference)
        return gaps.mean(), mode_error(x, *exact)


def run(level, M, K):
    """Draws ours, scores all draws of the cell, and keeps the scores."""
    with np.load(path(level, M)) as held:
        p = dict(held)
    score = Score(p)
    draws, seconds = ours(p, K)
    cell = {"level": level, "M": M, "K": K}
    rows = [cell | {"library": "exact draws", "sampler": "", **score(score.fresh)}]
    rows.append(cell | {"library": "probdiff", "sampler": "particles", **score(draws), "seconds": seconds})
    for library in ("azula", "diffuse"):
        file = path(level, M).with_name(f"draws_{library}_{level}_{M}_{K}.npz")
        if file.exists():
            meta = json.loads(file.with_suffix(".json").read_text())
            with np.load(file) as held:
                for name in held.files:
                    rows.append(cell | {"library": library, "sampler": name, **score(held[name])})
                    rows[-1]["steps"] = meta[name]["steps"]
    kept = json.loads(CELLS.read_text()) if CELLS.exists() else []
    kept = [row for row in kept if (row["level"], row["M"], row["K"]) != (level, M, K)]
    CELLS.write_text(json.dumps(kept + rows, indent=1))


def table():
    """The cells, a row for each sampler and a column for each cell."""
    frame = pd.DataFrame(json.loads(CELLS.read_text()))

    def pair(row, name):
        return f"{row[name]:.3f} ± {row[name + ' se']:.3f}"

    frame["SW / TV"] = [
        f"{row.diverged} diverged" if row.diverged else f"{pair(row, 'SW')} / {pair(row, 'TV')}"
        for _, row in frame.iterrows()
    ]
    frame["cell"] = frame.level + ", M = " + frame.M.astype(str) + ", K = " + frame.K.astype(str)
    rows, columns = ["library", "sampler"], frame.cell.unique()
    wide = frame.pivot_table(index=rows, columns="cell", values="SW / TV", aggfunc="first", sort=False)
    lines = [
        [*rows, *columns],
        ["---"] * (2 + len(columns)),
        *wide[columns].fillna("").reset_index().to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    options = parser(__doc__)
    options.add_argument("cell", nargs="*", help="LEVEL M K")
    args = options.parse_args()
    if args.small:
        p = problems(1, "wide", count=2)
        draws, seconds = ours(p, 20, T=20)
        print(Score(p)(draws) | {"seconds": seconds})
        return
    if args.cell:
        level, M, K = args.cell
        run(level, int(M), int(K))
    print(table())


if __name__ == "__main__":
    main()
