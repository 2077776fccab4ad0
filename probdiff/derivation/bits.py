"""What the rows are told of pairs of bits: two-state chains, enumeration, and kernels of Bernoullis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from scipy import stats
from scipy.special import log_expit, logsumexp, rel_entr

from probdiff.derivation.bernoulli import log_odds_of_product, mixture_parts, moments
from probdiff.derivation.evidence import Evidence, ForwardForm, Moments, NotApplicable, Reversal, Terminal, Wrong
from probdiff.derivation.gradient import directions
from probdiff.derivation.ledger import Comparison, bernstein, machine
from probdiff.derivation.pair import Chain, Path, log_probs_in_blocks
from probdiff.derivation.score import MeanSlope, enumerated_elbo, gradient_draws, reweighted_elbo
from probdiff.derivation.sites import log_prob
from probdiff.reference import flips
from probdiff.reference.quadrature import MOST_BITS, states
from probdiff.reference.two_state import TwoStateChain
from probdiff.types import Key, Params

_ENUMERATED = 10  # of a chain whose states are enumerated
_MOST_PAIRS = 200  # of x_s and x_t whose mixed difference is taken
_FLIPPED = 16  # bits of x_t flipped one by one
_REVERSED = 6  # bits of N6 at the chain's own β_t
_NEVER = -500.0  # log probability of what cannot be, in place of −∞
_PATHS = 2**22  # through all states: N·T·M² of the largest K that is summed over them


class PairOfBits:
    """q(x_t given x_{t−1}) = Bernoulli(x_{t−1}·(1−β_t) + π·β_t) of each bit, p(x_T) = Bernoulli(π).

    p(x_{t−1} given x_t) is any distribution of bits. See `evidence.Reader`.
    """

    wording = "bits"
    mostly_noise = 0.9
    not_of_n3 = "the bits of x_t are not independent, or one depends on another bit of x_{t−1}"

    def other(self, x: np.ndarray) -> np.ndarray:
        """Every bit flipped."""
        return np.where(x == 0, 1, 0).astype(x.dtype)

    def moments(self, kernel: dist.Distribution, x: Array) -> Moments:
        return moments(kernel, x)

    def forward(self, e: Evidence) -> ForwardForm | None:
        q = self._forward(e)
        if q is None:
            return None
        return ForwardForm(q, _read(q)[0].mean((1, 2)), "the kernels' P(1 given 0) + P(0 given 1)")

    def _forward(self, e: Evidence) -> TwoStateChain | None:
        """Read off the kernels where x_0 and the x_t are all zeros and all ones, and confirmed on other paths."""
        chain, T, D = e.pair.q, e.pair.num_timesteps, e.pair.size
        ends = jnp.stack([jnp.zeros_like(e.pair.x[0]), jnp.ones_like(e.pair.x[0])])
        same = jnp.broadcast_to(ends[:, None], (2, *ends.shape))  # (x_t, x_0, *event)
        ask = {t: same if t else jnp.moveaxis(same, 0, 1) for t in range(T + 1)}
        log_odds = {t: np.asarray(v, np.float64) for t, v in chain.each(ask, log_odds_of_product).items()}
        near = {t: x[:4] for t, x in e.probes.items()}
        for t, stated in chain.each(near, log_odds_of_product).items():
            before = t - 1 if chain.ascending else t + 1
            x_0 = e.flat(near[0]) == 1
            above = e.flat(near[before]) == 1 if 0 < before <= T else x_0
            predicted = np.choose(
                2 * above + x_0, [log_odds[t][a, c] for a in (0, 1) for c in (0, 1)]
            )  # of bits given their own bit of the neighbour and of x_0
            off = np.abs(np.asarray(stated, np.float64) - predicted)
            if not np.all(off <= 1e3 * e.eps * (1 + np.abs(predicted))):
                return None
        odds = np.moveaxis(np.stack([log_odds[t] for t in range(1, T + 1)]), 1, 3)  # (T, x_0, D, the neighbour)
        to = np.exp(log_expit(np.stack([-odds, odds], -1)))
        if chain.ascending:
            x_1, steps = to[0, :, :, 0], to[1:]
        else:
            up = TwoStateChain(to[-1, :, :, 0], to[-2::-1]).flipped()
            x_1, steps = up.first, up.steps
        first = np.broadcast_to(np.moveaxis(x_1, 0, 1), (1, 2, D, 2, 2))  # x_0 is the row, and what x_1 comes from
        both = TwoStateChain(np.broadcast_to(np.eye(2)[:, None], (2, D, 2)), np.concatenate([first, steps]))
        own, bit = e.x_0.astype(int), np.arange(D)
        return TwoStateChain(both.first[own, bit], both.steps[:, own, bit])

    def reverse(self, e: Evidence) -> None:
        return None

    def nodes(self, e: Evidence) -> np.ndarray | None:
        return states(e.pair.size) if e.pair.size <= _ENUMERATED else None

    def terminal(self, e: Evidence) -> Terminal:
        pi = self._probability(e)

        def kl_of(x_T: np.ndarray) -> np.ndarray:
            return rel_entr(x_T, np.stack([1 - pi, pi], -1)).sum((1, 2))

        def kl_from_alpha_bar(alpha_bar: float) -> np.ndarray:
            on = _marginal(e.x_0, alpha_bar, pi)
            return kl_of(np.stack([1 - on, on], -1))

        def log_prob(x_T: np.ndarray) -> np.ndarray:
            return stats.bernoulli.logpmf(x_T, pi).sum(-1)

        return Terminal("Bernoulli(π)", log_prob, lambda: kl_of(_two_state_q(e).marginals()[-1]), kl_from_alpha_bar)

    def _probability(self, e: Evidence) -> Float[np.ndarray, " D"]:
        """π of q where N3 holds, else that of p(x_T)."""
        if e.holds["N3"]:
            return _pi(e)
        return e.moments["p"][e.pair.num_timesteps][0][0, 0]

    def log_q_from_alpha_bar(self, e: Evidence) -> tuple[float, str]:
        """q(x_T given x_0) ∏ q(x_{t−1} given x_t, x_0), each bit's posterior from ᾱ by Bayes' rule."""
        T, pi = e.pair.num_timesteps, self._probability(e)
        alpha_bar = np.concatenate([[1.0], np.cumprod(1 - e.beta)])
        path = [e.flat(e.draws[0][t][0]) for t in range(T + 1)]
        log_q = stats.bernoulli.logpmf(path[T], _marginal(path[0], alpha_bar[T], pi)).sum()
        for t in range(T, 1, -1):
            on, off = (
                stats.bernoulli.pmf(path[t], _marginal(before, 1 - e.beta[t - 1], pi))
                * stats.bernoulli.pmf(before, _marginal(path[0], alpha_bar[t - 1], pi))
                for before in (np.ones_like(path[0]), np.zeros_like(path[0]))
            )
            log_q += np.log(np.where(path[t - 1] == 1, on, off) / (on + off)).sum()
        return float(log_q), "∏ in descending order, from ᾱ by Bayes' rule"

    def couplings(self, e: Evidence, chain: Chain) -> tuple[np.ndarray, float, str]:
        """The largest mixed difference of log q as random bits of x_s and random bits of x_t are flipped."""
        T, rng = e.pair.num_timesteps, np.random.default_rng(np.asarray(jax.random.key_data(e.key())))
        path = {t: np.concatenate([np.asarray(x[:2])] * 2) for t, x in e.point(0).items()}
        rows = len(path[0])
        chosen = rng.uniform(size=(T + 1, rows, e.pair.size)) < 0.5
        some = np.arange(e.pair.size) == rng.integers(e.pair.size, size=(T + 1, rows, 1))
        which = (chosen | some).reshape(T + 1, *path[0].shape)
        s, t = np.triu_indices(T + 1, 2)
        # where a slip is likely first: two steps back, and x_0
        kept = np.argsort(np.where((t == s + 2) | (s == 0), 0, 1) + rng.uniform(size=len(s)))[:_MOST_PAIRS]
        s, t = s[kept], t[kept]
        alone = np.arange(T + 1)
        flipped = np.zeros((1 + len(alone) + len(s), T + 1), bool)
        flipped[1 + alone, alone] = True
        flipped[np.arange(len(s)) + T + 2, s] = flipped[np.arange(len(s)) + T + 2, t] = True
        total, size = np.zeros((len(flipped), rows)), 0.0
        moved = _flipped(path, {k: flipped[:, k, None, *[None] * (which[k].ndim - 1)] & which[k] for k in path})
        for found in log_probs_in_blocks(chain, moved).values():
            of_site = np.maximum(np.float64(found), _NEVER)
            total, size = total + of_site, size + np.abs(of_site).max()
        mixed = np.zeros((T + 1, T + 1))
        of_pair = total[T + 2 :] - total[1 + s] - total[1 + t] + total[0]
        mixed[s, t] = np.abs(of_pair).max(1) if len(s) else 0.0
        return mixed, 100 * e.eps * size, "mixed differences"

    def forward_kernels(self, e: Evidence) -> list[Comparison]:
        return self._steps(e) + self._kernels(e, e.pair.q) + self._step_draws(e)

    def reverse_kernels(self, e: Evidence) -> list[Comparison]:
        found = self._kernels(e, e.pair.p)
        try:
            return found + self._reverse_draws(e)
        except NotApplicable as why:
            raise NotApplicable(str(why), found) from why

    def _steps(self, e: Evidence) -> list[Comparison]:
        """β_t and π read off q, and the density of the sites where they are q(x_t given x_{t−1}) themselves."""
        (beta, route), (of_q, pi_t), pi, eps = e.beta_and_route, _read(_two_state_q(e)), _pi(e), e.eps
        if not np.all((pi > 0) & (pi < 1)):
            raise Wrong(
                f"π, the probability of a one among bits that are drawn anew, is {pi}; it must lie between 0 and 1"
            )
        each = beta[:, None, None]
        found = [
            machine("β_t = P(1 given 0) + P(0 given 1)", "from q", of_q, route, each, 200 * eps),
            machine("π = P(1 given 0)/β_t", "at each t", pi_t, "over all t", pi, 200 * eps / each),
        ]
        if e.pair.q.ascending:
            stated, by_scipy, scale = [], [], []
            for t, x in e.point(0).items():
                if t:
                    r = _marginal(e.flat(e.point(0)[t - 1]), 1 - beta[t - 1], pi)
                    stated.append(np.float64(e.draws[1][t][0]))
                    by_scipy.append(stats.bernoulli.logpmf(e.flat(x), r).sum(-1))
                    scale.append(np.sum(100 * eps * (1 + 1 / np.where(e.flat(x) == 1, r, 1 - r)), -1))
            name = "Bernoulli(x_{t−1}·(1−β_t) + π·β_t), SciPy"
            found += [machine("log q(x_t | x_{t−1})", "the site", stated, name, by_scipy, scale)]
        return found

    def _step_draws(self, e: Evidence) -> list[Comparison]:
        """How many bits of each value become one, and whether they do so each by itself."""
        T, D, beta, pi = e.pair.num_timesteps, e.pair.size, e.beta, _pi(e)
        path = {t: e.flat(x).reshape(-1, D) for t, x in e.draws[0].items()}
        drawn, expected, number, variance, residuals = [], [], [], [], []
        for t in range(1, T + 1):
            mean = _marginal(path[t - 1], 1 - beta[t - 1], pi)
            residuals.append((path[t] - mean, np.sum(mean * (1 - mean), 1)))
            for value in (0, 1):
                of = path[t - 1] == value
                number.append(of.sum())
                drawn.append(path[t][of].sum() / max(number[-1], 1))
                expected.append(mean[of].sum() / max(number[-1], 1))
                variance.append(np.sum((mean * (1 - mean))[of]) / max(number[-1], 1))
        name, what = "P(x_t = 1 given x_{t−1} = 0 and 1)", "x_{t−1}·(1−β_t) + π·β_t"
        return [e.count(name, what, drawn, expected, number, variance), *self._together(e, residuals)]

    def _kernels(self, e: Evidence, chain: Chain) -> list[Comparison]:
        """Each kernel's log density is that of its rates, also where bits are flipped, and sums to one."""
        path, rng = e.point(0), np.random.default_rng(np.asarray(jax.random.key_data(e.key())))
        shape, D = path[0].shape, e.pair.size
        every = jnp.asarray(states(D)).reshape(-1, 1, *shape[1:]) if D <= MOST_BITS else None
        stated, by_scipy, scale, sums, means, rates = [], [], [], [], [], []
        for t, kernel in chain.kernels(path).items():
            parts, x = mixture_parts(kernel, path[t]), e.flat(path[t])
            if parts is not None:
                log_share, odds = (np.asarray(part, np.float64) for part in parts)
                one = np.eye(D)[rng.permutation(D)[:_FLIPPED]][:, None]
                y = np.concatenate([x[None], np.abs(x - one)])  # (1 + flips, N, D)
                of_part = log_expit(np.where(y[:, :, None] == 1, odds, -odds)).sum(-1)
                by_scipy.append(logsumexp(of_part + log_share - logsumexp(log_share, 1, keepdims=True), 2))
                stated.append(log_prob(kernel, jnp.asarray(y.reshape(-1, *shape), path[t].dtype)))
                scale.append(np.broadcast_to(100 * e.eps * (D + np.abs(odds).max(1).sum(-1)), by_scipy[-1].shape))
            if every is not None:
                p = np.exp(np.float64(log_prob(kernel, every.astype(path[t].dtype))))  # (M, N)
                sums.append(p.sum(0))
                means.append(p.T @ states(D))
                rates.append(e.moments[chain.name][t][0][0])
        found, name, rounding = [], chain.name, 200 * e.eps * D
        if stated:
            site, scipy, allowed = (np.concatenate([np.ravel(v) for v in part]) for part in (stated, by_scipy, scale))
            site, scipy = np.maximum(site, _NEVER), np.maximum(scipy, _NEVER)
            found += [
                machine(f"log density of each kernel of {name}", "the site", site, "its rates, SciPy", scipy, allowed)
            ]
        if sums:
            found += [
                machine(f"Σ over all states of each kernel of {name}", "enumeration", sums, "one", 1.0, rounding),
                machine(f"rates of each kernel of {name}", "enumeration", means, "as stated", rates, rounding),
            ]
        return found

    def terminal_draws(self, e: Evidence) -> list[Comparison]:
        """log p(x_T) at the draws of q, and draws of x_T."""
        T, D, pi = e.pair.num_timesteps, e.pair.size, self._probability(e)
        log_p, x_T = np.float64(e.draws[2][T]), e.flat(e.draws[0][T])
        scale = 200 * e.eps * np.sum(1 / pi + 1 / (1 - pi))
        route = f"Bernoulli(π), SciPy, π {'of q' if e.holds['N3'] else 'its own'}"
        drawn = e.flat(e.generated[T]).reshape(-1, D)
        return [
            machine("log p(x_T)", "the site", log_p, route, e.terminal.log_prob(x_T), scale),
            e.count("mean of x_T", "π", drawn.mean(0), pi, len(drawn), pi * (1 - pi)),
        ]

    def _reverse_draws(self, e: Evidence) -> list[Comparison]:
        """Draws of each reverse kernel against the means and the covariance that it states."""
        drawn, expected, variance, residuals, number = [], [], [], [], 1
        signs = _signs(e)
        for t in range(e.pair.num_timesteps):
            mean, cov = (values[4:] for values in e.moments["p"][t])
            if np.isnan(mean).any():
                raise NotApplicable(f"the rates of p's kernels of {e.pair.size} bits have no closed form")
            x = e.flat(e.generated[t][: len(mean)])
            number = mean[..., 0].size
            drawn.append(x.mean((0, 1)))
            expected.append(mean.mean((0, 1)))
            variance.append(np.mean(mean * (1 - mean), (0, 1)))
            residuals.append(((x - mean).reshape(number, -1), (signs @ cov @ signs).ravel()))
        means = e.count("mean of the draws of each bit", "f_μ", drawn, expected, number, variance)
        return [means, *self._together(e, residuals, signs)]

    def _together(
        self, e: Evidence, residuals: list[tuple[np.ndarray, np.ndarray]], signs: np.ndarray | None = None
    ) -> list[Comparison]:
        """The squares of residuals (R, D) along a random diagonal, against their variance there (R,), at each t."""
        D = e.pair.size
        if D == 1:
            return []
        along = _signs(e) if signs is None else signs
        squares = [np.mean((x @ along) ** 2) for x, _ in residuals]
        expected, number = [np.mean(v) for _, v in residuals], [len(v) for _, v in residuals]
        spread = np.array([D**2 * np.mean(v) for _, v in residuals])  # of squares, which are D² at most
        name, route = "variance of the draws along a random diagonal", "as the kernels state"
        return [bernstein(name, "draws", squares, route, expected, number, spread, e.failure_rate, D**2)]

    def reversal(self, e: Evidence) -> Reversal:
        """A reversed kernel of bits against its nearest product of Bernoullis, at β, 2β and 4β.

        At the chain's own β_t, of the first bits that vary among the data.
        """
        q = np.array([0.22, 0.06, 0.09, 0.14, 0.05, 0.18, 0.07, 0.19])  # of three correlated bits
        kl, limit = flips.rate(q, np.array([1.0, 0.0, 1.0]), 0.3, [1e-4, 2e-4, 4e-4])
        vary = np.flatnonzero(np.ptp(e.x_0, axis=0) > 0)[:_REVERSED]
        kept = vary if len(vary) else np.arange(1)
        sizes = flips.chain_total_correlation(e.x_0[:, kept], e.beta, _pi(e)[kept])
        here = (sizes, 1, f"nearest product) of the first {len(kept)} bit(s) that vary")
        return Reversal(kl, limit, 2.0, "β²·Σ_{i<j} c_i c_j·(r_ij·log(r_ij/(r_i r_j)) − r_ij + r_i r_j)", here)

    def rounding_of_paths(self, e: Evidence, chain: Chain) -> float:
        terms = e.draws[1 if chain.name == "q" else 2]
        of_sites = sum(np.abs(np.float64(terms[t][0])).sum() for t in chain.times)
        return 100 * e.eps * (e.x_0.size * len(chain.times) + of_sites)

    def elbo(self, e: Evidence) -> Callable[[Params, Key], Array]:
        return reweighted_elbo(e.pair, e.point(0))

    def mean_slopes(self, e: Evidence) -> list[MeanSlope]:
        """Where all paths of few bits can be summed over, and each kind of flip is drawn often enough."""
        (N, D), T, M = e.x_0.shape, e.pair.num_timesteps, 2**e.pair.size
        if not e.holds["N3"] or D > _ENUMERATED or N * T * M**2 > _PATHS:
            return []
        pi = _pi(e)
        along = directions(e.pair, *jax.random.split(e.key()))
        S = min(e.num_draws, max(100, 2**21 // (N * T * len(along.labels))))
        if S * N * D * e.beta.min() * min(pi.min(), 1 - pi.max()) < 100:
            return []
        every = jnp.asarray(states(D).reshape(-1, *e.pair.x.shape[1:]), e.pair.x.dtype)

        def elbo(u: Params) -> Float[Array, " N"]:
            return enumerated_elbo(e.pair, every, along.params(u))

        slope = jax.linearize(lambda u: elbo(u).sum(), along.u)[1]
        exact = np.asarray(jax.jit(jax.vmap(slope))(along.moves))
        paths = {t: jnp.asarray(x[:S]) for t, x in e.draws[0].items()}
        drawn = np.asarray(gradient_draws(e.pair, paths, along, elbo(along.u)))
        mean, error = drawn.mean(0), drawn.std(0) / np.sqrt(S)
        labels = [label[1:] for label in along.labels]
        return [MeanSlope(*of) for of in zip(*zip(*labels, strict=True), mean, error, exact, strict=True)]


def _two_state_q(e: Evidence) -> TwoStateChain:
    assert isinstance(e.q, TwoStateChain)
    return e.q


def _read(q: TwoStateChain) -> tuple[Float[np.ndarray, "T N D"], Float[np.ndarray, "T N D"]]:
    """β_t and π of each bit of each datum: P(1 given 0) + P(0 given 1), and the share of the former."""
    steps = q.steps
    beta = steps[..., 0, 1] + steps[..., 1, 0]
    return beta, steps[..., 0, 1] / np.maximum(beta, 1e-300)


def _pi(e: Evidence) -> Float[np.ndarray, " D"]:
    beta, pi = _read(_two_state_q(e))
    return np.sum(beta * pi, (0, 1)) / np.maximum(np.sum(beta, (0, 1)), 1e-300)


def _marginal(x: np.ndarray, kept: float, pi: Float[np.ndarray, " D"]) -> np.ndarray:
    """The mean of bits that keep the value x with probability `kept` and are drawn anew else."""
    return x * kept + pi * (1 - kept)


def _flipped(path: Path, which: Path) -> Path:
    return {t: np.where(which[t], 1 - np.asarray(x, np.int8), x).astype(x.dtype) for t, x in path.items()}


def _signs(e: Evidence) -> Float[np.ndarray, " D"]:
    return np.asarray(jax.random.rademacher(e.key(), (e.pair.size,)), np.float64)
