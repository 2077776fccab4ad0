"""The simple densities that a fit is seen beside."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from probdiff.baselines import baselines


def test_of_a_normal_both_are_near_it():
    rng = np.random.default_rng(0)
    cov = np.array([[4.0, 1.9, 0.0], [1.9, 1.0, 0.0], [0.0, 0.0, 1e4]])
    x = rng.multivariate_normal([1.0, -2.0, 1e5], cov, 3000)
    exact = stats.multivariate_normal([1.0, -2.0, 1e5], cov).logpdf(x[2000:])
    for name, values in baselines(x[:2000], x[2000:]).items():
        lost = exact - values
        assert abs(lost.mean()) < 4 * lost.std() / len(lost) ** 0.5 + 0.01, name


def test_of_a_mixture_the_mixture_is_found():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(-5, 1, (1500, 2)), rng.normal(5, 0.5, (1500, 2))])[rng.permutation(3000)]
    exact = np.logaddexp(
        stats.norm(-5, 1).logpdf(x[2000:]).sum(1), stats.norm(5, 0.5).logpdf(x[2000:]).sum(1)
    ) - np.log(2)
    (_, gaussian), (name, mixture) = baselines(x[:2000], x[2000:]).items()
    assert name == "mixture of 2 Gaussian(s), full" or "diag" in name
    lost = exact - mixture
    assert abs(lost.mean()) < 4 * lost.std() / len(lost) ** 0.5 + 0.02
    assert (exact - gaussian).mean() > 0.5


def test_frames_are_taken_by_name():
    x = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 5.0]
    frame = pd.DataFrame(x, columns=["a", "b"])
    of_arrays, of_frames = baselines(x[:40], x[40:]), baselines(frame[:40], frame[40:][["b", "a"]])
    for name, values in of_arrays.items():
        np.testing.assert_array_equal(of_frames[name], values)
    with pytest.raises(ValueError, match=r"train has shape \(40, 2\) and test \(20, 1\)"):
        baselines(x[:40], x[40:, :1])
