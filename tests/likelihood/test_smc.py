"""Twisted particle filters against closed forms, and against quadrature of a chain's own p(x_0)."""

import jax
import numpy as np
import pytest
from helpers.diffusions import linear_diffusion, random_linear
from helpers.likelihoods import DATA, KEY, SEEDS, Z, by_seed, fit_of_a_mixture, linear

from probdiff import GaussianDiffusion, schedules
from probdiff.likelihood import flow, paths, resampling
from probdiff.likelihood import smc as particles


@pytest.fixture(scope="module")
def fitted():
    return fit_of_a_mixture()


@pytest.fixture(scope="module")
def repeated(fitted):
    """Data of the chain, and the exact log p of each: every seed has rows of its own draws."""
    x = fitted.sample(jax.random.key(3), DATA)
    truth = fitted.log_likelihood(x, method="exact")
    return np.tile(x, (SEEDS, 1)), truth.values


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_twisted_filters_are_exact_on_linear_chains(covariance):
    d, params, p = linear(covariance, 3, schedules.cosine(40))
    x = p.rvs(4, random_state=1)
    estimate = particles.smc(d, params, x, rng_key=KEY, num_particles=20, num_draws=4)
    bound = paths.iwae(d, params, x, rng_key=KEY, num_particles=160)
    np.testing.assert_allclose(estimate.values, p.logpdf(x), atol=2e-3)
    # at equal cost, two runs of four filters of twenty
    assert np.all(estimate.values_mcse < 0.1 * bound.values_mcse)


@pytest.mark.slow
def test_filters_are_unbiased_within_their_error_in_every_seed(fitted, repeated):
    x, truth = repeated
    estimate = fitted.log_likelihood(x, rng_key=KEY, method="smc", num_particles=16, num_draws=8)
    assert estimate.kind == "estimate"
    ratio = by_seed(np.exp(estimate.values - np.tile(truth, SEEDS)))
    error = np.sqrt(by_seed((ratio * by_seed(estimate.values_mcse)).ravel() ** 2).sum(1)) / DATA
    z = (ratio.mean(1) - 1) / error
    # eight filters and skewed weights: the z have heavier tails than a normal's
    assert np.all(np.abs(z) < 6)
    assert z.std() < 1.5
    pooled = ratio.mean(0)  # over seeds, for each datum
    assert np.all(np.abs(pooled - 1) < Z * ratio.std(0) / np.sqrt(SEEDS))


def test_filters_that_resample_at_every_step_are_unbiased(fitted, monkeypatch):
    """The filters themselves, without the choice between them and whole paths."""
    x = fitted.sample(jax.random.key(5), 8)
    truth = fitted.log_likelihood(x, method="exact").values + np.log(fitted.scale).sum()
    monkeypatch.setattr(resampling, "LEAST_SIZE", 1.1)
    particles._filters.clear_cache()
    keys = jax.random.split(KEY, 8)
    log_p = particles._filters(fitted.diffusion, fitted.params, fitted.standardise(x), keys, 16, 500)
    particles._filters.clear_cache()
    ratio = np.exp(np.asarray(log_p, np.float64) - truth[:, None])
    z = (ratio.mean(1) - 1) / (ratio.std(1, ddof=1) / np.sqrt(500))
    assert np.all(np.abs(z) < Z)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smc", "ode"])
def test_images_are_vectors_of_their_pixels(method):
    options = {"num_particles": 4, "num_draws": 2} if method == "smc" else {"num_draws": 2}
    values = []
    for shape in ((4,), (2, 2)):
        flat = linear_diffusion("diagonal", 4, schedule=schedules.cosine(3))
        d = GaussianDiffusion(shape, flat.schedule, flat.network, "diagonal")
        params = random_linear(d)
        x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        run = particles.smc if method == "smc" else flow.ode
        values.append(run(d, params, x, rng_key=KEY, **options).values)
    np.testing.assert_allclose(*values, rtol=1e-4)
