"""The programs against SciPy, against each other and against closed forms."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.stats
from helpers.diffusions import (
    UNEVEN_BETA,
    exact_elbo,
    kernel_scale,
    linear_diffusion,
    mlp_diffusion,
    path_gaussian,
    random_linear,
    random_params,
)
from helpers.pairs import slow_unless
from numpyro import handlers
from numpyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density

from probdiff import GaussianDiffusion, networks, schedules

T = len(UNEVEN_BETA)
COVARIANCES = ["fixed", "diagonal", "full"]
pytestmark = pytest.mark.usefixtures("x64")


def path(n, size=2, seed=0):
    """Random x_0…x_T, (T + 1, n, size)."""
    return np.random.default_rng(seed).normal(size=(T + 1, n, size))


def sites(values, stacked, order):
    if not stacked:
        return {f"x_{t}": jnp.asarray(values[t]) for t in order}
    return {"x": jnp.asarray(np.stack([values[t] for t in order]))}


def forward_log_prob(values, beta):
    return sum(
        scipy.stats.norm.logpdf(values[t], np.sqrt(1 - beta[t - 1]) * values[t - 1], np.sqrt(beta[t - 1])).sum()
        for t in range(1, T + 1)
    )


def reverse_log_prob(d, params, values):
    """log p of a path, one Gaussian after the other, in NumPy."""
    module = eqx.combine(params["network$params"], d._build(jax.random.key(0))[1])
    beta = np.asarray(params["beta"])
    alpha_bar = np.concatenate([[1], np.cumprod(1 - beta)])
    total = scipy.stats.norm.logpdf(values[T]).sum()
    D = values.shape[-1]
    for t in range(1, T + 1):
        a, a_prev, b = alpha_bar[t], alpha_bar[t - 1], beta[t - 1]
        for x_t, x_prev in zip(values[t], values[t - 1], strict=True):
            outputs = np.asarray(module(jnp.asarray(x_t), jnp.asarray(np.log(a / (1 - a)))))
            x_0_hat = np.sqrt(a) * x_t + np.sqrt(1 - a) * outputs[:D]
            mean = (np.sqrt(a_prev) * b * x_0_hat + np.sqrt(1 - b) * (1 - a_prev) * x_t) / (1 - a)
            factor = kernel_scale(outputs, b, (1 - a_prev) / (1 - a), D, d.covariance)
            total += scipy.stats.multivariate_normal.logpdf(x_prev, mean, factor @ factor.T)
    return total


@pytest.mark.parametrize("stacked", [False, True])
def test_forward_log_density_is_that_of_the_kernels(stacked):
    d, values = mlp_diffusion(), path(3)
    params = {"beta": jnp.asarray(UNEVEN_BETA)}
    program = partial(d.forward, stacked=stacked)
    got, _ = log_density(program, (jnp.asarray(values[0]),), {}, {**params, **sites(values, stacked, range(1, T + 1))})
    assert got == pytest.approx(forward_log_prob(values, UNEVEN_BETA), rel=1e-10)


@pytest.mark.parametrize("stacked", [False, True])
def test_posterior_order_is_the_same_density(stacked):
    d, values = mlp_diffusion(), path(3)
    params = {"beta": jnp.asarray(UNEVEN_BETA), **sites(values, stacked, range(T, 0, -1))}
    got, _ = log_density(partial(d.forward_posterior, stacked=stacked), (jnp.asarray(values[0]),), {}, params)
    assert got == pytest.approx(forward_log_prob(values, UNEVEN_BETA), rel=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_reverse_log_density_is_that_of_the_kernels(covariance):
    d, values = mlp_diffusion(covariance), path(3)
    params = random_params(d)
    expected = reverse_log_prob(d, params, values)
    for stacked in (False, True):
        drawn = sites(values, stacked, range(T, 0, -1))
        got, _ = log_density(partial(d.reverse, stacked=stacked), (jnp.asarray(values[0]),), {}, {**params, **drawn})
        assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_linear_chain_is_the_dense_normal_of_the_whole_path(covariance):
    d, values = linear_diffusion(covariance), path(1)[:, 0]
    params = random_linear(d)
    mean, cov = path_gaussian(d, params)
    expected = scipy.stats.multivariate_normal.logpdf(values[::-1].ravel(), mean, cov)
    got, _ = log_density(d.reverse, (jnp.asarray(values[0]),), {}, {**params, **sites(values, False, range(T, 0, -1))})
    assert got == pytest.approx(expected, rel=1e-9)


PAIRS = {
    "trace": lambda d: (d.reverse, d.forward, Trace_ELBO(), {}),
    "mean field": lambda d: (d.reverse, d.forward_posterior, TraceMeanField_ELBO(), {}),
    "stacked trace": lambda d: (d.reverse, d.forward_posterior, Trace_ELBO(), {"stacked": True}),
    "stacked mean field": lambda d: (d.reverse, d.forward_posterior, TraceMeanField_ELBO(), {"stacked": True}),
    "at time, mean field": lambda d: (d.reverse_at_time, d.forward_at_time, TraceMeanField_ELBO(), {}),
    "at time, weighted": lambda d: (
        d.reverse_at_time,
        d.forward_at_time,
        TraceMeanField_ELBO(),
        {
            "time_probs": jnp.array([0.15, 0.3, 0.55])
            if d.num_timesteps == 3
            else jnp.array([0.15, 0.3, 0.1, 0.25, 0.2])
        },
    ),
    "at time, trace": lambda d: (d.reverse_at_time, d.forward_at_time, Trace_ELBO(), {}),
}


@pytest.mark.parametrize("pair", slow_unless(PAIRS, ["trace", "stacked mean field", "at time, weighted"]))
@pytest.mark.parametrize("covariance", [pytest.param("diagonal", marks=pytest.mark.slow), "full"])
def test_every_pair_has_the_exact_elbo_on_average(pair, covariance):
    d, x = linear_diffusion(covariance), np.random.default_rng(1).normal(size=(3, 2))
    expected = sum(exact_elbo(d, x_0) for x_0 in x)
    model, guide, elbo, kwargs = PAIRS[pair](d)
    loss = jax.jit(jax.vmap(lambda key: elbo.loss(key, random_linear(d), model, guide, jnp.asarray(x), **kwargs)))
    draws = -np.asarray(loss(jax.random.split(jax.random.key(0), 4000)))
    # z of 4 on either side: fails by chance in 6 of 100,000 runs of other seeds
    assert abs(draws.mean() - expected) < 4 * draws.std() / np.sqrt(len(draws)) + 1e-9


@pytest.mark.parametrize("num_timesteps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_at_time_agrees_with_trace_elbo_on_the_shortest_chains(num_timesteps):
    d = mlp_diffusion("full", schedules.LearnedBetas(num_timesteps, UNEVEN_BETA[:num_timesteps] + 0.3))
    params, x = random_params(d), jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
    keys = jax.random.split(jax.random.key(0), 4000)
    means, variances = [], []
    for name in ("trace", "mean field", "at time, mean field"):
        model, guide, elbo, _ = PAIRS[name](d)
        loss = jax.jit(jax.vmap(lambda key, e=elbo, m=model, g=guide: e.loss(key, params, m, g, x)))
        losses = np.asarray(loss(keys))
        means.append(losses.mean())
        variances.append(losses.var() / len(losses))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(means[i] - means[j]) < 4 * np.sqrt(variances[i] + variances[j])


def test_each_t_is_drawn_evenly_over_a_batch():
    d = mlp_diffusion(schedule=schedules.cosine(8))
    t = handlers.trace(handlers.seed(d.reverse_at_time, 3)).get_trace(jnp.zeros((32, 2)))["t"]["value"]
    np.testing.assert_array_equal(np.bincount(t, minlength=9)[1:], 4)
    draws = jax.jit(
        jax.vmap(
            lambda s: handlers.trace(handlers.seed(d.reverse_at_time, s)).get_trace(jnp.zeros((1, 2)))["t"]["value"]
        )
    )
    counts = np.bincount(np.asarray(draws(jnp.arange(4000))).ravel(), minlength=9)[1:]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_each_t_is_drawn_with_its_probability():
    d, probs = mlp_diffusion(schedule=schedules.cosine(4)), jnp.array([0.5, 0.125, 0.25, 0.125])
    program = partial(d.reverse_at_time, jnp.zeros((32, 2)), time_probs=probs)
    t = handlers.trace(handlers.seed(program, 3)).get_trace()["t"]["value"]
    np.testing.assert_array_equal(np.bincount(t, minlength=5)[1:], [16, 4, 8, 4])
    with pytest.raises(ValueError, match=r"time_probs has shape \(3,\); this diffusion has 4 time steps"):
        handlers.seed(d.forward_at_time, 0)(jnp.zeros((2, 2)), time_probs=probs[:3])


@pytest.mark.parametrize("pair", slow_unless(PAIRS, ["trace", "at time, weighted"]))
def test_gradient_in_beta_agrees_with_finite_differences(pair):
    d = mlp_diffusion("full", schedules.LearnedBetas(3, UNEVEN_BETA[1:4]))
    params, x = random_params(d), jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)))
    model, guide, elbo, kwargs = PAIRS[pair](d)

    def loss(beta):
        return elbo.loss(jax.random.key(5), {**params, "beta": beta}, model, guide, x, **kwargs)

    steps = 1e-6 * np.concatenate([np.eye(3), -np.eye(3)])
    losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(params["beta"] + np.stack([*steps, 0 * steps[0]]))
    gradient = gradients[-1]
    assert np.all(np.abs(gradient) > 1e-3)
    np.testing.assert_allclose(gradient, (losses[:3] - losses[3:-1]) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_reverse_draws_have_the_moments_of_the_linear_chain(covariance):
    d = linear_diffusion(covariance)
    mean, cov = path_gaussian(d, {})
    n = 20_000
    for stacked in (False, True):
        program = Predictive(d.reverse, params=random_linear(d), num_samples=n, parallel=True)
        drawn = np.asarray(program(jax.random.key(1), stacked=stacked)["x_0"])
        assert drawn.shape == (n, 2)
        z = (drawn.mean(0) - mean[-2:]) / np.sqrt(np.diag(cov)[-2:] / n)
        assert np.all(np.abs(z) < 4)
        np.testing.assert_allclose(np.cov(drawn.T), cov[-2:, -2:], atol=5 * cov[-2:, -2:].max() * np.sqrt(2 / n))


@pytest.mark.parametrize("name", ["trace", "mean field", "at time, mean field"])
@pytest.mark.slow
def test_svi_alone_learns_beta_and_the_reverse_kernels(name):
    d = mlp_diffusion("diagonal", schedules.LearnedBetas(5, schedules.linear(5)), width=16)
    key = jax.random.key(0)
    x = 1.0 + 0.2 * jax.random.normal(key, (256, 2))
    model, guide, elbo, _ = PAIRS[name](d)
    result = SVI(model, guide, optax.adam(1e-2), elbo).run(key, 1000, x, progress_bar=False)
    beta = result.params["beta"]
    assert beta.shape == (5,)
    assert np.all((beta > 0) & (beta < 1))
    assert np.abs(beta - d.schedule.initial).max() > 0.01
    entropy = 2 * 0.5 * np.log(2 * np.pi * np.e * 0.2**2) * len(x)
    first, last = result.losses[:50].mean(), result.losses[-50:].mean()
    assert last - entropy < 0.2 * (first - entropy)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field")  # NumPyro's warning, which comes before our refusal
@pytest.mark.parametrize("stacked", [False, True])
def test_forward_order_under_mean_field_is_refused(stacked):
    d = mlp_diffusion()
    svi = SVI(d.reverse, d.forward, optax.adam(1e-3), TraceMeanField_ELBO(), stacked=stacked)
    with pytest.raises(ValueError, match="use forward_posterior"):
        svi.run(jax.random.key(0), 2, jnp.zeros((4, 2)), progress_bar=False)


def test_stacked_forward_order_is_refused_as_a_guide_whatever_the_elbo():
    d = mlp_diffusion()
    svi = SVI(d.reverse, d.forward, optax.adam(1e-3), Trace_ELBO(), stacked=True)
    with pytest.raises(ValueError, match="forward_posterior with stacked=True"):
        svi.run(jax.random.key(0), 2, jnp.zeros((4, 2)), progress_bar=False)


@pytest.mark.slow
def test_one_step_chain_has_but_one_order():
    d, x = mlp_diffusion(schedule=schedules.cosine(1)), jnp.ones((4, 2))
    params = random_params(d)

    @jax.jit
    def losses(params):
        return [
            TraceMeanField_ELBO().loss(
                jax.random.key(0), params, partial(d.reverse, stacked=s), partial(guide, stacked=s), x
            )
            for s in (False, True)
            for guide in (d.forward, d.forward_posterior)
        ]

    assert np.all(np.isfinite(losses(params)))


@pytest.mark.parametrize("stacked", [False, True])
def test_condition_and_substitute_fix_a_site(stacked):
    d, x = mlp_diffusion(), jnp.ones((3, 2))
    params, values = random_params(d), path(3)
    fixed = sites(values, stacked, range(T, 0, -1))
    program = handlers.substitute(partial(d.reverse, stacked=stacked), data=params)
    for handler in (handlers.condition, handlers.substitute):
        trace = handlers.trace(handlers.seed(handler(program, data=fixed), 0)).get_trace(x)
        for name, value in fixed.items():
            np.testing.assert_array_equal(trace[name]["value"], value)
    # a conditioned x_1 alone decides the law of x_0
    reverse = handlers.substitute(d.reverse, data=params)
    for seed in (0, 1):
        one = handlers.seed(handlers.condition(reverse, data={"x_1": jnp.ones(2)}), seed)
        x_0 = handlers.trace(one).get_trace()["x_0"]["fn"]
        kernel = handlers.substitute(d.kernels, data=params)()[1](jnp.ones(2), 1)
        np.testing.assert_allclose(x_0.mean, kernel.mean)
        np.testing.assert_allclose(x_0.covariance_matrix, kernel.covariance_matrix)


def test_trace_has_the_named_sites_in_order():
    d, x = mlp_diffusion(), jnp.zeros((7, 2))
    for program, order in (
        (d.forward, range(1, T + 1)),
        (d.forward_posterior, range(T, 0, -1)),
        (d.reverse, range(T, -1, -1)),
    ):
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(x)
        assert [n for n, site in trace.items() if site["type"] == "sample"] == [f"x_{t}" for t in order]
        assert trace["data"]["type"] == "plate"
        stacked = handlers.trace(handlers.seed(program, 0)).get_trace(x, stacked=True)
        assert stacked["x"]["value"].shape == (T, 7, 2)


def test_one_datum_needs_no_plate_and_a_plate_around_the_program_works():
    d = mlp_diffusion()
    trace = handlers.trace(handlers.seed(d.reverse, 0)).get_trace(jnp.zeros(2))
    assert "data" not in trace
    assert trace["x_3"]["value"].shape == (2,)

    def model():
        with numpyro.plate("many", 6):
            return d.reverse()

    assert handlers.seed(model, 0)().shape == (6, 2)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.slow
def test_subsampled_elbo_is_unbiased(stacked):
    d, x = linear_diffusion("full"), np.random.default_rng(3).normal(size=(8, 2))
    expected = sum(exact_elbo(d, x_0) for x_0 in x)
    elbo = Trace_ELBO()
    loss = jax.jit(
        jax.vmap(
            lambda key: elbo.loss(
                key, random_linear(d), d.reverse, d.forward_posterior, jnp.asarray(x), stacked=stacked, subsample_size=3
            )
        )
    )
    draws = -np.asarray(loss(jax.random.split(jax.random.key(0), 4000)))
    assert abs(draws.mean() - expected) < 4 * draws.std() / np.sqrt(len(draws))
    assert draws.std() > 0.1


@pytest.mark.slow
def test_renyi_bound_is_per_datum():
    """With alpha = 0 it is the importance-weighted bound of each datum: at many particles, the exact log p(x_0)."""
    d, x = linear_diffusion("full"), np.random.default_rng(3).normal(size=(3, 2))
    mean, cov = path_gaussian(d, {})
    expected = scipy.stats.multivariate_normal.logpdf(x, mean[-2:], cov[-2:, -2:]).sum()
    gaps = []
    for K in (10, 1000):
        bound = RenyiELBO(alpha=0, num_particles=K)
        loss = jax.jit(
            jax.vmap(lambda key, b=bound: b.loss(key, random_linear(d), d.reverse, d.forward, jnp.asarray(x)))
        )
        draws = -np.asarray(loss(jax.random.split(jax.random.key(1), 50)))
        gaps.append(expected - draws.mean())
        error = draws.std() / np.sqrt(50)
    assert gaps[1] < gaps[0]
    assert abs(gaps[1]) < 4 * error + 0.05


def test_model_can_be_drawn_as_a_graph():
    d = mlp_diffusion()
    graph = numpyro.render_model(d.reverse, model_args=(jnp.zeros((5, 2)),))
    for t in range(T + 1):
        assert f"x_{t}" in graph.source
    assert "data" in graph.source


@pytest.mark.parametrize("covariance", ["fixed", "diagonal"])
def test_reverse_sites_can_be_made_non_centred(covariance):
    d = mlp_diffusion(covariance)
    config = {f"x_{t}": LocScaleReparam(0) for t in range(1, T + 1)}
    program = handlers.reparam(handlers.substitute(d.reverse, data=random_params(d)), config=config)
    trace = handlers.trace(handlers.seed(program, 0)).get_trace()
    for t in range(1, T + 1):
        assert trace[f"x_{t}_decentered"]["value"].shape == (2,)
        assert trace[f"x_{t}"]["type"] == "deterministic"


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.zeros((100, 3)), ValueError, r"x_0 has shape \(100, 3\); this diffusion has event_shape \(2,\)"),
        (np.zeros((4, 2, 2)), ValueError, "x_0 has shape"),
        (np.zeros((4, 2), int), TypeError, "dtype int"),
    ],
)
def test_bad_data_are_refused_by_every_program(x, error, words):
    d = mlp_diffusion()
    for program in (d.forward, d.forward_posterior, d.reverse, d.forward_at_time, d.reverse_at_time):
        with pytest.raises(error, match=words):
            handlers.seed(program, 0)(x)
    with pytest.raises(ValueError, match="subsample_size is 9; x_0 has 4 rows"):
        handlers.seed(d.reverse, 0)(np.zeros((4, 2)), subsample_size=9)


class OwnNetwork(eqx.Module):
    """A user's network: one layer that sees the log-SNR as one more input."""

    layer: eqx.nn.Linear

    def __call__(self, x_t, log_snr):
        return self.layer(jnp.append(x_t, log_snr / 10))


