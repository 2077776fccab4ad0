"""`fit` on a .npy file of 20 GiB, made here and deleted again: the memory that it takes, and its speed.

    python -m tests.benchmarks.streaming

The file holds 64 features, D/2 swiss rolls side by side, the rows of 64 MiB written over and over. The same steps are
timed on as many rows in memory as a buffer holds, each in a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import probdiff
from probdiff import datasets, networks, schedules, streams
from tests.benchmarks.timing import parser, report

D = 64


def write(path, blocks):
    rows = 2**26 // (4 * D)
    roll = np.asarray(datasets.SwissRoll().sample(jax.random.key(0), rows), np.float32)
    block = np.concatenate([np.roll(roll, i, axis=0) for i in range(D // 2)], axis=1)
    header = {"descr": "<f4", "fortran_order": False, "shape": (blocks * rows, D)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(blocks):
            block.tofile(file)


def anonymous():
    """MiB of memory of this process that is not of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def measure(path, streamed, num_steps):
    """One fit, in this process: its row of the table."""
    x = streams.stream(path) if streamed else np.array(np.load(path, mmap_mode="r")[:256_000])
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(40), networks.ResidualMLP())
    moments, of_moments = streams.Stream.moments, 0.0

    def timed(self):
        nonlocal of_moments
        start = time.perf_counter()
        found = moments(self)
        of_moments = time.perf_counter() - start
        return found

    streams.Stream.moments = timed
    before, start = anonymous(), time.perf_counter()
    fit = probdiff.fit(d, x, rng_key=jax.random.key(0), num_steps=num_steps, progress_bar=False)
    return {
        "pass for the moments, s": round(of_moments, 1),
        f"{num_steps} steps, s": round(time.perf_counter() - start - of_moments, 1),
        "grown by, MiB": round(anonymous() - before),
        "most resident, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "loss, nats": round(float(fit.losses[-500:].mean()), 2),
    }


def main():
    options = parser(__doc__)
    options.add_argument("--gib", type=int, default=20)
    options.add_argument("--row", nargs=2, metavar=("PATH", "STREAMED"), help="one fit, in this process")
    args = options.parse_args()
    if args.row:
        path, streamed = args.row
        print(json.dumps(measure(path, streamed == "yes", 50 if args.small else 5000)))
        return
    size = "64 MiB" if args.small else f"{args.gib} GiB"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.npy"
        write(path, 1 if args.small else 16 * args.gib)
        for name, streamed in ((f"stream of {size}", "yes"), ("256,000 rows in memory", "no")):
            command = [sys.executable, "-m", "tests.benchmarks.streaming", "--row", str(path), streamed]
            command += ["--small"] * args.small
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"data": name, **json.loads(found.splitlines()[-1])})
    report(__file__, rows, save=not args.small)


if __name__ == "__main__":
    main()
