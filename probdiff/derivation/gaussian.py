"""What the rows are told of Gaussian pairs: closed forms of linear chains, and normal kernels."""

from collections.abc import Callable

import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from scipy import stats

from probdiff.derivation.evidence import Evidence, ForwardForm, Moments, Reversal, Terminal, Wrong
from probdiff.derivation.ledger import Comparison, machine, monte_carlo
from probdiff.derivation.pair import Chain, moments
from probdiff.derivation.score import MeanSlope
from probdiff.reference import feller
from probdiff.reference.linear_gaussian import LinearChain, forward_covariance, normal_kl
from probdiff.reference.quadrature import line
from probdiff.types import Key, Params

type Kernels = tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]]


class GaussianPair:
    """q(x_t given x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I) and p(x_T) = N(0, I); see `evidence.Reader`."""

    wording = "numbers"
    components = 1  # of the reverse kernels
    mostly_noise = 0.5
    not_of_n3 = "the mean is not linear in x_{t−1}, or the covariance depends on it"

    def other(self, x: np.ndarray) -> np.ndarray:
        """Three times as far out, and moved."""
        return 3 * x + 1

    def moments(self, kernel: dist.Distribution, x: Array) -> Moments:
        return moments(kernel, x)

    def forward(self, e: Evidence) -> ForwardForm | None:
        q = self._forward(e)
        if q is None:
            return None
        return ForwardForm(q, np.trace(q.S, axis1=1, axis2=2) / e.pair.size, "the kernels' variance")

    def _forward(self, e: Evidence) -> LinearChain | None:
        """x_0 → x_T given x_0, where it is linear and Gaussian."""
        kernels = self._linear(e, e.pair.q)
        if kernels is None:
            return None
        mean, A, S = kernels
        T, D = e.pair.num_timesteps, e.pair.size
        x = {t: e.flat(x) for t, x in e.point(0).items()}
        if e.pair.q.ascending:
            b = np.stack([mean[t] - x[t - 1] @ A[t].T for t in range(1, T + 1)])
            return LinearChain(e.x_0, np.zeros((D, D)), *_stacked(A, S, range(1, T + 1), b))
        times = range(T - 1, 0, -1)
        b = np.stack([mean[t] - x[t + 1] @ A[t].T for t in times]) if T > 1 else np.zeros((0, *e.x_0.shape))
        down = LinearChain(mean[T], S[T], *_stacked(A, S, times, b, D))
        means, covs = down.marginals()
        up = down.flipped() if T > 1 else down
        # how x_1 depends on x_0 shows in its means only: the part in x_0's direction is given to A_1
        slope = np.sum(means[-1] * e.x_0) / max(np.sum(e.x_0**2), 1e-300) * np.eye(D)
        A_1, b_1 = slope[None], (means[-1] - e.x_0 @ slope.T)[None]
        return LinearChain(
            e.x_0,
            np.zeros((D, D)),
            np.concatenate([A_1, up.A]),
            np.concatenate([b_1, up.b]),
            np.concatenate([covs[-1][None], up.S]),
        )

    def reverse(self, e: Evidence) -> LinearChain | None:
        """x_T → x_0, where it is linear and Gaussian."""
        kernels = self._linear(e, e.pair.p)
        if kernels is None:
            return None
        mean, A, S = kernels
        T = e.pair.num_timesteps
        x = {t: e.flat(x) for t, x in e.point(0).items()}
        times = range(T - 1, -1, -1)
        b = np.stack([mean[t] - x[t + 1] @ A[t].T for t in times])
        return LinearChain(mean[T], S[T], *_stacked(A, S, times, b))

    def _linear(self, e: Evidence, chain: Chain) -> Kernels | None:
        """Mean (N, D) at the first probe, Jacobian and covariance (D, D) of each kernel, if it is so at all probes."""
        stated = e.moments[chain.name]
        A = {t: np.asarray(J, np.float64)[0] for t, J in chain.linearised(e.point(0)).items()}
        for t in chain.times:
            mean, cov = stated[t]
            before = t - 1 if chain.ascending else t + 1
            x = e.flat(e.probes[before][: len(mean)]) if 0 <= before < len(e.probes) else 0 * mean
            predicted = mean[0] + (x - x[0]) @ A[t].T
            scale = 1 + np.abs(mean).max() + np.abs(x).max()
            for left, right, size in ((mean, predicted, scale), (cov, cov[0, 0], np.abs(cov[0, 0]).max())):
                if not np.abs(left - right).max() <= 1e3 * e.eps * size:
                    return None
        return (
            {t: stated[t][0][0] for t in chain.times},
            A,
            {t: stated[t][1][0, 0] for t in chain.times},
        )

    def nodes(self, e: Evidence) -> np.ndarray | None:
        """In one dimension, as wide as the draws and as fine as the kernels ask for."""
        if e.pair.size > 1:
            return None
        everywhere = [*e.draws[0].values(), *e.generated.values()]
        reach = 1.6 * max(float(np.abs(x).max()) for x in everywhere) + 1
        return line(reach, float(np.sqrt(self._narrowest(e))))

    def _narrowest(self, e: Evidence) -> float:
        """The least variance of a kernel in one dimension."""
        return min(float(np.min(cov)) for kernels in e.moments.values() for _, cov in kernels.values())

    def terminal(self, e: Evidence) -> Terminal:
        D = e.pair.size

        def kl() -> np.ndarray:
            means, covs = _linear_q(e).marginals()
            return normal_kl(means[-1], covs[-1], np.zeros_like(means[-1]), np.eye(D))

        def kl_from_alpha_bar(alpha_bar: float) -> np.ndarray:
            return (D * (-alpha_bar - np.log1p(-alpha_bar)) + alpha_bar * np.sum(e.x_0**2, 1)) / 2

        return Terminal("N(0, I)", lambda x_T: stats.norm.logpdf(x_T).sum(-1), kl, kl_from_alpha_bar)

    def log_q_from_alpha_bar(self, e: Evidence) -> tuple[float, str]:
        """By the dense normal of x_1…x_T given x_0."""
        T, alpha_bar = e.pair.num_timesteps, np.cumprod(1 - e.beta)
        path = np.stack([e.flat(e.draws[0][t][0]) for t in range(1, T + 1)])  # (T, N, D)
        residual = path - np.sqrt(alpha_bar)[:, None, None] * e.x_0
        log_q = stats.multivariate_normal(cov=forward_covariance(e.beta)).logpdf(residual.reshape(T, -1).T)
        return log_q.sum(), "(T·D)-dimensional normal from ᾱ"

    def couplings(self, e: Evidence, chain: Chain) -> tuple[np.ndarray, float, str]:
        """The largest mixed second derivative of log q in x_t and x_s along a random direction of x_s."""
        keys = jax.random.split(e.key(), len(e.draws[0]))
        path = {t: x[:2] for t, x in e.point(0).items()}
        along = {t: jax.random.normal(key, x.shape, x.dtype) for key, (t, x) in zip(keys, path.items(), strict=True)}
        columns = {t: np.abs(e.flat(x)).max((-2, -1)) for t, x in chain.curvature(path, along).items()}
        size = np.stack([columns[t] for t in sorted(columns)])  # (of x_t, along x_s)
        return size, 100 * e.eps * size.max(), "mixed second derivatives"

    def forward_kernels(self, e: Evidence) -> list[Comparison]:
        return self._steps(e) + self._kernels(e, e.pair.q) + self._step_draws(e)

    def reverse_kernels(self, e: Evidence) -> list[Comparison]:
        return self._kernels(e, e.pair.p) + self._reverse_draws(e)

    def _steps(self, e: Evidence) -> list[Comparison]:
        """Mean and covariance of each forward kernel, read off q."""
        q, (beta, route), eye = _linear_q(e), e.beta_and_route, np.eye(e.pair.size)
        shrink, tolerance = np.sqrt(1 - beta)[:, None, None], 200 * e.eps
        name = "Jacobian of the mean" if e.pair.q.ascending else "slope, by Bayes' rule"
        return [
            machine(name, "from q", q.A, "√(1−β_t)·I", shrink * eye, tolerance),
            machine("mean at zero", "from q", q.b, "zero", 0.0, tolerance * (np.abs(e.x_0).max() + 5)),
            machine("covariance, over β_t", "from q", q.S / beta[:, None, None], f"I ({route})", eye, tolerance),
        ]

    def _step_draws(self, e: Evidence) -> list[Comparison]:
        """Slope and residuals of the draws of each forward kernel."""
        T, D, beta = e.pair.num_timesteps, e.pair.size, e.beta
        times, shrink = range(1, T + 1), np.sqrt(1 - beta)
        path = {t: e.flat(x).reshape(-1, D) for t, x in e.draws[0].items()}
        count = path[0].size
        spread = [max(np.sum(path[t - 1] ** 2), 1e-12) for t in times]  # zero for t = 1 where all data are zero
        slopes = [np.sum((path[t] - shrink[t - 1] * path[t - 1]) * path[t - 1]) / spread[t - 1] for t in times]
        errors = [np.sqrt(beta[t - 1] / spread[t - 1]) for t in times]
        residuals = [(path[t] - shrink[t - 1] * path[t - 1]) / np.sqrt(beta[t - 1]) for t in times]
        found = [
            monte_carlo(
                "slope of x_t in x_{t−1}", "draws", slopes + shrink, "√(1−β_t)", shrink, errors, e.failure_rate
            ),
            e.chi_square("variance of the draws, over β_t", np.array([np.mean(z**2) for z in residuals]), count),
        ]
        if D > 1:
            signs = np.asarray(jax.random.rademacher(e.key(), (D,)), np.float64)
            along = np.array([np.mean((z @ signs) ** 2) / D for z in residuals])
            found += [e.chi_square("variance along a random diagonal, over β_t", along, len(path[0]))]
        return found

    def _kernels(self, e: Evidence, chain: Chain) -> list[Comparison]:
        """Each kernel's log density is that of the normal with the moments that it states, and has its derivatives."""
        path, log_probs = e.point(0), e.draws[1 if chain.name == "q" else 2]
        from_density = chain.density_moments(path)
        stated, normal, scale, ratio, error = [], [], [], [], []
        for t in chain.times:
            mean, cov = (values[0] for values in e.moments[chain.name][t])
            x = e.flat(path[t])
            stated.append(np.float64(log_probs[t][0]))
            try:
                normal.append(
                    [
                        stats.multivariate_normal(m, c, allow_singular=False).logpdf(y)
                        for y, m, c in zip(x, mean, cov, strict=True)
                    ]
                )
            except (ValueError, np.linalg.LinAlgError) as wrong:
                raise Wrong(f"the covariance of x_{t} is no covariance: {wrong}") from wrong
            scale.append(self._rounding_of_kernel(e, x, mean, cov))
            size = np.abs(cov).max((1, 2))
            ratio.append(np.abs(np.asarray(from_density[t][1], np.float64) - cov).max((1, 2)) / size)
            error.append(300 * e.eps * np.linalg.cond(cov))
        return [
            machine(f"log density of each kernel of {chain.name}", "the site", stated, "normal, SciPy", normal, scale),
            machine("covariance against −(∇² log density)⁻¹", "relative difference", ratio, "zero", 0.0, error),
        ]

    def terminal_draws(self, e: Evidence) -> list[Comparison]:
        """log p(x_T) at the draws of q, and draws of x_T."""
        T, D = e.pair.num_timesteps, e.pair.size
        log_p, x_T = np.float64(e.draws[2][T]), e.flat(e.draws[0][T])
        scale = 200 * e.eps * (D + np.sum(x_T**2, -1))
        drawn = e.flat(e.generated[T]).reshape(-1, D)
        n = len(drawn)
        return [
            machine("log p(x_T)", "the site", log_p, "N(0, I), SciPy", e.terminal.log_prob(x_T), scale),
            e.chi_square("variance of x_T", np.mean(drawn**2, 0), n),
            monte_carlo("mean of x_T", "draws", drawn.mean(0), "zero", 0.0, 1 / np.sqrt(n), e.failure_rate),
        ]

    def _reverse_draws(self, e: Evidence) -> list[Comparison]:
        """Draws of each reverse kernel, standardised by what the kernels state of themselves."""
        D = e.pair.size
        signs = np.asarray(jax.random.rademacher(e.key(), (D,)), np.float64)
        squares, along, means = [], [], []
        for z in self._scores(e):
            squares.append(np.mean(z**2))
            along.append(np.mean((z @ signs) ** 2) / D)
            means.append(np.mean(z @ signs) / np.sqrt(D))
        n = z[..., 0].size
        return [
            e.chi_square("variance of the draws, over f_Σ", np.array(squares), n * D),
            e.chi_square("variance of the draws along a random diagonal, over f_Σ", np.array(along), n),
            monte_carlo("mean of the draws, less f_μ", "draws", means, "zero", 0.0, 1 / np.sqrt(n), e.failure_rate),
        ]

    def _scores(self, e: Evidence) -> list[np.ndarray]:
        """Standard normal where draws of x_0…x_{T−1} are right, each (R, N, D)."""
        scores = []
        for t in range(e.pair.num_timesteps):
            mean, cov = (values[4:] for values in e.moments["p"][t])
            residual = e.flat(e.generated[t][: len(mean)]) - mean
            scores.append(np.linalg.solve(np.linalg.cholesky(cov), residual[..., None])[..., 0])
        return scores

    def reversal(self, e: Evidence) -> Reversal:
        """A mixture's reversed kernel against its nearest Gaussian; at the chain's own β_t for t = 2…T.

        There the nearest is of the chain's own form, a Gaussian or a mixture of some.
        """
        q = feller.Mixture(np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.35, 0.5]))
        kl, limit = feller.rate(q, 0.2, [1e-4, 2e-4, 4e-4])
        here = None
        if e.pair.num_timesteps > 1:
            log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(1 - e.beta, 1e-200)))])
            sizes = feller.chain_non_gaussianity(e.x_0[:32, 0], log_alpha_bar, e.beta, self.components)
            form = "nearest Gaussian" if self.components == 1 else f"a near mixture of {self.components} Gaussians"
            here = (sizes, 2, f"{form}) of the first coordinate")
        return Reversal(kl, limit, 3.0, "β³·((log q)‴)²/12", here)

    def _rounding_of_kernel(
        self, e: Evidence, x: np.ndarray, mean: np.ndarray, cov: np.ndarray
    ) -> Float[np.ndarray, " N"]:
        """Of log N(x given mean, cov) at the precision that JAX runs in, for each row."""
        force = np.linalg.solve(cov, (x - mean)[..., None])[..., 0]
        turned = np.sum((np.abs(x) + np.abs(mean)) * np.abs(force), 1)
        return 100 * e.eps * (turned + np.linalg.cond(cov) * (cov.shape[1] + np.sum((x - mean) * force, 1)))

    def rounding_of_paths(self, e: Evidence, chain: Chain) -> float:
        """Of the log density of the first path of each datum."""
        path, moments = e.point(0), e.moments[chain.name]
        parts = [self._rounding_of_kernel(e, e.flat(path[t]), *(v[0] for v in moments[t])) for t in chain.times]
        return float(np.sum(parts))

    def elbo(self, e: Evidence) -> Callable[[Params, Key], Array]:
        """K of one path of each datum, differentiated along the path as it moves with the params."""
        return e.pair.elbo

    def mean_slopes(self, e: Evidence) -> list[MeanSlope]:
        return []


def _linear_q(e: Evidence) -> LinearChain:
    assert isinstance(e.q, LinearChain)
    return e.q


def _stacked(
    A: dict[int, np.ndarray], S: dict[int, np.ndarray], times: range, b: np.ndarray, size: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not times:
        return np.zeros((0, size, size)), b, np.zeros((0, size, size))
    return np.stack([A[t] for t in times]), b, np.stack([S[t] for t in times])