@pytest.mark.slow
def test_any_equinox_module_can_be_the_network():
    module = OwnNetwork(eqx.nn.Linear(3, 5, key=jax.random.key(0)))
    d = GaussianDiffusion((2,), schedules.LearnedBetas(4), module, "full")
    x = jax.random.normal(jax.random.key(1), (64, 2))
    svi = SVI(d.reverse_at_time, d.forward_at_time, optax.adam(1e-2), TraceMeanField_ELBO())
    result = svi.run(jax.random.key(2), 50, x, progress_bar=False)
    assert not np.allclose(result.params["network$params"].layer.weight, module.layer.weight)
    # β_T = 1: the network is shown a finite log-SNR
    ends_in_noise = GaussianDiffusion((2,), schedules.harmonic(4), module, "full")
    assert np.all(np.isfinite(handlers.seed(ends_in_noise.reverse, 0)()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mlp_diffusion("banded"), "covariance is 'banded'"),
        (lambda: mlp_diffusion(event_shape=()), "event_shape is"),
        (lambda: mlp_diffusion(event_shape=(2.5,)), "event_shape is"),
        (lambda: mlp_diffusion(event_shape=(4, 4)), "wants a vector"),
        (
            lambda: GaussianDiffusion(
                (2,), schedules.cosine(3), OwnNetwork(eqx.nn.Linear(3, 4, key=jax.random.key(0))), "full"
            ),
            r"outputs of shape \(4,\).*wants \(5,\)",
        ),
    ],
)
def test_bad_diffusions_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.slow
def test_images_keep_their_shape():
    d = mlp_diffusion("diagonal", event_shape=(3, 4))
    x = jnp.zeros((5, 3, 4))

    @jax.jit
    def losses(params):
        return [
            TraceMeanField_ELBO().loss(
                jax.random.key(0),
                params,
                partial(d.reverse, stacked=stacked),
                partial(d.forward_posterior, stacked=stacked),
                x,
            )
            for stacked in (False, True)
        ]

    assert np.all(np.isfinite(losses(random_params(d))))
    assert handlers.seed(handlers.substitute(d.reverse, data=random_params(d)), 0)().shape == (3, 4)


