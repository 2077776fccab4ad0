"""Every figure, for few and many features and fits: labelled axes, and legends that can be read."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from probdiff import plots
from probdiff.diagnostics import Marginals
from probdiff.plots.of_tables import of_columns

T, DRAWS = 6, 40


def made(num_features, num_fits, names=None):
    """A `DataTree` as that of a fit, of numbers drawn at random, and the comparison of its marginals."""
    rng = np.random.default_rng(0)
    names = names or [f"feature {i}" for i in range(num_features)]
    draws = ("chain", "draw", "t", "feature")
    coords = {"t": range(T + 1), "feature": names}
    x = rng.normal(size=(2, num_fits, DRAWS, T + 1, num_features))
    per_t = rng.uniform(0.1, 0.9, size=(3, num_fits, T))
    per_t[2] *= -1
    fit = {name: (("chain", "t"), values) for name, values in zip(("beta", "log_snr", "elbo_part"), per_t, strict=True)}
    fit |= {"loss": (("chain", "step"), rng.normal(size=(num_fits, 250))), "prior_kl": ("chain", np.ones(num_fits))}
    groups = {
        "posterior": xr.Dataset({"x": (draws, x[0])}, coords),
        "forward": xr.Dataset({"x": (draws, x[1])}, coords),
        "posterior_predictive": xr.Dataset({"x_0": (("chain", "draw", "feature"), x[0, :, :, 0])}, {"feature": names}),
        "observed_data": xr.Dataset({"x_0": (("datum", "feature"), x[1, 0, :, 0])}, {"feature": names}),
        "fit": xr.Dataset(fit, {"t": range(1, T + 1)}),
    }
    rows = [{"chain": c, "t": t, "feature": name} for c in range(num_fits) for t in range(T + 1) for name in names]
    table = pd.DataFrame(rows)
    for column in ("wasserstein", "wasserstein_band", "energy", "energy_band"):
        table[column] = rng.uniform(0.5, 1.5, size=len(table))
    report = Marginals(table, 0.3, rng.normal(size=(num_fits, DRAWS)), 0.6, DRAWS)
    return xr.DataTree.from_dict({name: xr.DataTree(group) for name, group in groups.items()}), report


FIGURES = {
    "samples": lambda dt, report: plots.samples(dt),
    "marginals_over_time": lambda dt, report: plots.marginals_over_time(dt),
    "marginal_distances": lambda dt, report: plots.marginal_distances(report),
    "schedule": lambda dt, report: plots.schedule(dt, np.linspace(0.1, 0.5, T)),
    "elbo_parts": lambda dt, report: plots.elbo_parts(dt),
    "loss": lambda dt, report: plots.loss(dt),
}


@pytest.mark.parametrize("num_fits", [1, 12])
@pytest.mark.parametrize("num_features", [1, 2, 13, 64])
@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_is_labelled_and_every_legend_short(name, num_features, num_fits):
    figure = FIGURES[name](*made(num_features, num_fits))
    assert isinstance(figure, Figure)
    assert figure.axes
    for axes in figure.axes:
        grid = axes.get_subplotspec()
        if not axes.axison:
            continue
        assert axes.get_xlabel() or figure.get_supxlabel() or not grid.is_last_row()
        assert axes.get_ylabel() or figure.get_supylabel() or not grid.is_first_col()
        legend = axes.get_legend()
        if legend is not None:
            words = [text.get_text() for text in legend.get_texts()]
            assert 1 <= len(words) <= 10
            assert len(set(words)) == len(words)
            assert not any(word.startswith("_") for word in words)


def test_pixels_are_images():
    figure = plots.samples(made(64, 1, [f"pixel_{i}" for i in range(64)])[0])
    assert [len(axes.images) for axes in figure.axes] == [1, 1]
    assert [axes.get_title() for axes in figure.axes] == ["data", "draws of x⁽⁰⁾ from p"]


@pytest.mark.parametrize(("num_features", "num_lines"), [(13, 13), (64, 0)])
def test_many_features_are_bands(num_features, num_lines):
    left = plots.marginal_distances(made(num_features, 1)[1]).axes[0]
    lines = [line for line in left.lines if len(line.get_xdata()) == T + 1]
    assert len(lines) == num_lines + (num_lines == 0)  # their median
    assert len(left.collections) == (0 if num_lines else 2)


def test_few_fits_are_named_and_of_many_the_first_and_the_last():
    for num_fits, names in ((3, ["chain 0", "chain 1", "chain 2"]), (12, ["chain 0", "chain 11"])):
        axes = plots.loss(made(2, num_fits)[0]).axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == names
        assert len({str(line.get_color()) for line in axes.lines}) == num_fits


def table(num_features, seed=0, num_rows=300):
    """Rows of one factor, and draws of the same but for two columns: one is shifted, one is uncorrelated."""
    rng = np.random.default_rng(seed)
    rows, draws = (
        0.7 * rng.normal(size=(n, 1)) + 0.7 * rng.normal(size=(n, num_features)) for n in (num_rows, 2 * num_rows)
    )
    draws[:, 2] += 1
    draws[:, 1] = rng.permutation(draws[:, 1])
    return draws, rows, [f"feature {i}" for i in range(num_features)]


@pytest.mark.parametrize("num_features", [3, 13, 64])
def test_figures_of_a_table_name_its_columns_those_that_differ_most_first(num_features):
    figures = of_columns(*table(num_features))
    assert set(figures) == {"quantiles", "samples", "correlations", "principal_components"}
    names = [axes.get_xlabel() for axes in figures["samples"].axes if axes.get_xlabel()]
    assert names[0] == "feature 2"
    assert "feature 1" in names
    assert len(names) == min(num_features, 6)
    panels = [axes.get_title() for axes in figures["quantiles"].axes if axes.get_title()]
    assert len(panels) == min(num_features, 36)
    assert len(set(panels)) == len(panels)
    assert ("differ most" in str(figures["quantiles"].get_suptitle())) == (num_features == 64)
    labels = [text.get_text() for text in figures["correlations"].axes[0].get_yticklabels()]
    assert labels[0] == "feature 0"
    assert len(labels) <= 32
    assert of_columns(*(x[..., :1] for x in table(3)[:2]), ["one"]).keys() == {"quantiles"}


def test_of_one_column_there_are_no_principal_components():
    with pytest.raises(ValueError, match="rows have one column"):
        plots.principal_components(np.zeros((5, 1)), np.zeros((4, 1)))


def test_draws_beyond_the_frame_are_counted():
    draws, rows, names = table(4)
    draws[:7, 3] = 1e6
    title = plots.corner(draws, rows, names).get_suptitle()
    assert title.endswith("7 of 600 draws beyond the frame")


def test_sorted_rows_lie_in_the_band_of_quantiles_where_draws_are_right():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(2):
        axes = plots.quantiles(rng.normal(size=(5000, 36)), rng.normal(size=(100, 36))).axes
        for panel in axes:
            band, points = panel.collections
            vertices = band.get_paths()[0].vertices
            edges = [vertices[np.isclose(vertices[:, 0], x), 1] for x in points.get_offsets()[:, 0]]
            inside += [e.min() <= y <= e.max() for e, y in zip(edges, points.get_offsets()[:, 1], strict=True)]
    assert 0.98 < np.mean(inside) < 0.998


def test_correlations_that_differ_by_noise_alone_are_few_standard_errors_apart():
    rng = np.random.default_rng(1)
    rows, draws = (rng.normal(size=(n, 1)) + rng.normal(size=(n, 20)) for n in (150, 5000))
    apart = plots.correlations(draws, rows).axes[2].images[0].get_array()
    assert 0.7 < np.std(apart[np.triu_indices(20, 1)]) < 1.3
    np.testing.assert_array_equal(np.diag(apart), 0)
