"""The ledger of pairs whose reverse kernels are mixtures of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from scipy.optimize import minimize

from probdiff import GaussianDiffusion, derivation, networks, schedules
from probdiff.derivation.mixtures import gaussian_parts
from probdiff.families.mixtures import MixtureKernel
from probdiff.reference import feller

BETA = np.array([0.2, 0.4, 0.6])
T = len(BETA)
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(12, 1))


@pytest.mark.parametrize(
    ("covariance", "event_shape"), [("full", (2,)), pytest.param("diagonal", (1,), marks=pytest.mark.slow)]
)
def test_a_diffusion_of_mixtures_holds(x64, covariance, event_shape):
    d = GaussianDiffusion(event_shape, schedules.LearnedBetas(T, BETA), networks.ResidualMLP(8, 1), covariance, 3)
    params = derivation.typical_params(d, KEY)
    x = np.random.default_rng(0).normal(size=(12, *event_shape))
    ledger = derivation.check(d.reverse, d.forward, x, rng_key=KEY, params=params, forms=derivation.forms(d))
    ledger.assert_holds()
    for tag in ("N8", "N10", "N12", "N14", "N17"):
        assert ledger[tag].verdict in ("holds", "approximate"), str(ledger[tag])
    assert "a mixture of M Gaussians" in ledger["N8"].statement.text
    assert "a near mixture of 3 Gaussians" in ledger["N6"].detail


def forward(x_0):
    with numpyro.plate("data", len(x_0)):
        x = x_0
        for t in range(1, T + 1):
            x = numpyro.sample(f"x_{t}", dist.Normal(np.sqrt(1 - BETA[t - 1]) * x, np.sqrt(BETA[t - 1])).to_event(1))


def by_hand(x_t, t):
    """A mixture of two, as one writes it on the line: its draws are scalars, to which `to_event` gives an axis."""
    mean = jnp.stack([0.8 * x_t - 0.4, 0.8 * x_t + 0.4], -1)
    return dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Normal(mean, 0.6)).to_event(1)


def reverse(kernel):
    def program(x_0):
        with numpyro.plate("data", len(x_0)):
            x = numpyro.sample(f"x_{T}", dist.Normal(jnp.zeros_like(x_0), 1.0).to_event(1))
            for t in range(T, 0, -1):
                x = numpyro.sample(f"x_{t - 1}", kernel(x, t), obs=x_0 if t == 1 else None)

    return program


def test_a_pair_by_hand_holds(x64):
    ledger = derivation.check(reverse(by_hand), forward, X, rng_key=KEY)
    ledger.assert_holds()
    assert ledger["N17"].verdict == "holds", str(ledger["N17"])


class DrawsOfOneComponent(MixtureKernel):
    def sample(self, key, sample_shape=()):
        return self.component_distribution.sample(key, sample_shape)[..., 0, :]


class WrongMean(MixtureKernel):
    @property
    def mean(self):
        return super().mean + 0.1


class WrongDensity(MixtureKernel):
    def log_prob(self, value, intermediates=None):
        return super().log_prob(value, intermediates) + 0.01


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DrawsOfOneComponent, "draws"),
        (WrongMean, "mean and variance"),
        (WrongDensity, "log density of each kernel of p"),
    ],
)
def test_a_slip_of_a_kernel_is_caught(x64, kind, words):
    def kernel(x_t, t):
        mean = jnp.stack([0.8 * x_t - 0.4, 0.8 * x_t + 0.4], -2)
        return kind(dist.Categorical(logits=jnp.array([0.0, 1.0])), dist.Normal(mean, 0.6).to_event(1))

    row = derivation.check(reverse(kernel), forward, X, rng_key=KEY)["N8"]
    assert row.verdict == "fails"
    assert any(words in one.name for one in row.comparisons if not one.holds)


def test_a_claimed_mean_is_that_of_the_mixture(x64):
    def f_mu(x_t, t):
        return 0.8 * x_t + 0.16

    rows = [
        derivation.check(reverse(by_hand), forward, X, rng_key=KEY, f_mu=claim)["N8"]
        for claim in (f_mu, lambda x_t, t: f_mu(x_t, t) + 0.01)
    ]
    assert [row.verdict for row in rows] == ["holds", "fails"]


@pytest.mark.parametrize("batch", [1, 5])
def test_parts_of_a_mixture_are_those_of_its_density(x64, batch):
    """Of three ways to write a mixture, by quadrature of the densities themselves."""
    rng = np.random.default_rng(1)
    log_w, loc, scale = jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.normal(size=(batch, 2, 1))), 0.5
    weights = dist.Categorical(logits=log_w)
    kinds = [
        dist.MixtureSameFamily(weights, dist.Normal(loc[..., 0], scale)),
        dist.MixtureSameFamily(weights, dist.Normal(loc, scale).to_event(1)),
        dist.MixtureSameFamily(weights, dist.MultivariateNormal(loc, scale_tril=scale * jnp.eye(1))),
    ]
    y = np.linspace(-6, 6, 401)
    for kernel in kinds:
        event = kernel.event_shape
        x = jnp.zeros((batch, *event)) if event else jnp.zeros((batch,))
        share, means, covs = (np.asarray(a) for a in gaussian_parts(kernel, x))
        density = np.exp(kernel.log_prob(jnp.asarray(y.reshape(-1, 1, *[1] * len(event)))))
        stds = np.sqrt(covs[..., 0, 0])
        wanted = np.exp(share) * scipy.stats.norm.pdf(y[:, None, None], means[..., 0], stds)
        np.testing.assert_allclose(density, wanted.sum(-1), rtol=1e-9)


def test_the_distance_to_a_mixture():
    """Of one Gaussian that of its moments; of more between the least that a search finds and that of one fewer."""
    rng = np.random.default_rng(0)
    q = feller.Mixture(rng.dirichlet(np.ones(6)), rng.normal(size=6) * 2, np.full(6, 0.4))
    found = [float(feller.distance_to_a_mixture(q, m)) for m in (1, 2, 3, 6)]
    assert found[0] == pytest.approx(feller.non_gaussianity(q), rel=1e-2, abs=2e-4)
    assert found[-1] == 0.0
    assert np.all(np.diff(found) < 2e-4)
    y = np.linspace(-10, 10, 4001)

    def log_density(weights, means, stds):
        return np.log(np.sum(weights * scipy.stats.norm.pdf(y[:, None], means, stds), 1))

    log_q = log_density(q.weights, q.means, q.stds)

    def loss(free):
        weights = np.exp(np.append(free[0], 0.0))
        log_p = log_density(weights / weights.sum(), free[1:3], np.maximum(np.exp(free[3:]), 0.4))
        return np.trapezoid(np.exp(log_q) * (log_q - log_p), y)

    starts = [np.concatenate([[0.0], rng.normal(size=2) * 2, np.log([1.0, 1.0])]) for _ in range(12)]
    least = min(minimize(loss, start, method="Nelder-Mead", options={"maxiter": 3000}).fun for start in starts)
    assert 0.99 * least - 2e-4 < found[1] < 1.5 * least + 2e-4


def test_the_distance_to_a_mixture_where_a_component_has_no_weight():
    """As where β is small and data are far apart."""
    q = feller.Mixture(np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.0, 2.0]), np.full(3, 0.03))
    far = q.reversed_kernel(np.sqrt(1 - 1e-3) * -2.0, 1e-3)
    assert far.weights.min() == 0.0
    assert abs(feller.distance_to_a_mixture(far, 2)) < 2e-4
