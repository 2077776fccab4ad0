"""The empty cells of a table, filled."""

import numpy as np
import pytest
from helpers.posteriors import KEY, linear_fit

from probdiff.posterior.imputation import impute


@pytest.mark.slow
def test_integers_of_a_table_are_filled_with_integers():
    fit = linear_fit("full")[0]
    x = np.array([[3.0, np.nan], [np.nan, -2.0], [1.5, -2.0]])
    options = {"rng_key": KEY, "num_draws": 20, "num_particles": 100}
    frame, dt = impute(fit, x, ["size", "count"], np.array([False, True]), **options)
    assert (frame["count"] == np.floor(frame["count"])).all()
    assert frame["count"][:20].nunique() > 1
    known = np.tile(x[:, None], (1, 20, 1)).reshape(-1, 2)
    np.testing.assert_allclose(np.where(np.isnan(known), known, frame[["size", "count"]]), known, rtol=1e-6)
    np.testing.assert_array_equal(dt["observed_data"].dataset["x_0"], x[:2])
    counts = dt["posterior"].dataset["x_0"].sel(feature="count").to_numpy()
    assert (counts == np.floor(counts)).all()
    halves, _ = impute(fit, x - [[0.0, 0.5]], ["size", "count"], np.array([False, True]), **options)
    assert (halves["count"][20:] == -2.5).all()  # as they are, though no integers
    far = np.array([[3.0, 4.0], [np.nan, 400.0]])
    with pytest.warns(UserWarning, match=r"in row\(s\) 1; worst in row 1"):
        impute(fit, far, ["size", "count"], np.array([False, False]), **options)
    with pytest.raises(ValueError, match=r"the table has infinite entries, in row\(s\) 2"):
        impute(fit, np.append(x[:2], [[1.0, np.inf]], 0), ["size", "count"], np.array([False, True]), **options)
    with pytest.raises(ValueError, match="a feature is called 'row'"):
        impute(fit, x, ["row", "count"], np.array([False, True]), **options)
