"""Atomic writes: a file is either whole or as it was before."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a new file beside `path`, which takes its place only when the block ends without an error.

    Raises `OSError` where the file cannot be written, with `path` untouched.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # HDF5 tells of a full disk by a RuntimeError
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder, where there is none. Raises `OSError` where that cannot be, as where it is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"could not make the folder: {error.strerror}", str(folder)) from error


def check_space(folder: Path, size: int) -> None:
    """Raises `OSError` where `size` more bytes cannot be written to `folder`."""
    # macOS has no posix_fallocate
    allocate = getattr(os, "posix_fallocate", lambda descriptor, _, length: os.write(descriptor, bytes(length)))
    with atomic_write(folder / "space") as file, file.open("wb") as stream:
        allocate(stream.fileno(), 0, size)
    (folder / "space").unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
