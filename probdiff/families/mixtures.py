"""Mixtures of Gaussians as reverse kernels, and their KL divergence from a Gaussian: closed form and a small rest."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from probdiff.types import Event, Key

_PAIRS = 2  # of draws, of the rest of a KL divergence
_LOW = 4  # dimensions, up to which more draws cost little
_PAIRS_IF_LOW = 8
_SUBSTITUTED = 7  # rows, up to which a CPU solves them one by one faster than by a solver


class MixtureKernel(dist.MixtureSameFamily):
    """p(x_{t−1} given x_t) = Σ_m w_m·N(f_μ,m, f_Σ,m), N8 for several components.

    With a `key`, `kl_divergence` from a Gaussian is an unbiased estimate that is made of draws from that key: the one
    term of N17 that has no closed form. Without a key it has none, and NumPyro's ELBOs take the draw of the site.
    """

    arg_constraints: ClassVar = {"log_weights": constraints.real_vector}  # from which a scan learns the batch shape
    pytree_data_fields = ("key",)

    def __init__(
        self,
        mixing_distribution: Any,
        component_distribution: dist.Distribution,
        key: Key | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(mixing_distribution, component_distribution, validate_args=validate_args)
        self.key = key

    @property
    def log_weights(self) -> Array:
        """log w_m up to a constant, (…, M)."""
        return self.mixing_distribution.logits

    def component_log_probs(self, value: Event) -> Array:
        """log w_m·p_m(x), (…, M)."""
        return jax.nn.log_softmax(self.log_weights) + _log_prob(
            self.component_distribution, jnp.expand_dims(value, -1 - self.event_dim)
        )

    def with_key(self, key: Key | None) -> "MixtureKernel":
        """The same mixture with another key."""
        return MixtureKernel(self.mixing_distribution, self.component_distribution, key)

    def like(self, mixing_distribution: Any, component_distribution: dist.Distribution) -> "MixtureKernel":
        """Another mixture, with the same key."""
        return MixtureKernel(mixing_distribution, component_distribution, self.key)


def components_of(p: dist.Distribution) -> dist.Distribution:
    """The components of a mixture, with a last axis of batches for them; any other distribution as it is."""
    return p.component_distribution if isinstance(p, dist.MixtureSameFamily) else p


def kl_to_mixture(q: dist.Distribution, p: MixtureKernel, rng_key: Key, num_pairs: int | None = None) -> Array:
    """An unbiased estimate of KL(q ‖ Σ_m w_m·p_m), nats, for Gaussian q and p_m, of their common batch shape.

    With r_m(x) = w_m·p_m(x)/p(x), and m the component whose r_m is largest at q's mean,

        KL(q ‖ p) = KL(q ‖ p_m) − log w_m + E_q log r_m(x),

    whose expectation alone is taken over draws: `num_pairs` of them and their mirror images about q's mean, by default
    8 pairs in up to four dimensions and else 2. It has a small spread where q lies mostly in reach of one component,
    and none where components are the same. Any m would do; the gradient is unbiased as well.
    """
    q, parts = _normal(q), _normal(p.component_distribution)
    if num_pairs is None:
        num_pairs = _PAIRS_IF_LOW if math.prod(q.event_shape) <= _LOW else _PAIRS
    log_w = jax.nn.log_softmax(p.log_weights)
    half = q.sample(rng_key, (num_pairs,))
    x = jnp.concatenate([q.mean[None], half, 2 * q.mean - half])
    log_r = jax.nn.log_softmax(log_w + _log_prob(parts, jnp.expand_dims(x, -1 - q.event_dim)))
    m = jnp.argmax(log_r[0], -1)

    def chosen(array: Array, event_dim: int = 0) -> Array:
        array = jnp.broadcast_to(array, jnp.broadcast_shapes(array.shape, m.shape + array.shape[-1 - event_dim :]))
        index = m.reshape(*(1,) * (array.ndim - m.ndim - event_dim - 1), *m.shape, *(1,) * (event_dim + 1))
        return jnp.squeeze(jnp.take_along_axis(array, index, -1 - event_dim), -1 - event_dim)

    return _kl_of_gaussians(q, _normal(parts, chosen)) - chosen(log_w) + jnp.mean(chosen(log_r[1:]), 0)


def _log_prob(p: dist.Distribution, x: Array) -> Array:
    """log p(x) of a Gaussian."""
    if not _is_small(p):
        return p.log_prob(x)
    squares = sum(z**2 for z in _whiten(p.scale_tril, x, p.loc))
    return -0.5 * squares - _log_scale(p) - 0.5 * p.event_shape[0] * math.log(2 * math.pi)


def _kl_of_gaussians(q: dist.Distribution, p: dist.Distribution) -> Array:
    """KL(q ‖ p) of Gaussians."""
    if not _is_small(p):
        return kl_divergence(q, p)
    columns = q.scale_tril.mT
    of_mean = sum(z**2 for z in _whiten(p.scale_tril, q.mean, p.loc))
    of_spread = sum(jnp.sum(z**2, -1) for z in _whiten(p.scale_tril[..., None, :, :], columns, jnp.zeros_like(columns)))
    return 0.5 * (of_mean + of_spread - p.event_shape[0]) + _log_scale(p) - _log_scale(q)


def _is_small(p: dist.Distribution) -> bool:
    """Whether a Gaussian has so few rows that they are solved one by one."""
    return isinstance(p, dist.MultivariateNormal) and p.event_shape[0] <= _SUBSTITUTED


def _whiten(L: Array, x: Array, loc: Array) -> list[Array]:
    """The coordinates of L⁻¹·(x − loc), one after the other."""
    z: list[Array] = []
    for i in range(L.shape[-1]):
        z.append((x[..., i] - loc[..., i] - sum(L[..., i, j] * z[j] for j in range(i))) / L[..., i, i])
    return z


def _log_scale(p: dist.MultivariateNormal) -> Array:
    """Half the log-determinant of the covariance."""
    return jnp.sum(jnp.log(jnp.diagonal(p.scale_tril, axis1=-2, axis2=-1)), -1)


def _normal(p: dist.Distribution, change: Any = lambda array, event_dim: array) -> dist.Distribution:
    """The Gaussian p, made anew: with the batch shape of its arrays, which one that was scanned does not know of."""
    if isinstance(p, dist.MultivariateNormal):
        return dist.MultivariateNormal(change(p.loc, 1), scale_tril=change(p.scale_tril, 2))
    n = p.event_dim
    loc, scale = jnp.broadcast_arrays(p.base_dist.loc, p.base_dist.scale)
    return dist.Normal(change(loc, n), change(scale, n)).to_event(n)


def _is_gaussian(p: dist.Distribution) -> bool:
    return isinstance(p.base_dist if isinstance(p, dist.Independent) else p, dist.Normal | dist.MultivariateNormal)


def _kl(q: dist.Distribution, p: MixtureKernel) -> Array:
    if p.key is None or not (_is_gaussian(q) and _is_gaussian(p.component_distribution)):
        raise NotImplementedError  # and NumPyro's ELBOs take the draw of the site
    is_typed = jnp.issubdtype(p.key.dtype, jax.dtypes.prng_key)
    keys = p.key.reshape(-1) if is_typed else p.key.reshape(-1, p.key.shape[-1])  # several where p was scanned
    return kl_to_mixture(q, p, keys[0])


for _kind in (dist.Independent, dist.MultivariateNormal):
    kl_divergence.add((_kind, MixtureKernel), _kl)
