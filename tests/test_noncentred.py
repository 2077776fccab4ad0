import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers.diffusions import fit_of, linear_diffusion, mlp_diffusion, path_gaussian, random_params
from helpers.pairs import slow_unless
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density
from scipy import stats

from probdiff import BinomialDiffusion, GaussianDiffusion, networks, schedules
from probdiff.noncentred import NonCentred, ancestral
from probdiff.results import Fit

FAILURE = 1e-4  # of a right program, for each test
T = 5  # of conftest's diffusions
COVARIANCES = ["fixed", "diagonal", "full"]


def chain_and_prior(covariance="full"):
    d = mlp_diffusion(covariance)
    params = random_params(d)
    return d, params, d.prior(params)


def trace_of(program, key=0, *args, **kwargs):
    return handlers.trace(handlers.seed(program, key)).get_trace(*args, **kwargs)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_density_is_the_reverse_chains(x64, covariance):
    """log p(x_T, x_4_base, …, x_0_base) = log p(x_0…x_T) + Σ_t log det of each kernel's scale."""
    d, params, prior = chain_and_prior(covariance)
    trace = trace_of(prior)
    sampled = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
    assert list(sampled) == ["x_5", "x_4_base", "x_3_base", "x_2_base", "x_1_base", "x_0_base"]
    path = {f"x_{t}": trace[f"x_{t}"]["value"] for t in range(T + 1)}
    of_noise, _ = log_density(prior, (), {}, sampled)
    of_path, _ = log_density(handlers.substitute(d.reverse, data=params), (), {}, path)
    _, kernel = handlers.substitute(d.kernels, data=params)()
    log_det = 0.0
    for t in range(1, T + 1):
        p = kernel(path[f"x_{t}"], t)
        scale = p.scale_tril if covariance == "full" else jnp.diag(jnp.sqrt(p.variance))
        log_det += np.linalg.slogdet(np.asarray(scale))[1]
    np.testing.assert_allclose(of_noise, of_path + log_det, rtol=1e-12)
    standard = sum(stats.norm.logpdf(np.asarray(value)).sum() for value in sampled.values())
    np.testing.assert_allclose(of_noise, standard, rtol=1e-12)


@pytest.mark.parametrize("covariance", slow_unless(COVARIANCES, ["full"]))
@pytest.mark.parametrize("stacked", [False, True])
def test_draws_have_the_moments_of_p(x64, covariance, stacked):
    d = linear_diffusion(covariance)
    params = d.initial_params(jax.random.key(0))
    mean, cov = path_gaussian(d, params)
    prior, n = d.prior(params), 4000
    draws = Predictive(prior, num_samples=n)(jax.random.key(1), stacked=stacked)["x_0"]
    z = (np.asarray(draws.mean(0)) - mean[-2:]) / np.sqrt(np.diag(cov)[-2:] / n)
    assert np.all(np.abs(z) < stats.norm.isf(FAILURE / 4))
    ratio = np.asarray(draws.var(0)) / np.diag(cov)[-2:]
    assert np.all(np.abs(ratio - 1) < stats.norm.isf(FAILURE / 4) * np.sqrt(2 / n))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_reparametrisers_work_on_every_site_of_the_reverse_chain(x64, covariance):
    """NumPyro's `LocScaleReparam` where the covariance is diagonal, `NonCentred` for all: one path from the same z."""
    d, params, prior = chain_and_prior(covariance)
    reverse = handlers.substitute(d.reverse, data=params)
    sites = {f"x_{t}" for t in range(T)}
    values = {name: site["value"] for name, site in trace_of(prior).items()}
    for reparam, suffix in ((NonCentred(), "_base"), (LocScaleReparam(0), "_decentered"))[: 1 + (covariance != "full")]:
        config = {name: reparam for name in sites}
        noise = {"x_5": values["x_5"]} | {f"{name}{suffix}": values[f"{name}_base"] for name in sites}
        trace = trace_of(handlers.substitute(handlers.reparam(reverse, config=config), data=noise))
        np.testing.assert_allclose(trace["x_0"]["value"], values["x_0"], rtol=1e-12)


