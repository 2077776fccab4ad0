"""Binomial diffusion against Bayes' rule, enumeration of all paths, and NumPyro's own estimators."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bits import KEY, all_bits, elbo_by_enumeration, small
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


@pytest.mark.parametrize("rate", RATES)
def test_kernels_are_products_of_two_by_two_matrices(rate):
    family, T = Binomial((1,), rate, 1), 4
    beta = np.array([0.1, 0.3, 0.7, 0.2])
    noise = schedules.Fixed(beta)()
    bits = all_bits(1)
    steps = [
        np.array([[1 - b + b * (1 - rate), b * rate], [b * (1 - rate), 1 - b + b * rate]]) for b in beta
    ]  # [from, to]
    marginal = np.eye(2)
    for t in range(1, T + 1):
        below, marginal = marginal, marginal @ steps[t - 1]
        given = jnp.asarray(bits)
        np.testing.assert_allclose(family.step(given, noise, t).mean[:, 0], steps[t - 1][:, 1], rtol=1e-5)
        np.testing.assert_allclose(family.marginal(given, noise, t).mean[:, 0], marginal[:, 1], rtol=1e-5)
        if t > 1:
            for x_0, x_t in itertools.product([0, 1], repeat=2):
                joint = below[x_0] * steps[t - 1][:, x_t]
                of_family = family.posterior(jnp.array([x_t]), jnp.array([x_0]), noise, t).mean[0]
                np.testing.assert_allclose(of_family, joint[1] / joint.sum(), rtol=1e-5)


def test_the_last_harmonic_step_keeps_nothing():
    family, noise = Binomial((3,), 0.3, 1), schedules.harmonic(5)()
    for x in (jnp.zeros(3, jnp.uint8), jnp.ones(3, jnp.uint8)):
        np.testing.assert_allclose(family.step(x, noise, 5).mean, 0.3, rtol=1e-6)
        np.testing.assert_allclose(kl_divergence(family.marginal(x, noise, 5), family.terminal()), 0, atol=1e-7)


def test_the_kernel_is_bayes_rule_where_the_network_knows_the_other_bits():
    """For data of a known distribution, the exact q(x_{t−1} given x_t) of each bit."""
    rng, D, T, rate = np.random.default_rng(0), 3, 4, 0.4
    family, noise = Binomial((D,), rate, 1), schedules.Fixed(np.array([0.1, 0.3, 0.5, 0.2]))()
    states = all_bits(D)
    q_0 = rng.dirichlet(np.ones(len(states)))
    for t in range(1, T + 1):
        at = lambda s: np.array([np.exp(family.marginal(jnp.asarray(x), noise, s).log_prob(states)) for x in states])  # noqa: E731
        q_t = at(t)
        q_prev = at(t - 1) if t > 1 else np.eye(len(states))
        step = np.array([np.exp(family.step(jnp.asarray(x), noise, t).log_prob(states)) for x in states])
        for i, x_t in enumerate(states):
            joint = (q_0 @ q_prev) * step[:, i]
            exact = joint @ states / joint.sum()
            # the probability of each bit of x_0 given the other bits of x_t
            p_0 = q_0 * q_t[:, i]
            own = np.exp(family.marginal(jnp.asarray(states), noise, t).base_dist.log_prob(jnp.asarray(x_t)))
            odds = [
                np.sum((p_0 / own[:, j])[states[:, j] == 1]) / np.sum((p_0 / own[:, j])[states[:, j] == 0])
                for j in range(D)
            ]
            a = np.log(odds) - np.log(rate / (1 - rate))
            outputs = 30 * np.arctanh(a / 30)
            of_family = family.kernel(jnp.asarray(x_t), jnp.asarray(outputs), noise, t).mean
            np.testing.assert_allclose(of_family, exact, rtol=2e-5)


def test_kl_of_bits_keeps_its_digits():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 4, 2000).astype(np.float32)
    for size in (3.0, 0.1, 0.01, 0.001):
        b = a + np.float32(size) * rng.choice([-1, 1], 2000).astype(np.float32)
        (p, not_p), (q, not_q) = ((-np.logaddexp(0, -v), -np.logaddexp(0, v)) for v in (np.float64(a), np.float64(b)))
        exact = np.exp(p) * (p - q) + np.exp(not_p) * (not_p - not_q)
        of_ours = kl_divergence(Bits(jnp.asarray(a)), Bits(jnp.asarray(b)))
        np.testing.assert_allclose(of_ours, exact, rtol=2e-3)
    far = kl_divergence(Bits(jnp.array([0.0, 25.0, -25.0])), Bits(jnp.array([25.0, -25.0, 0.0])))
    assert np.all(np.isfinite(far))


@pytest.mark.parametrize("components", [1, 3])
def test_all_forms_have_the_same_density(components):
    d, params = small(components)
    x_0 = jnp.asarray(all_bits(2))
    path = {t: jax.random.bernoulli(jax.random.key(t), 0.5, x_0.shape).astype(jnp.uint8) for t in range(1, 4)}
    sites = {f"x_{t}": x for t, x in path.items()}
    up, down = {"x": jnp.stack([path[t] for t in (1, 2, 3)])}, {"x": jnp.stack([path[t] for t in (3, 2, 1)])}
    seed = lambda program: handlers.seed(program, KEY)  # noqa: E731
    of = lambda program, values, **k: log_density(seed(program), (x_0,), k, {**params, **values})[0]  # noqa: E731
    np.testing.assert_allclose(of(d.forward, sites), of(d.forward_posterior, sites), rtol=1e-5)
    np.testing.assert_allclose(of(d.forward, sites), of(d.forward, up, stacked=True), rtol=1e-5)
    np.testing.assert_allclose(of(d.forward, sites), of(d.forward_posterior, down, stacked=True), rtol=1e-5)
    np.testing.assert_allclose(of(d.reverse, sites), of(d.reverse, down, stacked=True), rtol=1e-5)


def draws_of(d, params, x_0, model, guide, elbo, num_draws):
    """Estimates of K and of its gradient in β_t and the network."""

    def loss(flat, key):
        return -elbo.loss(key, unravel(flat), model, guide, x_0)

    flat, unravel = ravel_pytree(params)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(flat, jax.random.split(KEY, num_draws))
    exact, gradient = jax.jit(jax.value_and_grad(lambda flat: elbo_by_enumeration(d, unravel(flat), x_0)))(flat)
    named = ravel_pytree(
        {name: jax.tree.map(lambda leaf, n=name: jnp.full(leaf.shape, n == "beta"), v) for name, v in params.items()}
    )[0]
    return np.asarray(values), np.asarray(gradients), float(exact), np.asarray(gradient), np.asarray(named, bool)


def deviations(draws, exact):
    return (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)) + 1e-6)


def test_the_at_time_gradient_is_unbiased_for_every_param():
    d, params = small(3)
    x_0 = jnp.asarray(all_bits(2))[jnp.array([0, 3, 3, 2])]
    pair = (d.reverse_at_time, d.forward_at_time, TraceMeanField_ELBO())
    values, gradients, exact, gradient, of_beta = draws_of(d, params, x_0, *pair, 4_000)
    assert abs(deviations(values, exact)) < 4.5
    z = deviations(gradients, gradient)
    used = gradients.std(0) > 0
    assert np.abs(z[used]).max() < 5
    # without the factor "score" the gradient in β_t is another
    blocked = handlers.block(d.reverse_at_time, hide=["score"])
    _, biased, *_ = draws_of(d, params, x_0, blocked, d.forward_at_time, TraceMeanField_ELBO(), 4_000)
    assert np.abs(deviations(biased, gradient)[of_beta]).max() > 8


def test_numpyros_graph_elbo_has_the_same_gradient():
    d, params = small()
    x_0 = jnp.asarray(all_bits(2))[jnp.array([0, 3, 3, 2])]
    _values, gradients, _exact, gradient, _of_beta = draws_of(
        d, params, x_0, d.reverse, d.forward, TraceGraph_ELBO(), 20_000
    )
    used = gradients.std(0) > 0
    assert np.abs(deviations(gradients, gradient)[used]).max() < 5


def test_bounds_and_estimates_against_enumeration():
    d, params = small(2, D=4, T=5)
    fit = fit_of(d, params)
    x = all_bits(4)
    exact = fit.log_likelihood(x, method="exact").values
    np.testing.assert_allclose(np.exp(exact).sum(), 1, rtol=1e-9)
    elbo, iwae, smc = (
        fit.log_likelihood(x, rng_key=KEY, method=m, num_draws=40, num_particles=200) for m in ("elbo", "iwae", "smc")
    )
    assert elbo.kind == iwae.kind == "lower bound"
    assert np.all(elbo.values - exact < 5 * elbo.values_mcse)
    assert np.all(iwae.values - exact < 5 * iwae.values_mcse)
    assert np.mean(iwae.values) > np.mean(elbo.values)
    assert abs(smc.mean - exact.mean()) < 5 * smc.mcse + 1e-3
    assert smc.mcse < 0.02
    paths = fit.sample(KEY, 64, paths=True)
    assert paths.dtype == np.uint8
    assert paths.shape == (64, 6, 4)
    upper = fit.log_likelihood(paths, rng_key=KEY, method="upper", num_particles=50)
    of_paths = exact[[int("".join(map(str, row)), 2) for row in paths[:, 0]]]
    assert upper.mean - of_paths.mean() > -5 * upper.mcse


def test_draws_have_the_frequencies_of_enumeration():
    d, params = small(2, D=3, T=4)
    fit = fit_of(d, params)
    p = np.exp(fit.log_likelihood(all_bits(3), method="exact").values)
    counts = np.bincount(fit.sample(KEY, 20_000) @ np.array([4, 2, 1]), minlength=8)
    assert stats.chisquare(counts, 20_000 * p / p.sum()).pvalue > 1e-4


def test_a_fit_learns_the_distribution_and_is_saved(tmp_path):
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(8))
    x = all_bits(3)[rng.choice(8, 5000, p=q)]
    d = probdiff.BinomialDiffusion((3,), schedules.LearnedBetas(8), networks.ResidualMLP(32, 1), components=4)
    fit = probdiff.fit(d, x, rng_key=KEY, num_steps=1500, batch_size=256, progress_bar=False)
    frequencies = np.bincount(x @ np.array([4, 2, 1]), minlength=8) / len(x)
    p = np.exp(fit.log_likelihood(all_bits(3), method="exact").values)
    entropy = -frequencies @ np.log(frequencies)
    assert entropy <= -frequencies @ np.log(p) < entropy + 0.02
    assert not np.allclose(fit.beta, d.schedule.initial, rtol=0.02)
    fit.save(tmp_path / "fit.npz")
    again = probdiff.Fit.load(tmp_path / "fit.npz", d)
    np.testing.assert_array_equal(again.sample(KEY, 100), fit.sample(KEY, 100))
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
    wide_fit = fit_of(wide, wide.initial_params(KEY))
    with pytest.raises(ValueError, match="at most 12 bits, not 13"):
        wide_fit.log_likelihood(np.eye(13), method="exact")


@pytest.mark.parametrize(("base_rate", "beta"), [(0.5, schedules.harmonic(4).beta), (0.3, [0.2, 0.3, 0.4])])
def test_the_best_products_of_bits_are_those_of_enumeration_and_a_fit_comes_near(base_rate, beta):
    x, T, schedule = datasets.Heartbeat(6, 3).sequences, len(beta), schedules.Fixed(np.minimum(beta, 1 - 1e-9))
    family, noise, states = Binomial((6,), base_rate, 1), schedule(), jnp.asarray(all_bits(6))
    rates = np.float64([family.marginal(jnp.asarray(m), noise, T).mean for m in x])
    exact = [np.mean((rel_entr(rates, base_rate) + rel_entr(1 - rates, 1 - base_rate)).sum(-1))]
    for t in range(1, T + 1):
        q_t = np.exp([family.marginal(jnp.asarray(m), noise, t).log_prob(states) for m in x])  # (m, x_t)
        share = q_t / q_t.sum(0)
        of_m = np.stack(
            [family.posterior(states, jnp.asarray(m), noise, t).mean if t > 1 else np.tile(m, (64, 1)) for m in x]
        )  # (m, x_t, bit)
        best = np.einsum("ms,msd->sd", share, np.float64(of_m))
        kl = rel_entr(of_m, best) + rel_entr(1 - of_m, 1 - best)
        exact.append(np.sum(q_t / len(x) * kl.sum(-1)))
    terms, errors = best_terms(x, beta, base_rate=base_rate, num_draws=20_000)
    assert errors.max() < 0.01
    np.testing.assert_array_less(np.abs(terms - exact), 4 * errors + 1e-6)
    d = probdiff.BinomialDiffusion((6,), schedule, networks.ResidualMLP(32, 1), base_rate)
    fit = probdiff.fit(d, np.tile(x, (600, 1)), rng_key=KEY, num_steps=1500, batch_size=256, progress_bar=False)
    bound = fit.log_likelihood(np.tile(x, (300, 1)), rng_key=KEY, num_draws=20)
    assert -np.sum(exact) - 0.02 * np.log(2) - 4 * bound.mcse < bound.mean < -np.sum(exact) + 4 * bound.mcse


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
