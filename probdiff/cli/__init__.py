"""The command line."""

from probdiff.cli.main import main

__all__ = ["main"]
