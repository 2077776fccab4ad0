"""Units in which draws have the moments of the rows."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.gaussian_starts import start_of

from probdiff import GaussianDiffusion, networks, schedules
from probdiff import fit as fit_diffusion
from probdiff.fitting.matching import match, match_unless_worse, no_worse, stretched
from probdiff.units import Units

KEY = jax.random.key(0)
S = np.array([[1.0, 0.8, 0.1], [0.8, 1.2, -0.2], [0.1, -0.2, 0.5]])
LOC, SCALE = np.array([3.0, -1.0, 10.0]), np.array([2.0, 0.5, 1.0])


@pytest.mark.parametrize("along", ["features", "axes"])
def test_what_is_stretched_has_the_moments_of_the_rows(along):
    rng = np.random.default_rng(0)
    rows, z = rng.normal(size=(200, 3)) @ np.linalg.cholesky(S).T * SCALE + LOC, rng.normal(0.1, 0.7, size=(500, 3))
    units = Units(LOC, SCALE, np.linalg.eigh(S)[1])
    new = stretched(units, rows, units.to_data(z), along)
    draws = new.to_data(z)
    if along == "axes":
        rows, draws = units.to_chain(rows), units.to_chain(draws)
    np.testing.assert_allclose(draws.mean(0), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(draws.std(0), rows.std(0), rtol=1e-12)
    np.testing.assert_allclose(new.to_chain(new.to_data(z)), z, atol=1e-12)
    jacobian = np.diag(new.scale) @ new.axes
    np.testing.assert_allclose(new.log_det, np.log(abs(np.linalg.det(jacobian))), rtol=1e-12)


@pytest.fixture(scope="module")
def fit():
    return start_of(S, "diagonal", LOC, SCALE)


@pytest.mark.parametrize("along", ["features", "axes"])
def test_a_matched_fit_has_the_density_of_its_draws(fit, along):
    """N(m, S) shrunk by a tenth and stretched back: along features it is S again, and along its axes too.

    Of 20,000 rows and draws standard deviations have an error of 0.7 %, and log p of the farthest of 50 rows, whose
    squared distance is about 15, one of 0.1 for three of these.
    """
    narrow = replace(fit, scale=0.9 * fit.scale)
    rows = fit.sample(jax.random.key(1), 20_000)
    x = rows[:50]
    wanted = fit.log_likelihood(x, method="exact").values
    found = match(narrow, rows, along, KEY).log_likelihood(x, method="exact").values
    np.testing.assert_allclose(found, wanted, atol=0.3)
    assert np.abs(narrow.log_likelihood(x, method="exact").values - wanted).max() > 0.9


def test_rows_that_are_held_out_may_speak_against_it(fit):
    """Draws that are too narrow are stretched, but not to three times the width of the rows that are held out."""
    rows = fit.sample(jax.random.key(1), 2_000)
    matched = match_unless_worse(replace(fit, scale=0.9 * fit.scale), rows, rows[:200], KEY)
    np.testing.assert_allclose(matched.scale, fit.scale, rtol=0.05)
    kept = match_unless_worse(fit, 3 * rows, rows[:200], KEY)
    np.testing.assert_array_equal(kept.scale, fit.scale)
    assert no_worse(np.array([0.1, -0.1, 0.2]))
    assert not no_worse(np.array([1.0, 1.1, 0.9]))
    assert not no_worse(np.append(np.zeros(60), 1e6))  # whose standard error is as large as its mean


def test_the_axes_are_next_and_several_chains_are_one_opinion(fit, monkeypatch):
    seen = []
    monkeypatch.setattr("probdiff.fitting.matching.no_worse", lambda loss: seen.append(loss) or len(seen) == 2)
    two = replace(fit, stacked_params=jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), fit.stacked_params))
    rows = fit.sample(jax.random.key(1), 500)
    found = match_unless_worse(two, 2 * rows, rows[:50], KEY)
    np.testing.assert_array_equal(found.axes, match(two, 2 * rows, "axes", KEY).axes)
    assert [loss.shape for loss in seen] == [(50,), (50,)]


def test_what_hardly_varies_is_not_stretched():
    rows, draws = np.random.default_rng(0).normal(size=(2, 60, 2))
    rows[:, 1] = 7.0
    units = stretched(Units(np.zeros(2), np.ones(2)), rows, draws, "features")
    assert units.scale[1] == 1
    np.testing.assert_allclose(units.to_data(draws)[:, 1].mean(), 7.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:feature")
@pytest.mark.parametrize("num_rows", [60, 300])
def test_draws_of_a_fit_of_some_rows_vary_as_they_do(num_rows):
    """Cross-validated and held out by default. Of 60 rows a column varies in one alone, and so in no fold but four."""
    x = np.random.default_rng(0).normal(size=(num_rows, 2)) * [3.0, 0.1]
    x[:, 1] = np.where(np.arange(num_rows) == 7, 1.0, 0.0) if num_rows == 60 else x[:, 1]
    d = GaussianDiffusion((2,), schedules.LearnedBetas(4), networks.ResidualMLP(8, 1))
    fit = fit_diffusion(d, x, rng_key=KEY, num_steps=300, progress_bar=False)
    assert fit.validation.size
    np.testing.assert_allclose(fit.sample(KEY, 20_000).std(0)[0], x.std(0)[0], rtol=0.03)
