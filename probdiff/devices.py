"""Where the arrays of a fit lie: one device, or a mesh of devices with the axes "chain" and "data"."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("chain", "data")


def choose_mesh(mesh: Mesh | None, num_chains: int, batch_size: int) -> Mesh | None:
    """`mesh`, checked; without one, all devices where there are several, and None where there is one.

    As many devices as divide `num_chains` hold chains of their own; the others share each batch. Raises `ValueError`
    for other axes than "chain" and "data", and where an axis does not divide its count.
    """
    if mesh is None:
        devices = jax.devices()
        if len(devices) == 1:
            return None
        chains = math.gcd(num_chains, len(devices))
        shares = math.gcd(batch_size, len(devices) // chains)
        if chains * shares < len(devices) and jax.process_count() > 1:
            raise ValueError(
                f"batch_size is {batch_size} and num_chains {num_chains}; among {len(devices)} devices of "
                f"{jax.process_count()} processes batch_size must be a multiple of {len(devices) // chains}"
            )
        mesh = Mesh(np.array(devices[: chains * shares]).reshape(chains, shares), AXES)
    if not isinstance(mesh, Mesh) or not set(mesh.axis_names) <= set(AXES):
        raise ValueError(
            f'mesh is {mesh!r}; it must be a jax.sharding.Mesh with axes "chain" and "data", or one of them'
        )
    for axis, name, count in (("chain", "num_chains", num_chains), ("data", "batch_size", batch_size)):
        if count % mesh.shape.get(axis, 1):
            raise ValueError(f"{name} is {count}; it must be a multiple of the {mesh.shape[axis]} devices of {axis!r}")
    return Mesh(mesh.devices, mesh.axis_names)  # without the explicit axes of `jax.make_mesh`


def constrain(tree: Any, mesh: Mesh | None, *axes: str) -> Any:
    """Inside `jit`, has the leading axes of every leaf shared out over these axes of the mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _sharding(mesh, *axes))


def each_chain(program: Callable[..., Any], mesh: Mesh | None) -> Callable[[Any], Any]:
    """`program(one)` for each chain: all chains to all results, both with a leading axis of chains.

    A matrix product with a leading axis of chains runs at half the speed of one without on a CPU. So chains are taken
    one after the other there, and side by side on a GPU and where the mesh has devices for them.
    """

    def run(chains: Any) -> Any:
        if mesh is not None and mesh.shape.get("chain", 1) > 1:
            return jax.vmap(program, spmd_axis_name="chain")(chains)
        if len(jax.tree.leaves(chains)[0]) == 1:
            return jax.tree.map(lambda leaf: leaf[None], program(jax.tree.map(lambda leaf: leaf[0], chains)))
        return jax.lax.map(program, chains) if jax.default_backend() == "cpu" else jax.vmap(program)(chains)

    return run


def place(tree: Any, mesh: Mesh | None, *axes: str) -> Any:
    """Puts arrays, the same in every process, on the mesh with their leading axes shared out."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    return jax.jit(lambda tree: tree, out_shardings=_sharding(mesh, *axes))(tree)


def place_rows(x: np.ndarray, mesh: Mesh | None, size: int) -> jax.Array:
    """Puts rows of data on the mesh, each device its share; zeros at the end make it `size` rows, and shares equal."""
    share = 1 if mesh is None else mesh.shape.get("data", 1)
    missing = -(-size // share) * share - len(x)
    x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x
    if mesh is None:
        return jax.numpy.asarray(x)
    return jax.make_array_from_callback(x.shape, _sharding(mesh, "data"), lambda index: x[index])


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """The whole of every array, on this process's own device."""
    if mesh is None:
        return tree
    whole = jax.jit(lambda tree: tree, out_shardings=_sharding(mesh))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def _sharding(mesh: Mesh, *axes: str) -> NamedSharding:
    return NamedSharding(mesh, P(*(axis if axis in mesh.axis_names else None for axis in axes)))
