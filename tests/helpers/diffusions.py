"""Small diffusions and fits that tests share, and what is known of them in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from helpers.once import once

from probdiff import Fit, GaussianDiffusion, networks, schedules
from probdiff.families.gaussian import Gaussian

UNEVEN_BETA = np.array([0.03, 0.11, 0.07, 0.3, 0.24])  # not symmetric in t


class Linear(eqx.Module):
    """Outputs linear in x_t and in the log-SNR: the reverse chain is linear and Gaussian."""

    matrix: jax.Array
    slope: jax.Array
    bias: jax.Array

    def __call__(self, x_t, log_snr):
        return jnp.pad(self.matrix @ jnp.ravel(x_t), (0, self.bias.size - self.matrix.shape[0])) + (
            self.bias + self.slope * log_snr
        )


@once
def linear_diffusion(covariance, num_features=2, seed=0, schedule=None):
    """A linear-Gaussian diffusion with random coefficients."""
    rng = np.random.default_rng(seed)
    outputs = num_features * {"fixed": 1, "diagonal": 2, "full": 2}[covariance]
    outputs += num_features * (num_features - 1) // 2 if covariance == "full" else 0
    network = Linear(
        jnp.asarray(0.4 * rng.normal(size=(num_features, num_features))),
        jnp.asarray(0.1 * rng.normal(size=outputs)),
        jnp.asarray(0.3 * rng.normal(size=outputs)),
    )
    return GaussianDiffusion((num_features,), schedule or schedules.Fixed(UNEVEN_BETA), network, covariance)


class Outputs(eqx.Module):
    """Linear in x_t and in the log-SNR."""

    matrix: jax.Array
    bias: jax.Array
    slope: jax.Array

    def __call__(self, x_t, log_snr):
        return self.matrix @ x_t + self.bias + self.slope * log_snr


def linear_mixture(covariance, size, components=3):
    """A linear chain whose kernels are mixtures, and its params: p(x_0) is a finite mixture."""
    family = Gaussian((size,), covariance, components)
    rng = np.random.default_rng(1)
    matrix = np.zeros((family.num_outputs, size))
    each = family.num_outputs_of_each
    for m in range(components):
        matrix[m * each : m * each + size] = 0.4 * rng.normal(size=(size, size))
    bias, slope = rng.normal(size=(2, family.num_outputs))
    network = Outputs(jnp.asarray(matrix), jnp.asarray(bias), jnp.asarray(0.2 * slope))
    d = GaussianDiffusion((size,), schedules.Fixed([0.2, 0.3, 0.4]), network, covariance, components)
    return d, random_linear(d)


@once
def mlp_diffusion(covariance="full", schedule=None, event_shape=(2,), width=8, depth=1):
    schedule = schedule or schedules.LearnedBetas(len(UNEVEN_BETA), UNEVEN_BETA)
    return GaussianDiffusion(event_shape, schedule, networks.ResidualMLP(width, depth), covariance)


@once
def light_diffusion(**options):
    """One whose fit is compiled in a third of the time, for what has to do with neither a learned β_t nor f_Σ."""
    return mlp_diffusion("fixed", schedules.Fixed(UNEVEN_BETA), **options)


def random_params(d, seed=0):
    """Params of a diffusion, the network's jittered so that no output is zero."""
    params = d.initial_params(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    network = params["network$params"]
    params["network$params"] = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape)), network)
    return params


def fit_of(d, params, loc=0.0, scale=1.0):
    """A fit of one chain with these params, as they are."""
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
    loc, scale = (np.broadcast_to(a, d.event_shape).astype(float) for a in (loc, scale))
    return Fit(d, stacked, np.zeros((1, 1)), np.zeros((1, 0)), loc, scale)


def path_gaussian(d, params):
    """Mean and covariance of (x_T, …, x_0) under p for a linear-Gaussian diffusion, by recursion in NumPy."""
    module, beta = d.network, np.asarray(params.get("beta", getattr(d.schedule, "beta", None)), np.float64)
    T, D = d.num_timesteps, d.event_shape[0]
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    mean, cov = np.zeros((T + 1) * D), np.zeros(((T + 1) * D, (T + 1) * D))
    cov[:D, :D] = np.eye(D)
    for i, t in enumerate(range(T, 0, -1)):
        log_snr = np.log(alpha_bar[t] / (1 - alpha_bar[t]))
        outputs = np.asarray(module.bias, np.float64) + np.asarray(module.slope, np.float64) * log_snr
        to_x_0 = np.sqrt(alpha_bar[t - 1]) * beta[t - 1] / (1 - alpha_bar[t])
        to_x_t = np.sqrt(1 - beta[t - 1]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x_0_hat = np.sqrt(alpha_bar[t]) * np.eye(D) + np.sqrt(1 - alpha_bar[t]) * np.asarray(module.matrix, np.float64)
        matrix = to_x_0 * x_0_hat + to_x_t * np.eye(D)
        shift = to_x_0 * np.sqrt(1 - alpha_bar[t]) * outputs[:D]
        scale = kernel_scale(outputs, beta[t - 1], (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]), D, d.covariance)
        now, before = slice((i + 1) * D, (i + 2) * D), slice(i * D, (i + 1) * D)
        mean[now] = matrix @ mean[before] + shift
        cov[now, : (i + 1) * D] = matrix @ cov[before, : (i + 1) * D]
        cov[: (i + 1) * D, now] = cov[now, : (i + 1) * D].T
        cov[now, now] = matrix @ cov[before, before] @ matrix.T + scale @ scale.T
    return mean, cov


def kernel_scale(outputs, beta, rho, D, covariance):
    """The Cholesky factor of f_Σ, written out entry by entry."""
    if covariance == "fixed":
        return np.sqrt(beta) * np.eye(D)
    factor = np.diag([np.sqrt(rho + (1 - rho) * np.exp(16 * np.tanh(outputs[D + i] / 8))) for i in range(D)])
    if covariance == "full":
        entries = iter(outputs[2 * D :])
        for i in range(D):
            for j in range(i):
                factor[i, j] = (1 - rho) * next(entries)
    return np.sqrt(beta) * factor


def random_linear(d):
    return {"network$params": eqx.partition(d.network, eqx.is_inexact_array)[0]}


def exact_elbo(d, x_0, beta=UNEVEN_BETA):
    """N17 for a linear-Gaussian chain and one datum, from the two dense normals."""
    T, D, alpha_bar = len(beta), x_0.size, np.concatenate([[1], np.cumprod(1 - beta)])
    mean_p, cov_p = path_gaussian(d, {"beta": beta})
    s, t = np.meshgrid(np.arange(1, T + 1), np.arange(1, T + 1))
    low, high = np.minimum(s, t), np.maximum(s, t)
    cov_t = np.sqrt(alpha_bar[high] / alpha_bar[low]) * (1 - alpha_bar[low])  # Cov(x_s, x_t given x_0)
    order = np.arange(T)[::-1]
    cov_q = np.zeros_like(cov_p)
    cov_q[: T * D, : T * D] = np.kron(cov_t[np.ix_(order, order)], np.eye(D))
    mean_q = np.concatenate([np.sqrt(alpha_bar[t]) * x_0 for t in range(T, -1, -1)])
    cross = scipy.stats.multivariate_normal.logpdf(mean_q, mean_p, cov_p) - 0.5 * np.trace(
        np.linalg.solve(cov_p, cov_q)
    )
    return cross + scipy.stats.multivariate_normal(mean_q[: T * D], cov_q[: T * D, : T * D]).entropy()
