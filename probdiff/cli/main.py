"""The command line: `probdiff fit`, `report`, `sample`, `impute` and `check`."""

import inspect
import os
import re
import sys
import warnings

import jax
import typer

from probdiff.cli import checking, commands
from probdiff.cli.app import app
from probdiff.fitting import devices

__all__ = ["checking", "commands", "main"]


_OPTIONS = {
    name
    for command in (commands.fit, commands.report, commands.sample, commands.impute, checking.check)
    for name, parameter in inspect.signature(command).parameters.items()
    if any(isinstance(one, type(typer.Option())) for one in getattr(parameter.annotation, "__metadata__", ()))
}


def _as_typed(message: str) -> str:
    """The message in one line, where it begins with an argument of Python's with that of the command line."""
    message = " ".join(message.split())
    found = re.match(r"(\w+) is ", message)
    if not found or found[1] not in _OPTIONS:
        return message
    return f"--{found[1].replace('_', '-')}{message[len(found[1]) :]}"


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
        _tell(error, _as_typed(str(error)))
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # not waiting for the other processes, which wait for this one
    sys.exit(code)
