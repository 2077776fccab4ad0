import os
from pathlib import Path

import pinned  # noqa: F401  # before NumPy and JAX start threads

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the same small programs are compiled in many tests and in the commands that they start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# most of the time of the tests is compilation
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """Frees a file's programs after it: each maps memory, and Linux ends a process with 65,530 mappings."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
