"""Every log-likelihood of one chain side by side: how far from the truth, how uncertain, how long.

    python -m tests.benchmarks.likelihoods

Three chains: a linear-Gaussian one of 16 features and T = 40 that is no reversal of q, so that its ELBO is far below
log p; a fit on the line to a mixture of a narrow and a wide Gaussian, T = 40; a fit to the swiss roll, T = 40. Data are
simulated from each chain, so that the upper bound applies. "iwae" has as many paths as "smc" has in its pilot and its
filters together. `spread` is the root mean square over data of the standard deviation of values over repetitions.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import probdiff
from probdiff import datasets, networks, schedules
from tests.benchmarks.timing import parser

NUM_DATA, REPETITIONS = 64, 5
PARTICLES, FILTERS = 100, 8


def methods(num_particles, num_filters):
    return {
        "elbo": {"method": "elbo", "num_draws": num_particles},
        "iwae": {"method": "iwae", "num_particles": 2 * 2 * num_filters * num_particles},
        "smc": {"method": "smc", "num_particles": num_particles, "num_draws": num_filters},
        "upper": {"method": "upper", "num_particles": 2 * 2 * num_filters * num_particles},
        "ode": {"method": "ode", "num_draws": num_filters},
        "exact": {"method": "exact"},
    }


class Linear(eqx.Module):
    """Outputs linear in x_t and in the log-SNR: the reverse chain is linear and Gaussian."""

    matrix: jax.Array
    slope: jax.Array
    bias: jax.Array

    def __call__(self, x_t, log_snr):
        return jnp.pad(self.matrix @ x_t, (0, self.bias.size - x_t.size)) + self.bias + self.slope * log_snr


def linear(num_features, num_timesteps=40):
    rng = np.random.default_rng(0)
    network = Linear(
        jnp.asarray(0.12 * rng.normal(size=(num_features, num_features)), jnp.float32),
        jnp.asarray(0.03 * rng.normal(size=2 * num_features), jnp.float32),
        jnp.asarray(0.09 * rng.normal(size=2 * num_features), jnp.float32),
    )
    d = probdiff.GaussianDiffusion((num_features,), schedules.cosine(num_timesteps), network, "diagonal")
    params = {"network$params": jax.tree.map(lambda leaf: leaf[None], eqx.partition(network, eqx.is_inexact_array)[0])}
    nothing = np.zeros((1, 0))
    return probdiff.Fit(d, params, nothing, nothing, np.zeros(num_features), np.ones(num_features))


def fitted(density, size):
    d = probdiff.GaussianDiffusion((size,), schedules.LearnedBetas(40), networks.ResidualMLP(64, 2), "full")
    x = np.asarray(density.sample(jax.random.key(0), 20_000), np.float64)
    return probdiff.fit(d, x, rng_key=jax.random.key(1), num_steps=4000, progress_bar=False)


def measure(name, fit, num_data=NUM_DATA, num_particles=PARTICLES, num_filters=FILTERS, repetitions=REPETITIONS):
    paths = fit.sample(jax.random.key(2), num_data, paths=True)
    rows = []
    for label, options in methods(num_particles, num_filters).items():
        x = paths if label == "upper" else paths[:, 0]
        found = []
        try:
            for r in range(1 if label == "exact" else repetitions):
                start = time.perf_counter()
                found.append(fit.log_likelihood(x, rng_key=jax.random.key(10 + r), **options))
                seconds = time.perf_counter() - start
        except ValueError:
            continue  # not every chain has an exact value
        values = np.stack([one.values for one in found])
        k = found[0].pareto_k
        rows.append(
            {
                "chain": name, "method": label, "kind": found[0].kind, "mean, nats": values.mean(),
                "± (Monte Carlo)": np.sqrt(np.mean([one.mcse**2 for one in found]) / len(found)),
                "spread": np.sqrt(values.var(0, ddof=1).mean()) if len(found) > 1 else 0.0,
                "median k̂": np.nan if k is None else np.median(k), "s": seconds,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"), flush=True)
    print()


def main():
    if parser(__doc__).parse_args().small:
        measure("linear, D = 2", linear(2, 3), num_data=2, num_particles=4, num_filters=2, repetitions=2)
        return
    mixture = datasets.GaussianMixture([0.3, 0.7], [[-1.0], [0.6]], [[[0.01]], [[0.09]]])
    measure("linear, D = 16", linear(16))
    measure("mixture, D = 1", fitted(mixture, 1))
    measure("swiss roll, D = 2", fitted(datasets.SwissRoll(0.5), 2))


if __name__ == "__main__":
    main()
