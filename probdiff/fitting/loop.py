"""Stochastic variational inference of fits side by side: `SVI.init` and `SVI.update` in one compiled loop.

Progress, early stopping on validation data, checkpoints and resume.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from probdiff.chains import Diffusion
from probdiff.checks import check_count
from probdiff.fitting import devices
from probdiff.fitting.checkpoints import Checkpoints, configuration, program_digest
from probdiff.fitting.streams import Stream
from probdiff.fitting.times import time_probs
from probdiff.likelihood.elbo import elbo
from probdiff.locks import one_at_a_time
from probdiff.progress import progress as progress_of
from probdiff.sampling import one_fit
from probdiff.schedules import Schedule
from probdiff.types import Data, Key, Params

Objective = Literal["at_time", "mean_field", "trace"]
Times = Literal["even", "weighted"]
_AVERAGING = 0.01  # weight of the newest params in their moving average
_SCHEDULE_RATE = 10.0  # logits of β_t travel by several units, weights of a network by tenths


@dataclass(frozen=True)
class Settings:
    """How a diffusion is fitted.

    `objective`: "at_time" (one t per datum), "mean_field" (all t, closed-form KLs) or "trace" (all t, N17 as it is).
    `times`, of "at_time": "even", all t alike, or "weighted", by `time_probs`, anew at every check.
    Adam's learning rate falls from `learning_rate`, 2e-3, and from ten times that for the schedule's params, to zero
    along a cosine over `num_steps`; `gradient_clip`, 1, bounds the global norm of the gradient of the loss per datum,
    for bits that of the network's params alone. `optimizer`, an Optax transformation or an optimiser of NumPyro, takes
    the place of all of that; it is given the loss per datum's gradient in the unconstrained params. Progress,
    validation and checkpoints come every `check_every` steps. With `patience`, fitting stops when no fit's validation
    ELBO has risen for that many checks. With `dropout`, the losses are those of a network with units left out.
    Raises `ValueError` for a value out of its range, and for a learning_rate or a gradient_clip beside an optimizer;
    `TypeError` for an optimizer that is none.
    """

    num_steps: int = 20_000
    batch_size: int = 512
    num_chains: int = 1
    objective: Objective = "at_time"
    learning_rate: float | None = None
    gradient_clip: float | None = None
    check_every: int = 500
    patience: int | None = None
    dropout: bool = False
    times: Times = "weighted"
    optimizer: Any = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_chains", "check_every", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            check_count(value, name, 1)
            object.__setattr__(self, name, int(value))
        for name, default in (("learning_rate", 2e-3), ("gradient_clip", 1.0)):
            value = getattr(self, name)
            if self.optimizer is not None:
                if value is not None:
                    raise ValueError(f"{name} is {value}, and optimizer is given, which has its own; leave one out")
                continue
            value = default if value is None else value
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
            object.__setattr__(self, name, float(value))
        _check_optimizer(self.optimizer)
        for name, kinds in (("objective", Objective), ("times", Times)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kinds))}")


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return
    # NumPyro's own optimisers share a class that has no public name
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in ("init", "update", "get_params")):
        raise TypeError(
            f"optimizer is {optimizer!r}; it must be an Optax transformation such as optax.adamw(1e-3), "
            "or an optimiser of NumPyro"
        )


@dataclass(frozen=True)
class Trained:
    """Constrained params with a leading axis of C fits; losses (C, steps) and validation ELBO (C, checks) in nats."""

    params: Params
    losses: np.ndarray
    validation: np.ndarray


@one_at_a_time
def make_svi(d: Diffusion, settings: Settings) -> SVI:
    """NumPyro's `SVI` of the objective, its loss the negative ELBO per datum of a batch."""
    reverse = partial(d.reverse, stacked=True, dropout=settings.dropout)
    forward = partial(d.forward_posterior, stacked=True)
    at_time = partial(d.reverse_at_time, dropout=settings.dropout)
    at_time_loss = TraceMeanField_ELBO()
    at_time_loss.can_infer_discrete = True  # by the factor "score"
    trace: tuple[Any, Any, Any] = (reverse, forward, Trace_ELBO())
    if d.family.support.is_discrete:
        if settings.objective == "mean_field" and _has_params(d.schedule):
            raise ValueError(
                'objective is "mean_field"; it has no gradient through draws of bits, which a learned schedule wants: '
                'use "at_time", or "trace" for short chains'
            )
        trace = (partial(d.reverse, dropout=settings.dropout), d.forward, TraceGraph_ELBO())
    model, guide, loss = {
        "at_time": (at_time, d.forward_at_time, at_time_loss),
        "mean_field": (reverse, forward, TraceMeanField_ELBO()),
        "trace": trace,
    }[settings.objective]
    return SVI(
        handlers.scale(model, scale=1 / settings.batch_size),
        handlers.scale(guide, scale=1 / settings.batch_size),
        _adam(d, settings) if settings.optimizer is None else settings.optimizer,
        loss,
    )


