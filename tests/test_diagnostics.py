from dataclasses import replace

import arviz as az
import jax
import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from helpers.diffusions import light_diffusion
from scipy.spatial.distance import cdist

import probdiff
from probdiff import datasets, diagnostics, plots

mpl.use("agg")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def x():
    return 3.0 + 2.0 * np.asarray(datasets.eight_gaussians().sample(KEY, 1500), np.float64)


@pytest.fixture(scope="module")
def fitted(x):
    d, options = light_diffusion(width=16), {"num_steps": 500, "check_every": 500, "times": "even", "validation": 0.0}
    return probdiff.fit(d, x[:1000], rng_key=KEY, num_chains=2, progress_bar=False, **options)


@pytest.fixture(scope="module")
def dt(fitted, x):
    return fitted.to_datatree(x[1000:1120], rng_key=KEY, num_draws=100, features=["east", "north"])


def test_groups_have_the_dims_and_coordinates_that_arviz_wants(dt, fitted, x):
    sizes = {"chain": 2, "draw": 100, "t": 6, "feature": 2}
    for group in ("posterior", "forward", "pit"):
        assert dict(dt[group]["x"].sizes) == sizes
        np.testing.assert_array_equal(dt[group]["t"], range(6))
        assert dt[group]["feature"].to_numpy().tolist() == ["east", "north"]
    assert dict(dt["log_likelihood"]["x_0"].sizes) == {"chain": 2, "draw": 100, "datum": 120}
    assert dt["importance"]["log_weight"].dims == ("chain", "draw", "datum")
    assert dt["fit"]["loss"].dims == ("chain", "step")
    np.testing.assert_allclose(dt["fit"]["beta"], fitted.beta)
    np.testing.assert_allclose(dt["fit"]["log_snr"], fitted.log_snr)
    np.testing.assert_array_equal(dt["observed_data"]["x_0"], x[1000:1120])
    drawn = dt["posterior_predictive"]["x_0"]
    np.testing.assert_allclose(drawn, fitted.loc + fitted.scale * dt["posterior"]["x"].sel(t=0), rtol=1e-5)
    # the forward draws at t = 0 are the data, in the chain's units
    data = {tuple(row) for row in ((x[1000:1120] - fitted.loc) / fitted.scale).round(4).tolist()}
    assert {tuple(row) for row in dt["forward"]["x"][0].sel(t=0).to_numpy().astype(float).round(4).tolist()} <= data


def test_bound_parts_and_weights_tell_one_story(dt, fitted, x):
    bound = fitted.log_likelihood(x[1000:1120], rng_key=jax.random.key(7), num_draws=100)
    per_datum = dt["log_likelihood"]["x_0"].mean("draw")
    spread = np.hypot(bound.values_mcse, dt["log_likelihood"]["x_0"].std("draw"))
    assert np.all(np.abs(per_datum - bound.values) < 6 * spread + 1e-6)
    total = dt["fit"]["elbo_part"].sum("t") - dt["fit"]["prior_kl"]
    np.testing.assert_allclose(total, per_datum.mean("datum"), rtol=1e-5)
    weights = dt["importance"]["log_weight"]
    # E log w = K, and log E w = log p(x_0) lies above it
    error = 5 * np.asarray(weights.std("draw").mean("datum")) / np.sqrt(100 * 120) + 0.02
    assert np.all(np.abs(weights.mean(("draw", "datum")) - bound.mean) < error)


def test_netcdf_gives_the_tree_back_unchanged(dt, tmp_path):
    dt.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    xr.testing.assert_identical(dt, az.from_netcdf(tmp_path / "fit.nc"))


def test_az_summary(dt):
    table = az.summary(dt, var_names=["x"])
    assert len(table) == 12
    # independent draws of equal fits: R̂ near one and an effective size near the number of draws
    assert np.all(table["r_hat"].astype(float) < 1.1)


def test_az_ess_and_rhat(dt):
    assert np.all(az.ess(dt)["x"] > 50)
    assert az.rhat(dt)["x"].dims == ("t", "feature")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_az_plot_forest(dt):
    assert az.plot_forest(dt, var_names=["x"], coords={"t": [0, 5]}) is not None


def test_az_plot_dist(dt):
    assert az.plot_dist(dt, var_names=["x"], coords={"t": [0, 3]}) is not None


def test_az_plot_ridge(dt):
    assert az.plot_ridge(dt, var_names=["x"], coords={"feature": ["east"]}) is not None


def test_az_plot_ecdf_pit(dt):
    assert az.plot_ecdf_pit(dt, group="pit", var_names=["x"], coords={"t": [0, 5]}) is not None


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # two poor fits of one ring differ at some data
def test_az_loo_and_compare(dt, fitted, x):
    loo = az.loo(dt.sel(chain=[0]), var_name="x_0")
    bound = dt["log_likelihood"]["x_0"][0].mean("draw").sum()
    assert loo.elpd == pytest.approx(float(bound), abs=3.0)
    worse = replace(fitted, stacked_params=jax.tree.map(lambda leaf: 0.5 * leaf, fitted.stacked_params))
    other = worse.to_datatree(x[1000:1120], rng_key=KEY, num_draws=100)
    table = az.compare({"fitted": dt, "hardly": other}, var_name="x_0")
    assert table.index[0] == "fitted"


