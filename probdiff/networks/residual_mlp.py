"""A residual multilayer perceptron, told the time by its log-SNR."""

import math
from dataclasses import dataclass
from typing import Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.checks import check_count
from probdiff.types import Key


class Recipe(Protocol):
    """What builds a network for an event shape, with as many outputs as a family asks for."""

    def build(self, rng_key: Key, event_shape: tuple[int, ...], num_outputs: int) -> eqx.Module: ...


def embed_log_snr(log_snr: Float[Array, ""], num_features: int) -> Float[Array, " F"]:
    """Sines and cosines of the log-SNR at geometric wavelengths from 4 to 64 nats, and tanh of it, shape (F + 1,)."""
    wavelength = jnp.geomspace(4.0, 64.0, num_features // 2)
    angle = 2 * jnp.pi * jnp.clip(log_snr, -20.0, 20.0) / wavelength
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.tanh(log_snr / 8)[None]])


class Dense(eqx.Module):
    """x·W + b, with W of shape (inputs, outputs).

    `equinox.nn.Linear` keeps the transpose of W, whose gradient for few inputs is slower on a CPU.
    """

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"] | None

    def __init__(self, num_inputs: int, num_outputs: int, *, use_bias: bool = True, key: Key) -> None:
        linear = eqx.nn.Linear(num_inputs, num_outputs, use_bias, key=key)
        self.weight, self.bias = linear.weight.T, linear.bias

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        y = x @ self.weight.astype(x.dtype)
        return y if self.bias is None else y + self.bias.astype(x.dtype)


def silu(x: Array) -> Array:
    """x·σ(x) = x·(1 + tanh(x/2))/2; on a CPU tanh is faster than the exponential of `jax.nn.silu`."""
    return x * (0.5 + 0.5 * jnp.tanh(0.5 * x))


class ResidualMLPModule(eqx.Module):
    """h ← h + W·silu(h + E·embedding), repeated; zero outputs at the start."""

    first: Dense
    blocks: list[Dense]
    shifts: list[Dense]
    last: Dense
    dropout: eqx.nn.Dropout
    num_features: int = eqx.field(static=True)
    dtype: str | None = eqx.field(static=True)

    def __call__(
        self, x_t: Float[Array, " *event"], log_snr: Float[Array, ""], *, key: Key | None = None
    ) -> Float[Array, " P"]:
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        dtype = x_t.dtype if self.dtype is None else self.dtype
        embedding = embed_log_snr(log_snr, self.num_features).astype(dtype)
        h = self.first(jnp.ravel(x_t).astype(dtype))
        for block, shift, k in zip(self.blocks, self.shifts, keys[1:], strict=True):
            h = h + block(self.dropout(silu(h + shift(embedding)), key=k, inference=k is None))
        return self.last(self.dropout(silu(h), key=keys[0], inference=key is None)).astype(x_t.dtype)


@dataclass(frozen=True)
class ResidualMLP:
    """Recipe for a residual multilayer perceptron of `depth` blocks of `width` units.

    `dropout` is the share of the units that are left out, drawn anew for each datum, where a fit draws dropout.
    `dtype`, such as "bfloat16", is that of the units; params and outputs stay as they are, by default all are alike.
    Raises `ValueError` where width or depth is no integer of at least 1, num_features not even and at least 2, dropout
    not in [0, 1) or dtype no float's.
    """

    width: int = 128
    depth: int = 3
    num_features: int = 16
    dropout: float = 0.3
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            check_count(getattr(self, name), name, 1)
        if isinstance(self.num_features, bool) or self.num_features not in range(2, 1 << 20, 2):
            raise ValueError(f"num_features is {self.num_features!r}; it must be an even integer of at least 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.dtype not in (None, "float16", "bfloat16", "float32", "float64"):
            raise ValueError(f'dtype is {self.dtype!r}; it must be "bfloat16", "float16", "float32", "float64" or None')

    def build(self, rng_key: Key, event_shape: tuple[int, ...], num_outputs: int) -> ResidualMLPModule:
        """The initialised module for data of `event_shape`. Raises `ValueError` for float64 where JAX has it off."""
        if self.dtype == "float64" and not jax.config.jax_enable_x64:
            raise ValueError('dtype is "float64"; turn it on in JAX first: jax.config.update("jax_enable_x64", True)')
        keys = iter(jax.random.split(rng_key, 2 * self.depth + 2))
        first = Dense(math.prod(event_shape), self.width, key=next(keys))
        blocks = [Dense(self.width, self.width, key=next(keys)) for _ in range(self.depth)]
        shifts = [Dense(self.num_features + 1, self.width, use_bias=False, key=next(keys)) for _ in range(self.depth)]
        last = jax.tree.map(jnp.zeros_like, Dense(self.width, num_outputs, key=next(keys)))
        return ResidualMLPModule(
            first, blocks, shifts, last, eqx.nn.Dropout(self.dropout), self.num_features, self.dtype
        )
