"""How small the gap L − K on the swiss roll can be with Gaussian reverse kernels, whatever the network.

The best Gaussian p(x_{t−1} given x_t) has the mean and covariance of q(x_{t−1} given x_t). The roll is a curve with
Gaussian noise, so given x_t the posterior of x_0 is a mixture along the curve and its covariance C(x_t) one sum. Then
f_Σ* = β_t·ρ_t·I + c_t²·C(x_t), c_t the coefficient of x_0 in the mean of q(x_{t−1} given x_t, x_0), and
K*(β) = −log 2π − 1 − Σ_t ½ E log det(f_Σ* / β_t), for data of unit variance. K* is
maximised over β from several starts.

    python -m tests.benchmarks.swiss_roll_bound --num-timesteps 10
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probdiff import datasets, schedules
from tests.benchmarks.timing import parser

NODES = 360  # along the curve, about half a noise standard deviation apart; Gauss–Legendre in panels of 6


def curve(roll):
    """Points on the curve in the data's units, their log weights and the variances of the noise."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    edges = np.linspace(1.5 * np.pi, 4.5 * np.pi, NODES // 6 + 1)
    s = (0.5 * (edges[1:] + edges[:-1])[:, None] + 0.5 * np.diff(edges)[:, None] * nodes).ravel()
    points = (np.stack([s * np.cos(s), s * np.sin(s)], 1) - roll._mean) / roll._std
    return jnp.asarray(points), jnp.log(np.tile(weights / 2 / (NODES // 6), NODES // 6)), (roll.noise / roll._std) ** 2


def best_bound(roll, logit_beta, rng_key, num_draws):
    """An estimate of K*(β) from `num_draws` draws of x_t for each t."""
    points, log_weights, variance = curve(roll)
    noise, T = schedules.from_beta(jax.nn.sigmoid(logit_beta)), len(logit_beta)
    t = jnp.arange(1, T + 1)
    shrink, std = noise.marginal(t)
    key_x, key_noise = jax.random.split(rng_key)
    x_0 = roll.sample(key_x, num_draws * T).reshape(T, num_draws, 2)
    x_t = shrink[:, None, None] * x_0 + std[:, None, None] * jax.random.normal(key_noise, x_0.shape)

    def covariance_of_x_0(x, a, one_less):
        total = a * variance + one_less
        residual = x - jnp.sqrt(a) * points
        p = jax.nn.softmax(log_weights - 0.5 * (residual**2 / total).sum(-1))
        mean = points + jnp.sqrt(a) * variance / total * residual
        centred = mean - p @ mean
        return (p[:, None] * centred).T @ centred + jnp.diag(variance * one_less / total)

    def step(args):
        x, t = args
        a = noise.alpha_bar[t]
        c, _, posterior_std = noise.posterior(t)
        cov = jax.vmap(lambda one: covariance_of_x_0(one, a, -jnp.expm1(noise.log_alpha_bar[t])))(x)
        best = (posterior_std**2 * jnp.eye(2) + c**2 * cov) / noise.beta[t - 1]
        return 0.5 * jnp.linalg.slogdet(best)[1].mean()

    return -jnp.log(2 * jnp.pi) - 1 - jax.lax.map(step, (x_t, t)).sum()


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--num-timesteps", type=int, default=10)
    arguments.add_argument("--noise", type=float, default=0.5)
    arguments.add_argument("--num-updates", type=int, default=400)
    options = arguments.parse_args()
    num_exact, num_draws = 400_000, 20_000
    if options.small:
        num_exact, num_draws, options.num_timesteps, options.num_updates = 1000, 50, 2, 2
    roll, T = datasets.SwissRoll(options.noise), options.num_timesteps
    samples = [roll.log_prob(roll.sample(jax.random.key(i), num_exact)).mean() for i in range(4)]
    exact = np.mean(samples)
    print(f"T = {T}; exact L = {exact:.5f} ± {np.std(samples, ddof=1) / 2:.5f} nats")
    starts = {
        "cosine": schedules.cosine(T),
        "harmonic": schedules.Fixed(np.minimum(schedules.harmonic(T).beta, 0.999)),
        "log-SNR 5 to −5": schedules.log_snr_linear(T, 5, -5),
        "log-SNR 5 to −2": schedules.log_snr_linear(T),
        "log-SNR 4 to 0": schedules.log_snr_linear(T, 4, 0),
        "log-SNR 3 to 1": schedules.log_snr_linear(T, 3, 1),
        "geometric β": schedules.Fixed(np.geomspace(0.01, 0.9, T)),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.15, options.num_updates))

    @jax.jit
    def update(logit, state, rng_key):
        gradient = jax.grad(lambda logit: -best_bound(roll, logit, rng_key, 128))(logit)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(logit, change), state

    evaluate = jax.jit(lambda logit, rng_key: best_bound(roll, logit, rng_key, num_draws))

    def gap(logit, repeats):
        values = np.array([evaluate(logit, jax.random.key(1000 + i)) for i in range(repeats)], np.float64)
        return f"{exact - values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(repeats):.4f}"

    for name, start in starts.items():
        beta = np.clip(start.beta, 1e-4, 0.9995)
        logit = jnp.asarray(np.log(beta / (1 - beta)), jnp.float32)
        before, state = gap(logit, 10), optimizer.init(logit)
        for i in range(options.num_updates):
            logit, state = update(logit, state, jax.random.key(i))
        print(f"{name:16} gap L − K*: {before} at the start, {gap(logit, 20)} at the optimum")
        print(
            f"{'':16} β = {np.array2string(np.asarray(jax.nn.sigmoid(logit)), precision=4, max_line_width=200)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
