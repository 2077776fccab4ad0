"""Simple densities of the same rows, beside which a fit is seen: a Gaussian, and a mixture of Gaussians."""

import warnings
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import multivariate_normal

from probdiff.checks import feature_names, frame_values

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_ROWS = 2_000  # that the components are chosen by
_FOLDS = 5
_LEAST_VARIANCE = 1e-4  # of a component, in units of the rows' variances


def baselines(train: ArrayLike, test: ArrayLike, seed: int = 0) -> dict[str, np.ndarray]:
    """Log densities of the rows of `test` (M, D) under densities fitted to those of `train` (N, D), nats: name → (M,).

    The Gaussian has the covariance of Ledoit and Wolf (2004), shrunk for few rows. The number of components of the
    mixture and the kind of their covariances are chosen by cross-validation. Either may be a data frame; columns of
    `test` are taken by name then. Raises `ValueError` for rows of other columns, or that are not finite.
    """
    names = feature_names(train, "train")
    train, test = (np.asarray(frame_values(x, name, names), float) for x, name in ((train, "train"), (test, "test")))
    if train.ndim != 2 or test.shape[1:] != train.shape[1:]:
        raise ValueError(f"train has shape {train.shape} and test {test.shape}; (N, D) and (M, D) are wanted")
    if not np.isfinite(train).all() or not np.isfinite(test).all():
        raise ValueError("train or test has entries that are NaN or infinite")
    from sklearn.covariance import LedoitWolf

    loc, scale = train.mean(0), np.where(np.ptp(train, axis=0) > 0, train.std(0), 1.0)
    z, z_test, log_det = (train - loc) / scale, (test - loc) / scale, np.log(scale).sum()
    shrunk = LedoitWolf().fit(z)
    gaussian = multivariate_normal(shrunk.location_, shrunk.covariance_, allow_singular=True).logpdf(z_test)
    mixture = _chosen_mixture(z, seed)
    kind = f"mixture of {mixture.n_components} Gaussian(s), {mixture.covariance_type}"
    return {
        "Gaussian (Ledoit-Wolf)": np.atleast_1d(gaussian) - log_det,
        kind: mixture.set_params(n_init=3).fit(z).score_samples(z_test) - log_det,
    }


def _chosen_mixture(z: np.ndarray, seed: int) -> "GaussianMixture":
    from sklearn.mixture import GaussianMixture
    from sklearn.model_selection import KFold, cross_val_score

    few = z[np.random.default_rng(seed).permutation(len(z))[:_MOST_ROWS]]
    folds = KFold(min(_FOLDS, len(few)), shuffle=True, random_state=seed)

    def score(mixture: "GaussianMixture") -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of those that have not converged
            of_folds = cross_val_score(mixture, few, cv=folds)  # NaN where one cannot be fitted
        return float(of_folds.mean()) if np.isfinite(of_folds).all() else -np.inf

    candidates = [
        GaussianMixture(k, covariance_type=kind, reg_covar=_LEAST_VARIANCE, random_state=seed)
        for k, kind in product(_COMPONENTS, ("full", "tied", "diag"))
        if 10 * k <= len(few) or k == 1
    ]
    return max(candidates, key=score)
