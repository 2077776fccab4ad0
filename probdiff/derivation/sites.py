"""Sites whose log densities, draws and moments are compiled, one program for each kind of distribution and shape."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.kl import kl_divergence
from numpyro.primitives import Messenger

from probdiff.types import Key


def compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a distribution, under `jit`; as it is for what `jit` cannot take.

    A distribution of a user's own may hold what is no array, and then cannot be passed to a compiled function.
    """
    jitted = jax.jit(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return jitted(*args, **kwargs)
        except Exception:  # whatever a user's class may raise; if it is an error of its own, it is raised again
            return function(*args, **kwargs)

    return call


@compiled
def log_prob(p: dist.Distribution, x: Array) -> Array:
    """log p(x), nats."""
    return p.log_prob(x)


@compiled
def _draw(p: dist.Distribution, rng_key: Key) -> Array:
    return p(rng_key=rng_key)


class Site(dist.Distribution):
    """The distribution at a site, with its draws and its log densities compiled."""

    def __init__(self, p: dist.Distribution) -> None:
        self.p = p
        super().__init__(p.batch_shape, p.event_shape)

    @property
    def support(self) -> Any:
        return self.p.support

    @property
    def has_rsample(self) -> bool:
        return self.p.has_rsample

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.p.sample(key, sample_shape) if sample_shape else _draw(self.p, key)

    def log_prob(self, value: Array) -> Array:
        return log_prob(self.p, value)


class compiled_sites(Messenger):
    """Has every sample site of a program drawn from, and evaluated, by compiled functions: put around the program."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not isinstance(msg["fn"], Site):
            msg["fn"] = Site(msg["fn"])


@compiled
def _kl(q: dist.Distribution, p: dist.Distribution) -> Array:
    return kl_divergence(q, p)


kl_divergence.add((Site, Site), lambda q, p: _kl(q.p, p.p))
