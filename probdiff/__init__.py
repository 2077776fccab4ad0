"""Diffusion probabilistic models as NumPyro programs."""

from probdiff import datasets, networks, schedules
from probdiff.chains import GaussianDiffusion

__all__ = ["GaussianDiffusion", "datasets", "networks", "schedules"]
