"""The command line."""

from probdiff.cli.commands import main

__all__ = ["main"]
