"""Checkpoints of a fit, written whole or not at all, and what tells one fit's from another's."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.checks import warn
from probdiff.files import atomic_write, check_space, make_folder
from probdiff.fitting.devices import from_first_process
from probdiff.fitting.streams import Stream
from probdiff.locks import one_at_a_time
from probdiff.types import Data, Key

CONFIGURATION = "configuration.json"
_EARLIER = {"optimizer": None}  # what runs had before it could be chosen


def _digest(leaves: list[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _raw(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as arrays of numbers, random keys included."""
    return [
        np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


@one_at_a_time
def program_digest(program: Callable[..., Any], *arguments: Any) -> str:
    """SHA-256 of what a function computes from arguments of these shapes: its jaxpr and the constants in it."""
    closed = jax.make_jaxpr(program)(*arguments)
    return hashlib.sha256(f"{closed.jaxpr} {_digest(_raw(closed.consts))}".encode()).hexdigest()


def description(value: Any) -> Any:
    """A value for JSON that is the same in every process: dataclasses by their fields, arrays by shape and digest.

    An Equinox module is a dataclass; another object is described by its attributes, and a function by its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": _digest(_raw(value))}
    if isinstance(value, Mapping):
        return {str(key): description(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [description(one) for one in value]
    if isinstance(value, partial):
        return {"partial": description(value.func), "args": description([value.args, value.keywords])}
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    if is_dataclass(value):
        held = {field.name: getattr(value, field.name, None) for field in fields(value)}
    else:
        held = getattr(value, "__dict__", {})
    return {"class": type(value).__qualname__, **{name: description(one) for name, one in held.items()}}


_DIGESTS = ("x", "validation", "initial state")  # of which no value is shown


def _of_diffusion(d: Any) -> Any:
    """Its description, without the components of a Gaussian chain that has but one, which earlier versions had not."""
    described = description(d)
    if described["class"] == "GaussianDiffusion" and described["components"] == 1:
        del described["components"]
    return described


def configuration(
    settings: dict[str, Any],
    d: Any,
    x: Data | Stream,
    units: Sequence[Any],
    validation: Data | None,
    rng_key: Key,
    state: Any,
    start: str | None = None,
) -> dict[str, Any]:
    """What must be the same in the run that a checkpoint goes on with."""
    # of a file its units, the mean and the standard deviation, stand for the rows
    whole = [x.shape, x.starts, *units] if isinstance(x, Stream) else [x, *units]
    return {
        "precision": str(jnp.result_type(float)),
        **settings,
        "diffusion": _of_diffusion(d),
        "start": start,
        "rng_key": np.asarray(jax.random.key_data(rng_key)).tolist(),  # before x, whose held-out rows it draws
        "x": _digest(whole),
        "validation": None if validation is None else _digest([validation]),
        "initial state": _digest(_raw(state)),
    }


def refuse_to_overwrite(directory: str | Path | None, resume: bool) -> None:
    """Raises `FileExistsError` where a folder holds a run that is not to be gone on with."""
    if directory is not None and not resume and (Path(directory) / CONFIGURATION).exists():
        raise FileExistsError(f"{Path(directory).absolute()} already holds a run: resume it, or choose another folder")


def starts_at_noise(directory: Path) -> bool:
    """Whether a folder holds a run of an earlier version, whose network starts at the reversal of N(0, I)."""
    described = directory / CONFIGURATION
    return described.exists() and "start" not in json.loads(described.read_text())


class Checkpoints:
    """The two newest checkpoints of a run, written by Orbax, each with a digest of its files.

    Of several processes the first alone reads and writes; what it reads, and its errors, all of them have.
    """

    def __init__(self, directory: Path, configuration: dict[str, Any], resume: bool) -> None:
        from_first_process(lambda: self._open(directory, configuration, resume))

    def save(self, check: int, tree: Any) -> None:
        from_first_process(lambda: self._save(check, tree))

    def restore(self, template: Any) -> tuple[int, Any]:
        """The newest whole checkpoint, with a warning for each damaged one; (0, template) where there is none."""
        check, leaves = from_first_process(self._restore)
        return check, template if leaves is None else _fill(template, leaves)

    def close(self) -> None:
        from_first_process(lambda: self._manager.close())

    def _open(self, directory: Path, configuration: dict[str, Any], resume: bool) -> None:
        import orbax.checkpoint as ocp  # slow to import, and not every fit wants it

        directory = directory.absolute()
        described = directory / CONFIGURATION
        held, goes_on = None, False
        refuse_to_overwrite(directory, resume)
        if described.exists():
            held, wanted = _EARLIER | json.loads(described.read_text()), json.loads(json.dumps(configuration))
            goes_on = held.get("num_steps", 0) < wanted.get("num_steps", 0)
            other = _difference(held, wanted | {"num_steps": held.get("num_steps")} if goes_on else wanted)
            if other is not None:
                name, its, mine = other
                how = "is another" if name in _DIGESTS else f"is {_short(its)}, this one's is {_short(mine)}"
                raise ValueError(f"{directory} holds a run of another configuration: its {name} {how}")
        self._ocp = ocp
        self._directory = directory
        make_folder(directory / "steps")
        self._manager = ocp.CheckpointManager(
            directory / "steps",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                create=False,
                enable_async_checkpointing=False,
                # of several processes the first alone reads and writes
                multiprocessing_options=ocp.options.MultiprocessingOptions(0, {0}, "probdiff"),
            ),
        )
        if held is not None and goes_on:  # not from the end of a stretch that was cut short
            for check in self._manager.all_steps():
                if check > held["num_steps"] // held["check_every"]:
                    self._manager.delete(check)
        if held is None or goes_on:
            with atomic_write(described) as file:
                file.write_text(json.dumps(configuration, indent=1))

    def _save(self, check: int, tree: Any) -> None:
        leaves = {f"{i:04}": leaf for i, leaf in enumerate(_raw(tree))}
        # on a full disk Orbax's threads fill the terminal before they fail
        check_space(self._directory, 2 * sum(leaf.nbytes for leaf in leaves.values()) + 100_000)
        try:
            self._manager.save(check, args=self._ocp.args.StandardSave(leaves))
            with atomic_write(self._digest_file(check)) as file:
                file.write_text(self._digest_of_files(check))
        except Exception as error:  # Orbax passes on what its storage says, in many classes
            raise OSError(f"could not write a checkpoint to {self._directory}: {_first_line(error)}") from error

    def _restore(self) -> tuple[int, list[np.ndarray] | None]:
        for check in sorted(self._manager.all_steps(), reverse=True):
            finished = self._digest_file(check).exists()  # else the run was killed before its checkpoint counted
            if finished and self._digest_file(check).read_text() == self._digest_of_files(check):
                held = self._manager.restore(check, args=self._ocp.args.StandardRestore())
                return check, [np.asarray(held[name]) for name in sorted(held)]
            if finished:
                warn(f"checkpoint {check} in {self._directory} is damaged; an older one is used")
            self._manager.delete(check)
        return 0, None

    def _digest_file(self, check: int) -> Path:
        return self._directory / "digests" / f"{check}.sha256"

    def _digest_of_files(self, check: int) -> str:
        """SHA-256 of the names and the contents of the files of a checkpoint."""
        digest, folder = hashlib.sha256(), self._directory / "steps" / str(check)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
        return digest.hexdigest()


def _difference(held: dict[str, Any], mine: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name under which two configurations differ, with both values.

    What `held` has no value for, having been written by an earlier version, is not compared, nor is a diffusion that it
    holds as text.
    """
    for name, value in mine.items():
        its = held.get(name, value)
        if isinstance(its, dict) and isinstance(value, dict):
            inside = _difference(its, value)
            if inside is not None:
                return f"{name} {inside[0]}", *inside[1:]
        elif its != value and not (name == "diffusion" and isinstance(its, str)):
            return name, its, value
    return None


def _fill(template: Any, leaves: list[np.ndarray]) -> Any:
    old, treedef = jax.tree.flatten(template)
    new = [
        jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(was))
        if jax.dtypes.issubdtype(was.dtype, jax.dtypes.prng_key)
        else (_prefixed(was, leaf) if isinstance(was, np.ndarray) else jnp.asarray(leaf))
        for was, leaf in zip(old, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def _prefixed(was: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    """`was`, which may be longer in its last axis, with `leaf` at the front."""
    return np.concatenate([leaf, was[..., leaf.shape[-1] :]], axis=-1)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:160] + "…"
