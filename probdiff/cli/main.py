"""The command line: `probdiff fit`, `report`, `sample`, `impute` and `check`."""

import os
import sys
import warnings

import jax
import typer

from probdiff.cli import checking, commands
from probdiff.cli.app import app
from probdiff.fitting import devices

__all__ = ["checking", "commands", "main"]


def _tell(error: Exception, message: str) -> None:
    if devices.OF_FIRST not in getattr(error, "__notes__", ()):  # else the first process tells it
        print(f"probdiff: {message}", file=sys.stderr)


def main() -> None:
    """Runs the command; an error is one line on standard error and a non-zero exit."""
    warnings.showwarning = lambda message, *_: print(f"probdiff: warning: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except typer.TyperException as error:
        _tell(error, getattr(error, "format_message", error.__str__)())
        code = getattr(error, "exit_code", 2)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
        _tell(error, " ".join(str(error).split()))
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # not waiting for the other processes, which wait for this one
    sys.exit(code)
