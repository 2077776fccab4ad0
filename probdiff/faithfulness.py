"""Whether draws of x_0 are like data that the fit has not seen: column by column, pair by pair, and jointly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from scipy.spatial.distance import cdist

from probdiff.checks import feature_names, frame_values, is_frame, labels

_LEVEL = 0.01  # of all tests together
_EACH = _LEVEL / 5  # of those of location, scale and shape of the columns, of their correlations, and the joint one
_SHIFT, _POWER = 0.25, 0.8  # sd of one column, and the probability to notice it from which draws may be faithful
_SHIFTS = (0.5, 0.75, 1.0, 1.5, 2.0)  # that are larger
_FAR = 5.0  # ranges of the data beyond them, for as many rows as draws; of tails no heavier than a t of two degrees
_JOINT = 1_000  # rows and draws of the joint test
_PERMUTATIONS = 999
_REPETITIONS = 200  # of the test that the power is estimated by


@dataclass(frozen=True, repr=False)
class Faithfulness:
    """Draws beside held-out rows.

    `columns` has a row for each feature: the ratio of standard deviations, the errors of the quantiles of 5, 50 and 95
    % in standard deviations of the data, the share of draws beyond the range of the data, and the p-values of tests of
    location (Mann and Whitney), scale (the same of distances from the median) and shape (Kolmogorov and Smirnov).
    `correlation_error` is the largest difference of rank correlations for its error, of `pair`, and `correlation_band`
    what sampling noise alone stays under. `energy_p` is the p-value of the joint test by permutation. `power` is the
    probability that a shift of one column by a quarter of its standard deviation would be noticed, and `noticed` the
    least shift, of a few larger ones too, whose probability is 0.8. `outside` counts draws that lie more than `far`
    times the range of the data beyond it, 5·√(S/N).
    `verdict` is one of three sentences, `differences` what is different, most of all first.
    """

    columns: pd.DataFrame
    pair: tuple[str, str]
    correlation_error: float
    correlation_band: float
    energy_p: float
    power: float
    noticed: float
    outside: int
    far: float
    num_rows: int
    num_draws: int

    def __repr__(self) -> str:
        """The verdict, and the table of columns."""
        return f"{self.verdict}\n{self.columns.to_string(index=False, float_format='{:.3f}'.format)}"

    @property
    def differences(self) -> list[str]:
        """What is different beyond sampling noise, most of all first."""
        found = []
        if self.outside:
            found.append(
                f"{self.outside:,} draws that lie more than {self.far:.0f} times the range of the data beyond it"
            )
        p = self.columns[["location p", "scale p", "shape p"]].min(axis=1)
        if p.min() < _EACH / len(p):
            worst = self.columns.loc[p.idxmin()]
            found.append(
                f"column {worst['column']}, with an sd of {worst['sd ratio']:.3g} times that of the data and a median "
                f"{worst['50 %']:+.2g} sd away (p = {p.min():.1g})"
            )
        if self.correlation_error > self.correlation_band:
            found.append(
                f"the rank correlation of {' and '.join(self.pair)}, by {self.correlation_error:.2g} where noise alone "
                f"stays under {self.correlation_band:.2g}"
            )
        if self.energy_p < _EACH:
            found.append(f"the joint distribution (energy test, p = {self.energy_p:.2g})")
        return found

    @property
    def verdict(self) -> str:
        """One of three: the draws differ from the data, are faithful, or there are too few rows to tell."""
        counted = f"{self.num_draws:,} draws beside {self.num_rows:,} held-out rows"
        noticed = f"a shift of one column by {_SHIFT:g} sd would be noticed with probability {self.power:.2g}"
        if self.differences:
            return f"The draws differ from the data, in {'; '.join(self.differences)} ({counted})."
        if self.power < _POWER:
            larger = f", and one of {self.noticed:g} sd with {_POWER:g} or more" if np.isfinite(self.noticed) else ""
            few = "Whether the draws are like the data cannot be told from so few rows"
            return f"{few}: {noticed}{larger} ({counted})."
        return f"The draws are faithful: no difference was seen, and {noticed} ({counted})."


def faithfulness(
    draws: ArrayLike, rows: ArrayLike, features: Sequence[str] | None = None, *, seed: int = 0
) -> Faithfulness:
    """Compares draws (S, D) with held-out rows (N, D), in the data's units; see `Faithfulness`.

    Either may be a data frame; `features` are by default the names of its columns. By chance alone, faithful draws are
    said to differ with probability at most about 0.01. Raises `ValueError` as `side_by_side`.
    """
    draws, rows, features = side_by_side(draws, rows, features)
    rng = np.random.default_rng(seed)
    low, high = rows.min(0), rows.max(0)
    std = np.where(high > low, rows.std(0), 1.0)
    errors = (np.quantile(draws, [0.05, 0.5, 0.95], axis=0) - np.quantile(rows, [0.05, 0.5, 0.95], axis=0)) / std
    pairs = list(zip(draws.T, rows.T, strict=True))
    columns = pd.DataFrame(
        {
            "column": list(features),
            "sd ratio": draws.std(0) / std,
            "5 %": errors[0],
            "50 %": errors[1],
            "95 %": errors[2],
            "beyond": ((draws < low) | (draws > high)).mean(0),
            "location p": [stats.mannwhitneyu(*pair).pvalue for pair in pairs],
            "scale p": [_scale_p(*pair) for pair in pairs],
            "shape p": [stats.ks_2samp(*pair).pvalue for pair in pairs],
        }
    )
    pair, error, band = _correlations(draws, rows, features)
    power = _power(draws, len(rows), _SHIFT, rng)
    larger = (shift for shift in _SHIFTS if _power(draws, len(rows), shift, rng) >= _POWER)
    noticed = _SHIFT if power >= _POWER else next(larger, np.inf)
    far = _FAR * max(1.0, len(draws) / len(rows)) ** 0.5
    outside = (draws < low - far * (high - low)) | (draws > high + far * (high - low))
    return Faithfulness(
        columns,
        pair,
        error,
        band,
        _energy_p((draws - rows.mean(0)) / std, (rows - rows.mean(0)) / std, rng),
        power,
        noticed,
        int(outside.any(1).sum()),
        far,
        len(rows),
        len(draws),
    )


def side_by_side(
    draws: ArrayLike, rows: ArrayLike, features: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draws (S, D), rows (N, D) and the names of their columns, which of data frames are taken by name.

    Raises `ValueError` where shapes or names do not fit, there are fewer than two of either, or one is not finite.
    """
    if features is None:
        features = feature_names(rows, "rows") or feature_names(draws, "draws")
    if isinstance(features, str):
        raise ValueError(f"features is {features!r}; a list of names is wanted")
    arrays = [
        np.asarray(frame_values(x, name, features if is_frame(x) else None), np.float64)
        for x, name in ((draws, "draws"), (rows, "rows"))
    ]
    size = arrays[1].shape[-1] if arrays[1].ndim else 0
    for x, name in zip(arrays, ("draws", "rows"), strict=True):
        if x.ndim != 2 or x.shape[1] != size or len(x) < 2 or not size:
            of_chains = "; of several chains choose one, such as draws[0]" if x.ndim == 3 else ""
            raise ValueError(f"{name} has shape {x.shape}; (N, {size or 'D'}) is wanted, two rows or more{of_chains}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")
    names = labels(features, size).tolist()
    if len(names) != size:
        raise ValueError(f"features has {len(names)} names; rows have {size} columns")
    return *arrays, names


