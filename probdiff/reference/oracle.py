"""The best ELBO that reverse kernels can reach on a mixture of Gaussians on the line, in float64.

Given q, the best Gaussian p(x_{t−1} given x_t) has the mean and the variance v_t(x_t) of q(x_{t−1} given x_t), so that
E[log p(x_{t−1} given x_t) − log q(x_t given x_{t−1})] = −½·E log(v_t(x_t)/β_t), and N17 becomes

    K*(β) = −½·log 2π − ½·E[x_T²] − ½·Σ_t E_{q(x_t)} log(v_t(x_t)/β_t),   v_t = β_t·ρ_t + c_t²·Var(x_0 given x_t),

ρ_t and c_t as in `NoiseLevels.noise_kept` and `NoiseLevels.posterior`. max_β K* is the most that any network and any
learned schedule can reach at T steps.

q(x_{t−1} given x_t) itself is a mixture, of as many Gaussians as x_0 has. Kernels of so many components can be it, and

    K*(β) = L − KL(q(x_T) ‖ N(0, 1)),   L = E log q(x_0),

which is L where β_T is near 1, at any T.
"""

from collections.abc import Callable
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from probdiff import schedules
from probdiff.datasets.synthetic import GaussianMixture
from probdiff.families.gaussian import Gaussian
from probdiff.reference.mixtures import components_given

type Components = tuple[np.ndarray, np.ndarray, np.ndarray]  # weights, means and variances, each (K,)

_REACH = 8.0  # of the nodes beyond the outermost means, in standard deviations
_NODES_PER_STD = 10  # of the narrowest component; the tests measure what this leaves
_LARGEST_LOGIT = 14.0  # of β_t in the search: where the best β_T is 1, it ends at 1 − 1e-6


def best_elbo(mixture: GaussianMixture, beta: ArrayLike, *, components: int = 1) -> float:
    """K*(β) of the chain N3 on x_0 from `mixture` as it stands, nats; `beta` has shape (T,).

    Kernels are Gaussians, or mixtures of as many `components` as `mixture` has. Each expectation is one integral over
    x_t, by the trapezium rule. Raises `ValueError` where the mixture is not on the line, a β_t lies outside (0, 1), or
    `components` is another number.
    """
    best, beta = _best(mixture, components), schedules.Fixed(beta).beta
    parts = _components(mixture)
    with jax.enable_x64(True):
        return float(best(parts, _nodes(parts), jnp.asarray(beta)))


def best_schedule(
    mixture: GaussianMixture, num_timesteps: int, num_starts: int = 12, *, components: int = 1
) -> tuple[Float[np.ndarray, " T"], float]:
    """argmax_β K*(β), shape (T,), and K* there, nats.

    L-BFGS on the logits of β_t, from the package's schedules and from `num_starts` random ones: K* has several optima,
    and with `components` a whole surface of them. Raises as `best_elbo`, and `ValueError` where T < 1.
    """
    best, components_of_x_0 = _best(mixture, components), _components(mixture)
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda parts, y, logit: -best(parts, y, jax.nn.sigmoid(logit)), 2))
    with jax.enable_x64(True):
        y = _nodes(components_of_x_0)

        def loss(logit: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = loss_and_gradient(components_of_x_0, y, jnp.asarray(logit))
            return float(value), np.asarray(gradient)

        bounds = [(-_LARGEST_LOGIT, _LARGEST_LOGIT)] * num_timesteps
        found = [
            minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000, "ftol": 1e-13})
            for start in _starts(num_timesteps, num_starts)
        ]
    best = min(found, key=lambda result: result.fun)
    return 1 / (1 + np.exp(-best.x)), -float(best.fun)


class BestNetwork(eqx.Module):
    """The network of the best reverse kernels on `mixture`, for event_shape (1,) and covariance "diagonal".

    f_μ is the mean of q(x_{t−1} given x_t) where x̂_0 = E[x_0 given x_t], and f_Σ = v_t where
    exp(2·8·tanh(b/8)) = Var(x_0 given x_t)/(1 − ᾱ_t): both know t by the log-SNR alone, whatever β is. With as many
    `components` as `mixture` has, this holds for each of them, and weights are those of the mixture given x_t.
    Raises as `best_elbo`.
    """

    parts: Components
    components: int = eqx.field(static=True)

    def __init__(self, mixture: GaussianMixture, components: int = 1) -> None:
        _best(mixture, components)
        self.parts, self.components = _components(mixture), components

    def __call__(self, x_t: Float[Array, "1"], log_snr: Float[Array, ""]) -> Float[Array, " P"]:
        alpha_bar, noise_variance = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        parts = jax.tree.map(partial(jnp.asarray, dtype=x_t.dtype), self.parts)
        given = _given_x_t if self.components == 1 else _each_given_x_t
        log_w, mean, variance = given(parts, x_t[0], alpha_bar, noise_variance)
        direction = (mean - jnp.sqrt(alpha_bar) * x_t[0]) / jnp.sqrt(noise_variance)
        outputs = jnp.stack([direction, 8 * jnp.arctanh(jnp.log(variance / noise_variance) / 16)], -1)
        if self.components == 1:
            return outputs
        family = Gaussian((1,), "diagonal", self.components)
        return jnp.concatenate([outputs.ravel(), log_w]) - family.offsets


