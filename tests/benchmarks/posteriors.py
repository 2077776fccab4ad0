"""Posteriors of fitted and of exact chains, by particles and by NUTS, beside their truths.

    python -m tests.benchmarks.posteriors ["swiss-roll, T = 4, M = 16"] [mixture] [calibration] ...

The first coordinate of x_0 is seen as 0.3 ± 0.1. "own" is the posterior under the fitted chain itself, from 2,000,000
of its draws weighted by the likelihood; "exact" that under the data's density, on a grid. KS is the largest gap between
the distribution functions of the second coordinate; that between own and exact is the error of the fit. Rows of
`posteriors.json` that end in "se" are standard errors. Ranks are drawn in runs/posteriors/ranks.png.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.infer import MCMC, NUTS, Predictive
from scipy import special, stats

from probdiff import GaussianDiffusion, datasets, fit, networks, posterior, schedules
from probdiff.files import atomic_write
from probdiff.results import Fit
from tests.benchmarks.guidance import exact_fit, mode_error
from tests.benchmarks.guidance_problems import problems
from tests.benchmarks.timing import parser

FOLDER = Path("runs/posteriors")
CELLS = Path(__file__).with_suffix(".json")
SEEN, NOISE = 0.3, 0.1


@dataclass(frozen=True)
class Size:
    """How much is drawn: of the fit's own draws, of particles and filters, of seeds of the evidence, by NUTS."""

    num_own: int = 500_000
    num_particles: int = 1000
    num_filters: int = 16
    evidence_particles: int = 2000
    num_seeds: int = 200
    num_chains: int = 4096


SMALL = Size(2000, 25, 2, 25, 2, 8)


