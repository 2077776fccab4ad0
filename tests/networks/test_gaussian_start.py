import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pandas as pd
import pytest
from helpers.diffusions import random_params
from helpers.gaussian_starts import start_of
from scipy.stats import kstest, multivariate_normal
from sklearn.covariance import LedoitWolf

import probdiff
from probdiff import GaussianDiffusion, derivation, networks, posterior, schedules
from probdiff.networks.gaussian_start import GaussianStart, with_start

KEY = jax.random.key(0)
S = np.array([[1.0, 0.9, -0.3], [0.9, 1.0, 0.0], [-0.3, 0.0, 1.0]])
LOC, SCALE = np.array([10.0, -3.0, 0.5]), np.array([2.0, 0.1, 30.0])
P = multivariate_normal(LOC, S * np.outer(SCALE, SCALE))
X = P.rvs(200, random_state=0)


@pytest.mark.parametrize("covariance", ["diagonal", pytest.param("full", marks=pytest.mark.slow)])
def test_outputs_of_zero_are_the_reversal_of_the_gaussian(x64, covariance):
    """In closed form, and by the weights of paths, which then are all the same."""
    fit = start_of(S, covariance, LOC, SCALE)
    np.testing.assert_allclose(fit.log_likelihood(X, method="exact").values, P.logpdf(X), atol=1e-7)
    of_paths = fit.log_likelihood(X[:20], rng_key=KEY, method="iwae", num_particles=2)
    np.testing.assert_allclose(of_paths.values, P.logpdf(X[:20]), atol=1e-4)


def test_of_fixed_covariances_the_means_are(x64):
    fit = start_of(S, "fixed")
    variance = np.exp(fit.params["network$params"].log_variance)
    noise, predict = numpyro.handlers.substitute(fit.diffusion.predictions, data=fit.params)()
    x = np.random.default_rng(0).normal(size=(5, 3))
    for t in (1, 4, 6):
        alpha_bar = float(noise.alpha_bar[t])
        mean = np.sqrt(alpha_bar) * variance / (alpha_bar * variance + 1 - alpha_bar) * x
        np.testing.assert_allclose(predict(jnp.asarray(x), t)[1][0][:, 0], mean, rtol=1e-6)


def test_everything_is_in_the_datas_units_and_axes():
    fit = start_of(S, "diagonal", LOC, SCALE, features=("a", "b", "c"))
    paths = fit.sample(KEY, 4000, paths=True)
    for j in range(3):
        assert kstest((paths[:, 0, j] - LOC[j]) / SCALE[j], "norm").pvalue > 1e-4
    np.testing.assert_allclose(np.corrcoef(paths[:, 0].T), S, atol=0.06)
    assert np.isfinite(fit.log_likelihood(paths[:20], rng_key=KEY, method="upper").values).all()
    np.testing.assert_array_equal(paths[:, 0], fit.sample(KEY, 4000))
    prior = numpyro.infer.Predictive(lambda: numpyro.deterministic("x", fit.prior()()), num_samples=4000)
    x = np.asarray(prior(jax.random.key(1))["x"])
    np.testing.assert_allclose(np.cov(x.T) / np.outer(SCALE, SCALE), S, atol=0.1)
    shown = fit.units.to_features(fit.standardise(X))
    np.testing.assert_allclose(shown, (X - LOC) / SCALE, atol=1e-5)


@pytest.mark.slow
def test_trees_show_features():
    fit = start_of(S, "diagonal", LOC, SCALE, features=("a", "b", "c"))
    dt = fit.to_datatree(pd.DataFrame(X, columns=["a", "b", "c"]), rng_key=KEY, num_draws=200)
    for group in ("posterior", "forward"):
        values = dt[group]["x"].sel(t=0, chain=0).to_numpy()
        np.testing.assert_allclose(np.corrcoef(values.T), S, atol=0.25)


