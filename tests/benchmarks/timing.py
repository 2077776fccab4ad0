"""Timing of alternatives in turn, in one process, and the tables and files that the benchmarks leave."""

import argparse
import datetime
import importlib.util
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from probdiff.files import atomic_write


def alternate(programs, repetitions=7):
    """Seconds of each program, (repetitions,) arrays, run in turn after one call of each that does not count."""
    for program in programs.values():
        program()
    seconds = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values, digits=3):
    """The median, and the range of the repetitions."""
    return f"{np.median(values):.{digits}g} ({np.min(values):.{digits}g}–{np.max(values):.{digits}g})"


def parser(description):
    """Options of a benchmark, `--small` among them."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="less than a minute, to see that it runs; saves nothing")
    return made


def missing(*modules):
    """Those of the peers that are not installed, which one line says."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}; see tests/benchmarks/requirements.txt", flush=True)
    return absent


def machine():
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{len(jax.devices())} × {jax.devices()[0].device_kind} device, {cpu}, jax {jax.__version__}"


def report(script, rows, save=True):
    """Prints the rows as a table, with the date and the machine, and saves them beside the script if that is wanted."""
    frame = pd.DataFrame(rows)
    date, where = datetime.date.today().isoformat(), machine()
    print(f"\n{date}, {where}; median (least–most)\n{frame.to_string(index=False)}", flush=True)
    if not save:
        return
    with atomic_write(Path(script).with_suffix(".json")) as file:
        file.write_text(json.dumps({"date": date, "machine": where, "rows": rows}, indent=1, ensure_ascii=False))
