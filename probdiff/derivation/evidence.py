"""What the rows of the ledger share: draws of the pair, its closed forms, and estimates of p(x_0)."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro import handlers
from numpyro.infer.inspect import get_model_relations
from scipy import stats

from probdiff.derivation.estimates import Estimate, from_draws, untrusted
from probdiff.derivation.gradient import Slope, slopes
from probdiff.derivation.ledger import Comparison, compare, monte_carlo
from probdiff.derivation.linear import LinearChain, elbo, gap, normal_log_prob
from probdiff.derivation.pair import Chain, Pair, Path
from probdiff.derivation.quadrature import Grid, grid
from probdiff.types import Key


class NotApplicable(Exception):
    """Why a statement cannot be checked on this pair, and the comparisons that were made all the same."""

    def __init__(self, why: str, comparisons: list[Comparison] | None = None) -> None:
        super().__init__(why)
        self.comparisons = tuple(comparisons or ())


class Wrong(Exception):
    """Why a statement fails, where it is no matter of two numbers."""


type Finding = tuple[list[Comparison], str, float | None]  # comparisons, detail, size of an approximation


class Evidence:
    """The pair, its draws and what is known of it in closed form; every part is computed when it is first asked for."""

    def __init__(
        self,
        pair: Pair,
        rng_key: Key,
        num_draws: int,
        failure_rate: float,
        beta: np.ndarray | None,
        claims: Mapping[str, Callable[..., Any] | None],
        forms: Mapping[str, tuple[Any, Any, Any]],
    ) -> None:
        self.pair, self.num_draws = pair, num_draws
        self.rate = failure_rate / (50 + len(forms))  # of each Monte Carlo comparison; a ledger has fewer
        self.given_beta, self.claims, self.forms = beta, claims, forms
        self.eps = float(jnp.finfo(jnp.result_type(float)).eps)
        self._rng_key, self._keys_used = rng_key, 0
        self.holds: dict[str, bool] = {}

    def key(self) -> Key:
        self._keys_used += 1
        return jax.random.fold_in(self._rng_key, self._keys_used)

    @cached_property
    def draws(self) -> tuple[Path, dict[int, np.ndarray], dict[int, np.ndarray]]:
        return self.pair.paths(self.key(), self.num_draws)

    @cached_property
    def generated(self) -> Path:
        """(S, N, *event) from p."""
        return self.pair.generated(self.key(), self.num_draws)

    @cached_property
    def slopes(self) -> list[Slope]:
        with jax.enable_x64(True):
            return slopes(self.pair, self.key())

    @cached_property
    def probes(self) -> Path:
        """Two paths of q, the same three times as far out, and then paths of p, (R, N, *event); x_0 is the data."""
        T, D = self.pair.num_timesteps, self.pair.size
        rows = max(1, min(len(self.generated[0]), 2**22 // (len(self.x_0) * T * D * D)))
        near = {t: jnp.asarray(x[:2]) for t, x in self.draws[0].items()}
        return {t: jnp.concatenate([x, x if t == 0 else 3 * x, self.generated[t][:rows]]) for t, x in near.items()}

    @cached_property
    def moments(self) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Mean (R, N, D) and covariance (R, N, D, D) of q's and p's kernels on the probes, float64."""
        near = {t: x[:4] for t, x in self.probes.items()}
        return {
            chain.name: {
                t: (np.asarray(mean, np.float64), np.asarray(cov, np.float64))
                for t, (mean, cov) in chain.moments(paths).items()
            }
            for chain, paths in ((self.pair.q, near), (self.pair.p, self.probes))
        }

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
        """β_t: what was given, else the param "beta", else read off the forward kernels' covariances."""
        if self.given_beta is not None:
            return self.given_beta, "beta="
        of_param = np.asarray(self.pair.params.get("beta", ()), np.float64)
        if of_param.shape == (self.pair.num_timesteps,):
            return of_param, "param beta"
        if self.q is None:
            raise NotApplicable("β_t is neither a param nor given, and q is not linear-Gaussian")
        return np.trace(self.q.S, axis1=1, axis2=2) / self.pair.size, "the kernels' variance"

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
    def q(self) -> LinearChain | None:
        """x_0 → x_T given x_0, where it is linear and Gaussian."""
        kernels = self._linear(self.pair.q)
        if kernels is None:
            return None
        mean, A, S = kernels
        T, D = self.pair.num_timesteps, self.pair.size
        x = {t: self.flat(x) for t, x in self.point(0).items()}
        if self.pair.q.ascending:
            b = np.stack([mean[t] - x[t - 1] @ A[t].T for t in range(1, T + 1)])
            return LinearChain(self.x_0, np.zeros((D, D)), *_stacked(A, S, range(1, T + 1), b))
        times = range(T - 1, 0, -1)
        b = np.stack([mean[t] - x[t + 1] @ A[t].T for t in times]) if T > 1 else np.zeros((0, *self.x_0.shape))
        down = LinearChain(mean[T], S[T], *_stacked(A, S, times, b, D))
        means, covs = down.marginals()
        up = down.flipped() if T > 1 else down
        # how x_1 depends on x_0 shows in its means only: the part in x_0's direction is given to A_1
        slope = np.sum(means[-1] * self.x_0) / max(np.sum(self.x_0**2), 1e-300) * np.eye(D)
        A_1, b_1 = slope[None], (means[-1] - self.x_0 @ slope.T)[None]
        return LinearChain(
            self.x_0,
            np.zeros((D, D)),
            np.concatenate([A_1, up.A]),
            np.concatenate([b_1, up.b]),
            np.concatenate([covs[-1][None], up.S]),
        )

    @cached_property
    def p(self) -> LinearChain | None:
        """x_T → x_0, where it is linear and Gaussian."""
        kernels = self._linear(self.pair.p)
        if kernels is None:
            return None
        mean, A, S = kernels
        T = self.pair.num_timesteps
        x = {t: self.flat(x) for t, x in self.point(0).items()}
        times = range(T - 1, -1, -1)
        b = np.stack([mean[t] - x[t + 1] @ A[t].T for t in times])
        return LinearChain(mean[T], S[T], *_stacked(A, S, times, b))

    def _linear(
        self, chain: Chain
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]] | None:
        """Mean (N, D) at the first probe, Jacobian and covariance (D, D) of each kernel, if it is so at all probes."""
        stated = self.moments[chain.name]
        A = {t: np.asarray(J, np.float64)[0] for t, J in chain.linearised(self.point(0)).items()}
        for t in chain.times:
            mean, cov = stated[t]
            before = t - 1 if chain.ascending else t + 1
            x = self.flat(self.probes[before][: len(mean)]) if 0 <= before < len(self.probes) else 0 * mean
            predicted = mean[0] + (x - x[0]) @ A[t].T
            scale = 1 + np.abs(mean).max() + np.abs(x).max()
            for left, right, size in ((mean, predicted, scale), (cov, cov[0, 0], np.abs(cov[0, 0]).max())):
                if not np.abs(left - right).max() <= 1e3 * self.eps * size:
                    return None
        return (
            {t: stated[t][0][0] for t in chain.times},
            A,
            {t: stated[t][1][0, 0] for t in chain.times},
        )

    @cached_property
    def grid(self) -> Grid | None:
        """p by quadrature, in one dimension."""
        if self.pair.size > 1:
            return None
        everywhere = [*self.draws[0].values(), *self.generated.values()]
        reach = 1.6 * max(float(np.abs(x).max()) for x in everywhere) + 1
        variances = [np.min(cov) for kernels in self.moments.values() for _, cov in kernels.values()]
        return grid(self.pair, reach, float(np.sqrt(min(variances))))

    @cached_property
    def exact(self) -> Estimate | None:
        """log p(x_0) by quadrature or in closed form."""
        if self.p is not None:
            means, covs = self.p.marginals()
            log_p = normal_log_prob(self.x_0, means[-1][:1], covs[-1])
            return Estimate("closed form", log_p, self.rounding(log_p))
        if self.grid is None:
            return None
        log_p = self.grid.log_p
        error = max(np.abs(grid.log_p - log_p).max() for grid in self.grid.coarser())
        return Estimate("quadrature", log_p, float(error) + self.rounding(log_p))

    @cached_property
    def elbo_and_gap(self) -> tuple[np.ndarray, np.ndarray, float, str] | None:
        """K and E_q KL(q ‖ p) of the paths given x_0, each (N,), their error and the route; nats."""
        if self.q is None or self.exact is None:
            return None
        if self.p is not None:
            k = elbo(self.q, self.p, self.x_0)
            return k, gap(self.q, self.p, self.x_0), 1e-9 * float(np.abs(k).max() + 1), "closed form"
        assert self.grid is not None
        k, distance = self.grid.elbo_and_gap(self.q)
        coarse = [grid.elbo_and_gap(self.q) for grid in self.grid.coarser()]
        error = max(max(np.abs(a - k).max(), np.abs(b - distance).max()) for a, b in coarse) + self.exact.error
        return k, distance, float(error), "quadrature"

    def rounding(self, values: np.ndarray) -> float:
        """The kernels come in the precision that JAX runs in."""
        return 1e3 * self.eps * float(np.abs(values).max() + 1)

    def rounding_of_kernel(self, x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> Float[np.ndarray, " N"]:
        """Of log N(x given mean, cov) at the precision that JAX runs in, for each row."""
        force = np.linalg.solve(cov, (x - mean)[..., None])[..., 0]
        turned = np.sum((np.abs(x) + np.abs(mean)) * np.abs(force), 1)
        return 100 * self.eps * (turned + np.linalg.cond(cov) * (cov.shape[1] + np.sum((x - mean) * force, 1)))

    def rounding_of_paths(self, chain: Chain) -> float:
        """Of the log density of the first path of each datum."""
        path, moments = self.point(0), self.moments[chain.name]
        parts = [self.rounding_of_kernel(self.flat(path[t]), *(v[0] for v in moments[t])) for t in chain.times]
        return float(np.sum(parts))

    @cached_property
    def importance(self) -> Estimate:
        return from_draws("importance weights", self.log_weights)

    @cached_property
    def ancestral(self) -> Estimate:
        """From draws of p: the half-way estimate, or where that cannot be trusted the plain one, whichever is better.

        Half-way: k is the first at which half of x_0's variance is noise. Plain: k = 1.
        """
        half_way = 1
        if self.q is not None:
            noise = [np.trace(cov) / self.pair.size for cov in self.q.marginals()[1]]
            half_way = next((t for t, variance in enumerate(noise) if variance >= 0.5), self.pair.num_timesteps)
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
            A, b, S = down.A[T - 1 - t], down.b[T - 1 - t], down.S[T - 1 - t]
            mean = self.flat(path[t + 1]) @ A.T + b
            noise = np.asarray(jax.random.normal(self.key(), mean.shape), np.float64)
            path[t] = (mean + noise @ np.linalg.cholesky(S).T).reshape(path[t].shape).astype(path[t].dtype)
            drawn = self.flat(path[t]).reshape(-1, self.pair.size)
            log_q += normal_log_prob(drawn, mean.reshape(drawn.shape), S).reshape(log_q.shape)
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
            self.rate,
            allowance,
        )
        return comparison, int(use.sum())

    def chi_square(self, name: str, mean_square: np.ndarray, count: int) -> Comparison:
        """Means of squares of `count` standard normal residuals each, against one."""
        tolerance = stats.chi2.isf(self.rate / (2 * np.size(mean_square)), count) / count - 1
        source = "Monte Carlo, quantile of χ²"
        return compare(name, "mean square of residuals", mean_square, "one", 1.0, tolerance, source)


def stray_dependencies(chain: Chain, x: Any) -> list[str]:
    """What NumPyro's dependency inspection finds that a Markov chain does not have, such as "x_3 reads x_1"."""

    def joint() -> None:
        x_0 = numpyro.sample("given", dist.Normal(x, 1.0).to_event(jnp.ndim(x)))
        handlers.substitute(chain.program, data=chain.params)(x_0)

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


def _stacked(
    A: dict[int, np.ndarray], S: dict[int, np.ndarray], times: range, b: np.ndarray, size: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not times:
        return np.zeros((0, size, size)), b, np.zeros((0, size, size))
    return np.stack([A[t] for t in times]), b, np.stack([S[t] for t in times])
