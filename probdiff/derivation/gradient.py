"""The gradient of K in every param, by differentiation and by finite differences on the same draws."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import biject_to

from probdiff.derivation.pair import Pair
from probdiff.types import Key, Params

_ENTRIES = 64  # of a param: with more, or in a network, one random direction stands for a whole leaf
_STEP = 2 * float(np.finfo(np.float64).eps) ** (1 / 3)


@dataclass(frozen=True)
class Slope:
    """dK/du along one direction of the param `name`, u being its unconstrained value as SVI moves it; nats.

    `differentiated`, and by central differences of step h and 2h, `near` and `wide`; `rounding` is that of `near`.
    `zero`: whether the whole gradient of the leaf is zero.
    """

    param: str
    name: str
    differentiated: float
    near: float
    wide: float
    rounding: float
    zero: bool


@dataclass(frozen=True)
class Directions:
    """Every entry of the small params and a random direction of each large one, u being the unconstrained params.

    `u`: where. `moves`: leaves with a leading axis, that of the directions. `labels`: the leaf, the param and a name of
    each. `params`: the constrained params at u.
    """

    u: Params
    moves: Params
    labels: list[tuple[int, str, str]]
    params: Callable[[Params], Params]


def directions(pair: Pair, key_jitter: Key, key_directions: Key) -> Directions:
    """Where dK/du is taken, and along what.

    The unconstrained params of the reverse chain are moved at random by a tenth first, since a network's initial
    weights may be where a gradient vanishes. Wants double precision.
    """
    transforms = {name: biject_to(constraint) for name, constraint in pair.constraints.items()}
    free = [name for name in pair.reverse_params if name not in transforms]
    params = jax.tree.map(double, jittered(pair.params, free, key_jitter))
    params = {name: transforms[name].inv(p) if name in transforms else p for name, p in params.items()}
    u, rest = eqx.partition(params, eqx.is_inexact_array)

    @jax.jit
    def constrained(leaves: Params) -> Params:
        moved = eqx.combine(leaves, rest)
        return {name: transforms[name](p) if name in transforms else p for name, p in moved.items()}

    flat, structure = jax.tree_util.tree_flatten_with_path(u)
    keys = [jax.random.fold_in(key_directions, i) for i in range(len(flat))]
    noise = _normals(keys, tuple(leaf.shape for _, leaf in flat), jnp.result_type(float))
    entries = []  # which leaf, its param, a name, the direction
    for i, (path, leaf) in enumerate(flat):
        param, name = path[0].key, jax.tree_util.keystr(path, simple=True, separator=".")
        length = np.clip(np.abs(np.asarray(leaf)), 0.1, 1.0)
        if len(path) > 1 or leaf.size > _ENTRIES:
            entries.append((i, param, name, length * np.asarray(noise[i]) / np.sqrt(leaf.size)))
        else:
            units = np.eye(leaf.size).reshape(leaf.size, *leaf.shape)
            labels = [f"{name}[{j}]" for j in range(leaf.size)] if leaf.ndim else [name]
            entries += [(i, param, label, length * unit) for label, unit in zip(labels, units, strict=True)]
    moves = [
        np.stack([direction if k == i else np.zeros(leaf.shape) for k, _, _, direction in entries])
        for i, (_, leaf) in enumerate(flat)
    ]
    labelled = [(i, param, name) for i, param, name, _ in entries]
    return Directions(u, jax.tree.unflatten(structure, moves), labelled, constrained)


def slopes(pair: Pair, rng_key: Key, elbo: Callable[[Params, Key], Array]) -> list[Slope]:
    """dK/du along `directions`, of an estimate `elbo(params, rng_key)` of K that is smooth in params for one key.

    K is that of all data, for one path each. Wants double precision.
    """
    keys = jax.random.split(rng_key, 3)
    key_noise, key_jitter, key_directions = (keys[i] for i in range(3))
    along = directions(pair, key_jitter, key_directions)

    def k_of(leaves: Params) -> Array:
        return elbo(along.params(leaves), key_noise)

    @jax.jit
    def moved(step: Array, move: Params) -> Params:
        return along.params(jax.tree.map(lambda leaf, m: leaf + step * m, along.u, move))

    gradient = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.grad(k_of)(along.u))]
    moves = [np.asarray(move) for move in jax.tree.leaves(along.moves)]
    steps = _STEP * np.array([-2.0, -1.0, 1.0, 2.0])
    at_all = jax.vmap(jax.vmap(lambda step, move: elbo(moved(step, move), key_noise), (None, 0)), (0, None))
    k = np.asarray(at_all(steps, along.moves))
    near, wide = (k[2] - k[1]) / (2 * _STEP), (k[3] - k[0]) / (4 * _STEP)
    # of a sum of many terms of either sign
    rounding = 50 * float(np.finfo(np.float64).eps) * (np.abs(k).max() + len(pair.x) * pair.num_timesteps) / _STEP
    return [
        Slope(param, name, float(np.sum(gradient[i] * moves[i][j])), n, w, float(rounding), not np.any(gradient[i]))
        for j, ((i, param, name), n, w) in enumerate(zip(along.labels, near.tolist(), wide.tolist(), strict=True))
    ]


def jittered(params: Params, names: list[str], rng_key: Key) -> Params:
    """The params, those of these names moved at random by a tenth of their size, and by 0.01 at least."""
    moving = {name: params[name] for name in names if name in params}
    numbers, rest = eqx.partition(moving, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(numbers)
    noise = _normals([rng_key] * len(leaves), tuple(leaf.shape for leaf in leaves), jnp.result_type(float))
    moved = []
    for leaf, z in zip(leaves, noise, strict=True):
        values = np.asarray(leaf)
        scale = 0.1 * max(float(np.sqrt(np.mean(values**2))), 0.1)
        moved.append(jax.device_put((values + scale * np.asarray(z)).astype(values.dtype)))
    return {**params, **eqx.combine(jax.tree.unflatten(structure, moved), rest)}


@partial(jax.jit, static_argnums=(1, 2))
def _normals(keys: list[Key], shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[Array]:
    """Standard normal arrays, one for each key."""
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def double(leaf: Array) -> Array:
    """A floating-point leaf in double precision."""
    return jnp.asarray(leaf, jnp.float64) if eqx.is_inexact_array(leaf) else leaf
