"""A family of diffusions: its forward kernel and what follows from it, as NumPyro distributions.

The chains know a family by five distributions: `step` q(x_t given x_{t−1}), `marginal` q(x_t given
x_0), `posterior` q(x_{t−1} given x_t, x_0), `terminal` p(x_T), and `kernel` p(x_{t−1} given x_t), which
reads the `num_outputs` numbers that the network gives for each x_t. What else there is to know is asked of these.
"""

from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import validation_enabled
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from probdiff.checks import described
from probdiff.families.mixtures import MixtureKernel
from probdiff.schedules import NoiseLevels
from probdiff.types import Event, Time


class Family(Hashable, Protocol):
    """The eight things that the chains ask of a family, a frozen dataclass; `Gaussian` and `Binomial` are two.

    `support` is the constraint of one number of x_t, `num_outputs` counts what the network gives for one datum, and
    `network_input` is what it is given. The five distributions have the event shape of the data.
    """

    @property
    def support(self) -> constraints.Constraint: ...
    @property
    def num_outputs(self) -> int: ...
    def network_input(self, x_t: Event) -> Event: ...
    def step(self, x_prev: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def marginal(self, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def posterior(self, x_t: Event, x_0: Event, noise: NoiseLevels, t: Time) -> dist.Distribution: ...
    def terminal(self, batch_shape: tuple[int, ...] = ()) -> dist.Distribution: ...
    def kernel(self, x_t: Event, outputs: Array, noise: NoiseLevels, t: Time) -> dist.Distribution: ...


def state_dtype(family: Family) -> Any:
    """The dtype of x_t: that of draws from p(x_T), in the precision that JAX runs in."""
    return _dtype_of_draws(family, jnp.result_type(float))


@cache
def _dtype_of_draws(family: Family, precision: Any) -> Any:
    with validation_enabled(is_validate=False):  # which compiles a program for each check
        return jax.eval_shape(lambda: family.terminal().sample(jax.random.key(0))).dtype


def as_state(family: Family, x: Any) -> Event:
    """x as the chain keeps it. Raises `TypeError` or `ValueError` for entries that are not in the family's support."""
    if not family.support.is_discrete:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"x_0 has dtype {jnp.result_type(x)}; this diffusion wants floating-point data")
    elif not isinstance(x, jax.core.Tracer) and not np.all(family.support(np.asarray(x))):
        raise ValueError(f"x_0 has entries outside the support; {described(family.support)}")
    return jnp.asarray(x).astype(state_dtype(family))


def family_options(family: Any) -> dict[str, Any]:
    """What tells one family from another of its class: its fields, without the shape of the data and default values."""
    values = {field.name: (getattr(family, field.name), field.default) for field in fields(family)}
    return {name: value for name, (value, default) in values.items() if name != "event_shape" and value != default}


def in_form_of(p: dist.Distribution, kernel: dist.Distribution) -> dist.Distribution:
    """p as a mixture of equal components where `kernel` is a mixture, so that a site can be the one or the other."""
    if not isinstance(kernel, dist.MixtureSameFamily):
        return p
    axis = len(p.batch_shape)
    components, structure = jax.tree.flatten(kernel.component_distribution)
    same = [
        jnp.broadcast_to(jnp.expand_dims(leaf, axis), like.shape)
        for leaf, like in zip(jax.tree.leaves(p), components, strict=True)
    ]
    mixing = jax.tree.map(jnp.zeros_like, kernel.mixing_distribution)
    parts = jax.tree.unflatten(structure, same)
    return kernel.like(mixing, parts) if isinstance(kernel, MixtureKernel) else dist.MixtureSameFamily(mixing, parts)


def expected_log_ratio(
    q: dist.Distribution, p: dist.Distribution, draw: Callable[[], Event]
) -> tuple[Array, Array | float]:
    """E_q[log p(x) − log q(x)] in closed form and zero; where there is none, its value at a draw, and log q of that."""
    try:
        return -kl_divergence(q, p), 0.0
    except NotImplementedError:
        x = draw()
        log_q = q.log_prob(x)
        return p.log_prob(x) - log_q, log_q


class ForwardStep(dist.Independent):
    """q(x_t given x_{t−1}) at a site of the forward order, whose KL divergence to p's kernel is no term of the ELBO.

    `TraceMeanField_ELBO` would take it for one with no more than a warning, so it is refused here.
    """

    def __init__(self, step: dist.Distribution) -> None:
        super().__init__(step, 0)

    def expand(self, batch_shape: tuple[int, ...]) -> "ForwardStep":
        return ForwardStep(self.base_dist.expand(batch_shape))


def _refuse_forward_order(q: ForwardStep, p: dist.Distribution) -> Array:
    raise ValueError(
        "TraceMeanField_ELBO needs a guide in the order of the model, x_T to x_1: "
        "use forward_posterior as the guide, or Trace_ELBO with forward"
    )


# one entry for each second argument that NumPyro has a rule for, so that no rule is ambiguous
for _kind in {dist.Distribution, *(p for _, p in kl_divergence.funcs)}:
    kl_divergence.add((ForwardStep, _kind), _refuse_forward_order)
