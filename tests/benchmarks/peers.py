"""Steps of `probdiff.fit` against the same loss and network in PyTorch, and against the usual loop with diffusers.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.peers

PyTorch in an eager loop and with the loss through `torch.compile`, on the CPU with as many threads as cores; the losses
are compared first, at the same params and draws. T = 40, learned β_t, diagonal covariance, batch 512. The loop with
diffusers learns no β_t and no variance, and its loss is the simple one. All draw their times evenly.
"""

import jax
import numpy as np

from tests.benchmarks import bare
from tests.benchmarks.overhead import BATCH, SHAPES, programs
from tests.benchmarks.timing import alternate, missing, parser, report, spread


def check_losses(D, width, depth, T):
    import torch

    from tests.benchmarks import bare_torch

    params = bare.init(jax.random.key(0), D, width, depth, T)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    x_0, noise, u = (*rng.normal(size=(2, BATCH, D)).astype(np.float32), 0.3)
    ours = bare.loss(params, x_0, u, noise, T)
    theirs = bare_torch.Diffusion.of(params, T)(torch.tensor(x_0), torch.tensor(u), torch.tensor(noise))
    if not np.isclose(ours, theirs.item(), rtol=1e-4):
        raise AssertionError(f"the losses differ: {ours} and {theirs}")


def taken(run, steps):
    """A program without arguments that takes so many steps."""
    return lambda: run(steps)


def main():
    small = parser(__doc__).parse_args().small
    if missing("torch", "diffusers"):
        return
    import torch

    from tests.benchmarks import bare_torch

    rows = []
    for D, width, depth in [(2, 8, 1)] if small else SHAPES:
        check_losses(D, width, depth, 40)
        steps = 5 if small else 200 if width < 512 else 20
        pair, _ = programs(D, width, depth, 40, steps)
        x = torch.randn(20_000, D)
        eager, compiled = (bare_torch.Diffusion(D, width, depth, 40) for _ in range(2))
        loops = {
            "PyTorch": bare_torch.training(eager, x, BATCH, 20_000),
            "torch.compile": bare_torch.training(compiled, x, BATCH, 20_000, compiled=True),
            "diffusers": bare_torch.diffusers_training(D, width, depth, 40, x, BATCH, 20_000),
        }
        candidates = {"probdiff": pair["probdiff"]} | {name: taken(run, steps) for name, run in loops.items()}
        seconds = alternate(candidates, 2 if small else 7)
        row = {"D": D, "network": f"{depth}×{width}", "probdiff, steps/s": spread(steps / seconds["probdiff"])}
        for name in loops:
            row[f"{name}, steps/s"] = spread(steps / seconds[name])
            row[f"over {name}"] = spread(seconds[name] / seconds["probdiff"])
        rows.append(row)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
