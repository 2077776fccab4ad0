"""What every log-likelihood of a chain is reported as."""

from dataclasses import dataclass
from typing import Any, Literal

import arviz as az
import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.special import logsumexp

from probdiff.checks import check_count

Kind = Literal["lower bound", "upper bound", "estimate", "exact"]


@dataclass(frozen=True, repr=False)
class LogLikelihood:
    """A log-likelihood per datum in nats, in the data's own units.

    `values` (N,) or (C, N), and `values_mcse` the Monte Carlo standard error of each. `mcse` is the Monte Carlo
    standard error of `mean` given the data, and `standard_error` that of `mean` as an estimate for the population that
    the data come from: floats, or (C,).
    `kind` is "lower bound", "upper bound", "estimate" or "exact": for a bound, of the mean over the method's own draws.
    `pareto_k` is k̂ of each datum's importance weights, where the method has such weights.
    """

    values: np.ndarray
    values_mcse: np.ndarray
    kind: Kind
    pareto_k: np.ndarray | None = None

    def __repr__(self) -> str:
        means, errors = np.atleast_1d(self.mean), np.atleast_1d(self.standard_error)
        said = ", ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in zip(means, errors, strict=True))
        return f"LogLikelihood: {self.kind}, mean of {self.values.shape[-1]:,} data {said} nats"

    @property
    def mean(self) -> Any:
        return self.values.mean(-1)

    def bits_per_dim(self, num_features: int, bin_width: float = 1.0) -> Any:
        """−(mean + D·log w)/(D·log 2): bits to a feature for the bins of width w that dequantised data lie in.

        Of a lower bound of the density it is an upper bound of the bits that a code takes (Theis, van den Oord and
        Bethge 2016). `num_features` is D and `bin_width` w in the data's units: 1 for integers, 1/256 for bytes
        that were scaled to [0, 1). A float, or (C,). Raises `ValueError` for a D or a w that is not positive.
        """
        check_count(num_features, "num_features", 1)
        if not 0 < bin_width < np.inf:
            raise ValueError(f"bin_width is {bin_width}; it must be positive and finite")
        return -(self.mean / num_features + np.log(bin_width)) / np.log(2)

    @property
    def mcse(self) -> Any:
        return np.sqrt(np.sum(self.values_mcse**2, -1)) / self.values.shape[-1]

    @property
    def standard_error(self) -> Any:
        n = self.values.shape[-1]
        return self.values.std(-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(self.values.shape[:-1], np.nan)

    @property
    def elpd(self) -> az.ELPDData:
        """Values of held-out data as they stand, summed over data, for `az.compare` and its errors of differences.

        No leave-one-out correction: the fit has not seen the data. Raises `ValueError` for several chains at once.
        """
        if self.values.ndim != 1:
            raise ValueError(
                f"values has shape {self.values.shape}; az.compare wants one chain, such as fit.chain(fit.best)"
            )
        n = len(self.values)
        return az.ELPDData(
            elpd=self.values.sum(),
            se=n * self.standard_error,
            p=0.0,  # nothing was fitted to these data
            n_samples=1,
            n_data_points=n,
            scale="log",
            warning=False,
            good_k=np.nan,
            elpd_i=xr.DataArray(self.values, dims="datum"),
        )


def log_mean(log_draws: Float[np.ndarray, "S N"]) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the mean of exp over S draws, and its standard error to first order; (N,) each."""
    values = logsumexp(log_draws, axis=0) - np.log(len(log_draws))
    return values, np.exp(log_draws - values).std(0, ddof=1) / np.sqrt(len(log_draws))
