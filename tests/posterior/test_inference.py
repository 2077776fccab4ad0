import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import xarray as xr
from helpers.once import once
from numpyro import handlers
from scipy import stats

from probdiff import GaussianDiffusion, posterior, schedules
from probdiff.posterior import BlackBox, LinearGaussian, Missing, inference
from probdiff.posterior.filters import Filtered, filters
from probdiff.posterior.imputation import impute
from probdiff.results import Fit

FAILURE = 1e-4  # of a right program, for each test
A = np.array([[0.7, -0.4]])
KEY = jax.random.key(7)


class Denoiser(eqx.Module):
    """Nearly E[x_0 given x_t] and Var(x_0 given x_t) of equal normals of one covariance, in the chain's units."""

    means: jax.Array
    values: jax.Array
    vectors: jax.Array
    num_outputs: int = eqx.field(static=True)

    def __call__(self, x_t, log_snr):
        D, signal, noise = self.means.shape[1], jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        x = 1.05 * jnp.ravel(x_t) + 0.03  # not quite, so that p is not the reversal of q
        total = signal * self.values + noise
        residual = (x - jnp.sqrt(signal) * self.means) @ self.vectors
        weights = jax.nn.softmax(-0.5 * jnp.sum(residual**2 / total, 1))
        each = self.means + (jnp.sqrt(signal) * self.values / total * residual) @ self.vectors.T
        mean = weights @ each
        variance = weights @ (each - mean) ** 2 + self.vectors**2 @ (noise * self.values / total)
        outputs = (mean - jnp.sqrt(signal) * jnp.ravel(x_t)) / jnp.sqrt(noise)
        spread = 8 * jnp.arctanh(jnp.clip(jnp.log(variance / noise) / 16, -0.99, 0.99))
        return jnp.concatenate([outputs, spread, jnp.full(D * D, 0.2)])[: self.num_outputs]


