"""A run folder: the options of a fit, and the fit."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probdiff import datasets, families, networks, schedules
from probdiff.chains import BinomialDiffusion, Diffusion, GaussianDiffusion
from probdiff.families.base import family_options
from probdiff.results import Fit

SCHEDULES: dict[str, Callable[[int], Any]] = {
    "learned-betas": schedules.LearnedBetas,
    "learned-snr": schedules.LearnedSNR,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
}

_NEWER_OPTIONS = {"binary": False, "base_rate": 0.5, "components": 1}  # that earlier runs do not hold


@dataclass(frozen=True)
class Run:
    """A run folder and the options of the fit in it."""

    folder: Path
    options: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Run":
        try:
            options = _NEWER_OPTIONS | json.loads((folder / "run.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} holds no finished run") from None
        except ValueError as error:
            raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error
        return cls(folder, options)

    def check_free(self, resume: bool) -> None:
        """Raises `ValueError` where the folder is a file, or holds a run: other than this one, where it is resumed.

        A run of fewer steps is gone on with.
        """
        if files := [path for path in (self.folder, *self.folder.parents) if path.is_file()]:
            raise ValueError(f"--out is {self.folder}; {files[0]} is a file, and no folder")
        if not (self.folder / "run.json").exists():
            return  # an unfinished run is told apart by its checkpoints
        if not resume:
            raise ValueError(
                f"{self.folder} already holds a run: add --resume to go on with it, or --out for another folder"
            )
        held = Run.open(self.folder).options
        for name, value in self.options.items():
            if held.get(name) != value and not (name == "num_steps" and held[name] < value):
                option = "DATA" if name == "data" else "--" + name.replace("_", "-")
                more = ", and only more steps are gone on with" if name == "num_steps" else ""
                raise ValueError(
                    f"{self.folder} holds a run of another configuration: "
                    f"its {option} is {held.get(name)}, this one's is {value}{more}"
                )

    def prepare(self) -> tuple[Diffusion, datasets.Split]:
        o = self.options
        if o["schedule"] not in SCHEDULES:
            raise ValueError(f"--schedule is {o['schedule']}; it must be one of {', '.join(SCHEDULES)}")
        schedule = SCHEDULES[o["schedule"]](o["num_timesteps"])
        data_split = datasets.load(
            o["data"],
            rng_key=jax.random.key(o["seed"]),
            noise=o["noise"],
            columns=None if o["columns"] is None else [name.strip() for name in o["columns"].split(",")],
            dequantised=o["dequantise"],
            binary=o["binary"],
            test_fraction=o["test_fraction"],
        )
        network, (rows, size) = networks.ResidualMLP(o["width"], o["depth"]), data_split.train.shape
        if np.issubdtype(data_split.train.dtype, np.integer):
            if o["covariance"] is not None:
                raise ValueError("--covariance is of Gaussian chains; these data are bits")
            return BinomialDiffusion((size,), schedule, network, o["base_rate"], o["components"]), data_split
        covariance: families.Covariance = o["covariance"] or (
            "full" if size <= 16 and rows >= 100 * size else "diagonal"
        )
        return GaussianDiffusion((size,), schedule, network, covariance), data_split

    def patience(self, data_split: datasets.Split) -> int:
        chosen = self.options["patience"]
        return (0 if data_split.density else 20) if chosen is None else chosen

    def load(self, d: Diffusion, data_split: datasets.Split) -> Fit:
        """The fit, with the names of its features, which the files of earlier runs do not hold."""
        whole = tuple(name in data_split.whole for name in data_split.features)
        return replace(Fit.load(self.folder / "fit.npz", d), features=data_split.features, whole=whole)


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def described(d: Diffusion) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in family_options(d.family).items())
