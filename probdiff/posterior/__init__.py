"""The reverse chain as a prior p(x_0): posteriors, evidence and conditional densities by weighted particles."""

from probdiff.posterior.inference import log_conditional, log_evidence, sample
from probdiff.posterior.observations import BlackBox, LinearGaussian, Missing

__all__ = ["BlackBox", "LinearGaussian", "Missing", "log_conditional", "log_evidence", "sample"]
