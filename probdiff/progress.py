"""Progress with the time left: a bar on a terminal and in a notebook, and elsewhere a line a minute."""

import sys
from typing import Any

from tqdm.std import tqdm


def progress(*args: Any, show: bool = True, **options: Any) -> Any:
    """A bar of tqdm, of the kind for where it is shown; `show=False` leaves it out. See `tqdm` for the rest.

    Where standard error is neither a terminal nor a notebook, it is a line a minute from the second minute on.
    """
    if show and not _is_watched():
        times = {"mininterval": _LOGGED, "maxinterval": _LOGGED, "delay": _LOGGED}
        return _Log(*args, file=_Lines(), **options | times | {"leave": False, "ncols": 100})
    from tqdm.auto import tqdm as bar  # which warns, when it is imported in a notebook without widgets

    return bar(*args, disable=not show, **options)


def of_long_work(*args: Any, **options: Any) -> Any:
    """A bar that is shown after two seconds, and goes when all is done."""
    return progress(*args, **{"delay": 2.0, "leave": False, **options})


_LOGGED = 60.0  # seconds


class _Log(tqdm):
    """A bar that is drawn when it is due, and not when its description changes."""

    def set_description_str(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description_str(desc, refresh=False)


class _Lines:
    """Standard error, with a line for each time that a bar is drawn."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _is_watched() -> bool:
    """Whether what is written to standard error is seen as it comes."""
    in_notebook = "ipykernel" in sys.modules and type(sys.stderr).__module__.startswith("ipykernel")
    return in_notebook or sys.stderr.isatty()
