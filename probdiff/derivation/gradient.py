"""The gradient of K in every param, by differentiation and by finite differences on the same noise."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.derivation.pair import Pair
from probdiff.types import Key, Params

_ENTRIES = 64  # of a param: with more, one random direction stands for all


@dataclass(frozen=True)
class Slope:
    """dK along one direction of the param `name`: `differentiated`, and `near` and `wide` by central differences.

    Near is of step h, wide of step 2h. `zero`: whether the whole gradient of the leaf is zero.
    """

    param: str
    name: str
    differentiated: float
    near: float
    wide: float
    zero: bool


def slopes(pair: Pair, rng_key: Key, h: float) -> list[Slope]:
    """dK along every entry of the small params and a random direction of each large one, with the noise of `rng_key`.

    K is that of the whole x, for one path each. The unconstrained params are moved at random by a tenth first, since
    a network's initial weights may be where a gradient vanishes. Lengths keep a β_t in (0, 1).
    """
    key_noise, key_jitter, key_directions = jax.random.split(rng_key, 3)
    params = jittered(pair.params, [name for name in pair.reverse_params if name in pair.free], key_jitter)
    leaves, rest = eqx.partition(params, eqx.is_inexact_array)
    gradient = jax.tree.leaves(jax.grad(pair.elbo)(leaves, rest, key_noise))
    flat, structure = jax.tree_util.tree_flatten_with_path(leaves)
    entries = []  # which leaf, its param, a name, the direction
    for i, (path, leaf) in enumerate(flat):
        param = path[0].key
        name, free, size = jax.tree_util.keystr(path, simple=True, separator="."), param in pair.free, leaf.size
        at = np.asarray(leaf, np.float64)
        length = np.maximum(np.abs(at), 0.1) if free else np.minimum(np.abs(at), np.abs(1 - at)) + 1e-12
        if free or size > _ENTRIES:
            noise = np.asarray(jax.random.normal(jax.random.fold_in(key_directions, i), leaf.shape))
            entries.append((i, param, name, length * noise / np.sqrt(size)))
        else:
            units = np.eye(size).reshape(size, *leaf.shape)
            entries += [(i, param, f"{name}[{j}]", length * unit) for j, unit in enumerate(units)]
    moves = [
        jnp.stack([jnp.asarray(m if k == i else np.zeros(leaf.shape), leaf.dtype) for k, _, _, m in entries])
        for i, (_, leaf) in enumerate(flat)
    ]

    def moved(step: Array, move: Params) -> Array:
        return pair.elbo(jax.tree.map(lambda leaf, m: leaf + step * m, leaves, move), rest, key_noise)

    along = jax.vmap(jax.vmap(moved, (None, 0)), (0, None))
    values = np.asarray(along(h * jnp.array([-2.0, -1.0, 1.0, 2.0]), jax.tree.unflatten(structure, moves)), np.float64)
    near, wide = (values[2] - values[1]) / (2 * h), (values[3] - values[0]) / (4 * h)
    return [
        Slope(param, name, float(np.sum(np.asarray(gradient[i]) * m)), n, w, not np.any(gradient[i]))
        for (i, param, name, m), n, w in zip(entries, near.tolist(), wide.tolist(), strict=True)
    ]


def jittered(params: Params, names: list[str], rng_key: Key) -> Params:
    """The params, those of these names moved at random by a tenth of their size, and by 0.01 at least."""

    def move(path: tuple, leaf: Array) -> Array:
        if path[0].key not in names or not eqx.is_inexact_array(leaf):
            return leaf
        scale = 0.1 * jnp.maximum(jnp.sqrt(jnp.mean(leaf**2)), 0.1)
        return leaf + scale * jax.random.normal(rng_key, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(move, params)
