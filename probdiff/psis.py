"""k̂ of importance weights (Vehtari et al. 2024): whether an estimate from them can be trusted."""

import arviz  # noqa: F401  # gives xarray its azstats
import numpy as np
import xarray as xr
from jaxtyping import Float

_EQUAL = 1e-4  # spread of the largest log weights, of which none then stands out
_TIE = 1e-5  # log weights no further apart are of the same path but for rounding


def pareto_k(log_weight: xr.DataArray) -> xr.DataArray:
    """Pareto k̂ of the importance weights of each datum, from draws of log w; dims chain, datum.

    −∞ where the largest weights are equal, and ∞ where no tail can be fitted: they are worlds apart, or few positive.
    Below `k_threshold` an importance-weighted estimate from these draws can be trusted (Vehtari et al. 2024).
    """
    S = log_weight.sizes["draw"]
    tail = int(3 * S**0.5) if S > 225 else S // 5  # as ArviZ has it
    largest = xr.apply_ufunc(np.sort, log_weight, input_core_dims=[["draw"]], output_core_dims=[["draw"]])
    largest = largest.isel(draw=slice(-tail, None))
    positive = largest.where(largest != -np.inf)
    spread = (positive.max("draw") - positive.min("draw")).where(largest.notnull().all("draw"))
    equal = spread < _EQUAL
    whole = positive.notnull().all("draw")
    wiggle = xr.DataArray(np.linspace(0, 1e-3, S), dims="draw")
    log_weight = xr.apply_ufunc(_without_ties, log_weight, input_core_dims=[["draw"]], output_core_dims=[["draw"]])
    with np.errstate(over="ignore", invalid="ignore"):
        _, k = (-log_weight.where(~equal, wiggle)).azstats.psislw(dim=["draw"])
    return k.where(~equal).fillna(np.inf).where(~(equal & whole), -np.inf)


def _without_ties(log_w: Float[np.ndarray, "*batch S"]) -> Float[np.ndarray, "*batch S"]:
    """log w, where most draws share their value with others, as of few bits, spread half-way to the values beside it.

    A tail of ties has no k̂; spread out it has that of the weights' distribution function, made continuous.
    """
    rows = np.array(log_w).reshape(-1, log_w.shape[-1])
    for whole in rows:
        positive = whole != -np.inf
        row = whole[positive]
        if not row.size or not np.isfinite(row).all():
            continue
        order = np.argsort(row, kind="stable")
        new = np.append(True, np.diff(row[order]) > _TIE)
        values, group = row[order][new], np.cumsum(new) - 1
        together = row[order] - values[group] < 10 * _TIE  # else they lie densely, and are no ties
        if new.mean() > 0.5 or len(values) == 1 or not together.all():
            continue
        middle = (values[1:] + values[:-1]) / 2
        lower = np.concatenate([[2 * values[0] - middle[0]], middle])
        upper = np.concatenate([middle, [2 * values[-1] - middle[-1]]])
        count = np.bincount(group)
        place = (np.arange(len(row)) - (np.cumsum(count) - count)[group] + 0.5) / count[group]
        row[order] = lower[group] + place * (upper - lower)[group]
        whole[positive] = row
    return rows.reshape(log_w.shape)


def k_threshold(num_draws: int) -> float:
    """min(1 − 1/log₁₀ S, 0.7) for S draws (Vehtari et al. 2024)."""
    return min(1 - 1 / np.log10(num_draws), 0.7)


def k_of_draws(log_w: Float[np.ndarray, "S N"]) -> Float[np.ndarray, " N"]:
    """k̂ of the draws for each datum; NaN where they are too few to have a tail."""
    if len(log_w) < 25:
        return np.full(log_w.shape[1], np.nan)
    return pareto_k(xr.DataArray(log_w, dims=("draw", "datum"))).to_numpy()
