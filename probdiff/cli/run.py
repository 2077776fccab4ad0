"""A run folder: the options of a fit, the fit, and the report on it."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from probdiff import datasets, families, networks, plots, schedules
from probdiff.chains import BinomialDiffusion, Diffusion, GaussianDiffusion
from probdiff.diagnostics import marginals
from probdiff.families.base import family_options
from probdiff.files import atomic_write
from probdiff.results import Fit

SCHEDULES: dict[str, Callable[[int], Any]] = {
    "learned-betas": schedules.LearnedBetas,
    "learned-snr": schedules.LearnedSNR,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
}

_NEWER_OPTIONS = {"binary": False, "base_rate": 0.5, "components": 1}  # that earlier runs do not hold

_EVALUATED = 500  # held-out rows in the DataTree, where T ≤ 40; fewer in longer chains, for the same time

_DRAWS = 200


@dataclass(frozen=True)
class Run:
    """A run folder and the options of the fit in it."""

    folder: Path
    options: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Run":
        try:
            options = _NEWER_OPTIONS | json.loads((folder / "run.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no finished run") from None
        except ValueError as error:
            raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error
        return cls(folder, options)

    def check_free(self, resume: bool) -> None:
        """That the folder holds no finished run, or with `resume` one of these options."""
        if not (self.folder / "run.json").exists():
            return  # an unfinished run is told apart by its checkpoints
        if not resume:
            raise ValueError(
                f"{self.folder} already holds a run: add --resume to go on with it, or --out for another folder"
            )
        held = Run.open(self.folder).options
        for name, value in self.options.items():
            if held.get(name) != value:
                option = "DATA" if name == "data" else "--" + name.replace("_", "-")
                raise ValueError(
                    f"{self.folder} holds a run of another configuration: "
                    f"its {option} is {held.get(name)}, this one's is {value}"
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
            columns=[name.strip() for name in o["columns"].split(",")] if o["columns"] else None,
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

    def load(self, d: Diffusion) -> Fit:
        return Fit.load(self.folder / "fit.npz", d)

    def report(self, fitted: Fit, data_split: datasets.Split, fitting: float | None = None) -> None:
        """Leaves fit.nc, summary.csv and the figures in the folder, and prints the table."""
        start = time.perf_counter()
        test, key = data_split.test, jax.random.key(self.options["seed"] + 2)
        key_elbo, key_tree = jax.random.split(key)
        shorter = min(1.0, 40 / fitted.diffusion.num_timesteps)
        bound = fitted.log_likelihood(test, rng_key=key_elbo, num_draws=max(2, round(20 * shorter)))
        exact = None if data_split.density is None else np.asarray(data_split.density.log_prob(test), np.float64)
        evaluated = test[: max(50, round(_EVALUATED * shorter))]
        dt = fitted.to_datatree(evaluated, rng_key=key_tree, num_draws=_DRAWS, features=data_split.features)
        compared = marginals(dt)
        rows = []
        for c in range(fitted.num_chains):
            values = np.atleast_2d(bound.values)[c]
            k = compared.pareto_k[c]
            one = compared.table[compared.table.chain == c]
            row: dict[str, Any] = {"chain": c}
            if exact is not None:
                row |= {"exact L": exact.mean(), "L se": _se(exact)}
            row |= {"K": values.mean(), "K se": _se(values), "K bits": values.mean() / np.log(2)}
            if exact is not None:
                row |= {"gap L-K": (exact - values).mean(), "gap se": _se(exact - values)}
            row |= {
                "k-hat ok": np.mean(k < compared.k_threshold),
                "worst R-hat": one.r_hat.max(),
                "energy p (smallest)": one.energy_p.min(),
            }
            rows.append(row)
        summary = pd.DataFrame(rows)
        with atomic_write(self.folder / "summary.csv") as file:
            summary.to_csv(file, index=False)
        with atomic_write(self.folder / "fit.nc") as file:
            dt.to_netcdf(file, engine="h5netcdf")
        figures = {
            "samples": plots.samples(dt),
            "marginals": plots.marginals_over_time(dt),
            "distances": plots.marginal_distances(compared),
            "schedule": plots.schedule(dt, np.asarray(fitted.diffusion.schedule().beta)),
            "elbo_parts": plots.elbo_parts(dt),
            "loss": plots.loss(dt),
        }
        for name, figure in figures.items():
            with atomic_write(self.folder / f"{name}.png") as file:
                figure.savefig(file, dpi=120)
        evaluation = time.perf_counter() - start
        print(f"\nHeld-out log-likelihood, nats per datum (se: standard error over {len(test):,} data)")
        print(summary.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
        print(f"\n{compared.verdict}")
        fit_time = f"{fitting:.0f} s to fit, " if fitting else ""
        print(f"Time: {fit_time}{evaluation:.0f} s to evaluate. Run folder: {self.folder}")


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def described(d: Diffusion) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in family_options(d.family).items())


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
