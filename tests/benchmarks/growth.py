"""How a step of `probdiff.fit` grows with T: its time, the time to compile it, and its memory.

    python -m tests.benchmarks.growth

At-time objective as `fit` has it (weighted times), learned β_t, 3×128, D = 2, diagonal covariance, batch 512. Each
repetition compiles anew, after all caches were cleared. Memory is XLA's own account of the compiled program: arguments,
results and temporaries.
`import` is that of the package beyond JAX's, `first step` that of a process from its start to the end of one step.
"""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.fitting import loop
from tests.benchmarks.overhead import diffusion
from tests.benchmarks.timing import alternate, parser, report, spread

TIMES, STEPS = (10, 100, 1000, 10_000), 500

FIRST = """
import time; start = time.perf_counter()
import jax, jax.numpy
jax_done = time.perf_counter()
import probdiff
done = time.perf_counter()
import numpy as np
from probdiff import networks, schedules
d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas({T}), networks.ResidualMLP())
x = np.random.default_rng(0).normal(size=(20_000, 2))
probdiff.fit(d, x, rng_key=jax.random.key(0), num_steps=1, progress_bar=False)
print(jax_done - start, done - jax_done, time.perf_counter() - start)
"""


def arguments(T):
    """What a stretch of steps is compiled for, and the arrays that it then takes."""
    d, x = diffusion(2, 128, 3, T), jnp.asarray(np.random.default_rng(0).normal(size=(20_000, 2)), jnp.float32)
    settings = loop.Settings(20_000, 512, 1, check_every=STEPS, times="weighted")
    keys = jax.random.split(jax.random.key(0), 1)
    state, _ = loop.start_state(d, settings, keys)
    return (d, settings, None), (state, None, x, len(x), keys, 0, STEPS)


def main():
    small = parser(__doc__).parse_args().small
    times, repetitions = (TIMES[:1], 1) if small else (TIMES, 5)
    compiled, seconds_to_compile = {}, {T: [] for T in times}
    for _ in range(repetitions):
        for T in times:
            jax.clear_caches()
            static, arrays = arguments(T)
            start = time.perf_counter()
            compiled[T] = (loop.run_steps.lower(*static, *arrays).compile(), arrays)
            seconds_to_compile[T].append(time.perf_counter() - start)
    steps = {T: (lambda c=c, a=a: jax.block_until_ready(c(*a))) for T, (c, a) in compiled.items()}
    seconds = alternate(steps, 1 if small else 7)
    rows = []
    for T in times:
        memory = compiled[T][0].memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        rows.append({
            "T": T,
            "ms a step": spread(1e3 * seconds[T] / STEPS),
            "over T = 10": spread(seconds[T] / seconds[10]),
            "compile, s": spread(np.array(seconds_to_compile[T])),
            "compile over T = 10": spread(np.array(seconds_to_compile[T]) / seconds_to_compile[10]),
            "memory, MiB": round(size / 2**20, 2),
        })  # fmt: skip
        rows[-1]["memory over T = 10"] = round(rows[-1]["memory, MiB"] / rows[0]["memory, MiB"], 3)
    for T in (40,) if small else (40, 1000):
        found = [
            [float(s) for s in subprocess.run(
                [sys.executable, "-c", FIRST.format(T=T)], check=True, capture_output=True, text=True
            ).stdout.split()] for _ in range(repetitions)
        ]  # fmt: skip
        of_jax, of_package, first = np.array(found).T
        print(f"T = {T}: import jax {spread(of_jax)} s, import probdiff beyond it {spread(of_package)} s, "
              f"first step {spread(first)} s")  # fmt: skip
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
