"""k̂ of importance weights: light and heavy tails, ties, and weights of zero."""

import numpy as np
import pytest
import xarray as xr

from probdiff import psis


def test_pareto_k_tells_light_tails_from_heavy_ones_and_takes_equal_weights():
    rng = np.random.default_rng(4)
    log_weights = np.stack(
        [rng.normal(size=(1, 2000)), 2 * rng.standard_exponential((1, 2000)), np.zeros((1, 2000))], -1
    )
    weights = xr.DataArray(log_weights, dims=["chain", "draw", "datum"])
    k = psis.pareto_k(weights).to_numpy()[0]
    assert k[0] < 0.7
    assert 1.5 < k[1] < 2.5  # exp of twice an exponential has Pareto tail index 1/2, k = 2
    assert k[2] == -np.inf


def test_pareto_k_takes_ties_for_ties_only_and_weights_of_zero():
    """Dense smooth weights are left as they are; a weight of zero stays zero, and warns of nothing."""
    log_w = np.random.default_rng(0).normal(size=(2, 3000)) * 5e-3
    np.testing.assert_array_equal(psis._without_ties(log_w), log_w)
    tied = np.repeat(np.random.default_rng(1).normal(size=(1, 300)), 10, axis=1)
    assert len(np.unique(psis._without_ties(tied))) == 3000
    zero = np.where(np.arange(3000) == 7, -np.inf, np.repeat(log_w[:1, :300], 10, axis=1))
    spread = psis._without_ties(zero)
    assert spread[0, 7] == -np.inf
    np.testing.assert_array_equal(np.delete(spread, 7, 1), psis._without_ties(np.delete(zero, 7, 1)))


@pytest.mark.parametrize("most", [-1.0, 0.0, 1.0, 1.5])
def test_pareto_k_of_weights_with_a_largest_value_that_many_share(most):
    """As of a likelihood that saturates; a share of 0.84, 0.5, 0.16 and 0.07 is at the largest value."""
    log_w = np.minimum(np.random.default_rng(0).normal(size=(4000, 1)), most)
    for one in (log_w, np.where(log_w < most, -1e4, log_w), np.where(log_w < most, -np.inf, log_w)):
        assert psis.pareto_k(xr.DataArray(one, dims=["draw", "datum"])).item() == -np.inf


@pytest.mark.parametrize("zero", [-np.inf, -1e4])
def test_pareto_k_of_few_weights_that_are_positive_is_not_safe(zero):
    log_w = np.full((4000, 1), zero)
    log_w[7] = 0.0
    assert psis.pareto_k(xr.DataArray(log_w, dims=["draw", "datum"])).item() > 1


def test_pareto_k_of_weights_that_are_worlds_apart_is_infinite():
    log_weights = 1e4 * np.random.default_rng(0).normal(size=(1, 250, 20))
    k = psis.pareto_k(xr.DataArray(log_weights, dims=["chain", "draw", "datum"])).to_numpy()
    assert np.all(k > 1)
    assert np.any(k == np.inf)


def test_threshold_grows_with_the_draws_up_to_seven_tenths():
    assert psis.k_threshold(100) == pytest.approx(0.5)
    assert psis.k_threshold(10_000) == 0.7


def test_k_of_few_draws_is_nan_and_of_many_that_of_each_datum():
    log_w = np.random.default_rng(4).normal(size=(400, 3))
    assert np.isnan(psis.k_of_draws(log_w[:24])).all()
    expected = [psis.pareto_k(xr.DataArray(one, dims=["draw"])).item() for one in log_w.T]
    np.testing.assert_allclose(psis.k_of_draws(log_w), expected)
