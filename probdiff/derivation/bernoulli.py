"""Distributions of bits, read: the rates of products of Bernoullis and of their mixtures, and moments of any."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff.derivation.pair import kernel_base
from probdiff.derivation.sites import compiled
from probdiff.reference.quadrature import MOST_BITS, states

_MOST_LOG_ODDS = 1000.0  # in place of those of a probability that is zero or one

type Parts = tuple[Float[Array, "N M"], Float[Array, "N M D"]]


@compiled
def mixture_parts(kernel: dist.Distribution, x: Array) -> Parts | None:
    """Log weights (N, M), up to a constant, and log-odds (N, M, D) of a mixture of M products of Bernoullis.

    x (N, *event) has the shape of its draws. M = 1 for a product. None where the distribution is of another kind.
    """
    base, (n, size) = kernel_base(kernel), (len(x), x[0].size)
    if base.event_shape == ():
        return jnp.zeros((n, 1)), jnp.broadcast_to(_log_odds(base), x.shape).reshape(n, 1, size)
    if not isinstance(base, dist.MixtureSameFamily) or base.event_shape != kernel.event_shape:
        return None
    part, mixing = base.component_distribution, base.mixing_distribution
    M, of_bits = part.batch_shape[-1], kernel_base(part)
    if of_bits.event_shape != ():
        return None
    log_weights = mixing.logits if isinstance(mixing, dist.CategoricalLogits) else jnp.log(mixing.probs)
    odds = jnp.broadcast_to(_log_odds(of_bits), (n, M, *x.shape[1:]))
    return jnp.broadcast_to(log_weights, (n, M)), odds.reshape(n, M, size)


@compiled
def log_odds_of_product(kernel: dist.Distribution, x: Array) -> Float[Array, "N D"]:
    """The log odds of each bit where the kernel is a product of Bernoullis, and NaN where it is none."""
    parts = mixture_parts(kernel, x)
    if parts is None or parts[0].shape[1] > 1:
        return jnp.full((len(x), x[0].size), jnp.nan)
    return parts[1][:, 0]


@compiled
def moments(kernel: dist.Distribution, x: Array) -> tuple[Float[Array, "N D"], Float[Array, "N D D"]]:
    """Rates and covariance of the bits, from the parts of a mixture of products, else by enumeration.

    x (N, *event) has the shape of the draws. NaN where neither can be done.
    """
    parts, (n, size) = mixture_parts(kernel, x), (len(x), x[0].size)
    if parts is not None:
        share, rates = jax.nn.softmax(parts[0]), jax.nn.sigmoid(parts[1])
        mean = jnp.einsum("nm,nmd->nd", share, rates)
        apart = rates - mean[:, None]
        within = jnp.einsum("nm,nmd->nd", share, rates * jax.nn.sigmoid(-parts[1]))
        between = jnp.einsum("nm,nmd,nme->nde", share, apart, apart)
        return mean, between + within[..., None] * jnp.eye(size)
    if size > MOST_BITS:
        return jnp.full((n, size), jnp.nan), jnp.full((n, size, size), jnp.nan)
    y = jnp.asarray(states(size))
    p = jnp.exp(kernel.log_prob(y.reshape(-1, 1, *x.shape[1:]).astype(x.dtype))).T  # (N, M)
    mean = p @ y
    return mean, jnp.einsum("nm,md,me->nde", p, y, y) - mean[:, :, None] * mean[:, None]


def _log_odds(kernel: dist.Distribution) -> Array:
    """Of each bit; within bounds."""
    odds = kernel.logits if isinstance(kernel, dist.BernoulliLogits) else jnp.log(kernel.mean) - jnp.log1p(-kernel.mean)
    return jnp.clip(odds, -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
