"""Figures of fits and of draws beside rows."""

from probdiff.plots.of_fits import elbo_parts, loss, marginal_distances, marginals_over_time, samples, schedule
from probdiff.plots.of_tables import corner, correlations, principal_components, quantiles

__all__ = [
    "corner",
    "correlations",
    "elbo_parts",
    "loss",
    "marginal_distances",
    "marginals_over_time",
    "principal_components",
    "quantiles",
    "samples",
    "schedule",
]