def _adam(d: Diffusion, settings: Settings) -> optax.GradientTransformation:
    """Adam on a clipped gradient, its learning rate falling along a cosine, larger for the schedule's params."""
    assert settings.learning_rate is not None
    assert settings.gradient_clip is not None
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps)
    clip = optax.clip_by_global_norm(settings.gradient_clip)
    if d.family.support.is_discrete:  # the score function is large at rare draws, and small without them
        clip = optax.masked(clip, partial(_mask, network=True))
    return optax.chain(clip, optax.adam(rate), optax.masked(optax.scale(_SCHEDULE_RATE), partial(_mask, network=False)))


def _mask(params: Params, network: bool) -> dict[str, bool]:
    """Which params are the network's, or else the schedule's."""
    return {name: (name == "network$params") is network for name in params}


def _has_params(schedule: Schedule) -> bool:
    return any(site["type"] == "param" for site in handlers.trace(schedule).get_trace().values())


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 1))
def start_state(d: Diffusion, settings: Settings, rng_keys: Key, init: Params | None = None) -> tuple[Any, Params]:
    """The state of SVI before the first step, with a leading axis of C fits, and its params: those of `init` if any."""
    svi, x = make_svi(d, settings), jnp.zeros((settings.batch_size, *d.event_shape))
    state = jax.vmap(lambda key, params: svi.init(key, x, init_params=params))(rng_keys, init)
    # without weak types, which arrays of a checkpoint do not have: else a resumed fit would compile its steps anew
    strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state.optim_state)
    return state._replace(optim_state=strong), svi.get_params(state)


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 1, 2))
def run_steps(
    d: Diffusion,
    settings: Settings,
    mesh: Mesh | None,
    state: Any,
    average: Params | None,
    x: Data,
    num_rows: int,
    batch_keys: Key,
    start: int,
    stop: int,
) -> tuple[Any, Params, Params | None, Any]:
    """Steps `start` to `stop` of SVI, on batches drawn from the first `num_rows` rows of x.

    It gives the state, its params, their moving average where one is given, and the losses (C, check_every). It is
    compiled once for a diffusion and its settings.
    """
    svi = make_svi(d, settings)
    of_batch = jax.ShapeDtypeStruct((settings.batch_size, *d.event_shape), x.dtype)
    jax.eval_shape(svi.init, batch_keys[0], of_batch)  # from which SVI learns how params are constrained

    def advance(one: tuple[Any, Params | None, Key]) -> tuple[Any, Params, Params | None, Any]:
        state, average, batch_key = one
        options = {}
        if settings.objective == "at_time" and settings.times == "weighted":
            key_probs = jax.random.fold_in(jax.random.fold_in(batch_key, start), settings.batch_size)
            options["time_probs"] = time_probs(d, svi.get_params(state), x, num_rows, key_probs)

        def step(i: Any, carry: Any) -> Any:
            state, average, losses = carry
            rows = jax.random.randint(jax.random.fold_in(batch_key, i), (settings.batch_size,), 0, num_rows)
            state, loss = svi.update(state, devices.constrain(x[rows], mesh, "data"), **options)
            state = devices.constrain(state, mesh)
            if average is not None:
                weight = jnp.maximum(_AVERAGING, 1 / (1 + i))  # a plain mean until there is enough to average
                average = optax.incremental_update(svi.get_params(state), average, weight)
            return state, average, losses.at[i - start].set(loss)

        losses = jnp.zeros(settings.check_every)
        state, average, losses = jax.lax.fori_loop(start, stop, step, (state, average, losses))
        return state, svi.get_params(state), average, losses

    return devices.each_fit(advance, mesh)((state, average, batch_keys))


