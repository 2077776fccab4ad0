"""How few rows are to be fitted, by cross-validation: rows that are held out in turn, and then fitted too."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from probdiff.chains import Diffusion
from probdiff.files import atomic_write, make_folder
from probdiff.fitting.checkpoints import CONFIGURATION
from probdiff.fitting.loop import run_steps, start_state, validate
from probdiff.fitting.matching import Along, choices, no_worse, stretched
from probdiff.fitting.settings import Settings
from probdiff.progress import progress
from probdiff.sampling import one_fit, reverse_draws
from probdiff.types import Data, Key, Params
from probdiff.units import Units, principal_axes

FOLDS = 5
_FILE = "cross_validation.json"
_PROGRESS = 0.01  # nats per datum, below which a check counts as no better
_DRAWS = 4096  # of each fold


@dataclass(frozen=True)
class Chosen:
    """What was best for rows that were held out in turn.

    `steps` and `smoothing` of the fit; `pays`: whether its network is better than the Gaussian alone, by more than one
    standard error of the paired difference; `matched`: along what units are `stretched`, if at all; `curve`: the ELBO
    at each check, nats per datum.
    """

    steps: int
    smoothing: float
    pays: bool
    matched: Along | None
    curve: np.ndarray


@dataclass(frozen=True)
class _Best:
    """The best check of one smoothing, the ELBO of each row then, (C, M), and the params."""

    mean: float
    steps: int
    K: Float[np.ndarray, "C M"]
    params: Params


@dataclass(frozen=True)
class _Folds:
    """The rows that each fold fits and holds out, in the units of the fold, and its Gaussian."""

    units: list[Units]
    fitted: Float[np.ndarray, "C N *event"]
    held_out: list[np.ndarray]
    gaussian: list[np.ndarray]

    @classmethod
    def of(cls, z: Data) -> "_Folds":
        size, units, fitted, held_out, gaussians = len(z) // FOLDS, [], [], [], []
        for c in range(FOLDS):
            test, train = z[c * size : (c + 1) * size], np.concatenate([z[: c * size], z[(c + 1) * size :]])
            axes, variance = principal_axes(train)
            units.append(Units(np.zeros(z.shape[1:]), np.ones(z.shape[1:]), axes))
            fitted.append(units[c].to_chain(train).astype(z.dtype))
            held_out.append(units[c].to_chain(test).astype(z.dtype))
            gaussians.append((np.log(variance), fitted[c].min(0), fitted[c].max(0)))
        gaussian = [np.stack(leaves).astype(z.dtype) for leaves in zip(*gaussians, strict=True)]
        return cls(units, np.stack(fitted), held_out, gaussian)


def cross_validate(
    d: Diffusion, z: Data, settings: Settings, smoothings: Sequence[float], *, rng_key: Key, progress_bar: bool
) -> Chosen:
    """Fits each fold's other rows of z (N, *event_shape), standardised, with each smoothing.

    Every fold has a Gaussian start of its own. All stop when the mean over folds has not risen by 0.01 nats for
    `settings.patience` checks.
    """
    key_folds, key_init, key_batch, key_elbo, key_draws = jax.random.split(rng_key, 5)
    folds = _Folds.of(np.asarray(z, jnp.result_type(float))[np.asarray(jax.random.permutation(key_folds, len(z)))])
    num_rows = folds.fitted.shape[1]
    settings = replace(settings, num_chains=FOLDS, batch_size=min(settings.batch_size, num_rows))
    state, first = start_state(d, settings, jax.random.split(key_init, FOLDS), None, folds.gaussian)
    x, batch_keys = jnp.asarray(folds.fitted), jax.random.split(key_batch, FOLDS)
    bar = progress(
        total=len(smoothings) * settings.num_steps,
        show=progress_bar,
        unit="step",
        desc="cross-validation, at most",
        leave=False,
    )
    found = []
    for smoothing in smoothings:
        now, average, curve, best = state, first, [], _Best(-math.inf, 0, np.zeros(0), first)
        for start in range(0, settings.num_steps, settings.check_every):
            stop = min(start + settings.check_every, settings.num_steps)
            now, _, average, _ = run_steps(
                d, settings, None, now, average, x, num_rows, batch_keys, start, stop, smoothing
            )
            K = validate(d, average, folds.held_out, key_elbo, stop)
            curve.append(float(K.mean()))
            bar.update(stop - start)
            if curve[-1] > best.mean + _PROGRESS:
                best = _Best(curve[-1], stop, K, average)
            elif stop - best.steps >= (settings.patience or math.inf) * settings.check_every:
                break
        bar.total -= settings.num_steps - stop
        found.append((best, smoothing, curve))
    bar.close()
    best, smoothing, curve = max(found, key=lambda one: one[0].mean)
    alone = best.params | {"network$params": first["network$params"]}
    gain = best.K - validate(d, alone, folds.held_out, key_elbo, 0)
    pays = bool(gain.mean() > gain.std(ddof=1) / math.sqrt(gain.size))
    draws = [
        units.to_data(reverse_draws(d, one_fit(best.params, c), key, _DRAWS, [0])[:, 0])
        for c, (units, key) in enumerate(zip(folds.units, jax.random.split(key_draws, FOLDS), strict=True))
    ]
    matched = (
        along
        for along in choices(folds.units[0])
        if no_worse((best.K - _K_of_matched(d, best.params, folds, draws, along, key_elbo)).ravel())
    )
    return Chosen(best.steps, smoothing, pays, next(matched, None), np.array(curve))


def chosen_before(folder: str | Path | None) -> Chosen | None:
    """What `keep` wrote in the folder of a run that has begun to fit all rows, and so tells its data from others."""
    if folder is None or not all((Path(folder) / name).exists() for name in (_FILE, CONFIGURATION)):
        return None
    held = json.loads((Path(folder) / _FILE).read_text())
    matched = {True: "features", False: None}.get(held["matched"], held["matched"])  # which was a bool once
    return Chosen(**held | {"curve": np.array(held["curve"]), "matched": matched})


def keep(chosen: Chosen, folder: str | Path | None) -> Chosen:
    """Writes it to the folder of a run, if there is one."""
    if folder is not None:
        make_folder(Path(folder))
        with atomic_write(Path(folder) / _FILE) as file:
            file.write_text(json.dumps(asdict(chosen) | {"curve": chosen.curve.tolist()}))
    return chosen


def _K_of_matched(
    d: Diffusion, params: Params, folds: _Folds, draws: list[np.ndarray], along: Along, key_elbo: Key
) -> np.ndarray:
    """The ELBO of each held-out row, (C, M), where the units of each fold are `stretched`."""
    moved, log_det = [], []
    for units, fitted, held_out, drawn in zip(folds.units, folds.fitted, folds.held_out, draws, strict=True):
        new = stretched(units, units.to_data(fitted), drawn, along)
        moved.append(new.to_chain(units.to_data(held_out)).astype(held_out.dtype))
        log_det.append(new.log_det - units.log_det)
    return validate(d, params, moved, key_elbo, 0) - np.array(log_det)[:, None]
