"""Many rows in blocks of few sizes, so that few programs are compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.types import Data, Key


def block_size(num_rows: int, most: int) -> int:
    """Rows to a block: a power of two, at most `most`, so that few sizes are compiled."""
    return min(most, 1 << (num_rows - 1).bit_length())


def in_blocks(x_0: Data, rng_key: Key, compute: Callable[[Data, Key], Any], rows: int) -> Iterator[tuple[int, Any]]:
    """Calls `compute` on blocks of `rows` rows, the last one padded; gives how many rows count, and the result."""
    for i, start in enumerate(range(0, len(x_0), rows)):
        block = x_0[start : start + rows]
        padded = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
        yield len(block), compute(jnp.asarray(padded), jax.random.fold_in(rng_key, i))
