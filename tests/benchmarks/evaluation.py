"""The ELBO and ancestral sampling of 10,000 points at T = 1000: against a bare `lax.scan`, and against PyTorch.

    pip install -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.evaluation

Two draws of x_t for each t and datum, one in PyTorch, whose time is doubled; diagonal covariance, 3×128. The bare
program scans over t with all the points at once; the values of the two ELBOs are compared first, each over its own
draws. Each row is run in a process of its own, whose largest resident memory is that of the package alone. About 15
minutes.
"""

import importlib.util
import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import probdiff
from probdiff import derivation
from tests.benchmarks import bare
from tests.benchmarks.overhead import by_hand, diffusion
from tests.benchmarks.timing import alternate, missing, parser, report, spread


def kernel(params, levels, x_t, t):
    """Mean and variance of p(x_{t-1} given x_t) for one t, by hand, and what the KL needs of it."""
    beta, log_alpha, log_alpha_bar = levels
    keep, keep_prev, b = log_alpha_bar[t], log_alpha_bar[t - 1], beta[t - 1]
    var = -jnp.expm1(keep)
    log_snr = jnp.full(len(x_t), jnp.clip(keep - jnp.log(var), -30, 30))
    outputs = bare.apply(params["network"], x_t, log_snr)
    D = x_t.shape[1]
    rho = -jnp.expm1(keep_prev) / var
    of_x_0 = jnp.exp(0.5 * keep_prev) * b / var
    x_0_hat = jnp.exp(0.5 * keep) * x_t + jnp.sqrt(var) * outputs[:, :D]
    wide = rho + (1 - rho) * jnp.exp(16 * jnp.tanh(outputs[:, D:] / 8))
    mean = of_x_0 * x_0_hat + jnp.exp(0.5 * log_alpha[t - 1]) * rho * x_t
    return mean, b * wide, of_x_0, x_0_hat, rho / wide


@jax.jit
def bare_elbo(params, x_0, key):
    levels = bare.levels(params["logits"])
    keep = levels[2]

    def term(total, args):
        key, t = args
        noise = jax.random.normal(key, x_0.shape)
        x_t = jnp.exp(0.5 * keep[t]) * x_0 + jnp.sqrt(-jnp.expm1(keep[t])) * noise
        mean, var, of_x_0, x_0_hat, ratio = kernel(params, levels, x_t, t)
        ratio = jnp.where(t == 1, 1.0, ratio)
        kl = 0.5 * (ratio + (of_x_0 * (x_0 - x_0_hat)) ** 2 / var - 1 - jnp.log(ratio))
        reconstruction = 0.5 * ((x_0 - mean) ** 2 / var + jnp.log(2 * jnp.pi * var))
        return total - jnp.sum(jnp.where(t == 1, reconstruction, kl), 1), None

    last, T = keep[-1], len(keep) - 1
    prior = 0.5 * jnp.sum(jnp.exp(last) * x_0**2 - jnp.expm1(last) - 1 - jnp.log(-jnp.expm1(last)), 1)
    return jax.lax.scan(term, -prior, (jax.random.split(key, T), jnp.arange(1, T + 1)))[0]


@jax.jit
def bare_sample(params, x_T, key):
    levels = bare.levels(params["logits"])
    T = len(levels[0])

    def step(x, args):
        key, t = args
        mean, var, *_ = kernel(params, levels, x, t)
        return mean + jnp.sqrt(var) * jax.random.normal(key, x.shape), None

    return jax.lax.scan(step, x_T, (jax.random.split(key, T), jnp.arange(T, 0, -1)))[0]


def fitted(D, T):
    """A diffusion of T steps with typical params."""
    d = diffusion(D, 128, 3, T)
    params = derivation.typical_params(d, jax.random.key(0))
    nothing = np.zeros((1, 0))
    return probdiff.Fit(d, jax.tree.map(lambda leaf: leaf[None], params), nothing, nothing, np.zeros(D), np.ones(D))


def run(what, D, N, T, peers):
    fit, key = fitted(D, T), jax.random.key(1)
    x = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    params, x_0 = by_hand(fit.params), jnp.asarray(x)

    def package():
        return fit.log_likelihood(x, rng_key=key, num_draws=2).values if what == "elbo" else fit.sample(key, N)

    def plain():
        if what == "elbo":
            return np.asarray((bare_elbo(params, x_0, key) + bare_elbo(params, x_0, key)) / 2)
        return np.asarray(bare_sample(params, x_0, key))

    ours = package()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    programs = {"probdiff": package, "lax.scan": plain}
    if what == "elbo":
        z = (ours - plain()).mean() / ((ours - plain()).std() / np.sqrt(N))
        if abs(z) > 4:
            raise AssertionError(f"the ELBOs differ by {z} standard errors")
    if peers:
        import torch

        from tests.benchmarks import bare_torch

        model = bare_torch.Diffusion.of(params, T)
        points = torch.tensor(x)
        programs["PyTorch"] = lambda: model.elbo(points) if what == "elbo" else model.sample(N, D)
    seconds = alternate(programs, 5 if T == 1000 else 2)
    if what == "elbo" and peers:
        seconds["PyTorch"] *= 2  # it makes one draw
    row = {"what": what, "D": D, "probdiff, s": spread(seconds["probdiff"]),
           "over lax.scan": spread(seconds["probdiff"] / seconds["lax.scan"])}  # fmt: skip
    if peers:
        row["PyTorch over it"] = spread(seconds["PyTorch"] / seconds["probdiff"])
    return row | {"most resident, GiB": round(memory, 2)}


def main():
    options = parser(__doc__)
    options.add_argument("--row", nargs=2, metavar=("WHAT", "D"), help="one row, in this process")
    args = options.parse_args()
    N, T = (200, 20) if args.small else (10_000, 1000)
    if args.row:
        what, D = args.row
        print(json.dumps(run(what, int(D), N, T, importlib.util.find_spec("torch") is not None)))
        return
    absent, rows = missing("torch"), []
    for what in ("elbo", "sample"):
        for D in (2,) if args.small else (2, 64):
            command = [sys.executable, "-m", "tests.benchmarks.evaluation", "--row", what, str(D)]
            command += ["--small"] * args.small
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    report(__file__, rows, save=not args.small and not absent)


if __name__ == "__main__":
    main()
