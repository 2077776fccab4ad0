"""A fit for ArviZ, and how well it does: the marginals p(x_t) beside q(x_t), draws beside rows, K beside baselines."""

from collections.abc import Sequence
from dataclasses import dataclass

import arviz as az
import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from probdiff.baselines import baselines
from probdiff.chains import Diffusion
from probdiff.checks import check_count, labels
from probdiff.faithfulness import Faithfulness, faithfulness
from probdiff.likelihood.elbo import elbo_draws, of_mixtures
from probdiff.likelihood.paths import log_importance_weights
from probdiff.psis import k_threshold, pareto_k
from probdiff.sampling import forward_draws, noise_levels, one_fit, reverse_draws
from probdiff.types import Key, Params
from probdiff.units import Units, to_chain

__all__ = [
    "Faithfulness",
    "Marginals",
    "baselines",
    "faithfulness",
    "marginals",
    "to_datatree",
]

_LEVEL = 0.01  # of the bands and of the verdict


def times_shown(num_timesteps: int, most: int = 51) -> list[int]:
    """0…T, or `most` of them evenly spaced, both ends among them."""
    return np.unique(np.linspace(0, num_timesteps, min(most, num_timesteps + 1)).round().astype(int)).tolist()


def to_datatree(
    d: Diffusion,
    stacked_params: Params,
    x: ArrayLike,
    *,
    losses: Float[np.ndarray, "C steps"],
    units: Units,
    rng_key: Key,
    num_draws: int = 500,
    features: Sequence[str] | None = None,
) -> xr.DataTree:
    """A fit and what it says of x (N, *event_shape) as a `DataTree`; chain = independent fit, nats.

    | group | variable | dims | what |
    |---|---|---|---|
    | posterior | x | chain, draw, t, feature | draws of x_t from p, in the chain's own units |
    | posterior_predictive | x_0 | chain, draw, feature | the same at t = 0, in the data's units |
    | forward | x | chain, draw, t, feature | draws of x_t from q for rows of x, in the chain's own units |
    | pit | x | chain, draw, t, feature | rank of each forward draw among ten times as many reverse draws, in [0, 1] |
    | observed_data | x_0 | datum, feature | x |
    | log_likelihood | x_0 | chain, draw, datum | the lower bound K; draws are spread as its Monte Carlo error |
    | importance | log_weight | chain, draw, datum | log w of N14, one path each; for mixtures those of K |
    | fit | loss | chain, step | losses |
    | fit | beta, log_snr, elbo_part | chain, t | schedule, and the terms of K = Σ_t elbo_part − prior_kl |
    | fit | prior_kl | chain | KL(q(x_T given x_0) ‖ p(x_T)) |

    Where the chain's axes are not those of the features, x_t is turned back to them, A·x_t of `Units`.
    A fit is a point estimate, so the mean over draws of `log_likelihood` is the bound itself: each draw is the
    mean plus 1/√num_draws of one Monte Carlo estimate's deviation from it. `elbo_part` at t = 1 is the reconstruction.
    """
    C, x_0 = len(losses), to_chain(d, d.checked(x, "x"), units)
    check_count(num_draws, "num_draws", 25)  # to fit the tail of the weights
    size, log_det = x_0[0].size, units.log_det
    names = labels(features, size).tolist()
    if len(names) != size:
        raise ValueError(f"features has {len(names)} names; the data have {size} features")
    times = times_shown(d.num_timesteps)
    posterior, forward, pit, log_lik, weights, parts, terminal = ([] for _ in range(7))
    for c in range(C):
        params = one_fit(stacked_params, c)
        key_rows, key_q, key_p, key_elbo, key_weight = jax.random.split(jax.random.fold_in(rng_key, c), 5)
        rows = np.concatenate(
            [jax.random.permutation(key, len(x_0)) for key in jax.random.split(key_rows, -(-num_draws // len(x_0)))]
        )[:num_draws]
        q, p = (
            np.asarray(units.to_features(draws), draws.dtype).reshape(len(draws), len(times), size)
            for draws in (
                forward_draws(d, params, x_0[rows], key_q, times),
                reverse_draws(d, params, key_p, 11 * num_draws, times),
            )
        )
        forward.append(q)
        posterior.append(p[:num_draws])
        pit.append(_ranks(q, p[num_draws:]))
        draws, mean_parts, terminal_kl = _elbo_draws(d, params, x_0, key_elbo, num_draws)
        mean = draws.mean(0)
        log_lik.append(mean + (draws - mean) / np.sqrt(num_draws) - log_det)
        mean_parts[0] -= log_det
        parts.append(mean_parts)
        terminal.append(terminal_kl)
        if not of_mixtures(d):
            draws = log_importance_weights(d, params, x_0, rng_key=key_weight, num_draws=num_draws)
        weights.append(draws - log_det)
    noise = noise_levels(d, stacked_params, C)
    paths = {"dims": {"x": ["t", "feature"]}, "coords": {"t": times, "feature": names}}
    x_0_drawn = units.loc.ravel() + units.scale.ravel() * np.stack(posterior)[:, :, 0]
    observed = np.asarray(x, np.float64).reshape(len(x_0), size)
    steps = np.arange(1, d.num_timesteps + 1)
    per_t = {name: ["t"] for name in ("beta", "log_snr", "elbo_part")}
    fitted = {
        "loss": losses,
        "beta": noise.beta,
        "log_snr": jax.vmap(lambda levels: levels.log_snr)(noise),
        "elbo_part": np.stack(parts),
        "prior_kl": np.asarray(terminal),
    }
    groups = {
        "posterior": az.dict_to_dataset({"x": np.stack(posterior)}, **paths),
        "posterior_predictive": az.dict_to_dataset(
            {"x_0": x_0_drawn}, dims={"x_0": ["feature"]}, coords={"feature": names}
        ),
        "forward": az.dict_to_dataset({"x": np.stack(forward)}, **paths),
        "pit": az.dict_to_dataset({"x": np.stack(pit)}, **paths),
        "observed_data": az.dict_to_dataset(
            {"x_0": observed}, dims={"x_0": ["datum", "feature"]}, coords={"feature": names}, sample_dims=[]
        ),
        "log_likelihood": az.dict_to_dataset({"x_0": np.stack(log_lik)}, dims={"x_0": ["datum"]}),
        "importance": az.dict_to_dataset({"log_weight": np.stack(weights)}, dims={"log_weight": ["datum"]}),
        "fit": az.dict_to_dataset(
            {name: np.asarray(values) for name, values in fitted.items()},
            dims={"loss": ["step"], **per_t},
            coords={"t": steps},
            sample_dims=["chain"],
        ),
    }
    del groups["fit"].attrs["sample_dims"]  # netCDF would give a list of one back as a string
    return xr.DataTree.from_dict({name: xr.DataTree(dataset) for name, dataset in groups.items()})


def _ranks(q: np.ndarray, reference: np.ndarray) -> np.ndarray:
    ranks = np.empty(q.shape)
    for index in np.ndindex(q.shape[1:]):
        ranks[(slice(None), *index)] = np.searchsorted(
            np.sort(reference[(slice(None), *index)]), q[(slice(None), *index)]
        )
    return (ranks + 0.5) / (len(reference) + 1)


def _elbo_draws(
    d: Diffusion, params: Params, x_0: np.ndarray, rng_key: Key, num_draws: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """K per datum, (num_draws, N); its terms for t = 1…T, (T,), and its KL at T."""
    parts, draws = elbo_draws(d, params, x_0, rng_key=rng_key, num_draws=num_draws)
    terms = np.concatenate([[parts.reconstruction.mean()], -parts.steps.mean(0)])
    return draws, terms, float(parts.terminal.mean())


@dataclass(frozen=True)
class Marginals:
    """How the reverse marginals p(x_t) compare with the forward q(x_t).

    `table`: one row for each fit (column "chain"), t and feature: the Wasserstein distance in the chain's units and the
    largest gap between the two distribution functions (Kolmogorov–Smirnov), each with the band that sampling noise
    alone stays under in 99 % of permutations; the energy distance of all features jointly at this t, with its band and
    p-value; and R̂ of the reverse draws across fits (NaN for one fit). `p_value` is that of the largest energy
    distance over all t and fits, in units of its noise. `pareto_k` (C, N) is of the importance weights, and
    `k_threshold` the value below which they can be trusted.
    """

    table: pd.DataFrame
    p_value: float
    pareto_k: np.ndarray
    k_threshold: float
    num_draws: int

    @property
    def verdict(self) -> str:
        at = f"{self.num_draws:,} draws each, permutation test over all t"
        if self.p_value > _LEVEL:
            seen = "No difference of the reverse marginals from the forward ones was seen"
            return f"{seen}: p = {self.p_value:.2g} ({at})."
        worst = self.table.loc[(self.table.energy / self.table.energy_band).idxmax()]
        return (
            f"The reverse marginals differ from the forward ones: p = {self.p_value:.2g} ({at}); "
            f"most at t = {worst.t:.0f} of chain {worst.chain:.0f}, where the energy distance is {worst.energy:.2g} "
            f"and noise alone stays under {worst.energy_band:.2g}."
        )


def marginals(dt: xr.DataTree, *, seed: int = 0, num_permutations: int = 399) -> Marginals:
    """Compares the reverse draws with the forward draws of a `to_datatree`, t by t and jointly; see `Marginals`.

    Whole paths are permuted between p and q, so the dependence between times is kept. At most one forward draw for
    each datum counts: give `to_datatree` as many held-out rows as draws.
    """
    posterior, forward = dt["posterior"].dataset["x"], dt["forward"].dataset["x"]
    # a datum drawn twice is no new evidence, and the first draws are of different data
    C, n = posterior.sizes["chain"], min(posterior.sizes["draw"], dt["observed_data"].dataset.sizes["datum"])
    times, features = posterior["t"].to_numpy(), posterior["feature"].to_numpy()
    if n < 2 or num_permutations < 99:
        raise ValueError(
            f"there are {n} draws of different data and {num_permutations} permutations; 2 and 99 are needed"
        )
    rng = np.random.default_rng(seed)
    signs = np.concatenate([np.ones(n), -np.ones(n)])
    labels = np.stack([signs, *(rng.permutation(signs) for _ in range(num_permutations))]).astype(np.float32) / n
    rhat = np.full((len(times), len(features)), np.nan)
    if C > 1:
        # draws of a bit lie equally far from their median, so that the R̂ of the tails has no variance to divide by
        method = "rank" if np.issubdtype(posterior.dtype, np.floating) else "z_scale"
        with np.errstate(invalid="ignore"):  # nor has a bit that is constant
            rhat = az.rhat(dt, var_names=["x"], method=method)["x"].to_numpy()
    frames, largest = [], np.full(len(labels), -np.inf)
    for c in range(C):
        both = np.concatenate([posterior[c, :n].to_numpy(), forward[c, :n].to_numpy()]).astype(
            np.float32
        )  # (2n, times, features)
        energies = np.stack([_energy(both[:, i], labels) for i in range(len(times))])  # (times, 1 + permutations)
        # every labelling is standardised alike, the true one too, so that all are exchangeable where p is q
        standardised = (energies - energies.mean(1, keepdims=True)) / energies.std(1, keepdims=True)
        largest = np.maximum(largest, standardised.max(0))
        for i, t in enumerate(times):
            for j, feature in enumerate(features):
                wasserstein, gap = _one_dimensional(both[:, i, j], labels)
                frames.append(
                    {
                        "chain": c,
                        "t": t,
                        "feature": feature,
                        "wasserstein": wasserstein[0],
                        "wasserstein_band": np.quantile(wasserstein[1:], 1 - _LEVEL),
                        "ks": gap[0],
                        "ks_band": np.quantile(gap[1:], 1 - _LEVEL),
                        "energy": energies[i, 0],
                        "energy_band": np.quantile(energies[i, 1:], 1 - _LEVEL),
                        "energy_p": _p_value(energies[i]),
                        "r_hat": rhat[i, j],
                    }
                )
    k = pareto_k(dt["importance"].dataset["log_weight"]).to_numpy()
    threshold = k_threshold(posterior.sizes["draw"])
    return Marginals(pd.DataFrame(frames), _p_value(largest), k, threshold, n)


def _p_value(statistics: np.ndarray) -> float:
    """Of the first of the statistics among the others."""
    return float((1 + np.sum(statistics[1:] >= statistics[0])) / len(statistics))


def _energy(x: Float[np.ndarray, "2n D"], labels: Float[np.ndarray, "P 2n"]) -> Float[np.ndarray, " P"]:
    """2 E|X−Y| − E|X−X'| − E|Y−Y'| for each labelling of the rows (Székely and Rizzo 2013)."""
    distances = cdist(x, x).astype(np.float32)
    return -np.einsum("pn,np->p", labels, distances @ labels.T)


def _one_dimensional(
    x: Float[np.ndarray, " 2n"], labels: Float[np.ndarray, "P 2n"]
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """∫|F_p − F_q|, the Wasserstein distance, and max|F_p − F_q|, Kolmogorov's and Smirnov's, for each labelling."""
    order = np.argsort(x)
    difference = np.abs(np.cumsum(labels[:, order], axis=1))
    return difference[:, :-1] @ np.diff(x[order]), difference.max(1)
