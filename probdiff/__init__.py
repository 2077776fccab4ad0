"""Diffusion probabilistic models as NumPyro programs."""

from importlib.metadata import version

# ArviZ leaves a lazy module in its place, from which `import numpyro.distributions` makes one without its submodules
from numpyro import __version__ as _  # noqa: F401

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
