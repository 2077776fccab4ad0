"""Fits that are the exact reversal of a Gaussian, as they start."""

import jax
import jax.numpy as jnp
import numpy as np

from probdiff import Fit, GaussianDiffusion, networks, schedules
from probdiff.networks.gaussian_start import with_start


def start_of(S, covariance="diagonal", loc=0.0, scale=1.0, T=6, features=None, network=None):
    """A fit whose p(x_0) is N(loc, diag(scale)·S·diag(scale)), up to what is left of x_0 at T.

    Its axes are at right angles and differ in length.
    """
    variance, axes = np.linalg.eigh(S)
    D = len(variance)
    length = 1 + 0.3 * np.arange(D)
    variance, axes = variance / length**2, axes * length
    d = GaussianDiffusion((D,), schedules.cosine(T), network or networks.ResidualMLP(8, 1), covariance)
    reach = 5 * np.sqrt(variance)
    params = with_start(d.initial_params(jax.random.key(0)), *map(jnp.asarray, (np.log(variance), -reach, reach)))
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
    loc, scale = (np.broadcast_to(value, (D,)).astype(float) for value in (loc, scale))
    return Fit(d, stacked, np.zeros((1, 1)), np.zeros((1, 0)), loc, scale, features, axes=axes)
