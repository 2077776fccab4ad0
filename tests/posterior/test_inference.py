"""What users are given of a posterior, and what they are told."""

from dataclasses import replace

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from helpers.diffusions import fit_of, linear_mixture
from helpers.posteriors import FAILURE, KEY, A, conditioned, linear_fit, three_modes
from scipy import stats

from probdiff import posterior
from probdiff.posterior import BlackBox, LinearGaussian, Missing, inference
from probdiff.posterior.filters import Filtered
from probdiff.results import Fit


def test_conditional_densities(x64):
    fit, mean, cov = linear_fit("full")
    x = np.array([[3.0, -1.8], [0.5, -2.5]])
    named = replace(fit, features=("a", "b"))
    frame = pd.DataFrame(x[:, ::-1], columns=["b", "a"])
    options = {"rng_key": KEY, "num_particles": 500, "num_filters": 20}
    found = posterior.log_conditional(named, frame, of=["b"], given=["a"], **options)
    with pytest.raises(ValueError, match="given has 'c'; the features of this fit are a, b"):
        posterior.log_conditional(named, frame, of=["b"], given=["c"], **options)
    for i, row in enumerate(x):
        m, v, _ = conditioned(mean, cov, row[:1], np.eye(2)[:1], 0)
        z = (found.values[i] - stats.norm(m[1], np.sqrt(v[1, 1])).logpdf(row[1])) / found.values_mcse[i]
        assert abs(z) < stats.t(19).isf(FAILURE / 4)
    assert found.kind == "estimate"
    holes = frame.assign(a=[np.nan, 0.5])
    alone = posterior.log_conditional(named, holes, of=["b"], given=[], **options)
    with pytest.raises(ValueError, match=r"1 entries that are NaN or infinite, in row\(s\) 0 and column\(s\) a"):
        posterior.log_conditional(named, holes, of=["b"], given=["a"], **options)
    with pytest.raises(TypeError, match="column 'a' of x has dtype int64"):
        posterior.log_conditional(named, frame.assign(a=[1, 2]), of=["b"], given=["a"], **options)
    z = (alone.values - stats.norm(mean[1], np.sqrt(cov[1, 1])).logpdf(x[:, 1])) / alone.values_mcse
    assert np.all(np.abs(z) < stats.t(19).isf(FAILURE / 4))


def test_the_tree_is_read_by_arviz_and_kept(tmp_path):
    fit = replace(three_modes(), features=("a", "b"))
    seen = LinearGaussian(np.array([[0.3], [0.5]]), A, 0.2)
    dt = posterior.sample(fit, seen, rng_key=KEY, num_particles=100, num_filters=4)
    assert dt["posterior"]["feature"].to_numpy().tolist() == ["a", "b"]
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
        (LinearGaussian(np.zeros(2), np.eye(2), np.diag([-1e-12, 1e-12])), {}, ValueError, "noise is no covariance"),
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
        (lambda x, y: 0.0, {"data": np.array(["a"])}, TypeError, "data has a leaf of dtype <U1; numbers are wanted"),
        (lambda x, y: 0.0, {"data": {"a": np.zeros(2), "b": np.zeros(3)}}, ValueError, "data has leaves"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(likelihood, options, error, message):
    with pytest.raises(error, match=message):
        posterior.sample(three_modes(), likelihood, **{"rng_key": KEY, **options})


def test_one_filter_without_particles_is_told():
    log_weight = np.zeros((1, 8, 100))
    log_evidence, ess = np.zeros((1, 8)), np.full((1, 8, 2), 0.9)
    log_weight[0, 3], log_evidence[0, 3], ess[0, 3] = -np.inf, -np.inf, 0.0
    result = Filtered(np.zeros((1, 8, 100, 2)), log_evidence, ess, log_weight)
    with pytest.warns(UserWarning, match="1 of 1 posteriors have collapsed"):
        inference._warn_of_collapse(result, inference._evidence(result, np.arange(1)), np.arange(1))


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


def test_the_arrays_of_components_are_made_in_blocks(monkeypatch):
    fit, sizes = fit_of(*linear_mixture("full", 2)), []

    def recorded(d, params, factors, likelihoods, rng_keys, num_particles):
        sizes.append(rng_keys.size * num_particles * d.components * fit.loc.size**2)
        return whole(d, params, factors, likelihoods, rng_keys, num_particles)

    whole = inference.filters
    monkeypatch.setattr(inference, "filters", recorded)
    monkeypatch.setattr(inference, "_MOST_NUMBERS", 2500)
    posterior.log_evidence(fit, LinearGaussian(np.zeros((6, 1)), A, 1.0), rng_key=KEY, num_particles=50, num_filters=2)
    assert len(sizes) > 1
    assert max(sizes) <= 2500
