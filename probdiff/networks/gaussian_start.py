"""The reversal of a Gaussian, to which the outputs of a network are added, and bounds of what they predict."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probdiff.types import Event, Params

_NETWORK = "network$params"
_MARGIN = 0.5  # of the range of the data, beyond which x̂_0 is bent, to end at twice this
_NOISE = 5.0  # standard deviations of x_t given x_0, by which x_0 may lie nearer than x_t/√ᾱ_t
_SHARP = 8  # how suddenly a variance stops to grow
_TINY = 1e-18  # whose square float32 still has
_FAR = 16.0  # standard deviations of x_t, from where on no covariance is below that of the start
_LEAST_RANGE = 1e-3  # in the chain's units
_LOG = 16.0  # the kernel's bound of log Var(x_0 given x_t)/(1−ᾱ_t), in modulus


class GaussianStart(eqx.Module):
    """The params of a network whose outputs of zero are the exact reversal of N(0, diag Λ), and which is bounded.

    `log_variance` is log Λ, `low` and `high` are the least and the largest value of the data, each (*event_shape), in
    the chain's own units. With λ the log-SNR, ᾱ = σ(λ), g = ᾱ·Λ + 1 − ᾱ the variance of x_t and w = Λ/g, the network is
    given x_t/√g, and its outputs (a, b, c), for x̂_0 = √ᾱ·x_t + √(1−ᾱ)·a and a variance of x_0 given x_t of
    (1−ᾱ)·exp(16·tanh(b/8)), become √w·a + √(ᾱ(1−ᾱ))·(Λ−1)/g·x_t, b + 8·atanh(log(w)/16) and √(w_i·w_j)·c_ij.

    With r = high − low, x̂_0 is left as it is up to r/2 outside of the data and stays within r of them; where x_t/√ᾱ
    itself lies more than five standard deviations of its noise further out, x̂_0 may follow it. Variances of x_0 given
    x_t stay below r²/4, the largest of any density on the range, and where x_t/√g is far out, the network cannot make
    them small: c, and b where it is negative, are divided by 1 + Σ_i (x_t/√g)_i⁸/16⁸, each term at most 10²⁸. Densities
    are exact, since all of it is in the kernel.
    """

    network: eqx.Module
    log_variance: Float[Array, " *event"]
    low: Float[Array, " *event"]
    high: Float[Array, " *event"]

    def around(self, network: Callable[[Event, Array], Array], components: int = 1) -> Callable[[Event, Array], Array]:
        """The outputs as a function of x_t, of any batch shape, and the log-SNR, from those of `network`.

        Of several components each has outputs of its own, and the last outputs are weights, which are left as they are.
        """
        size, num_axes, M = self.low.size, self.low.ndim, components
        variance, low, high = jnp.exp(jnp.ravel(self.log_variance)), jnp.ravel(self.low), jnp.ravel(self.high)

        def outputs(x_t: Event, log_snr: Array) -> Float[Array, "*batch P"]:
            wide = jnp.asarray(log_snr)[..., None]
            g = jax.nn.sigmoid(wide) * variance + jax.nn.sigmoid(-wide)
            x = x_t.reshape(*x_t.shape[: x_t.ndim - num_axes], size)
            raw = network((x / jnp.sqrt(g)).reshape(x_t.shape), log_snr)
            if M == 1:
                return of_one(raw, x, wide)
            of_each = raw[..., :-M].reshape(*raw.shape[:-1], M, -1)
            of_each = of_one(of_each, x[..., None, :], wide[..., None])
            return jnp.concatenate([of_each.reshape(*raw.shape[:-1], -1), raw[..., -M:]], -1)

        def of_one(raw: Array, x: Array, wide: Array) -> Array:
            alpha_bar, noise = jax.nn.sigmoid(wide), jax.nn.sigmoid(-wide)
            g = alpha_bar * variance + noise
            scaled = x / jnp.sqrt(g)
            w = variance / g
            a = jnp.sqrt(w) * raw[..., :size] + jnp.sqrt(alpha_bar * noise) * (variance - 1) / g * x
            a = a + _excess(x, jnp.sqrt(alpha_bar) * x + jnp.sqrt(noise) * a, wide, low, high) / jnp.sqrt(noise)
            if raw.shape[-1] == size:
                return a
            log_most = 2 * jnp.log(_reach(low, high) / 2) - jax.nn.log_sigmoid(-wide)
            near = 1 / (1 + jnp.sum(jnp.minimum((scaled / _FAR) ** 2, 1e7) ** 4, -1, keepdims=True))
            start = 8 * jnp.arctanh(jnp.clip(jnp.log(w), -0.95 * _LOG, 0.95 * _LOG) / _LOG)
            b = raw[..., size : 2 * size]
            b = near * b + (1 - near) * jax.nn.relu(b)  # whose slope at zero is that of b: all outputs start there
            log_variance = _LOG * jnp.tanh((b + start) / 8)
            log_variance -= jax.nn.softplus(_SHARP * (log_variance - log_most)) / _SHARP
            b = 8 * jnp.arctanh(jnp.clip(log_variance / _LOG, -0.9999, 0.9999))
            if raw.shape[-1] == 2 * size:
                return jnp.concatenate([a, b], -1)
            rows, columns = np.tril_indices(size, -1)
            below = jnp.sqrt(w[..., rows] * w[..., columns]) * near * raw[..., 2 * size :]
            norm = below**2 @ np.eye(size, dtype=below.dtype)[rows]  # of each row; a scatter takes three times as long
            excess = jnp.log(norm + _TINY) - log_most
            bounded = jnp.exp(-jax.nn.softplus(_SHARP * excess) / (2 * _SHARP))
            return jnp.concatenate([a, b, bounded[..., rows] * below], -1)

        return outputs


def _excess(x: Array, x_hat: Array, log_snr: Array, low: Array, high: Array) -> Array:
    """What is to be added to x̂_0 so that it is bounded: exactly zero inside."""
    margin = _MARGIN * _reach(low, high)
    position, sigma = x * jnp.sqrt(1 + jnp.exp(-log_snr)), jnp.exp(-log_snr / 2)

    def above(x_hat: Array, position: Array, high: Array) -> Array:
        bend = high + margin
        bend = bend + margin * jax.nn.softplus((position - _NOISE * sigma - bend) / margin)
        over = jax.nn.relu(x_hat - bend)
        return margin * jnp.tanh(over / margin) - over

    return above(x_hat, position, high) - above(-x_hat, -position, -low)


def _reach(low: Array, high: Array) -> Array:
    """The range of the data, which of some of the rows may be constant."""
    return jnp.maximum(high - low, _LEAST_RANGE)


def with_start(params: Params, log_variance: Any, low: Any, high: Any) -> Params:
    """Params with a `GaussianStart` around the network's: of the same Gaussian and bounds where there is one."""
    return params | {_NETWORK: GaussianStart(of_network(params)[_NETWORK], log_variance, low, high)}


def widened(params: Params, low: Any, high: Any) -> Params:
    """Params whose bounds, if any, are at least as wide as these."""

    def one(value: Any) -> Any:
        if not isinstance(value, GaussianStart):
            return value
        wide = jnp.minimum(value.low, low), jnp.maximum(value.high, high)
        return eqx.tree_at(lambda held: (held.low, held.high), value, wide)

    return {name: one(value) for name, value in params.items()}


def of_network(params: Params) -> Params:
    """The params as the programs of a diffusion make them, without what a fit puts around the network's."""
    return {name: value.network if isinstance(value, GaussianStart) else value for name, value in params.items()}


def frozen(params: Params) -> dict[str, Any]:
    """Which leaves of params are no network's to learn: true for those of a `GaussianStart` beside its network."""

    learned = jax.tree.map(lambda _: False, params)
    return {
        name: eqx.tree_at(lambda held: (held.log_variance, held.low, held.high), value, (True, True, True))
        if isinstance(value, GaussianStart)
        else value
        for name, value in learned.items()
    }
