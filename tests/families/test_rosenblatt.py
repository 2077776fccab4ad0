"""Mixtures of Gaussians as functions of standard normals, against bisection, finite differences and quadrature."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
from helpers.diffusions import fit_of, random_params
from jax.test_util import check_grads
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from probdiff import GaussianDiffusion, networks, schedules
from probdiff.families.mixtures import MixtureKernel
from probdiff.families.rosenblatt import InverseRosenblatt, quantile

FAILURE = 1e-4


def random_mixture(seed, batch_shape, event_shape, kind, num_components=4):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.normal(size=(*batch_shape, num_components)))
    loc = jnp.asarray(2 * rng.normal(size=(*batch_shape, num_components, *event_shape)))
    scale = jnp.asarray(np.exp(rng.uniform(-3, 0, loc.shape)))
    if kind == "full":
        below = np.tril(rng.normal(size=(*scale.shape, scale.shape[-1])), -1)
        parts = dist.MultivariateNormal(loc, scale_tril=scale[..., None] * jnp.eye(scale.shape[-1]) + below)
    else:
        scale = scale[..., :1] * 0 + 0.3 if kind == "fixed" else scale
        parts = dist.Normal(loc, scale).to_event(len(event_shape))
    return MixtureKernel(dist.Categorical(logits=logits), parts)


@pytest.mark.parametrize("z", [-30.0, -5.0, -0.1, 0.0, 0.3, 5.0, 30.0])
def test_a_quantile_is_that_of_bisection(x64, z):
    rng = np.random.default_rng(1)
    log_w, loc, scale = np.log(rng.dirichlet(np.full(5, 0.3))), 9 * rng.normal(size=5), np.exp(rng.normal(size=5))
    sign = 1 if z < 0 else -1

    def excess(x):
        log_tail = scipy.special.logsumexp(log_w + scipy.stats.norm.logcdf(sign * (x - loc) / scale))
        return log_tail - scipy.stats.norm.logcdf(-abs(z))

    wanted = scipy.optimize.brentq(excess, -1e3, 1e3, xtol=1e-13, rtol=1e-14)
    got = quantile(*map(jnp.asarray, (z, log_w, loc, scale)))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_derivatives_of_a_quantile_are_those_of_finite_differences(x64):
    rng = np.random.default_rng(2)
    z, logits, loc, scale = rng.normal(size=6), *rng.normal(size=(2, 6, 3)), np.exp(rng.normal(size=(6, 3)))

    def of_logits(z, logits, loc, scale):
        return quantile(z, jax.nn.log_softmax(logits), loc, scale)

    check_grads(of_logits, (z, logits, loc, scale), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_of_equal_components_it_is_affine(x64):
    loc, scale = jnp.array([0.3, -2.0]), jnp.array([[0.5, 0.0], [-1.2, 2.0]])
    parts = dist.MultivariateNormal(jnp.tile(loc, (3, 1)), scale_tril=jnp.tile(scale, (3, 1, 1)))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)))
    x = InverseRosenblatt(MixtureKernel(dist.Categorical(logits=jnp.array([0.0, 1.0, -3.0])), parts))(z)
    np.testing.assert_allclose(x, loc + z @ scale.T, rtol=1e-12, atol=1e-12)


SHAPES = [("full", (), (3,)), ("diagonal", (2,), (2, 2)), ("fixed", (2, 1), (2,))]


@pytest.mark.parametrize(("kind", "batch_shape", "event_shape"), SHAPES)
def test_the_density_is_the_mixtures(x64, kind, batch_shape, event_shape):
    """log φ(z) − log |det dx/dz| by JAX's Jacobian is the mixture's log p(x), and z comes back."""
    p = random_mixture(0, batch_shape, event_shape, kind)
    transform = InverseRosenblatt(p)
    z = jnp.asarray(np.random.default_rng(1).normal(size=(*batch_shape, *event_shape)))
    x, size = transform(z), int(np.prod(event_shape))
    np.testing.assert_allclose(transform.inv(x), z, rtol=1e-9, atol=1e-12)
    jacobian = jax.jacfwd(transform)(z).reshape(-1, size, *batch_shape, size)
    of_each = [jacobian[i, :, *index] for i, index in enumerate(np.ndindex(*batch_shape))]
    log_det = np.linalg.slogdet(np.stack(of_each))[1].reshape(batch_shape)
    log_normal = scipy.stats.norm.logpdf(z).reshape(*batch_shape, -1).sum(-1)
    np.testing.assert_allclose(log_normal - log_det, p.log_prob(x), rtol=1e-9)
    base = dist.Normal().expand(p.batch_shape + p.event_shape).to_event(p.event_dim)
    transformed = dist.TransformedDistribution(base, transform)
    assert (transformed.batch_shape, transformed.event_shape) == (p.batch_shape, p.event_shape)
    np.testing.assert_allclose(transformed.log_prob(x), p.log_prob(x), rtol=1e-9)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_draws_are_of_the_mixture(x64, kind):
    """A χ² test of the component that each draw most likely is from, and a KS test of each coordinate."""
    p, n = random_mixture(3, (), (2,), kind), 20_000
    x = np.asarray(InverseRosenblatt(p)(jnp.asarray(np.random.default_rng(4).normal(size=(n, 2)))))
    other = np.asarray(p.sample(jax.random.key(0), (n,)))
    table = [np.bincount(np.argmax(p.component_log_probs(jnp.asarray(draws)), -1), minlength=4) for draws in (x, other)]
    assert scipy.stats.chi2_contingency(table).pvalue > FAILURE
    for i in range(2):
        assert scipy.stats.ks_2samp(x[:, i], other[:, i]).pvalue > FAILURE / 2


def test_single_precision_is_right_to_four_decimals():
    p = random_mixture(5, (), (3,), "full")
    z = jnp.asarray(np.random.default_rng(1).normal(size=(500, 3)), jnp.float32)
    transform = InverseRosenblatt(p)
    x = transform(z)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(transform.inv(x), z, atol=2e-4)


def test_derivatives_in_a_gap_between_components_are_finite():
    at = jnp.zeros(()), jnp.log(jnp.full(2, 0.5)), jnp.array([-20.0, 20.0]), jnp.ones(2)
    assert all(jnp.isfinite(g).all() for g in jax.grad(quantile, argnums=(0, 1, 2, 3))(*at))


def two_steps(event_shape=(1,), covariance="fixed"):
    d = GaussianDiffusion(event_shape, schedules.LearnedBetas(2, [0.2, 0.6]), networks.ResidualMLP(8, 1), covariance, 3)
    params = random_params(d)
    return d, params, fit_of(d, params, np.full(event_shape, 1.0), np.full(event_shape, 2.0))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.slow
def test_nuts_finds_the_posterior_of_a_prior_of_mixtures(stacked):
    """y = x + noise: p(x given y) by quadrature over the chain's density."""
    _, _, fit = two_steps()
    y, sigma = 2.0, 1.0

    def model():
        x = numpyro.deterministic("x", fit.prior()(stacked=stacked))
        numpyro.sample("y", dist.Normal(x[0], sigma), obs=y)

    mcmc = MCMC(
        NUTS(model), num_warmup=300, num_samples=1000, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.key(0))
    grid = np.linspace(-12, 12, 1201)
    log_density = np.asarray(fit.log_likelihood(grid[:, None], method="exact").values)
    weight = np.exp(log_density + scipy.stats.norm.logpdf(y, grid, sigma))
    weight /= weight.sum()
    mean = weight @ grid
    std = np.sqrt(weight @ (grid - mean) ** 2)
    summary = az.summary(az.from_numpyro(mcmc), var_names=["x"], round_to="none")
    z = (summary["mean"].to_numpy() - mean) / (std / np.sqrt(summary["ess_bulk"].to_numpy()))
    assert abs(z[0]) < scipy.stats.norm.isf(FAILURE / 2), z
    assert abs(summary["sd"].to_numpy()[0] / std - 1) < 0.15
    assert (summary["r_hat"] < 1.05).all()


def test_an_automatic_guide_fits_a_prior_of_mixtures():
    d, params, _ = two_steps((2,), "full")

    def model():
        numpyro.sample("y", dist.Normal(d.prior(params)(), 0.5).to_event(1), obs=jnp.array([0.5, 0.2]))

    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.05), Trace_ELBO(num_particles=4))
    losses = svi.run(jax.random.key(0), 200, progress_bar=False).losses
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < losses[:10].mean()
