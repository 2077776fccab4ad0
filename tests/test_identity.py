"""What is equal by value, and what is not."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusions import linear_diffusion

from probdiff import BinomialDiffusion, GaussianDiffusion, networks, schedules
from probdiff.identity import value_of


def gaussian(beta=(0.1, 0.2), width=8, covariance="full"):
    return GaussianDiffusion((2,), schedules.LearnedBetas(2, list(beta)), networks.ResidualMLP(width, 1), covariance)


@dataclass(frozen=True, eq=False)
class Named(GaussianDiffusion):
    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "told", [])


def named(told):
    d = Named((2,), schedules.linear(3), networks.ResidualMLP(8, 1))
    d.told.append(told)
    return d


PAIRS = {
    "the same": (gaussian, gaussian, True),
    "another width": (gaussian, partial(gaussian, width=9), False),
    "another start": (gaussian, partial(gaussian, beta=(0.1, 0.3)), False),
    "another covariance": (gaussian, partial(gaussian, covariance="diagonal"), False),
    "a network of arrays": (linear_diffusion.__wrapped__, linear_diffusion.__wrapped__, True),
    "other arrays": (linear_diffusion.__wrapped__, partial(linear_diffusion.__wrapped__, seed=1), False),
    "another family": (
        lambda: GaussianDiffusion((2,), schedules.linear(3), networks.ResidualMLP(8, 1)),
        lambda: BinomialDiffusion((2,), schedules.linear(3), networks.ResidualMLP(8, 1)), False,
    ),
    "an attribute that is no field": (partial(named, 1), partial(named, 2), False),
    "the same attribute": (partial(named, 1), partial(named, 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_diffusions_are_equal_by_value(name):
    make, make_other, equal = PAIRS[name]
    covariance = ("full",) if "arrays" in name else ()
    one, other = make(*covariance), make_other(*covariance)
    assert (one == other) is equal
    assert (hash(one) == hash(other)) is equal
    assert one == one


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros(2), np.zeros(2, np.float32)), (np.zeros((2, 1)), np.zeros((1, 2))), (1, 1.0), (True, 1),
        (0.0, "0.0"), ([1], (1,)), (lambda x: x, lambda x: x), ({1: {2}}, {1: {2}}), (jnp.array([1]), jnp.array([2])),
    ],
)  # fmt: skip
def test_other_values_differ(a, b):
    assert value_of(a) != value_of(b)
    assert value_of(a) == value_of(a)
    assert hash(value_of(a)) == hash(value_of(a))
