"""Diffusion probabilistic models as NumPyro programs."""

from probdiff import datasets, derivation, networks, posterior, schedules, streams
from probdiff.chains import BinomialDiffusion, GaussianDiffusion
from probdiff.results import Fit, fit

__all__ = [
    "BinomialDiffusion",
    "Fit",
    "GaussianDiffusion",
    "datasets",
    "derivation",
    "fit",
    "networks",
    "posterior",
    "schedules",
    "streams",
]