def fitted(covariance, means, C, T=5, loc=0.0, scale=1.0, event_shape=None):
    """A fit to equal normals at `means`, near the reversal of q."""
    means, schedule = np.atleast_2d(means), schedules.log_snr_linear(T, 3.0, -4.0)
    D = means.shape[1]
    outputs = {"fixed": D, "diagonal": 2 * D, "full": 2 * D + D * (D - 1) // 2}[covariance]
    network = Denoiser(jnp.asarray(means), *map(jnp.asarray, np.linalg.eigh(C)), outputs)
    d = GaussianDiffusion(event_shape or (D,), schedule, network, covariance)
    params = jax.tree.map(lambda leaf: leaf[None], d.initial_params(jax.random.key(0)))
    loc, scale = np.broadcast_to(loc, d.event_shape).astype(float), np.broadcast_to(scale, d.event_shape).astype(float)
    return Fit(d, params, np.zeros((1, 1)), np.zeros((1, 0)), loc, scale)


@once
def linear_fit(covariance, T=5):
    """A linear-Gaussian chain in units of its own, and the mean and covariance of its x_0 in the data's."""
    fit = fitted(covariance, [0.2, -0.1], [[1.1, 0.5], [0.5, 0.7]], T, [1.0, -2.0], [2.0, 0.5])
    _, kernel = handlers.substitute(fit.diffusion.kernels, data=fit.params)()
    mean, cov = np.zeros(2), np.eye(2)
    for t in range(T, 0, -1):
        f_mu = lambda x, t=t: kernel(x, t).mean  # noqa: E731
        slope, p = np.asarray(jax.jacfwd(f_mu)(jnp.zeros(2))), kernel(jnp.asarray(mean), t)
        f_sigma = np.asarray(p.covariance_matrix if covariance == "full" else jnp.diag(p.variance))
        mean, cov = np.asarray(p.mean), slope @ cov @ slope.T + f_sigma
    scale = np.diag(fit.scale)
    return fit, fit.loc + scale @ mean, scale @ cov @ scale


@once
def three_modes(covariance="full"):
    return fitted(covariance, [[-1.2, 0.3], [0.0, -1.0], [1.2, 0.7]], 0.1 * np.eye(2), 5, [1.0, -2.0], [2.0, 0.5])


def conditioned(mean, cov, y, A, R):
    """Posterior mean and covariance, and log p(y)."""
    S = A @ cov @ A.T + R
    gain = cov @ A.T @ np.linalg.inv(S)
    return mean + gain @ (y - A @ mean), cov - gain @ A @ cov, stats.multivariate_normal(A @ mean, S).logpdf(y)


def assert_close(values, exact, degrees, comparisons=1):
    """Independent estimates, leading axis, agree in the mean with the exact value."""
    z = (values.mean(0) - exact) / (values.std(0, ddof=1) / np.sqrt(len(values)))
    assert np.all(np.abs(z) < stats.t(degrees).isf(FAILURE / 2 / comparisons)), z


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
        ("full", "linear", 5),
        ("diagonal", "function", 5),
        pytest.param("full", "function", 5, marks=pytest.mark.slow),
        ("diagonal", "black box", 5),
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


def test_conditional_densities(x64):
    fit, mean, cov = linear_fit("full")
    x = np.array([[3.0, -1.8], [0.5, -2.5]])
    found = posterior.log_conditional(fit, x, of=[1], given=[0], rng_key=KEY, num_particles=500, num_filters=20)
    for i, row in enumerate(x):
        m, v, _ = conditioned(mean, cov, row[:1], np.eye(2)[:1], 0)
        z = (found.values[i] - stats.norm(m[1], np.sqrt(v[1, 1])).logpdf(row[1])) / found.values_mcse[i]
        assert abs(z) < stats.t(19).isf(FAILURE / 4)
    assert found.kind == "estimate"
    alone = posterior.log_conditional(fit, x, of=[1], given=[], rng_key=KEY, num_particles=500, num_filters=20)
    z = (alone.values - stats.norm(mean[1], np.sqrt(cov[1, 1])).logpdf(x[:, 1])) / alone.values_mcse
    assert np.all(np.abs(z) < stats.t(19).isf(FAILURE / 4))


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
def test_images_are_observed_as_they_are(x64):
    fit = fitted("diagonal", np.zeros(4), 0.5 + 0.5 * np.eye(4), 5, 3.0, 2.0, (2, 2))
    x = np.full((1, 2, 2), np.nan)
    x[0, 0] = 4.0
    dt = posterior.sample(fit, Missing(x), rng_key=KEY, num_particles=200, num_filters=4)
    np.testing.assert_array_equal(dt["posterior"].dataset["x_0"].to_numpy()[:, :, 0, :2], 4.0)
    pixel = lambda x: -0.5 * ((x[0, 1] - 4) / 0.2) ** 2  # noqa: E731
    dt = posterior.sample(fit, pixel, rng_key=KEY, num_particles=200, num_filters=4)
    assert abs(dt["posterior"].dataset["x_0"].to_numpy()[..., 1].mean() - 4) < 0.2


def test_the_tree_is_read_by_arviz_and_kept(tmp_path):
    fit = three_modes()
    dt = posterior.sample(
        fit, LinearGaussian(np.array([[0.3], [0.5]]), A, 0.2), rng_key=KEY, num_particles=100, num_filters=4,
        features=["a", "b"],
    )  # fmt: skip
    assert dict(dt["posterior"].dataset.sizes) == {"chain": 4, "draw": 100, "datum": 2, "feature": 2}
    assert dt["filters"].dataset["ess"].dims == ("chain", "t", "datum")
    assert dt["filters"].dataset["t"].to_numpy().tolist() == [5, 4, 3, 2, 0]
    assert (az.rhat(dt)["x_0"] < 1.1).all()
    dt.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.open_datatree(tmp_path / "posterior.nc")["posterior"]["x_0"], dt["posterior"]["x_0"])


def test_what_cannot_be_is_told():
    fit = three_modes()
    far = LinearGaussian(np.array([[0.0], [60.0]]), np.array([[1.0, 0.0]]), 0.1)
    with pytest.warns(UserWarning, match=r"1 of 2 posteriors have collapsed, in row\(s\) 1.*effective.*k̂ = "):
        posterior.sample(fit, far, rng_key=KEY, num_particles=100, num_filters=4)
    # a part of the filters has no particle left: the others must not be taken for all
    rare = BlackBox(lambda x: jnp.where(x[0] > 4.6, 0.0, -jnp.inf))
    with pytest.warns(UserWarning, match="1 of 1 posteriors have collapsed"):
        dt = posterior.sample(fit, rare, rng_key=KEY, num_particles=25, num_filters=16)
    dead = ~np.isfinite(dt["filters"].dataset["log_evidence"][:, 0])
    assert 0 < dead.sum() < 16
    assert (dt["filters"].dataset["ess"][:, :, 0].min("t")[dead] == 0).all()
    never = BlackBox(lambda x: jnp.where(x[0] > 1e6, 0.0, -jnp.inf))
    with pytest.raises(ValueError, match="zero, infinite or NaN at every particle of row"):
        posterior.sample(fit, never, rng_key=KEY, num_particles=100, num_filters=4)


