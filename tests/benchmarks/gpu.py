"""Training and sampling on one GPU: agreement with the CPU, steps and data per second, share of the matmul rate.

    pip install -e '.[cuda13]'
    python -m tests.benchmarks.gpu

First the loss and its gradient are worked out on the CPU and on the GPU at the same params, data and draws, with
products in full float32, and must agree to 1e-4 relative; with TF32 products the difference is printed. Then `fit`'s
own compiled loop runs, at-time objective, learned β_t of T = 1000, D = 64, diagonal covariance, params and β_t in
float32: networks from 3×128 to 8×4096, batches from 512 to 262,144, products in float32, TF32 or bfloat16. A step
takes 6 flops for each weight and datum; `share` is of the rate measured for products of 8192×8192 matrices in the
same precision. The loop is one executable without a callback to the host, called under a transfer guard.
Last, 10⁶ ancestral samples at T = 1000 from a 3×128 network. Without a GPU `--small` runs all of it at a small size
on the CPU.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import probdiff
from probdiff import derivation, networks, schedules
from probdiff.fitting import loop
from tests.benchmarks.timing import alternate, parser, report, spread

D, T = 64, 1000
PRECISIONS = {"float32": ("highest", None), "tf32": ("tensorfloat32", None), "bf16": ("highest", "bfloat16")}


def loss_and_gradient(device, precision):
    """At params, data and draws that are the same on every device."""
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(T), networks.ResidualMLP())
    params = derivation.typical_params(d, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(512, D)).astype(np.float32)
    svi = loop.make_svi(d, loop.Settings())
    key = jax.random.key(1)
    with jax.default_matmul_precision(precision):
        compute = jax.jit(jax.value_and_grad(lambda p, x: svi.loss.loss(key, p, svi.model, svi.guide, x)))
        loss, gradient = compute(jax.device_put(params, device), jax.device_put(x, device))
    return np.concatenate([np.ravel(loss), *(np.ravel(leaf) for leaf in jax.tree.leaves(gradient))])


def difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def matmul_rate(size, dtype, precision):
    """Flops per second of products of square matrices."""
    a = jnp.ones((size, size), dtype)
    with jax.default_matmul_precision(precision):
        many = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: a @ b, a)).lower(a).compile()
    seconds = alternate({"": lambda: jax.block_until_ready(many(a))}, 5)[""]
    return 10 * 2 * size**3 / np.median(seconds)


def measure(depth, width, batch, name, rates, steps):
    precision, dtype = PRECISIONS[name]
    network = networks.ResidualMLP(width, depth, dtype=dtype)
    d = probdiff.GaussianDiffusion((D,), schedules.LearnedBetas(T), network)
    settings = loop.Settings(20_000, batch, 1, check_every=steps, times="weighted")
    keys = jax.random.split(jax.random.key(0), 1)
    x = jax.random.normal(jax.random.key(1), (max(batch, 2**18), D))
    row = {"network": f"{depth}×{width}", "batch": batch, "products": name}
    try:
        with jax.default_matmul_precision(precision):
            state, params = loop.start_state(d, settings, keys)
            arguments = jax.device_put((state, None, x, len(x), keys, 0, steps))
            run = loop.run_steps.lower(d, settings, None, *arguments).compile()
            if "callback" in run.as_text():
                raise AssertionError("the loop calls back to the host")
        with jax.transfer_guard("disallow"):
            seconds = alternate({"": lambda: jax.block_until_ready(run(*arguments))}, 5)[""] / steps
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"steps/s": "out of memory"}
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["network$params"]) if leaf.ndim == 3)
    share = 6 * weights * batch / seconds / rates[name]
    return row | {"steps/s": spread(1 / seconds), "data/s": spread(batch / seconds), "share": spread(share)}


def sampling(n):
    d = probdiff.GaussianDiffusion((2,), schedules.LearnedBetas(T), networks.ResidualMLP(), "diagonal")
    params = jax.tree.map(lambda leaf: leaf[None], derivation.typical_params(d, jax.random.key(0)))
    fit = probdiff.Fit(d, params, np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(2), np.ones(2))
    fit.sample(jax.random.key(0), n)
    start = time.perf_counter()
    fit.sample(jax.random.key(1), n)
    return time.perf_counter() - start


def main():
    options = parser(__doc__)
    options.add_argument("--out", default=__file__, help="where to leave the .json file")
    args = options.parse_args()
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    reference = loss_and_gradient(cpu, "highest")
    exact, fast = (difference(loss_and_gradient(device, p), reference) for p in ("highest", "tensorfloat32"))
    print(f"loss and gradient on {device.device_kind} and on the CPU differ by {exact:.1e}, with TF32 by {fast:.1e}")
    if exact > 1e-4:
        raise AssertionError("the devices do not agree")
    size = 256 if args.small else 8192
    rates = {
        name: matmul_rate(size, jnp.dtype(dtype or "float32"), precision)
        for name, (precision, dtype) in PRECISIONS.items()
    }
    print("large products, Tflop/s: " + ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items()))
    shapes = ((3, 128), (4, 512), (8, 1024), (8, 4096))
    batches = (512, 4096, 32_768, 65_536, 262_144)
    products = tuple(PRECISIONS)
    if args.small:
        shapes, batches, products = shapes[:1], batches[:1], products[:1]
    rows = []
    for depth, width in shapes:
        for batch in batches:
            for name in products:
                steps = 5 if args.small else int(np.clip(1e9 / (batch * width), 5, 200))
                rows.append(measure(depth, width, batch, name, rates, steps))
                print(rows[-1], flush=True)
    n = 100 if args.small else 1_000_000
    print(f"{n:,} ancestral samples at T = {T}: {sampling(n):.1f} s", flush=True)
    report(Path(args.out), rows, save=not args.small)


if __name__ == "__main__":
    main()
