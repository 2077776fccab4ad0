"""The exact log-likelihood against closed forms."""

import jax
import numpy as np
import pytest
from helpers.diffusions import linear_mixture, mlp_diffusion, random_params
from helpers.likelihoods import linear

from probdiff import schedules
from probdiff.likelihood import exact
from probdiff.likelihood.smc import smc


@pytest.mark.parametrize("covariance", ["fixed", "diagonal", "full"])
def test_exact_is_the_normal_of_a_linear_chain(covariance):
    d, params, p = linear(covariance)
    x = np.random.default_rng(0).normal(size=(5, 2))
    found = exact.exact(d, params, x)
    assert found.kind == "exact"
    # the diffusion's own params are float32
    np.testing.assert_allclose(found.values, p.logpdf(x), rtol=1e-6)


@pytest.mark.parametrize("covariance", ["fixed", "diagonal", "full"])
def test_a_linear_chain_of_mixtures_is_a_finite_mixture(x64, covariance):
    """Beside particle filters of the same chain, and on the line beside quadrature."""
    size = 2 if covariance == "full" else 1
    d, params = linear_mixture(covariance, size)
    x = np.random.default_rng(0).normal(size=(4, size))
    found = exact.exact(d, params, x)
    if size == 1:
        np.testing.assert_allclose(exact._quadrature(d, params, x), found.values, rtol=1e-8)
    filters = smc(d, params, x, rng_key=jax.random.key(0), num_particles=200, num_draws=20)
    assert np.all(np.abs(filters.values - found.values) < 5 * filters.values_mcse + 1e-3)


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
