"""Stochastic variational inference of fits side by side: `SVI.init` and `SVI.update` in one compiled loop.

Progress, early stopping on validation data, checkpoints and resume.
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from probdiff.chains import Diffusion
from probdiff.fitting import devices
from probdiff.fitting.checkpoints import Checkpoints, configuration, program_digest
from probdiff.fitting.settings import Settings
from probdiff.fitting.streams import Stream
from probdiff.fitting.times import time_probs
from probdiff.likelihood.elbo import elbo, of_mixtures
from probdiff.locks import one_at_a_time
from probdiff.networks.gaussian_start import frozen, with_start
from probdiff.progress import progress as progress_of
from probdiff.sampling import one_fit
from probdiff.schedules import Schedule
from probdiff.types import Data, Key, Params
from probdiff.units import Units

_RISING = 0.05  # of the steps of a fit of mixtures, as is
_HELD = 0.2
_AVERAGING = 0.01  # weight of the newest params in their moving average


@dataclass(frozen=True)
class Trained:
    """Constrained params with a leading axis of C fits; losses (C, steps) and validation ELBO (C, checks) in nats.

    `steps` (C,): after how many steps the params were those that are kept; 0 where the network does not pay.
    """

    params: Params
    losses: np.ndarray
    validation: np.ndarray
    steps: np.ndarray


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
        _with_frozen(_adam(d, settings) if settings.optimizer is None else settings.optimizer),
        loss,
    )


def _with_frozen(optimizer: Any) -> Any:
    """The optimiser, which leaves what is `frozen` where it is."""
    zero = optax.masked(optax.set_to_zero(), frozen)
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.chain(zero, optimizer, zero)  # before a norm is clipped, and after weights decay
    kept = copy(optimizer)
    kept.update = lambda g, state, value=None: optimizer.update(zero.update(g, zero.init(g))[0], state, value=value)
    return kept


def _adam(d: Diffusion, settings: Settings) -> optax.GradientTransformation:
    """Adam on a clipped gradient, its learning rate falling along a cosine, larger for the schedule's params.

    For mixtures of Gaussians it rises over the first twentieth of the steps, and the schedule is held over the first
    fifth. As long as the kernels are no mixtures worth the name, K is larger for a smaller β_1, and short chains lost a
    step: β_1 went to 0, where there is no gradient to bring it back.
    """
    assert settings.learning_rate is not None
    assert settings.schedule_learning_rate is not None
    assert settings.gradient_clip is not None
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps)
    faster = optax.scale(settings.schedule_learning_rate / settings.learning_rate)
    if of_mixtures(d):
        held, rises = (math.ceil(share * settings.num_steps) for share in (_HELD, _RISING))
        times = settings.schedule_learning_rate / settings.learning_rate
        faster = optax.scale_by_schedule(optax.linear_schedule(0.0, times, 2 * rises, held))
        rate = optax.warmup_cosine_decay_schedule(
            settings.learning_rate / (rises + 1), settings.learning_rate, rises, max(settings.num_steps, rises + 1)
        )
    clip = optax.clip_by_global_norm(settings.gradient_clip)
    if d.family.support.is_discrete:  # the score function is large at rare draws, and small without them
        clip = optax.masked(clip, partial(_mask, network=True))
    return optax.chain(clip, optax.adam(rate), optax.masked(faster, partial(_mask, network=False)))


def _mask(params: Params, network: bool) -> dict[str, bool]:
    """Which params are the network's, or else the schedule's."""
    return {name: (name == "network$params") is network for name in params}


def _has_params(schedule: Schedule) -> bool:
    return any(site["type"] == "param" for site in handlers.trace(schedule).get_trace().values())


@one_at_a_time
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})  # it runs once
def start_state(
    d: Diffusion, settings: Settings, rng_keys: Key, init: Params | None = None, gaussian: Any = None
) -> tuple[Any, Params]:
    """The state of SVI before the first step, with a leading axis of C fits, and its params: those of `init` if any.

    `gaussian`, its variances and the bounds, is put around the network's params.
    """
    svi, x = make_svi(d, settings), jnp.zeros((settings.batch_size, *d.event_shape))
    if gaussian is not None:
        params = jax.vmap(d.initial_params)(rng_keys) if init is None else init
        # the same for all fits, or one for each
        init = with_start(params, *(jnp.broadcast_to(leaf, (settings.num_chains, *d.event_shape)) for leaf in gaussian))
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
    smoothing: Any = None,
) -> tuple[Any, Params, Params | None, Any]:
    """Steps `start` to `stop` of SVI, on batches drawn from the first `num_rows` rows of x, which each fit may have of
    its own.

    It gives the state, its params, their moving average where one is given, and the losses (C, check_every). It is
    compiled once for a diffusion and its settings.
    """
    svi = make_svi(d, settings)
    of_batch = jax.ShapeDtypeStruct((settings.batch_size, *d.event_shape), x.dtype)
    jax.eval_shape(svi.init, batch_keys[0], of_batch)  # from which SVI learns how params are constrained

    of_each_fit = x.ndim > 1 + len(d.event_shape)  # rows of its own

    def advance(one: tuple[Any, ...], shared: tuple[Any, ...]) -> tuple[Any, Params, Params | None, Any]:
        x_of_all, num_rows, start, stop, smoothing = shared
        state, average, batch_key, x = one if of_each_fit else (*one, x_of_all)
        options = {}
        if settings.objective == "at_time" and settings.times == "weighted":
            key_probs = jax.random.fold_in(jax.random.fold_in(batch_key, start), settings.batch_size)
            options["time_probs"] = time_probs(d, svi.get_params(state), x, num_rows, key_probs)

        def step(i: Any, carry: Any) -> Any:
            state, average, losses = carry
            rows = jax.random.randint(jax.random.fold_in(batch_key, i), (settings.batch_size,), 0, num_rows)
            batch = x[rows]
            if smoothing is not None:
                noise_key = jax.random.fold_in(jax.random.fold_in(batch_key, i), settings.batch_size)
                batch = _smoothed(batch, svi.get_params(state), smoothing, noise_key)
            state, loss = svi.update(state, devices.constrain(batch, mesh, "data"), **options)
            state = devices.constrain(state, mesh)
            if average is not None:
                weight = jnp.maximum(_AVERAGING, 1 / (1 + i))  # a plain mean until there is enough to average
                average = optax.incremental_update(svi.get_params(state), average, weight)
            return state, average, losses.at[i - start].set(loss)

        losses = jnp.zeros(settings.check_every)
        state, average, losses = jax.lax.fori_loop(start, stop, step, (state, average, losses))
        return state, svi.get_params(state), average, losses

    fits = (state, average, batch_keys, *([x] if of_each_fit else []))
    return devices.each_fit(advance, mesh)(fits, (None if of_each_fit else x, num_rows, start, stop, smoothing))


def _smoothed(x: Data, params: Params, smoothing: jax.Array, rng_key: Key) -> Data:
    """√(1−h²)·x_0 + h·ε, ε from the Gaussian of the start: with the covariance of x_0."""
    std = jnp.exp(params["network$params"].log_variance / 2)
    return jnp.sqrt(1 - smoothing**2) * x + smoothing * std * jax.random.normal(rng_key, x.shape, x.dtype)


def train(
    d: Diffusion,
    x: Data | Stream,
    settings: Settings,
    *,
    rng_key: Key,
    units: Sequence[Any] = (0.0, 1.0),
    init: Params | None = None,
    gaussian: tuple[Any, Any, Any] | None = None,
    validation: Data | None = None,
    smoothing: float | None = None,
    keep_at: int | None = None,
    pays: bool = True,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress_bar: bool = True,
    mesh: Mesh | None = None,
) -> Trained:
    """Makes C fits side by side to x (N, *event_shape), in the chain's own units, by minimising the negative of N17.

    `units`, loc, scale and axes of `Units`, tell data apart that are the same but for their units.
    The rows of each batch are drawn on the device, with replacement; those of a `Stream` from one buffer after the
    other, a new one after every check. With `validation` data, what is checked is a moving average of the params over
    the last hundred steps or so, and each fit keeps that of its best check. With `checkpoint_dir`, `resume=True` goes
    on from the newest whole checkpoint and ends with the same bits as a run that never stopped, on the same devices. It
    may have more steps than the run had: then it goes on from the last whole stretch of `check_every` steps, with the
    learning rate of the new number of steps, which is larger there than it was at the end of the old one.
    `init` are params to start from, with a leading axis of C fits. `gaussian`, (log Λ, low, high), each
    (*event_shape), is the `GaussianStart` around the network's params, which no step changes.
    With validation data and a `gaussian`, a fit whose best check is not better than the Gaussian alone, by more than
    one standard error of the paired difference, is that Gaussian, with the β_t of its best check.
    With a `smoothing` h the steps are taken on rows √(1−h²)·x_0 + h·ε, ε from the Gaussian, drawn anew for each batch:
    a smoothed bootstrap, whose covariance is that of the rows.
    `keep_at` is after how many steps to keep the moving average, and to stop, in place of validation; of a network that
    does not pay only the β_t are kept.
    Among several devices fits and batches are shared out as `devices.choose_mesh` says.
    Raises `FloatingPointError` where the loss stops being finite; `FileExistsError` where `checkpoint_dir` holds
    a run and `resume` is false; `ValueError` where it holds a run of another configuration, and where several processes
    are given different arguments. What the first of several processes raises in a check or a checkpoint, all raise.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume wants the folder of the run to go on with; pass checkpoint_dir=")
    mesh = devices.choose_mesh(mesh, settings.num_chains, settings.batch_size)
    log_det = Units(*units).log_det  # what is shown of losses is in the data's units
    svi = make_svi(d, settings)  # which refuses what cannot be fitted, before anything is compiled
    init_key, batch_key, validation_key = jax.random.split(rng_key, 3)
    batch_keys = jax.random.split(batch_key, settings.num_chains)
    state, first = start_state(d, settings, jax.random.split(init_key, settings.num_chains), init, gaussian)
    num_steps = settings.num_steps if keep_at is None else keep_at
    num_checks = math.ceil(num_steps / settings.check_every)
    averaged = validation is not None or keep_at is not None
    progress = {
        "state": state,
        "average": first if averaged else None,
        "best": first,
        "losses": np.full((settings.num_chains, num_steps), np.nan, jnp.result_type(float)),
        "validation": np.full((settings.num_chains, num_checks), np.nan),
    }
    first_check, checkpoints = 0, None
    if checkpoint_dir is not None or jax.process_count() > 1:
        begins = None if gaussian is None else "Gaussian"
        described = _described(settings, svi, state) | {"smoothing": smoothing, "keep_at": keep_at, "pays": pays}
        arguments = configuration(described, d, x, units, validation, rng_key, state, begins)
        layout = None if mesh is None else mesh.shape
        devices.check_same(arguments | {"checkpoint_dir": checkpoint_dir is None, "mesh": layout})
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(Path(checkpoint_dir), arguments, resume)
        first_check, progress = checkpoints.restore(progress)
    bar = progress_of(
        total=num_steps,
        initial=min(first_check * settings.check_every, num_steps),
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
        stop = min(start + settings.check_every, num_steps)
        rows, num_rows = next(buffers)
        state, params, average, losses = run_steps(
            d, settings, mesh, state, average, rows, num_rows, batch_keys, start, stop, smoothing
        )
        losses = np.asarray(devices.fetch(losses, mesh))[:, : stop - start]
        _check_finite(losses, start)
        progress["losses"][:, start:stop] = losses
        if validation is None:
            progress["best"] = devices.fetch(params if average is None else average, mesh)
        else:
            checked = devices.fetch(average, mesh)
            values = devices.from_first_process(partial(validate, d, checked, validation, validation_key, stop)).mean(1)
            best = np.fmax.reduce(progress["validation"], axis=1, initial=-np.inf)
            progress["validation"][:, check] = values
            progress["best"] = _choose(values > best, checked, progress["best"])
        if checkpoints is not None:
            progress["state"], progress["average"] = devices.fetch((state, average), mesh)
            checkpoints.save(check + 1, progress)
        bar.set_postfix_str(f"loss {losses.mean() + log_det:.4f} nats per datum", refresh=False)
        bar.update(stop - start)
    bar.close()
    if checkpoints is not None:
        checkpoints.close()
    steps_taken = int(np.isfinite(progress["losses"][0]).sum())
    checks_made = math.ceil(steps_taken / settings.check_every)
    best, checks = progress["best"], progress["validation"][:, :checks_made]
    if validation is None:
        if not pays:
            best = best | {"network$params": first["network$params"]}
        steps = np.full(settings.num_chains, steps_taken * pays)
        return Trained(best, progress["losses"][:, :steps_taken], checks[:, :0], steps)
    steps = np.minimum((checks.argmax(1) + 1) * settings.check_every, steps_taken)
    if gaussian is not None:
        start = best | {"network$params": first["network$params"]}
        better = devices.from_first_process(lambda: _pays(d, best, start, validation, validation_key))
        best, steps = _choose(better, best, start), np.where(better, steps, 0)
    return Trained(best, progress["losses"][:, :steps_taken], checks, steps)


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


def validate(
    d: Diffusion, params: Params, validation: Data | Sequence[Data], rng_key: Key, step: int
) -> Float[np.ndarray, "C M"]:
    """The ELBO of each datum under each fit, nats; of several arrays each fit has data of its own."""
    C = len(jax.tree.leaves(params)[0])
    data = [validation] * C if isinstance(validation, np.ndarray | jax.Array) else validation
    bounds = [elbo(d, one_fit(params, c), data[c], rng_key=rng_key, num_draws=2) for c in range(C)]
    values = np.stack([bound.values for bound in bounds])
    if not np.all(np.isfinite(values)):
        raise FloatingPointError(
            f"the validation ELBO is {values.mean(1)} at step {step}; look for outliers in validation"
        )
    return values


def _pays(d: Diffusion, params: Params, start: Params, validation: Data, rng_key: Key) -> np.ndarray:
    """Whether each fit is better than its start on the validation data by more than one standard error, (C,)."""
    difference = validate(d, params, validation, rng_key, 0) - validate(d, start, validation, rng_key, 0)
    rows = difference.shape[1]
    return difference.mean(1) > (difference.std(1, ddof=1) / math.sqrt(rows) if rows > 1 else 0.0)


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