def test_sites_that_are_given_a_value_keep_it(x64):
    _, _, prior = chain_and_prior()
    value = jnp.array([0.3, -0.7])
    for handler in (
        handlers.condition(prior, data={"x_3": value}),
        handlers.condition(prior, condition_fn=lambda site: {"x_3": value}.get(site["name"])),
        handlers.substitute(prior, data={"x_3": value}),
        handlers.replay(prior, trace={"x_3": {"type": "sample", "value": value, "is_observed": False, "infer": {}}}),
    ):
        trace = trace_of(handler)
        np.testing.assert_array_equal(trace["x_3"]["value"], value)
        assert "x_3_base" not in trace
        assert "x_2_base" in trace
    observed = trace_of(handlers.condition(prior, data={"x_0": value}))["x_0"]
    assert observed["is_observed"]
    scoped = handlers.condition(handlers.scope(prior, prefix="a"), data={"a/x_3": value})
    assert trace_of(scoped)["a/x_3"]["is_observed"]
    # `do` leaves the draw in the trace, and goes on from the value
    noise = {name: site["value"] for name, site in trace.items() if site["type"] == "sample" and name != "x_3"}
    done = trace_of(handlers.do(handlers.substitute(prior, data=noise), data={"x_3": value}))
    np.testing.assert_array_equal(done["x_0"]["value"], trace["x_0"]["value"])
    assert not np.array_equal(done["x_3"]["value"], value)


def test_the_forward_chain_can_be_a_guide_of_the_prior(x64):
    """Its draws of x_1…x_T are replayed: the ELBO of the conditioned prior is that of the reverse chain."""
    d, params, prior = chain_and_prior()
    x_0 = jnp.array([0.4, -0.2])
    losses = [
        Trace_ELBO(num_particles=4).loss(jax.random.key(3), params, model, lambda: d.forward_posterior(x_0))
        for model in (handlers.condition(prior, data={"x_0": x_0}), lambda: d.reverse(x_0))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)


def test_in_plates_scopes_and_with_covariates():
    _, _, prior = chain_and_prior()

    def model(z):
        with numpyro.plate("group", 3, dim=-2), numpyro.plate("data", 4, dim=-1):
            x = prior()
            a = handlers.scope(prior, prefix="a")()
            b = handlers.scope(prior, prefix="b")(stacked=True)
            assert x.shape == a.shape == b.shape == (3, 4, 2)
            numpyro.sample("y", dist.Normal(x[..., 0] * z + a[..., 1] + b[..., 0], 1.0), obs=jnp.zeros((3, 4)))

    trace = trace_of(model, 0, jnp.arange(4.0))
    assert trace["b/x_path_base"]["value"].shape == (3, 4, T, 2)
    assert trace["b/x_path"]["value"].shape == (3, 4, T, 2)
    assert len(np.unique(trace["x_0"]["value"])) == 24
    assert not any(site["type"] == "param" for site in trace.values())


def test_subsampled_plates_draw_as_many_as_they_hold():
    _, _, prior = chain_and_prior()

    def model():
        with numpyro.plate("data", 10, subsample_size=3):
            return prior()

    assert handlers.seed(model, 0)().shape == (3, 2)


