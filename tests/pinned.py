"""Gives each worker of pytest-xdist a core of its own, since threads of several on all cores wait for others."""

import os

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
