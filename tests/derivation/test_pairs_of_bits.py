"""The ledger on pairs of bits: right pairs pass it, and each slip is caught at the row that names it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from helpers import pairs
from helpers.bits import KEY, all_bits, elbo_by_enumeration, small
from helpers.pairs import compile_once, only, slow_unless
from numpyro import handlers
from scipy import stats

from probdiff import derivation, schedules
from probdiff.datasets.synthetic import Heartbeat
from probdiff.derivation.bernoulli import log_odds_of_product
from probdiff.derivation.bernoulli import moments as bernoulli_moments
from probdiff.derivation.gradient import directions
from probdiff.derivation.ledger import bernstein
from probdiff.derivation.pair import Pair
from probdiff.derivation.score import enumerated_elbo, gradient_draws
from probdiff.derivation.sites import log_prob
from probdiff.families.binomial import Binomial
from probdiff.likelihood.exact import exact
from probdiff.psis import pareto_k
from probdiff.reference import flips
from probdiff.reference.quadrature import state_number, states
from probdiff.reference.two_state import TwoStateChain

T, D = 3, 2
BETA = np.array([0.2, 0.4, 0.3])
RATE = 0.3
X = np.random.default_rng(0).integers(0, 2, size=(16, D))
HEART = np.asarray(Heartbeat().sequences)


SLOPE = jnp.array([1.9, 1.4, 1.7])


# arithmetic of the programs is compiled, as else each operation is a program of its own for each shape
@jax.jit
def mean_given(slope, x_t):
    signed = 2.0 * x_t - 1
    return jax.nn.sigmoid(slope * signed + 0.5 * signed[..., ::-1] - 0.4)


@jax.jit
def mixed(x, b):
    """The rate of a bit that keeps its value x with probability 1 − b and is drawn anew else."""
    return x * (1 - b) + RATE * b


def f_mu(x_t, t):
    return mean_given(numpyro.param("slope", SLOPE)[t - 1], x_t)


def f_sigma(x_t, t):
    rate = f_mu(x_t, t)
    return (rate * (1 - rate))[..., None] * jnp.eye(x_t.shape[-1])


def bernoulli(rate):
    return dist.Bernoulli(rate).to_event(1)


PIECES = {
    "rate": mixed,
    "beta": BETA,
    "prior": lambda x: RATE * jnp.ones(x.shape),
    "mean": f_mu,
    "of_q": bernoulli,
    "of_x_T": bernoulli,
    "kernel": bernoulli,
    "step": lambda pair, x, b: pair.of_q(pair.rate(x, b)),
    "start": lambda pair, x_0: pair.of_x_T(pair.prior(x_0)),
    "reverse": lambda pair, mean, t: pair.kernel(mean),
}
Hand = partial(pairs.Hand, PIECES)
RIGHT = Hand()


def check(pair, seed=0, x=X, **kwargs):
    key = jax.random.key(seed)
    kwargs = {"f_mu": f_mu, "f_sigma": f_sigma, "num_draws": 300} | kwargs
    return derivation.check(pair.model, pair.guide, x, rng_key=key, **kwargs)


class Swapped:
    model, guide = RIGHT.guide, RIGHT.model


class NoVector:
    """A guide without `to_event` and without a plate: every bit a datum."""

    model = RIGHT.model

    @staticmethod
    def guide(x_0):
        x = x_0
        for t in range(1, T + 1):
            x = numpyro.sample(f"x_{t}", dist.Bernoulli(mixed(x, BETA[t - 1])))


def misprinted(sites):
    numpyro.sample("p(x_0)", bernoulli(RATE * jnp.ones(sites[0].shape)), obs=sites[0])


def twice(t, rate):
    return lambda xs: numpyro.sample(f"x_{t - 1} again", bernoulli(rate(xs)), obs=xs[t - 1])


@jax.jit
def neighbour(x, b):
    """Each bit is that of its neighbour, to one part in ten."""
    return (0.9 * x + 0.1 * x[..., ::-1]) * (1 - b) + RATE * b


@jax.jit
def together(rate):
    """The bits are a little more likely together, or a little less, each at its own rate on the whole."""
    rates = rate[..., None, :] + 0.05 * jnp.array([[1.0], [-1.0]])
    return dist.MixtureSameFamily(dist.Categorical(jnp.full(rates.shape[:-1], 0.5)), bernoulli(rates))


class Unnormalised(dist.BernoulliProbs):
    """A Bernoulli whose log density forgets the zeros."""

    def log_prob(self, value):
        return value * jnp.log(self.probs)


class Rarer(dist.BernoulliProbs):
    """A Bernoulli whose draws are rarer than its density says."""

    def sample(self, key, sample_shape=()):
        return dist.BernoulliProbs(0.8 * self.probs).sample(key, sample_shape)


class FromOne(dist.BernoulliProbs):
    """Bits whose density is that of independent ones, drawn from one uniform number."""

    def sample(self, key, sample_shape=()):
        uniform = jax.random.uniform(key, (*sample_shape, *self.batch_shape[:-1], 1))
        return (uniform < self.probs).astype(int)


def rarer(rate):
    return Rarer(rate).to_event(1)


def from_one(rate):
    return FromOne(rate).to_event(1)


def _detached(x_t, t):
    return mean_given(jax.lax.stop_gradient(numpyro.param("slope", SLOPE))[t - 1], x_t)


def _half_detached(x_t, t):
    slope = numpyro.param("slope", SLOPE)
    return mean_given((0.5 * slope + 0.5 * jax.lax.stop_gradient(slope))[t - 1], x_t)


SLIPS = {
    "no rate of fresh bits": (Hand(rate=jax.jit(lambda x, b: x * (1 - b))), "N3"),
    "fresh bits at one half": (Hand(rate=jax.jit(lambda x, b: x * (1 - b) + 0.5 * b)), "N7"),
    "fresh bits of another rate at one step": (Hand(rate=jax.jit(lambda x, b: x * (1 - b) + (RATE + b / 9) * b)), "N3"),
    "bits flipped with probability β": (Hand(rate=jax.jit(lambda x, b: x * (1 - b) + (1 - x) * b)), "N3"),
    "bits kept with probability √(1−β)": (
        Hand(rate=jax.jit(lambda x, b: x * jnp.sqrt(1 - b) + RATE * (1 - jnp.sqrt(1 - b)))), "N3",
    ),
    "β shifted by one": (Hand(shift=1), "N3"),
    "bits that depend on a neighbour": (Hand(rate=neighbour), "N3"),
    "bits of q that are drawn together": (Hand(of_q=together), "N3"),
    "guide looks two steps back": (Hand(back=2), "N2"),
    "guide against the order of time": (Hand(times=range(T, 0, -1), back=-1), "N2"),
    "p(x_0) in place of p(x_T)": (
        Hand(wrap_model=only("x_3", handlers.mask(mask=False)), extra_model=misprinted), "N13",
    ),
    "p(x_T) missing": (Hand(wrap_model=only("x_3", handlers.mask(mask=False))), "N13"),
    "a factor of p missing": (Hand(wrap_model=only("x_1", handlers.mask(mask=False))), "N13"),
    "a factor of p doubled": (Hand(extra_model=twice(2, lambda xs: f_mu(xs[2], 2))), "N13"),
    "a factor of q missing": (Hand(wrap_guide=only("x_2", handlers.mask(mask=False))), "N5"),
    "a factor of q doubled": (Hand(extra_guide=twice(3, lambda xs: 0.5 * xs[3] + 0.2)), "N5"),
    "a plate that scales p": (Hand(model_plate=lambda n: numpyro.plate("data", 1000, subsample_size=n)), "N13"),
    "a plate too many": (Hand(wrap_model=lambda name: numpyro.plate("more", 10, dim=-2)), "N13"),
    "p scaled": (Hand(wrap_model=lambda name: handlers.scale(scale=2.0)), "N13"),
    "q scaled": (Hand(wrap_guide=lambda name: handlers.scale(scale=0.5)), "N5"),
    "q and p swapped": (Swapped(), "N13"),
    "p(x_T) of another rate": (Hand(prior=lambda x: 0.4 * jnp.ones(x.shape)), "N7"),
    "model peeks at x_0": (Hand(peeked=lambda mean, x_0: 0.9 * mean + 0.1 * x_0), "N8"),
    "f_μ without its last term": (Hand(mean=lambda x, t: 0.9 * f_mu(x, t)), "N8"),
    "a kernel that is not normalised": (
        Hand(kernel=lambda rate: Unnormalised(rate).to_event(1)), "N8",
    ),
    "draws of p that are not of its density": (Hand(kernel=rarer), "N8"),
    "draws of p that are not independent": (Hand(kernel=from_one), "N8"),
    "draws of q that are not of its density": (Hand(of_q=rarer), "N3"),
    "draws of q that are not independent": (Hand(of_q=from_one), "N3"),
    "draws of x_T that are not of its density": (Hand(of_x_T=rarer), "N7"),
    "no event dimension": (NoVector(), "N5"),
    "data in another order": (Hand(mean=lambda x, t: f_mu(x[::-1], t)), "N13"),
    "a plate of a fixed size": (Hand(model_plate=lambda n: numpyro.plate("data", 16)), "N13"),
    "β detached from the gradient": (Hand(seen=jax.lax.stop_gradient), "N4"),
    "β half detached": (Hand(seen=lambda b: 0.5 * b + 0.5 * jax.lax.stop_gradient(b)), "N4"),
    "f_μ detached from the gradient": (Hand(mean=_detached), "N10"),
    "f_μ half detached": (Hand(mean=_half_detached), "N10"),
}  # fmt: skip
# of each row, for each way in which it can fail that has to do with bits; Gaussian pairs show the other ways
QUICK = [
    "bits that depend on a neighbour", "draws of q that are not independent", "p(x_T) of another rate",
    "draws of x_T that are not of its density", "a kernel that is not normalised", "model peeks at x_0",
    "β detached from the gradient", "f_μ detached from the gradient",
]  # fmt: skip
ALSO = {  # where one slip is two
    # paths that q never draws, and a logarithm of zero to differentiate
    "no rate of fresh bits": {"N3", "N4", "N14"},
    # nor is any mean of draws what it should be
    "draws of q that are not of its density": {"N1", "N3", "N17"},
    "draws of q that are not independent": {"N3", "N14"},
    "draws of x_T that are not of its density": {"N7", "N12"},  # from which p(x_0) is estimated
    "q and p swapped": {"N5", "N13"},  # both chains have the wrong sites
    "data in another order": {"N8", "N13"},  # and f_μ is not as claimed
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("slip", slow_unless(SLIPS, QUICK))
def test_each_slip_is_caught_at_the_row_that_names_it(slip, monkeypatch):
    pair, tag = SLIPS[slip]
    if tag not in ("N4", "N10"):  # where the sum over all paths is right, as it takes most of the time
        monkeypatch.setattr("probdiff.derivation.bits._PATHS", 0)
    ledger = check(pair)
    failing = {row.statement.tag for row in ledger.failures}
    assert failing == ALSO.get(slip, {tag})
    for row in ledger:  # no other row is judged on what is broken
        if row.verdict == "depends":
            assert set(row.detail.removeprefix("on ").split(", ")) <= failing


RIGHT_PAIRS = {
    "rates of many sizes": (Hand(beta=np.array([0.5, 0.01, 0.9])), X),
    "one step": (Hand(beta=np.array([0.7])), X),
    "truth values": (RIGHT, X.astype(bool)),
    "floating-point": (RIGHT, X.astype(float)),
    "data that are all zero": (RIGHT, 0 * X),
    "a mixture of products": (Hand(kernel=together), X),
    "one bit": (Hand(mean=lambda x, t: 0.3 + 0.4 * x), X[:, :1]),
    "too many bits to enumerate": (Hand(beta=np.array([0.8, 0.9]), mean=lambda x, t: 0.25 + 0.1 * x), HEART),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", slow_unless(RIGHT_PAIRS, ["rates of many sizes", "a mixture of products"]))
def test_right_pairs_hold(name):
    pair, x = RIGHT_PAIRS[name]
    ledger = check(pair, x=x, f_mu=None, f_sigma=None)
    ledger.assert_holds()
    assert ledger["N17"].verdict == "holds"
    assert [row.statement.tag for row in ledger] == [f"N{i}" for i in range(1, 18)]
    assert "Bernoulli" in ledger["N3"].statement.text
    assert r"\mathcal N" not in "".join(row.statement.latex for row in ledger)
    assert len(ledger.comparisons()) < 60
    if x.shape[1] < 12:
        assert "enumeration" in set(ledger.comparisons().loc[["N17"], "left route"])


class Opaque(dist.Distribution):
    """Independent bits that say no more of themselves than a density and draws."""

    support = dist.constraints.independent(dist.constraints.boolean, 1)

    def __init__(self, rates):
        self.inside = bernoulli(rates)
        super().__init__(self.inside.batch_shape, self.inside.event_shape)

    def log_prob(self, value):
        return log_prob(self.inside, value)

    def sample(self, key, sample_shape=()):
        return self.inside.sample(key, sample_shape)


@pytest.mark.usefixtures("x64")
def test_kernels_of_unknown_rates_are_not_called_wrong(monkeypatch):
    """As of more than 12 bits, which are not enumerated."""
    for room in ("bernoulli", "bits"):
        monkeypatch.setattr(f"probdiff.derivation.{room}.MOST_BITS", 1)
    ledger = check(Hand(kernel=Opaque), f_mu=None, f_sigma=None)
    assert ledger["N8"].verdict == "not applicable"
    assert "the rates of p's kernels of 2 bits have no closed form" in ledger["N8"].detail
    assert not ledger.failures


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_right_pair_holds_for_every_seed(monkeypatch):
    """20 seeds at a failure rate of 1e-4 each: some seed would fail in one of 500 such tests."""
    compile_once(monkeypatch)
    scores = {"N9": [], "N14": [], "N17": []}
    z = stats.norm.isf(1e-4 / 50 / 2)
    for seed in range(20):
        ledger = check(RIGHT, seed)
        assert {row.verdict for row in ledger} <= {"holds", "approximate"}, str(ledger)
        table = ledger.comparisons()
        noisy = table[table["tolerance from"].str.startswith("Monte Carlo")]
        assert len(noisy) < 50  # among which the failure rate is shared
        for tag, values in scores.items():
            one = noisy.loc[[tag]].iloc[0]
            values.append(z * one.difference / one.tolerance)
    for values in scores.values():  # standard scores, so the tolerances are neither too tight nor too wide
        assert abs(np.mean(values)) < 5 / np.sqrt(20)
        low, high = np.sqrt(stats.chi2.isf([1 - 1e-3, 1e-3], 19) / 19)
        assert low < np.std(values, ddof=1) < high


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_binomial_diffusion_holds_in_every_form():
    d, params = small(2)
    x = X.astype(np.uint8)
    ledger = derivation.check(
        d.reverse, d.forward, x, params=params, rng_key=KEY, forms=derivation.forms(d), num_draws=300
    )
    ledger.assert_holds()
    rows = ledger.comparisons()
    assert {"the at-time pair", "TraceMeanField_ELBO"} <= set(rows.loc[["N17"], "right route"])
    # what the rows say, by the enumeration of `exact`
    log_p = exact(d, params, x).values
    k = float(elbo_by_enumeration(d, params, jnp.asarray(x))) / 16
    of_row = rows.loc[["N17"]]
    assert of_row[of_row["left route"] == "enumeration"].iloc[0]["left"] == pytest.approx(k, rel=1e-9)
    assert f"L − K is {log_p.mean() - k:.4g} nats" in ledger["N17"].detail


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_posterior_order_and_a_last_step_that_keeps_nothing_hold():
    d, params = small(2, T=2, schedule=schedules.harmonic(2))
    beta = d.schedule().beta
    ledger = derivation.check(
        d.reverse, d.forward_posterior, X.astype(np.uint8), params=params, rng_key=KEY, beta=beta, num_draws=300
    )
    ledger.assert_holds()
    assert ledger["N1"].verdict == "holds"  # β_T = 1, so q(x_T) is Bernoulli(π)
    assert "TraceMeanField_ELBO" in set(ledger.comparisons().loc[["N17"], "right route"])
    assert ledger["N3"].verdict == ledger["N17"].verdict == "holds"


BAD = {
    "counts": (
        lambda x: numpyro.sample("x_1", dist.Poisson(1.0 + x).to_event(1)), X,
        TypeError, "some x_t of the pair are Poisson and some bits",
    ),
    "kinds": (
        lambda x: numpyro.sample("x_1", dist.Categorical(jnp.ones((*x.shape, 2)) / 2).to_event(1)), X,
        TypeError, "some x_t of the pair are CategoricalProbs and some bits",
    ),
    "a density": (
        lambda x: numpyro.sample("x_1", dist.Normal(1.0 * x, 1.0).to_event(1)), X,
        TypeError, "some x_t of the pair are bits",
    ),
    "twos": (RIGHT.guide, 2 * X, ValueError, r"x has entries 2.0 in row\(s\) .*; bits are wanted, 0 or 1"),
    "halves": (RIGHT.guide, 0.5 * X, ValueError, "x has entries 0.5 in row"),
    "not a number": (RIGHT.guide, np.where(X == 1, np.nan, 0.0), ValueError, "NaN or infinite"),
    "text": (RIGHT.guide, X.astype(str), TypeError, "x has dtype <U21"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    guide, x, error, message = BAD[case]
    with pytest.raises(error, match=message):
        derivation.check(RIGHT.model, guide, x, rng_key=KEY)


# the closed forms, by enumeration


def test_a_two_state_chain_is_its_paths():
    rng, N, size, length = np.random.default_rng(0), 3, 2, 3
    first, steps = rng.dirichlet([1, 1], (N, size)), rng.dirichlet([1, 1], (length, N, size, 2))
    chain = TwoStateChain(first, steps)
    down = chain.flipped()
    y = states(size)
    log_p_last, forward, backward = np.zeros((N, 4)), [], []
    for path in itertools.product(range(4), repeat=length + 1):
        bits = [np.broadcast_to(y[s], (N, size)) for s in path]
        of_first = np.log(np.where(bits[0] == 1, first[..., 1], first[..., 0])).sum(1)
        log_p = of_first + sum(chain.log_step(k, bits[k - 1], bits[k]) for k in range(1, length + 1))
        by_bayes = down.log_marginal(0, y)[:, path[-1]]
        by_bayes = by_bayes + sum(
            down.log_step(k, bits[length - k + 1], bits[length - k]) for k in range(1, length + 1)
        )
        forward.append(log_p)
        backward.append(by_bayes)
        log_p_last[:, path[-1]] += np.exp(log_p)
    np.testing.assert_allclose(backward, forward, rtol=1e-12)
    np.testing.assert_allclose(np.exp(chain.log_marginal(length, y)), log_p_last, rtol=1e-12)
    np.testing.assert_allclose(np.exp(chain.log_kernel(2, y)).sum(0), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(state_number(y), np.arange(4))
    before = np.broadcast_to(y[1], (20_000, N, size))
    drawn = chain.draw(2, before, KEY).mean(0)
    np.testing.assert_allclose(drawn, np.where(y[1] == 1, steps[1, ..., 1, 1], steps[1, ..., 0, 1]), atol=0.02)
    assert chain.full
    assert not TwoStateChain(first, np.round(steps)).full


def test_moments_of_a_mixture_are_those_of_enumeration():
    rng = np.random.default_rng(0)
    rates, weights = jnp.asarray(rng.uniform(size=(4, 3, 2))), jnp.asarray(rng.dirichlet([1, 1, 1], 4))
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), bernoulli(rates))
    y = states(2)
    p = np.exp(mixture.log_prob(jnp.asarray(y[:, None])))
    mean = p.T @ y
    cov = np.einsum("mn,md,me->nde", p, y, y) - mean[:, :, None] * mean[:, None]
    x = jnp.zeros((4, 2))

    class Opaque(dist.Distribution):
        support = dist.constraints.independent(dist.constraints.boolean, 1)

        def log_prob(self, value):
            return mixture.log_prob(value)

    for kernel in (mixture, Opaque(batch_shape=(4,), event_shape=(2,))):
        of_kernel = bernoulli_moments(kernel, x)
        np.testing.assert_allclose(of_kernel[0], mean, rtol=1e-5)
        np.testing.assert_allclose(of_kernel[1], cov, atol=1e-6)
    assert np.isnan(log_odds_of_product(mixture, x)).all()
    odds = log_odds_of_product(bernoulli(rates[:, 0]), x)
    np.testing.assert_allclose(odds, np.log(rates[:, 0] / (1 - rates[:, 0])), rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_sum_over_all_paths_and_its_gradient_are_those_of_the_closed_form():
    d, params = small(2)
    every = jnp.asarray(all_bits(2))
    x = every[1:3]

    def value_and_slope(elbo):
        return jax.jit(jax.value_and_grad(lambda beta: elbo({**params, "beta": beta})))(params["beta"])

    exact, slope = value_and_slope(lambda params: elbo_by_enumeration(d, params, x))
    for guide in (d.forward, d.forward_posterior):
        pair = Pair(d.reverse, guide, x, params)
        summed, its_slope = value_and_slope(lambda params, pair=pair: enumerated_elbo(pair, every, params).sum())
        assert float(summed) == pytest.approx(float(exact), rel=1e-10)
        np.testing.assert_allclose(its_slope, slope, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_draws_of_the_gradient_have_the_mean_of_the_sum_over_all_paths():
    pair = Pair(RIGHT.model, RIGHT.guide, jnp.asarray(X), None)
    along, every = directions(pair, KEY, KEY), jnp.asarray(states(D), X.dtype)

    @jax.jit
    def of_data(u):
        return enumerated_elbo(pair, every, along.params(u))

    exact = jax.vmap(jax.linearize(lambda u: of_data(u).sum(), along.u)[1])(along.moves)
    paths = {t: jnp.asarray(x) for t, x in pair.paths(KEY, 10_240)[0].items()}  # five blocks of one size
    draws = np.asarray(gradient_draws(pair, paths, along, of_data(along.u)))
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(error < 0.03)
    assert np.all(np.abs(draws.mean(0) - exact) < 4.5 * error)


@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_the_reversed_kernel_leaves_products_with_the_square_of_beta_and_the_constant_of_theory(rate):
    rng, D = np.random.default_rng(1), 3
    q, x = rng.dirichlet(np.full(8, 3.0)), np.array([1.0, 0.0, 1.0])
    betas = np.array([1e-5, 2e-5, 4e-5])
    kl, limit = flips.rate(q, x, rate, betas)
    assert np.polyfit(np.log(betas), np.log(kl), 1)[0] == pytest.approx(2, abs=0.01)
    assert kl[0] / limit[0] == pytest.approx(1, abs=0.01)
    # the same KL, from the joint of NumPyro's kernels and SciPy's entropy
    beta = 0.2
    step = np.exp(Binomial((D,), rate, 1).step(states(D)[:, None], schedules.Fixed([beta])(), 1).log_prob(states(D)))
    np.testing.assert_allclose(flips.step_matrix(beta, np.full(D, rate)), step, rtol=1e-5)
    joint = q[:, None] * flips.step_matrix(beta, np.full(D, rate))
    for i in range(8):
        p = joint[:, i] / joint[:, i].sum()
        table = p.reshape(2, 2, 2)
        marginals = [table.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
        product = np.einsum("i,j,k->ijk", *marginals).ravel()
        assert flips.total_correlation(flips.reversed_kernel(q, joint / q[:, None])[i]) == pytest.approx(
            stats.entropy(p, product), rel=1e-9
        )


def test_independent_data_stay_products():
    x = all_bits(3).astype(float)  # each once: independent bits
    beta = np.array([0.1, 0.5, 1.0])
    np.testing.assert_allclose(flips.chain_total_correlation(x, beta, np.full(3, 0.3)), 0.0, atol=1e-12)
    assert flips.chain_total_correlation(x[[0, 7]], beta, np.full(3, 0.3))[:2].min() > 0.01


def test_counts_of_rare_events_fail_no_more_often_than_stated():
    rng, p, n = np.random.default_rng(0), np.array([0.5, 0.01, 1e-4]), 2000
    fails = [
        not bernstein("", "", rng.binomial(n, p) / n, "", p, n, p * (1 - p), failure_rate=0.05).holds
        for _ in range(2000)
    ]
    assert np.mean(fails) < 0.05
    assert not bernstein("", "", [0.0, 0.1], "", [0.0, 0.2], [0, n], 0.16, failure_rate=0.01).holds
    assert bernstein("", "", 1.0, "", 0.5, 0, 0.25, failure_rate=0.01).holds  # no draws say nothing


def test_weights_that_take_few_values_have_a_k():
    rng = np.random.default_rng(0)
    few = np.log(rng.choice([1.0, 1.1], size=(500, 2), p=[0.3, 0.7]))
    heavy = np.log(rng.choice([1.0, 50.0], size=(500, 2), p=[0.97, 0.03]))
    smooth = rng.normal(size=(500, 2))
    k = [pareto_k(xr.DataArray(w, dims=("draw", "datum"))).to_numpy() for w in (few, heavy, smooth)]
    assert np.all(k[0] < 0)
    assert np.all(k[1] > 0.5)
    with_zeros = few.copy()
    with_zeros[::7] = -np.inf
    for w in (np.where(with_zeros == -np.inf, with_zeros, 0.0), with_zeros):  # zeros make no tail longer
        assert np.all(pareto_k(xr.DataArray(w, dims=("draw", "datum"))) < 0)
    expected = (-xr.DataArray(smooth, dims=("draw", "datum"))).azstats.psislw(dim=["draw"])[1]
    np.testing.assert_array_equal(k[2], expected)
