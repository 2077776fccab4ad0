"""The reverse chain of a pair on nodes: all of a line, or all states of a few bits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from probdiff.derivation.pair import Pair
from probdiff.derivation.sites import log_prob
from probdiff.reference.quadrature import Grid

_MOST_ENTRIES = 5e7  # of the kernels on the nodes, T·M²


def grid(pair: Pair, y: Float[np.ndarray, "M *D"]) -> Grid | None:
    """The chain p of a pair on the nodes y, (M,) on the line or (M, D) of bits; None where it takes too much memory."""
    T, event = pair.num_timesteps, pair.x.shape[1:]
    if T * len(y) ** 2 > _MOST_ENTRIES:
        return None
    dtype = pair.x.dtype if y.ndim == 2 else None
    nodes = jnp.asarray(y, dtype).reshape(-1, *event)
    to, one = nodes[:, None], pair.x[:1]

    def columns(x_t: jax.Array) -> dict[int, jax.Array]:
        path = {t: jnp.broadcast_to(x_t, one.shape) for t in pair.p.times}
        return {t: log_prob(kernel, to)[:, 0] for t, kernel in pair.p.kernels(path).items()}

    log_p = {t: _finite(np.asarray(block, np.float64)) for t, block in jax.vmap(columns)(nodes).items()}
    kernels = np.stack([log_p[t].T for t in range(T)])
    return Grid(y, log_p[T][0], kernels, _finite(pair.log_p_given_x_1(nodes)).T)


def _finite(log_p: np.ndarray) -> np.ndarray:
    """With a number in place of −∞, so that where q has no mass either nothing is left of it."""
    return np.maximum(log_p, -1e100)