COV = S * np.outer(SCALE, SCALE)
HOLES = np.where([True, False, True], X[:2], np.nan)
OF_KNOWN = multivariate_normal(LOC[[0, 2]], COV[np.ix_([0, 2], [0, 2])]).logpdf(X[:2, [0, 2]])


@pytest.mark.parametrize("covariance", ["diagonal", pytest.param("full", marks=pytest.mark.slow)])
def test_posteriors_of_rows_with_holes_are_those_of_the_gaussian(covariance):
    fit, cov, x, holes = start_of(S, covariance, LOC, SCALE), COV, X[:2], HOLES
    dt = posterior.sample(fit, posterior.Missing(holes), rng_key=KEY, num_particles=400)
    np.testing.assert_allclose(dt["evidence"]["log_evidence"], OF_KNOWN, atol=0.15)
    drawn = dt["posterior"]["x_0"].to_numpy()
    np.testing.assert_array_equal(drawn[:, :, :, 0], np.broadcast_to(holes[:, 0], drawn.shape[:3]))
    gain = cov[1, [0, 2]] @ np.linalg.inv(cov[np.ix_([0, 2], [0, 2])])
    mean, std = LOC[1] + (x[:, [0, 2]] - LOC[[0, 2]]) @ gain, np.sqrt(cov[1, 1] - gain @ cov[[0, 2], 1])
    np.testing.assert_allclose(drawn[..., 1].mean((0, 1)), mean, atol=0.2 * std)
    np.testing.assert_allclose(drawn[..., 1].std((0, 1)), std, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_posteriors_of_measurements_are_those_of_the_gaussian(covariance):
    """Of rows with holes, as a matrix states them, and of one column that a function measures."""
    fit, options = start_of(S, covariance, LOC, SCALE), {"rng_key": KEY, "num_particles": 400}
    known = posterior.LinearGaussian(X[:2, [0, 2]], np.eye(3)[[0, 2]], 0.0)
    np.testing.assert_allclose(posterior.log_evidence(fit, known, **options).values, OF_KNOWN, atol=0.15)
    noise = 0.5 * SCALE[1]

    def measured(x_0):
        return jax.scipy.stats.norm.logpdf(x_0[1], -3.1, noise)

    evidence = posterior.log_evidence(fit, measured, **options).values
    assert evidence[0] == pytest.approx(multivariate_normal(LOC[1], COV[1, 1] + noise**2).logpdf(-3.1), abs=0.1)


@pytest.mark.parametrize("covariance", [pytest.param("diagonal", marks=pytest.mark.slow), "full"])
def test_no_draw_runs_away_whatever_the_network(covariance):
    """Weights that are three times too large: without bounds some draws are beyond 10⁵."""
    d = GaussianDiffusion((2,), schedules.linear(20), networks.ResidualMLP(8, 1), covariance)
    wild = jax.tree.map(lambda leaf: 3.0 * leaf, random_params(d, seed=1))
    low, high = jnp.array([-2.0, -1.0]), jnp.array([2.0, 3.0])
    farthest = []
    for params in (wild, with_start(wild, jnp.zeros(2), low, high)):
        stacked = jax.tree.map(lambda leaf: leaf[None], params)
        fit = probdiff.Fit(d, stacked, np.zeros((1, 1)), np.zeros((1, 0)), np.zeros(2), np.ones(2))
        draws = fit.sample(KEY, 100_000)
        farthest.append((np.maximum(draws - high, low - draws) / (high - low)).max())
    assert farthest[0] > 1e5
    assert farthest[1] < 6  # x̂_0 within one range of the data, and twice a standard deviation of at most half of one


def test_bounds_leave_what_is_inside_as_it_is(x64):
    """And bend smoothly: the slope of x̂_0 in x_t has no jump."""
    fit = start_of(np.eye(2))
    free = with_start(fit.params, jnp.zeros(2), -jnp.full(2, 1e6), jnp.full(2, 1e6))
    noise, bounded = numpyro.handlers.substitute(fit.diffusion.predictions, data=fit.params)()
    _, unbounded = numpyro.handlers.substitute(fit.diffusion.predictions, data=free)()
    t = 1
    reach = 10.0 * np.sqrt(float(noise.alpha_bar[t]))  # twice the range of the data
    x = jnp.linspace(-3 * reach, 3 * reach, 6001)[:, None] * jnp.ones(2)
    bent, straight = np.asarray(bounded(x, t)[1][0])[:, 0, 0], np.asarray(unbounded(x, t)[1][0])[:, 0, 0]
    inside = np.abs(straight) < 9.9
    np.testing.assert_allclose(bent[inside], straight[inside], rtol=1e-12)
    slope = np.gradient(bent, np.asarray(x)[:, 0])
    assert np.abs(np.diff(slope)).max() < 0.02
    assert (slope > 0).all()


def test_far_out_the_network_makes_no_covariance_small(x64):
    """Whatever its outputs, and gradients are finite there."""
    params = jax.tree.map(lambda leaf: 3.0 * leaf, random_params(start_of(S, "full").diffusion))
    start = with_start(params, *map(jnp.asarray, ([-1.0, 0.0, 0.7], [-100.0] * 3, [100.0] * 3)))["network$params"]
    at_zero = eqx.tree_at(lambda one: one.network.last, start, jax.tree.map(jnp.zeros_like, start.network.last))
    outputs, of_start = (jax.jit(one.around(one.network)) for one in (start, at_zero))
    near, far, farther = jnp.full(3, 0.5), jnp.full(3, 500.0), jnp.full(3, 1e12)
    assert jnp.abs(outputs(near, 3.0) - of_start(near, 3.0))[3:].max() > 0.1
    slope = jax.jacfwd(lambda bias: at_zero.around(lambda x, log_snr: bias)(near, 3.0))(jnp.zeros(9))
    assert (jnp.abs(jnp.diag(slope)) > 0.1).all()  # or nothing would be learned
    for x in (far, farther):
        found, least = outputs(x, 3.0), of_start(x, 3.0)
        assert (found[3:6] >= least[3:6] - 1e-6).all()
        np.testing.assert_allclose(found[6:], least[6:], atol=1e-6)
        assert jnp.isfinite(jax.jacfwd(outputs)(x, 3.0)).all()


@pytest.mark.parametrize("components", [1, 2])
def test_second_derivatives_are_finite_in_single_precision(components):
    """Which the ledger takes, at the start too."""
    d = GaussianDiffusion((2,), schedules.cosine(4), networks.ResidualMLP(4, 1), "full", components)
    params = with_start(random_params(d), jnp.zeros(2), -jnp.full(2, 5.0), jnp.full(2, 5.0))
    zero = jax.tree.map(jnp.zeros_like, params["network$params"].network.last)
    start = eqx.tree_at(lambda one: one.network.last, params["network$params"], zero)
    for one in (params["network$params"], start):
        found = jax.hessian(lambda x, one=one: one.around(one.network, components)(x, jnp.array(1.0)))(jnp.ones(2))
        assert jnp.isfinite(found).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2, weight_decay=0.1),
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(numpyro.optim.Adam(1e-2), marks=pytest.mark.slow),
    ],
)
def test_no_step_changes_the_start(optimizer):
    d = GaussianDiffusion((3,), schedules.cosine(4), networks.ResidualMLP(4, 1), "diagonal")
    options = {"num_steps": 20, "batch_size": 16, "check_every": 20, "validation": 0.0, "progress_bar": False}
    fit = probdiff.fit(d, X, rng_key=KEY, optimizer=optimizer, dropout=False, **options)
    held, z = fit.params["network$params"], fit.standardise(X)
    assert isinstance(held, GaussianStart)
    np.testing.assert_allclose(held.low, z.min(0), rtol=1e-6)
    np.testing.assert_allclose(held.high, z.max(0), rtol=1e-6)
    shrunk = LedoitWolf().fit((X - fit.loc) / fit.scale).covariance_
    axes = fit.axes.T @ shrunk @ fit.axes
    np.testing.assert_allclose(axes, np.diag(np.exp(held.log_variance)), atol=1e-5)
    assert np.abs(held.network.last.bias).max() > 0
    wider = probdiff.fit(d, 3 * X, rng_key=KEY, optimizer=optax.sgd(0.0), init=fit, **options)
    np.testing.assert_allclose(wider.params["network$params"].high, np.fmax(held.high, fit.standardise(3 * X).max(0)))
    np.testing.assert_array_equal(wider.params["network$params"].network.last.bias, held.network.last.bias)


