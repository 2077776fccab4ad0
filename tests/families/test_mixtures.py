"""Reverse kernels that are mixtures of Gaussians, against SciPy and quadrature."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from helpers.diffusions import fit_of, random_params
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy.special import log_softmax, logsumexp

from probdiff import GaussianDiffusion, datasets, fit, networks, schedules
from probdiff.families import mixtures
from probdiff.families.gaussian import Gaussian
from probdiff.families.mixtures import MixtureKernel, kl_to_mixture
from probdiff.fitting.loop import _adam
from probdiff.fitting.settings import Settings
from probdiff.likelihood.elbo import elbo
from probdiff.networks.gaussian_start import with_start

BETA = np.array([0.13, 0.3, 0.45])
M = 3


def mixture_diffusion(covariance="diagonal", event_shape=(1,), components=M, schedule=None):
    schedule = schedule or schedules.LearnedBetas(len(BETA), BETA)
    return GaussianDiffusion(event_shape, schedule, networks.ResidualMLP(8, 1), covariance, components)


@pytest.mark.parametrize(("covariance", "event_shape"), [("fixed", (2,)), ("diagonal", (2, 2)), ("full", (3,))])
def test_the_kernel_is_the_mixture_of_those_of_one_component_each(x64, covariance, event_shape):
    family, one = Gaussian(event_shape, covariance, M), Gaussian(event_shape, covariance)
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(4, family.num_outputs))
    x_t, x_prev = rng.normal(size=(2, 4, *event_shape))
    noise, t = schedules.Fixed(BETA)(), np.array([1, 2, 3, 2])
    each = [one.kernel(x_t, part, noise, t).log_prob(x_prev) for part in np.split(outputs[:, :-M], M, 1)]
    wanted = logsumexp(np.stack(each, 1) + log_softmax(outputs[:, -M:], 1), 1)
    np.testing.assert_allclose(family.kernel(x_t, outputs, noise, t).log_prob(x_prev), wanted, rtol=1e-10)


def test_one_component_is_the_kernel_of_before():
    assert isinstance(
        Gaussian((2,), "full", 1).kernel(jnp.zeros(2), jnp.zeros(5), schedules.Fixed(BETA)(), 1),
        dist.MultivariateNormal,
    )
    assert Gaussian((2,), "full", 1) == Gaussian((2,), "full")
    assert not np.any(Gaussian((2,), "full").offsets)


@pytest.mark.parametrize(("covariance", "size"), [("diagonal", 1), ("diagonal", 30), ("full", 3)])
def test_the_start_has_the_moments_of_the_gaussian_and_is_near_it(x64, covariance, size):
    variance = np.linspace(0.3, 2.0, size)
    reach = 6 * np.sqrt(variance)
    x = np.random.default_rng(0).normal(size=(500, size)) * np.sqrt(variance)
    bounds = []
    for components in (1, 16):
        d = mixture_diffusion(covariance, (size,), components)
        params = with_start(d.initial_params(jax.random.key(0)), *map(jnp.asarray, (np.log(variance), -reach, reach)))
        bounds.append(elbo(d, params, x, rng_key=jax.random.key(1), num_draws=32))
        kernel = handlers.substitute(d.kernels, data=params)()[1](jnp.asarray(x), 2)
        moments = kernel.mean, kernel.variance
        if components == 1:
            wanted = moments
        for moment, other in zip(moments, wanted, strict=True):
            np.testing.assert_allclose(moment, other, rtol=2e-2, atol=2e-3)
    assert abs(bounds[1].mean - bounds[0].mean) < 0.02 + 4 * np.hypot(bounds[0].mcse, bounds[1].mcse)


def gauss_hermite(num_nodes=96):
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return nodes, weights / weights.sum()


def exact_elbo(d, params, x_0):
    """N17 of one datum on the line, each expectation by quadrature over x_t, and over x_{t−1} given it."""
    z, w = gauss_hermite()

    def program():
        noise, kernel = d.kernels()
        total = -kl_divergence(d.family.marginal(x_0, noise, d.num_timesteps), d.family.terminal())
        for t in range(1, d.num_timesteps + 1):
            shrink, std = noise.marginal(t)
            x_t = (shrink * x_0[0] + std * z)[:, None]
            p = kernel(x_t, t)
            if t == 1:
                total += w @ p.log_prob(x_0)
                continue
            of_x_0, of_x_t, std = noise.posterior(t)
            x_prev = (of_x_0 * x_0[0] + of_x_t * x_t[:, 0])[None] + std * z[:, None]
            log_q = jax.scipy.stats.norm.logpdf(z) - jnp.log(std)
            total += w @ (p.log_prob(x_prev[..., None]) - log_q[:, None]) @ w
        return total

    return handlers.substitute(program, data=params)()


def pairs(d):
    mean_field = TraceMeanField_ELBO()
    return {
        "trace": (d.reverse, d.forward, Trace_ELBO()),
        "mean field": (d.reverse, d.forward_posterior, mean_field),
        "stacked trace": (partial(d.reverse, stacked=True), partial(d.forward_posterior, stacked=True), Trace_ELBO()),
        "stacked mean field": (
            partial(d.reverse, stacked=True),
            partial(d.forward_posterior, stacked=True),
            mean_field,
        ),
        "at time": (d.reverse_at_time, d.forward_at_time, mean_field),
        "at time, trace": (d.reverse_at_time, d.forward_at_time, Trace_ELBO()),
    }


@pytest.mark.parametrize(
    "pair",
    [
        "mean field",
        "at time",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("trace", "stacked trace", "stacked mean field", "at time, trace")
        ),
    ],
)
def test_every_pair_is_unbiased_in_value_and_gradient(x64, pair):
    d, x_0 = mixture_diffusion(), jnp.asarray([0.7])
    params = random_params(d, 3)
    exact, wanted = jax.jit(jax.value_and_grad(lambda params: exact_elbo(d, params, x_0)))(params)
    model, guide, loss = pairs(d)[pair]
    keys = jax.random.split(jax.random.key(0), 20_000)
    value = jax.value_and_grad(lambda params, key: -loss.loss(key, params, model, guide, x_0))
    values, gradients = jax.jit(lambda keys: jax.lax.map(partial(value, params), keys, batch_size=2000))(keys)
    for draws, right in zip(jax.tree.leaves((values, gradients)), jax.tree.leaves((exact, wanted)), strict=True):
        error = draws.std(0, ddof=1) / np.sqrt(len(keys))
        # 5 standard errors: one test in 4,000 of this many entries would fail by chance
        assert np.all(np.abs(draws.mean(0) - right) < 5 * error + 1e-9)


def test_the_elbo_along_paths_is_that_of_quadrature(x64):
    d = mixture_diffusion()
    params, x = random_params(d, 3), np.linspace(-2, 2, 9)[:, None]
    found = elbo(d, params, x, rng_key=jax.random.key(0), num_draws=4000)
    wanted = [exact_elbo(d, params, jnp.asarray(x_0)) for x_0 in x]
    assert np.all(np.abs(found.values - np.array(wanted)) < 5 * found.values_mcse)


@pytest.mark.parametrize(
    ("covariance", "event_shape"), [("fixed", (2,)), ("diagonal", (2, 2)), ("full", (3,)), ("full", (6,))]
)
def test_the_kl_is_that_of_plain_draws_with_less_spread(x64, covariance, event_shape):
    family, rng = Gaussian(event_shape, covariance, M), np.random.default_rng(1)
    outputs, x_t, x_0 = rng.normal(size=family.num_outputs), *rng.normal(size=(2, *event_shape))
    noise = schedules.Fixed(BETA)()
    q, p = family.posterior(x_t, x_0, noise, 2), family.kernel(x_t, outputs, noise, 2)
    x = q.sample(jax.random.key(0), (100_000,))
    plain = q.log_prob(x) - p.log_prob(x)
    draws = jax.vmap(lambda key: kl_to_mixture(q, p, key, 1))(jax.random.split(jax.random.key(1), 100_000))
    assert abs(draws.mean() - plain.mean()) < 5 * np.hypot(draws.std(), plain.std()) / np.sqrt(100_000)
    assert draws.var() < 0.25 * plain.var()  # of a pair: half of that of two plain draws


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_densities_and_kls_of_few_rows_are_those_of_numpyro(x64, size):
    rng = np.random.default_rng(size)

    def normal(*batch):
        L = np.tril(rng.normal(size=(*batch, size, size)), -1) + np.eye(size) * rng.uniform(0.2, 2.0, (*batch, size, 1))
        return dist.MultivariateNormal(rng.normal(size=(*batch, size)), scale_tril=L)

    parts, q, x = normal(6, M), normal(6), rng.normal(size=(6, size))
    weights = dist.Categorical(logits=rng.normal(size=(6, M)))
    mixture, theirs = (kind(weights, parts) for kind in (MixtureKernel, dist.MixtureSameFamily))
    np.testing.assert_allclose(mixture.component_log_probs(x), theirs.component_log_probs(x), rtol=1e-12)
    np.testing.assert_allclose(mixture.log_prob(x), theirs.log_prob(x), rtol=1e-12)
    p = normal(6)
    np.testing.assert_allclose(mixtures._kl_of_gaussians(q, p), kl_divergence(q, p), rtol=1e-12)


def test_the_kl_is_of_gaussians_alone():
    """Of any other guide NumPyro takes the draw."""
    weights, parts = dist.Categorical(logits=jnp.zeros(2)), dist.Normal(jnp.zeros((2, 1)), 1.0).to_event(1)
    p = MixtureKernel(weights, parts, jax.random.key(0))
    for q in (dist.Laplace(jnp.zeros(1), 1.0).to_event(1), dist.StudentT(3.0, jnp.zeros(1), 1.0).to_event(1)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)


def test_the_kl_has_the_batch_shape_of_both(x64):
    rng, key = np.random.default_rng(0), jax.random.key(0)
    q = dist.Normal(rng.normal(size=(5, 2)), 0.5).to_event(1)
    weights, loc = rng.normal(size=3), rng.normal(size=(3, 2))
    one = MixtureKernel(dist.Categorical(logits=weights), dist.Normal(loc, 0.7).to_event(1))
    of_each = (np.broadcast_to(a, (5, *a.shape)) for a in (weights, loc))
    five = MixtureKernel(dist.Categorical(logits=next(of_each)), dist.Normal(next(of_each), 0.7).to_event(1))
    np.testing.assert_allclose(kl_to_mixture(q, one, key), kl_to_mixture(q, five, key), rtol=1e-12)


def test_a_mixture_without_a_key_has_no_kl_in_closed_form():
    p = MixtureKernel(dist.Categorical(logits=jnp.zeros(2)), dist.Normal(jnp.zeros((2, 1)), 1.0).to_event(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.Normal(jnp.zeros(1), 1.0).to_event(1), p)


def test_draws_have_the_density_of_the_exact_method(x64):
    d = mixture_diffusion()
    params = random_params(d, 5)
    fit = fit_of(d, params)
    x = np.linspace(-6, 6, 1201)[:, None]
    density = np.exp(fit.log_likelihood(x, method="exact").values)
    assert np.trapezoid(density, x[:, 0]) == pytest.approx(1, abs=1e-3)
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x[:, 0]))])
    drawn = fit.sample(jax.random.key(0), 4000)[:, 0]
    assert scipy.stats.kstest(drawn, lambda value: np.interp(value, x[:, 0], cdf)).pvalue > 1e-4


def test_the_learning_rate_of_mixtures_rises_at_first_and_the_schedule_is_held():
    def updates_of(components):
        """Of a weight of the network and of β_1, at each of 200 steps, for a gradient of one."""
        d = mixture_diffusion(components=components)
        params = d.initial_params(jax.random.key(0))
        optimizer = _adam(d, Settings(num_steps=200, batch_size=2))

        def step(state, _):
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            return state, (updates["network$params"].first.weight[0, 0], updates["beta"][0])

        return jax.lax.scan(step, optimizer.init(params), None, 200)[1]

    (one, _), (of_weight, of_beta) = updates_of(1), updates_of(M)
    assert one[0] == pytest.approx(-2e-3, rel=1e-3)
    assert of_weight[0] == pytest.approx(-2e-3 / 11, rel=1e-3)
    np.testing.assert_array_equal(of_beta[:40], 0.0)
    assert np.all(of_beta[41:199] < 0)
    np.testing.assert_allclose(of_beta[60:199], 10 * of_weight[60:199], rtol=1e-4)


@pytest.mark.slow
def test_a_short_chain_keeps_its_steps():
    """With components β_1 went to 0, where nothing brings it back: T = 2 was then no better than T = 1."""
    x = np.asarray(datasets.SwissRoll(0.5).sample(jax.random.key(1), 20_000))
    d = GaussianDiffusion((2,), schedules.LearnedBetas(2), networks.ResidualMLP(64, 2), "full", 8)
    fitted = fit(d, x, rng_key=jax.random.key(0), num_steps=1500, progress_bar=False)
    assert fitted.beta[0] > 0.02


def test_components_are_counted():
    with pytest.raises(ValueError, match="components is 0"):
        mixture_diffusion(components=0)
