"""The command line: `probdiff fit`, `report`, `sample` and `impute`."""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pandas as pd
import typer

from probdiff import datasets, families
from probdiff.baselines import baselines
from probdiff.checks import check_count
from probdiff.cli.app import app
from probdiff.cli.evaluation import how_it_ended
from probdiff.cli.evaluation import report as report_on
from probdiff.cli.processes import start_processes
from probdiff.files import atomic_write
from probdiff.fitting import devices
from probdiff.fitting.fit import fit as fit_diffusion
from probdiff.posterior.imputation import NUM_FILTERS
from probdiff.posterior.imputation import impute as impute_table
from probdiff.results import Fit
from probdiff.runs import SCHEDULES, Run, described
from probdiff.types import Key

_FILES = ", ".join(datasets.READERS)
_DATA = (
    f"swiss-roll, 8-gaussians, digits, wine, breast-cancer, or a file in {_FILES}; of bits heartbeat, binary-digits, "
    "or a file with --binary"
)
_PATIENCE = (
    "checks without progress on held-out rows before stopping; 0: never [default: 20 for real data, 0 else; of few "
    "rows each fifth is held out in turn]"
)
_TIMESTEPS = "T [default: 40, of a short chain 4, of bits 200]"
_COMPONENTS = "Gaussians, or products of Bernoullis, that a kernel mixes [default: 1, of a short chain 16]"
_DEPTH = "blocks of the network [default: 3, of a short chain 2]"
_STEPS = "steps of SVI [default: 20,000, of a short chain 8,000]"
_LEARNING_RATE = "of Adam, at the start [default: 0.002, of few rows 0.001, of a short chain 0.004]"
_COVARIANCE = "fixed, diagonal or full [default: full for up to 16 features with 100 rows for each, diagonal else]"
_SCHEDULE = f"{', '.join(SCHEDULES)} [default: learned-betas, of bits harmonic]"
_GIVEN = "file of rows that are known in part, in empty cells or whole columns: -n draws for each, with its number"
_PARTICLES = 500  # of each filter, where no more are wanted
_FEW_DRAWS = 100  # effective ones, from where they are said to be enough
_PROCESSES = "processes that share the fit, started here; 0: this is one of those that SLURM or Open MPI started"


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help=_DATA)] = "swiss-roll",
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/DATA]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run stopped, or for more steps")] = False,
    columns: Annotated[str | None, typer.Option(help="columns of a file to use, separated by commas")] = None,
    dequantise: Annotated[bool, typer.Option("--dequantise", help="add uniform noise to integer data")] = False,
    binary: Annotated[bool, typer.Option("--binary", help="the file holds bits, 0 or 1")] = False,
    test_fraction: Annotated[float, typer.Option(help="rows of real data that are held out")] = 0.2,
    noise: Annotated[float, typer.Option(help="noise of the swiss roll")] = 0.5,
    num_timesteps: Annotated[int | None, typer.Option(help=_TIMESTEPS)] = None,
    schedule: Annotated[str | None, typer.Option(help=_SCHEDULE)] = None,
    covariance: Annotated[families.Covariance | None, typer.Option(help=_COVARIANCE)] = None,
    base_rate: Annotated[float, typer.Option(help="of bits: π, the rate of x_T")] = 0.5,
    components: Annotated[int | None, typer.Option(help=_COMPONENTS)] = None,
    width: Annotated[int, typer.Option(help="units of each block of the network")] = 128,
    depth: Annotated[int | None, typer.Option(help=_DEPTH)] = None,
    num_steps: Annotated[int | None, typer.Option(help=_STEPS)] = None,
    batch_size: Annotated[int | None, typer.Option(help="data to a step [default: 512, or all if fewer]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=_LEARNING_RATE)] = None,
    patience: Annotated[int | None, typer.Option(help=_PATIENCE)] = None,
    num_chains: Annotated[int, typer.Option(help="independent fits")] = 2,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    processes: Annotated[int, typer.Option(help=_PROCESSES)] = 1,
) -> None:  # fmt: skip
    """Fit a diffusion, and leave a run folder with figures, a table and an ArviZ file.

    With 5,000 rows to fit or more, and 100 or more for each of up to 16 features, the default is a short chain of
    mixtures with learned β_t: T = 4 and 16 components. --components 1 gives a long one of Gaussians, T = 40.
    """
    of_bits = binary or data in datasets.BITS
    options = {
        "data": data,
        "columns": columns,
        "dequantise": dequantise,
        "binary": binary,
        "test_fraction": test_fraction,
        "noise": noise,
        "num_timesteps": num_timesteps,
        "schedule": schedule or ("harmonic" if of_bits else "learned-betas"),
        "covariance": covariance,
        "base_rate": base_rate,
        "components": components,
        "width": width,
        "depth": depth,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patience": patience,
        "num_chains": num_chains,
        "seed": seed,
    }
    if processes < 0:
        raise ValueError(f"--processes is {processes}; it must be 1 or more, or 0 for one of those started elsewhere")
    if processes != 1 and not jax.distributed.is_initialized():
        if processes:
            raise typer.Exit(start_processes(processes))
        jax.distributed.initialize()
    elif processes == 1:
        devices.one_for_each_fit(num_chains)
    first = jax.process_index() == 0
    run = Run(out or Path("runs") / Path(data).stem, options)
    data_split = run.data()
    train = data_split.train
    size, bits = train.shape[1], np.issubdtype(train.dtype, np.integer)
    run = run.resolved(len(train), size, bits, resume)
    d = run.diffusion(len(train), size, bits)
    devices.from_first_process(lambda: run.check_free(resume))
    if first:
        print(
            f"{data}: {len(train):,} rows to fit, {len(data_split.test):,} held out, {train.shape[1]} features; "
            f"T = {d.num_timesteps}, {run.options['schedule']}, {described(d)}, {num_chains} chain(s)",
            flush=True,
        )
    start = time.perf_counter()
    fitted = fit_diffusion(
        d,
        pd.DataFrame(train, columns=list(data_split.features)),
        rng_key=jax.random.key(seed),
        whole=data_split.whole,
        num_steps=run.options["num_steps"],
        batch_size=batch_size,
        num_chains=num_chains,
        learning_rate=run.options["learning_rate"],
        **run.stopping(data_split),
        checkpoint_dir=run.folder / "checkpoints",
        resume=resume,
    )
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # the first process evaluates alone
    if not first:
        return
    run.keep(fitted, data_split, {})  # before anything else can fail
    if data_split.density is None and not np.issubdtype(train.dtype, np.integer):
        run.keep(fitted, data_split, baselines(train, data_split.test, seed))
    print(how_it_ended(fitted, run.options["num_steps"]), end="")
    report_on(run, fitted, data_split, fitting=time.perf_counter() - start)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Evaluate a fitted run again: its table, its figures and its ArviZ file."""
    opened = Run.open(run)
    report_on(opened, *opened.kept())


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="run folder")],
    out: Annotated[Path, typer.Option(help=".npy, .csv or .parquet file to write")],
    n: Annotated[int, typer.Option("-n", "--num-samples", help="how many")] = 1000,
    given: Annotated[Path | None, typer.Option(help=_GIVEN)] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    chain: Annotated[int | None, typer.Option(help="which of the fits [default: the best]")] = None,
) -> None:
    """Draw x_0 from a fitted run, in the data's own units: by ancestral sampling, or given what is known of rows."""
    if out.suffix.lower() not in datasets.WRITTEN:
        raise ValueError(f"--out is {out}; it must end in {', '.join(datasets.WRITTEN)}")
    check_count(n, "-n", 1)
    fitted, data_split = Run.open(run).kept()
    chosen = fitted.best if chain is None else chain
    fitted, key = fitted.chain(chosen), jax.random.key(seed)
    if given is None:
        frame = pd.DataFrame(fitted.sample(key, n), columns=list(data_split.features))
        frame = frame.astype(dict.fromkeys(data_split.whole, int))
    else:
        num_particles = max(_PARTICLES, -(-n // NUM_FILTERS))
        frame, _ = _filled(fitted, data_split, datasets.read_frame(given, None), given, key, n, num_particles)
    with atomic_write(out) as file:
        if out.suffix.lower() == ".npy":
            with file.open("wb") as stream:
                np.save(stream, frame[list(data_split.features)].to_numpy(np.float64 if given else None))
        elif out.suffix.lower() == ".csv":
            frame.to_csv(file, index=False)
        else:
            frame.to_parquet(file, index=False)
    print(f"{n:,} draws {'' if given is None else 'for each row '}of chain {chosen} in {out}")


@app.command()
def impute(
    run: Annotated[Path, typer.Argument(help="run folder")],
    table: Annotated[Path, typer.Argument(help=f"file in {_FILES} with empty cells, or NaN")],
    out: Annotated[Path | None, typer.Option(help=".csv file to write [default: RUN/TABLE-imputed.csv]")] = None,
    num_draws: Annotated[int, typer.Option("-m", "--num-draws", help="how many for each row")] = 10,
    num_particles: Annotated[int, typer.Option(help=f"particles of each of {NUM_FILTERS} filters")] = _PARTICLES,
    separate: Annotated[bool, typer.Option("--separate", help="a table for each draw: OUT-0.csv, OUT-1.csv …")] = False,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    chain: Annotated[int | None, typer.Option(help="which of the fits [default: the best]")] = None,
) -> None:
    """Fill the empty cells of a table with draws given the other cells of the row, and leave an ArviZ file beside."""
    check_count(num_draws, "--num-draws", 1)
    check_count(num_particles, "--num-particles", max(25, -(-num_draws // NUM_FILTERS)))
    out = out or run / f"{table.stem}-imputed.csv"
    if out.suffix.lower() != ".csv":
        raise ValueError(f"--out is {out}; it must end in .csv")
    fitted, data_split = Run.open(run).kept()
    fitted = fitted.chain(fitted.best if chain is None else chain)
    given = datasets.read_frame(table, None)
    if lacking := [name for name in data_split.features if name not in given.columns]:
        raise ValueError(f"{table} has no column {lacking[0]!r}; its columns are {', '.join(given.columns)}")
    filled, dt = _filled(fitted, data_split, given, table, jax.random.key(seed), num_draws, num_particles)
    tree = out.with_name(f"{out.stem}-draws.nc")
    tables = {out: filled}
    if separate:
        by_draw = filled.groupby("draw")
        tables = {out.with_name(f"{out.stem}-{i}.csv"): one[list(given.columns)] for i, one in by_draw}
    for path, one in tables.items():
        with atomic_write(path) as file:
            one.to_csv(file, index=False)
    with atomic_write(tree) as file:
        dt.to_netcdf(file, engine="h5netcdf")
    least = dt["evidence"].dataset["effective_draws"].to_numpy().min()
    behind = f"at least {least:,.0f}" if least >= _FEW_DRAWS else f"only {least:,.0f}"
    empty = int(given[list(data_split.features)].isna().to_numpy().sum())
    where = f"{next(iter(tables))} and so on" if separate else out
    print(
        f"{empty:,} empty cells in {len(given):,} rows filled {num_draws} times in {where}, all draws in {tree}; "
        f"{behind} effective draws behind the worst of them"
    )


def _filled(
    fit: Fit, data_split: datasets.Split, given: Any, path: Path, key: Key, num_draws: int, num_particles: int
) -> tuple[pd.DataFrame, Any]:
    """The rows of a table, each so many times, with draws in the cells that are empty and features that it lacks.

    Its other columns are kept, and "row" and "draw", from 0, come before them.
    """
    if taken := {"row", "draw"} & set(given.columns):
        raise ValueError(f"{path} has a column {taken.pop()!r}, as the filled table has; rename it")
    features = list(data_split.features)
    known = [name for name in features if name in given.columns]
    if not known:
        raise ValueError(
            f"{path} has none of the columns {', '.join(features)}; its own are {', '.join(given.columns)}"
        )
    x = pd.DataFrame(datasets.frame_numbers(given[known], str(path), integers=True), columns=known)
    frame, dt = impute_table(
        fit,
        x.reindex(columns=features).to_numpy(),
        features,
        np.isin(features, data_split.whole),
        rng_key=key,
        num_draws=num_draws,
        num_particles=num_particles,
    )
    # known cells stay as they are, also where they are no integers
    integers = [name for name in data_split.whole if (frame[name] == np.floor(frame[name])).all()]
    frame = frame.astype(dict.fromkeys(integers, int))
    others = given.loc[:, [name for name in given.columns if name not in features]].iloc[frame["row"]]
    frame = pd.concat([frame, others.reset_index(drop=True)], axis=1)
    order = [*given.columns, *(name for name in features if name not in known)]
    return frame[["row", "draw", *order]], dt
