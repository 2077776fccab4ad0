"""One NumPyro program at a time, since its stack of handlers is one for all threads, and programs would mix in it."""

import inspect
import threading
from collections.abc import Callable
from functools import update_wrapper, wraps
from typing import Any, cast

LOCK = threading.RLock()


def one_at_a_time[F: Callable[..., Any]](function: F) -> F:
    """`function`, which runs a NumPyro program or compiles one, in one thread at a time.

    Of a function under `jit`, only tracing, compilation and dispatch wait for other threads.
    """
    if not inspect.isfunction(function):
        return cast(F, _OneAtATime(function))

    @wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with LOCK:
            return function(*args, **kwargs)

    return cast(F, alone)


class _OneAtATime:
    """A function under `jit`, with its methods."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with LOCK:
            return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)
