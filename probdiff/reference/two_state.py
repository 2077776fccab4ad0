"""Chains of bits in closed form: each bit a chain of two states of its own, by 2 × 2 matrices in float64."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from probdiff.types import Key

type Bits = Float[np.ndarray, "... D"]
type Probabilities = Float[np.ndarray, "N D 2"]

_LEAST = 1e-300  # a probability of zero, so that its logarithm is finite


@dataclass(frozen=True)
class TwoStateChain:
    """y_0 ~ `first`, y_k given y_{k−1} by the matrices `steps`, k = 1…T, for N data side by side.

    `first` (N, D, 2), the probabilities of 0 and of 1; `steps` (T, N, D, 2, 2), from and to. Where y_0 is known,
    `first` is 0 and 1.
    """

    first: Probabilities
    steps: Float[np.ndarray, "T N D 2 2"]

    def marginals(self) -> list[Probabilities]:
        """The probabilities of 0 and of 1 for y_0, …, y_T."""
        found = [self.first]
        for step in self.steps:
            found.append(np.einsum("nda,ndab->ndb", found[-1], step))
        return found

    def flipped(self) -> "TwoStateChain":
        """The same distribution of the path, run from y_T to y_0, by Bayes' rule."""
        marginals = self.marginals()
        steps = [
            np.moveaxis(before[..., None] * step, -1, -2) / np.maximum(after, _LEAST)[..., None]
            for before, step, after in zip(marginals, self.steps, marginals[1:], strict=False)
        ]
        return TwoStateChain(marginals[-1], np.stack(steps[::-1]) if steps else self.steps)

    @property
    def noise(self) -> list[float]:
        """The share of y_0, …, y_T that y_0 has no part in: 1 − ∏ (P(1 given 1) − P(1 given 0)), the mean over bits."""
        kept = np.cumprod(self.steps[..., 1, 1] - self.steps[..., 0, 1], axis=0).mean((1, 2))
        return [0.0, *(1 - kept).tolist()]

    @property
    def full(self) -> bool:
        """Whether every y_k can follow every y_{k−1}."""
        return bool(np.all(self.steps > 0))

    def log_marginal(self, k: int, y: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "N K"]:
        """log probability of each y as y_k of each datum, nats."""
        log_p = _log(self.marginals()[k])
        return log_p[..., 0].sum(1)[:, None] + (log_p[..., 1] - log_p[..., 0]) @ y.T

    def log_kernel(self, k: int, y: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M M"]:
        """log probability of y_k, first axis, given y_{k−1} on the same states; for k = 1 given y_0 of each datum."""
        if k == 1:
            return self.log_marginal(1, y).T
        return self.log_step(k, y[None, :, None], y[:, None, None])[..., 0]

    def log_step(self, k: int, before: Bits, y: Bits) -> Float[np.ndarray, "... N"]:
        """log probability of y_k given y_{k−1}, both (…, N, D), nats."""
        on, off = self._given(k, before)
        return _log(np.where(y == 1, on, off)).sum(-1)

    def draw(self, k: int, before: Bits, rng_key: Key) -> Bits:
        """y_k given y_{k−1} (S, N, D)."""
        on, _ = self._given(k, before)
        return (np.asarray(jax.random.uniform(rng_key, before.shape), np.float64) < on).astype(np.float64)

    def _given(self, k: int, before: Bits) -> tuple[Bits, Bits]:
        """The probabilities that y_k is 1 and that it is 0."""
        step = self.steps[k - 1]
        on, off = (np.where(before == 1, step[..., 1, to], step[..., 0, to]) for to in (1, 0))
        return on, off


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, _LEAST))
