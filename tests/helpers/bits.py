"""Small diffusions of bits that tests share, and K by enumeration of all paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.once import once
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence

import probdiff
from probdiff import networks, schedules

KEY = jax.random.key(0)


@once
def small(components=1, base_rate=0.3, D=2, T=3, schedule=None):
    """A diffusion of bits, by default of learned β_t, and params of it."""
    schedule = schedule or schedules.LearnedBetas(T, np.linspace(0.2, 0.6, T))
    d = probdiff.BinomialDiffusion((D,), schedule, networks.ResidualMLP(8, 1), base_rate, components)
    return d, params_of(d)


def params_of(d):
    """β_t as a fit would start from, and random numbers in the network, drawn by NumPy as nothing is to be compiled."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(d.initial_params, KEY)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), shapes)
    return {**params, **({"beta": jnp.asarray(d.schedule.initial)} if "beta" in params else {})}


def all_bits(D):
    return np.array(list(itertools.product([0, 1], repeat=D)), np.uint8)


def elbo_by_enumeration(d, params, x_0):
    """K of the sum of x_0's rows over all paths, differentiable in params."""
    states, T = jnp.asarray(all_bits(d.event_shape[0])), d.num_timesteps

    def program():
        noise, kernel = d.kernels()

        def weights(x, t):
            return jnp.exp(d.family.marginal(x, noise, t).log_prob(states))

        def step(x, t):
            q, p = d.family.posterior(states, x, noise, t), kernel(states, t)
            log_q, log_p = (each.log_prob(states[:, None]).T for each in (q, p))  # (x_t, x_{t−1})
            return weights(x, t) @ jnp.sum(jnp.exp(log_q) * (log_p - log_q), 1)

        def of_datum(x):
            steps = jax.vmap(lambda t: step(x, t))(jnp.arange(2, T + 1)).sum()
            last = kl_divergence(d.family.marginal(x, noise, T), d.family.terminal())
            return weights(x, 1) @ kernel(states, 1).log_prob(x) + steps - last

        return jax.vmap(of_datum)(x_0).sum()

    return handlers.substitute(program, data=params)()
