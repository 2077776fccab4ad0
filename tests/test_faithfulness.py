"""Draws beside data: the three verdicts, and that each is said for cause."""

import re

import jax
import numpy as np
import pandas as pd
import pytest
from helpers.once import once

import probdiff
from probdiff import GaussianDiffusion, networks, schedules
from probdiff.faithfulness import faithfulness

NAMES = ["a", "b", "c", "d"]


def rows_of(seed, n, D=4):
    """One factor behind all columns."""
    rng = np.random.default_rng(seed)
    return 3 + 2 * (0.8 * rng.normal(size=(n, 1)) + 0.6 * rng.normal(size=(n, D)))


def moved(x):
    x[:, 2] += 1.0
    return x


def shrunk(x):
    x[:, 1] = 3 + 0.7 * (x[:, 1] - 3)
    return x


def exploded(x):
    x[:2, 3] = -1e4
    return x


def uncorrelated(x):
    x[:, 0] = np.random.default_rng(9).permutation(x[:, 0])
    return x


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (moved, r"in column c, with an sd of .* a median \+0\.[3-7]\d* sd away"),
        (shrunk, r"in column b, with an sd of 0\.[67]"),
        (exploded, "in 2 draws that lie more than 20 times the range of the data beyond it"),
        (uncorrelated, "in the rank correlation of a and "),
    ],
)
def test_what_differs_is_named(broken, words):
    alike = faithfulness(broken(rows_of(0, 5000)), rows_of(1, 300), NAMES)
    assert alike.verdict.startswith("The draws differ from the data, ")
    assert re.search(words, alike.verdict)


def test_draws_of_the_data_are_faithful_where_rows_are_many():
    alike = faithfulness(rows_of(0, 5000), rows_of(1, 600), NAMES)
    assert alike.verdict.startswith("The draws are faithful")
    assert alike.columns["sd ratio"].between(0.85, 1.15).all()
    assert alike.power > 0.9
    # and only their joint distribution can tell these apart
    of_pairs = rows_of(0, 5000)
    of_pairs[:, :2] = 3 + np.abs(of_pairs[:, :2] - 3) * np.sign(np.random.default_rng(2).normal(size=(5000, 1)))
    assert faithfulness(of_pairs, rows_of(1, 600), NAMES).energy_p < 0.05


def test_of_few_rows_it_cannot_be_told():
    alike = faithfulness(rows_of(0, 5000), rows_of(1, 40), NAMES)
    assert alike.verdict.startswith("Whether the draws are like the data cannot be told from so few rows: a shift of")
    assert alike.power < 0.5
    assert alike.noticed in (0.75, 1.0, 1.5)
    assert f", and one of {alike.noticed:g} sd with 0.8 or more" in alike.verdict
    assert repr(alike).splitlines()[0] == alike.verdict


def test_columns_that_are_constant_and_frames_are_taken():
    rows, draws = rows_of(1, 400), rows_of(0, 5000)
    rows[:, 2], draws[:, 2] = 0.0, np.arange(5000) % 1000 == 0
    frames = pd.DataFrame(draws, columns=NAMES)[NAMES[::-1]], pd.DataFrame(rows, columns=NAMES)
    alike = faithfulness(*frames)
    assert alike.columns["column"].tolist() == NAMES
    assert alike.pair[0] != alike.pair[1]
    for wrong, words in (
        ((draws[None], rows), r"draws has shape \(1, 5000, 4\); .* of several chains choose one, such as draws\[0\]"),
        ((draws[:, :3], rows), r"draws has shape \(5000, 3\); \(N, 4\) is wanted"),
        ((draws, np.where(rows > 4, np.nan, rows)), "rows has entries that are NaN"),
        ((draws, rows, ["a"]), "features has 1 names; rows have 4 columns"),
    ):
        with pytest.raises(ValueError, match=words):
            faithfulness(*wrong)


@once
def draws_of_five_steps(kind):
    """Of a fit of 2,000 rows, which has hardly left the Gaussian that it starts from."""
    d = GaussianDiffusion((4,), schedules.cosine(8), networks.ResidualMLP(8, 1))
    rows = DATA[kind](rows_of(5, 2000), 5)
    fit = probdiff.fit(d, rows, rng_key=jax.random.key(0), num_steps=5, validation=0.0, progress_bar=False)
    return fit.sample(jax.random.key(1), 5000)


DATA = {
    "a Gaussian": lambda x, seed: x,
    "a ring": lambda x, seed: np.concatenate([ring_of(seed, len(x)), x[:, 2:]], 1),
}


def ring_of(seed, n):
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.parametrize(
    ("kind", "num_rows", "verdict"),
    [
        ("a ring", 600, "The draws differ from the data, in column [ab]"),
        ("a Gaussian", 600, "The draws are faithful"),
        ("a Gaussian", 40, "Whether the draws are like the data cannot be told from so few rows"),
    ],
)
def test_a_fit_of_five_steps_is_a_gaussian_and_called_so(kind, num_rows, verdict):
    alike = faithfulness(draws_of_five_steps(kind), DATA[kind](rows_of(6, num_rows), 6), NAMES)
    assert re.search(verdict, alike.verdict)


@pytest.mark.slow
def test_faithful_draws_are_seldom_said_to_differ():
    """By the level of 0.01 more than 6 of 150 have a probability of less than 0.001."""
    differ = sum("differ from" in faithfulness(rows_of(2 * s, 2000), rows_of(2 * s + 1, 100), NAMES).verdict
                 for s in range(150))  # fmt: skip
    assert differ <= 6
