"""Monotone transforms towards a standard normal."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from probdiff.datasets import transforms

KINDS = {
    "line": (stats.norm(5, 2), {}, 0),
    "spline": (stats.norm(5, 2), {}, 20),
    "logarithm": (stats.lognorm(1), {"base": "log", "parameters": (0.0, 1.0)}, 10),
    "logarithm below an end": (stats.gumbel_l(-8), {"base": "log", "parameters": (3.0, -1.0)}, 10),
    "arcsinh": (stats.t(2), {"base": "arcsinh", "parameters": (0.1, 1.3)}, 10),
    "logit": (stats.beta(0.5, 2), {"base": "logit", "parameters": (0.0, 1.0)}, 10),
}


def made(kind, n=2000):
    density, options, num_knots = KINDS[kind]
    x = density.rvs(n, random_state=0)
    return transforms.standardised(x, **options, num_knots=num_knots), x


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_undoes_the_transform_beyond_the_rows_too(kind):
    transform, x = made(kind)
    e = np.concatenate([np.linspace(-6, 6, 501), transform(x)])
    np.testing.assert_allclose(transform(transform.inverse(e)), e, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_is_that_of_the_transform(kind):
    transform, x = made(kind)
    inner = x[np.abs(transform(x)) < 4]
    h = 1e-6 * np.minimum(np.abs(inner) + 1e-3, 1.0)
    difference = (transform(inner + h) - transform(inner - h)) / (2 * h)
    # a secant over a knot has the mean of two bends
    np.testing.assert_allclose(np.exp(transform.log_slope(inner)), difference, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_a_standard_normal_transformed_back_integrates_to_one(kind):
    transform, _ = made(kind)

    def density(x):
        x = np.atleast_1d(x)
        return float(np.exp(stats.norm.logpdf(transform(x)) + transform.log_slope(x))[0])

    ends = transform.inverse(np.linspace(-8, 8, 161))
    mass = sum(integrate.quad(density, low, high)[0] for low, high in itertools.pairwise(ends))
    assert mass == pytest.approx(1, abs=1e-6)


# the most nats that may be lost, a row
TRUTHS = {
    "log-normal": (stats.lognorm(2), {"low": 0.0}, 0.03),
    "log-normal, of which nothing is known": (stats.lognorm(2), {}, 0.1),
    "Student": (stats.t(2), {}, 0.03),
    "Cauchy": (stats.cauchy(), {}, 0.1),
    "normal": (stats.norm(3, 0.1), {}, 0.01),
    "uniform": (stats.uniform(), {"low": 0.0, "high": 1.0}, 0.05),
    "gamma": (stats.gamma(0.5), {"low": 0.0}, 0.03),
}


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("num_rows", [1000, 10_000])
def test_the_density_is_near_the_true_one(name, num_rows):
    density, ends, nats = TRUTHS[name]
    x, unseen = density.rvs(num_rows, random_state=1), density.rvs(50_000, random_state=2)
    transform = transforms.choose(x, **ends)
    loss = density.logpdf(unseen) - stats.norm.logpdf(transform(unseen)) - transform.log_slope(unseen)
    assert -4 * loss.std() / math.sqrt(len(loss)) < loss.mean() < nats


def test_two_modes_are_worth_knots_and_a_normal_is_not():
    rng = np.random.default_rng(0)
    apart = np.where(rng.random(1000) < 0.3, rng.normal(-3, 0.5, 1000), rng.normal(1, 1, 1000))
    assert len(transforms.choose(apart).at) > 2
    plain = transforms.choose(rng.normal(10, 3, 1000))
    assert plain.base == "identity"
    assert len(plain.at) == 2


@pytest.mark.parametrize(
    ("density", "low", "high"),
    [
        (stats.beta(0.2, 0.2), 0.0, 1.0),
        (stats.beta(0.2, 0.2, loc=5, scale=2), 5.0, 7.0),
        (stats.lognorm(3), 0.0, math.inf),
        (stats.lognorm(3, loc=-2), -2.0, math.inf),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_draw_of_a_million_leaves_the_ends_or_lies_on_them(density, low, high, sign):
    e, x = np.random.default_rng(0).standard_normal(10**6), sign * density.rvs(300, random_state=0)
    low, high = sorted((sign * low, sign * high))
    x = x[(x > low) & (x < high)]  # rounding of the draws themselves
    drawn = transforms.choose(x, low, high).inverse(e)
    assert drawn.min() > low
    assert drawn.max() < high


@pytest.mark.parametrize("num_knots", [5, 40])
def test_values_that_are_often_there_do_not_break_a_spline(num_knots):
    x = np.concatenate([np.zeros(900), np.linspace(1, 2, 100)])
    transform = transforms.standardised(x, num_knots=num_knots)
    e = transform(x)
    assert np.isfinite(e).all()
    assert np.isfinite(transform.log_slope(x)).all()
    np.testing.assert_allclose(transform.inverse(e), x, atol=1e-6)


def test_a_value_that_is_often_there_lies_in_the_middle_of_its_scores():
    x = np.concatenate([np.linspace(-2, -1, 250), np.zeros(500), np.linspace(1, 2, 250)])
    assert abs(transforms.standardised(x, num_knots=20)(np.zeros(1))[0]) < 0.05


@pytest.mark.parametrize(
    ("x", "ends", "message"),
    [
        (np.ones(100), {}, "x has the same value"),
        (np.array([1.0, np.nan, 2.0]), {}, "not finite"),
        (np.ones((3, 2)), {}, r"x has shape \(3, 2\)"),
        (np.array([1.0, -1.0, 2.0]), {"low": 0.0}, r"outside of \(0.0, inf\), in row\(s\) 1"),
    ],
)
def test_what_is_no_column_of_numbers_is_refused(x, ends, message):
    with pytest.raises(ValueError, match=message):
        transforms.choose(x, **ends)