def tree(p, q, weights=None):
    """A data tree of given reverse and forward draws, (chain, draw, t, feature)."""
    if weights is None:
        weights = np.random.default_rng(0).normal(size=(p.shape[0], p.shape[1], 3))
    names = {"dims": {"x": ["t", "feature"]}}
    return xr.DataTree.from_dict(
        {
            "posterior": az.dict_to_dataset({"x": p}, **names),
            "forward": az.dict_to_dataset({"x": q}, **names),
            "observed_data": az.dict_to_dataset(
                {"x_0": q[0, :, 0]}, dims={"x_0": ["datum", "feature"]}, sample_dims=[]
            ),
            "importance": az.dict_to_dataset({"log_weight": weights}, dims={"log_weight": ["datum"]}),
        }
    )


@pytest.mark.parametrize(("num_pairs", "most"), [(40, 8), pytest.param(200, 22, marks=pytest.mark.slow)])
def test_verdict_is_calibrated_when_p_is_q(num_pairs, most):
    """Of pairs of equal laws P(p ≤ 0.05) ≤ 0.05: more than `most` rejections come in less than one of 2,000 seeds."""
    rng = np.random.default_rng(1)
    rejected = 0
    for seed in range(num_pairs):
        p, q = rng.normal(size=(2, 1, 30, 41, 1))
        rejected += diagnostics.marginals(tree(p, q), seed=seed, num_permutations=99).p_value <= 0.05
    assert rejected <= most


@pytest.mark.parametrize("what", ["mean", "scale", "correlation"])
def test_verdict_finds_what_differs(what):
    p, q = np.random.default_rng(2).normal(size=(2, 2, 300, 4, 2))
    if what == "mean":
        p[1, :, 2, 0] += 0.5
    elif what == "scale":
        p[1, :, 2] *= 1.6
    else:  # the marginals of each feature stay as they are
        p[1, :, 2, 1] = 0.95 * p[1, :, 2, 0] + np.sqrt(1 - 0.95**2) * p[1, :, 2, 1]
    report = diagnostics.marginals(tree(p, q))
    assert report.p_value < 0.01
    assert "marginals differ from" in report.verdict
    assert "most at t = 2 of chain 1" in report.verdict
    assert "No difference" in diagnostics.marginals(tree(q[:, ::-1], q)).verdict


def test_many_chains_and_few_data_have_honest_verdicts():
    rng = np.random.default_rng(6)
    p, q = rng.normal(size=(2, 8, 100, 3, 1))
    p[5, :, 1] += 3
    assert "marginals differ from" in diagnostics.marginals(tree(p, q)).verdict
    with pytest.raises(ValueError, match="there are 1 draws of different data"):
        diagnostics.marginals(tree(p[:1, :1], q[:1, :1]))
    with pytest.raises(ValueError, match="and 0 permutations"):
        diagnostics.marginals(tree(p, q), num_permutations=0)


def test_distances_are_those_of_scipy_and_of_their_definition():
    p, q = np.random.default_rng(3).normal(size=(2, 1, 60, 2, 3))
    p = p * 1.3 + 0.2
    table = diagnostics.marginals(tree(p, q), num_permutations=99).table
    for row in table.itertuples():
        a, b = p[0, :, row.t], q[0, :, row.t]
        assert row.wasserstein == pytest.approx(
            scipy.stats.wasserstein_distance(a[:, row.feature], b[:, row.feature]), rel=1e-3
        )
        assert row.ks == pytest.approx(scipy.stats.ks_2samp(a[:, row.feature], b[:, row.feature]).statistic, abs=1e-5)
        energy = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
        assert row.energy == pytest.approx(energy, rel=1e-3)


@pytest.mark.parametrize("figure", ["samples", "marginals_over_time", "schedule", "elbo_parts", "loss"])
def test_figures_have_labelled_axes(dt, figure):
    drawn = getattr(plots, figure)(dt)
    assert drawn.axes
    if figure == "marginals_over_time":
        assert drawn.get_supxlabel()
    else:
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn.axes)


def test_figure_of_the_report(dt):
    report = diagnostics.marginals(dt, num_permutations=99)
    assert set(report.table.columns) >= {"chain", "t", "feature", "wasserstein", "ks", "energy", "r_hat"}
    assert len(report.table) == 2 * 6 * 2
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in plots.marginal_distances(report).axes)


def test_bad_requests_are_refused(fitted, x):
    with pytest.raises(ValueError, match="features has 1 names"):
        fitted.to_datatree(x[:5], rng_key=KEY, features=["one"])
    with pytest.raises(ValueError, match="num_draws is 2;"):
        fitted.to_datatree(x[:5], rng_key=KEY, num_draws=2)
    with pytest.raises(ValueError, match="x has shape"):
        fitted.to_datatree(x[:, :1], rng_key=KEY)


def test_many_steps_show_a_row_of_times():
    assert diagnostics.times_shown(40) == list(range(41))
    times = diagnostics.times_shown(1000)
    assert len(times) == 51
    assert times[0] == 0
    assert times[-1] == 1000
