"""What is made once, so that what is compiled for it is compiled once for all tests of a file."""

from functools import cache, wraps

import jax.numpy as jnp


def once(make):
    """`make`, whose results are kept: one for each of its arguments and each precision that JAX runs in."""
    kept = cache(lambda precision, *args, **kwargs: make(*args, **kwargs))
    return wraps(make)(lambda *args, **kwargs: kept(jnp.result_type(float), *args, **kwargs))
