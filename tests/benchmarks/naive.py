"""`probdiff.fit` against NumPyro written naively: a sample site for each x_t, `Trace_ELBO`, one jitted update a step.

    python -m tests.benchmarks.naive

Swiss roll, learned β_t, full covariance, 3×128, batch 512, T = 10 and 40, five seeds in turn. The naive program is
`SVI(d.reverse, d.forward, adam, Trace_ELBO())`, N17 as it stands, with the learning rate that `fit` starts from. Its
gap L − K on held-out data is looked at every 200 steps until it is at most the target; looking is not counted. `fit`,
whose learning rate falls to zero, runs anew with more steps until it is; the time of the fit that reaches it counts.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.likelihood import paths
from tests.benchmarks.timing import parser, report, spread

TARGETS = {10: 0.10, 40: 0.05}
STEPS = (1000, 2000, 3000, 4500, 6000, 9000, 15_000)


def gap(d, params, held_out, exact):
    log_w = paths.log_importance_weights(d, params, held_out, rng_key=jax.random.key(9), num_draws=2)
    return float((exact - log_w.mean(0)).mean())


def package(d, x, held_out, exact, seed, target, attempts=STEPS):
    """Seconds to the target, by fits of more and more steps: each fit counts alone, compiled anew."""
    for num_steps in attempts:
        jax.clear_caches()
        start = time.perf_counter()
        fit = probdiff.fit(d, x, rng_key=jax.random.key(seed), num_steps=num_steps, progress_bar=False)
        seconds = time.perf_counter() - start
        # the data are standardised already, so that the fit's own standardisation all but changes nothing
        values = fit.standardise(held_out)
        if gap(d, fit.params, values, exact + fit.units.log_det) <= target:
            return seconds, num_steps
    return np.inf, num_steps


def naive(d, x, held_out, exact, seed, target, budget):
    jax.clear_caches()
    svi = SVI(d.reverse, d.forward, optax.adam(2e-3), Trace_ELBO())
    rng = np.random.default_rng(seed)
    x = jnp.asarray(x, jnp.float32)
    start = time.perf_counter()
    state = svi.init(jax.random.key(seed), x[:512])
    update = jax.jit(svi.update)
    state, loss = jax.block_until_ready(update(state, x[:512]))
    compiling, spent, steps = time.perf_counter() - start, 0.0, 1
    start = time.perf_counter()
    while compiling + spent < budget:
        for _ in range(200):
            state, loss = update(state, x[rng.integers(0, len(x), 512)])
        jax.block_until_ready(loss)
        steps += 200
        spent += time.perf_counter() - start
        if gap(d, svi.get_params(state), held_out, exact) <= target:
            return compiling + spent, steps, compiling, spent / steps
        start = time.perf_counter()
    return np.inf, steps, compiling, spent / steps


def main():
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--budget", type=float, default=400, help="seconds that the naive program gets")
    args = options.parse_args()
    targets, attempts, seeds = ({3: 10.0}, (50,), 1) if args.small else (TARGETS, STEPS, args.seeds)
    roll = datasets.SwissRoll(0.5)
    x, held_out = (
        np.asarray(roll.sample(jax.random.key(i), n)) for i, n in ((0, 100_000), (1, 500 if args.small else 10_000))
    )
    exact = np.asarray(roll.log_prob(held_out), float)
    rows = []
    for T, target in targets.items():
        found = []
        for seed in range(seeds):
            d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas(T), networks.ResidualMLP(), "full")
            ours, steps = package(d, x, held_out, exact, seed, target, attempts)
            theirs, their_steps, compiling, step = naive(d, x, held_out, exact, seed, target, args.budget)
            reached = np.isfinite(theirs)
            found.append((ours, theirs if reached else args.budget, compiling, 1e3 * step, reached, steps, their_steps))
            print(T, seed, found[-1], flush=True)
        ours, theirs, compiling, step, reached, steps, their_steps = np.array(found).T
        rows.append({
            "T": T, "target gap, nats": target,
            "probdiff, s": spread(ours), "its steps": spread(steps, 5),
            "naive, s": spread(theirs), "reached": f"{int(reached.sum())} of {len(found)}",
            "its steps ": spread(their_steps, 5),
            "of that to compile, s": spread(compiling), "naive, ms a step": spread(step),
            "naive over probdiff": spread(theirs / ours),
        })  # fmt: skip
    report(__file__, rows, save=not args.small)


if __name__ == "__main__":
    main()
