"""The command line: `probdiff check`."""

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from numpyro import handlers

from probdiff import datasets, derivation, networks, schedules
from probdiff.chains import BinomialDiffusion, Diffusion, GaussianDiffusion
from probdiff.cli.app import app
from probdiff.runs import Run


@app.command()
def check(
    run: Annotated[
        Path | None,
        typer.Argument(help="run folder; or swiss-roll or heartbeat, not yet fitted, T = 40 [default: swiss-roll]"),
    ] = None,
    chain: Annotated[int | None, typer.Option(help="which of the fits [default: the best]")] = None,
    num_draws: Annotated[int, typer.Option(help="paths for each datum")] = 1000,
    max_data: Annotated[int, typer.Option(help="held-out data to use")] = 16,
    float32: Annotated[bool, typer.Option("--float32", help="in single precision [default: double]")] = False,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
) -> None:
    """Check the derivation, N1…N17, on a pair of chains: one row for each statement. Exits with 1 where one fails."""
    keys = jax.random.split(jax.random.key(seed), 3)
    key, key_data, key_params = (keys[i] for i in range(3))
    schedule, network = schedules.LearnedBetas(40), networks.ResidualMLP()
    starts: dict[str, tuple[Any, Diffusion]] = {
        "swiss-roll": (datasets.SwissRoll(0.5), GaussianDiffusion((2,), schedule, network, "full")),
        "heartbeat": (datasets.Heartbeat(), BinomialDiffusion((20,), schedule, network)),
    }
    name = "swiss-roll" if run is None else str(run)
    opened = None if name in starts and not Path(name).exists() else Run.open(Path(name))
    kept = None if opened is None else opened.kept()  # in the precision of the fit, whose held-out rows may be drawn
    with jax.enable_x64(not float32):
        if kept is None:
            data, d = starts[name]
            x = np.asarray(jax.jit(data.sample, static_argnums=1)(key_data, max_data))
            params = derivation.typical_params(d, key_params)
        else:
            fitted, data_split = kept
            d = fitted.diffusion
            fitted = fitted.chain(fitted.best if chain is None else chain)
            x, params = fitted.standardise(data_split.test), fitted.params
        ledger = derivation.check(
            d.reverse,
            d.forward,
            x,
            rng_key=key,
            params=params,
            beta=handlers.substitute(d.schedule, data=params)().beta if "beta" not in params else None,
            forms=derivation.forms(d),
            num_draws=num_draws,
            max_data=max_data,
        )
    print(ledger)
    raise typer.Exit(1 if ledger.failures else 0)