def _scale_p(draws: np.ndarray, rows: np.ndarray) -> float:
    median = np.median(np.concatenate([draws, rows]))  # of both, so that they can be exchanged
    return float(stats.mannwhitneyu(np.abs(draws - median), np.abs(rows - median)).pvalue)


def _correlations(draws: np.ndarray, rows: np.ndarray, features: Sequence[str]) -> tuple[tuple[str, str], float, float]:
    """The pair whose rank correlations differ most for their errors, by how much, and the band of that."""
    D = rows.shape[1]
    if D == 1:
        return (features[0], features[0]), 0.0, 0.0
    of_draws, of_rows = rank_correlations(draws), rank_correlations(rows)
    apart = np.abs(correlations_apart(of_draws, of_rows, len(draws), len(rows)))
    i, j = divmod(int(np.argmax(apart)), D)
    difference = abs(of_draws[i, j] - of_rows[i, j])
    band = difference * stats.norm.isf(_EACH / (D * (D - 1))) / max(apart[i, j], 1e-12)
    return (features[i], features[j]), float(difference), float(band)


def rank_correlations(x: np.ndarray) -> np.ndarray:
    """Spearman's correlations of the columns of x (N, D), 0 of a column that is constant with others: (D, D)."""
    with np.errstate(invalid="ignore"):
        found = np.nan_to_num(np.atleast_2d(np.corrcoef(stats.rankdata(x, axis=0), rowvar=False)))
    np.fill_diagonal(found, 1.0)
    return found


def correlations_apart(of_draws: np.ndarray, of_rows: np.ndarray, num_draws: int, num_rows: int) -> np.ndarray:
    """By how many standard errors rank correlations (D, D) of draws are above those of rows, 0 on the diagonal.

    On Fisher's scale, with the variance that ranks have (Bonett and Wright 2000).
    """
    s, r = (np.clip(of_x, -0.999, 0.999) for of_x in (of_draws, of_rows))
    variance = (1 + r**2 / 2) * (1 / max(num_rows - 3, 1) + 1 / max(num_draws - 3, 1))
    return (np.arctanh(s) - np.arctanh(r)) / np.sqrt(variance)


def _energy_p(draws: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> float:
    """Of the energy distance among its values where draws and rows are exchanged (Székely and Rizzo 2013)."""
    n = min(_JOINT, len(rows), len(draws))
    both = np.concatenate([draws[rng.permutation(len(draws))[:n]], rows[rng.permutation(len(rows))[:n]]])
    distances = cdist(both, both).astype(np.float32)
    signs = np.repeat([1.0, -1.0], n)
    labels = np.stack([signs, *(rng.permutation(signs) for _ in range(_PERMUTATIONS))]).astype(np.float32) / n
    energy = -np.einsum("pn,np->p", labels, distances @ labels.T)
    return float(np.mean(energy >= energy[0]))


def _power(draws: np.ndarray, num_rows: int, shift: float, rng: np.random.Generator) -> float:
    """How often the test of location notices that a column of other draws, any of them, is shifted by so many sd."""
    D, half = draws.shape[1], len(draws) // 2
    noticed = 0
    for _ in range(_REPETITIONS):
        column = draws[rng.permutation(len(draws)), rng.integers(D)]
        shifted = rng.choice(column[:half], num_rows) + shift * column.std()
        noticed += stats.mannwhitneyu(column[half:], shifted).pvalue < _EACH / D
    return noticed / _REPETITIONS
