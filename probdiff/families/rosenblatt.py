"""A mixture of Gaussians as a smooth function of standard normals: the quantiles of each coordinate in turn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.nn import log_softmax, logsumexp
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Float
from numpyro.distributions import constraints, transforms

from probdiff.families.mixtures import MixtureKernel
from probdiff.types import Event

_MOST = 100  # updates of a quantile: five are usual, and halving alone takes some sixty in double precision

type _State = tuple[Array, Array, Array, Array, Array, Array]


class InverseRosenblatt(transforms.Transform):
    """The map from z to x for which x has a mixture's density Σ_m w_m·N(loc_m, Σ_m) where z is standard normal.

    x_i is the quantile F_i⁻¹(Φ(z_i)) of the mixture's coordinate i given x_1, …, x_{i−1}, which is a mixture of M
    Gaussians again (Rosenblatt, Annals of Mathematical Statistics 23, 1952). The map is smooth and increases with each
    z_i, log |det dx/dz| = Σ_i log φ(z_i) − log p(x), and its derivatives are exact, with respect to z and to the
    parameters of the mixture. Of equal components it is x = loc + L·z.
    """

    def __init__(self, mixture: MixtureKernel) -> None:
        self.mixture = mixture

    @property
    def domain(self) -> Any:
        """Arrays of real numbers, of the mixture's event shape."""
        return constraints.independent(constraints.real, self.mixture.event_dim)

    codomain = domain

    def __call__(self, x: Event) -> Event:
        """The mixture's x at standard normals."""

        def both(z: Array, *mixture: Array) -> tuple[Array, Array]:
            x = quantile(z, *mixture)
            return x, x

        return _by_coordinate(both, x, self.mixture)

    def _inverse(self, y: Event) -> Event:
        return _by_coordinate(lambda x, *mixture: (x, _score(x, *mixture)), y, self.mixture)

    def log_abs_det_jacobian(self, x: Event, y: Event, intermediates: Any = None) -> Float[Array, "*batch"]:
        """Σ_i log φ(z_i) − log p(x), for standard normals and the mixture's x of them."""
        return jnp.sum(norm.logpdf(x), tuple(range(-self.mixture.event_dim, 0))) - self.mixture.log_prob(y)

    def tree_flatten(self) -> tuple[Any, Any]:
        """The mixture, for JAX."""
        return (self.mixture,), (("mixture",), {})


