"""What kernels of several components cost in a step, and how far the estimates of their ELBO spread.

    python -m tests.benchmarks.kernels

A step is one of `probdiff.fit` at T = 5 with full covariances, learned β_t and batch 512, in one compiled loop; the
numbers of components take turns. The spread is that of one estimate of K of a datum of the swiss roll, after a fit of
8,000 steps at T = 4: over 1,000 data, from one plain draw of every x_{t−1}, and from the closed form and the rest that
a fit takes; over 10,000 data, as an evaluation takes it, with several components along one path. `mcse` is that of K of
the 10,000 by 8 of the last.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.fitting import loop
from probdiff.likelihood.elbo import elbo_term
from tests.benchmarks.timing import alternate, parser, report, spread


def stretch(D, M, steps):
    """So many steps of a fit in one compiled loop, to be called again and again."""
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(5), networks.ResidualMLP(), "full", M)
    settings = loop.Settings(20_000, 512, times="even")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, D)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 1)
    state, _ = loop.start_state(d, settings, keys)

    def call():
        after, *_ = loop.run_steps(d, settings, None, state, None, x, len(x), keys, 0, steps)
        jax.block_until_ready(after)

    return call


def term_of_a_draw(d, noise, kernel, x_0, rng_key, t):
    """log p − log q at one draw of x_t and one of x_{t−1}: the term of K at t without a closed form."""
    key_t, key_prev = jax.random.split(rng_key)
    x_t = d.family.marginal(x_0, noise, t).sample(key_t)
    q, p = d.family.posterior(x_t, x_0, noise, jnp.maximum(t, 2)), kernel(x_t, t)
    x_prev = q.sample(key_prev)
    return jnp.where(t == 1, p.log_prob(x_0), p.log_prob(x_prev) - q.log_prob(x_prev))


def spreads(M, small):
    """Standard deviations of one estimate of K of a datum, and `mcse` of K, after a fit to the swiss roll."""
    roll, draws = datasets.SwissRoll(0.5), 100
    x, test = (np.asarray(roll.sample(jax.random.key(i), n)) for i, n in enumerate((100_000, 100 if small else 10_000)))
    d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas(4), networks.ResidualMLP(), "full", M)
    fit = probdiff.fit(d, x, rng_key=jax.random.key(2), num_steps=20 if small else 8_000, progress_bar=False)
    rows = jnp.asarray(fit.standardise(test[:1000]))

    @jax.jit
    def sums(keys):
        def program():
            noise, kernel = d.kernels()

            def one(term):
                def of_key(key):
                    key_t = jax.random.split(key, d.num_timesteps)
                    times = enumerate(key_t, 1)
                    return sum(term(d, noise, kernel, rows, k, jnp.full(len(rows), t)) for t, k in times)

                return jax.lax.map(of_key, keys)

            return one(term_of_a_draw), one(elbo_term)

        return handlers.substitute(program, data=fit.params)()

    found = [np.asarray(value, float) for value in sums(jax.random.split(jax.random.key(3), draws))]
    plain, rest = (np.sqrt(value.var(0, ddof=1).mean()) for value in found)
    bound = fit.log_likelihood(test, rng_key=jax.random.key(4), num_draws=8)
    evaluated = np.sqrt(8 * np.mean(bound.values_mcse**2))
    sd = {"sd of K: plain draw": plain, "as fitted": rest, "as evaluated": evaluated}
    return {name: float(value) for name, value in sd.items()} | {"mcse of K": f"{bound.mcse:.4f}"}


def main():
    small = parser(__doc__).parse_args().small
    rows, steps = [], 3 if small else 100
    for D in (2,) if small else (2, 5, 8, 16):
        seconds = alternate({M: stretch(D, M, steps) for M in (1, 8, 16)}, 1 if small else 5)
        for M, values in seconds.items():
            row = {"D": D, "M": M, "ms a step": spread(1e3 * values / steps), "over M = 1": spread(values / seconds[1])}
            rows.append(row | (spreads(M, small) if D == 2 else {}))
            print(rows[-1], flush=True)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
