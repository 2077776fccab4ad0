"""`fit` on a .npy file of 20 GiB, made here and deleted again: the memory that it takes, and its speed.

    python -m tests.benchmarks.streaming

The file holds 64 features, D/2 swiss rolls side by side, the rows of 64 MiB written over and over. The same steps are
timed on as many rows in memory as a buffer holds.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import probdiff
from probdiff import datasets, networks, schedules, streams
from tests.benchmarks.timing import report

D = 64


def write(path, gib):
    rows = 2**26 // (4 * D)
    roll = np.asarray(datasets.SwissRoll().sample(jax.random.key(0), rows), np.float32)
    block = np.concatenate([np.roll(roll, i, axis=0) for i in range(D // 2)], axis=1)
    header = {"descr": "<f4", "fortran_order": False, "shape": (16 * gib * rows, D)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(16 * gib):
            block.tofile(file)


def anonymous():
    """MiB of memory of this process that is not of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, default=20)
    gib = parser.parse_args().gib
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(40), networks.ResidualMLP())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.npy"
        write(path, gib)
        small = np.array(np.load(path, mmap_mode="r")[:256_000])
        for name, x in ((f"stream of {gib} GiB", streams.stream(path)), ("256,000 rows in memory", small)):
            before, start = anonymous(), time.perf_counter()
            if isinstance(x, streams.Stream):
                x.moments()
            moments = time.perf_counter() - start
            start = time.perf_counter()
            fit = probdiff.fit(d, x, rng_key=jax.random.key(0), num_steps=5000, progress_bar=False)
            seconds = time.perf_counter() - start - moments
            rows.append({
                "data": name,
                "pass for the moments, s": round(moments, 1),
                "5000 steps, s": round(seconds, 1),
                "grown by, MiB": round(anonymous() - before),
                "most resident, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
                "loss, nats": round(float(fit.losses[-500:].mean()), 2),
            })  # fmt: skip
    report(__file__, rows)


if __name__ == "__main__":
    main()