def test_a_fit_is_saved_with_its_axes_and_its_start(tmp_path):
    fit = start_of(S, "diagonal", LOC, SCALE)
    fit.save(tmp_path / "fit.npz")
    opened = probdiff.Fit.load(tmp_path / "fit.npz", fit.diffusion)
    np.testing.assert_array_equal(opened.axes, fit.axes)
    assert eqx.tree_equal(opened.params["network$params"], fit.params["network$params"])
    np.testing.assert_array_equal(opened.sample(KEY, 5), fit.sample(KEY, 5))


@pytest.mark.slow
def test_the_derivation_holds_with_a_start(x64):
    """Gradients in the bounds and in Λ, which no fit changes, among them."""
    d = start_of(S, network=networks.ResidualMLP(4, 1), T=4).diffusion
    params = with_start(random_params(d), *map(jnp.asarray, ([-1.0, 0.0, 0.7], [-3.0] * 3, [3.0] * 3)))
    x = np.random.default_rng(0).normal(size=(3, 3))
    derivation.check(d.reverse, d.forward, x, params=params, rng_key=KEY, num_draws=1000).assert_holds()


def levels(rng, n):
    """Answers of a few levels each, that hang together."""
    u = rng.normal(size=(n, 3))
    z = np.stack([u[:, 0], u[:, 0] + 0.4 * u[:, 1], u[:, 0] + 0.7 * rng.normal(size=n), u[:, 2]], axis=1)
    at = [[17.5, 22, 27, 32, 37, 42], [0.5, 2.5, 6, 9, 13, 16.5, 23], [0, 1, 2, 3, 4, 5.5], [1.0, 2, 3, 4, 5]]
    edges = [np.quantile(z[:, j], np.linspace(0, 1, len(at[j]) + 1)[1:-1] ** 0.5) for j in range(4)]
    return np.stack([np.asarray(at[j], float)[np.searchsorted(edges[j], z[:, j])] for j in range(4)], axis=1)


TROUBLE = {
    "levels": levels,
    "outliers": lambda rng, n: np.stack([rng.normal(size=n), rng.standard_t(2, n), rng.lognormal(0, 1.5, n)], axis=1),
    "duplicates": lambda rng, n: np.repeat(rng.normal(size=(n // 10, 3)), 10, axis=0),
    "nearly collinear": lambda rng, n: rng.normal(size=(n, 1)) + 1e-3 * rng.normal(size=(n, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLE)
@pytest.mark.filterwarnings("ignore")
def test_of_a_million_draws_none_is_far_outside(name):
    x = TROUBLE[name](np.random.default_rng(0), 2000)
    d = GaussianDiffusion((x.shape[1],), schedules.LearnedBetas(8), networks.ResidualMLP(32, 2), "full")
    fit = probdiff.fit(d, x, rng_key=KEY, num_steps=2000, validation=0.0, dropout=False, progress_bar=False)
    farthest = 0.0
    for key in jax.random.split(KEY, 10):
        draws = fit.sample(key, 100_000)
        farthest = max(farthest, (np.maximum(draws - x.max(0), x.min(0) - draws) / np.ptp(x, axis=0)).max())
    assert farthest < 3
