"""The guided forms of a likelihood against the exact Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probdiff.posterior import guidance
from probdiff.posterior.guidance import GuidedLinearGaussian, GuidedSmooth

pytestmark = pytest.mark.usefixtures("x64")
FAILURE = 1e-4  # of a right program, for each test
A, ROOT, Y = np.array([[0.7, -0.4]]), np.array([[0.3]]), np.array([0.5])
F = np.array([[0.9, 0.0], [0.3, 0.6]])
MEANS = np.array([[0.2, -0.1], [1.0, 0.5], [-2.0, 0.7]])


def linear():
    return GuidedLinearGaussian(*map(jnp.asarray, (Y, A, ROOT, 0.0)))


def log_g(x, datum):
    return -0.5 * jnp.sum((datum["y"] - A @ x) ** 2) / 0.09 - jnp.log(0.3 * jnp.sqrt(2 * jnp.pi))


def exact():
    """log p(y), the shifts of the mean and the reduction of the covariance, by textbook formulas in NumPy."""
    V = F @ F.T
    S = A @ V @ A.T + ROOT @ ROOT.T
    gain = V @ A.T @ np.linalg.inv(S)
    log_p = [stats.multivariate_normal(A @ mean, S).logpdf(Y) for mean in MEANS]
    return log_p, (Y - MEANS @ A.T) @ gain.T, gain @ A @ V


@pytest.mark.parametrize("each", [False, True])
def test_guidance_of_a_linear_likelihood_is_the_exact_gaussian(each):
    root = np.broadcast_to(F, (3, 2, 2)) if each else F  # one factor for all particles, or one for each
    found = jax.jit(lambda m, F: linear().guidance(m, F))(MEANS, root)
    log_p, shift, reduction = exact()
    np.testing.assert_allclose(found.log_psi, log_p, rtol=1e-10)
    np.testing.assert_allclose(found.mean_shift, shift, rtol=1e-10)
    np.testing.assert_allclose(found.covariance_reduction, np.broadcast_to(reduction, root.shape), rtol=1e-10)


def test_laplace_of_a_gaussian_likelihood_is_the_linear_form():
    smooth = GuidedSmooth({"y": jnp.asarray(Y)}, log_g)
    laplace, found = jax.jit(lambda m, F: (smooth._laplace(m, F)[0], smooth.guidance(m, F)))(MEANS, F)
    log_p, shift, reduction = exact()
    np.testing.assert_allclose(laplace, log_p, rtol=1e-9)
    np.testing.assert_allclose(found.mean_shift, shift, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.covariance_reduction, np.broadcast_to(reduction, (3, 2, 2)), rtol=1e-9)


def test_draws_by_matherons_rule_are_of_the_conditioned_normal():
    n = 4000
    means = np.repeat(MEANS[:1], n, 0)
    factors = np.tile(F, (n, 1, 1))
    draws, log_w = jax.jit(lambda m, F: linear().propose_x_0(m, F, jax.random.key(0)))(means, factors)
    log_p, shift, reduction = exact()
    np.testing.assert_allclose(log_w, log_p[0], rtol=1e-10)
    cov = F @ F.T - reduction
    z = (np.mean(draws, 0) - MEANS[0] - shift[0]) / np.sqrt(np.diag(cov) / n)
    assert np.all(np.abs(z) < stats.norm.isf(FAILURE / 10))
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert np.all(np.abs(np.cov(draws, rowvar=False) - cov) < stats.norm.isf(FAILURE / 10) * error)


def test_blocks_of_particles_give_what_all_give_at_once(monkeypatch):
    """Three at a time, of seven, whose factors are diagonal; for every kind of likelihood."""
    rng = np.random.default_rng(0)
    mean, scale, key = rng.normal(size=(7, 2)), jnp.asarray(rng.uniform(0.5, 2, size=(7, 2))), jax.random.key(0)
    datum = {"y": jnp.asarray(Y)}
    missing = guidance.GuidedMissing(jnp.array([0.4, 0.0]), jnp.array([True, False]), jnp.array(0.3))
    kinds = (linear(), missing, GuidedSmooth(datum, log_g), guidance.GuidedBlackBox(datum, log_g))
    for likelihood in kinds:
        at_once = jax.jit(lambda m, s, g=likelihood: g.propose_x_0(m, s, key))(mean, scale)
        as_matrices = jax.jit(lambda m, s, g=likelihood: g.propose_x_0(m, guidance.as_matrix(s), key))(mean, scale)
        with monkeypatch.context() as patch:
            patch.setattr(guidance, "_MOST_NUMBERS", 12)
            in_blocks = jax.jit(lambda m, s, g=likelihood: g.propose_x_0(m, s, key))(mean, scale)
        for found in (as_matrices, in_blocks):
            for values, wanted in zip(found, at_once, strict=True):
                np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
