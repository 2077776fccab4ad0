"""Estimates of p(x_0), exact or from draws, and for which data they can be trusted."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.special import logsumexp

from probdiff.psis import pareto_k

_TRUSTED_K = 0.5  # below it, a mean of weights has a variance
_TRUSTED_SIZE = 40  # effective draws from which the mean of skewed weights is nearly normal


@dataclass(frozen=True)
class Estimate:
    """log p(x_0) of each datum, (N,), in nats.

    Exact up to `error`, or with `influence` (S, N), the draws over their mean less one, a Monte Carlo estimate. Then
    `pareto_k` (N,) is k̂ of other draws: to choose by k̂ of the same draws would choose those that missed the tail.
    """

    route: str
    log_p: Float[np.ndarray, " N"]
    error: float = 0.0
    influence: Float[np.ndarray, "S N"] | None = None
    pareto_k: Float[np.ndarray, " N"] | None = None

    @property
    def trusted(self) -> np.ndarray:
        """Whether each datum's mean of draws can be taken as normal, (N,); for no datum where the median k̂ is large."""
        if self.effective is None or self.pareto_k is None:
            return np.isfinite(self.log_p)
        light = (self.pareto_k < _TRUSTED_K) & (np.median(self.pareto_k) < _TRUSTED_K)
        return light & (self.effective > _TRUSTED_SIZE)

    @property
    def effective(self) -> np.ndarray | None:
        """Effective draws of each datum, (N,), of a Monte Carlo estimate."""
        return None if self.influence is None else len(self.influence) / (1 + self.influence.var(0))

    @property
    def bias(self) -> np.ndarray:
        """The most by which log p is low in the mean, half the relative variance of the mean of draws, (N,)."""
        if self.influence is None:
            return np.zeros_like(self.log_p)
        return self.influence.var(0) / (2 * len(self.influence))

    def variance(self, weights: Float[np.ndarray, " N"]) -> float:
        """The variance of Σ_n weights_n·(estimate of p(x_n) over p(x_n)), whose draws the data may share."""
        return 0.0 if self.influence is None else float((self.influence @ weights).var() / len(self.influence))


def from_draws(route: str, log_draws: Float[np.ndarray, "S N"]) -> Estimate:
    """The mean of one half of draws of p(x_0), of which these are the logarithms, with k̂ of the other half."""
    half, other = log_draws[::2], log_draws[1::2]
    log_p = logsumexp(half, axis=0) - np.log(len(half))
    k = pareto_k(xr.DataArray(other, dims=("draw", "datum"))).to_numpy()
    return Estimate(route, log_p, influence=np.exp(half - log_p) - 1, pareto_k=k)


def untrusted(*estimates: Estimate) -> str:
    """Why none of them can be trusted."""
    found = [
        f"{e.route} have a k̂ of {np.median(e.pareto_k):.2f} and {np.median(e.effective):.0f} effective draws"
        for e in estimates
        if e.pareto_k is not None and e.effective is not None
    ]
    medians = "; ".join(found)
    return f"no estimate of p(x_0) can be trusted: in the median {medians}; more draws may help"
