"""Diffusion probabilistic models as NumPyro programs."""

from probdiff import datasets, derivation, networks, schedules, streams
from probdiff.chains import GaussianDiffusion
from probdiff.results import Fit, fit

__all__ = ["Fit", "GaussianDiffusion", "datasets", "derivation", "fit", "networks", "schedules", "streams"]
