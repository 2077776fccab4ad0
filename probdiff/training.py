"""Stochastic variational inference of one or several chains: `SVI.init` and `SVI.update` in one compiled loop.

Progress, early stopping on validation data, checkpoints and resume.
"""

import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from tqdm.auto import tqdm

from probdiff import likelihood
from probdiff.chains import GaussianDiffusion
from probdiff.files import atomic_write, check_space
from probdiff.types import Data, Key, Params

Objective = Literal["at_time", "mean_field", "trace"]
_AVERAGING = 0.01  # weight of the newest params in their moving average
_SCHEDULE_RATE = 10.0  # logits of β_t travel by several units, weights of a network by tenths


@dataclass(frozen=True)
class Settings:
    """How a chain is fitted.

    `objective`: "at_time" (one t per datum), "mean_field" (all t, closed-form KLs) or "trace" (all t, N17 as it is).
    The learning rate falls from `learning_rate`, and from ten times that for the schedule's params, to zero along a
    cosine over `num_steps`; `gradient_clip` bounds the global norm of the gradient of the loss per datum. Progress,
    validation and checkpoints come every `check_every` steps. With `patience`, fitting stops when no chain's
    validation ELBO has risen for that many checks. With `dropout`, the losses are those of a network with units left
    out.
    """

    num_steps: int = 20_000
    batch_size: int = 512
    num_chains: int = 1
    objective: Objective = "at_time"
    learning_rate: float = 2e-3
    gradient_clip: float = 1.0
    check_every: int = 500
    patience: int | None = None
    dropout: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_chains", "check_every", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
            object.__setattr__(self, name, int(value))
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(get_args(Objective))}")


@dataclass(frozen=True)
class Trained:
    """Constrained params with a leading axis of C chains; losses (C, steps) and validation ELBO (C, checks) in nats."""

    params: Params
    losses: np.ndarray
    validation: np.ndarray


def make_svi(d: GaussianDiffusion, settings: Settings) -> SVI:
    """NumPyro's `SVI` of the objective, its loss the negative ELBO per datum of a batch."""
    reverse = partial(d.reverse, stacked=True, dropout=settings.dropout)
    forward = partial(d.forward_posterior, stacked=True)
    at_time = partial(d.reverse_at_time, dropout=settings.dropout)
    model, guide, loss = {
        "at_time": (at_time, d.forward_at_time, TraceMeanField_ELBO()),
        "mean_field": (reverse, forward, TraceMeanField_ELBO()),
        "trace": (reverse, forward, Trace_ELBO()),
    }[settings.objective]
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.adam(rate),
        optax.masked(optax.scale(_SCHEDULE_RATE), lambda params: {name: name != "network$params" for name in params}),
    )
    return SVI(
        handlers.scale(model, scale=1 / settings.batch_size),
        handlers.scale(guide, scale=1 / settings.batch_size),
        optimizer,
        loss,
    )


