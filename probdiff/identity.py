"""What tells one object from another by value, so that what is compiled for one serves all that are equal to it."""

from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

_KEPT = "_value_and_hash"


class ByValue:
    """What is equal to all of its class that hold the same values."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ByValue) and self._value_and_hash == other._value_and_hash)

    def __hash__(self) -> int:
        return self._value_and_hash[1]

    @cached_property
    def _value_and_hash(self) -> tuple[Hashable, int]:
        value = value_of(self)
        return value, hash(value)


def value_of(x: Any) -> Hashable:
    """Something that can be hashed, and is equal for two objects that hold the same values.

    Arrays are told apart by dtype, shape and contents, dataclasses, Equinox modules among them, by class and fields,
    and what has no fields, such as a function, by itself.
    """
    if isinstance(x, np.ndarray | np.generic | jax.Array) and not isinstance(x, jax.core.Tracer):
        array = np.asarray(x)
        return ("array", str(array.dtype), array.shape, array.tobytes())
    if is_dataclass(x) and not isinstance(x, type):
        held = {field.name: getattr(x, field.name, None) for field in fields(x)} | getattr(x, "__dict__", {})
        return (type(x), *((name, value_of(held[name])) for name in sorted(held) if name != _KEPT))
    if isinstance(x, Mapping):
        return (type(x), *((key, value_of(value)) for key, value in x.items()))
    if isinstance(x, list | tuple):
        return (type(x), *map(value_of, x))
    if isinstance(x, partial):
        return (partial, x.func, value_of(x.args), value_of(x.keywords))
    if isinstance(x, bool | int | float):
        return (type(x), x)  # 1, 1.0 and True are equal
    return x if isinstance(x, Hashable) else _Itself(x)


class _Itself:
    """An object that has no hash, which is equal to nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __hash__(self) -> int:
        return id(self._x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._x is other._x
