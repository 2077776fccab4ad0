"""Draws and evidence by particle filters against closed forms and quadrature."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusions import fit_of, linear_mixture
from helpers.posteriors import FAILURE, KEY, A, Sensor, assert_close, conditioned, fitted, linear_fit, three_modes
from scipy import stats

from probdiff import posterior
from probdiff.posterior import BlackBox, LinearGaussian
from probdiff.posterior.filters import filters

KINDS = {
    "linear": lambda y, s: LinearGaussian(np.array([y]), A, s),
    "function": lambda y, s: lambda x: -0.5 * ((A[0] @ x - y) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi)),
    "black box": lambda y, s: BlackBox(lambda x: -0.5 * ((A[0] @ x - y) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))),
}


@pytest.mark.parametrize(
    ("covariance", "kind", "T"),
    [
        pytest.param("fixed", "linear", 5, marks=pytest.mark.slow),
        pytest.param("diagonal", "linear", 5, marks=pytest.mark.slow),
        pytest.param("full", "linear", 5, marks=pytest.mark.slow),
        ("diagonal", "function", 5),
        pytest.param("full", "function", 5, marks=pytest.mark.slow),
        pytest.param("diagonal", "black box", 5, marks=pytest.mark.slow),
        pytest.param("full", "linear", 1, marks=pytest.mark.slow),
    ],
)
def test_posterior_and_evidence_of_a_linear_chain(x64, covariance, kind, T):
    fit, mean, cov = linear_fit(covariance, T)
    y, s = 2.5, 0.3
    dt = posterior.sample(fit, KINDS[kind](y, s), rng_key=KEY, num_particles=500, num_filters=20)
    wanted_mean, wanted_cov, evidence = conditioned(mean, cov, np.array([y]), A, np.array([[s**2]]))
    assert_close(np.exp(dt["filters"].dataset["log_evidence"].to_numpy()[:, 0] - evidence), 1.0, 19)
    draws = dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0]
    assert_close(draws.mean(1), wanted_mean, 19, 2)
    centred = draws - wanted_mean
    assert_close(np.einsum("msi,msj->mij", centred, centred) / draws.shape[1], wanted_cov, 19, 3)
    assert dt["evidence"].dataset["effective_draws"][0] > 500


@pytest.mark.parametrize(
    ("covariance", "kind"),
    [
        ("full", "linear"),
        *[
            pytest.param(covariance, kind, marks=pytest.mark.slow)
            for covariance in ("diagonal", "full", "fixed")
            for kind in KINDS
            if (covariance, kind) != ("full", "linear")
        ],
    ],
)
def test_posterior_and_evidence_of_a_chain_of_mixtures(x64, covariance, kind):
    """Beside quadrature over the plane of the exact density, a finite mixture, times the likelihood."""
    d, params = linear_mixture(covariance, 2)
    fit, (y, s) = fit_of(d, params), (1.0, 0.3)
    axis = np.linspace(-6, 6, 121)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_g = jax.vmap(KINDS["function"](y, s))(jnp.asarray(grid))
    mass = np.exp(fit.log_likelihood(grid, method="exact").values + np.asarray(log_g)) * (axis[1] - axis[0]) ** 2
    dt = posterior.sample(fit, KINDS[kind](y, s), rng_key=KEY, num_particles=500, num_filters=20)
    assert_close(np.exp(dt["filters"].dataset["log_evidence"].to_numpy()[:, 0]), mass.sum(), 19)
    draws = dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0]
    mean = mass @ grid / mass.sum()
    assert_close(draws.mean(1), mean, 19, 2)
    centred, apart = draws - mean, grid - mean
    assert_close(np.einsum("msi,msj->mij", centred, centred) / 500, (mass * apart.T) @ apart / mass.sum(), 19, 3)
    assert dt["evidence"].dataset["effective_draws"][0] > 500


@pytest.mark.slow
def test_each_draw_by_itself_is_one_of_the_posterior(x64):
    """Whatever its place among the draws of a filter, as for those who take the first ten."""
    fit, mean, cov = linear_fit("diagonal", 1)  # whose weights are uneven at the last resampling
    likelihood = BlackBox(lambda x: -0.5 * ((A[0] @ x - 4.5) / 0.3) ** 2)
    dt = posterior.sample(fit, likelihood, rng_key=KEY, num_particles=400, num_filters=400)
    wanted = conditioned(mean, cov, np.array([4.5]), A, np.array([[0.09]]))[0]
    draws = dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0]  # 400 filters
    for place in (0, 1, 100, 399):
        assert_close(draws[:, place], wanted, 399, 8)


@pytest.mark.slow
def test_posterior_of_a_curved_chain_agrees_with_quadrature(x64):
    """p(x_0) on a grid by quadrature, times a likelihood that is no Gaussian and bends both ways."""
    fit = fitted("diagonal", [[-0.8], [0.8]], [[0.2]], 5, 0.5, 2.0)
    log_g = lambda x: -((jnp.abs(x[0]) - 1.5) ** 2) / 0.18  # noqa: E731
    grid = np.linspace(-3.0, 4.0, 701)[:, None]
    log_p = fit.log_likelihood(grid, method="exact").values + np.asarray(jax.vmap(log_g)(jnp.asarray(grid)))
    mass = np.exp(log_p) * (grid[1] - grid[0])
    for likelihood in (log_g, BlackBox(log_g)):
        dt = posterior.sample(fit, likelihood, rng_key=KEY, num_particles=500, num_filters=20)
        assert_close(np.exp(dt["filters"].dataset["log_evidence"].to_numpy()[:, 0]), mass.sum(), 19)
        draws = dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0, 0]
        for edge in (-1.0, 0.5, 1.7):  # of either mode, and the shares of both
            assert_close((draws < edge).mean(1), mass[grid[:, 0] < edge].sum() / mass.sum(), 19, 3)


@pytest.mark.slow
def test_evidence_is_within_its_error_in_200_of_200_seeds(x64):
    """One call of 200 data that are the same: no value is off by more than its error, and p̂(y) has no bias."""
    fit, mean, cov = linear_fit("full")
    likelihood = LinearGaussian(np.full((200, 1), 2.5), A, 0.1)
    found = posterior.log_evidence(fit, likelihood, rng_key=KEY, num_particles=50, num_filters=16)
    exact = conditioned(mean, cov, np.array([2.5]), A, np.array([[0.01]]))[2]
    z = (found.values - exact) / found.values_mcse
    assert np.all(np.abs(z) < stats.t(15).isf(FAILURE / 400))
    assert_close(np.exp(found.values - exact)[:, None], 1.0, 199)
    assert 0.8 < (z**2).mean() ** 0.5 < 1.5  # the errors are no larger than need be


@pytest.mark.parametrize("kind", ["linear", "function"])
@pytest.mark.slow
def test_truths_have_even_ranks_among_the_draws(x64, kind):
    """Simulation-based calibration: x_0 from the prior, y given x_0, then the rank of x_0 (Talts et al. 2018)."""
    fit = three_modes()
    truths = fit.sample(jax.random.key(1), 200)
    y = truths @ A.T + 0.3 * np.random.default_rng(0).normal(size=(200, 1))
    if kind == "linear":
        arguments = {"likelihood": LinearGaussian(y, A, 0.3)}
    else:
        arguments = {"likelihood": lambda x, y: -0.5 * jnp.sum((A @ x - y) ** 2) / 0.09, "data": y}
    dt = posterior.sample(fit, **arguments, rng_key=KEY, num_particles=500, num_filters=2)
    draws = dt["posterior"].dataset["x_0"].to_numpy()  # chain, draw, datum, feature
    pit = (draws < truths).mean((0, 1))
    for i in range(2):
        assert stats.kstest(pit[:, i], "uniform").pvalue > FAILURE / 4


@pytest.mark.slow
def test_methods_are_compiled_once(x64):
    fit = linear_fit("diagonal")[0]
    sensor = Sensor(jnp.asarray(A[0]))
    options = {"rng_key": KEY, "num_particles": 200, "num_filters": 2}
    before = filters._cache_size()
    for _ in range(2):
        posterior.log_evidence(fit, BlackBox(sensor.log_prob), **options)
    assert filters._cache_size() == before + 1


MANY_FEATURES = """
import resource
import jax, numpy as np
from helpers.diffusions import fit_of
from probdiff import GaussianDiffusion, networks, posterior, schedules

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
d = GaussianDiffusion((300,), schedules.linear(3), networks.ResidualMLP(8, 1))
fit = fit_of(d, d.initial_params(jax.random.key(0)))
x = np.zeros((1, 300))
fit.log_likelihood(x, rng_key=jax.random.key(1))
before = peak()
x[0, ::3] = np.nan
posterior.sample(fit, posterior.Missing(x), rng_key=jax.random.key(2))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_features():
    """8 filters of 1,000 particles of 300 features: a matrix for each would be 2.7 GiB, and there are several."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_FEATURES],
        env=os.environ | {"PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 600  # MiB
