"""Progress bars with the time left: on a terminal and in a notebook, and nowhere else."""

import sys
from typing import Any


def progress(*args: Any, show: bool = True, **options: Any) -> Any:
    """A bar of tqdm, of the kind for where it is shown; `show=False` leaves it out. See `tqdm` for the rest."""
    from tqdm.auto import tqdm  # which warns, when it is imported in a notebook without widgets

    return tqdm(*args, disable=not (show and _is_watched()), **options)


def of_long_work(*args: Any, **options: Any) -> Any:
    """A bar that is shown after two seconds, and goes when all is done."""
    return progress(*args, delay=2.0, leave=False, **options)


def _is_watched() -> bool:
    """Whether what is written to standard error is seen as it comes."""
    in_notebook = "ipykernel" in sys.modules and type(sys.stderr).__module__.startswith("ipykernel")
    return in_notebook or sys.stderr.isatty()
