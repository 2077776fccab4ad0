"""The reverse chain as a prior p(x_0): posteriors, evidence and conditional densities by weighted particles."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import arviz as az
import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike

from probdiff.blocks import padded_blocks
from probdiff.chains import GaussianDiffusion
from probdiff.checks import check_count, check_key, labels, some, warn
from probdiff.likelihood.result import LogLikelihood, log_mean
from probdiff.posterior.filters import Filtered, filters, spread
from probdiff.posterior.observations import Likelihood, Missing, known_entries, prepare
from probdiff.psis import k_threshold, pareto_k
from probdiff.results import Fit
from probdiff.types import Key

_MOST_NUMBERS = 2**25  # in the largest array of one compiled call
_LEAST_PARTICLES = 10  # effective, at the worst step
_K_DRAWS = 4000  # weights that a k̂ is read from


def sample(
    fit: Fit,
    likelihood: Likelihood,
    *,
    rng_key: Key,
    data: Any = None,
    num_particles: int = 1000,
    num_filters: int = 8,
    features: Sequence[str] | None = None,
    datum: Sequence[Any] | None = None,
) -> xr.DataTree:
    """Draws from p(x_0 given y) ∝ p(x_0)·p(y given x_0), p(x_0) the fitted reverse chain, N12.

    `likelihood` is a `LinearGaussian`, `Missing`, `BlackBox`, or a function log p(y given x_0) of x_0 (*event_shape) in
    the data's own units that JAX can differentiate twice. A function or `BlackBox` is called as f(x_0), or where there
    are `data`, a tree of arrays with a leading axis of N or a data frame, which counts as a dict of its columns, as
    f(x_0, datum). It is compiled once and must depend on its
    arguments alone: what changes from call to call is given as `data`. Where it is NaN the likelihood counts as zero.
    `features` and `datum` are names, for coordinates and for what is said of weights; without them, numbers from 0.
    Draws of features that are whole are rounded down; their known entries are taken as they are given, dequantised.

    Each of `num_filters` filters carries `num_particles` particles down the chain, guided by the observation and
    weighted so that they are exact as their number grows; p(y) is estimated without bias by any number. The tree has

    | group | variable | dims | what |
    |---|---|---|---|
    | posterior | x_0 | chain, draw, datum, feature | equally weighted draws, the data's own units; chain = filter |
    | filters | log_evidence | chain, datum | log p̂(y), nats, of each filter |
    | filters | ess | chain, t, datum | effective particles over particles before resampling, t = T…2 and 0 |
    | evidence | log_evidence, mcse | datum | of the mean over filters, and its standard error |
    | evidence | effective_draws | datum | as the means of the filters vary, for the worst feature |
    | evidence | pareto_k | datum | k̂ of the weights where effective particles were fewest |
    | observed_data | x_0 | datum, feature | of `Missing`, the entries that are known |

    Draws that stand side by side in a filter may be equal: few are best taken far apart, or from different filters.
    The logarithm of an unbiased estimate is low in the mean, by half the square of `mcse` to first order. Warns where
    the weights have collapsed, with ESS and k̂. Raises `ValueError` or `TypeError` for arguments that do not fit, a
    likelihood that is no number, NaN or +∞ at draws from the prior, and one that is zero at every particle.
    Source: Wu et al. 2023 (twisted diffusion sampler); the twists are those of `guidance`.
    """
    d, size = fit.diffusion, fit.loc.size
    features = fit.features if features is None else features
    names = labels(features, size).tolist()
    if len(names) != size or len(set(names)) < size or isinstance(features, str):
        raise ValueError(f"features is {features!r}; the data have {size} features, whose names must differ")
    result, evidence, observed = _run(fit, likelihood, data, rng_key, num_particles, num_filters, datum)
    exact_draws = fit.units.flat.to_data(np.asarray(result.x_0))  # N, M, S, D
    draws = fit.rounded(exact_draws, flat=True)
    if observed is not None:
        draws = np.where(np.isnan(observed)[:, None, None], draws, observed[:, None, None])
    coords = {"feature": names, "t": [*range(d.num_timesteps, 1, -1), 0]}
    coords |= {} if datum is None else {"datum": list(datum)}
    groups = {
        "posterior": az.dict_to_dataset(
            {"x_0": np.moveaxis(draws, 0, 2)}, dims={"x_0": ["datum", "feature"]}, coords=coords
        ),
        "filters": az.dict_to_dataset(
            {"log_evidence": np.asarray(result.log_evidence).T, "ess": np.moveaxis(np.asarray(result.ess), 0, 2)},
            dims={"log_evidence": ["datum"], "ess": ["t", "datum"]},
            coords=coords,
            sample_dims=["chain"],
        ),
        "evidence": az.dict_to_dataset(
            {
                "log_evidence": evidence.values,
                "mcse": evidence.values_mcse,
                "effective_draws": _effective_draws(exact_draws, observed),
                "pareto_k": evidence.pareto_k,
            },
            dims={name: ["datum"] for name in ("log_evidence", "mcse", "effective_draws", "pareto_k")},
            coords=coords,
            sample_dims=[],
        ),
    }
    if observed is not None:
        groups["observed_data"] = az.dict_to_dataset(
            {"x_0": observed}, dims={"x_0": ["datum", "feature"]}, coords=coords, sample_dims=[]
        )
    for group in groups.values():
        group.attrs.pop("sample_dims", None)  # netCDF would give a list of one back as a string
    return xr.DataTree.from_dict({name: xr.DataTree(dataset) for name, dataset in groups.items()})


def log_evidence(
    fit: Fit,
    likelihood: Likelihood,
    *,
    rng_key: Key,
    data: Any = None,
    num_particles: int = 1000,
    num_filters: int = 8,
) -> LogLikelihood:
    """log p(y) = log ∫ p(x_0)·p(y given x_0) dx_0 for each datum, nats; arguments as of `sample`.

    For `Missing` it is the log density of the known entries, in the data's own units. `kind` is "estimate": p̂(y) is
    unbiased, and its logarithm low by half the square of `values_mcse`, to first order.
    """
    return _run(fit, likelihood, data, rng_key, num_particles, num_filters)[1]


def log_conditional(
    fit: Fit,
    x: ArrayLike,
    *,
    of: Sequence[int | str],
    given: Sequence[int | str],
    rng_key: Key,
    num_particles: int = 1000,
    num_filters: int = 8,
) -> LogLikelihood:
    """log p(x_A given x_B) = log p(x_A, x_B) − log p(x_B) for features A = `of` and B = `given` of x (N, D), nats.

    Features are counted from 0 in the flattened x, or named as in the data frame that was fitted; those in neither set
    are integrated out, and may be NaN. In the data's own units.
    Raises `ValueError` where `of` is empty, a feature is in both or not of the data, or NaN where it is wanted, and as
    `sample`.
    """
    A, B = _features(of, "of", fit), _features(given, "given", fit)
    try:
        x = fit.checked(x)
    except ValueError:  # of holes, or of what `known_entries` raises too
        if not isinstance(fit.diffusion, GaussianDiffusion):
            raise
        flat = known_entries(fit, x)
        others = [k for k in range(flat.shape[1]) if k not in A + B]
        flat[:, others] = fit.loc.ravel()[others]
        x = fit.checked(pd.DataFrame(flat, columns=fit.features) if fit.features else flat.reshape(-1, *fit.loc.shape))
    flat = x.reshape(len(x), -1)
    if not A:
        raise ValueError("of has no feature; it must name at least one")
    if set(A) & set(B):
        raise ValueError(f"of and given share the feature(s) {some(sorted(set(A) & set(B)))}")
    parts = []
    for key, known in zip(jax.random.split(check_key(rng_key)), (A + B, B), strict=True):
        masked = np.full(flat.shape, np.nan)
        masked[:, known] = flat[:, known]
        parts.append(
            log_evidence(
                fit, Missing(masked.reshape(x.shape)), rng_key=key, num_particles=num_particles, num_filters=num_filters
            )
            if known
            else LogLikelihood(np.zeros(len(x)), np.zeros(len(x)), "exact")
        )
    both, condition = parts
    k = np.fmax(*(np.full(len(x), np.nan) if part.pareto_k is None else part.pareto_k for part in parts))
    return LogLikelihood(
        both.values - condition.values, np.hypot(both.values_mcse, condition.values_mcse), "estimate", k
    )


def _features(features: Sequence[int | str], name: str, fit: Fit) -> list[int]:
    """The places of features, which are given by place or by name."""
    size, names = fit.loc.size, fit.features or ()
    features = [features] if isinstance(features, str) else features
    array = np.asarray(features)
    if names and array.ndim == 1 and array.dtype.kind in "UO":
        if unknown := [feature for feature in features if isinstance(feature, str) and feature not in names]:
            raise ValueError(f"{name} has {unknown[0]!r}; the features of this fit are {some(names)}")
        array = np.asarray([names.index(feature) if isinstance(feature, str) else feature for feature in features])
    wrong = array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= size))
    if wrong or len(np.unique(array)) < len(array):
        by_name = ", or of names" * bool(names)
        raise ValueError(
            f"{name} is {features!r}; it must be a list of different integers from 0 to {size - 1}{by_name}"
        )
    return [int(f) for f in array]


def _run(
    fit: Fit,
    likelihood: Likelihood,
    data: Any,
    rng_key: Key,
    num_particles: int,
    num_filters: int,
    datum: Sequence[Any] | None = None,
) -> tuple[Filtered, LogLikelihood, np.ndarray | None]:
    """The filters of each datum, as NumPy arrays, their evidence, and the known entries (N, D) of `Missing`."""
    key_check, key_spread, key_filters = jax.random.split(check_key(rng_key), 3)
    check_count(num_particles, "num_particles", 25)
    check_count(num_filters, "num_filters", 2)
    if fit.num_chains > 1:
        raise ValueError(f"fit has {fit.num_chains} chains; choose one, such as fit.chain(fit.best)")
    d = fit.diffusion
    if not isinstance(d, GaussianDiffusion):
        raise TypeError(f"posteriors are of Gaussian diffusions; this fit is of {d.family}")
    likelihoods, observed = prepare(fit, likelihood, data, key_check)
    N, D = len(jax.tree.leaves(likelihoods)[0]), fit.loc.size
    names = np.arange(N) if datum is None else np.asarray(datum)
    if names.shape != (N,) or len(set(names.tolist())) < N:
        raise ValueError(f"datum has shape {names.shape}; there are {N} data to name, each by another name")
    factors = None if d.covariance == "full" else spread(d, fit.params, key_spread)
    of_filter = num_particles * d.components * D**2
    rows = -(-N // -(-N * num_filters * of_filter // _MOST_NUMBERS))
    together = max(1, _MOST_NUMBERS // of_filter) if rows == 1 else num_filters
    together = max(size for size in range(1, num_filters + 1) if num_filters % size == 0 and size <= together)
    params, results = fit.params, []
    for start, index in padded_blocks(N, rows):
        keys = jax.random.split(jax.random.fold_in(key_filters, start), (rows, num_filters))
        block = jax.tree.map(itemgetter(index), likelihoods)
        parts = [
            jax.tree.map(np.asarray, filters(d, params, factors, block, keys[:, i : i + together], num_particles))
            for i in range(0, num_filters, together)
        ]
        results.append(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts))
    result = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:N], *results)
    evidence = _evidence(result, names)
    _warn_of_collapse(result, evidence, names)
    return result, evidence, observed


def _evidence(result: Filtered, names: np.ndarray) -> LogLikelihood:
    """log p(y) of each datum, with the k̂ of the weights; raises `ValueError` where no particle has any weight."""
    dead = np.flatnonzero(~np.isfinite(result.log_evidence).any(1))
    if dead.size:
        raise ValueError(
            f"the likelihood is zero, infinite or NaN at every particle of row(s) {some(names[dead])}: "
            "the observation cannot be, under this prior, or num_particles is too small"
        )
    values, mcse = log_mean(np.asarray(result.log_evidence.T, np.float64))
    largest = result.log_weight.max(-1, keepdims=True)
    log_w = (result.log_weight - np.where(np.isfinite(largest), largest, 0.0)).reshape(len(values), -1)
    thinned = log_w[:, :: -(-log_w.shape[1] // _K_DRAWS)]
    k = pareto_k(xr.DataArray(thinned.T.astype(np.float64), dims=("draw", "datum"))).to_numpy()
    return LogLikelihood(values, mcse, "estimate", k)


def _warn_of_collapse(result: Filtered, evidence: LogLikelihood, names: np.ndarray) -> None:
    S = result.log_weight.shape[-1]
    least = np.median(result.ess.min(-1), 1) * S
    k, limit = np.asarray(evidence.pareto_k), k_threshold(min(_K_DRAWS, result.log_weight[0].size))
    # an error of log p̂ of one from a single filter: the filters disagree on where the mass is
    error_of_one = evidence.values_mcse * np.sqrt(result.log_evidence.shape[1])
    dead = ~np.isfinite(result.log_evidence).all(1)
    bad = np.flatnonzero((least < _LEAST_PARTICLES) | ~(error_of_one < 1) | dead)
    if bad.size:
        worst = bad[np.argmin(least[bad])]
        warn(
            f"the weights of {bad.size} of {len(least)} posteriors have collapsed, in row(s) {some(names[bad])}; worst "
            f"in row {names[worst]}: {least[worst]:.1f} effective particles of {S}, k̂ = {k[worst]:.2f} (safe to "
            f"{limit:.2f}), log evidence ± {evidence.values_mcse[worst]:.2g}. Its draws are not to be relied on: the "
            "observation may be nearly impossible under the prior; more particles may help"
        )


def _effective_draws(
    draws: Float[np.ndarray, "N M S D"], observed: Float[np.ndarray, "N D"] | None
) -> Float[np.ndarray, " N"]:
    """How many independent draws would have means that vary as the means of the filters do, for the worst feature.

    Features of `observed` that are known do not count.
    """
    N, M, S, D = draws.shape
    between, total = draws.mean(2).var(1, ddof=1), draws.reshape(N, M * S, D).var(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(total > 0, M * total / between, np.inf)
    if observed is not None:
        ratio = np.where(np.isnan(observed), ratio, np.inf)
    return np.minimum(ratio.min(1), M * S)
