"""Figures of draws beside rows, column by column; each returns a matplotlib `Figure`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy import stats

from probdiff.checks import labels
from probdiff.faithfulness import correlations_apart, rank_correlations, side_by_side

FORWARD, REVERSE = "tab:blue", "tab:orange"
MOST_POINTS = 2000
_MOST_IN_CORNER, _MOST_PANELS, _MOST_NAMED = 6, 36, 30  # columns of a corner plot, of a page of panels, with names


def corner(
    draws: ArrayLike,
    rows: ArrayLike,
    features: Sequence[str] | None = None,
    *,
    most: int = MOST_POINTS,
) -> Figure:
    """Every pair of columns, draws (S, D) beneath the rows (N, D), and the density of each column.

    Of more than six columns those are shown that differ most, by the distance of their distribution functions or by
    their rank correlations. The frame is half as wide again as the rows' range; draws beyond it are counted above.
    Raises `ValueError` as `faithfulness.side_by_side`, as do the other figures of this file.
    """
    draws, rows, features = side_by_side(draws, rows, features)
    order = most_different(draws, rows)[:_MOST_IN_CORNER]
    names = labels(features, rows.shape[1])[order]
    x, y = rows[:, order], draws[:, order]
    low, high = x.min(0), x.max(0)
    pad = np.where(high > low, (high - low) / 4, 0.5)
    low, high = low - pad, high + pad
    beyond = int(((y < low) | (y > high)).any(1).sum())
    x, y = spread(x, most), spread(y, most)
    K = len(order)
    figure = Figure(figsize=(1 + 1.7 * K, 0.8 + 1.7 * K), layout="constrained")
    grid = figure.subplots(K, K, squeeze=False)
    for i in range(K):
        for j in range(K):
            axes = grid[i, j]
            if j > i:
                axes.axis("off")
                continue
            if i == j:
                bins = np.linspace(low[i], high[i], 1 + min(30, max(8, round(2 * len(x) ** 0.5)))).tolist()
                axes.hist(y[:, i], bins=bins, density=True, color=REVERSE, alpha=0.5, label="draws of x⁽⁰⁾ from p")
                axes.hist(x[:, i], bins=bins, density=True, histtype="step", color=FORWARD, label="data")
                axes.set_yticks([])
            else:
                axes.scatter(y[:, j], y[:, i], s=4, alpha=0.4, color=REVERSE, linewidths=0)
                axes.scatter(x[:, j], x[:, i], s=10 if len(x) < 500 else 4, alpha=0.7, color=FORWARD, linewidths=0)
                axes.set_ylim(low[i], high[i])
            axes.set_xlim(low[j], high[j])
            axes.tick_params(labelsize=7, labelbottom=i == K - 1, labelleft=j == 0 and i > 0)
            if i == K - 1:
                axes.set_xlabel(names[j], fontsize="small")
            if j == 0:
                axes.set_ylabel(names[i] if i else "density", fontsize="small")
    some_of = f"the {K} of {rows.shape[1]} columns that differ most; " if rows.shape[1] > K else ""
    figure.suptitle(f"{some_of}{beyond:,} of {len(draws):,} draws beyond the frame", fontsize="medium")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(1, 0.95))
    return figure


def quantiles(draws: ArrayLike, rows: ArrayLike, features: Sequence[str] | None = None) -> Figure:
    """For each column the sorted rows against the same quantiles of the draws, and where 99 % of each would lie.

    The band is that of rows and draws from one distribution, each quantile apart. Of more than 36 columns those are
    shown that differ most.
    """
    draws, rows, names = side_by_side(draws, rows, features)
    order = most_different(draws, rows)
    order = order if len(order) > _MOST_PANELS else np.arange(len(order))
    figure, panels = panels_of(
        len(order),
        "quantiles of the draws, with 99 % bands for each quantile by itself",
        "sorted rows",
    )
    N, S = len(rows), len(draws)
    at = (np.arange(1, N + 1) - 0.5) / N
    few = 1 / (1 / N + 1 / S)  # rows that have the noise of both
    band = stats.beta.ppf([[0.005], [0.995]], at * few + 0.5, (1 - at) * few + 0.5)
    for axes, k in zip(panels, order, strict=False):
        column, expected = np.sort(rows[:, k]), np.quantile(draws[:, k], at)
        between = np.quantile(draws[:, k], band)
        axes.fill_between(expected, *between, color=REVERSE, alpha=0.3, lw=0)
        axes.plot(expected, expected, color="gray", ls="--", lw=1)
        axes.scatter(expected, column, s=4, color=FORWARD, linewidths=0)
        axes.set_title(names[k], fontsize="small")
    return figure


def correlations(draws: ArrayLike, rows: ArrayLike, features: Sequence[str] | None = None) -> Figure:
    """The rank correlations of the rows and of the draws, and their difference in standard errors."""
    draws, rows, features = side_by_side(draws, rows, features)
    names = labels(features, len(features))
    of_rows, of_draws = rank_correlations(rows), rank_correlations(draws)
    z = correlations_apart(of_draws, of_rows, len(draws), len(rows))
    figure = Figure(figsize=(14, 5), layout="compressed")
    most = max(4.0, float(np.abs(z).max()))
    for axes, matrix, title, span in zip(
        figure.subplots(1, 3),
        (of_rows, of_draws, z),
        ("rows", "draws", "draws less rows, standard errors"),
        (1.0, 1.0, most),
        strict=True,
    ):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-span, vmax=span)
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set_title(title)
        every = np.arange(0, len(names), math.ceil(len(names) / _MOST_NAMED))
        axes.set_xticks(every, names[every], rotation=90, fontsize=7)
        axes.set_yticks(every, names[every] if title == "rows" else [], fontsize=7)
        axes.set_xlabel("column")
    figure.axes[0].set_ylabel("column")
    return figure


def principal_components(draws: ArrayLike, rows: ArrayLike, *, most: int = MOST_POINTS) -> Figure:
    """Rows beside draws on the two leading principal components of the standardised rows, in standard deviations.

    Raises `ValueError` of fewer than two columns.
    """
    draws, rows, _ = side_by_side(draws, rows, None)
    if rows.shape[1] < 2:
        raise ValueError("rows have one column; principal components are of two or more")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titled = ((rows, "data", FORWARD), (draws, "draws of x⁽⁰⁾ from p", REVERSE))
    for axes, (values, title, colour) in zip(panels, titled, strict=True):
        shown = spread(values, most)
        axes.scatter(*on_principal_axes(shown, rows).T, s=4, alpha=0.5, color=colour, linewidths=0)
        axes.set(title=f"{title} ({len(shown):,})", xlabel="principal component 1 (sd)")
    panels[0].set_ylabel("principal component 2 (sd)")
    return figure


def spread(x: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows of x, evenly spaced."""
    return x if len(x) <= most else x[np.linspace(0, len(x) - 1, most).astype(int)]


