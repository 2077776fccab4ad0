"""Diffusion probabilistic models as NumPyro programs."""

from importlib.metadata import version

from probdiff import datasets, derivation, diagnostics, likelihood, networks, plots, posterior, schedules
from probdiff.chains import BinomialDiffusion, GaussianDiffusion
from probdiff.fitting import devices, streams
from probdiff.fitting.fit import fit
from probdiff.results import Fit
from probdiff.runs import load

__version__ = version("probdiff")

__all__ = [
    "BinomialDiffusion",
    "Fit",
    "GaussianDiffusion",
    "datasets",
    "derivation",
    "devices",
    "diagnostics",
    "fit",
    "likelihood",
    "load",
    "networks",
    "plots",
    "posterior",
    "schedules",
    "streams",
]
