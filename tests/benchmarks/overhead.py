"""One step of `probdiff.fit` against the same mathematics by hand in JAX and Optax.

    python -m tests.benchmarks.overhead

At-time objective, learned β_t, T = 40, diagonal covariance, batch 512. Both run the same number of steps in one
compiled loop, in turn, in one process; both draw their times evenly. First, both losses are worked out at the same
params, data and draws, and compared. Last, the cost of `fit`'s weighted times, which are set anew at every check: every
500 steps, or every 100 with validation data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

import probdiff
from probdiff import networks, schedules
from probdiff.fitting import loop
from tests.benchmarks import bare
from tests.benchmarks.timing import alternate, parser, report, spread

STEPS, BATCH = 500, 512
SHAPES = ((2, 128, 3), (64, 128, 3), (64, 512, 4))  # features, units and layers


def diffusion(D, width, depth, T):
    return probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(T), networks.ResidualMLP(width, depth))


def by_hand(params):
    """The params of the package as those of `bare`."""
    network, beta = params["network$params"], params["beta"]

    def layer(linear):
        return linear.weight, linear.bias

    return {
        "network": {
            "first": layer(network.first),
            "blocks": [layer(block) for block in network.blocks],
            "shifts": [shift.weight for shift in network.shifts],
            "last": layer(network.last),
        },
        "logits": jnp.log(beta) - jnp.log1p(-beta),
    }


def losses(d, params, x_0, key):
    """Of the package and by hand, at the draws that the package makes."""
    svi = loop.make_svi(d, loop.Settings(batch_size=len(x_0)))
    _, guide_key = jax.random.split(key)
    guide = handlers.substitute(handlers.seed(d.forward_at_time, guide_key), data=params)
    draws = handlers.trace(guide).get_trace(x_0)
    q = draws["x_t"]["fn"]
    noise = (draws["x_t"]["value"] - q.mean) / jnp.sqrt(q.variance)
    hand = bare.loss(by_hand(params), x_0, draws["u"]["value"], noise, d.num_timesteps)
    return svi.loss.loss(key, params, svi.model, svi.guide, x_0), hand


def stretches(d, x, steps, check_every, times):
    """So many steps of the package in compiled stretches of `check_every`, to be called again and again."""
    settings = loop.Settings(20_000, BATCH, 1, check_every=check_every, times=times)
    keys = jax.random.split(jax.random.key(0), 1)
    state, _ = loop.start_state(d, settings, keys)

    def call():
        after = state
        for start in range(0, steps, check_every):
            after, *_ = loop.run_steps(d, settings, None, after, None, x, len(x), keys, start, start + check_every)
        jax.block_until_ready(after)

    return call


def programs(D, width, depth, T, steps=STEPS):
    """The same steps of the package and by hand, and of the package with weighted times."""
    d = diffusion(D, width, depth, T)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, D)), jnp.float32)
    hand = bare.init(jax.random.key(0), D, width, depth, T)
    opt_state, key = bare.optimizer(20_000).init(hand), jax.random.key(3)

    def plain():
        return jax.block_until_ready(
            bare.run_steps(hand, opt_state, x, key, 0, steps, T=T, batch_size=BATCH, num_steps=20_000)
        )

    typical = probdiff.derivation.typical_params(d, key)
    ours, theirs = losses(d, typical, x[:BATCH], key)
    if not np.isclose(ours, theirs, rtol=1e-4):
        raise AssertionError(f"the losses differ: {ours} and {theirs}")
    return {
        "probdiff": stretches(d, x, steps, steps, "even"),
        "by hand": plain,
        "weighted, 500": stretches(d, x, steps, steps, "weighted"),
        "weighted, 100": stretches(d, x, steps, steps // 5, "weighted"),
    }, float(abs(ours / theirs - 1))


def main():
    small = parser(__doc__).parse_args().small
    rows, steps = [], 5 if small else STEPS
    for D, width, depth in [(2, 8, 1)] if small else SHAPES:
        candidates, difference = programs(D, width, depth, 40, steps)
        seconds = alternate(candidates, 2 if small else 9 if width < 512 else 5)
        rows.append({
            "D": D, "network": f"{depth}×{width}",
            "probdiff, ms a step": spread(1e3 * seconds["probdiff"] / steps),
            "by hand, ms a step": spread(1e3 * seconds["by hand"] / steps),
            "ratio": spread(seconds["probdiff"] / seconds["by hand"]),
            "losses differ by": f"{difference:.0e}",
            "weighted over even, 500 steps": spread(seconds["weighted, 500"] / seconds["probdiff"]),
            "100 steps": spread(seconds["weighted, 100"] / seconds["probdiff"]),
        })  # fmt: skip
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