def most_different(draws: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The columns, those that differ most first."""
    apart = np.array([stats.ks_2samp(*pair, method="asymp").statistic for pair in zip(draws.T, rows.T, strict=True)])
    if len(apart) > 1:
        off = np.abs(rank_correlations(draws) - rank_correlations(rows))
        apart = np.maximum(apart, off.max(0) / 2)
    return np.argsort(-apart, kind="stable")


def panels_of(num_columns: int, xlabel: str, ylabel: str) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each of some columns, at most a page."""
    count = min(num_columns, _MOST_PANELS)
    across = min(6, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(2.2 * across + 0.6, 2.1 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[count:]:
        axes.axis("off")
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel)
    if count < num_columns:
        figure.suptitle(f"the {count} of {num_columns} columns that differ most")
    return figure, panels[:count]


def on_principal_axes(x: np.ndarray, data: np.ndarray) -> np.ndarray:
    """x on the two leading principal components of the standardised data, each in its standard deviations."""
    mean, std = data.mean(0), data.std(0)
    std = np.where(std > 0, std, 1)  # a column may be the same in all rows
    _, singular, axes = np.linalg.svd((data - mean) / std, full_matrices=False)
    singular = np.maximum(singular[:2], 1e-9 * singular[0])  # columns may be copies of each other
    return (x - mean) / std @ axes[:2].T / singular * math.sqrt(len(data))


def of_columns(
    draws: Float[np.ndarray, "S D"], rows: Float[np.ndarray, "N D"], features: Sequence[str]
) -> dict[str, Figure]:
    """The figures of a table, by name: of one or two columns their quantiles alone."""
    figures = {"quantiles": quantiles(draws, rows, features)}
    if rows.shape[1] > 2:
        figures |= {
            "samples": corner(draws, rows, features),
            "correlations": correlations(draws, rows, features),
            "principal_components": principal_components(draws, rows),
        }
    return figures
