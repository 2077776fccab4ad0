import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import linear_diffusion, path_gaussian, random_params
from test_chains import exact_elbo, random_linear

from probdiff import likelihood, schedules


@pytest.mark.parametrize("covariance", ["fixed", "diagonal", "full"])
def test_elbo_parts_sum_to_the_closed_form(x64, covariance):
    d, x = linear_diffusion(covariance), np.random.default_rng(0).normal(size=(5, 2))
    parts, mcse = likelihood.elbo_parts(d, random_linear(d), x, rng_key=jax.random.key(0), num_draws=2000)
    assert parts.prior.shape == parts.reconstruction.shape == (5,)
    assert parts.steps.shape == (5, d.num_timesteps - 1)
    expected = np.array([exact_elbo(d, x_0) for x_0 in x])
    z = (parts.elbo - expected) / mcse
    # five data: a |z| above 4.5 comes by chance in 3 of 100,000 seeds
    assert np.all(np.abs(z) < 4.5)
    assert np.all(parts.steps >= 0)
    assert np.all(parts.prior >= 0)


def test_importance_weights_average_to_the_likelihood(x64):
    d, x = linear_diffusion("full"), np.random.default_rng(0).normal(size=(4, 2))
    mean, cov = path_gaussian(d, {})
    expected = scipy.stats.multivariate_normal.pdf(x, mean[-2:], cov[-2:, -2:])
    log_weights = likelihood.log_importance_weights(d, random_linear(d), x, rng_key=jax.random.key(0), num_draws=4000)
    weights = np.exp(log_weights)
    assert weights.shape == (4000, 4)
    z = (weights.mean(0) - expected) / (weights.std(0) / np.sqrt(4000))
    assert np.all(np.abs(z) < 4.5)


def test_rows_are_padded_and_not_recompiled():
    d, params = linear_diffusion("full"), random_linear(linear_diffusion("full"))
    x = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    likelihood._parts.clear_cache()
    for n in (3000, 5000, 4097):
        parts, _ = likelihood.elbo_parts(d, params, x[:n], rng_key=jax.random.key(0), num_draws=2)
        assert parts.elbo.shape == (n,)
    assert likelihood._parts._cache_size() == 1


def test_one_step_chain_has_no_middle_terms():
    d = linear_diffusion("diagonal", schedule=schedules.Fixed([0.9]))
    parts, _ = likelihood.elbo_parts(d, random_params(d), jnp.ones((3, 2)), rng_key=jax.random.key(0), num_draws=4)
    assert parts.steps.shape == (3, 0)
    assert np.all(np.isfinite(parts.elbo))
