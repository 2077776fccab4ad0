"""How near SVI comes to the best ELBO that any learned schedule can reach, on mixtures of Gaussians on the line.

For each mixture, T and initial schedule: max_β K*(β), how far K of the fit on fresh data falls short of it, what part
of that is due to the learned β_t (max K* − K*(β_t)) and not to the network, and the learned β_t beside the oracle's.
With --mixtures, kernels have as many components as the data, and max K* is L itself.

    python -m tests.benchmarks.oracle
    python -m tests.benchmarks.oracle --mixtures --num-timesteps 2 4
    python -m tests.benchmarks.oracle --mixture three --num-timesteps 16 --schedule snr
"""

import jax
import numpy as np
from numpyro import handlers

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.likelihood.elbo import elbo_draws
from probdiff.reference import oracle
from tests.benchmarks.timing import parser

STARTS = {
    "default": lambda T: None,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
    "geometric": lambda T: schedules.Fixed(np.geomspace(0.01, 0.9, T)),
}


def mixture(weights, means, stds):
    """A mixture of mean 0 and variance 1 with these proportions."""
    weights, means, stds = np.array(weights), np.array(means), np.array(stds)
    means = means - weights @ means
    scale = np.sqrt(weights @ (means**2 + stds**2))
    return datasets.GaussianMixture(weights, (means / scale)[:, None], ((stds / scale) ** 2)[:, None, None])


MIXTURES = {
    "two": mixture([0.7, 0.3], [-1.0, 2.0], [0.2, 0.5]),
    "three": mixture([0.5, 0.3, 0.2], [-2.0, 0.0, 3.0], [0.4, 0.25, 0.6]),
    "narrow beside wide": mixture([0.25, 0.75], [2.0, -0.5], [0.15, 0.7]),
}


def fit(target, schedule, *, width, num_steps, num_data=100_000, components=1):
    d = probdiff.GaussianDiffusion((1,), schedule, networks.ResidualMLP(width, 3), "diagonal", components)
    x = np.asarray(target.sample(jax.random.key(1), num_data))
    return probdiff.fit(d, x, rng_key=jax.random.key(2), num_steps=num_steps, learning_rate=5e-3, progress_bar=False)


def shortfall(fitted, target, best, *, num_data):
    """max K* − K on fresh data, its standard error, and the part max K* − K*(β_t) that is due to the learned β_t.

    The part that is due to the network is the mean difference between K with the best network and K with the fitted
    one, on the same draws of every x_t, so that the noise that both share cancels.
    """
    loc, scale = fitted.loc[0], fitted.scale[0]
    inside = datasets.GaussianMixture(target.weights, (target.means - loc) / scale, target.covariances / scale**2)
    M = fitted.diffusion.components
    best_network, fixed = oracle.BestNetwork(inside, M), schedules.Fixed(fitted.beta)
    d = probdiff.GaussianDiffusion((1,), fixed, best_network, "diagonal", M)
    params = {"network$params": handlers.trace(handlers.seed(d.kernels, 0)).get_trace()["network$params"]["value"]}
    x_0 = fitted.standardise(np.asarray(target.sample(jax.random.key(3), num_data)))
    with_best, with_fitted = (
        elbo_draws(d, params, x_0, rng_key=jax.random.key(4), num_draws=2)[0].elbo
        for d, params in ((d, params), (fitted.diffusion, fitted.params))
    )
    of_network = with_best - with_fitted
    of_beta = best - (oracle.best_elbo(inside, fitted.beta, components=M) - np.log(scale))
    return of_beta + of_network.mean(), of_network.std(ddof=1) / np.sqrt(num_data), of_beta


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--mixture", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    arguments.add_argument("--num-timesteps", nargs="+", type=int, default=[2, 4, 8, 16])
    arguments.add_argument("--start", nargs="+", choices=STARTS, default=list(STARTS))
    arguments.add_argument("--schedule", choices=["betas", "snr"], default="betas")
    arguments.add_argument("--mixtures", action="store_true", help="kernels with as many components as the data")
    arguments.add_argument("--width", type=int, default=32)
    arguments.add_argument("--num-steps", type=int, default=4000)
    options = arguments.parse_args()
    if options.small:
        options.mixture, options.num_timesteps, options.start, options.num_steps = ["two"], [2], ["default"], 20
    for T in options.num_timesteps:
        for name in options.mixture:
            target = MIXTURES[name]
            M = len(target.weights) if options.mixtures else 1
            beta, best = oracle.best_schedule(target, T, components=M)
            print(f"{name}, T = {T}, {M} component{'s' * (M > 1)}: max K* = {best:.5f} nats")
            print(f"  {'the oracle':12} {'':42} β = {_row(beta)}", flush=True)
            for start in options.start if options.schedule == "betas" else ["default"]:
                schedule = (
                    schedules.LearnedSNR(T)
                    if options.schedule == "snr"
                    else schedules.LearnedBetas(T, STARTS[start](T))
                )
                fitted = fit(target, schedule, width=options.width, num_steps=options.num_steps, components=M)
                short, error, of_beta = shortfall(fitted, target, best, num_data=200 if options.small else 20_000)
                figures = f"short by {short:.4f} ± {error:.4f}, of β {of_beta:.4f}"
                print(f"  {start:12} {figures:42} β = {_row(fitted.beta)}", flush=True)


def _row(beta):
    return " ".join(f"{one:.4f}" for one in beta)


if __name__ == "__main__":
    main()
