"""Units of the chain: mean and standard deviation, and robust ones where values lie far out."""

import warnings

import jax
import numpy as np
import pytest

import probdiff
from probdiff import GaussianDiffusion, networks, schedules
from probdiff.units import Units, chain_units, principal_axes, warn_of_levels, warn_of_precision


def gaussian(D, schedule=schedules.LearnedBetas(40)):  # noqa: B008
    return GaussianDiffusion((D,), schedule, networks.ResidualMLP(width=32, depth=2))


def draws_of(name):
    rng = np.random.default_rng(0)
    return {
        "normal": lambda: rng.normal(size=5000),
        "t of 3 degrees": lambda: rng.standard_t(3, 5000),
        "exponential": lambda: rng.exponential(size=5000),
        "two values": lambda: rng.integers(0, 2, 5000) + 1e-3 * rng.normal(size=5000),
        "ink of a pixel": lambda: 16 * (rng.uniform(size=5000) < 0.03) + rng.uniform(size=5000),
        "a few rows at 1e8": lambda: np.append(rng.normal(size=4995), 1e8 + rng.normal(size=5)),
        "log-normal": lambda: np.exp(2.5 * rng.normal(size=5000)),
        "a few rows at 100": lambda: np.append(rng.normal(size=4995), 100 + rng.normal(size=5)),
        "Cauchy": lambda: rng.standard_cauchy(5000),
    }[name]()


@pytest.mark.parametrize("name", ["normal", "t of 3 degrees", "exponential", "two values", "ink of a pixel"])
def test_units_that_serve_are_not_spoken_of(name):
    x = draws_of(name)[:, None]
    np.testing.assert_array_equal(chain_units(gaussian(1), x), [x.mean(0), x.std(0)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a few rows at 1e8", r"feature\(s\) dose have outlying values .* 0\.001 of the rows .* Look at these rows"),
        ("log-normal", "have outlying values or heavy tails: in 'dose', 0.0"),
        ("Cauchy", "have outlying values or heavy tails"),
    ],
)
def test_units_of_features_with_outlying_values_are_robust_and_spoken_of(name, words):
    x = np.stack([draws_of("normal"), draws_of(name)], axis=1)
    with pytest.warns(UserWarning, match=words):
        loc, scale = chain_units(gaussian(2), x, ["height", "dose"])
    np.testing.assert_allclose([loc[0], scale[0]], [x[:, 0].mean(), x[:, 0].std()], rtol=1e-12)
    assert loc[1] == np.median(x[:, 1])
    bulk = np.diff(np.quantile(x[:, 1], [0.05, 0.95])) / (2 * 1.645)
    assert scale[1] == pytest.approx(np.sqrt(x[:, 1].std() * bulk[0]), rel=1e-12)


def test_units_are_not_robust_where_a_schedule_cannot_adapt():
    x = draws_of("a few rows at 1e8")[:, None]
    with pytest.warns(UserWarning, match="have outlying values"):
        loc, scale = chain_units(gaussian(1, schedules.cosine(40)), x)
    np.testing.assert_allclose([loc, scale], [x.mean(0), x.std(0)], rtol=1e-12)


def test_units_are_robust_from_four_times_the_bulk_on():
    x = draws_of("a few rows at 100")[:, None]
    with pytest.warns(UserWarning, match="have outlying values"):
        np.testing.assert_allclose(chain_units(gaussian(1), x), [x.mean(0), x.std(0)], rtol=1e-12)


def test_features_of_any_shape_have_units_of_that_shape():
    x = np.random.default_rng(0).normal(3.0, 2.0, (500, 2, 3))
    d = GaussianDiffusion((2, 3), schedules.LearnedBetas(4), networks.ResidualMLP(width=8, depth=1))
    loc, scale = chain_units(d, x)
    np.testing.assert_allclose(loc, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale, x.std(0), rtol=1e-12)


TIMES_OF_A_DAY = np.array([1.76404e9]), np.array([2.5e4])
TIMES = r"'0' is near 1\.76404e\+09 and varies by 2\.5e\+04, .* are 1\.3e\+02 apart.*x64"


def test_times_of_a_day_are_too_far_from_zero():
    with pytest.warns(UserWarning, match=TIMES):
        warn_of_precision(*TIMES_OF_A_DAY)


def test_a_few_rows_far_out_do_not_hide_that():
    x = np.append(1.76404e9 + 2.5e4 * np.random.default_rng(0).normal(size=4995), np.zeros(5))[:, None]
    outliers = pytest.warns(UserWarning, match="have outlying values")
    with outliers, pytest.warns(UserWarning, match=r"lie far from zero for float32: .* varies by 2\.49e\+04"):
        chain_units(gaussian(1), x)


@pytest.mark.usefixtures("x64")
def test_double_precision_is_fine_enough_for_times():
    warn_of_precision(*TIMES_OF_A_DAY)


@pytest.mark.usefixtures("x64")
def test_some_numbers_are_too_far_from_zero_for_double_precision_too():
    with pytest.warns(UserWarning, match=r"lie far from zero for float64: .* Subtract an origin$"):
        warn_of_precision(np.array([1e17]), np.array([2.5e2]))


def test_years_are_near_enough_to_zero():
    warn_of_precision(np.array([2000.0]), np.array([10.0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:feature")
def test_a_few_rows_far_out_leave_the_draws_of_the_others_near_the_data():
    x = draws_of("a few rows at 1e8")[:, None]
    fit = probdiff.fit(gaussian(1), x, rng_key=jax.random.key(0), num_steps=3000, progress_bar=False)
    draws = fit.sample(jax.random.key(1), 5000)
    # ±1.6 in the data, ±4800 in units of the standard deviation
    assert np.all(np.abs(np.quantile(draws, [0.05, 0.95])) < 5)


def test_levels_are_spoken_of_and_measurements_are_not():
    rng = np.random.default_rng(0)
    x = np.stack(
        [rng.choice([17.5, 22.0, 27.0], 500), rng.normal(size=500), np.repeat(rng.normal(size=250), 2)], axis=1
    )
    with pytest.warns(
        UserWarning, match=r"feature\(s\) age look like levels .* 'age' has 3 distinct values in 500 rows"
    ):
        warn_of_levels(x, ["age", "height", "twins"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_levels(x[:, 1:])


def test_axes_are_those_of_the_shrunk_covariance():
    """On them z is uncorrelated, but for the shrinkage, which turns no axis; arrays and many features have none."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 3)) @ [[1.0, 0.8, 0.1], [0.0, 0.5, 0.2], [0.0, 0.0, 0.7]]
    rotation, variance = principal_axes(z)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    units = Units(np.arange(3.0), np.array([1.0, 2.0, 10.0]), rotation)
    on_axes = units.to_chain(units.loc + units.scale * z)
    covariance = np.cov(on_axes.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-10)
    np.testing.assert_allclose(variance.sum(), z.var(0).sum(), rtol=1e-10)
    np.testing.assert_allclose(units.to_data(on_axes), units.loc + units.scale * z, atol=1e-12)
    far = np.concatenate([z, np.full((1, 3), [1e6, 0.0, 0.0])])
    assert principal_axes(far)[1].sum() < 1.2 * variance.sum()
    assert principal_axes(z[:, :1])[0] is None
    assert principal_axes(np.zeros((4, 2, 2)))[0] is None
    assert principal_axes(rng.normal(size=(10, 129)))[0] is None
