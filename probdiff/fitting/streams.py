"""Rows of a file larger than memory, read block by block in shuffled order and ahead of time (Grain)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from probdiff.checks import check_count, check_data
from probdiff.datasets.tables import frame_numbers
from probdiff.units import Units

_BUFFER_BYTES = 2**28
_READ_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class Stream:
    """A .npy array (N, *event_shape) or the columns of a .parquet table, for `fit`; see `stream`.

    Block i is `stream[i]`, a float array: `block_rows` rows of a .npy file, or a row group of a .parquet file.
    """

    path: Path
    shape: tuple[int, ...]
    starts: np.ndarray
    columns: tuple[str, ...] | None = None
    units: Units | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        rows = self._read(i, i + 1)
        return (rows if self.units is None else self.units.to_chain(rows)).astype(jnp.result_type(float))

    def _read(self, first: int, last: int) -> np.ndarray:
        """The rows of the blocks from `first` to before `last`, as they are in the file."""
        if self.columns is None:  # opened anew each time, so that pages that were read can go
            return np.load(self.path, mmap_mode="r", allow_pickle=False)[self.starts[first] : self.starts[last]]
        import pyarrow.parquet as parquet

        groups = parquet.ParquetFile(self.path).read_row_groups(range(first, last), columns=list(self.columns))
        return frame_numbers(groups.to_pandas()[list(self.columns)], str(self.path))

    @property
    def _block_rows(self) -> int:
        return int(np.diff(self.starts).max())

    def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard deviation, least and largest value of each feature, in one pass.

        Raises `ValueError` for entries that are not finite.
        """
        from sklearn.preprocessing import StandardScaler

        scaler, low, high = StandardScaler(), np.full(self.shape[1:], np.inf), np.full(self.shape[1:], -np.inf)
        step = max(1, _READ_BYTES // (_bytes(self.shape) * self._block_rows))
        for i in range(0, len(self), step):
            rows = self._read(i, min(i + step, len(self)))
            rows = check_data(rows, self.shape[1:], f"{self.path} from row {self.starts[i]}")
            scaler.partial_fit(rows.reshape(len(rows), -1))
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        constant = np.flatnonzero(scaler.var_ == 0)
        if constant.size:
            raise ValueError(f"{self.path}: feature {constant[0]} is the same in every row; leave it out")
        return scaler.mean_.reshape(self.shape[1:]), np.sqrt(scaler.var_).reshape(self.shape[1:]), low, high

    def standardised(self, units: Units) -> "Stream":
        """The stream of the rows in the chain's own units."""
        return replace(self, units=units)

    def buffer_rows(self, num_rows: int) -> int:
        """The rows of the whole blocks among `num_rows`: one block at least, and else at most the file and 256 MiB."""
        most = min(num_rows, _BUFFER_BYTES // _bytes(self.shape))
        return self._block_rows * max(1, min(most // self._block_rows, len(self)))

    def buffers(self, num_rows: int, first: int = 0) -> Iterator[np.ndarray]:
        """Without end, buffers of at most `buffer_rows` from blocks in shuffled order, each block once in each pass.

        Two buffers are read ahead by a thread. `first` leaves out as many.
        """
        import grain

        num_blocks = self.buffer_rows(num_rows) // self._block_rows
        blocks = grain.MapDataset.source(self).shuffle(seed=0).repeat()
        buffers = blocks.batch(num_blocks, drop_remainder=True, batch_fn=np.concatenate)[first:]
        yield from buffers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def _bytes(shape: tuple[int, ...]) -> int:
    """Of a row, as float32."""
    return 4 * max(1, math.prod(shape[1:]))


def stream(path: str | Path, columns: Sequence[str] | None = None, block_rows: int | None = None) -> Stream:
    """The rows of a .npy or .parquet file that need not fit in memory, to be given to `fit` in place of x.

    A step's batch is drawn from a buffer of shuffled blocks, and a new buffer is read at every check. So rows should
    not lie in an order that matters over more than a block: `block_rows` of a .npy file, by default 4,096 or,
    where those are more than 16 MiB, as many as that, or a row group of .parquet. A buffer is of at most 256 MiB as
    float32, or of one block where that is larger. Memory holds the one in use, two that are read ahead, and copies.
    Raises `ValueError` for a file that is not there, is of another kind, or does not hold floating-point numbers.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".parquet") or not path.exists():
        raise ValueError(f"{path} is no .npy or .parquet file that exists; those can be read by the block")
    if block_rows is not None:
        check_count(block_rows, "block_rows", 1)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            shape, names = array.shape, None
            rows = block_rows or max(1, min(4096, _READ_BYTES // _bytes(shape)))
            starts = np.append(np.arange(0, shape[0], rows), shape[0])
        else:
            import pyarrow.parquet as parquet

            file = parquet.ParquetFile(path)
            names = tuple(columns or file.schema_arrow.names)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            shape, starts = (sum(groups), len(names)), np.cumsum([0, *groups])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read: {str(error).splitlines()[0]}") from error
    if names is None and columns:
        raise ValueError(f"columns is {list(columns)}; a .npy file has no names")
    if len(shape) < 2 or shape[0] < 2:
        raise ValueError(f"{path} has shape {shape}; it must be (N, D) or (N, *event_shape) with at least 2 rows")
    opened = Stream(path, shape, starts, names)
    if names is None:
        check_data(array[:1], shape[1:], str(path))
    else:
        missing = set(names) - set(file.schema_arrow.names)
        if missing:
            raise ValueError(
                f"{path} has no column {sorted(missing)[0]!r}; its columns are {', '.join(file.schema_arrow.names)}"
            )
        opened[0]
    return opened
