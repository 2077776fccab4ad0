"""Tables with empty cells, filled with draws given the other cells of each row."""

from collections.abc import Sequence

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from probdiff.checks import some
from probdiff.posterior.inference import sample
from probdiff.posterior.observations import Missing
from probdiff.results import Fit
from probdiff.types import Key

NUM_FILTERS = 8


def impute(
    fit: Fit,
    x: Float[np.ndarray, "N D"],
    features: Sequence[str],
    whole: Bool[np.ndarray, " D"],
    *,
    rng_key: Key,
    num_draws: int,
    num_particles: int,
) -> tuple[pd.DataFrame, xr.DataTree]:
    """Rows of x `num_draws` times each, with columns "row" and "draw" before the features, and the tree of `sample`.

    Rows and draws are counted from 0.

    The tree has the rows that have empty cells, NaN, in the coordinate `datum`; others are not drawn. Features that are
    `whole` are integers, and were dequantised for the fit: u, uniform on [0, 1), is added to what is known of them, and
    draws are rounded down. Raises `ValueError` where no cell is empty, one is infinite, or a feature is called "row"
    or "draw".
    """
    if taken := {"row", "draw"} & set(features):
        raise ValueError(f"a feature is called {taken.pop()!r}, as a column of the filled table is; rename it")
    rows = np.flatnonzero(np.isnan(x).any(1))
    if not rows.size:
        raise ValueError("the table has no empty cell")
    if np.isinf(x).any():
        raise ValueError(f"the table has infinite entries, in row(s) {some(np.flatnonzero(np.isinf(x).any(1)))}")
    key_whole, key_draws = jax.random.split(rng_key)
    holes = x[rows] + whole * np.asarray(jax.random.uniform(key_whole, x[rows].shape))
    options = {"num_particles": num_particles, "num_filters": NUM_FILTERS}
    dt = sample(
        fit, Missing(holes), rng_key=key_draws, features=features, datum=rows.tolist(), **options
    )  # fmt: skip
    draws = dt["posterior"].dataset["x_0"]
    draws = draws.copy(data=np.where(np.isnan(x[rows]), np.where(whole, np.floor(draws), draws), x[rows]))
    dt["posterior"] = dt["posterior"].assign(x_0=draws)
    dt["observed_data"] = dt["observed_data"].assign(x_0=xr.Variable(("datum", "feature"), x[rows]))
    # neighbours may be equal
    apart = np.linspace(0, num_particles, -(-num_draws // NUM_FILTERS), endpoint=False).astype(int)
    drawn = draws[:, apart].transpose("draw", "chain", "datum", "feature").to_numpy()
    filled = np.tile(x, (num_draws, 1, 1))
    filled[:, rows] = drawn.reshape(-1, *holes.shape)[:num_draws]
    frame = pd.DataFrame(np.swapaxes(filled, 0, 1).reshape(-1, len(features)), columns=list(features))
    frame.insert(0, "row", np.repeat(np.arange(len(x)), num_draws))
    frame.insert(1, "draw", np.tile(np.arange(num_draws), len(x)))
    return frame, dt
