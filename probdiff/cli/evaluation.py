"""The report on a run: its table, its figures and its ArviZ file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from probdiff import datasets, plots
from probdiff.diagnostics import Marginals, marginals
from probdiff.faithfulness import faithfulness
from probdiff.files import atomic_write
from probdiff.likelihood.elbo import of_mixtures
from probdiff.likelihood.result import LogLikelihood, log_mean
from probdiff.plots.of_fits import are_pixels
from probdiff.plots.of_tables import of_columns
from probdiff.progress import progress
from probdiff.results import Fit
from probdiff.runs import Run

_EVALUATED = 500  # held-out rows in the DataTree, where T ≤ 40; fewer in longer chains, for the same time
_DRAWS = 200
_DRAWN = 5_000  # that are set beside the held-out rows
# of the time of an evaluation, in percent
_PARTS = {"log-likelihood": 25, "exact density": 5, "draws": 45, "marginals": 15, "files and figures": 10}


def how_it_ended(fitted: Fit, num_steps: int) -> str:
    """A line that says why a fit has taken fewer steps than it might, or none."""
    taken, kept = fitted.stacked_losses.shape[1], fitted.steps_kept
    if not any(kept):
        return (
            "On rows held out the network was no better than a Gaussian, by one standard error: it stays the Gaussian\n"
        )
    if taken == num_steps:
        return ""
    of_all = f"{taken:,} of {num_steps:,} steps"
    if taken == max(kept):
        return f"Fitted for {of_all}, after which rows held out in turn were most likely (cross-validation)\n"
    checks = round((taken - max(kept)) * fitted.stacked_validation.shape[1] / taken)
    best = ", ".join(f"{steps:,}" for steps in kept)
    return f"Stopped at {of_all}: no progress in {checks} checks; best at {best}\n"


def report(run: Run, fitted: Fit, data_split: datasets.Split, fitting: float | None = None) -> None:
    """Leaves fit.nc, summary.csv and the figures in the folder, and prints the table.

    `fitting` is how long the fit took, in seconds. On a terminal a bar shows the time that is left.
    """
    start = time.perf_counter()
    test, key = data_split.test, jax.random.key(run.options["seed"] + 2)
    key_elbo, key_tree = jax.random.split(key)
    key_draws, c, alike, columns = jax.random.fold_in(key, 2), fitted.best, None, {}
    shorter = min(1.0, 40 / fitted.diffusion.num_timesteps)
    with _progress() as part:
        with part("log-likelihood"):
            # along whole paths noise cancels out, so that a few do
            num_draws = 8 if of_mixtures(fitted.diffusion) else max(2, round(20 * shorter))
            bound = fitted.log_likelihood(test, rng_key=key_elbo, num_draws=num_draws)
        with part("exact density"):
            exact = None if data_split.density is None else np.asarray(data_split.density.log_prob(test), np.float64)
        with part("draws"):
            evaluated = test[: max(50, round(_EVALUATED * shorter))]
            dt = fitted.to_datatree(evaluated, rng_key=key_tree, num_draws=_DRAWS, features=data_split.features)
        with part("marginals"):
            compared = marginals(dt)
            if not fitted.diffusion.family.support.is_discrete:
                draws = replace(fitted.chain(c), whole=None).sample(key_draws, _DRAWN)  # dequantised, as the rows are
                alike = faithfulness(draws, test, data_split.features)
                if not are_pixels(data_split.features):
                    columns = of_columns(draws, test, data_split.features)
        with part("files and figures"):
            summary = summarise(bound, dt, exact, compared)
            with atomic_write(run.folder / "summary.csv") as file:
                summary.to_csv(file, index=False)
            with atomic_write(run.folder / "fit.nc") as file:
                dt.to_netcdf(file, engine="h5netcdf")
            figures = {
                "marginals": plots.marginals_over_time(dt),
                "distances": plots.marginal_distances(compared),
                "schedule": plots.schedule(dt, np.asarray(fitted.diffusion.schedule().beta)),
                "elbo_parts": plots.elbo_parts(dt),
                "loss": plots.loss(dt),
            } | columns
            if "samples" not in figures:
                figures["samples"] = plots.samples(dt)
            for name, figure in figures.items():
                with atomic_write(run.folder / f"{name}.png") as file:
                    figure.savefig(file, dpi=120)
    evaluation = time.perf_counter() - start
    print(f"\nHeld-out log-likelihood, nats per datum (se: standard error over {len(test):,} data)")
    print(summary.to_string(index=False, float_format=_four_digits))
    for name, what in _COLUMNS.items():
        if name in summary:
            print(f"  {name}: {what}")
    if beside := run.beside():
        print(f"\nK of chain {c} beside simple densities of the same rows, and less theirs, paired; nats per datum")
        print(_compared_with(beside, np.atleast_2d(bound.values)[c]).to_string(index=False, float_format=_four_digits))
    if alike is not None:
        print(f"\nDraws of chain {c} beside the held-out rows, errors of quantiles in standard deviations of the data")
        shown = alike.columns.drop(columns=["location p", "scale p", "shape p"])
        print(shown.to_string(index=False, float_format="{:.3f}".format))
        for name, what in _COLUMNS_OF_DRAWS.items():
            print(f"  {name}: {what}")
        print(f"\n{alike.verdict}")
    print(f"\n{compared.verdict}")
    fit_time = f"{fitting:.0f} s to fit, " if fitting else ""
    print(f"Time: {fit_time}{evaluation:.0f} s to evaluate. Run folder: {run.folder}")


_COLUMNS = {
    "exact L": "mean of the exact log density, the most that any fit can reach",
    "K": "mean of the lower bound of the fit's log density; se is over data",
    "K bits": "the same in bits",
    "gap L-K": "what the bound and the fit lose together; its se is that of the paired difference",
    "IWAE-K": "how far the bound of 200 whole paths is above K, on up to 500 data; log p is higher still",
    "k-hat ok": "share of data whose importance weights are fit to be used",
    "worst R-hat": "between the fits, over times and features; near 1 where they agree",
    "energy p (smallest)": "over times, of a test that forward and reverse marginals are the same",
}


_COLUMNS_OF_DRAWS = {
    "sd ratio": "standard deviation of the draws over that of the held-out rows",
    "5 %, 50 %, 95 %": "the quantile of the draws less that of the rows",
    "beyond": "share of draws beyond the least and the largest held-out row",
}


def _compared_with(beside: dict[str, np.ndarray], K: np.ndarray) -> pd.DataFrame:
    """A row for each density beside: its mean, and the paired difference of K from it."""
    rows = [
        {"density": name, "mean": log_density.mean(), "se": _se(log_density)}
        | {"K less it": (K - log_density).mean(), "paired se": _se(K - log_density)}
        for name, log_density in beside.items()
    ]
    return pd.DataFrame(rows)


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def summarise(bound: LogLikelihood, dt: xr.DataTree, exact: np.ndarray | None, compared: Marginals) -> pd.DataFrame:
    """A row for each fit, nats per datum: K, how far a tighter bound is above it, and where the density is known L − K.

    The tighter bound is that of the importance weights of `dt`, whose data are the first. Then k̂, R̂ and p.
    """
    rows = []
    tighter, _ = log_mean(np.moveaxis(dt["importance"].dataset["log_weight"].to_numpy(), 1, 0))
    for c, values in enumerate(np.atleast_2d(bound.values)):
        one = compared.table[compared.table.chain == c]
        row: dict[str, Any] = {"chain": c}
        if exact is not None:
            row |= {"exact L": exact.mean(), "L se": _se(exact)}
        row |= {"K": values.mean(), "K se": _se(values), "K bits": values.mean() / np.log(2)}
        if exact is not None:
            row |= {"gap L-K": (exact - values).mean(), "gap se": _se(exact - values)}
        above = tighter[c] - values[: tighter.shape[1]]
        row |= {"IWAE-K": above.mean(), "its se": _se(above)}
        row["k-hat ok"] = np.mean(compared.pareto_k[c] < compared.k_threshold)
        if len(np.atleast_2d(bound.values)) > 1:
            row["worst R-hat"] = one.r_hat.max()
        row["energy p (smallest)"] = one.energy_p.min()
        rows.append(row)
    return pd.DataFrame(rows)


@contextmanager
def _progress() -> Iterator[Callable[[str], Any]]:
    """A bar of the parts of an evaluation."""
    bar_format = "{desc}: {n:.0f}%|{bar}| [{elapsed}<{remaining}]"
    with progress(total=sum(_PARTS.values()), desc="evaluate", bar_format=bar_format, leave=False) as bar:

        @contextmanager
        def part(name: str) -> Iterator[None]:
            bar.set_description_str(f"evaluate, {name}")
            yield
            bar.update(_PARTS[name])

        yield part


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
