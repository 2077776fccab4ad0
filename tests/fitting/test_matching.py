"""Units in which draws have the moments of the rows."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.gaussian_starts import start_of

from probdiff.fitting.matching import match, match_unless_worse, no_worse, stretched
from probdiff.units import Units

KEY = jax.random.key(0)
S = np.array([[1.0, 0.8, 0.1], [0.8, 1.2, -0.2], [0.1, -0.2, 0.5]])
LOC, SCALE = np.array([3.0, -1.0, 10.0]), np.array([2.0, 0.5, 1.0])


@pytest.mark.parametrize("kind", ["features", "axes"])
def test_what_is_stretched_has_the_moments_of_the_rows(kind):
    rng = np.random.default_rng(0)
    rows, z = rng.normal(size=(200, 3)) @ np.linalg.cholesky(S).T * SCALE + LOC, rng.normal(0.1, 0.7, size=(500, 3))
    units = Units(LOC, SCALE, np.linalg.eigh(S)[1])
    new = stretched(units, rows, units.to_data(z), kind)
    draws = new.to_data(z)
    if kind == "axes":
        rows, draws = units.to_chain(rows), units.to_chain(draws)
    np.testing.assert_allclose(draws.mean(0), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(draws.std(0), rows.std(0), rtol=1e-12)
    np.testing.assert_allclose(new.to_chain(new.to_data(z)), z, atol=1e-12)
    jacobian = np.diag(new.scale) @ new.axes
    np.testing.assert_allclose(new.log_det, np.log(abs(np.linalg.det(jacobian))), rtol=1e-12)


@pytest.fixture(scope="module")
def fit():
    return start_of(S, "diagonal", LOC, SCALE)


@pytest.mark.parametrize("kind", ["features", "axes"])
def test_a_matched_fit_has_the_density_of_its_draws(fit, kind):
    """N(m, S) shrunk by a tenth and stretched back: by features it is S again, and by its own axes too."""
    narrow = replace(fit, scale=0.9 * fit.scale)
    rows = fit.sample(jax.random.key(1), 20_000)
    x = rows[:50]
    wanted = fit.log_likelihood(x, method="exact").values
    found = match(narrow, rows, kind, KEY).log_likelihood(x, method="exact").values
    np.testing.assert_allclose(found, wanted, atol=0.15)
    assert np.abs(narrow.log_likelihood(x, method="exact").values - wanted).max() > 0.3


def test_rows_that_are_held_out_may_speak_against_it(fit):
    """Draws that are too narrow are stretched, but not to three times the width of the rows that are held out."""
    rows = fit.sample(jax.random.key(1), 2_000)
    matched = match_unless_worse(replace(fit, scale=0.9 * fit.scale), rows, rows[:200], KEY)
    np.testing.assert_allclose(matched.scale, fit.scale, rtol=0.05)
    kept = match_unless_worse(fit, 3 * rows, rows[:200], KEY)
    np.testing.assert_array_equal(kept.scale, fit.scale)
    assert no_worse(np.array([0.1, -0.1, 0.2]))
    assert not no_worse(np.array([1.0, 1.1, 0.9]))
