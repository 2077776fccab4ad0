"""Where the arrays of a fit lie, on one device or a mesh of them, and what several processes tell each other."""

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from probdiff.checks import warn

AXES = ("chain", "data")
OF_FIRST = "raised in the first process"


def choose_mesh(mesh: Mesh | None, num_chains: int, batch_size: int) -> Mesh | None:
    """`mesh`, checked; without one, all devices where there are several, and None where there is one.

    The greatest common divisor of their number and `num_chains` is how many groups of devices hold fits of their
    own; the devices of a group share each batch. Raises `ValueError` for other axes than "chain" and "data", and where
    an axis does not divide its count; warns where devices of this process are left idle.
    """
    if mesh is None:
        devices = jax.devices()
        if len(devices) == 1:
            return None
        groups = math.gcd(num_chains, len(devices))
        shares = math.gcd(batch_size, len(devices) // groups)
        if groups * shares < len(devices):
            wanted = f"batch_size is {batch_size} and num_chains {num_chains}; for {len(devices)} devices"
            if jax.process_count() > 1:
                raise ValueError(
                    f"{wanted} of {jax.process_count()} processes batch_size must be a multiple of "
                    f"{len(devices) // groups}"
                )
            warn(
                f"{wanted} to be used batch_size must be a multiple of {len(devices) // groups}; "
                f"{groups * shares} are used"
            )
        mesh = Mesh(np.array(devices[: groups * shares]).reshape(groups, shares), AXES)
    if not isinstance(mesh, Mesh) or not set(mesh.axis_names) <= set(AXES):
        raise ValueError(
            f'mesh is {mesh!r}; it must be a jax.sharding.Mesh with axes "chain" and "data", or one of them'
        )
    for axis, name, count in (("chain", "num_chains", num_chains), ("data", "batch_size", batch_size)):
        if count % mesh.shape.get(axis, 1):
            raise ValueError(f"{name} is {count}; it must be a multiple of the {mesh.shape[axis]} devices of {axis!r}")
    return Mesh(mesh.devices, mesh.axis_names)  # without the explicit axes of `jax.make_mesh`


def one_for_each_fit(num_chains: int) -> None:
    """Makes the CPU so many devices of JAX that each has fits of its own, unless JAX has been used before.

    A core has then a fit to itself, which takes less time than to share the work of each.
    """
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1  # from Python 3.13 on those that it may use
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if num_chains % n == 0))


def constrain(tree: Any, mesh: Mesh | None, *axes: str) -> Any:
    """Inside `jit`, has the leading axes of every leaf shared out over these axes of a mesh that shares out batches."""
    if mesh is None or mesh.shape.get("data", 1) == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, _sharding(mesh, *axes))


def each_fit(program: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`program(one, shared)` for each fit: all fits to all results, both with a leading axis of fits.

    A matrix product with a leading axis of fits runs at half the speed of one without on a CPU. So fits are taken
    one after the other there, and side by side on a GPU. Where the mesh has devices for them, each device has its own.
    """

    def run(fits: Any, shared: Any) -> Any:
        program_of_one = partial(program, shared=shared)
        if len(jax.tree.leaves(fits)[0]) == 1:
            return jax.tree.map(lambda leaf: leaf[None], program_of_one(jax.tree.map(lambda leaf: leaf[0], fits)))
        return jax.lax.map(program_of_one, fits) if jax.default_backend() == "cpu" else jax.vmap(program_of_one)(fits)

    if mesh is None or mesh.shape.get("chain", 1) == 1:
        return run
    if mesh.shape.get("data", 1) > 1:
        return lambda fits, shared: jax.vmap(partial(program, shared=shared), spmd_axis_name="chain")(fits)
    return jax.shard_map(run, mesh=mesh, in_specs=(P("chain"), P()), out_specs=P("chain"), check_vma=False)


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


def from_first_process[Result](compute: Callable[[], Result]) -> Result:
    """What `compute` returns in the first of several processes, which alone runs it; where it raises, all raise that.

    The result is to have NumPy arrays alone, so that it comes to the other processes bit by bit. An error has the note
    `OF_FIRST` in those.
    """
    if jax.process_count() == 1:
        return compute()
    first, sent = jax.process_index() == 0, np.zeros(0, np.uint8)
    error: Exception | None = None
    if first:
        try:
            result = compute()
            outcome = pickle.dumps((result, None))
        except Exception as raised:  # whatever it is, the others wait for it
            error, outcome = raised, pickle.dumps((None, _sendable(raised)))
        sent = np.frombuffer(outcome, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(sent))))
    sent = multihost_utils.broadcast_one_to_all(sent if first else np.zeros(size, np.uint8))
    if not first:
        result, error = pickle.loads(np.asarray(sent).tobytes())
        if error is not None:
            error.add_note(OF_FIRST)
    if error is not None:
        raise error
    return result


def _sendable(error: Exception) -> Exception:
    """The error, or where its class cannot be pickled one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # in as many ways as there are classes
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def check_same(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` in every process where an argument's `repr` is not the same in all of them."""
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in arguments.values()]
    of_each = np.asarray(multihost_utils.process_allgather(np.stack(digests)))  # (processes, arguments, bytes)
    other = np.argwhere((of_each != of_each[0]).any(-1))
    if len(other):
        process, argument = other[0]
        raise ValueError(
            f"{list(arguments)[argument]} is not the same in every process: process {process} has another than "
            "process 0; give all of them the same arguments, all of x too"
        )


def _sharding(mesh: Mesh, *axes: str) -> NamedSharding:
    return NamedSharding(mesh, P(*(axis if axis in mesh.axis_names else None for axis in axes)))
