"""Bounds from whole paths against closed forms, and against quadrature of a chain's own p(x_0)."""

import jax
import numpy as np
import pytest
from helpers.likelihoods import DATA, KEY, SEEDS, Z, by_seed, fit_of_a_mixture, linear

import probdiff
from probdiff import GaussianDiffusion, datasets, networks, schedules
from probdiff.likelihood import elbo as likelihood
from probdiff.likelihood import paths


@pytest.fixture(scope="module")
def fitted():
    return fit_of_a_mixture()


@pytest.fixture(scope="module")
def trained():
    mixture = datasets.GaussianMixture([0.3, 0.7], [[-1.0], [0.6]], [[[0.01]], [[0.09]]])
    x = np.asarray(mixture.sample(jax.random.key(1), 4000), np.float64)
    d = GaussianDiffusion((1,), schedules.LearnedBetas(6), networks.ResidualMLP(16, 1), "full")
    return probdiff.fit(d, x, rng_key=jax.random.key(2), num_steps=600, validation=0.0, progress_bar=False)


@pytest.fixture(scope="module")
def repeated(fitted):
    """Data of the chain, and the exact log p of each: every seed has rows of its own draws."""
    x = fitted.sample(jax.random.key(3), DATA)
    truth = fitted.log_likelihood(x, method="exact")
    return np.tile(x, (SEEDS, 1)), truth.values


def test_importance_weights_average_to_the_likelihood(x64):
    d, params, p = linear()
    x = np.random.default_rng(0).normal(size=(4, 2))
    log_weights = paths.log_importance_weights(d, params, x, rng_key=KEY, num_draws=4000)
    weights = np.exp(log_weights)
    assert weights.shape == (4000, 4)
    z = (weights.mean(0) - p.pdf(x)) / (weights.std(0) / np.sqrt(4000))
    assert np.all(np.abs(z) < Z)


@pytest.mark.slow
def test_the_bounds_of_many_particles_rise_to_the_likelihood():
    d, params, p = linear("full", 3, schedules.cosine(10))
    x = p.rvs(500, random_state=1)
    truth = p.logpdf(x).mean()
    bounds = [paths.iwae(d, params, x, rng_key=KEY, num_particles=s) for s in (2, 10, 100)]
    elbo = likelihood.elbo(d, params, x, rng_key=KEY, num_draws=100)
    means = np.array([elbo.mean, *(b.mean for b in bounds), truth])
    errors = np.array([elbo.mcse, *(b.mcse for b in bounds), 0.0])
    assert np.all(np.diff(means) > -Z * np.hypot(errors[1:], errors[:-1]))
    assert means[1] > means[0] + 0.05
    assert all(b.kind == "lower bound" and b.pareto_k.shape == (500,) for b in bounds)


@pytest.mark.parametrize(("method", "options"), [("elbo", {}), ("iwae", {"num_particles": 30})])
@pytest.mark.slow
def test_lower_bounds_lie_below_in_every_seed(fitted, repeated, method, options):
    x, truth = repeated
    bound = fitted.log_likelihood(x, rng_key=KEY, method=method, **options)
    excess = by_seed(bound.values).mean(1) - truth.mean()
    error = np.sqrt(by_seed(bound.values_mcse**2).sum(1)) / DATA
    assert bound.kind == "lower bound"
    assert np.all(excess < Z * error)


@pytest.mark.slow
def test_upper_bounds_lie_above_in_every_seed(trained):
    paths = trained.sample(jax.random.key(4), SEEDS * DATA, paths=True)
    truth = trained.log_likelihood(paths[:, 0], method="exact")
    bound = trained.log_likelihood(paths, rng_key=KEY, method="upper", num_particles=30)
    shortfall = by_seed(truth.values - bound.values).mean(1)
    error = np.sqrt(by_seed(bound.values_mcse**2).sum(1)) / DATA
    assert bound.kind == "upper bound"
    assert np.all(shortfall < Z * error)
    # the sandwich closes: both bounds are within a few hundredths of a nat of the truth, in the mean over 1,600 data
    lower = trained.log_likelihood(paths[:, 0], rng_key=KEY, method="iwae", num_particles=30)
    assert truth.mean - 0.02 < lower.mean < truth.mean + Z * lower.mcse
    assert truth.mean - Z * bound.mcse < bound.mean < truth.mean + 0.02


def test_the_sandwich_wants_whole_paths(fitted):
    with pytest.raises(ValueError, match=r"wants whole paths .* \(N, 7, 1\)"):
        fitted.log_likelihood(np.ones((5, 1)), rng_key=KEY, method="upper")


def test_counts_of_one_and_a_missing_key_are_refused(fitted):
    with pytest.raises(ValueError, match="num_particles is 1"):
        fitted.log_likelihood(np.ones((5, 1)), rng_key=KEY, method="iwae", num_particles=1)
    with pytest.raises(TypeError, match="rng_key is None"):
        fitted.log_likelihood(np.ones((5, 1)), method="iwae")