@pytest.mark.parametrize(
    ("likelihood", "options", "error", "message"),
    [
        (lambda x: x, {}, ValueError, r"likelihood gives shape \(2,\); it must give a number"),
        (lambda x: jnp.log(-(x[0] ** 2)), {}, ValueError, "likelihood is NaN at 8 of 8 draws"),
        (lambda x: jnp.sqrt(0 * x[0]), {}, ValueError, "gradient of NaN.*BlackBox"),
        (lambda x: stats.norm.logpdf(np.asarray(x)).sum(), {}, TypeError, "cannot be traced by JAX.*pure_callback"),
        (lambda x: jax.lax.while_loop(lambda v: v < 1, lambda v: v + 1, x[0]), {}, TypeError, "twice.*BlackBox"),
        (BlackBox(lambda x: jax.pure_callback(np.sum, x[0], x)), {}, TypeError, "cannot be traced.*vmap_method"),
        (lambda x: dist.Normal(x[0], 1.0), {}, ValueError, "likelihood gives no array"),
        (lambda x, y: x[0] - y, {}, TypeError, r"called as f\(x_0\), as there are no data: missing a required arg"),
        (lambda x: -(x[0] ** 2), {"data": np.zeros(2)}, TypeError, r"as f\(x_0, datum\), as there are data: too many"),
        (lambda x: -(x[2] ** 2), {}, ValueError, "an entry that is not there: index 2 is out of bounds"),
        (lambda x: 1 / jnp.abs(0 * x[0]), {}, ValueError, "likelihood is infinite at 8 of 8 draws from the prior;"),
        (lambda x, y: -((x[0] - y) ** 2), {"data": np.array([1.0, np.nan])}, ValueError, r"NaN.*row\(s\) 1 of data"),
        (dist.Normal(0.0, 1.0), {}, TypeError, "likelihood is .*; it must be LinearGaussian"),
        (3, {}, TypeError, "likelihood is 3; it must be LinearGaussian"),
        (Missing(np.zeros((3, 3))), {}, ValueError, r"x has shape \(3, 3\)"),
        (Missing(np.zeros((3, 2), int)), {}, TypeError, "x has dtype int64"),
        (Missing(np.array([[0.0, np.nan], [np.inf, 0.0]])), {}, ValueError, r"x has infinite entries, in row\(s\) 1"),
        (Missing(np.zeros((3, 2))), {"data": np.zeros(3)}, ValueError, "Missing has its own"),
        (LinearGaussian(np.zeros((3, 2)), A, 1.0), {}, ValueError, r"A has shape \(1, 2\); for y of shape \(3, 2\)"),
        (LinearGaussian(np.zeros(1), A, -1.0), {}, ValueError, "noise is -1.0"),
        (LinearGaussian(np.zeros(1), A, np.ones((1, 2))), {}, ValueError, r"noise has shape \(1, 2\)"),
        (LinearGaussian(np.array([np.nan]), A, 1.0), {}, ValueError, "y has entries that are NaN"),
        (LinearGaussian(np.zeros(2), np.ones((2, 2)), 0.0), {}, ValueError, "rows of A must be independent"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"num_filters": 1}, ValueError, "num_filters is 1"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"num_particles": 2.5}, ValueError, "num_particles is 2.5"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"rng_key": 3}, TypeError, "rng_key is 3"),
        (LinearGaussian("a", A, 1.0), {}, TypeError, "y has dtype <U1; it must be of real numbers"),
        (LinearGaussian(np.zeros(1), A * 1j, 1.0), {}, TypeError, "A has dtype complex128"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"features": ["a"]}, ValueError, r"features is \['a'\]; the data have 2"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"features": ["a", "a"]}, ValueError, "names must differ"),
        (LinearGaussian(np.zeros(1), A, 1.0), {"datum": ["a", "b"]}, ValueError, r"datum has shape \(2,\); there"),
        (lambda x, y: 0.0, {"data": {"a": np.zeros(2), "b": np.zeros(3)}}, ValueError, "data has leaves"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(likelihood, options, error, message):
    with pytest.raises(error, match=message):
        posterior.sample(three_modes(), likelihood, **{"rng_key": KEY, **options})


@pytest.mark.slow
def test_integers_of_a_table_are_filled_with_integers():
    fit = linear_fit("full")[0]
    x = np.array([[3.0, np.nan], [np.nan, -2.0], [1.5, -2.0]])
    options = {"rng_key": KEY, "num_draws": 20, "num_particles": 100}
    frame, dt = impute(fit, x, ["size", "count"], np.array([False, True]), **options)
    assert (frame["count"] == np.floor(frame["count"])).all()
    assert frame["count"][:20].nunique() > 1
    known = np.tile(x[:, None], (1, 20, 1)).reshape(-1, 2)
    np.testing.assert_allclose(np.where(np.isnan(known), known, frame[["size", "count"]]), known, rtol=1e-6)
    np.testing.assert_array_equal(dt["observed_data"].dataset["x_0"], x[:2])
    counts = dt["posterior"].dataset["x_0"].sel(feature="count").to_numpy()
    assert (counts == np.floor(counts)).all()
    halves, _ = impute(fit, x - [[0.0, 0.5]], ["size", "count"], np.array([False, True]), **options)
    assert (halves["count"][20:] == -2.5).all()  # as they are, though no integers
    far = np.array([[3.0, 4.0], [np.nan, 400.0]])
    with pytest.warns(UserWarning, match=r"in row\(s\) 1; worst in row 1"):
        impute(fit, far, ["size", "count"], np.array([False, False]), **options)
    with pytest.raises(ValueError, match=r"the table has infinite entries, in row\(s\) 2"):
        impute(fit, np.append(x[:2], [[1.0, np.inf]], 0), ["size", "count"], np.array([False, True]), **options)
    with pytest.raises(ValueError, match="a feature is called 'row'"):
        impute(fit, x, ["row", "count"], np.array([False, True]), **options)


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


def test_an_observation_that_says_nothing_leaves_the_prior():
    fit = linear_fit("full")[0]
    dt = posterior.sample(
        fit, LinearGaussian(np.zeros(1), A, 1e10), rng_key=KEY, num_particles=500, num_filters=4
    )  # fmt: skip
    assert float(dt["evidence"].dataset["pareto_k"][0]) == -np.inf
    assert (dt["filters"].dataset["ess"] > 0.99).all()


def test_methods_are_compiled_once(x64):
    fit = linear_fit("diagonal")[0]
    sensor = Sensor(jnp.asarray(A[0]))
    options = {"rng_key": KEY, "num_particles": 200, "num_filters": 2}
    before = filters._cache_size()
    for _ in range(2):
        posterior.log_evidence(fit, BlackBox(sensor.log_prob), **options)
    assert filters._cache_size() == before + 1


def test_one_filter_without_particles_is_told():
    log_weight = np.zeros((1, 8, 100))
    log_evidence, ess = np.zeros((1, 8)), np.full((1, 8, 2), 0.9)
    log_weight[0, 3], log_evidence[0, 3], ess[0, 3] = -np.inf, -np.inf, 0.0
    result = Filtered(np.zeros((1, 8, 100, 2)), log_evidence, ess, log_weight)
    with pytest.warns(UserWarning, match="1 of 1 posteriors have collapsed"):
        inference._warn_of_collapse(result, inference._evidence(result, np.arange(1)), np.arange(1))


class Sensor(eqx.Module):
    """A likelihood that cannot be hashed."""

    gain: jax.Array

    def __call__(self, x):
        return -0.5 * ((self.gain @ x - 2.5) / 0.3) ** 2

    def log_prob(self, x):
        return self(x)


def by_callback(x):
    shape = jax.ShapeDtypeStruct((), x.dtype)
    outside = lambda x: np.asarray(-0.5 * ((A[0] @ np.asarray(x) - 2.5) / 0.3) ** 2, shape.dtype)  # noqa: E731
    return jax.pure_callback(outside, shape, x, vmap_method="sequential")


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


@pytest.mark.parametrize(
    ("of", "given", "message"),
    [
        ([], [0], "of has no feature"),
        ([0], [0], "share the feature"),
        ([2], [0], r"of is \[2\]; it must be a list of different"),
        (1, [0], "of is 1; it must be a list"),
        ([1], [0.0], r"given is \[0.0\]; it must be a list of different integers from 0 to 1"),
    ],
)
def test_bad_features_are_refused(of, given, message):
    with pytest.raises(ValueError, match=message):
        posterior.log_conditional(three_modes(), np.zeros((1, 2)), of=of, given=given, rng_key=KEY)


def test_a_fit_of_several_chains_is_refused():
    fit = three_modes()
    double = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), fit.stacked_params)
    both = Fit(fit.diffusion, double, np.zeros((2, 1)), np.zeros((2, 0)), fit.loc, fit.scale)
    with pytest.raises(ValueError, match="fit has 2 chains; choose one"):
        posterior.sample(both, Missing(np.zeros((1, 2))), rng_key=KEY)
