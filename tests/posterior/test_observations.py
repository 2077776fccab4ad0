"""Each kind of observation: measurements, missing values, and any function of x_0."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers.posteriors import FAILURE, KEY, A, Sensor, assert_close, conditioned, fitted, linear_fit
from scipy import stats

from probdiff import posterior
from probdiff.posterior import BlackBox, LinearGaussian, Missing


def by_callback(x):
    shape = jax.ShapeDtypeStruct((), x.dtype)

    def outside(x):
        return np.asarray(-0.5 * ((A[0] @ np.asarray(x) - 2.5) / 0.3) ** 2, shape.dtype)

    return jax.pure_callback(outside, shape, x, vmap_method="sequential")


@pytest.mark.parametrize("covariance", [pytest.param("diagonal", marks=pytest.mark.slow), "full"])
def test_missing_values_in_any_pattern(x64, covariance):
    fit, mean, cov = linear_fit(covariance)
    x = np.array([[3.0, np.nan], [np.nan, -1.8], [3.0, -1.8], [np.nan, np.nan]])
    dt = posterior.sample(fit, Missing(x), rng_key=KEY, num_particles=500, num_filters=20)
    draws = dt["posterior"].dataset["x_0"].to_numpy()
    log_evidence = dt["filters"].dataset["log_evidence"].to_numpy()
    for i, row in enumerate(x):
        known = ~np.isnan(row)
        np.testing.assert_array_equal(draws[:, :, i, known], np.broadcast_to(row[known], draws[:, :, i, known].shape))
        pick = np.eye(2)[known]
        wanted, _, evidence = conditioned(mean, cov, row[known], pick, 0) if known.any() else (mean, cov, 0.0)
        if known.any():
            assert_close(np.exp(log_evidence[:, i] - evidence), 1.0, 19)
        if not known.all():
            assert_close(draws[:, :, i, ~known].mean(1), wanted[~known], 19, 2)
    # nothing is known of the last row: its weights are equal, and its draws the prior's
    np.testing.assert_allclose(dt["filters"].dataset["ess"].to_numpy()[..., 3], 1.0, rtol=1e-9)
    np.testing.assert_allclose(log_evidence[:, 3], 0.0, atol=1e-9)
    np.testing.assert_array_equal(np.isnan(dt["observed_data"].dataset["x_0"]), np.isnan(x))


def test_masked_entries_are_missing():
    fit = linear_fit("full")[0]
    hidden = np.array([[False, True], [True, False]])
    x = np.array([[3.0, 7.0], [9.0, -2.0]])
    options = {"rng_key": KEY, "num_particles": 100, "num_filters": 2}
    masked, holes = np.ma.masked_array(x, hidden), np.where(hidden, np.nan, x)
    of_both = [posterior.log_evidence(fit, Missing(one), **options).values for one in (masked, holes)]
    np.testing.assert_array_equal(*of_both)
    with pytest.raises(ValueError, match="x is masked in places"):
        fit.log_likelihood(masked, rng_key=KEY)


@pytest.mark.slow
def test_more_measurements_than_features_say_what_their_sufficient_statistics_do(x64):
    fit, mean, cov = linear_fit("full")
    rng = np.random.default_rng(3)
    many, root = rng.normal(size=(6, 2)), rng.normal(size=(6, 6))
    R = root @ root.T / 6 + 0.1 * np.eye(6)
    y = many @ np.array([2.0, -1.5]) + 0.3
    dt = posterior.sample(fit, LinearGaussian(y, many, R), rng_key=KEY, num_particles=500, num_filters=20)
    wanted, _, evidence = conditioned(mean, cov, y, many, R)
    assert_close(np.exp(dt["filters"].dataset["log_evidence"].to_numpy()[:, 0] - evidence), 1.0, 19)
    assert_close(dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0].mean(1), wanted, 19, 2)
    # a covariance that is singular but for rounding is one
    twice = LinearGaussian(np.array([1.0, 1.2, 0.1]), many[:3], np.ones((3, 3)))
    found = posterior.log_evidence(fit, twice, rng_key=KEY, num_particles=500, num_filters=20)
    z = (found.values - conditioned(mean, cov, twice.y, twice.A, twice.noise)[2]) / found.values_mcse
    assert np.all(np.abs(z) < stats.t(19).isf(FAILURE / 2))


@pytest.mark.slow
def test_images_are_observed_as_they_are(x64):
    fit = fitted("diagonal", np.zeros(4), 0.5 + 0.5 * np.eye(4), 5, 3.0, 2.0, (2, 2))
    x = np.full((1, 2, 2), np.nan)
    x[0, 0] = 4.0
    dt = posterior.sample(fit, Missing(x), rng_key=KEY, num_particles=200, num_filters=4)
    np.testing.assert_array_equal(dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0, :2], 4.0)
    pixel = lambda x: -0.5 * ((x[0, 1] - 4) / 0.2) ** 2  # noqa: E731
    dt = posterior.sample(fit, pixel, rng_key=KEY, num_particles=200, num_filters=4)
    assert abs(dt["posterior"].dataset["x_0"].to_numpy()[..., 1].mean() - 4) < 0.2


@pytest.mark.slow
def test_an_observation_that_says_nothing_leaves_the_prior():
    fit = linear_fit("full")[0]
    dt = posterior.sample(
        fit, LinearGaussian(np.zeros(1), A, 1e10), rng_key=KEY, num_particles=500, num_filters=4
    )  # fmt: skip
    assert float(dt["evidence"].dataset["pareto_k"][0]) == -np.inf
    assert (dt["filters"].dataset["ess"] > 0.99).all()


@pytest.mark.slow
def test_any_function_is_a_likelihood():
    """Modules, code outside JAX, integers, and NaN where the likelihood is zero, beside a plain function."""
    fit = linear_fit("diagonal")[0]
    cut = lambda at: lambda x: Sensor(A[0])(x) + jnp.where(x[0] < 5.5, 0, at)  # noqa: E731
    options = {"rng_key": KEY, "num_particles": 200, "num_filters": 2}
    plain, *others = (
        posterior.log_evidence(fit, BlackBox(function), **options).values
        for function in (lambda x: Sensor(A[0])(x), Sensor(jnp.asarray(A[0])), by_callback, cut(-jnp.inf), cut(jnp.nan))
    )
    *others, zero, nan = others
    for other in others:
        np.testing.assert_allclose(other, plain, rtol=1e-4)
    assert nan == zero
    of_integers = posterior.log_evidence(fit, lambda x: jnp.where(x[0] > -50, 0, -100), **options)
    assert abs(of_integers.values) < 1e-5


def test_a_function_of_features_far_from_zero_is_warned_of_and_measurements_are_not():
    fit = fitted("full", [[0.0]], np.eye(1), T=2, loc=1.764e9, scale=2.5e4)
    options = {"rng_key": KEY, "num_particles": 50, "num_filters": 2}
    with pytest.warns(UserWarning, match="lie far from zero for float32: '0' is near 1.764e") as caught:
        posterior.sample(fit, lambda x_0: -0.5 * ((x_0[0] - 1.764e9) / 3e4) ** 2, **options)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="lie far from zero"):
        fit.prior()
    dt = posterior.sample(fit, LinearGaussian(np.array([1.764e9]), np.eye(1), 30.0), **options)
    assert abs(dt["posterior"].dataset["x_0"].to_numpy().mean() - 1.764e9) < 30


@pytest.mark.parametrize("unit", [1e-200, 1e-30, 1e30, 1e200])
def test_measurements_may_be_in_any_units(unit):
    fit = linear_fit("full")[0]
    y, of_x = np.array([2.5, 1.0]), np.array([[0.7, -0.4], [0.1, 0.2]])
    options = {"rng_key": KEY, "num_particles": 100, "num_filters": 2}
    wanted = posterior.log_evidence(fit, LinearGaussian(y, of_x, 0.3), **options).values
    units = np.array([1.0, unit])
    values = posterior.log_evidence(
        fit, LinearGaussian(y * units, of_x * units[:, None], 0.3 * units), **options
    ).values
    np.testing.assert_allclose(values, wanted - np.log(unit), rtol=1e-5)


def test_a_measurement_of_boundless_error_says_nothing():
    fit = linear_fit("full")[0]
    dt = posterior.sample(fit, LinearGaussian(np.array([2.5]), A, 1e30), rng_key=KEY, num_particles=500)
    np.testing.assert_allclose(dt["filters"].dataset["ess"], 1.0, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_equal_measurements_of_very_different_errors_say_what_the_best_does():
    fit, mean, cov = linear_fit("full")
    rows, noise = np.tile([[1.0, 0.0]], (4, 1)), np.array([1e-9, 1e-9, 1e9, 1e9])
    values = posterior.log_evidence(fit, LinearGaussian(np.full(4, 3.0), rows, noise), rng_key=KEY).values
    # the mean of the first two is exact, their difference and the others are noise
    exact = stats.norm(mean[0], cov[0, 0] ** 0.5).logpdf(3.0)
    wanted = exact + stats.norm(0, 1e-9 * 2**0.5).logpdf(0.0) + 2 * stats.norm(0, 1e9).logpdf(0.0)
    np.testing.assert_allclose(values, wanted, atol=0.05)


def test_frames_in_likelihoods_are_taken_by_name():
    fit = replace(linear_fit("full")[0], features=("a", "b"))
    rows = pd.DataFrame({"b": [-0.4], "a": [0.7]})
    options = {"rng_key": KEY, "num_particles": 500}
    values = [
        posterior.log_evidence(fit, LinearGaussian(np.array([2.5]), of_x, 0.3), **options).values for of_x in (rows, A)
    ]
    np.testing.assert_array_equal(*values)
    with pytest.raises(ValueError, match="A has no column 'b'"):
        posterior.log_evidence(fit, LinearGaussian(np.array([2.5]), rows[["a"]], 0.3), **options)

    def log_g(x, y):
        return -0.5 * ((x[0] - y["seen"]) / 0.3) ** 2

    seen = np.array([2.5, 3.0])
    values = [
        posterior.log_evidence(fit, log_g, data=data, **options).values
        for data in (pd.DataFrame({"other": [0.0, 1.0], "seen": seen}), {"other": np.array([0.0, 1.0]), "seen": seen})
    ]
    np.testing.assert_array_equal(*values)
