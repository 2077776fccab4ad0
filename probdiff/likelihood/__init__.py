"""Log-likelihoods of a chain: bounds, estimates and exact values."""

from probdiff.likelihood.elbo import ELBOParts
from probdiff.likelihood.result import LogLikelihood

__all__ = ["ELBOParts", "LogLikelihood"]
