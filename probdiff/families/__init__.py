"""The distributions of one step of a chain: a family is one file."""

from probdiff.families.base import Family
from probdiff.families.binomial import Binomial
from probdiff.families.gaussian import Covariance, Gaussian

__all__ = ["Binomial", "Covariance", "Family", "Gaussian"]
