"""Many rows in blocks of few sizes, so that few programs are compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.progress import of_long_work
from probdiff.types import Data, Key


def block_size(num_rows: int, most: int) -> int:
    """Rows to a block: a power of two, at most `most`, so that few sizes are compiled."""
    return min(most, 1 << (num_rows - 1).bit_length())


def in_blocks(x_0: Data, rng_key: Key, compute: Callable[[Data, Key], Any], rows: int) -> Iterator[tuple[int, Any]]:
    """Calls `compute` on blocks of `rows` rows, the last one padded; gives how many rows count, and the result."""
    for i, (start, index) in enumerate(padded_blocks(len(x_0), rows)):
        yield min(rows, len(x_0) - start), compute(jnp.asarray(x_0[index]), jax.random.fold_in(rng_key, i))


def padded_blocks(num_rows: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first row of each block, and the indices of its `rows` rows; the last block is padded by the last row."""
    for start in of_long_work(range(0, num_rows, rows), unit="block", desc="rows"):
        yield start, np.minimum(np.arange(start, start + rows), num_rows - 1)
