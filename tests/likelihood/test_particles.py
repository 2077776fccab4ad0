"""Every log-likelihood against closed forms, and against quadrature of a fitted chain's own p(x_0)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from helpers.diffusions import linear_diffusion, mlp_diffusion, path_gaussian, random_params

import probdiff
from probdiff import GaussianDiffusion, datasets, networks, schedules
from probdiff.likelihood import elbo as likelihood
from probdiff.likelihood import exact, flow, paths, resampling, twists
from probdiff.likelihood import smc as particles

KEY = jax.random.key(0)
SEEDS, DATA = 200, 8
Z = 4.5  # one-sided: a right bound fails in one of 300,000 seeds
COVARIANCES = ["fixed", "diagonal", "full"]


def linear(covariance="full", num_features=2, schedule=None):
    """A linear-Gaussian diffusion, its params, and the mean and covariance of p(x_0)."""
    d = linear_diffusion(covariance, num_features, schedule=schedule)
    mean, cov = path_gaussian(d, {})
    params = {"network$params": eqx.partition(d.network, eqx.is_inexact_array)[0]}
    return d, params, scipy.stats.multivariate_normal(mean[-num_features:], cov[-num_features:, -num_features:])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_exact_is_the_normal_of_a_linear_chain(covariance):
    d, params, p = linear(covariance)
    x = np.random.default_rng(0).normal(size=(5, 2))
    found = exact.exact(d, params, x)
    assert found.kind == "exact"
    # the diffusion's own params are float32
    np.testing.assert_allclose(found.values, p.logpdf(x), rtol=1e-6)


def test_quadrature_is_the_normal_of_a_linear_chain(x64):
    d, params, p = linear("diagonal", 1)
    x = np.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(exact._quadrature(d, params, x), p.logpdf(x), rtol=1e-9)


def test_exact_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"event_shape \(2,\)"):
        exact.exact(mlp_diffusion(), random_params(mlp_diffusion()), np.ones((3, 2)))
    narrow = mlp_diffusion("fixed", schedules.Fixed([1e-7, 0.9]), (1,))
    with pytest.raises(ValueError, match="a grid of"):
        exact.exact(narrow, random_params(narrow), np.ones((3, 1)))


def test_importance_weights_average_to_the_likelihood(x64):
    d, params, p = linear()
    x = np.random.default_rng(0).normal(size=(4, 2))
    log_weights = paths.log_importance_weights(d, params, x, rng_key=KEY, num_draws=4000)
    weights = np.exp(log_weights)
    assert weights.shape == (4000, 4)
    z = (weights.mean(0) - p.pdf(x)) / (weights.std(0) / np.sqrt(4000))
    assert np.all(np.abs(z) < Z)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_twisted_filters_are_exact_on_linear_chains(covariance):
    d, params, p = linear(covariance, 3, schedules.cosine(40))
    x = p.rvs(4, random_state=1)
    estimate = particles.smc(d, params, x, rng_key=KEY, num_particles=20, num_draws=4)
    bound = paths.iwae(d, params, x, rng_key=KEY, num_particles=160)
    np.testing.assert_allclose(estimate.values, p.logpdf(x), atol=2e-3)
    # at equal cost, two runs of four filters of twenty
    assert np.all(estimate.values_mcse < 0.1 * bound.values_mcse)


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


@pytest.fixture(scope="module")
def fitted():
    mixture = datasets.GaussianMixture([0.3, 0.7], [[-1.0], [0.6]], [[[0.01]], [[0.09]]])
    x = np.asarray(mixture.sample(jax.random.key(1), 4000), np.float64)
    d = GaussianDiffusion((1,), schedules.LearnedBetas(6), networks.ResidualMLP(16, 1), "full")
    return probdiff.fit(d, x, rng_key=jax.random.key(2), num_steps=600, progress_bar=False)


@pytest.fixture(scope="module")
def repeated(fitted):
    """Data of the fitted chain, whole paths, and the exact log p of each: every seed has rows of its own draws."""
    paths = fitted.sample(jax.random.key(3), DATA, paths=True)
    truth = fitted.log_likelihood(paths[:, 0], method="exact")
    return np.tile(paths[:, 0], (SEEDS, 1)), truth.values


def by_seed(values):
    return values.reshape(SEEDS, DATA)


@pytest.mark.parametrize(("method", "options"), [("elbo", {}), ("iwae", {"num_particles": 30})])
def test_lower_bounds_lie_below_in_every_seed(fitted, repeated, method, options):
    x, truth = repeated
    bound = fitted.log_likelihood(x, rng_key=KEY, method=method, **options)
    excess = by_seed(bound.values).mean(1) - truth.mean()
    error = np.sqrt(by_seed(bound.values_mcse**2).sum(1)) / DATA
    assert bound.kind == "lower bound"
    assert np.all(excess < Z * error)


def test_upper_bounds_lie_above_in_every_seed(fitted):
    paths = fitted.sample(jax.random.key(4), SEEDS * DATA, paths=True)
    truth = fitted.log_likelihood(paths[:, 0], method="exact")
    bound = fitted.log_likelihood(paths, rng_key=KEY, method="upper", num_particles=30)
    shortfall = by_seed(truth.values - bound.values).mean(1)
    error = np.sqrt(by_seed(bound.values_mcse**2).sum(1)) / DATA
    assert bound.kind == "upper bound"
    assert np.all(shortfall < Z * error)
    # the sandwich closes: both bounds are within a few hundredths of a nat of the truth, in the mean over 1,600 data
    lower = fitted.log_likelihood(paths[:, 0], rng_key=KEY, method="iwae", num_particles=30)
    assert truth.mean - 0.02 < lower.mean < truth.mean + Z * lower.mcse
    assert truth.mean - Z * bound.mcse < bound.mean < truth.mean + 0.02


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


@pytest.mark.parametrize("full_kernel", [False, True])
@pytest.mark.parametrize("full_twist", [False, True])
def test_a_tilted_kernel_is_that_of_quadrature(x64, full_kernel, full_twist):
    scale_tril = np.array([[0.8, 0.0], [0.7, 0.3]])
    mean = jnp.array([0.3, -0.2])
    normal = dist.Normal(mean, jnp.array([0.8, 0.3])).to_event(1)
    p = dist.MultivariateNormal(mean, scale_tril=jnp.asarray(scale_tril)) if full_kernel else normal
    curvature = jnp.array([[1.5, 0.6], [0.6, 0.9]]) if full_twist else jnp.array([1.5, 0.9])
    twist = twists.Twist(
        jnp.array([0.1, 0.2]), jnp.array([0.7, 0.7]), jnp.asarray(0.4), jnp.array([0.5, -1.0]), curvature
    )
    tilted, log_mass = twists.tilted(p, twist)
    y = np.linspace(-8, 8, 801)
    grid = np.stack(np.meshgrid(y, y, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(np.asarray(p.log_prob(grid) + twist(jnp.asarray(grid))))
    mass = density.sum() * (y[1] - y[0]) ** 2
    assert log_mass == pytest.approx(np.log(mass), rel=1e-6)
    np.testing.assert_allclose(np.exp(tilted.log_prob(grid)), density / mass, atol=1e-6)


def test_a_kernel_that_is_nearly_singular_can_be_tilted():
    scale_tril = jnp.eye(4) * jnp.array([1.0, 1e-4, 1.0, 1e-4]) + jnp.tril(jnp.ones((4, 4)), -1)
    p = dist.MultivariateNormal(jnp.zeros(4), scale_tril=scale_tril)
    twist = twists.Twist(jnp.zeros(4), jnp.ones(4), jnp.zeros(()), jnp.ones(4), 0.1 * jnp.eye(4))
    tilted, log_mass = jax.jit(twists.tilted)(p, twist)
    assert np.all(np.isfinite(tilted.scale_tril))
    assert np.all(np.diagonal(tilted.scale_tril) > 0)
    assert np.isfinite(log_mass)


def test_the_sandwich_wants_whole_paths(fitted):
    with pytest.raises(ValueError, match=r"wants whole paths .* \(N, 7, 1\)"):
        fitted.log_likelihood(np.ones((5, 1)), rng_key=KEY, method="upper")


class ExactDenoiser(eqx.Module):
    """The outputs with which x̂_0 is E[x_0 given x_t], and f_Σ its best, for a mixture of isotropic Gaussians."""

    weights: jax.Array
    means: jax.Array
    variance: float

    def __call__(self, x, log_snr):
        a, b = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        total = a * self.variance + b
        residual = x - jnp.sqrt(a) * self.means
        share = jax.nn.softmax(jnp.log(self.weights) - 0.5 * (residual**2).sum(-1) / total)
        mean = share @ (self.means + jnp.sqrt(a) * self.variance / total * residual)
        return jnp.concatenate(
            [(mean - jnp.sqrt(a) * x) / jnp.sqrt(b), jnp.log(jnp.full(x.size, self.variance / total)) / 2]
        )


@pytest.mark.parametrize("num_features", [2, 20])
def test_flow_of_the_exact_denoiser_has_the_exact_density(num_features):
    rng = np.random.default_rng(0)
    weights, means = np.array([0.2, 0.3, 0.5]), rng.normal(size=(3, num_features))
    mixture = datasets.GaussianMixture(weights, means, np.tile(0.04 * np.eye(num_features), (3, 1, 1)))
    network = ExactDenoiser(jnp.asarray(weights), jnp.asarray(means), 0.04)
    d = GaussianDiffusion((num_features,), schedules.log_snr_linear(100, 9.0, -9.0), network, "diagonal")
    params = {"network$params": eqx.partition(network, eqx.is_inexact_array)[0]}
    x = np.asarray(mixture.sample(KEY, 16))
    found = flow.ode(d, params, x, rng_key=KEY, num_draws=8)
    difference = found.values - np.asarray(mixture.log_prob(x))
    assert found.kind == ("estimate" if num_features == 2 else "lower bound")
    if num_features == 2:
        assert np.abs(difference).max() < 0.02
    else:  # Hutchinson's divergence has an error of its own, which it states
        assert abs(difference.mean()) < Z * found.mcse
        assert found.mcse < 0.2


def test_flow_density_integrates_to_one(fitted):
    x = np.linspace(-3, 3, 601)[:, None]
    found = fitted.log_likelihood(x, rng_key=KEY, method="ode", num_draws=16)
    density, h = np.exp(found.values), x[1, 0] - x[0, 0]
    error = np.sqrt(np.sum((density * found.values_mcse) ** 2)) * h
    assert abs(density.sum() * h - 1) < Z * error
    assert error < 0.02


def test_counts_of_one_and_a_missing_key_are_refused(fitted):
    with pytest.raises(ValueError, match="num_particles is 1"):
        fitted.log_likelihood(np.ones((5, 1)), rng_key=KEY, method="iwae", num_particles=1)
    with pytest.raises(TypeError, match="rng_key is None"):
        fitted.log_likelihood(np.ones((5, 1)), method="iwae")


@pytest.mark.parametrize("method", ["smc", "ode"])
def test_images_are_vectors_of_their_pixels(method):
    options = {"num_particles": 4, "num_draws": 2} if method == "smc" else {"num_draws": 2}
    values = []
    for shape in ((4,), (2, 2)):
        flat = linear_diffusion("diagonal", 4, schedule=schedules.cosine(3))
        d = GaussianDiffusion(shape, flat.schedule, flat.network, "diagonal")
        params = {"network$params": eqx.partition(d.network, eqx.is_inexact_array)[0]}
        x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        run = particles.smc if method == "smc" else flow.ode
        values.append(run(d, params, x, rng_key=KEY, **options).values)
    np.testing.assert_allclose(*values, rtol=1e-4)
