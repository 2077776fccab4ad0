"""`fit(...)`: data in their own units to a `Fit`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from probdiff.chains import Diffusion
from probdiff.checks import check_key, described, feature_names
from probdiff.datasets.named import split
from probdiff.fitting import devices
from probdiff.fitting.checkpoints import refuse_to_overwrite, starts_at_noise
from probdiff.fitting.folds import FOLDS, Chosen, chosen_before, cross_validate, keep
from probdiff.fitting.loop import train
from probdiff.fitting.matching import match, match_unless_worse
from probdiff.fitting.settings import Objective, Settings, Times
from probdiff.fitting.streams import Stream
from probdiff.networks.gaussian_start import of_network, widened
from probdiff.results import Fit
from probdiff.sampling import in_precision, one_fit
from probdiff.types import Key, Params
from probdiff.units import (
    Units,
    chain_units,
    principal_axes,
    to_chain,
    warn_of_levels,
    warn_of_outliers,
    warn_of_precision,
)

_ROWS_PER_FEATURE = 100  # fewer are few
_MANY = 10_000  # rows, from where none is held out
_HELD_OUT = 0.15
_OF_FEW = {"learning_rate": 1e-3, "schedule_learning_rate": 2e-2}
_SMOOTHINGS = (0.0, 0.5)
_PATIENCE_OF_FOLDS = 10
_LEAST_STEPS = 1000  # of β_t, where the network does not pay


def fit(
    d: Diffusion,
    x: ArrayLike | Stream,
    *,
    rng_key: Key,
    num_steps: int = 20_000,
    batch_size: int | None = None,
    num_chains: int = 1,
    objective: Objective = "at_time",
    times: Times = "weighted",
    learning_rate: float | None = None,
    gradient_clip: float | None = None,
    optimizer: Any = None,
    check_every: int | None = None,
    validation: ArrayLike | float | None = None,
    patience: int | None = None,
    dropout: bool | None = None,
    smoothing: float | None = None,
    init: Fit | None = None,
    whole: Sequence[str | int] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress_bar: bool = True,
    mesh: Mesh | None = None,
) -> "Fit":
    """Fits β_t and the reverse kernels to data by SVI, maximising the ELBO of N17.

    x (N, *event_shape), in the data's own units; of a data frame (N, D) the fit keeps the names. For a Gaussian
    chain x is floating-point, and the chain runs on x less its mean and over its standard deviation, each feature
    apart, or robust `chain_units` where values lie far out. A `streams.stream` of a file stands for rows that do not
    fit in memory; its units are always the former, and its values are not looked at. For a binomial chain x is bits,
    0 or 1 of any dtype, which stay as they are. `batch_size` is 512, and at most the rows that are fitted.
    `num_chains` independent fits run side by side. Among several devices, those of `mesh` or else all, fits and
    batches are shared out over the mesh's axes "chain" and "data"; see `devices.choose_mesh`. Several processes
    must be given the same arguments, all of x too. `validation` is data (M, *event_shape) on which the best params
    are chosen, or the share of x to hold out for that, 0 for none. The gradient is clipped to a norm of
    `gradient_clip`, 1, and Adam's steps fall from `learning_rate`, 2e-3, to zero; `optimizer`, such as
    `optax.adamw(1e-3)` or an optimiser of NumPyro, takes the place of both.

    `init` is a fit of the same diffusion to start from, of one chain or of `num_chains`, whose units are kept, so that
    the start is that fit itself: to go on for longer, with other options, or on other data.

    `whole` names or counts the features that were integers before they were dequantised: draws are rounded down to
    integers again.

    The start of a Gaussian chain is the reversal of N(m, S), S the covariance of x shrunk as Ledoit and Wolf do, values
    further out than 8 of the chain's units being cut, and of a stream the variances alone; see `GaussianStart`, which
    also bounds what is predicted. The chain's axes are those on which S is diagonal, for vectors of up to 128 features.
    With validation data, a fit that is not better than that Gaussian by more than one standard error of the paired
    difference stays the Gaussian.

    A network overfits few data. So where N is less than 100 times the number of features, the defaults are to draw the
    network's `dropout`, a `learning_rate` of 1e-3, and cross-validation: each fifth of the rows is held out in turn,
    until its ELBO has not risen by 0.01 nats for a `patience` of 10 checks, with a `smoothing` of 0 and of 0.5. Then
    all rows are fitted for as many steps as were best, with the smoothing that was. A smoothing of h fits
    √(1−h²)·x + h·ε, ε from N(m, S), drawn anew for each batch. Fewer than 10,000 rows that are no longer few are not
    cross-validated: a share of 0.15 is held out, with a `patience` of 20; so it is of few bits. Of 10,000 rows or more,
    of fewer than 10 and of a stream none are held out. Where rows were held out by default, units are set so that draws
    of each feature, or else on each axis, have the mean and the standard deviation of the rows, unless rows that were
    held out are less likely so, by two standard errors or 0.25 nats; `losses` and `validation` are in the units before.
    `check_every` is 100 steps with rows held out and 500 without. See `Settings` for the rest and `train` for
    checkpoints.
    Warns of features with outlying values or heavy tails, and of those too far from zero for single precision.
    Raises `ValueError` or `TypeError` for data or options that do not fit, saying which and what is wanted.
    """
    if not isinstance(d, Diffusion):
        raise TypeError(f"d is {d!r}; it must be a diffusion, such as probdiff.GaussianDiffusion(...)")
    if not isinstance(init, Fit | None):
        raise TypeError(f"init is {init!r}; it must be a fit, or None")
    if isinstance(x, Stream):
        if x.shape[1:] != d.event_shape:
            raise ValueError(f"x is a stream of shape {x.shape}; this diffusion has event_shape {d.event_shape}")
        if d.family.support.is_discrete:
            raise TypeError(f"x is a stream, of floating-point numbers; {described(d.family.support)}")
        features = x.columns
    else:
        features = feature_names(x, "x") if init is None or init.features is None else init.features
        x = d.checked(x, "x", minimum=2, features=features)
    is_whole = _is_whole(whole, d, features) if init is None or whole is not None else init.whole
    num_rows = x.shape[0]
    if batch_size is not None and batch_size > num_rows:
        raise ValueError(f"batch_size is {batch_size}; x has {num_rows} rows")
    few = is_few(num_rows, math.prod(d.event_shape))
    rng_key = check_key(rng_key)
    at_noise = resume and checkpoint_dir is not None and starts_at_noise(Path(checkpoint_dir))
    units, gaussian = _units_and_gaussian(d, x, init, features, at_noise)
    gently = few and gaussian is not None and not isinstance(x, Stream)
    folded = gently and validation is None and num_rows >= 2 * FOLDS
    not_many = held_out_by_default(
        num_rows, math.prod(d.event_shape), bits_or_old=d.family.support.is_discrete or at_noise
    )
    by_default = not_many and validation is None and not folded and not isinstance(x, Stream)
    if by_default := by_default and round(_HELD_OUT * num_rows) >= 2:
        validation = _HELD_OUT
    data: np.ndarray | Stream
    if isinstance(x, Stream):
        data, held_out = x.standardised(units), _held_out_of_stream(d, x, validation, features)
    else:
        z = to_chain(d, x, units)
        data, held_out = _hold_out(d, z, validation, rng_key, features)
    if held_out is not None and validation is not None and np.ndim(validation):
        held_out = to_chain(d, held_out, units, "validation")
    if patience is None and (few or by_default):
        patience = _PATIENCE_OF_FOLDS if folded else 20 if held_out is not None else None
    if patience is not None and held_out is None and not folded:
        raise ValueError("patience wants validation data to watch; pass validation=")
    if smoothing is not None and (isinstance(smoothing, bool) or not 0 <= smoothing < 1):
        raise ValueError(f"smoothing is {smoothing!r}; it must be at least 0 and less than 1")
    if smoothing and gaussian is None:
        raise ValueError("smoothing is of Gaussian chains that start anew: not of bits, nor with init")
    slow = gently and optimizer is None and learning_rate is None
    settings = Settings(
        num_steps=num_steps,
        batch_size=min(512 if batch_size is None else batch_size, data.shape[0]),
        num_chains=num_chains,
        objective=objective,
        times=times,
        **(_OF_FEW if slow else {"learning_rate": learning_rate}),
        gradient_clip=gradient_clip,
        optimizer=optimizer,
        check_every=check_every if check_every is not None else 100 if folded or held_out is not None else 500,
        patience=patience,
        dropout=few if dropout is None else dropout,
    )
    chosen = None
    if folded:
        refuse_to_overwrite(checkpoint_dir, resume)
        tried = _SMOOTHINGS if smoothing is None else (smoothing,)
        z_0 = (x - units.loc) / units.scale

        def choose() -> Chosen:
            if resume and (before := chosen_before(checkpoint_dir)) is not None:
                return before
            now = cross_validate(d, z_0, settings, tried, rng_key=rng_key, progress_bar=progress_bar)
            return keep(now, checkpoint_dir)

        chosen = devices.from_first_process(choose)
    run = partial(
        train,
        d,
        rng_key=rng_key,
        units=[leaf for leaf in units if leaf is not None],
        init=None if init is None else _start_of(init, d, num_chains, None if isinstance(x, Stream) else z),
        gaussian=gaussian,
        resume=resume,
        progress_bar=progress_bar,
        checkpoint_dir=checkpoint_dir,
        mesh=mesh,
    )
    if chosen is None:
        trained = run(data, settings, validation=held_out, smoothing=smoothing or None)
        curve = trained.validation
    else:
        steps = chosen.steps if chosen.pays else min(num_steps, max(chosen.steps, _LEAST_STEPS))
        settings = replace(settings, patience=None)
        trained = run(z, settings, smoothing=chosen.smoothing, keep_at=steps, pays=chosen.pays)
        curve = np.tile(chosen.curve, (num_chains, 1))
    found = Fit(
        d,
        trained.params,
        trained.losses + units.log_det,
        curve - units.log_det,
        units.loc,
        units.scale,
        features,
        is_whole,
        units.axes,
        trained.steps,
    )
    key_draws = jax.random.fold_in(rng_key, 2)
    if isinstance(x, Stream):
        return found
    if chosen is not None and chosen.matched:
        return match(found, x, chosen.matched, key_draws)
    if by_default and gaussian is not None and held_out is not None:
        return match_unless_worse(found, units.to_data(data), units.to_data(held_out), key_draws)
    return found


def is_few(num_rows: int, num_features: int) -> bool:
    """Whether rows are so few that a network overfits them soon."""
    return num_rows < _ROWS_PER_FEATURE * num_features


def held_out_by_default(num_rows: int, num_features: int, bits_or_old: bool) -> bool:
    """Whether a fit to so many rows holds some out by default: of bits, and of runs of earlier versions, to few."""
    return is_few(num_rows, num_features) or (num_rows < _MANY and not bits_or_old)


def _units_and_gaussian(
    d: Diffusion, x: np.ndarray | Stream, init: Fit | None, features: tuple[str, ...] | None, at_noise: bool
) -> tuple[Units, tuple[Any, Any, Any] | None]:
    """The chain's units, and log Λ, low and high of the `GaussianStart`, in them; those of `init` if any.

    None of bits, of a fit that goes on from `init`, and where the fit is to start `at_noise`, as earlier versions did.
    Of a stream the features count as independent.
    """
    if init is not None:
        if not isinstance(x, Stream) and not d.family.support.is_discrete:
            warn_of_outliers(x, features)
        warn_of_precision(init.loc, init.scale, features)
        return init.units, None
    if isinstance(x, Stream):
        loc, scale, low, high = x.moments()
        warn_of_precision(loc, scale, features)
        units, variance, ends = Units(loc, scale), np.ones(d.event_shape), np.stack([low, high])
    else:
        units = Units(*chain_units(d, x, features))
        if not d.family.support.is_discrete:
            warn_of_levels(x, features)
        if d.family.support.is_discrete or at_noise:
            return units, None
        axes, variance = principal_axes(units.to_chain(x))
        units, ends = units._replace(axes=axes), x
    z = units.to_chain(ends)
    return units, None if at_noise else (np.log(variance), z.min(0), z.max(0))


def _is_whole(
    whole: Sequence[str | int] | None, d: Diffusion, features: tuple[str, ...] | None
) -> tuple[bool, ...] | None:
    """Which features, flattened, are among those named or counted."""
    if whole is None:
        return None
    names = features or ()
    places = [names.index(one) if one in names else one for one in whole]
    size = math.prod(d.event_shape)
    if wrong := [one for one in places if isinstance(one, bool | str) or one not in range(size)]:
        raise ValueError(f"whole has {wrong[0]!r}; it must hold names of features, or numbers from 0 to {size - 1}")
    return tuple(i in places for i in range(size))


def _start_of(init: Fit, d: Diffusion, num_chains: int, z: np.ndarray | None) -> Params:
    """The params of a fit, with a leading axis of `num_chains`, their bounds as wide as the data z ask for.

    Raises `ValueError` where d has others.
    """
    if init.num_chains not in (1, num_chains):
        raise ValueError(f"init has {init.num_chains} chains; num_chains is {num_chains}: choose one by init.chain(c)")
    mine = jax.eval_shape(d.initial_params, jax.random.key(0))
    if init.diffusion.family != d.family or _layout(of_network(one_fit(init.stacked_params, 0))) != _layout(mine):
        raise ValueError("init is a fit of another diffusion: its family, or the names or shapes of its params, differ")
    copies = num_chains // init.num_chains
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), in_precision(init.stacked_params))
    return params if z is None else widened(params, z.min(0), z.max(0))


def _layout(params: Params) -> list[tuple[str, tuple[int, ...]]]:
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _held_out_of_stream(
    d: Diffusion, x: Stream, validation: ArrayLike | float | None, features: tuple[str, ...] | None
) -> np.ndarray | None:
    if validation is None or (not np.ndim(validation) and _share(validation) == 0):
        return None
    if not np.ndim(validation):
        raise ValueError(f"validation is {validation}; of a stream no share is held out: give rows of data")
    return d.checked(validation, "validation", features=features)


def _hold_out(
    d: Diffusion,
    data: np.ndarray,
    validation: ArrayLike | float | None,
    rng_key: Key,
    features: tuple[str, ...] | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows to fit and those held out, if any: `validation` as it is given, or a share of the data at random."""
    if validation is None:
        return data, None
    if np.ndim(validation):
        return data, d.checked(validation, "validation", features=features)
    share = _share(validation)
    if share == 0:
        return data, None
    parts = split(data, (), jax.random.fold_in(rng_key, 1), share)
    return parts.train, parts.test


def _share(validation: Any) -> float:
    number = np.asarray(validation)
    if number.dtype.kind not in "iuf" or not 0 <= number < 1:
        raise ValueError(f"validation is {validation!r}; it must be data, or a share of x from 0 to less than 1")
    return float(number)
