"""What the rows of the ledger share: draws of the pair, its closed forms, and estimates of p(x_0)."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer.inspect import get_model_relations
from scipy import stats

from probdiff.derivation.estimates import Estimate, from_draws, untrusted
from probdiff.derivation.gradient import Slope, slopes
from probdiff.derivation.grids import grid
from probdiff.derivation.ledger import Comparison, bernstein, compare, monte_carlo
from probdiff.derivation.pair import Chain, Pair, Path
from probdiff.derivation.score import MeanSlope
from probdiff.derivation.sites import log_prob
from probdiff.reference.linear_gaussian import LinearChain, elbo, gap, normal_log_prob
from probdiff.reference.quadrature import Closed, Grid
from probdiff.types import Key, Params


class NotApplicable(Exception):
    """Why a statement cannot be checked on this pair, and the comparisons that were made all the same."""

    def __init__(self, why: str, comparisons: list[Comparison] | None = None) -> None:
        super().__init__(why)
        self.comparisons = tuple(comparisons or ())


class Wrong(Exception):
    """Why a statement fails, where it is no matter of two numbers."""


type Finding = tuple[list[Comparison], str, float | None]  # comparisons, detail, size of an approximation
type Moments = tuple[Float[Array, "N D"], Float[Array, "N D D"]]


class ForwardForm(NamedTuple):
    """q(x_1…x_T given x_0) in closed form, and β_t with the name of where it was read."""

    chain: Closed
    beta: Float[np.ndarray, " T"]
    route: str


class Terminal(NamedTuple):
    """p(x_T) as the notes have it: its `name` and the log density of x_T (…, N, D), nats.

    KL(q(x_T given x_0) ‖ p(x_T)) of each datum is from q's kernels, and from ᾱ_T alone.
    """

    name: str
    log_prob: Callable[[np.ndarray], np.ndarray]
    kl: Callable[[], Float[np.ndarray, " N"]]
    kl_from_alpha_bar: Callable[[float], Float[np.ndarray, " N"]]


class Reversal(NamedTuple):
    """How far q(x_{t−1} given x_t) is from its nearest distribution of the form of q(x_t given x_{t−1}), nats.

    `kl` at three β, each twice the one before, beside its `limit` as β → 0, of `order` in β, by the `formula`. `here`:
    the same at the chain's own β_t from t = `first` on, for the `part` of x_t that the name says; None if unknown.
    """

    kl: np.ndarray
    limit: np.ndarray
    order: float
    formula: str
    here: tuple[np.ndarray, int, str] | None


class Reader(Protocol):
    """What the rows have to be told of the distributions of a pair: `gaussian.GaussianPair` and `bits.PairOfBits`.

    The rows that a pair has no reader for do not apply to it.
    """

    wording: str  # of the statements: "numbers", "bits" or "mixtures"
    mostly_noise: float  # share of noise in the x_k that ancestral draws start from
    not_of_n3: str  # why N3 fails where there is no forward form

    def moments(self, kernel: dist.Distribution, x: Array) -> Moments: ...
    def other(self, x: np.ndarray) -> np.ndarray: ...  # other values that x_t can have

    # in closed form, where there is one
    def forward(self, e: "Evidence") -> ForwardForm | None: ...
    def reverse(self, e: "Evidence") -> LinearChain | None: ...
    def nodes(self, e: "Evidence") -> np.ndarray | None: ...  # of the grid that p is summed on
    def terminal(self, e: "Evidence") -> Terminal: ...
    def reversal(self, e: "Evidence") -> Reversal: ...
    def log_q_from_alpha_bar(self, e: "Evidence") -> tuple[float, str]: ...  # of the first paths, and the route
    def rounding_of_paths(self, e: "Evidence", chain: Chain) -> float: ...

    # comparisons
    def couplings(self, e: "Evidence", chain: Chain) -> tuple[np.ndarray, float, str]: ...  # (T+1, T+1), rounding, what
    def forward_kernels(self, e: "Evidence") -> list[Comparison]: ...
    def terminal_draws(self, e: "Evidence") -> list[Comparison]: ...
    def reverse_kernels(self, e: "Evidence") -> list[Comparison]: ...

    # the gradient of K along directions of the params
    def elbo(self, e: "Evidence") -> Callable[[Params, Key], Array]: ...
    def mean_slopes(self, e: "Evidence") -> list[MeanSlope]: ...


class Evidence:
    """The pair, its draws and what is known of it in closed form; every part is computed when it is first asked for."""

    def __init__(
        self,
        pair: Pair,
        reader: Reader | None,
        drawn: str,
        rng_key: Key,
        num_draws: int,
        failure_rate: float,
        beta: np.ndarray | None,
        claims: Mapping[str, Callable[..., Any] | None],
        forms: Mapping[str, tuple[Any, Any, Any]],
    ) -> None:
        self.pair, self.num_draws = pair, num_draws
        self._reader, self.drawn = reader, drawn
        self.failure_rate = failure_rate / (50 + len(forms))  # of each Monte Carlo comparison; a ledger has fewer
        self.given_beta, self.claims, self.forms = beta, claims, forms
        self.eps = float(jnp.finfo(jnp.result_type(float)).eps)
        self._rng_key, self._keys_used = rng_key, 0
        self.holds: dict[str, bool] = {}

    @property
    def reader(self) -> Reader:
        """What knows the distributions of the pair."""
        if self._reader is None:
            raise NotApplicable(f"because the ledger has no reader of {self.drawn}")
        return self._reader

    @property
    def has_reader(self) -> bool:
        return self._reader is not None

    def key(self) -> Key:
        self._keys_used += 1
        return jax.random.fold_in(self._rng_key, self._keys_used)

    @cached_property
    def draws(self) -> tuple[Path, dict[int, np.ndarray], dict[int, np.ndarray]]:
        return self.pair.paths(self.key(), self.num_draws)

    @cached_property
    def generated(self) -> Path:
        """(S, N, *event) from p."""
        return self.generated_and_moments[0]

    @cached_property
    def generated_and_moments(self) -> tuple[Path, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Paths from p, and mean and covariance of the kernel that each x_t was drawn from."""
        return self.pair.generated(self.key(), self.num_draws, self.reader.moments if self.has_reader else log_prob)

    @cached_property
    def slopes(self) -> list[Slope]:
        with jax.enable_x64(True):
            return slopes(self.pair, self.key(), self.reader.elbo(self))

    @cached_property
    def mean_slopes(self) -> list[MeanSlope]:
        with jax.enable_x64(True):
            return self.reader.mean_slopes(self)

    @cached_property
    def probes(self) -> Path:
        """Two paths of q, two of other values, and then paths of p, (R, N, *event); x_0 is the data."""
        T, D = self.pair.num_timesteps, self.pair.size
        rows = max(1, min(len(self.generated[0]), 2**22 // (len(self.x_0) * T * D * D)))
        near = {t: np.asarray(x[:2]) for t, x in self.draws[0].items()}
        others = {t: x if t == 0 else self.reader.other(x) for t, x in near.items()}
        return {t: np.concatenate([x, others[t], self.generated[t][:rows]]) for t, x in near.items()}

    @cached_property
    def moments(self) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Mean (R, N, D) and covariance (R, N, D, D) of q's and p's kernels on the probes, float64."""
        near = {t: x[:4] for t, x in self.probes.items()}
        stated = {
            chain.name: {
                t: (np.asarray(mean, np.float64), np.asarray(cov, np.float64))
                for t, (mean, cov) in chain.each(near, self.reader.moments).items()
            }
            for chain in (self.pair.q, self.pair.p)
        }
        rows, (_, drawn) = len(self.probes[0]) - 4, self.generated_and_moments
        stated["p"] = {
            t: (np.concatenate([mean, drawn[t][0][:rows]]), np.concatenate([cov, drawn[t][1][:rows]]))
            for t, (mean, cov) in stated["p"].items()
        }
        return stated

    @cached_property
    def totals(self) -> dict[str, float]:
        """log q and log p of the first path of each datum, as NumPyro counts them."""
        return {chain.name: float(chain.total(self.point(0))) for chain in (self.pair.q, self.pair.p)}

    @cached_property
    def log_weights(self) -> Float[np.ndarray, "S N"]:
        """log p(x_0…x_T) − log q(x_1…x_T given x_0), N14."""
        _, log_q, log_p = self.draws
        return sum(np.float64(v) for v in log_p.values()) - sum(np.float64(v) for v in log_q.values())  # type: ignore[return-value]

    def point(self, draw: int) -> Path:
        """One path from q for each datum."""
        return {t: jnp.asarray(x[draw]) for t, x in self.draws[0].items()}

    @cached_property
    def beta_and_route(self) -> tuple[np.ndarray, str]:
        """β_t: what was given, else the param "beta", else read off the forward kernels."""
        if self.given_beta is not None:
            return self.given_beta, "the argument beta"
        of_param = np.asarray(self.pair.params.get("beta", ()), np.float64)
        if of_param.shape == (self.pair.num_timesteps,):
            return of_param, "param beta"
        if self.forward is None:
            raise NotApplicable("β_t is neither a param nor given, and q has no closed form")
        return self.forward.beta, self.forward.route

    @property
    def beta(self) -> np.ndarray:
        return self.beta_and_route[0]

    def flat(self, x: Any) -> np.ndarray:
        """(…, *event) as (…, D), float64."""
        return np.asarray(x, np.float64).reshape(*np.shape(x)[: np.ndim(x) - self.pair.x.ndim + 1], self.pair.size)

    @cached_property
    def x_0(self) -> Float[np.ndarray, "N D"]:
        return self.flat(self.pair.x)

    @cached_property
    def forward(self) -> ForwardForm | None:
        """x_0 → x_T given x_0, where it is of the form of N3."""
        return self.reader.forward(self) if self.has_reader else None

    @property
    def q(self) -> Closed | None:
        return None if self.forward is None else self.forward.chain

    @cached_property
    def p(self) -> LinearChain | None:
        """x_T → x_0, where it is linear and Gaussian."""
        return self.reader.reverse(self) if self.has_reader else None

    @cached_property
    def terminal(self) -> Terminal:
        """p(x_T) as the notes have it."""
        return self.reader.terminal(self)

    @cached_property
    def grid(self) -> Grid | None:
        """p by quadrature in one dimension, or by enumeration of the states of a few bits."""
        nodes = self.reader.nodes(self) if self.has_reader else None
        return None if nodes is None else grid(self.pair, nodes)

    @cached_property
    def exact(self) -> Estimate | None:
        """log p(x_0) by quadrature, enumeration or in closed form."""
        if self.p is not None:
            means, covs = self.p.marginals()
            log_p = normal_log_prob(self.x_0, means[-1][:1], covs[-1])
            return Estimate("closed form", log_p, self.rounding(log_p))
        if self.grid is None:
            return None
        log_p = self.grid.log_p
        error = max((np.abs(grid.log_p - log_p).max() for grid in self.grid.coarser()), default=0.0)
        return Estimate(self.grid.route, log_p, float(error) + self.rounding(log_p))

    @cached_property
    def elbo_and_gap(self) -> tuple[np.ndarray, np.ndarray, float, str] | None:
        """K and E_q KL(q ‖ p) of the paths given x_0, each (N,), their error and the route; nats."""
        if self.q is None or self.exact is None:
            return None
        if self.p is not None:
            assert isinstance(self.q, LinearChain)
            k = elbo(self.q, self.p, self.x_0)
            return k, gap(self.q, self.p, self.x_0), 1e-9 * float(np.abs(k).max() + 1), "closed form"
        assert self.grid is not None
        k, distance = self.grid.elbo_and_gap(self.q)
        coarse = [grid.elbo_and_gap(self.q) for grid in self.grid.coarser()]
        error = max((max(np.abs(a - k).max(), np.abs(b - distance).max()) for a, b in coarse), default=0.0)
        return k, distance, float(error + self.exact.error), self.grid.route

    def count(self, name: str, what: str, mean: Any, expected: Any, number: Any, variance: Any) -> Comparison:
        """Means of draws of ones and zeros against their expectations; see `ledger.bernstein`."""
        return bernstein(name, "draws", mean, what, expected, number, variance, self.failure_rate)

    def rounding(self, values: np.ndarray) -> float:
        """The kernels come in the precision that JAX runs in."""
        return 1e3 * self.eps * float(np.abs(values).max() + 1)

    @cached_property
    def importance(self) -> Estimate:
        return from_draws("importance weights", self.log_weights)

    @cached_property
    def ancestral(self) -> Estimate:
        """From draws of p: the half-way estimate, or where that cannot be trusted the plain one, whichever is better.

        Half-way: k is the first at which x_k is noise for the most part, T where none is. Plain: k = 1.
        """
        half_way = 1
        if self.q is not None and self.q.full:
            noise = self.q.noise
            half_way = next(
                (t for t, share in enumerate(noise) if share >= self.reader.mostly_noise), self.pair.num_timesteps
            )
        estimate = self._ancestral(half_way)
        if half_way == 1 or estimate.trusted.all():
            return estimate
        return max(estimate, self._ancestral(1), key=lambda one: one.trusted.sum())

    def _ancestral(self, k: int) -> Estimate:
        """p(x_0) = E_{p(x_k)} E_{q(x_1…x_{k−1} | x_k, x_0)}[p(x_0…x_{k−1} | x_k) / q(x_1…x_{k−1} | x_k, x_0)].

        x_k is drawn from p, and the steps below it from q, for each datum anew.
        """
        path = {t: np.array(x) for t, x in self.generated.items()}
        path[0] = np.broadcast_to(np.asarray(self.pair.x), path[0].shape)
        log_q, T = np.zeros(path[0].shape[:2]), self.pair.num_timesteps
        down = self.q.flipped() if self.q is not None else None
        for t in range(k - 1, 0, -1):
            assert down is not None
            above = self.flat(path[t + 1])
            path[t] = down.draw(T - t, above, self.key()).reshape(path[t].shape).astype(path[t].dtype)
            log_q += down.log_step(T - t, above, self.flat(path[t]))
        log_p = self.pair.log_p(path)
        return from_draws(f"ancestral draws of x_{k}", sum(np.float64(log_p[t]) for t in range(k)) - log_q)

    def mean_log_p(self, name: str, left: Estimate, right: Estimate) -> tuple[Comparison, int]:
        """Compares mean log p(x_0) by two routes, over the data for which both can be trusted, and says how many."""
        use = left.trusted & right.trusted
        if not use.any():
            raise NotApplicable(untrusted(left, right))
        weights = use / use.sum()
        deviation = np.sqrt(left.variance(weights) + right.variance(weights))
        allowance = (left.bias + right.bias) @ weights + left.error + right.error
        comparison = monte_carlo(
            name,
            left.route,
            left.log_p[use].mean(),
            right.route,
            right.log_p[use].mean(),
            deviation,
            self.failure_rate,
            allowance,
        )
        return comparison, int(use.sum())

    def chi_square(self, name: str, mean_square: np.ndarray, count: int) -> Comparison:
        """Means of squares of `count` standard normal residuals each, against one."""
        tolerance = stats.chi2.isf(self.failure_rate / (2 * np.size(mean_square)), count) / count - 1
        source = "Monte Carlo, quantile of χ²"
        return compare(name, "mean square of residuals", mean_square, "one", 1.0, tolerance, source)


def stray_dependencies(chain: Chain, x_0: Array) -> list[str]:
    """What NumPyro's dependency inspection finds that a Markov chain does not have, such as "x_3 reads x_1"."""

    def joint() -> None:
        given = numpyro.sample("given", dist.Delta(x_0, event_dim=jnp.ndim(x_0)))
        handlers.substitute(chain.program, data=chain.params)(given.astype(x_0.dtype))

    relations = get_model_relations(joint)["sample_sample"]
    stray = []
    for t in chain.times:
        before = t - 1 if chain.ascending else t + 1
        allowed = {f"x_{before}" if before > 0 else "given"}
        if t == 0 or (not chain.ascending and chain.name == "q"):
            allowed.add("given")  # the value that x_0 takes; and q(x_{t−1} given x_t, x_0) is Markov in x_0…x_T
        reads = [name for name in relations[f"x_{t}"] if name not in allowed and (name == "given" or name[:2] == "x_")]
        stray += [f"x_{t} reads {'x_0' if name == 'given' else name}" for name in reads]
    return stray
