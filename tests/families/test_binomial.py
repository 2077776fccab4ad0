"""Binomial diffusion against Bayes' rule, enumeration of all paths, and NumPyro's own estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bits import KEY, all_bits, elbo_by_enumeration, params_of, small
from helpers.diffusions import fit_of
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density
from scipy import stats
from scipy.special import rel_entr

import probdiff
from probdiff import datasets, derivation, networks, schedules
from probdiff.families.binomial import Binomial, Bits
from probdiff.fitting import loop as training
from probdiff.reference.oracle_of_bits import best_terms

RATES = [0.5, 0.3]


def means(kernel):
    """The means of a kernel of a family, compiled."""
    return jax.jit(lambda *given: kernel(*given).mean)


def log_probs(kernel):
    """The log densities of a kernel of a family at the first argument, compiled."""
    return jax.jit(lambda x, *given: kernel(*given).log_prob(x))


@pytest.mark.parametrize("rate", RATES)
def test_kernels_are_products_of_two_by_two_matrices(rate):
    family, T = Binomial((1,), rate, 1), 4
    step, of_marginal, of_posterior = (means(kernel) for kernel in (family.step, family.marginal, family.posterior))
    beta = np.array([0.1, 0.3, 0.7, 0.2])
    noise = schedules.Fixed(beta)()
    given = all_bits(1)
    x_t, x_0 = all_bits(2)[:, :1], all_bits(2)[:, 1:]
    steps = [
        np.array([[1 - b + b * (1 - rate), b * rate], [b * (1 - rate), 1 - b + b * rate]]) for b in beta
    ]  # [from, to]
    marginal = np.eye(2)
    for t in range(1, T + 1):
        below, marginal = marginal, marginal @ steps[t - 1]
        np.testing.assert_allclose(step(given, noise, t)[:, 0], steps[t - 1][:, 1], rtol=1e-5)
        np.testing.assert_allclose(of_marginal(given, noise, t)[:, 0], marginal[:, 1], rtol=1e-5)
        if t > 1:
            joint = below[x_0[:, 0]] * steps[t - 1][:, x_t[:, 0]].T  # (x_t and x_0, x_{t−1})
            of_family = of_posterior(x_t, x_0, noise, t)[:, 0]
            np.testing.assert_allclose(of_family, joint[:, 1] / joint.sum(1), rtol=1e-5)


def test_the_last_harmonic_step_keeps_nothing():
    family, noise = Binomial((3,), 0.3, 1), schedules.harmonic(5)()
    kl = jax.jit(lambda x: kl_divergence(family.marginal(x, noise, 5), family.terminal()))
    for x in (np.zeros(3, np.uint8), np.ones(3, np.uint8)):
        np.testing.assert_allclose(means(family.step)(x, noise, 5), 0.3, rtol=1e-6)
        np.testing.assert_allclose(kl(x), 0, atol=1e-7)


def test_the_kernel_is_bayes_rule_where_the_network_knows_the_other_bits():
    """For data of a known distribution, the exact q(x_{t−1} given x_t) of each bit."""
    rng, D, T, rate = np.random.default_rng(0), 3, 4, 0.4
    family, noise = Binomial((D,), rate, 1), schedules.Fixed(np.array([0.1, 0.3, 0.5, 0.2]))()
    states = all_bits(D)
    q_0 = rng.dirichlet(np.ones(len(states)))
    of_marginal, of_step, mean = log_probs(family.marginal), log_probs(family.step), means(family.kernel)
    each = jax.jit(lambda x_0, t: family.marginal(x_0, noise, t).base_dist.log_prob(states[:, None]))
    below = np.eye(len(states))
    for t in range(1, T + 1):
        # [from, to]
        q_t, step = (np.exp(kernel(states, states[:, None], noise, t)) for kernel in (of_marginal, of_step))
        own = np.exp(each(states, t))  # (x_t, x_0, bit)
        for i, x_t in enumerate(states):
            joint = (q_0 @ below) * step[:, i]
            exact = joint @ states / joint.sum()
            # the probability of each bit of x_0 given the other bits of x_t
            others = (q_0 * q_t[:, i])[:, None] / own[i]
            odds = np.sum(others * (states == 1), 0) / np.sum(others * (states == 0), 0)
            a = np.log(odds) - np.log(rate / (1 - rate))
            outputs = 30 * np.arctanh(a / 30)
            np.testing.assert_allclose(mean(x_t, outputs, noise, t), exact, rtol=2e-5)
        below = q_t


def test_kl_of_bits_keeps_its_digits():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 4, 2000).astype(np.float32)
    kl = jax.jit(lambda a, b: kl_divergence(Bits(a), Bits(b)))
    for size in (3.0, 0.1, 0.01, 0.001):
        b = a + np.float32(size) * rng.choice([-1, 1], 2000).astype(np.float32)
        (p, not_p), (q, not_q) = ((-np.logaddexp(0, -v), -np.logaddexp(0, v)) for v in (np.float64(a), np.float64(b)))
        exact = np.exp(p) * (p - q) + np.exp(not_p) * (not_p - not_q)
        np.testing.assert_allclose(kl(a, b), exact, rtol=2e-3)
    far = kl(np.float32([0.0, 25.0, -25.0]), np.float32([25.0, -25.0, 0.0]))
    assert np.all(np.isfinite(far))


PATH = {t: np.random.default_rng(t).integers(0, 2, (4, 2)).astype(np.uint8) for t in (1, 2, 3)}
SITES = {f"x_{t}": x for t, x in PATH.items()}
UP, DOWN = ({"x": np.stack([PATH[t] for t in times])} for times in ((1, 2, 3), (3, 2, 1)))


def densities(params, *runs):
    """The log density of each program at its values of the sites."""

    def compute(params, every):
        return [
            log_density(handlers.seed(program, KEY), (all_bits(2),), options, {**params, **values})[0]
            for (program, _, options), values in zip(runs, every, strict=True)
        ]

    return np.array(jax.jit(compute)(params, [values for _, values, _ in runs]))


def test_all_forms_of_the_forward_chain_have_the_same_density():
    d, params = small()
    stacked = {"stacked": True}
    forward, *others = densities(
        params,
        (d.forward, SITES, {}),
        (d.forward_posterior, SITES, {}),
        (d.forward, UP, stacked),
        (d.forward_posterior, DOWN, stacked),
    )
    np.testing.assert_allclose(others, forward, rtol=1e-5)


@pytest.mark.parametrize("components", [1, 3])
def test_both_forms_of_the_reverse_chain_have_the_same_density(components):
    d, params = small(components)
    explicit, stacked = densities(params, (d.reverse, SITES, {}), (d.reverse, DOWN, {"stacked": True}))
    np.testing.assert_allclose(stacked, explicit, rtol=1e-5)


class WeightedScore(handlers.scale):
    """A program whose factor "score" counts `scale` times."""

    def process_message(self, msg):
        if msg["name"] == "score":
            super().process_message(msg)


def draws_of(params, x_0, model, guide, elbo, num_draws, weights=(1.0,)):
    """Estimates of K and of its gradient in all params, for each weight of the factor "score"."""

    def loss(flat, key, weight):
        return -elbo.loss(key, unravel(flat), WeightedScore(model, weight), guide, x_0)

    flat, unravel = ravel_pytree(params)
    draw = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, None)))
    found = [draw(flat, jax.random.split(KEY, num_draws), weight) for weight in weights]
    return [(np.asarray(values), np.asarray(gradients)) for values, gradients in found]


def exact_elbo_and_gradient(d, params, x_0):
    flat, unravel = ravel_pytree(params)
    value, gradient = jax.jit(jax.value_and_grad(lambda flat: elbo_by_enumeration(d, unravel(flat), x_0)))(flat)
    return float(value), np.asarray(gradient)


def deviations(draws, exact):
    return (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)) + 1e-6)


X_0 = all_bits(2)[[0, 3, 3, 2]]


def test_the_at_time_gradient_is_unbiased_for_every_param():
    d, params = small(3)
    exact, gradient = exact_elbo_and_gradient(d, params, X_0)
    pair = (d.reverse_at_time, d.forward_at_time, TraceMeanField_ELBO())
    (values, gradients), (_, biased) = draws_of(params, X_0, *pair, 4_000, weights=(1.0, 0.0))
    assert abs(deviations(values, exact)) < 4.5
    z = deviations(gradients, gradient)
    used = gradients.std(0) > 0
    assert np.abs(z[used]).max() < 5
    # without the factor "score" the gradient in β_t is another
    of_beta = {
        name: jax.tree.map(lambda leaf, name=name: np.full(leaf.shape, name == "beta"), value)
        for name, value in params.items()
    }
    of_beta = ravel_pytree(of_beta)[0]
    assert np.abs(deviations(biased, gradient)[of_beta]).max() > 8


@pytest.mark.slow
def test_numpyros_graph_elbo_has_the_same_gradient():
    d, params = small(T=2)
    _, gradient = exact_elbo_and_gradient(d, params, X_0)
    ((_, gradients),) = draws_of(params, X_0, d.reverse, d.forward, TraceGraph_ELBO(), 20_000)
    used = gradients.std(0) > 0
    assert np.abs(deviations(gradients, gradient)[used]).max() < 5


@pytest.fixture(scope="module")
def fit():
    return fit_of(*small(2, D=3, T=4, schedule=schedules.Fixed(np.linspace(0.2, 0.6, 4))))


@pytest.fixture(scope="module")
def exact(fit):
    """log p(x_0) of each of the eight states."""
    return fit.log_likelihood(all_bits(3), method="exact").values


@pytest.fixture(scope="module")
def paths(fit):
    return fit.sample(KEY, 20_000, paths=True)


def test_bounds_and_estimates_against_enumeration(fit, exact, paths):
    np.testing.assert_allclose(np.exp(exact).sum(), 1, rtol=1e-9)
    # the filters compare themselves with as many whole paths as the bound of many has here
    elbo, iwae, smc = (
        fit.log_likelihood(all_bits(3), rng_key=KEY, method=method, num_draws=40, num_particles=particles)
        for method, particles in (("elbo", 2), ("iwae", 8000), ("smc", 200))
    )
    assert elbo.kind == iwae.kind == "lower bound"
    assert np.all(elbo.values - exact < 5 * elbo.values_mcse)
    assert np.all(iwae.values - exact < 5 * iwae.values_mcse)
    assert np.mean(iwae.values) > np.mean(elbo.values)
    assert abs(smc.mean - exact.mean()) < 5 * smc.mcse + 1e-3
    assert smc.mcse < 0.02
    upper = fit.log_likelihood(paths[:64], rng_key=KEY, method="upper", num_particles=49)
    assert upper.mean - exact[number(paths[:64, 0])].mean() > -5 * upper.mcse


def test_draws_have_the_frequencies_of_enumeration(exact, paths):
    assert paths.dtype == np.uint8
    assert paths.shape == (20_000, 5, 3)
    assert_frequencies(paths[:, 0], np.exp(exact))


def number(x):
    """Three bits as a number below 8."""
    return x @ np.array([4, 2, 1])


def assert_frequencies(x, p):
    assert stats.chisquare(np.bincount(number(x), minlength=8), len(x) * p / p.sum()).pvalue > 1e-4


@pytest.mark.slow
def test_a_fit_learns_the_distribution_and_is_saved(tmp_path):
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(8))
    x = all_bits(3)[rng.choice(8, 5000, p=q)]
    d = probdiff.BinomialDiffusion((3,), schedules.LearnedBetas(8), networks.ResidualMLP(32, 1), components=4)
    fit = probdiff.fit(d, x, rng_key=KEY, num_steps=1500, batch_size=256, progress_bar=False)
    frequencies = np.bincount(number(x), minlength=8) / len(x)
    p = np.exp(fit.log_likelihood(all_bits(3), method="exact").values)
    entropy = -frequencies @ np.log(frequencies)
    assert entropy <= -frequencies @ np.log(p) < entropy + 0.02
    assert not np.allclose(fit.beta, d.schedule.initial, rtol=0.02)
    fit.save(tmp_path / "fit.npz")
    again = probdiff.Fit.load(tmp_path / "fit.npz", d)
    draws = fit.sample(KEY, 20_000)
    assert_frequencies(draws, p)
    np.testing.assert_array_equal(again.sample(KEY, 20_000), draws)
    other = probdiff.BinomialDiffusion((3,), schedules.LearnedBetas(8), networks.ResidualMLP(32, 1), 0.4, 4)
    with pytest.raises(ValueError, match=r"its base_rate is 0\.5, not 0\.4"):
        probdiff.Fit.load(tmp_path / "fit.npz", other)


def test_bad_input_is_refused_by_name():
    d, params = small()
    x = np.array([[0, 1], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"x has entries 2.0 in row\(s\) 1"):
        probdiff.fit(d, [[0, 1], [2, 1], [0, 0]], rng_key=KEY)
    with pytest.raises(TypeError, match="x has dtype <U1; bits are wanted"):
        probdiff.fit(d, np.array([["0", "1"], ["1", "1"]]), rng_key=KEY)
    with pytest.raises(ValueError, match="x has shape"):
        probdiff.fit(d, x[:, :1], rng_key=KEY)
    with pytest.raises(ValueError, match="x is masked in places"):
        probdiff.fit(d, np.ma.masked_array(x, x == 1), rng_key=KEY)
    with pytest.raises(ValueError, match='objective is "mean_field"'):
        probdiff.fit(d, x, rng_key=KEY, objective="mean_field", num_steps=1)
    for rate in (0, 1.0, "half", True):
        with pytest.raises(ValueError, match="base_rate is"):
            probdiff.BinomialDiffusion((2,), schedules.harmonic(3), networks.ResidualMLP(), rate)
    for components in (0, 1.5, True):
        with pytest.raises(ValueError, match="components is"):
            probdiff.BinomialDiffusion((2,), schedules.harmonic(3), networks.ResidualMLP(), components=components)
    fit = fit_of(d, params)
    with pytest.raises(ValueError, match="x_0 has entries outside the support; bits are wanted, 0 or 1"):
        handlers.seed(d.forward, KEY)(x + 0.5)
    with pytest.raises(ValueError, match=r"x at t = 2 has entries 3.0 in row\(s\) 1"):
        fit.log_likelihood(np.where(np.arange(24).reshape(3, 4, 2) == 13, 3, 0), rng_key=KEY, method="upper")
    with pytest.raises(TypeError, match='method "ode" is for Gaussian'):
        fit.log_likelihood(x, rng_key=KEY, method="ode")
    with pytest.raises(ValueError, match=r"x has entries 2.0 in row\(s\) 1"):
        derivation.check(d.reverse, d.forward, [[0, 1], [2, 1], [0, 0]], rng_key=KEY)
    wide = probdiff.BinomialDiffusion((13,), schedules.harmonic(3), networks.ResidualMLP(8, 1))
    wide_fit = fit_of(wide, params_of(wide))
    with pytest.raises(ValueError, match="at most 12 bits, not 13"):
        wide_fit.log_likelihood(np.eye(13), method="exact")


SEQUENCES = datasets.Heartbeat(6, 3).sequences


def best_terms_by_enumeration(base_rate, beta):
    """The terms of `best_terms` for the sequences of six bits, from all states of x_t."""
    x, T, states = SEQUENCES, len(beta), all_bits(6)
    family, noise = Binomial((6,), base_rate, 1), schedules.Fixed(np.minimum(beta, 1 - 1e-9))()
    of_marginal, of_posterior = log_probs(family.marginal), means(family.posterior)
    rates = np.float64(means(family.marginal)(x, noise, T))
    terms = [np.mean((rel_entr(rates, base_rate) + rel_entr(1 - rates, 1 - base_rate)).sum(-1))]
    for t in range(1, T + 1):
        q_t = np.exp(of_marginal(states, x[:, None], noise, t))  # (m, x_t)
        share = q_t / q_t.sum(0)
        of_m = np.stack([of_posterior(states, m, noise, t) if t > 1 else np.tile(m, (64, 1)) for m in x])
        best = np.einsum("ms,msd->sd", share, np.float64(of_m))  # of_m is (m, x_t, bit)
        kl = rel_entr(of_m, best) + rel_entr(1 - of_m, 1 - best)
        terms.append(np.sum(q_t / len(x) * kl.sum(-1)))
    return np.array(terms)


@pytest.mark.parametrize(("base_rate", "beta"), [(0.5, schedules.harmonic(4).beta), (0.3, [0.2, 0.3, 0.4])])
def test_the_best_products_of_bits_are_those_of_enumeration(base_rate, beta):
    terms, errors = best_terms(SEQUENCES, beta, base_rate=base_rate, num_draws=20_000)
    assert errors.max() < 0.01
    np.testing.assert_array_less(np.abs(terms - best_terms_by_enumeration(base_rate, beta)), 4 * errors + 1e-6)


@pytest.mark.slow
def test_a_fit_comes_near_the_best_product_of_bits():
    schedule = schedules.Fixed(np.minimum(schedules.harmonic(4).beta, 1 - 1e-9))
    d = probdiff.BinomialDiffusion((6,), schedule, networks.ResidualMLP(32, 1), 0.3)
    options = {"num_steps": 1500, "batch_size": 256, "times": "even", "progress_bar": False}
    fit = probdiff.fit(d, np.tile(SEQUENCES, (600, 1)), rng_key=KEY, **options)
    bound = fit.log_likelihood(np.tile(SEQUENCES, (300, 1)), rng_key=KEY, num_draws=20)
    best = -np.sum(best_terms_by_enumeration(0.3, schedule.beta))
    assert best - 0.02 * np.log(2) - 4 * bound.mcse < bound.mean < best + 4 * bound.mcse


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sequences": [0, 1]}, r"sequences has shape \(2,\)"),
        ({"sequences": [[0, 2]]}, "bits are wanted"),
        ({"beta": [0.0]}, "beta is"),
        ({"base_rate": 1.0}, "base_rate is 1.0"),
        ({"num_draws": 1}, "num_draws is 1"),
    ],
)
def test_the_oracle_of_bits_refuses_what_cannot_be_meant(wrong, words):
    with pytest.raises(ValueError, match=words):
        best_terms(**{"sequences": [[0, 1]], "beta": [0.5], "num_draws": 10} | wrong)


@pytest.mark.parametrize(("make", "clipped"), [(probdiff.BinomialDiffusion, False), (probdiff.GaussianDiffusion, True)])
def test_a_rare_large_score_of_bits_is_not_clipped(make, clipped):
    """Adam's second update: 1 after gradients of 1 and 1000 that are clipped to 1, else m/√v of the two."""
    svi = training.make_svi(make((2,), schedules.LearnedBetas(3), networks.ResidualMLP(8, 1)), training.Settings())
    params, sizes = {"beta": jnp.zeros(3), "network$params": jnp.zeros(2)}, []
    state = svi.optim.init(params)
    for size in (1.0, 1000.0):
        before = svi.optim.get_params(state)["beta"][0]
        state = svi.optim.update(
            {"beta": jnp.array([size, 0.0, 0.0]), "network$params": jnp.zeros(2)}, state, value=0.0
        )
        sizes.append(float(before - svi.optim.get_params(state)["beta"][0]))
    ratio = (0.9 * 0.1 + 0.1 * 1000) / 0.19 / np.sqrt((0.999 * 0.001 + 0.001 * 1e6) / 0.001999)
    assert sizes[1] / sizes[0] == pytest.approx(1.0 if clipped else ratio, rel=1e-3)
