"""The density of the probability-flow ODE against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.likelihoods import KEY, Z, fit_of_a_mixture

from probdiff import GaussianDiffusion, datasets, schedules
from probdiff.likelihood import flow


@pytest.fixture(scope="module")
def fitted():
    return fit_of_a_mixture()


class ExactDenoiser(eqx.Module):
    """The outputs with which x̂_0 is E[x_0 given x_t], and f_Σ its best, for a mixture of isotropic Gaussians."""

    weights: jax.Array
    means: jax.Array
    variance: float

    def __call__(self, x, log_snr):
        a, b = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        total = a * self.variance + b
        residual = x - jnp.sqrt(a) * self.means
        share = jax.nn.softmax(jnp.log(self.weights) - 0.5 * (residual**2).sum(-1) / total)
        mean = share @ (self.means + jnp.sqrt(a) * self.variance / total * residual)
        return jnp.concatenate(
            [(mean - jnp.sqrt(a) * x) / jnp.sqrt(b), jnp.log(jnp.full(x.size, self.variance / total)) / 2]
        )


@pytest.mark.parametrize("num_features", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_flow_of_the_exact_denoiser_has_the_exact_density(num_features):
    rng = np.random.default_rng(0)
    weights, means = np.array([0.2, 0.3, 0.5]), rng.normal(size=(3, num_features))
    mixture = datasets.GaussianMixture(weights, means, np.tile(0.04 * np.eye(num_features), (3, 1, 1)))
    network = ExactDenoiser(jnp.asarray(weights), jnp.asarray(means), 0.04)
    d = GaussianDiffusion((num_features,), schedules.log_snr_linear(100, 9.0, -9.0), network, "diagonal")
    params = {"network$params": eqx.partition(network, eqx.is_inexact_array)[0]}
    x = np.asarray(mixture.sample(KEY, 16))
    found = flow.ode(d, params, x, rng_key=KEY, num_draws=8)
    difference = found.values - np.asarray(mixture.log_prob(x))
    assert found.kind == ("estimate" if num_features == 2 else "lower bound")
    if num_features == 2:
        assert np.abs(difference).max() < 0.02
    else:  # Hutchinson's divergence has an error of its own, which it states
        assert abs(difference.mean()) < Z * found.mcse
        assert found.mcse < 0.2


def test_flow_density_integrates_to_one(fitted):
    x = np.linspace(-3, 3, 601)[:, None]
    found = fitted.log_likelihood(x, rng_key=KEY, method="ode", num_draws=16)
    density, h = np.exp(found.values), x[1, 0] - x[0, 0]
    error = np.sqrt(np.sum((density * found.values_mcse) ** 2)) * h
    assert abs(density.sum() * h - 1) < Z * error
    assert error < 0.02
