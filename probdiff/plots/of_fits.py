"""Figures of a fit, read from its `DataTree`; each returns a matplotlib `Figure`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probdiff.diagnostics import Marginals
from probdiff.plots.of_tables import FORWARD, MOST_POINTS, REVERSE, corner, most_different, panels_of, spread

_MOST_IN_LEGEND = 8  # lines with a name of their own; more are shaded by a colour map
_MOST_LINES = 20  # that can be told apart; more are drawn as bands


def samples(dt: xr.DataTree, *, most: int = MOST_POINTS) -> Figure:
    """The data beside draws of x_0 from p, in the data's own units.

    Two features are a scatter, one a histogram, pixels (features named pixel_…) images, and more features a `corner`.
    """
    data = dt["observed_data"].dataset["x_0"].to_numpy()
    drawn = (
        dt["posterior_predictive"].dataset["x_0"].stack(all=("chain", "draw")).transpose("all", "feature").to_numpy()
    )
    names = [str(name) for name in dt["observed_data"].dataset["feature"].to_numpy()]
    if are_pixels(names):
        return _images(data, drawn)
    if len(names) > 2:
        return corner(drawn, data, names, most=most)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, values, title, colour in (
        (left, data[:most], "data", FORWARD),
        (right, spread(drawn, most), "draws of x⁽⁰⁾ from p", REVERSE),
    ):
        if len(names) == 1:
            axes.hist(values[:, 0], bins=60, density=True, color=colour)
            axes.set(xlabel=names[0], ylabel="density")
        else:
            axes.scatter(*values.T, s=4, alpha=0.5, color=colour, linewidths=0)
            axes.set(xlabel=names[0], ylabel=names[1])
        axes.set_title(f"{title} ({len(values):,})")
    return figure


def are_pixels(features: Sequence[str]) -> bool:
    """Whether the names are those of a square image."""
    return all(name.startswith("pixel") for name in features) and math.isqrt(len(features)) ** 2 == len(features)


def _images(data: np.ndarray, drawn: np.ndarray) -> Figure:
    side, rows, columns = math.isqrt(data.shape[1]), 5, 10
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = data[: rows * columns], spread(drawn, rows * columns)
    for axes, values, title in zip((left, right), shown, ("data", "draws of x⁽⁰⁾ from p"), strict=True):
        tiles = np.full((rows * columns, side + 1, side + 1), np.nan)
        tiles[: len(values), :side, :side] = values.reshape(-1, side, side)
        axes.imshow(
            tiles.reshape(rows, columns, side + 1, side + 1).swapaxes(1, 2).reshape(rows * (side + 1), -1),
            cmap="gray_r",
            vmin=data.min(),
            vmax=data.max(),
        )
        axes.set(title=title, xticks=[], yticks=[])
    return figure


def marginals_over_time(dt: xr.DataTree, *, num_times: int = 6, most: int = 1000) -> Figure:
    """Forward draws of x_t beside reverse draws, in the chain's own units (the first fit).

    One or two features are histograms or scatters at a row of times, more the quantiles of each over all t.
    """
    posterior, forward = dt["posterior"].dataset["x"].sel(chain=0), dt["forward"].dataset["x"].sel(chain=0)
    size = forward.sizes["feature"]
    if size > 2:
        return _quantiles_over_time(posterior, forward)
    times = forward["t"].to_numpy()[
        np.linspace(0, forward.sizes["t"] - 1, min(num_times, forward.sizes["t"])).astype(int)
    ]
    figure = Figure(figsize=(2.1 * len(times), 4.6), layout="constrained")
    grid = figure.subplots(2, len(times), sharex=True, sharey=True, squeeze=False)
    for row, (draws, colour) in enumerate(((forward, FORWARD), (posterior, REVERSE))):
        for column, t in enumerate(times):
            axes, values = grid[row, column], draws.sel(t=t).to_numpy()[:most]
            if size == 1:
                axes.hist(values[:, 0], bins=40, range=(-4, 4), density=True, color=colour)
            else:
                axes.scatter(*values.T, s=3, alpha=0.5, color=colour, linewidths=0)
                axes.set(xlim=(-4, 4), ylim=(-4, 4))
            if row == 0:
                axes.set_title(f"t = {t}")
    grid[0, 0].set_ylabel("forward q")
    grid[1, 0].set_ylabel("reverse p")
    figure.supxlabel("x⁽ᵗ⁾, chain's units")
    return figure


def _quantiles_over_time(posterior: xr.DataArray, forward: xr.DataArray) -> Figure:
    """The quantiles of 5, 25, 50, 75 and 95 % over t: forward as bands, reverse as lines."""
    at, t = [0.05, 0.25, 0.5, 0.75, 0.95], forward["t"].to_numpy()
    p, q = (x.transpose("draw", "t", "feature").to_numpy() for x in (posterior, forward))
    order = most_different(p[:, 0], q[:, 0])
    figure, panels = panels_of(len(order), "t", "x⁽ᵗ⁾, chain's units")
    for axes, k in zip(panels, order, strict=False):
        lowest, lower, middle, upper, highest = np.quantile(q[:, :, k], at, axis=0)
        axes.fill_between(t, lowest, highest, color=FORWARD, alpha=0.25, lw=0, label="forward q, 5 to 95 %")
        axes.fill_between(t, lower, upper, color=FORWARD, alpha=0.35, lw=0, label="25 to 75 %, and the median")
        axes.plot(t, middle, color=FORWARD, lw=1)
        lines = axes.plot(t, np.quantile(p[:, :, k], at, axis=0).T, color=REVERSE, lw=1)
        lines[0].set_label("reverse p, the same quantiles")
        axes.set_title(str(forward["feature"].to_numpy()[k]), fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    return figure


def marginal_distances(report: Marginals) -> Figure:
    """Wasserstein distance per feature and energy distance over t, against what sampling noise alone gives, and k̂.

    Of more than twenty features, all fits counted, the left panel shows bands.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    table = report.table
    ratio = (
        (table.wasserstein / table.wasserstein_band).groupby([table.t, table.chain, table.feature]).first().unstack("t")
    )
    if len(ratio) <= _MOST_LINES:
        for line in ratio.to_numpy():
            left.plot(ratio.columns, line, color=REVERSE, alpha=0.6, lw=1)
        left.plot([], [], color=REVERSE, label="each chain and feature")
    else:
        for low, high, alpha, label in ((0.0, 1.0, 0.2, "all features"), (0.05, 0.95, 0.4, "nine tenths of them")):
            left.fill_between(
                ratio.columns, ratio.quantile(low), ratio.quantile(high), color=REVERSE, alpha=alpha, lw=0, label=label
            )
        left.plot(ratio.columns, ratio.median(), color=REVERSE, label="their median")
    left.axhline(1, color="gray", ls="--", label="99 % band of sampling noise")
    left.set(xlabel="t", ylabel="Wasserstein distance / its band", title="feature by feature", ylim=(0, None))
    for c, one in table.groupby("chain"):
        first = one[one.feature == one.feature.iloc[0]]
        middle.plot(first.t, first.energy, color=REVERSE, alpha=0.8, label="p against q" if c == 0 else None)
        middle.plot(
            first.t, first.energy_band, color="gray", ls="--", label="99 % band of sampling noise" if c == 0 else None
        )
    middle.set(
        xlabel="t", ylabel="energy distance (chain's units)", title=f"jointly: p = {report.p_value:.2g}", ylim=(0, None)
    )
    for k in report.pareto_k:
        right.hist(k[np.isfinite(k)], bins=40, alpha=0.6, color=REVERSE)
    label = f"{report.k_threshold:.2f}: not to be trusted beyond"
    right.axvline(report.k_threshold, color="gray", ls="--", label=label)
    right.set(xlabel="Pareto k̂ of the importance weights", ylabel="data", title="importance weights, N14")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
    return figure


