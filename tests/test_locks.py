"""Threads that use fits side by side, cold, each with shapes of its own."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax
import numpy as np
import pytest
from helpers.diffusions import fit_of, light_diffusion, linear_diffusion, random_linear

import probdiff
from probdiff import GaussianDiffusion, schedules

KEY = jax.random.key(0)
THREADS = 8


def at_once(work, count):
    """What `work` gives for 0, 1, …, called by as many threads that start together."""
    together = Barrier(count)

    def start(i):
        together.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def test_eight_threads_give_what_one_gives():
    x = np.random.default_rng(0).normal(size=(20, 2))
    networks = linear_diffusion("fixed")

    def work(i):
        d = GaussianDiffusion((2,), schedules.linear(2 + i), networks.network, "fixed")
        fit = fit_of(d, random_linear(d))
        return fit.log_likelihood(x, rng_key=KEY, num_draws=2).values, fit.sample(KEY, 4)

    found = at_once(work, THREADS)
    for i in range(THREADS):
        for values, wanted in zip(found[i], work(i), strict=True):
            np.testing.assert_array_equal(values, wanted)


@pytest.mark.slow
def test_two_threads_fit_side_by_side():
    x = np.random.default_rng(0).normal(size=(200, 2))

    def work(i):
        options = {"num_steps": 40, "batch_size": 32 + i, "check_every": 20, "progress_bar": False, "validation": 0.2}
        fit = probdiff.fit(light_diffusion(), x, rng_key=KEY, **options)
        return fit.losses, fit.log_likelihood(x, rng_key=KEY, method="iwae").values

    for found, i in zip(at_once(work, 2), range(2), strict=True):
        for values, wanted in zip(found, work(i), strict=True):
            np.testing.assert_array_equal(values, wanted)
