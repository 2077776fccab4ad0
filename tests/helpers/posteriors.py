"""Fits to a few normals, whose posteriors are known, that tests share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers.once import once
from numpyro import handlers
from scipy import stats

from probdiff import GaussianDiffusion, schedules
from probdiff.results import Fit

FAILURE = 1e-4  # of a right program, for each test
A = np.array([[0.7, -0.4]])
KEY = jax.random.key(7)


class Denoiser(eqx.Module):
    """Nearly E[x_0 given x_t] and Var(x_0 given x_t) of equal normals of one covariance, in the chain's units."""

    means: jax.Array
    values: jax.Array
    vectors: jax.Array
    num_outputs: int = eqx.field(static=True)

    def __call__(self, x_t, log_snr):
        D, signal, noise = self.means.shape[1], jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        x = 1.05 * jnp.ravel(x_t) + 0.03  # not quite, so that p is not the reversal of q
        total = signal * self.values + noise
        residual = (x - jnp.sqrt(signal) * self.means) @ self.vectors
        weights = jax.nn.softmax(-0.5 * jnp.sum(residual**2 / total, 1))
        each = self.means + (jnp.sqrt(signal) * self.values / total * residual) @ self.vectors.T
        mean = weights @ each
        variance = weights @ (each - mean) ** 2 + self.vectors**2 @ (noise * self.values / total)
        outputs = (mean - jnp.sqrt(signal) * jnp.ravel(x_t)) / jnp.sqrt(noise)
        spread = 8 * jnp.arctanh(jnp.clip(jnp.log(variance / noise) / 16, -0.99, 0.99))
        return jnp.concatenate([outputs, spread, jnp.full(D * D, 0.2)])[: self.num_outputs]


class Sensor(eqx.Module):
    """A likelihood that cannot be hashed."""

    gain: jax.Array

    def __call__(self, x):
        return -0.5 * ((self.gain @ x - 2.5) / 0.3) ** 2

    def log_prob(self, x):
        return self(x)


def fitted(covariance, means, C, T=5, loc=0.0, scale=1.0, event_shape=None):
    """A fit to equal normals at `means`, near the reversal of q."""
    means, schedule = np.atleast_2d(means), schedules.log_snr_linear(T, 3.0, -4.0)
    D = means.shape[1]
    outputs = {"fixed": D, "diagonal": 2 * D, "full": 2 * D + D * (D - 1) // 2}[covariance]
    network = Denoiser(jnp.asarray(means), *map(jnp.asarray, np.linalg.eigh(C)), outputs)
    d = GaussianDiffusion(event_shape or (D,), schedule, network, covariance)
    params = jax.tree.map(lambda leaf: leaf[None], d.initial_params(jax.random.key(0)))
    loc, scale = np.broadcast_to(loc, d.event_shape).astype(float), np.broadcast_to(scale, d.event_shape).astype(float)
    return Fit(d, params, np.zeros((1, 1)), np.zeros((1, 0)), loc, scale)


@once
def linear_fit(covariance, T=5):
    """A linear-Gaussian chain in units of its own, and the mean and covariance of its x_0 in the data's."""
    fit = fitted(covariance, [0.2, -0.1], [[1.1, 0.5], [0.5, 0.7]], T, [1.0, -2.0], [2.0, 0.5])
    _, kernel = handlers.substitute(fit.diffusion.kernels, data=fit.params)()
    mean, cov = np.zeros(2), np.eye(2)
    for t in range(T, 0, -1):
        f_mu = lambda x, t=t: kernel(x, t).mean  # noqa: E731
        slope, p = np.asarray(jax.jacfwd(f_mu)(jnp.zeros(2))), kernel(jnp.asarray(mean), t)
        f_sigma = np.asarray(p.covariance_matrix if covariance == "full" else jnp.diag(p.variance))
        mean, cov = np.asarray(p.mean), slope @ cov @ slope.T + f_sigma
    scale = np.diag(fit.scale)
    return fit, fit.loc + scale @ mean, scale @ cov @ scale


@once
def three_modes(covariance="full"):
    return fitted(covariance, [[-1.2, 0.3], [0.0, -1.0], [1.2, 0.7]], 0.1 * np.eye(2), 5, [1.0, -2.0], [2.0, 0.5])


def conditioned(mean, cov, y, A, R):
    """Posterior mean and covariance, and log p(y)."""
    S = A @ cov @ A.T + R
    gain = cov @ A.T @ np.linalg.inv(S)
    return mean + gain @ (y - A @ mean), cov - gain @ A @ cov, stats.multivariate_normal(A @ mean, S).logpdf(y)


def assert_close(values, exact, degrees, comparisons=1):
    """Independent estimates, leading axis, agree in the mean with the exact value."""
    z = (values.mean(0) - exact) / (values.std(0, ddof=1) / np.sqrt(len(values)))
    assert np.all(np.abs(z) < stats.t(degrees).isf(FAILURE / 2 / comparisons)), z
