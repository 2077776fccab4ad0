"""The exact log-likelihood against closed forms."""

import numpy as np
import pytest
from helpers.diffusions import mlp_diffusion, random_params
from helpers.likelihoods import linear

from probdiff import schedules
from probdiff.likelihood import exact


@pytest.mark.parametrize("covariance", ["fixed", "diagonal", "full"])
def test_exact_is_the_normal_of_a_linear_chain(covariance):
    d, params, p = linear(covariance)
    x = np.random.default_rng(0).normal(size=(5, 2))
    found = exact.exact(d, params, x)
    assert found.kind == "exact"
    # the diffusion's own params are float32
    np.testing.assert_allclose(found.values, p.logpdf(x), rtol=1e-6)


def test_quadrature_is_the_normal_of_a_linear_chain(x64):
    d, params, p = linear("diagonal", 1)
    x = np.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(exact._quadrature(d, params, x), p.logpdf(x), rtol=1e-9)


def test_exact_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"event_shape \(2,\)"):
        exact.exact(mlp_diffusion(), random_params(mlp_diffusion()), np.ones((3, 2)))
    narrow = mlp_diffusion("fixed", schedules.Fixed([1e-7, 0.9]), (1,))
    with pytest.raises(ValueError, match="a grid of"):
        exact.exact(narrow, random_params(narrow), np.ones((3, 1)))
