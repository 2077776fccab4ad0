"""A family of one's own: categorical data that are drawn anew at each step (Austin et al. 2021, D3PM, uniform kernel).

The family and its diffusion are the 80 lines below; all else of the package takes them as they are.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import probdiff
from probdiff import derivation, networks, schedules
from probdiff.chains import Diffusion


@dataclass(frozen=True)
class Uniform:
    """q(x_t given x_{t−1}) keeps each level with probability 1 − β_t, and else draws one of K evenly."""

    event_shape: tuple[int, ...]
    num_levels: int

    @property
    def support(self):
        return constraints.integer_interval(0, self.num_levels - 1)

    @property
    def num_outputs(self):
        """The logits of x_0."""
        return math.prod(self.event_shape) * self.num_levels

    def network_input(self, x_t):
        """One-hot, (*batch, *event, K)."""
        return jax.nn.one_hot(x_t, self.num_levels, dtype=jnp.result_type(float))

    def step(self, x_prev, noise, t):
        """q(x_t given x_{t−1})."""
        return self._levels(self._kept(self.network_input(x_prev), 1 - noise.beta[jnp.asarray(t) - 1]))

    def marginal(self, x_0, noise, t):
        """q(x_t given x_0)."""
        return self._levels(self._kept(self.network_input(x_0), noise.alpha_bar[jnp.asarray(t)]))

    def posterior(self, x_t, x_0, noise, t):
        """q(x_{t−1} given x_t, x_0) ∝ q(x_t given x_{t−1})·q(x_{t−1} given x_0)."""
        return self._levels(self._given(x_t, self.network_input(x_0), noise, t))

    def terminal(self, batch_shape=()):
        """p(x_T): every level alike."""
        return self._levels(jnp.ones((*batch_shape, *self.event_shape, self.num_levels)))

    def kernel(self, x_t, outputs, noise, t):
        """p(x_{t−1} given x_t) = Σ over x_0 of q(x_{t−1} given x_t, x_0) at the probabilities of x_0 that are given."""
        logits = outputs.reshape(*outputs.shape[:-1], *self.event_shape, self.num_levels)
        return self._levels(self._given(x_t, jax.nn.softmax(logits), noise, t))

    def _given(self, x_t, x_0, noise, t):
        """For t = 1 x_{t−1} is x_0, so that this is Bayes' rule with x_0 as the prior."""
        likelihood = self._kept(self.network_input(x_t), 1 - noise.beta[jnp.asarray(t) - 1])
        return likelihood * self._kept(x_0, noise.alpha_bar[jnp.asarray(t) - 1])

    def _kept(self, x, share):
        share = jnp.reshape(share, jnp.shape(share) + (1,) * (len(self.event_shape) + 1))
        return share * x + (1 - share) / self.num_levels

    def _levels(self, weights):
        probs = weights / weights.sum(-1, keepdims=True)
        return dist.Categorical(probs=probs).to_event(len(self.event_shape))


@dataclass(frozen=True, eq=False)
class UniformDiffusion(Diffusion):
    num_levels: int = 3

    @property
    def family(self):
        return Uniform(self.event_shape, self.num_levels)


K, T, KEY = 3, 6, jax.random.key(0)
JOINT = np.array([[0.3, 0.02, 0.03], [0.02, 0.3, 0.03], [0.1, 0.05, 0.15]])  # of two dependent features


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return np.stack(np.unravel_index(rng.choice(K * K, 4000, p=JOINT.ravel()), (K, K)), 1)


@pytest.fixture(scope="module")
def d():
    return UniformDiffusion((2,), schedules.log_snr_linear(T, 3.0, -3.0), networks.ResidualMLP(16, 1), K)


@pytest.fixture(scope="module")
def fit(d, x):
    return probdiff.fit(d, x, rng_key=KEY, num_steps=800, batch_size=256, check_every=400, progress_bar=False)


def log_p(d, params):
    """log p(x_0) of all pairs of levels, by enumeration of every x_t."""
    every = np.stack(np.unravel_index(np.arange(K * K), (K, K)), 1)
    from numpyro import handlers

    _, kernel = handlers.substitute(d.kernels, data=params)()
    p = np.full(K * K, 1 / (K * K))
    for t in range(T, 0, -1):
        matrix = np.exp(np.asarray(kernel(jnp.asarray(every), t).log_prob(jnp.asarray(every)[:, None])))
        p = matrix @ p  # from x_t, the second axis, to x_{t−1}
    return np.log(p)


def test_it_is_fitted_and_bounded_by_its_own_log_likelihood(d, x, fit):
    exact = log_p(d, fit.params)
    assert np.exp(exact).sum() == pytest.approx(1, abs=1e-5)
    entropy = -np.sum(JOINT * np.log(JOINT))
    assert np.sum(JOINT.ravel() * exact) > -entropy - 0.05  # independent levels would lose 0.5 nats
    data = x[:500]
    bound = fit.log_likelihood(data, rng_key=KEY, num_draws=20)
    truth = exact[data @ np.array([K, 1])].mean()
    tighter = fit.log_likelihood(data, rng_key=KEY, method="iwae", num_particles=50)
    assert bound.mean - 4 * bound.mcse < tighter.mean + 4 * tighter.mcse
    assert abs(tighter.mean - truth) < 0.02
    assert truth - 0.2 < bound.mean < truth + 4 * bound.mcse


def test_it_is_sampled(d, fit):
    draws = fit.sample(KEY, 4000)
    assert np.issubdtype(draws.dtype, np.integer)
    shares = np.bincount(draws @ np.array([K, 1]), minlength=K * K) / len(draws)
    p = np.exp(log_p(d, fit.params))
    assert np.all(np.abs(shares - p) < 5 * np.sqrt(p / len(draws)))


def test_it_is_saved_and_loaded(d, fit, tmp_path):
    fit.save(tmp_path / "fit.npz")
    again = probdiff.Fit.load(tmp_path / "fit.npz", d)
    np.testing.assert_array_equal(again.sample(KEY, 10), fit.sample(KEY, 10))
    other = UniformDiffusion((2,), d.schedule, d.network, 4)
    with pytest.raises(ValueError, match="its num_levels is 3, not 4"):
        probdiff.Fit.load(tmp_path / "fit.npz", other)


@pytest.mark.parametrize("method", ["smc", "ode", "exact"])
def test_a_method_that_does_not_know_it_says_so(fit, x, method):
    with pytest.raises(TypeError, match=f'method "{method}"'):
        fit.log_likelihood(x[:4], rng_key=KEY, method=method)


def test_data_outside_the_support_are_refused(d, x):
    with pytest.raises(ValueError, match=r"x has entries 3.0 in row\(s\) 0, .*; integers from 0 to 2 are wanted"):
        probdiff.fit(d, np.full((10, 2), 3), rng_key=KEY, num_steps=1)
    with pytest.raises(ValueError, match=r"x has entries 0\.5"):
        probdiff.fit(d, np.full((10, 2), 0.5), rng_key=KEY, num_steps=1)


def test_its_ledger_says_what_it_has_no_reader_for(d, x, fit):
    ledger = derivation.check(d.reverse, d.forward, x, rng_key=KEY, params=fit.params, num_draws=500)
    ledger.assert_holds()
    silent = {row.statement.tag for row in ledger if row.verdict == "not applicable"}
    assert {"N1", "N3", "N6", "N7", "N8"} <= silent
    assert "because the ledger has no reader of CategoricalProbs" in ledger["N8"].detail
    for tag in ("N2", "N5", "N13"):
        assert ledger[tag].verdict == "holds", str(ledger[tag])