def _components(mixture: GaussianMixture) -> Components:
    means = np.asarray(mixture.means, float)
    if means.shape[1] != 1:
        raise ValueError(f"mixture has {means.shape[1]} dimensions; the oracle is for mixtures on the line, (K, 1)")
    return np.asarray(mixture.weights, float), means[:, 0], np.asarray(mixture.covariances, float)[:, 0, 0]


def _nodes(components: Components) -> Float[np.ndarray, " M"]:
    """Nodes for every q(x_t), whose components are no narrower and no wider than those of q(x_0) and N(0, 1)."""
    _, means, variances = components
    narrowest, widest = np.sqrt(min(variances.min(), 1.0)), np.sqrt(max(variances.max(), 1.0))
    reach = np.abs(means).max() + _REACH * widest
    return np.linspace(-reach, reach, 1 + 200 * int(np.ceil(reach / narrowest * _NODES_PER_STD / 100)))


def _each_given_x_t(
    components: Components, x_t: Array, alpha_bar: Array, noise_variance: Array
) -> tuple[Array, Array, Array]:
    """`components_given` for x_0 and x_t; `noise_variance` is 1 − ᾱ_t. All broadcast."""
    shrink = jnp.sqrt(alpha_bar)[..., None]
    return components_given(*components, x_t[..., None], shrink, noise_variance[..., None], jnp)


def _given_x_t(
    components: Components, x_t: Array, alpha_bar: Array, noise_variance: Array
) -> tuple[Array, Array, Array]:
    """log q(x_t), and mean and variance of x_0 given x_t."""
    log_joint, component_means, component_variances = _each_given_x_t(components, x_t, alpha_bar, noise_variance)
    share = jax.nn.softmax(log_joint)
    mean = jnp.sum(share * component_means, -1)
    variance = jnp.sum(share * (component_variances + (component_means - mean[..., None]) ** 2), -1)
    return jax.nn.logsumexp(log_joint, -1), mean, variance


@jax.jit
def _best_elbo(components: Components, y: Float[Array, " M"], beta: Float[Array, " T"]) -> Float[Array, ""]:
    weights, means, variances = components
    noise, t = schedules.from_beta(beta), jnp.arange(1, len(beta) + 1)[:, None]
    noise_variance = -jnp.expm1(noise.log_alpha_bar)
    log_q, _, variance_of_x_0 = _given_x_t(components, y, noise.alpha_bar[t], noise_variance[t])
    c, _, _ = noise.posterior(t)
    log_ratio = jnp.log(noise.noise_kept(t) + c**2 * variance_of_x_0 / beta[:, None])
    steps = jnp.sum(jnp.exp(log_q) * log_ratio) * (y[1] - y[0])
    second_moment = noise.alpha_bar[-1] * jnp.sum(weights * (means**2 + variances)) + noise_variance[-1]
    return -0.5 * (jnp.log(2 * jnp.pi) + second_moment + steps)


@jax.jit
def _best_elbo_of_mixtures(components: Components, y: Float[Array, " M"], beta: Float[Array, " T"]) -> Float[Array, ""]:
    log_alpha_bar = jnp.sum(jnp.log1p(-beta))
    ends = jnp.array([0.0, log_alpha_bar])[:, None]
    log_q_0, log_q_T = _given_x_t(components, y, jnp.exp(ends), -jnp.expm1(ends))[0]
    terms = jnp.exp(log_q_0) * log_q_0 - jnp.exp(log_q_T) * (log_q_T - norm.logpdf(y))
    return jnp.sum(terms) * (y[1] - y[0])


def _best(mixture: GaussianMixture, components: int) -> Callable[..., Float[Array, ""]]:
    """K* as a function of components of x_0, nodes and β, for so many components of the kernels."""
    of_x_0 = len(_components(mixture)[0])
    if components not in (1, of_x_0):
        raise ValueError(f"components is {components}; the best K is known for 1, and for {of_x_0} as the mixture has")
    return _best_elbo if components == 1 else _best_elbo_of_mixtures


@cache
def _starts(num_timesteps: int, num_starts: int) -> list[Float[np.ndarray, " T"]]:
    """Logits of β_t: of the package's schedules, then of a log-SNR that falls by random steps."""
    named = [schedules.log_snr_linear(num_timesteps, *ends).beta for ends in ((5, -2), (5, -5), (3, 0), (8, 2))]
    named += [make(num_timesteps).beta for make in (schedules.cosine, schedules.linear, schedules.harmonic)]
    rng = np.random.default_rng(0)
    for _ in range(num_starts):
        alpha_bar = 1 / (1 + np.exp(-np.sort(rng.uniform(-8, 8, num_timesteps))[::-1]))
        named.append(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))
    beta = np.clip(named, 1e-4, 1 - 1e-4)
    return list(np.log(beta) - np.log1p(-beta))