def train(
    d: Diffusion,
    x: Data | Stream,
    settings: Settings,
    *,
    rng_key: Key,
    units: tuple[Any, Any] = (0.0, 1.0),
    init: Params | None = None,
    validation: Data | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress_bar: bool = True,
    mesh: Mesh | None = None,
) -> Trained:
    """Makes C fits side by side to x (N, *event_shape), in the chain's own units, by minimising the negative of N17.

    `units`, where those have zero and one in the data's, tell data apart that are the same but for their units.
    The rows of each batch are drawn on the device, with replacement; those of a `Stream` from one buffer after the
    other, a new one after every check. With `validation` data, what is checked is a moving average of the params over
    the last hundred steps or so, and each fit keeps that of its best check. With `checkpoint_dir`, `resume=True` goes
    on from the newest whole checkpoint and ends with the same bits as a run that never stopped, on the same devices. It
    may have more steps than the run had: then it goes on from the last whole stretch of `check_every` steps, with the
    learning rate of the new number of steps, which is larger there than it was at the end of the old one.
    `init` are params to start from, with a leading axis of C fits.
    Among several devices fits and batches are shared out as `devices.choose_mesh` says.
    Raises `FloatingPointError` where the loss stops being finite; `FileExistsError` where `checkpoint_dir` holds
    a run and `resume` is false; `ValueError` where it holds a run of another configuration, and where several processes
    are given different arguments. What the first of several processes raises in a check or a checkpoint, all raise.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume wants the folder of the run to go on with; pass checkpoint_dir=")
    mesh = devices.choose_mesh(mesh, settings.num_chains, settings.batch_size)
    svi = make_svi(d, settings)  # which refuses what cannot be fitted, before anything is compiled
    init_key, batch_key, validation_key = jax.random.split(rng_key, 3)
    batch_keys = jax.random.split(batch_key, settings.num_chains)
    state, params = start_state(d, settings, jax.random.split(init_key, settings.num_chains), init)
    num_checks = math.ceil(settings.num_steps / settings.check_every)
    progress = {
        "state": state,
        "average": None if validation is None else params,
        "best": params,
        "losses": np.full((settings.num_chains, settings.num_steps), np.nan, jnp.result_type(float)),
        "validation": np.full((settings.num_chains, num_checks), np.nan),
    }
    first_check, checkpoints = 0, None
    if checkpoint_dir is not None or jax.process_count() > 1:
        arguments = configuration(_described(settings, svi, state), d, x, units, validation, rng_key, state)
        layout = None if mesh is None else mesh.shape
        devices.check_same(arguments | {"checkpoint_dir": checkpoint_dir is None, "mesh": layout})
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(Path(checkpoint_dir), arguments, resume)
        first_check, progress = checkpoints.restore(progress)
    bar = progress_of(
        total=settings.num_steps,
        initial=min(first_check * settings.check_every, settings.num_steps),
        show=progress_bar and jax.process_index() == 0,
        unit="step",
        desc="fit",
    )
    state, average = devices.place((progress["state"], progress["average"]), mesh, "chain")
    batch_keys = devices.place(batch_keys, mesh, "chain")
    buffers = _buffers(x, settings, first_check, mesh)
    for check in range(first_check, num_checks):
        if _has_stalled(progress["validation"][:, :check], settings.patience):
            break
        start = check * settings.check_every
        stop = min(start + settings.check_every, settings.num_steps)
        rows, num_rows = next(buffers)
        state, params, average, losses = run_steps(
            d, settings, mesh, state, average, rows, num_rows, batch_keys, start, stop
        )
        losses = np.asarray(devices.fetch(losses, mesh))[:, : stop - start]
        _check_finite(losses, start)
        progress["losses"][:, start:stop] = losses
        if validation is None:
            progress["best"] = devices.fetch(params, mesh)
        else:
            checked = devices.fetch(average, mesh)
            values = devices.from_first_process(partial(_validate, d, checked, validation, validation_key, stop))
            best = np.fmax.reduce(progress["validation"], axis=1, initial=-np.inf)
            progress["validation"][:, check] = values
            progress["best"] = _choose(values > best, checked, progress["best"])
        if checkpoints is not None:
            progress["state"], progress["average"] = devices.fetch((state, average), mesh)
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


def _described(settings: Settings, svi: SVI, state: Any) -> dict[str, Any]:
    """The settings by value; of an optimizer that was given, a digest of what it makes of a gradient and a loss."""
    described = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if settings.optimizer is not None:
        of_one_fit = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.optim_state)
        gradient = jax.eval_shape(svi.optim.get_params, of_one_fit)
        loss = jax.ShapeDtypeStruct((), jnp.result_type(float))
        described["optimizer"] = program_digest(svi.optim.update, gradient, of_one_fit, loss)
    return described


def _buffers(
    x: Data | Stream, settings: Settings, first_check: int, mesh: Mesh | None
) -> Iterator[tuple[jax.Array, int]]:
    """The rows that each stretch of steps draws from, on the mesh, and how many of them are data."""
    if isinstance(x, Stream):
        wanted = settings.batch_size * settings.check_every
        for rows in x.buffers(wanted, first_check):
            yield devices.place_rows(rows, mesh, x.buffer_rows(wanted)), len(rows)
    else:
        whole = devices.place_rows(np.asarray(x), mesh, len(x))
        while True:
            yield whole, len(x)


def _validate(d: Diffusion, params: Params, validation: Data, rng_key: Key, step: int) -> Float[np.ndarray, " C"]:
    """The ELBO of each fit, nats per datum."""
    C = len(jax.tree.leaves(params)[0])
    fits = [one_fit(params, c) for c in range(C)]
    bounds = [elbo(d, of_fit, validation, rng_key=rng_key, num_draws=2) for of_fit in fits]
    mean = np.array([bound.mean for bound in bounds])
    if not np.all(np.isfinite(mean)):
        raise FloatingPointError(f"the validation ELBO is {mean} at step {step}; look for outliers in validation")
    return mean


def _choose(better: np.ndarray, new: Params, old: Params) -> Params:
    """The new params of the fits that are better, the old ones of the rest."""
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
