"""A run folder: the options of a fit, the fit, and the rows that it has not seen."""

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
from probdiff.files import atomic_write
from probdiff.fitting.checkpoints import starts_at_noise
from probdiff.fitting.fit import held_out_by_default
from probdiff.results import Fit

SCHEDULES: dict[str, Callable[[int], Any]] = {
    "learned-betas": schedules.LearnedBetas,
    "learned-snr": schedules.LearnedSNR,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
}

HELD_OUT = "held_out.npz"
_NEWER_OPTIONS = {"binary": False, "base_rate": 0.5, "components": 1}  # that earlier runs do not hold
_LONG: dict[str, Any] = {
    "num_timesteps": 40, "components": 1, "depth": 3, "num_steps": 20_000, "learning_rate": None
}  # fmt: skip
_SHORT = {"num_timesteps": 4, "components": 16, "depth": 2, "num_steps": 8_000, "learning_rate": 0.004}
_OF_BITS = _LONG | {"num_timesteps": 200}
_MOST_TIMESTEPS = 10  # of a chain that is short
_LEAST_ROWS = 5_000  # that a short chain wants


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

    def resolved(self, rows: int, size: int, bits: bool, resume: bool) -> "Run":
        """The same with the options that are None chosen: as a run has them that is gone on with, or by the data.

        Chains of at most ten steps with learned β_t are of mixtures where rows are so many that covariances are full.
        """
        o = self.options
        held = Run.open(self.folder).options if resume and (self.folder / "run.json").exists() else {}
        T, components = (held.get(name) if o[name] is None else o[name] for name in ("num_timesteps", "components"))
        full = o["covariance"] in (None, "full") and _covariance(rows, size) == "full"
        short = full and rows >= _LEAST_ROWS and components != 1 and o["schedule"] == "learned-betas"
        short = short and (_SHORT["num_timesteps"] if T is None else T) <= _MOST_TIMESTEPS
        if resume and starts_at_noise(self.folder / "checkpoints"):
            short = False  # which earlier versions had not
        by_default = (_OF_BITS if bits else _SHORT if short else _LONG) | held
        return replace(self, options=o | {name: by_default[name] for name in _LONG if o[name] is None})

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
            if name == "learning_rate" and value is None and starts_at_noise(self.folder / "checkpoints"):
                continue  # earlier versions gave their only default
            if held.get(name) != value and not (name == "num_steps" and held[name] < value):
                option = "DATA" if name == "data" else "--" + name.replace("_", "-")
                more = ", and only more steps are gone on with" if name == "num_steps" else ""
                raise ValueError(
                    f"{self.folder} holds a run of another configuration: "
                    f"its {option} is {held.get(name)}, this one's is {value}{more}"
                )

    def data(self) -> datasets.Split:
        """The data that the options name, read anew."""
        o = self.options
        return datasets.load(
            o["data"],
            rng_key=jax.random.key(o["seed"]),
            noise=o["noise"],
            columns=None if o["columns"] is None else [name.strip() for name in o["columns"].split(",")],
            dequantised=o["dequantise"],
            binary=o["binary"],
            test_fraction=o["test_fraction"],
        )

    def diffusion(self, rows: int, size: int, bits: bool) -> Diffusion:
        """The diffusion of so many rows of so many features."""
        o = self.options
        if o["schedule"] not in SCHEDULES:
            raise ValueError(f"--schedule is {o['schedule']}; it must be one of {', '.join(SCHEDULES)}")
        schedule = SCHEDULES[o["schedule"]](o["num_timesteps"])
        network = networks.ResidualMLP(o["width"], o["depth"])
        if bits:
            if o["covariance"] is not None:
                raise ValueError("--covariance is of Gaussian chains; these data are bits")
            return BinomialDiffusion((size,), schedule, network, o["base_rate"], o["components"])
        covariance = o["covariance"] or _covariance(rows, size)
        return GaussianDiffusion((size,), schedule, network, covariance, o["components"])

    def stopping(self, data_split: datasets.Split) -> dict[str, Any]:
        """The options of a fit that say when it stops; none of real rows that are not many: it has its own for them."""
        chosen = self.options["patience"]
        train = data_split.train
        bits_or_old = np.issubdtype(train.dtype, np.integer) or starts_at_noise(self.folder / "checkpoints")
        if (
            chosen is None
            and not data_split.density
            and held_out_by_default(len(train), train.shape[1], bits_or_old=bits_or_old)
        ):
            return {}
        patience = (0 if data_split.density else 20) if chosen is None else chosen
        return {"validation": 0.15 if patience else 0.0, "patience": patience or None}

    def keep(self, fit: Fit, data_split: datasets.Split, beside: dict[str, np.ndarray]) -> None:
        """Writes the fit, the held-out rows and the options, so that nothing else is wanted to open the run.

        `beside` are the log densities of the held-out rows under other densities, by name.
        """
        fit.save(self.folder / "fit.npz")
        with atomic_write(self.folder / HELD_OUT) as file, file.open("wb") as stream:
            np.savez_compressed(
                stream,
                test=data_split.test,
                rows=len(data_split.train),
                features=np.array(data_split.features),
                whole=np.array(data_split.whole, str),
                beside=np.array(list(beside), str),
                log_densities=np.array(list(beside.values())),
            )
        with atomic_write(self.folder / "run.json") as file:
            file.write_text(json.dumps(self.options | {"held out": digest(data_split.test)}, indent=1))

    def kept(self) -> tuple[Fit, datasets.Split]:
        """The fit, and the held-out rows without those that were fitted.

        Earlier runs keep no rows: theirs are read from the data again. Raises `ValueError` where these have changed.
        """
        if held := self._held_out():
            test, rows = held["test"], int(held["rows"])
            features, whole = (tuple(held[name].tolist()) for name in ("features", "whole"))
            density = datasets.density(self.options["data"], self.options["noise"])
            data_split = datasets.Split(test[:0], test, features, density, whole)
        else:
            data_split = self.data()
            rows = len(data_split.train)
            if self.options["held out"] != digest(data_split.test):
                raise ValueError(
                    f"{self.options['data']} has changed since the fit, so its held-out rows are not known"
                )
        bits = np.issubdtype(data_split.test.dtype, np.integer)
        fit = Fit.load(self.folder / "fit.npz", self.diffusion(rows, data_split.test.shape[1], bits))
        # which the files of earlier runs do not hold
        is_whole = tuple(name in data_split.whole for name in data_split.features)
        return replace(fit, features=data_split.features, whole=is_whole), data_split

    def beside(self) -> dict[str, np.ndarray]:
        """Log densities of the held-out rows under other densities, by name, nats; none of earlier runs."""
        held = self._held_out()
        return dict(zip(held["beside"].tolist(), held["log_densities"], strict=True)) if "beside" in held else {}

    def _held_out(self) -> dict[str, np.ndarray]:
        file = self.folder / HELD_OUT
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as held:
                return dict(held)
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{file} could not be read: {error}") from error


def _covariance(rows: int, size: int) -> families.Covariance:
    """Which covariance so many rows of so many features have by default."""
    return "full" if size <= 16 and rows >= 100 * size else "diagonal"


def load(path: str | Path) -> Fit:
    """The fit in a run folder such as "runs/swiss-roll", with its diffusion and the names of its features.

    Raises `ValueError` where the folder holds no finished run, or a damaged one, and for a file.
    """
    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file, and no run folder; what fit.save wrote is read by Fit.load(path, diffusion)"
        )
    return Run.open(Path(path)).kept()[0]


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def described(d: Diffusion) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in family_options(d.family).items())