def test_harmonic_schedule_gives_finite_losses_and_gradients():
    d = mlp_diffusion("full", schedules.harmonic(6))
    params, x = random_params(d), jnp.ones((8, 2))
    value, gradient = jax.jit(
        jax.value_and_grad(
            lambda p: TraceMeanField_ELBO().loss(jax.random.key(0), p, d.reverse_at_time, d.forward_at_time, x)
        )
    )(params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_dropout_is_drawn_for_each_datum_and_only_where_asked_for():
    d = mlp_diffusion("full", width=16)
    params, x_t = random_params(d), jnp.ones((3, 2))

    def mean(diffusion, seed, dropout):
        program = handlers.substitute(handlers.seed(lambda: diffusion.kernels(dropout)[1](x_t, 2), seed), data=params)
        return np.asarray(program().mean)

    whole = mean(d, 0, False)
    np.testing.assert_array_equal(whole, mean(d, 1, False))
    np.testing.assert_array_equal(whole[0], whole[1])
    thinned = mean(d, 0, True)
    np.testing.assert_array_equal(thinned, mean(d, 0, True))
    assert len({tuple(row) for row in [*thinned.tolist(), *mean(d, 1, True).tolist(), whole[0].tolist()]}) == 7
    none = GaussianDiffusion((2,), d.schedule, networks.ResidualMLP(16, 1, dropout=0.0), "full")
    np.testing.assert_array_equal(mean(none, 0, True), mean(none, 0, False))
