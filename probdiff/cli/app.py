"""The command line's application, to which each command adds itself."""

from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(
    help="Diffusion probabilistic models as NumPyro programs.", rich_markup_mode=None, pretty_exceptions_enable=False,
    add_completion=False, no_args_is_help=True,
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"probdiff {version('probdiff')}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and no more")


@app.callback()
def root(version: Annotated[bool, _VERSION] = False) -> None:
    """Diffusion probabilistic models as NumPyro programs."""