def train(
    d: GaussianDiffusion,
    x: Data,
    settings: Settings,
    *,
    rng_key: Key,
    validation: Data | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress_bar: bool = True,
) -> Trained:
    """Fits C chains side by side to x (N, *event_shape), in the chain's own units, by minimising the negative of N17.

    The rows of each batch are drawn on the device, with replacement. With `validation` data, what is checked is a
    moving average of the params over the last hundred steps or so, and each chain keeps that of its best check. With
    `checkpoint_dir`, `resume=True` goes on from the newest whole checkpoint and ends with the same bits as a run that
    never stopped.
    Raises `FloatingPointError` where the loss stops being finite; `FileExistsError` where `checkpoint_dir` holds
    a run and `resume` is false; `ValueError` where it holds a run of another configuration.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume wants the folder of the run to go on with; pass checkpoint_dir=")
    svi = make_svi(d, settings)
    x = jnp.asarray(x)
    init_key, batch_key, validation_key = jax.random.split(rng_key, 3)
    batch_keys = jax.random.split(batch_key, settings.num_chains)
    state = jax.jit(jax.vmap(lambda key: svi.init(key, x[: settings.batch_size])))(
        jax.random.split(init_key, settings.num_chains)
    )

    @jax.jit
    def run(state: Any, average: Params | None, x: Data, start: int, stop: int) -> tuple[Any, Any, Any]:
        def step(i: Any, carry: Any) -> Any:
            state, average, losses = carry

            def one_chain(state: Any, batch_key: Key) -> Any:
                rows = jax.random.randint(jax.random.fold_in(batch_key, i), (settings.batch_size,), 0, x.shape[0])
                return svi.update(state, x[rows])

            state, loss = jax.vmap(one_chain)(state, batch_keys)
            if average is not None:
                weight = jnp.maximum(_AVERAGING, 1 / (1 + i))  # a plain mean until there is enough to average
                average = optax.incremental_update(svi.get_params(state), average, weight)
            return state, average, losses.at[:, i - start].set(loss)

        losses = jnp.zeros((settings.num_chains, settings.check_every), x.dtype)
        return jax.lax.fori_loop(start, stop, step, (state, average, losses))

    num_checks = math.ceil(settings.num_steps / settings.check_every)
    progress = {
        "state": state,
        "average": None if validation is None else svi.get_params(state),
        "best": svi.get_params(state),
        "losses": np.full((settings.num_chains, settings.num_steps), np.nan, x.dtype),
        "validation": np.full((settings.num_chains, num_checks), np.nan),
    }
    first_check, checkpoints = 0, None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(
            Path(checkpoint_dir), _configuration(d, x, settings, rng_key, validation, state), resume
        )
        first_check, progress = checkpoints.restore(progress)
    bar = tqdm(total=settings.num_steps, disable=None if progress_bar else True, unit="step", desc="fit")
    bar.update(min(first_check * settings.check_every, settings.num_steps))
    for check in range(first_check, num_checks):
        if _has_stalled(progress["validation"][:, :check], settings.patience):
            break
        start = check * settings.check_every
        stop = min(start + settings.check_every, settings.num_steps)
        state, average, losses = run(progress["state"], progress["average"], x, start, stop)
        losses = np.asarray(losses)[:, : stop - start]
        _check_finite(losses, start)
        progress["state"], progress["average"], progress["losses"][:, start:stop] = state, average, losses
        if validation is None:
            progress["best"] = svi.get_params(state)
        else:
            elbo = [
                likelihood.elbo(d, chain(average, c), validation, rng_key=validation_key, num_draws=2).mean
                for c in range(settings.num_chains)
            ]
            if not np.all(np.isfinite(elbo)):
                raise FloatingPointError(
                    f"the validation ELBO is {elbo} at step {stop}; look for outliers in validation"
                )
            best = np.fmax.reduce(progress["validation"], axis=1, initial=-np.inf)
            progress["validation"][:, check] = elbo
            progress["best"] = _choose(elbo > best, average, progress["best"])
        if checkpoints is not None:
            checkpoints.save(check + 1, progress)
        bar.set_postfix_str(f"loss {losses.mean():.4f} nats per datum", refresh=False)
        bar.update(stop - start)
    bar.close()
    if checkpoints is not None:
        checkpoints.close()
    steps_taken = int(np.isfinite(progress["losses"][0]).sum())
    checks_made = math.ceil(steps_taken / settings.check_every)
    return Trained(
        progress["best"],
        progress["losses"][:, :steps_taken],
        progress["validation"][:, : checks_made if validation is not None else 0],
    )


def chain(params: Params, c: int) -> Params:
    """The params of one chain of several."""
    return jax.tree.map(lambda leaf: leaf[c], params)


def _choose(better: np.ndarray, new: Params, old: Params) -> Params:
    """The new params of the chains that are better, the old ones of the rest."""
    return jax.tree.map(lambda a, b: jnp.where(better.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old)


def _has_stalled(validation: np.ndarray, patience: int | None) -> bool:
    if patience is None or validation.shape[1] <= patience:
        return False
    return bool(np.all(validation.shape[1] - 1 - validation.argmax(1) >= patience))


def _check_finite(losses: np.ndarray, start: int) -> None:
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        c, step = bad[bad[:, 1].argmin()]
        raise FloatingPointError(
            f"the loss of chain {c} is {losses[c, step]} at step {start + step}; "
            "try a smaller learning_rate or look for outliers in x"
        )


def _digest(leaves: list[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _raw(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as arrays of numbers, random keys included."""
    return [
        np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def _configuration(
    d: GaussianDiffusion, x: Data, settings: Settings, rng_key: Key, validation: Data | None, state: Any
) -> dict[str, Any]:
    with np.printoptions(threshold=10**9, precision=17):
        program = repr(d)
    return {
        **asdict(settings),
        "diffusion": program,
        "x": _digest([x]),
        "validation": None if validation is None else _digest([validation]),
        "rng_key": np.asarray(jax.random.key_data(rng_key)).tolist(),
        "initial state": _digest(_raw(state)),
    }


class Checkpoints:
    """The two newest checkpoints of a run, written by Orbax, each with a digest of its files."""

    def __init__(self, directory: Path, configuration: dict[str, Any], resume: bool) -> None:
        import orbax.checkpoint as ocp  # slow to import, and not every fit wants it

        directory = directory.absolute()
        described = directory / "configuration.json"
        if described.exists():
            if not resume:
                raise FileExistsError(f"{directory} already holds a run: resume it, or choose another folder")
            held = json.loads(described.read_text())
            for name, value in configuration.items():
                if held.get(name) != value:
                    raise ValueError(
                        f"{directory} holds a run of another configuration: its {name} is {_short(held.get(name))}, "
                        f"this one's is {_short(value)}"
                    )
        else:
            with atomic_write(described) as file:
                file.write_text(json.dumps(configuration, indent=1))
        self._ocp = ocp
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory / "steps",
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, create=True),
        )

    def save(self, check: int, tree: Any) -> None:
        leaves = {f"{i:04}": leaf for i, leaf in enumerate(_raw(tree))}
        # on a full disk Orbax's threads fill the terminal before they fail
        check_space(self._directory, 2 * sum(leaf.nbytes for leaf in leaves.values()) + 100_000)
        try:
            self._manager.save(check, args=self._ocp.args.StandardSave(leaves))
            with atomic_write(self._digest_file(check)) as file:
                file.write_text(self._digest_of_files(check))
        except Exception as error:  # Orbax passes on what its storage says, in many classes
            raise OSError(f"could not write a checkpoint to {self._directory}: {_first_line(error)}") from error

    def restore(self, template: Any) -> tuple[int, Any]:
        """The newest whole checkpoint, with a warning for each damaged one; (0, template) where there is none."""
        for check in sorted(self._manager.all_steps(), reverse=True):
            finished = self._digest_file(check).exists()  # else the run was killed before its checkpoint counted
            if finished and self._digest_file(check).read_text() == self._digest_of_files(check):
                held = self._manager.restore(check, args=self._ocp.args.StandardRestore())
                return check, _fill(template, [np.asarray(held[name]) for name in sorted(held)])
            if finished:
                warnings.warn(f"checkpoint {check} in {self._directory} is damaged; an older one is used", stacklevel=3)
            self._manager.delete(check)
        return 0, template

    def _digest_file(self, check: int) -> Path:
        return self._directory / "digests" / f"{check}.sha256"

    def _digest_of_files(self, check: int) -> str:
        """SHA-256 of the names and the contents of the files of a checkpoint."""
        digest, folder = hashlib.sha256(), self._directory / "steps" / str(check)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def close(self) -> None:
        self._manager.close()


def _fill(template: Any, leaves: list[np.ndarray]) -> Any:
    old, treedef = jax.tree.flatten(template)
    new = [
        jax.random.wrap_key_data(jnp.asarray(leaf))
        if jax.dtypes.issubdtype(was.dtype, jax.dtypes.prng_key)
        else (np.array(leaf) if isinstance(was, np.ndarray) else jnp.asarray(leaf))
        for was, leaf in zip(old, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:160] + "…"
