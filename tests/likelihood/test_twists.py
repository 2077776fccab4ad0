"""Kernels tilted by a quadratic against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from probdiff.likelihood import twists


@pytest.mark.parametrize("full_kernel", [False, True])
@pytest.mark.parametrize("full_twist", [False, True])
def test_a_tilted_kernel_is_that_of_quadrature(x64, full_kernel, full_twist):
    scale_tril = np.array([[0.8, 0.0], [0.7, 0.3]])
    mean = jnp.array([0.3, -0.2])
    normal = dist.Normal(mean, jnp.array([0.8, 0.3])).to_event(1)
    p = dist.MultivariateNormal(mean, scale_tril=jnp.asarray(scale_tril)) if full_kernel else normal
    curvature = jnp.array([[1.5, 0.6], [0.6, 0.9]]) if full_twist else jnp.array([1.5, 0.9])
    twist = twists.Twist(
        jnp.array([0.1, 0.2]), jnp.array([0.7, 0.7]), jnp.asarray(0.4), jnp.array([0.5, -1.0]), curvature
    )
    tilted, log_mass = twists.tilted(p, twist)
    y = np.linspace(-8, 8, 801)
    grid = np.stack(np.meshgrid(y, y, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(np.asarray(p.log_prob(grid) + twist(jnp.asarray(grid))))
    mass = density.sum() * (y[1] - y[0]) ** 2
    assert log_mass == pytest.approx(np.log(mass), rel=1e-6)
    np.testing.assert_allclose(np.exp(tilted.log_prob(grid)), density / mass, atol=1e-6)


def test_a_kernel_that_is_nearly_singular_can_be_tilted():
    scale_tril = jnp.eye(4) * jnp.array([1.0, 1e-4, 1.0, 1e-4]) + jnp.tril(jnp.ones((4, 4)), -1)
    p = dist.MultivariateNormal(jnp.zeros(4), scale_tril=scale_tril)
    twist = twists.Twist(jnp.zeros(4), jnp.ones(4), jnp.zeros(()), jnp.ones(4), 0.1 * jnp.eye(4))
    tilted, log_mass = jax.jit(twists.tilted)(p, twist)
    assert np.all(np.isfinite(tilted.scale_tril))
    assert np.all(np.diagonal(tilted.scale_tril) > 0)
    assert np.isfinite(log_mass)
