"""One step of `probdiff.fit` against the same mathematics by hand in JAX and Optax, and how each grows with T.

    python -m tests.benchmarks.overhead

At-time objective, learned β_t, diagonal covariance, batch 512. Both run the same number of steps in one compiled loop,
in turn, in one process. First, both losses are worked out at the same params, data and draws, and compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

import probdiff
from probdiff import networks, schedules, training
from tests.benchmarks import bare
from tests.benchmarks.timing import alternate, report, spread

STEPS, BATCH = 200, 512


def diffusion(D, width, depth, T):
    return probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(T), networks.ResidualMLP(width, depth))


def by_hand(params):
    """The params of the package as those of `bare`."""
    network, beta = params["network$params"], params["beta"]
    layer = lambda linear: (linear.weight, linear.bias)  # noqa: E731
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
    loss = training.make_svi(d, training.Settings(batch_size=len(x_0)))
    _, guide_key = jax.random.split(key)
    guide = handlers.substitute(handlers.seed(d.forward_at_time, guide_key), data=params)
    draws = handlers.trace(guide).get_trace(x_0)
    q = draws["x_t"]["fn"]
    noise = (draws["x_t"]["value"] - q.mean) / jnp.sqrt(q.variance)
    hand = bare.loss(by_hand(params), x_0, draws["u"]["value"], noise, d.num_timesteps)
    return loss.loss.loss(key, params, loss.model, loss.guide, x_0), hand


def programs(D, width, depth, T, steps=STEPS, batch=BATCH):
    """Chunks of steps of the package and by hand, to be called again and again."""
    d, x = diffusion(D, width, depth, T), np.random.default_rng(0).normal(size=(20_000, D)).astype(np.float32)
    settings = training.Settings(20_000, batch, 1, check_every=steps)
    svi, keys = training.make_svi(d, settings), jax.random.split(jax.random.key(0), 1)
    x = jnp.asarray(x)
    state, _ = training.start_state(svi, x[:batch], keys)
    run = training.make_steps(d, svi, settings, None)
    hand = bare.init(jax.random.key(0), D, width, depth, T)
    opt_state = bare.optimizer(20_000).init(hand)

    def package():
        return jax.block_until_ready(run(state, None, x, len(x), keys, 0, steps))

    def plain():
        return jax.block_until_ready(
            bare.run_steps(hand, opt_state, x, keys[0], 0, steps, T=T, batch_size=batch, num_steps=20_000)
        )

    key = jax.random.key(3)
    typical = probdiff.derivation.typical_params(d, key)
    ours, theirs = losses(d, typical, x[:batch], key)
    if not np.isclose(ours, theirs, rtol=1e-4):
        raise AssertionError(f"the losses differ: {ours} and {theirs}")
    return {"probdiff": package, "by hand": plain}, float(abs(ours / theirs - 1))


def main():
    rows = []
    for D, width, depth in ((2, 128, 3), (64, 128, 3), (64, 512, 4)):
        steps = STEPS if width < 512 else 20
        pair, difference = programs(D, width, depth, 40, steps)
        seconds = alternate(pair, 9)
        rows.append({
            "D": D, "network": f"{depth}×{width}",
            "probdiff, ms a step": spread(1e3 * seconds["probdiff"] / steps),
            "by hand, ms a step": spread(1e3 * seconds["by hand"] / steps),
            "ratio": spread(seconds["probdiff"] / seconds["by hand"]),
            "losses differ by": f"{difference:.0e}",
        })  # fmt: skip
    report(__file__, rows)


if __name__ == "__main__":
    main()
