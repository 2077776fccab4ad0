"""A chain as one site "x", whose leading axis is time, by a scan."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from probdiff.types import Event, Time


def where(condition: bool | Array, a: dist.Distribution, b: dist.Distribution) -> dist.Distribution:
    """a where the condition holds, and b elsewhere: two distributions of one form."""
    return jax.tree.map(partial(jnp.where, condition), a, b)


def scan_site(
    plate: AbstractContextManager,
    step: Callable[[Event, Time], dist.Distribution],
    initial: Event,
    times: range,
) -> Event:
    """Draws the site "x" from `step(x, t)` for t in `times`, and returns the last x."""
    ascending = times.step > 0 and len(times) > 1

    def body(x: Event, t: Time) -> tuple[Event, None]:
        with plate, handlers.trace() as trace:
            x = numpyro.sample("x", step(x, t), infer={"ascending": ascending})
        # NumPyro pairs the draws of a scan by position; replay brings the guide's `infer` along
        if trace["x"]["infer"]["ascending"] != ascending:
            raise ValueError(
                "a stacked guide must run in the order of the stacked model, x_T to x_1: "
                "use forward_posterior with stacked=True as the guide"
            )
        return x, None

    return scan(body, initial, jnp.asarray(times))[0]
