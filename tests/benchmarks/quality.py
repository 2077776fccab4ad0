"""Time to a good density on the ring of eight Gaussians, from the start of the process: chains and two flows.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.quality

10,000 training points, radius 2, σ = 0.15, whose entropy is log 8 + log(2πe·0.15²) = 1.1231 nats. Seconds count
imports, compilation and fitting, in a process of its own for each method and seed. The NLL is that entropy plus the
mean gap to the exact log density over 50,000 test points: for chains a bound, for the flows exact. The flows are
fitted in the usual way: flowjax's `fit_to_data`, and for zuko Adam on batches of 512 for 25 s or 115 s. Chains of T
steps and M components have networks of 3×64 units: with one component batches of 1,024, with several batches of 512 and
twice the default learning rate, 0.004. They take so many steps that they end after some 30 s, the longer ones after 90
to 120 s.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

START = time.perf_counter()

ENTROPY = 1.1230798  # log 8 + log(2πe·0.15²), up to e⁻¹³ for the overlap of neighbours
RUNS = {  # a method, and of a chain T, M and steps
    "T = 100, M = 1": "probdiff 100 1 6500",
    "T = 1, M = 8": "probdiff 1 8 7000",
    "T = 1, M = 16": "probdiff 1 16 5000",
    "T = 2, M = 16": "probdiff 2 16 3700",
    "T = 4, M = 16": "probdiff 4 16 3500",
    "flowjax": "flowjax",
    "zuko": "zuko 25",
    "T = 100, M = 1, longer": "probdiff 100 1 40000",
    "T = 1, M = 16, longer": "probdiff 1 16 30000",
    "T = 4, M = 16, longer": "probdiff 4 16 25000",
    "zuko, longer": "zuko 115",
}
SEEDS = 3
RESULTS = Path(__file__).with_suffix(".json")


def data(seed, num_test=50_000):
    import jax
    import numpy as np

    from probdiff import datasets

    ring = datasets.eight_gaussians()
    sizes = ((100 + seed, 10_000), (1, num_test))
    train, test = (np.asarray(ring.sample(jax.random.key(i), n)) for i, n in sizes)
    return train, test, np.asarray(ring.log_prob(test), float)


def chain(seed, T, M, num_steps):
    import jax

    import probdiff
    from probdiff import networks, schedules
    from probdiff.likelihood import paths

    T, M, num_steps = int(T), int(M), int(num_steps)
    train, test, exact = data(seed, 50_000 if num_steps > 1000 else 500)
    d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas(T), networks.ResidualMLP(64, 3), "full", M)
    batch = {"batch_size": 1024} if M == 1 else {"learning_rate": 4e-3}
    fit = probdiff.fit(d, train, rng_key=jax.random.key(seed), num_steps=num_steps, progress_bar=False, **batch)
    seconds = time.perf_counter() - START
    log_w = paths.log_importance_weights(d, fit.params, fit.standardise(test), rng_key=jax.random.key(7), num_draws=4)

    return seconds, exact - (log_w.mean(0) - fit.units.log_det)


def flowjax(seed):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    train, test, exact = data(seed)
    key_flow, key_fit = jax.random.split(jax.random.key(seed))
    flow = masked_autoregressive_flow(
        key_flow, base_dist=Normal(jnp.zeros(2)), transformer=RationalQuadraticSpline(knots=8, interval=4)
    )
    flow, _ = fit_to_data(key_fit, flow, train, show_progress=False)
    seconds = time.perf_counter() - START
    return seconds, exact - np.asarray(flow.log_prob(test), float)


def zuko(seed, seconds):
    import torch
    import zuko

    train, test, exact = data(seed)
    start = time.perf_counter()
    torch.manual_seed(seed)
    x, held_out = torch.tensor(train[1000:]), torch.tensor(train[:1000])
    flow = zuko.flows.NSF(features=2, transforms=3, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    best, best_state, step = float("inf"), None, 0
    while time.perf_counter() - start < float(seconds):
        loss = -flow().log_prob(x[torch.randint(len(x), (512,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            with torch.no_grad():
                value = -flow().log_prob(held_out).mean().item()
            if value < best:
                best, best_state = value, {name: leaf.clone() for name, leaf in flow.state_dict().items()}
    seconds = time.perf_counter() - START
    flow.load_state_dict(best_state)
    with torch.no_grad():
        return seconds, exact - flow().log_prob(torch.tensor(test)).double().numpy()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--small", action="store_true", help="less than a minute, to see that it runs; saves nothing")
    options.add_argument("--only", nargs="+", metavar="METHOD", help="these rows; the others are kept as they are")
    options.add_argument("--row", nargs="+", metavar="SEED, METHOD", help="one fit, in this process")
    args = options.parse_args()
    if args.row:
        seed, method, *rest = args.row
        fits = {"probdiff": chain, "flowjax": flowjax, "zuko": zuko}
        seconds, gap = fits[method](int(seed), *rest)
        print(json.dumps([seconds, float(gap.mean()), float(gap.std() / len(gap) ** 0.5)]))
        return
    import numpy as np

    from tests.benchmarks.timing import missing, report, spread

    absent, rows = missing("flowjax", "zuko"), []
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not args.small else []
    kept = {row["method"]: row for row in before}
    for name, row in {"T = 4, M = 2": "probdiff 4 2 50"}.items() if args.small else RUNS.items():
        method, *_ = row.split()
        if method in absent or (args.only and name not in args.only):
            rows += [kept[name]] if name in kept else []
            continue
        found = []
        for seed in range(1 if args.small else SEEDS):
            command = [sys.executable, "-m", "tests.benchmarks.quality", "--row", str(seed), *row.split()]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        seconds, gap, error = np.array(found).T
        rows.append({"method": name, "seconds": spread(seconds), "test NLL, nats": spread(ENTROPY + gap, 5),
                     "± of each": f"{error.max():.4f}"})  # fmt: skip
        print(rows[-1], flush=True)
    report(__file__, rows, save=not args.small and not absent)


if __name__ == "__main__":
    main()
