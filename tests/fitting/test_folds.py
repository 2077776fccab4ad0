import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.once import once
from scipy.stats import multivariate_normal

import probdiff
from probdiff import GaussianDiffusion, networks, schedules
from probdiff.fitting import loop
from probdiff.networks.gaussian_start import with_start

KEY = jax.random.key(0)
COV = np.array([[1.0, 0.7], [0.7, 1.0]])
GAUSSIAN = 3.0 + np.random.default_rng(0).multivariate_normal(np.zeros(2), COV, size=150)
TWO = np.sign(GAUSSIAN[:, :1] - 3.0) * [2.0, -1.0] + 0.2 * GAUSSIAN


def few(x, **options):
    d = GaussianDiffusion((2,), schedules.LearnedBetas(8), networks.ResidualMLP(8, 1), "diagonal")
    options = {"num_steps": 1200, "learning_rate": 1e-2, "progress_bar": False} | options
    return probdiff.fit(d, x, rng_key=KEY, **options)


@once
def fits():
    return few(GAUSSIAN), few(TWO)


@pytest.mark.slow
def test_a_network_that_does_not_pay_leaves_the_gaussian():
    fit, _ = fits()
    assert fit.steps_kept == [0]
    assert "0: the Gaussian that it starts from" in repr(fit)
    x = np.random.default_rng(1).multivariate_normal(np.full(2, 3.0), COV, size=500)
    truth = multivariate_normal(np.full(2, 3.0), COV).logpdf(x).mean()
    assert fit.log_likelihood(x, rng_key=KEY).mean == pytest.approx(truth, abs=0.05)  # 5 params of 150 rows: 0.017
    assert not np.any(fit.params["network$params"].network.last.weight)


@pytest.mark.slow
def test_one_that_pays_is_fitted_to_all_rows():
    """The number of steps is that of the best check, of the mean over rows that were held out in turn."""
    _, fit = fits()
    steps = fit.steps_kept[0]
    assert fit.losses.shape == (steps,)
    assert fit.validation[steps // 100 - 1] > fit.validation.max() - 0.011
    Gaussian = multivariate_normal(TWO.mean(0), np.cov(TWO.T)).logpdf(TWO).mean()
    assert fit.validation.max() > Gaussian + 0.2
    assert fit.log_likelihood(TWO, rng_key=KEY).mean == pytest.approx(fit.validation.max(), abs=0.5)


@pytest.mark.slow
def test_draws_have_the_mean_and_the_standard_deviation_of_the_rows():
    """Where held-out rows do not speak against it, as for a Gaussian they do not."""
    fit, _ = fits()
    draws = fit.sample(jax.random.key(1), 20_000)
    np.testing.assert_allclose(draws.mean(0) / GAUSSIAN.std(0), GAUSSIAN.mean(0) / GAUSSIAN.std(0), atol=0.04)
    np.testing.assert_allclose(draws.std(0), GAUSSIAN.std(0), rtol=0.03)


@pytest.mark.slow
def test_it_goes_on_with_the_same_bits(tmp_path):
    _, whole = fits()
    few(TWO, checkpoint_dir=tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        few(TWO, checkpoint_dir=tmp_path)
    for more in ({}, {"num_steps": 2400}):  # of more steps, as many as were best of fewer are taken
        resumed = few(TWO, checkpoint_dir=tmp_path, resume=True, **more)
        for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(resumed.scale, whole.scale)


def test_smoothed_rows_keep_their_covariance():
    rng, variance = np.random.default_rng(0), np.array([4.0, 0.25])
    x = jnp.asarray(np.sqrt(variance) * rng.choice([-1.0, 1.0], size=(100_000, 2)), jnp.float32)
    params = with_start({"network$params": None}, jnp.log(variance), -jnp.ones(2), jnp.ones(2))
    smoothed = np.asarray(loop._smoothed(x, params, 0.5, KEY))
    np.testing.assert_allclose(np.cov(smoothed.T), np.diag(variance), atol=0.05)
    np.testing.assert_allclose(np.abs(smoothed).mean(0), np.abs(np.sqrt(0.75) * np.sqrt(variance)), rtol=0.02)
    np.testing.assert_array_equal(loop._smoothed(x, params, 0.0, KEY), x)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, True])
def test_smoothings_that_are_none_are_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing is .*; it must be at least 0 and less than 1"):
        few(TWO, smoothing=smoothing)
