"""The variance of the gradient of the at-time ELBO, by how the times of a batch are drawn, at equal cost.

    python -m tests.benchmarks.variance

Every way takes 512 network evaluations a step, and the same time. Σ over params of the variance of the gradient, for
the network's params and for the schedule's, over that of independent uniform times; bootstrap range of nine tenths.

- `even`: one uniform draw shifts an even grid over 1…T; what `reverse_at_time` does.
- `weighted`: an even grid through `times.time_probs`, p(t) ∝ √E[L_t²] of the loss at t, a tenth of it uniform, and
  weights 1/(T·p(t)); what `fit` does.
- `by gradient`: the same with p(t) ∝ √E‖∇L_t‖² of the network's gradient, the best that weights can do for it.
- `4 a datum`, `T a datum`: even, on 512/4 data with four times each, or 512/T data with all times.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence

import probdiff
from probdiff import datasets, networks, schedules
from probdiff.fitting import times
from tests.benchmarks.timing import parser, report

BATCH = 512


def unconstrained(d, params):
    """The params that are optimised, split in those of the network and of the schedule, and the way back."""
    beta = params["beta"]
    network, rebuild = ravel_pytree(params["network$params"])
    return (network, jnp.log(beta) - jnp.log1p(-beta)), lambda network, logits: {
        "network$params": rebuild(network), "beta": jax.nn.sigmoid(logits)
    }  # fmt: skip


def loss_at(d, params, x_0, t, key):
    """T times the term of the negative ELBO at t, for each datum, and the term of p(x_T)."""

    def program():
        q, T = d.family, d.num_timesteps
        noise, kernel = d.kernels()
        x_t = q.marginal(x_0, noise, t).sample(key)
        p = kernel(x_t, t)
        kl = kl_divergence(q.posterior(x_t, x_0, noise, jnp.maximum(t, 2)), p)
        terms = jnp.where(t == 1, -p.log_prob(x_0), kl)
        return T * terms, kl_divergence(q.marginal(x_0, noise, T), q.terminal(x_0.shape[:1]))

    return handlers.substitute(program, data=params)()


def ways(T):
    """The times of a batch and how many times each datum has, from a key and the probabilities of t."""
    grid = jnp.arange(BATCH) / BATCH

    def even(key, p):
        return jnp.minimum(1 + jnp.searchsorted(jnp.cumsum(p), (grid + jax.random.uniform(key)) % 1, side="right"), T)

    def several(k):
        def draw(key, p):  # the k times of a datum are 1/k apart
            return even(key, p).reshape(k, BATCH // k).T.ravel()

        return draw

    def independent(key, p):
        return 1 + jax.random.randint(key, (BATCH,), 0, T)

    times = {"independent": (independent, 1), "even": (even, 1), "weighted": (even, 1), "by gradient": (even, 1)}
    times["4 a datum"] = (several(4), 4)
    if T <= BATCH:
        k = 1 << (T - 1).bit_length()
        times[f"{k} a datum"] = (several(k), k)
    return times


def measure(d, x, params, key, num_draws, chosen):
    T = d.num_timesteps
    (network, logits), back = unconstrained(d, params)

    def objective(network, logits, x_0, t, w, key):
        terms, prior = loss_at(d, back(network, logits), x_0, t, key)
        return jnp.mean(w * terms + prior)

    gradient = jax.grad(objective, argnums=(0, 1))
    uniform, n = np.full(T, 1 / T), max(64, 25 * num_draws // T)

    @jax.jit
    def square(t, key):
        x_0, keys = x[jax.random.randint(key, (n,), 0, len(x))], jax.random.split(key, n)

        def one(args):
            x_0, key = args
            return jnp.sum(gradient(network, logits, x_0[None], t[None], 1.0, key)[0] ** 2)

        return jnp.mean(jax.lax.map(one, (x_0, keys)))

    by_gradient = np.sqrt([square(t, jax.random.fold_in(key, int(t))) for t in jnp.arange(1, T + 1)])
    probabilities = {
        "weighted": times.time_probs(d, params, x, len(x), key),
        "by gradient": 0.9 * by_gradient / by_gradient.sum() + 0.1 * uniform,
    }
    rows = {}
    for name, (draw, k) in chosen.items():
        p = jnp.asarray(probabilities.get(name, uniform), jnp.float32)

        @jax.jit
        def one(key, p=p, draw=draw, k=k):
            key_rows, key_t, key_x = jax.random.split(key, 3)
            x_0 = jnp.repeat(x[jax.random.randint(key_rows, (BATCH // k,), 0, len(x))], k, axis=0)
            t = draw(key_t, p)
            return gradient(network, logits, x_0, t, 1 / (T * p[t - 1]), key_x)

        draws = [one(key) for key in jax.random.split(key, num_draws)]
        rows[name] = [np.stack([np.asarray(g[i], np.float64) for g in draws]) for i in range(2)]
    return rows


def deviations(g):
    return np.sum((g - g.mean(0)) ** 2, 1) * len(g) / (len(g) - 1)


def main():
    small = parser(__doc__).parse_args().small
    rows, num_draws = [], 10 if small else 400
    digits = datasets.load("digits", rng_key=jax.random.key(0)).train
    roll = np.asarray(datasets.SwissRoll(0.5).sample(jax.random.key(0), 50_000))
    cases = [("swiss-roll", roll, 40, "full"), ("swiss-roll", roll, 1000, "full"), ("digits", digits, 40, "diagonal")]
    network = networks.ResidualMLP()
    if small:
        network = networks.ResidualMLP(8, 1)
        cases = [("swiss-roll", roll[:2000], 5, "diagonal")]
    rng = np.random.default_rng(0)
    for name, x, T, covariance in cases:
        d = probdiff.GaussianDiffusion(x.shape[1:], schedules.LearnedBetas(T), network, covariance)
        chosen = ways(T)
        if small:
            chosen = {way: chosen[way] for way in ("independent", "weighted")}
        for steps in (50,) if small else (300, 5000):
            fit = probdiff.fit(
                d, x, rng_key=jax.random.key(1), num_steps=steps, validation=0.0, dropout=False, progress_bar=False
            )
            found = measure(d, jnp.asarray(fit.standardise(x)), fit.params, jax.random.key(2), num_draws, chosen)
            base = [deviations(g) for g in found["independent"]]
            for way, gradients in found.items():
                row = {"data": name, "T": T, "after steps": steps, "times": way}
                for part, g, first in zip(("network", "schedule"), gradients, base, strict=True):
                    mine = deviations(g)
                    resampled = rng.integers(0, num_draws, (500, num_draws))
                    ratios = mine[resampled].mean(1) / first[resampled].mean(1)
                    low, high = np.quantile(ratios, [0.05, 0.95])
                    row[part] = f"{mine.mean() / first.mean():.2f} ({low:.2f}–{high:.2f})"
                rows.append(row)
            print(f"{name}, T = {T}, after {steps} steps", flush=True)
    report(__file__, rows, save=not small)


if __name__ == "__main__":
    main()