class Rings:
    """Two circles about the origin, x = r·(cos θ, sin θ) + 0.08·ε, θ uniform, either r as likely."""

    radii, noise = np.array([0.6, 1.3]), 0.08

    def sample(self, rng_key, n):
        keys = jax.random.split(rng_key, 3)
        r, angle = jax.random.choice(keys[0], self.radii, (n,)), jax.random.uniform(keys[1], (n,), maxval=2 * np.pi)
        on = r[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
        return on + self.noise * jax.random.normal(keys[2], (n, 2))

    def log_prob(self, x):
        distance = np.linalg.norm(x, axis=-1)[..., None]
        bessel = np.log(special.i0e(distance * self.radii / self.noise**2))
        each = bessel - 0.5 * ((distance - self.radii) / self.noise) ** 2
        return special.logsumexp(each, axis=-1, b=0.5) - np.log(2 * np.pi * self.noise**2)


DENSITIES = {"swiss-roll": datasets.SwissRoll(0.5), "rings": Rings()}


def chain_of(name, num_timesteps=10, components=1):
    """The fit to 100,000 draws, made once."""
    d = GaussianDiffusion((2,), schedules.LearnedBetas(num_timesteps), networks.ResidualMLP(), "full", components)
    file = FOLDER / f"{name}_{num_timesteps}_{components}.npz"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        x = np.asarray(DENSITIES[name].sample(jax.random.key(0), 100_000))
        fit(d, x, rng_key=jax.random.key(1)).save(file)
    return Fit.load(file, d)


def log_g(x):
    return stats.norm.logpdf(x, SEEN, NOISE)


def own(fitted, n):
    """Second coordinates, ascending, with their distribution function, log evidence and its standard error."""
    draws = np.concatenate([fitted.sample(jax.random.key(100 + i), n) for i in range(4)])
    order = np.argsort(draws[:, 1])
    w = np.exp(log_g(draws[order, 0]))
    return draws[order, 1], np.cumsum(w) / w.sum(), np.log(w.mean()), w.std() / w.mean() / np.sqrt(len(w))


def exact(density):
    """The same on a grid, the first coordinate at 201 nodes within six standard deviations of what is seen."""
    first, second = SEEN + NOISE * np.linspace(-6, 6, 201), np.linspace(-6, 6, 4001)
    points = np.stack(np.meshgrid(first, second), -1)  # second, first
    log_p = np.concatenate([np.asarray(density.log_prob(part)) for part in np.array_split(points, 20)])
    mass = np.exp(log_p + log_g(first)).sum(1) * (first[1] - first[0]) * (second[1] - second[0])
    return second, np.cumsum(mass) / mass.sum(), np.log(mass.sum()), 0.0


def ks(draws, truth):
    """Between draws of the second coordinate, or another truth, and a truth."""
    at, wanted = truth[:2]
    if isinstance(draws, tuple):
        return np.abs(np.interp(at, *draws[:2]) - wanted).max()
    return np.abs(np.searchsorted(np.sort(draws), at, side="right") / len(draws) - wanted).max()


def _nuts(model):
    """Without adaptation, since each of many short chains would have to adapt by itself."""
    return NUTS(model, step_size=0.1, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=4)


def by_nuts(fitted, num_chains):
    """Many short chains from draws of the prior that are resampled by their likelihood; effective draws, seconds."""
    prior = fitted.prior()

    def model():
        x = numpyro.deterministic("x", prior(stacked=True))
        numpyro.sample("y", dist.Normal(x[0], NOISE), obs=SEEN)

    start = time.perf_counter()
    noise = Predictive(prior, num_samples=20 * num_chains)(jax.random.key(2), stacked=True)
    x = fitted.units.to_data(np.asarray(noise["x_0"]))
    log_w = log_g(np.asarray(x)[:, 0])
    chosen = jax.random.categorical(jax.random.key(3), jnp.asarray(log_w), shape=(num_chains,))
    initial = {name: noise[name][chosen] for name in ("x_path_base", "x_0_base")}
    mcmc = MCMC(_nuts(model), num_warmup=2, num_samples=2, num_chains=num_chains, chain_method="vectorized",
                progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(4), init_params=initial)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    seconds = time.perf_counter() - start
    # by how the means of chains vary, as for filters: chains that stay in their mode count once
    effective = num_chains * draws.var((0, 1)) / draws.mean(1).var(0, ddof=1)
    of_starts = np.exp(2 * special.logsumexp(log_w) - special.logsumexp(2 * log_w))
    return draws, float(1 / (1 / effective.min() + 1 / of_starts)), seconds


def seen(name, fitted=None, size=Size(), **chain):
    """One density: particles, NUTS, and 200 seeds of the evidence."""
    fitted, density = fitted or chain_of(name, **chain), DENSITIES[name]
    truth, exactly = own(fitted, size.num_own), exact(density)
    likelihood = posterior.LinearGaussian(np.array([SEEN]), np.array([[1.0, 0.0]]), NOISE)
    start = time.perf_counter()
    dt = posterior.sample(
        fitted, likelihood, rng_key=jax.random.key(5), num_particles=size.num_particles, num_filters=size.num_filters
    )
    seconds = time.perf_counter() - start
    second = dt["posterior"].dataset["x_0"].to_numpy()[..., 0, 1].ravel()
    row = {
        "KS own to exact": ks(truth, exactly),
        "KS particles to own": ks(second, truth),
        "KS particles to exact": ks(second, exactly),
        "particles, effective draws": float(dt["evidence"].dataset["effective_draws"][0]),
        "particles, seconds": seconds,
        "log evidence": float(dt["evidence"].dataset["log_evidence"][0]),
        "log evidence mcse": float(dt["evidence"].dataset["mcse"][0]),
        "log evidence, own": truth[2],
        "log evidence, own, se": truth[3],
        "log evidence, exact": exactly[2],
    }
    many = posterior.LinearGaussian(np.full((size.num_seeds, 1), SEEN), np.array([[1.0, 0.0]]), NOISE)
    found = posterior.log_evidence(
        fitted,
        many,
        rng_key=jax.random.key(6),
        num_particles=size.evidence_particles,
        num_filters=size.num_filters,
    )
    error = found.values - truth[2]
    limit = stats.t(size.num_filters - 1).isf(1e-4 / 400) * np.hypot(found.values_mcse, truth[3])
    row |= {
        "200 seeds, largest error": float(np.abs(error).max()),
        "200 seeds, within 0.02": int(np.sum(np.abs(error) <= 0.02)),
        "200 seeds, within stated error": int(np.sum(np.abs(error) <= limit)),
    }
    draws, effective, seconds = by_nuts(fitted, size.num_chains)
    row |= {
        "KS NUTS to own": ks(draws[..., 1].ravel(), truth),
        "NUTS, effective draws": effective,
        "NUTS, seconds": seconds,
    }
    return row


def mixture(num_timesteps=400, components=1):
    """The 64-dimensional mixture of `guidance_problems`: largest error of a mode's weight, and of log p(y).

    T = 400: at T = 100, as in `guidance`, the error of the chain itself, whose kernels are Gaussian, is the larger one.
    With a component for each of the mixture's 25 the reversal is exact at any T.
    """
    row = {}
    for M in (1, 4, 32):
        p = problems(M, "wide")
        fitted = exact_fit(p["weights"], p["means"], p["variances"], num_timesteps, components)
        errors, off, seconds = [], [], []
        for n in range(len(p["y"])):
            likelihood = posterior.LinearGaussian(p["y"][n], p["A"][n], p["noise"][n])
            start = time.perf_counter()
            dt = posterior.sample(
                fitted, likelihood, rng_key=jax.random.key(n), num_particles=2000, num_filters=8
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
            x = dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0].reshape(-1, 64)
            exactly = (p["post_weights"][n], p["post_means"][n], p["post_covariance"][n])
            errors.append(mode_error(x, *exactly, largest=True))
            off.append(float(dt["evidence"].dataset["log_evidence"][0]) - p["log_evidence"][n])
        row |= {
            f"M = {M}, largest error of a mode's weight, mean": float(np.mean(errors)),
            f"M = {M}, se": float(np.std(errors, ddof=1) / np.sqrt(len(errors))),
            f"M = {M}, worst": float(np.max(errors)),
            f"M = {M}, log evidence, mean absolute error": float(np.mean(np.abs(off))),
            f"M = {M}, seconds": float(np.median(seconds)),
        }
    return row


def calibration(num_data=200, noise=0.3, **chain):
    """Ranks of 200 truths among draws given what is seen of each, by particles and by NUTS (Talts et al. 2018).

    NUTS starts at draws that are nearly right, so that it is tested for leaving them so and not for finding them; of
    each of its chains the last draw is used. Ranks among n draws are put in [0, 1], at random within 1/(n + 1).
    """
    fitted = chain_of("swiss-roll", **chain)
    truths = fitted.sample(jax.random.key(7), num_data)
    y = truths[:, :1] + noise * np.random.default_rng(0).normal(size=(num_data, 1))
    likelihood = posterior.LinearGaussian(y, np.array([[1.0, 0.0]]), noise)
    dt = posterior.sample(fitted, likelihood, rng_key=jax.random.key(8), num_filters=4)
    particles = dt["posterior"].dataset["x_0"].to_numpy().reshape(-1, num_data, 2)

    prior, num_chains = fitted.prior(), 63

    def model():
        with numpyro.plate("data", num_data):
            x = numpyro.deterministic("x", prior(stacked=True))
            numpyro.sample("y", dist.Normal(x[:, 0], noise), obs=y[:, 0])

    drawn = Predictive(prior, num_samples=20_000)(jax.random.key(9), stacked=True)
    x = fitted.units.to_data(np.asarray(drawn["x_0"]))
    log_w = jnp.asarray(stats.norm.logpdf(x[:, 0], y, noise))  # data, draws
    chosen = jax.random.categorical(jax.random.key(10), log_w, shape=(num_chains, num_data))
    initial = {name: drawn[name][chosen] for name in ("x_path_base", "x_0_base")}
    mcmc = MCMC(_nuts(model), num_warmup=5, num_samples=5, num_chains=num_chains, chain_method="vectorized",
                progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(11), init_params=initial)
    nuts = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[:, -1]
    rng, ranks = np.random.default_rng(1), {}
    for name, draws in (("particles", particles), ("NUTS", nuts)):
        pit = ((draws < truths).sum(0) + rng.uniform(size=truths.shape)) / (len(draws) + 1)
        ranks |= {f"{name}, x_{i + 1}": ("sample", pit[:, i]) for i in range(2)}
    tree = xr.DataTree.from_dict({"prior_sbc": xr.Dataset(ranks)})
    az.plot_ecdf_pit(tree, sample_dims="sample").savefig(FOLDER / "ranks.png")
    p_values = tree["prior_sbc"].dataset.azstats.uniformity_test(dim="sample")[0]
    return {f"{name}, p": float(p) for name, p in p_values.items()}


def small():
    """A fit of a few steps, to see that it runs."""
    d = GaussianDiffusion((2,), schedules.LearnedBetas(3), networks.ResidualMLP(8, 1), "full")
    x = np.asarray(DENSITIES["rings"].sample(jax.random.key(0), 1000))
    return seen("rings", fit(d, x, rng_key=jax.random.key(1), num_steps=20, progress_bar=False), SMALL)


def show(name, cell):
    print(name)
    print("\n".join(f"  {what}: {value:.4g}" for what, value in cell.items()), flush=True)


def main():
    options = parser(__doc__)
    options.add_argument("cells", nargs="*", help="those to compute, else all")
    args = options.parse_args()
    if args.small:
        show("rings, small", small())
        return
    runs = {name: partial(seen, name) for name in DENSITIES} | {"mixture": mixture, "calibration": calibration}
    for name, run in list(runs.items()):
        M = 25 if name == "mixture" else 16
        runs[f"{name}, T = 4, M = {M}"] = partial(run, num_timesteps=4, components=M)
    for name in args.cells or runs:
        cell = runs[name]()
        cells = (json.loads(CELLS.read_text()) if CELLS.exists() else {}) | {name: cell}
        with atomic_write(CELLS) as file:
            file.write_text(json.dumps(cells, indent=1))
        show(name, cell)


if __name__ == "__main__":
    main()
