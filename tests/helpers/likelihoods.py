"""What the tests of log-likelihoods share: chains whose p(x_0) is known, and data of many seeds."""

import jax
import numpy as np
import scipy.stats
from helpers.diffusions import fit_of, linear_diffusion, path_gaussian, random_linear

from probdiff import GaussianDiffusion, datasets, schedules
from probdiff.reference.oracle import BestNetwork

KEY = jax.random.key(0)
SEEDS, DATA = 200, 8
Z = 4.5  # one-sided: a right bound fails in one of 300,000 seeds


def linear(covariance="full", num_features=2, schedule=None):
    """A linear-Gaussian diffusion, its params, and the distribution p(x_0)."""
    d = linear_diffusion(covariance, num_features, schedule=schedule)
    mean, cov = path_gaussian(d, {})
    p = scipy.stats.multivariate_normal(mean[-num_features:], cov[-num_features:, -num_features:])
    return d, random_linear(d), p


def fit_of_a_mixture():
    """A fit on the line, whose network has the best kernels for a mixture of a narrow and a wide component."""
    weights, means, variances = np.array([0.3, 0.7]), np.array([[-1.0], [0.6]]), np.array([[[0.01]], [[0.09]]])
    loc, scale = 0.12, 0.78  # of the mixture, in the units of its data
    inside = datasets.GaussianMixture(weights, (means - loc) / scale, variances / scale**2)
    d = GaussianDiffusion((1,), schedules.log_snr_linear(6), BestNetwork(inside), "diagonal")
    return fit_of(d, d.initial_params(KEY), loc, scale)


def by_seed(values):
    """Values (seeds · DATA,) as (seeds, DATA)."""
    return values.reshape(-1, DATA)