def _by_coordinate(both: Callable[..., tuple[Array, Array]], value: Event, mixture: MixtureKernel) -> Event:
    """`both` gives x_i and what is wanted of it, from value_i and the mixture of x_i given the coordinates before."""
    parts, event_shape = mixture.component_distribution, mixture.event_shape
    if isinstance(parts, dist.MultivariateNormal):
        loc, rows = parts.loc, parts.scale_tril
        scale = jnp.diagonal(rows, axis1=-2, axis2=-1)
    else:
        loc, scale = (a.reshape(*a.shape[: a.ndim - len(event_shape)], -1) for a in _loc_and_scale(parts))
        rows = jnp.zeros((*loc.shape, 0))  # of a diagonal covariance
    flat = value.reshape(*value.shape[: value.ndim - len(event_shape)], -1)
    *batch, M, D = jnp.broadcast_shapes(flat[..., None, :].shape, loc.shape)

    def step(carry: tuple[Array, Array], args: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        log_w, u = carry
        i, value, loc, row, scale = args
        mean, log_w = loc + jnp.sum(row * u, -1), log_softmax(log_w)  # of u, what is not set yet is zero
        x, wanted = both(value, log_w, mean, scale)
        u_i = (x[..., None] - mean) / scale
        u = jnp.where(jnp.arange(u.shape[-1]) == i, u_i[..., None], u)
        return (log_w + norm.logpdf(u_i) - jnp.log(scale), u), wanted

    of_each = jnp.broadcast_to(flat, (*batch, D)), loc, jnp.broadcast_to(scale, loc.shape)
    value, loc, scale = (jnp.moveaxis(a, -1, 0) for a in of_each)
    start = jnp.broadcast_to(mixture.log_weights, (*batch, M)), jnp.zeros((*batch, M, rows.shape[-1]), flat.dtype)
    _, wanted = jax.lax.scan(step, start, (jnp.arange(D), value, loc, jnp.moveaxis(rows, -2, 0), scale))
    return jnp.moveaxis(wanted, 0, -1).reshape(*batch, *event_shape)


def _loc_and_scale(p: dist.Distribution) -> tuple[Array, Array]:
    loc, scale = jnp.broadcast_arrays(p.base_dist.loc, p.base_dist.scale)
    return loc, scale


@jax.custom_jvp
def quantile(
    z: Float[Array, "*batch"],
    log_w: Float[Array, "*batch M"],
    loc: Float[Array, "*batch M"],
    scale: Float[Array, "*batch M"],
) -> Float[Array, "*batch"]:
    """The x at which Σ_m w_m·Φ((x − loc_m)/scale_m) = Φ(z), for weights whose sum is one.

    The root lies between the least and the largest of loc_m + scale_m·z. Newton's steps on the logarithm of the smaller
    tail, and halving where they leave that bracket or shrink too slowly. The derivatives are those of the implicit
    function: dx/dz = φ(z)/p(x), and with r_m the share of component m in p(x), dx/dloc_m = r_m,
    dx/dscale_m = r_m·(x − loc_m)/scale_m and dx/dlog w_m = −w_m·(F_m(x) − F(x))/p(x). In a gap between components where
    p(x) vanishes they are large, and finite.
    """
    each = loc + scale * z[..., None]
    low, high = jnp.min(each, -1), jnp.max(each, -1)
    side, goal = _side(z), log_ndtr(-jnp.abs(z))
    eps = jnp.finfo(each.dtype).eps
    least = jnp.min(scale, -1)

    def goes_on(state: _State) -> Array:
        count, x, _, _, step, _ = state
        return (count < _MOST) & jnp.any(step > 2 * eps * (jnp.abs(x) + least))

    def update(state: _State) -> _State:
        count, x, low, high, step, step_before = state
        _, _, log_tail, log_p = _at(x, side, log_w, loc, scale)
        above = side * (log_tail - goal)
        low, high = jnp.where(above <= 0, x, low), jnp.where(above >= 0, x, high)
        newton = x - above * jnp.exp(log_tail - log_p)
        is_good = (newton > low) & (newton < high) & (jnp.abs(newton - x) < step_before / 2)
        new = jnp.where(is_good, newton, (low + high) / 2)
        return count + 1, new, low, high, jnp.abs(new - x), step

    start = jnp.clip(jnp.sum(jnp.exp(log_w) * each, -1), low, high)
    width = 2 * (high - low)
    return jax.lax.while_loop(goes_on, update, (jnp.array(0), start, low, high, width, width))[1]


@quantile.defjvp
def _quantile_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    z, log_w, loc, scale = primals
    x, side = quantile(*primals), _side(z)
    u, log_tails, log_tail, log_p = _at(x, side, log_w, loc, scale)
    wide = log_p[..., None]
    r = jnp.exp(log_w + norm.logpdf(u) - jnp.log(scale) - wide)
    most = 0.5 * jnp.log(jnp.finfo(x.dtype).max)
    of_weight = _exp(log_w + log_tail[..., None] - wide, most) - _exp(log_w + log_tails - wide, most)
    of_each = side[..., None] * of_weight * tangents[1] + r * (tangents[2] + u * tangents[3])
    return x, _exp(norm.logpdf(z) - log_p, most) * tangents[0] + jnp.sum(of_each, -1)


def _exp(x: Array, most: Array) -> Array:
    return jnp.exp(jnp.minimum(x, most))


def _at(x: Array, side: Array, log_w: Array, loc: Array, scale: Array) -> tuple[Array, Array, Array, Array]:
    """u_m, the logarithms of each component's tail and of the mixture's, and log p(x)."""
    u = (x[..., None] - loc) / scale
    log_tails = log_ndtr(side[..., None] * u)
    return u, log_tails, logsumexp(log_w + log_tails, -1), logsumexp(log_w + norm.logpdf(u) - jnp.log(scale), -1)


def _side(z: Array) -> Array:
    """1 where the lower tail is the smaller one, and −1 where it is the upper."""
    return jnp.where(z < 0, 1.0, -1.0).astype(z.dtype)


def _score(x: Array, log_w: Array, loc: Array, scale: Array) -> Array:
    """Φ⁻¹(F(x)), by the smaller tail."""
    u = (x[..., None] - loc) / scale
    below, above = (logsumexp(log_w + log_ndtr(sign * u), -1) for sign in (1, -1))
    return jnp.where(below < above, 1, -1) * ndtri(jnp.exp(jnp.minimum(below, above)))
