"""`fit(...)`: data in their own units to a `Fit`."""

import math
from collections.abc import Sequence
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
from probdiff.fitting.loop import Objective, Settings, Times, train
from probdiff.fitting.streams import Stream
from probdiff.results import Fit
from probdiff.sampling import in_precision, one_fit
from probdiff.types import Key, Params
from probdiff.units import chain_units, to_chain, warn_of_outliers, warn_of_precision

_ROWS_PER_FEATURE = 100  # fewer are few
_HELD_OUT = 0.15


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

    A network overfits few data. So where N is less than 100 times the number of features, the defaults are to draw the
    network's `dropout`, to hold out a share of 0.15 and to stop after a `patience` of 20 checks without progress on it;
    elsewhere none of the three. Below 10 rows, and of a stream, none are held out. `check_every` is 100 steps with
    validation data and 500 without. See `Settings` for the rest and `train` for checkpoints.
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
    few = num_rows < _ROWS_PER_FEATURE * math.prod(d.event_shape)
    rng_key = check_key(rng_key)
    if validation is None and few and not isinstance(x, Stream) and round(_HELD_OUT * num_rows) >= 2:
        validation = _HELD_OUT
    data: np.ndarray | Stream
    if isinstance(x, Stream):
        loc, scale = x.moments() if init is None else (init.loc, init.scale)
        data, held_out = x.standardised(loc, scale), _held_out_of_stream(d, x, validation, features)
    else:
        if init is None:
            loc, scale = chain_units(d, x, features)
        else:
            loc, scale = init.loc, init.scale
            if not d.family.support.is_discrete:
                warn_of_outliers(x, features)
        data, held_out = _hold_out(d, to_chain(d, x, loc, scale), validation, rng_key, features)
    if isinstance(x, Stream) or init is not None:
        warn_of_precision(loc, scale, features)
    if held_out is not None and validation is not None and np.ndim(validation):
        held_out = to_chain(d, held_out, loc, scale, "validation")
    patience = 20 if few and held_out is not None and patience is None else patience
    if patience is not None and held_out is None:
        raise ValueError("patience wants validation data to watch; pass validation=")
    settings = Settings(
        num_steps=num_steps,
        batch_size=min(512 if batch_size is None else batch_size, data.shape[0]),
        num_chains=num_chains,
        objective=objective,
        times=times,
        learning_rate=learning_rate,
        gradient_clip=gradient_clip,
        optimizer=optimizer,
        check_every=check_every if check_every is not None else 500 if held_out is None else 100,
        patience=patience,
        dropout=few if dropout is None else dropout,
    )
    trained = train(
        d,
        data,
        settings,
        rng_key=rng_key,
        units=(loc, scale),
        init=None if init is None else _start_of(init, d, num_chains),
        validation=held_out,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress_bar=progress_bar,
        mesh=mesh,
    )
    log_det = float(np.log(scale).sum())
    return Fit(
        d, trained.params, trained.losses + log_det, trained.validation - log_det, loc, scale, features, is_whole
    )


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


def _start_of(init: Fit, d: Diffusion, num_chains: int) -> Params:
    """The params of a fit, with a leading axis of `num_chains`. Raises `ValueError` where d has others."""
    if init.num_chains not in (1, num_chains):
        raise ValueError(f"init has {init.num_chains} chains; num_chains is {num_chains}: choose one by init.chain(c)")
    mine = jax.eval_shape(d.initial_params, jax.random.key(0))
    if init.diffusion.family != d.family or _layout(one_fit(init.stacked_params, 0)) != _layout(mine):
        raise ValueError("init is a fit of another diffusion: its family, or the names or shapes of its params, differ")
    copies = num_chains // init.num_chains
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), in_precision(init.stacked_params))


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
