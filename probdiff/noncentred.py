"""The reverse chain inside any NumPyro model, written in standard normals, for NUTS and guides to move in."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer.reparam import Reparam, TransformReparam
from numpyro.primitives import _PYRO_STACK

from probdiff.families.mixtures import MixtureKernel
from probdiff.families.rosenblatt import InverseRosenblatt
from probdiff.types import Event, Time

type Kernel = Callable[[Event, Time], dist.Distribution]
_OF_NORMALS = (dist.Normal, dist.MultivariateNormal, MixtureKernel)


def ancestral(terminal: dist.Distribution, kernel: Kernel, num_timesteps: int, *, stacked: bool = False) -> Event:
    """Draws x_T, …, x_0 of the reverse chain inside a NumPyro program, non-centred where kernels are of numbers.

    `terminal` is p(x_T), `kernel(x_t, t)` is p(x_{t−1} given x_t); see `chains.Diffusion.prior`.
    """
    x_t = _stacked(terminal, kernel, num_timesteps) if stacked else numpyro.sample(f"x_{num_timesteps}", terminal)
    for t in range(1 if stacked else num_timesteps, 0, -1):
        p = kernel(x_t, t)
        with noncentred(f"x_{t - 1}") if isinstance(_core(p), _OF_NORMALS) else nullcontext():
            x_t = numpyro.sample(f"x_{t - 1}", p)
    return x_t


def _stacked(terminal: dist.Distribution, kernel: Kernel, T: int) -> Event:
    """x_1, from the noise of all kernels above it."""
    if not terminal.has_rsample:
        raise ValueError("stacked=True is for chains of numbers; the noise of this one is discrete")
    axis = -1 - len(terminal.event_shape)
    if given := [t for t in range(1, T + 1) if is_given(f"x_{t}")]:
        raise ValueError(f"stacked=True has no site x_{given[0]}, which a handler gives a value to; leave it out")
    base = dist.Normal(0.0, 1.0).expand((T, *terminal.event_shape)).to_event(-axis)
    noise = jnp.moveaxis(numpyro.sample("x_path_base", base), axis, 0)

    def step(x_t: Event, args: tuple[Event, Time]) -> tuple[Event, Event]:
        z, t = args
        p = kernel(x_t, t)
        if not isinstance(_core(p), _OF_NORMALS):
            raise ValueError(f"stacked=True is for Gaussians and their mixtures, not for {type(_core(p)).__name__}")
        x_prev = from_normals(p)(z)
        return x_prev, x_prev

    x_1, path = jax.lax.scan(step, noise[0], (noise[1:], jnp.arange(T, 1, -1)))
    numpyro.deterministic("x_path", jnp.moveaxis(jnp.concatenate([noise[:1], path]), 0, axis))
    return x_1


def _core(p: dist.Distribution) -> dist.Distribution:
    return p.base_dist if isinstance(p, dist.Independent) else p


class NonCentred(Reparam):
    """A site of a `Normal`, a `MultivariateNormal` or a mixture of them as a function of standard normals z.

    x = loc + scale·z, and of a `MixtureKernel` its `InverseRosenblatt`. NumPyro's `TransformReparam` of the site as a
    `TransformedDistribution`: z is the site's name and "_base". Raises `TypeError` for other distributions.
    """

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[Any, Any]:
        core, expand_shape, event_dim = self._unwrap(fn)
        if not isinstance(core, _OF_NORMALS):
            wanted = "Normal, MultivariateNormal and MixtureKernel"
            raise TypeError(f"site {name} is a {type(core).__name__}; NonCentred is for {wanted}")
        base = dist.Normal(0.0, 1.0).expand(core.batch_shape + core.event_shape).to_event(core.event_dim)
        transformed = self._wrap(dist.TransformedDistribution(base, from_normals(core)), expand_shape, event_dim)
        return TransformReparam()(name, transformed, obs)


def from_normals(p: dist.Distribution) -> transforms.Transform:
    """The map from standard normals to a `Normal`, perhaps `Independent`, a `MultivariateNormal` or a mixture."""
    p = _core(p)
    if isinstance(p, MixtureKernel):
        return InverseRosenblatt(p)
    if isinstance(p, dist.MultivariateNormal):
        return transforms.LowerCholeskyAffine(p.loc, p.scale_tril)
    return transforms.AffineTransform(p.loc, p.scale)


def noncentred(name: str) -> handlers.reparam:
    """`NonCentred` for a site, unless a handler around the caller gives it a value."""
    return handlers.reparam(config={} if is_given(name) else {name: NonCentred()})


def is_given(name: str) -> bool:
    """Whether a handler of `condition`, `do`, `substitute` or `replay` around the caller has a value for the site.

    A reparametrised site is deterministic before such a handler sees it, and its value would be ignored. NumPyro has no
    public way to ask. A function that `substitute` is given is not asked: NumPyro's initialisers want the base site.
    """
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, handlers.scope):
            name = f"{handler.prefix}{handler.divider}{name}"
        elif isinstance(handler, handlers.condition) and handler.condition_fn is not None:
            if handler.condition_fn({"type": "sample", "name": name}) is not None:
                return True
        elif isinstance(handler, handlers.condition | handlers.do | handlers.substitute):
            if name in (handler.data or {}):
                return True
        elif isinstance(handler, handlers.replay):
            site = handler.trace.get(name)
            if site is not None and site["type"] == "sample":
                return True
    return False