def test_a_value_for_a_site_that_the_stacked_form_has_not_is_refused():
    _, _, prior = chain_and_prior()
    given = handlers.scope(prior, prefix="b")
    for t, handler in ((3, handlers.condition), (5, handlers.do)):
        handler = handler(given, {f"b/x_{t}": jnp.zeros(2)})
        with pytest.raises(ValueError, match=f"stacked=True has no site x_{t}"):
            trace_of(handler, stacked=True)
        assert trace_of(handler)["b/x_0"]["value"].shape == (2,)
    trace = trace_of(handlers.condition(given, {"b/x_0": jnp.zeros(2)}), stacked=True)
    np.testing.assert_array_equal(trace["b/x_0"]["value"], 0.0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.slow
def test_nuts_finds_the_posterior_of_a_linear_chain(stacked):
    """y = x_0 + noise, in closed form; means and standard deviations within their Monte Carlo error."""
    d = linear_diffusion("full")
    params = d.initial_params(jax.random.key(0))
    fit = fit_of(d, params, [1.0, -2.0], [2.0, 0.5])
    mean, cov = path_gaussian(d, params)
    mean, cov = fit.loc + fit.scale * mean[-2:], cov[-2:, -2:] * np.outer(fit.scale, fit.scale)
    y, R = np.array([2.5, -1.5]), np.diag([0.25, 0.25])

    def model():
        x = numpyro.deterministic("x", fit.prior()(stacked=stacked))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    mcmc = MCMC(
        NUTS(model), num_warmup=200, num_samples=400, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.key(0))
    gain = cov @ np.linalg.inv(cov + R)
    wanted, spread = mean + gain @ (y - mean), np.sqrt(np.diag(cov - gain @ cov))
    dt = az.from_numpyro(mcmc)
    summary = az.summary(dt, var_names=["x"], round_to="none")
    z = (summary["mean"].to_numpy() - wanted) / (spread / np.sqrt(summary["ess_bulk"].to_numpy()))
    assert np.all(np.abs(z) < stats.norm.isf(FAILURE / 4)), z
    assert np.all(np.abs(summary["sd"].to_numpy() / spread - 1) < 0.25)
    assert (summary["r_hat"] < 1.05).all()
    # samples that hold both x_3 and x_3_base give back the same x_0
    if not stacked:
        again = Predictive(lambda: numpyro.deterministic("x", fit.prior()()), mcmc.get_samples())(jax.random.key(1))[
            "x"
        ]
        np.testing.assert_allclose(again, mcmc.get_samples()["x"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guide", [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoMultivariateNormal])
def test_auto_guides_fit_the_posterior_and_leave_the_prior_alone(guide):
    d = linear_diffusion("diagonal")
    params = random_params(d)

    def model():
        numpyro.sample("y", dist.Normal(d.prior(params)(), 0.5).to_event(1), obs=jnp.array([0.5, 0.2]))

    svi = SVI(model, guide(model), numpyro.optim.Adam(0.05), Trace_ELBO(num_particles=4))
    result = svi.run(jax.random.key(0), 300, progress_bar=False)
    assert all("auto_" in name for name in result.params)
    assert result.losses[-50:].mean() < result.losses[:10].mean()


def test_bits_stay_as_they_are():
    d = BinomialDiffusion((3,), schedules.linear(3), networks.ResidualMLP(8, 1))
    fit = fit_of(d, random_params(d))
    trace = trace_of(fit.prior())
    assert list(trace) == ["x_3", "x_2", "x_1", "x_0"]
    assert handlers.seed(fit.prior(), 0)().dtype == jnp.uint8
    with pytest.raises(ValueError, match="stacked=True is for chains of numbers"):
        trace_of(fit.prior(), stacked=True)


def test_a_stack_of_other_kernels_is_refused():
    """Of a Laplace, which has a location and a scale too, and would be drawn as a normal."""
    terminal = dist.Normal(0.0, 1.0).expand((2,)).to_event(1)
    with pytest.raises(ValueError, match="not for Laplace"):
        handlers.seed(ancestral, 0)(terminal, lambda x_t, t: dist.Laplace(x_t, 1.0).to_event(1), 3, stacked=True)


def test_wrong_params_and_several_chains_are_refused():
    d, params, _ = chain_and_prior()
    with pytest.raises(ValueError, match=r"params has no 'network\$params'"):
        d.prior({"beta": params["beta"]})
    with pytest.raises(ValueError, match=r"params\['beta'\] has other shapes"):
        d.prior(params | {"beta": params["beta"][:2]})
    with pytest.raises(ValueError, match=r"params\['network\$params'\] has other shapes"):
        d.prior(random_params(mlp_diffusion("full", width=9)))
    double = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    both = Fit(d, double, np.zeros((2, 1)), np.zeros((2, 0)), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="this fit has 2 chains; choose one"):
        both.prior()
    with pytest.raises(TypeError, match="NonCentred is for Normal"):
        trace_of(handlers.reparam(lambda: numpyro.sample("a", dist.Gamma(1.0)), config={"a": NonCentred()}))


def test_a_prior_of_mixtures_has_the_density_of_their_sites(x64):
    d = GaussianDiffusion((2,), schedules.LearnedBetas(2), networks.ResidualMLP(8, 1), "full", 3)
    params, values = random_params(d), np.random.default_rng(0).normal(size=(3, 2))
    sites = {f"x_{t}": jnp.asarray(values[t]) for t in range(3)}
    prior = d.prior(params)
    wanted, _ = log_density(d.reverse, (sites["x_0"],), {}, params | sites)
    np.testing.assert_allclose(log_density(handlers.condition(prior, sites), (), {}, {})[0], wanted, rtol=1e-9)
    trace = trace_of(prior)
    names = [name for name, site in trace.items() if site["type"] == "sample"]
    assert names == ["x_2", "x_1_base", "x_0_base"]
    noise = jnp.stack([trace[name]["value"] for name in names[:-1]])
    stacked = handlers.substitute(prior, data={"x_path_base": noise, "x_0_base": trace["x_0_base"]["value"]})
    np.testing.assert_allclose(trace_of(stacked, stacked=True)["x_0"]["value"], trace["x_0"]["value"], rtol=1e-9)