def schedule(dt: xr.DataTree, initial_beta: Float[np.ndarray, " T"] | None = None) -> Figure:
    """β_t and the log-SNR of each fit, and those that learning began from."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    group = dt["fit"].dataset
    t, num_fits = group["t"].to_numpy(), group.sizes["chain"]
    marker = "." if len(t) <= 60 else ""
    for c in range(num_fits):
        for axes, name in ((left, "beta"), (right, "log_snr")):
            style = {"color": _colour(c, num_fits), "label": _label(c, num_fits)}
            axes.plot(t, group[name][c], marker=marker, alpha=0.8, **style)
    if initial_beta is not None:
        log_alpha_bar = np.cumsum(np.log1p(-np.minimum(initial_beta, 1 - 1e-7)))
        left.plot(t, initial_beta, color="gray", ls="--", label="before learning")
        right.plot(t, log_alpha_bar - np.log(-np.expm1(log_alpha_bar)), color="gray", ls="--", label="before learning")
    left.set(xlabel="t", ylabel="β_t", yscale="log")
    right.set(xlabel="t", ylabel="log-SNR of x⁽ᵗ⁾ (nats)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small")
    return figure


def _colour(c: int, num_fits: int) -> Any:
    """Colours that can be told apart where the fits are few, else a shade for each."""
    return f"C{c}" if num_fits <= _MOST_IN_LEGEND else colormaps["viridis"](c / (num_fits - 1))


def _label(c: int, num_fits: int, more: str = "") -> str | None:
    """What the legend says of fit c: of few fits each, of many the first and the last."""
    return f"chain {c}{more}" if num_fits <= _MOST_IN_LEGEND or c in (0, num_fits - 1) else None


def elbo_parts(dt: xr.DataTree) -> Figure:
    """What each t costs: KL(q(x_{t−1} given x_t, x_0) ‖ p(x_{t−1} given x_t)), with the two end terms in the legend."""
    group = dt["fit"].dataset
    t, num_fits = group["t"].to_numpy(), group.sizes["chain"]
    figure = Figure(figsize=(6.5, 3.6 + 0.15 * min(num_fits, _MOST_IN_LEGEND)), layout="constrained")
    axes = figure.subplots()
    for c in range(num_fits):
        parts = group["elbo_part"][c].to_numpy()
        more = f": log p(x⁽⁰⁾|x⁽¹⁾) = {parts[0]:.3f}, KL of x⁽ᵀ⁾ = {float(group['prior_kl'][c]):.3f}"
        style = {"color": _colour(c, num_fits), "label": _label(c, num_fits, more)}
        axes.plot(t[1:], -parts[1:], marker="." if len(t) <= 60 else "", alpha=0.8, **style)
    axes.set(xlabel="t", ylabel="E KL at t (nats per datum)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def loss(dt: xr.DataTree) -> Figure:
    """The negative ELBO per datum of the batches, averaged over windows of a hundredth of the run."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = dt["fit"].dataset["loss"].to_numpy()
    window = max(1, losses.shape[1] // 100)
    count = losses.shape[1] // window
    means = losses[:, : count * window].reshape(len(losses), count, window).mean(-1)
    for c, line in enumerate(means):
        style = {"color": _colour(c, len(means)), "label": _label(c, len(means))}
        axes.plot(np.arange(1, count + 1) * window, line, alpha=0.8, **style)
    low, high = means.min(), np.quantile(means, 0.97)
    axes.set(
        xlabel="step",
        ylabel="negative ELBO (nats per datum)",
        ylim=(low - 0.05 * (high - low), high + 0.1 * (high - low)),
    )
    axes.legend()
    return figure
