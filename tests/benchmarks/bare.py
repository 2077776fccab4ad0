"""The at-time ELBO of a diagonal Gaussian diffusion by hand, in JAX and Optax alone, to measure the package against.

No NumPyro, no Equinox, none of the package. The same mathematics and the same number of random draws.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax


def init(key, D, width, depth, T):
    """A residual MLP with an embedding of the log-SNR, and the logits of β_t."""
    keys = iter(jax.random.split(key, 2 * depth + 2))

    def dense(key, rows, columns):
        return jax.random.uniform(key, (rows, columns), minval=-1, maxval=1) / jnp.sqrt(rows)

    network = {
        "first": (dense(next(keys), D, width), jnp.zeros(width)),
        "blocks": [(dense(next(keys), width, width), jnp.zeros(width)) for _ in range(depth)],
        "shifts": [dense(next(keys), 17, width) for _ in range(depth)],
        "last": (jnp.zeros((width, 2 * D)), jnp.zeros(2 * D)),
    }
    log_snr = jnp.linspace(5.0, -2.0, T)
    alpha_bar = jax.nn.sigmoid(log_snr)
    beta = 1 - alpha_bar / jnp.concatenate([jnp.ones(1), alpha_bar[:-1]])
    return {"network": network, "logits": jnp.log(beta) - jnp.log1p(-beta)}


def silu(x):
    return x * (0.5 + 0.5 * jnp.tanh(0.5 * x))  # faster on a CPU than `jax.nn.silu`


def apply(network, x, log_snr):
    wavelength = jnp.geomspace(4.0, 64.0, 8)
    angle = 2 * jnp.pi * jnp.clip(log_snr, -20, 20)[:, None] / wavelength
    embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.tanh(log_snr / 8)[:, None]], 1)
    h = x @ network["first"][0] + network["first"][1]
    for (w, b), shift in zip(network["blocks"], network["shifts"], strict=True):
        h = h + silu(h + embedding @ shift) @ w + b
    return silu(h) @ network["last"][0] + network["last"][1]


def levels(logits):
    beta = jax.nn.sigmoid(logits)
    log_alpha = jnp.log1p(-beta)
    return beta, log_alpha, jnp.concatenate([jnp.zeros(1), jnp.cumsum(log_alpha)])


def loss(params, x_0, u, noise, T):
    """The negative ELBO per datum, from one t for each row of x_0 (B, D), for a uniform u and normal noise (B, D)."""
    B, D = x_0.shape
    beta, log_alpha, log_alpha_bar = levels(params["logits"])
    t = jnp.minimum(1 + jnp.floor(T * ((jnp.arange(B) / B + u) % 1.0)).astype(int), T)
    keep, keep_prev = log_alpha_bar[t], log_alpha_bar[t - 1]
    var = -jnp.expm1(keep)
    x_t = jnp.exp(0.5 * keep)[:, None] * x_0 + jnp.sqrt(var)[:, None] * noise
    log_snr = jnp.clip(keep - jnp.log(var), -30, 30)
    outputs = apply(params["network"], x_t, log_snr)
    # p(x_{t-1} given x_t), its mean that of q(x_{t-1} given x_t, x_0) at a predicted x_0
    b = beta[t - 1]
    rho = -jnp.expm1(keep_prev) / var
    of_x_0 = jnp.exp(0.5 * keep_prev) * b / var
    of_x_t = jnp.exp(0.5 * log_alpha[t - 1]) * rho
    x_0_hat = jnp.exp(0.5 * keep)[:, None] * x_t + jnp.sqrt(var)[:, None] * outputs[:, :D]
    spread = rho[:, None] + (1 - rho)[:, None] * jnp.exp(16 * jnp.tanh(outputs[:, D:] / 8))
    p_var = b[:, None] * spread
    first = (t == 1)[:, None]
    p_mean = of_x_0[:, None] * x_0_hat + of_x_t[:, None] * x_t
    reconstruction = 0.5 * ((x_0 - p_mean) ** 2 / p_var + jnp.log(2 * jnp.pi * p_var))
    # the variance of q is b·rho, so that its ratio to p's is rho/spread; at t = 1 it is zero
    ratio = jnp.where(first, 1.0, rho[:, None]) / spread
    difference = of_x_0[:, None] * (x_0 - x_0_hat)
    kl = 0.5 * (ratio + difference**2 / p_var - 1 - jnp.log(ratio))
    terms = T * jnp.sum(jnp.where(first, reconstruction, kl), 1)
    last = log_alpha_bar[T]
    prior = 0.5 * jnp.sum(jnp.exp(last) * x_0**2 - jnp.expm1(last) - 1 - jnp.log(-jnp.expm1(last)), 1)
    return jnp.mean(terms + prior)


def optimizer(num_steps):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(2e-3, num_steps)),
        optax.masked(optax.scale(10.0), {"network": False, "logits": True}),
    )


@partial(jax.jit, static_argnames=("T", "batch_size", "num_steps"))
def run_steps(params, opt_state, x, key, start, stop, *, T, batch_size, num_steps):
    """Steps of Adam in one compiled loop, on batches drawn with replacement; the last loss."""
    optim = optimizer(num_steps)

    def step(i, carry):
        params, opt_state, _ = carry
        key_rows, key_u, key_noise = jax.random.split(jax.random.fold_in(key, i), 3)
        x_0 = x[jax.random.randint(key_rows, (batch_size,), 0, len(x))]
        noise = jax.random.normal(key_noise, x_0.shape)
        value, gradient = jax.value_and_grad(loss)(params, x_0, jax.random.uniform(key_u), noise, T)
        updates, opt_state = optim.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.lax.fori_loop(start, stop, step, (params, opt_state, jnp.zeros(())))
