"""Small diffusions of bits that tests share, and K by enumeration of all paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence

import probdiff
from probdiff import derivation, networks, schedules

KEY = jax.random.key(0)


def small(components=1, base_rate=0.3, D=2, T=3, schedule=None):
    beta = np.linspace(0.2, 0.6, T)
    schedule = schedule or schedules.LearnedBetas(T, beta)
    d = probdiff.BinomialDiffusion((D,), schedule, networks.ResidualMLP(8, 1), base_rate, components)
    params = derivation.typical_params(d, jax.random.key(1))
    last = params["network$params"].last
    moved = 0.7 * jax.random.normal(jax.random.key(2), last.weight.shape)
    params["network$params"] = jax.tree.map(
        lambda leaf: moved if leaf is last.weight else leaf, params["network$params"]
    )
    return d, params


def all_bits(D):
    return np.array(list(itertools.product([0, 1], repeat=D)), np.uint8)


def elbo_by_enumeration(d, params, x_0):
    """K of the sum of x_0's rows over all paths, differentiable in params."""
    states, T = jnp.asarray(all_bits(d.event_shape[0])), d.num_timesteps

    def program():
        noise, kernel = d.kernels()
        total = 0.0
        for x in x_0:
            weights = [jnp.exp(d.family.marginal(x, noise, t).log_prob(states)) for t in range(1, T + 1)]
            total += weights[0] @ kernel(states, 1).log_prob(x)
            for t in range(2, T + 1):
                q = d.family.posterior(states, x, noise, t)
                log_q, log_p = (p.log_prob(states[:, None]).T for p in (q, kernel(states, t)))  # (x_t, x_{t−1})
                total += weights[t - 1] @ jnp.sum(jnp.exp(log_q) * (log_p - log_q), 1)
            total -= kl_divergence(d.family.marginal(x, noise, T), d.family.terminal())
        return total

    return handlers.substitute(program, data=params)()
