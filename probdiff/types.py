"""Shapes and symbols: the legend for every docstring in the package.

| letter | meaning                                  |
|--------|------------------------------------------|
| N      | data                                     |
| B      | batch                                    |
| T      | time steps of the chain                  |
| D      | event size                               |
| S      | particles or draws                       |
| C      | chains, i.e. independent fits            |

x_0 is data and x_T is noise. `beta[t - 1]` is β_t. Log densities are in nats.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

type Key = PRNGKeyArray
type Time = int | Int[Array, "..."]
type Event = Float[Array, "*batch *event"]
type Data = Float[Array | np.ndarray, "N *event"]
type Params = dict[str, Any]


def check_key(rng_key: Key | None) -> Key:
    """A typed key of `rng_key`, which may be an old-style one. Raises `TypeError` where it is no key."""
    dtype = getattr(rng_key, "dtype", None)
    if (
        rng_key is not None
        and dtype is not None
        and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        and rng_key.shape == ()
    ):
        return rng_key
    if rng_key is not None and dtype == jnp.uint32 and rng_key.shape == (2,):
        return jax.random.wrap_key_data(rng_key)
    raise TypeError(f"rng_key is {rng_key!r}; it must be one key, such as jax.random.key(0)")


def check_count(value: int, name: str, least: int) -> None:
    """Raises `ValueError` where `value` is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
