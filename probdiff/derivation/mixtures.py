"""What the rows are told of Gaussian pairs whose reverse kernels are mixtures of Gaussians."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from scipy import stats
from scipy.special import log_softmax, logsumexp, softmax

from probdiff.derivation import pair
from probdiff.derivation.evidence import Evidence, Moments
from probdiff.derivation.gaussian import GaussianPair
from probdiff.derivation.ledger import Comparison, machine
from probdiff.derivation.pair import Chain, Path, kernel_base
from probdiff.derivation.sites import compiled
from probdiff.reference.linear_gaussian import LinearChain

type Parts = tuple[Any, Any, Any]  # log weights (…, M), means (…, M, D) and covariances (…, M, D, D)


class PairOfMixtures(GaussianPair):
    """As `GaussianPair`, with p(x_{t−1} given x_t) a mixture of at most `components` Gaussians."""

    wording = "mixtures"

    def __init__(self, components: int) -> None:
        self.components = components

    def moments(self, kernel: dist.Distribution, x: Array) -> Moments:
        return _moments(kernel, x)

    def reverse(self, e: Evidence) -> LinearChain | None:
        return None

    def reverse_kernels(self, e: Evidence) -> list[Comparison]:
        stated, normal, scale, moments, of_parts = [], [], [], [], []
        for t, (x, parts) in _parts_on_a_path(e).items():
            stated.append(np.float64(e.draws[2][t][0]))
            normal.append(logsumexp(parts[0] + _log_normal(x, parts), -1))
            scale.append(self._rounding_of_mixture(e, x, parts))
        path = {t: x[None] for t, x in e.point(0).items()}
        for t, values in e.pair.p.each(path, lambda kernel, x: (kernel.mean + 0 * x, kernel.variance + 0 * x)).items():
            moments.append([e.flat(value[0]) for value in values])
            mean, cov = (value[0] for value in e.moments["p"][t])
            of_parts.append([mean, np.diagonal(cov, axis1=-2, axis2=-1)])
        size = 200 * e.eps * (1 + np.abs(of_parts).max())
        return [
            machine("log density of each kernel of p", "the site", stated, "normals, SciPy", normal, scale),
            machine("mean and variance", "the site", moments, "its components", of_parts, size),
            *self._reverse_draws(e),
        ]

    def rounding_of_paths(self, e: Evidence, chain: Chain) -> float:
        if chain.name == "q":
            return super().rounding_of_paths(e, chain)
        return sum(float(self._rounding_of_mixture(e, *on_path).sum()) for on_path in _parts_on_a_path(e).values())

    def _rounding_of_mixture(self, e: Evidence, x: np.ndarray, parts: Parts) -> Float[np.ndarray, " N"]:
        """That of each component by its share in the density."""
        share = softmax(parts[0] + _log_normal(x, parts), -1)
        each = [self._rounding_of_kernel(e, x, mean, cov) for mean, cov in _by_component(parts)]
        return np.sum(share * np.stack(each, -1), -1)

    def _narrowest(self, e: Evidence) -> float:
        _, generated = _generated(e)
        each = [np.diagonal(cov, axis1=-2, axis2=-1).min() for _, _, cov in generated.values()]
        return min(super()._narrowest(e), *each)

    def _scores(self, e: Evidence) -> list[np.ndarray]:
        """Φ⁻¹ of the distribution function of each coordinate given those before it (Rosenblatt 1952)."""
        path, parts = _generated(e)
        return [_rosenblatt(e.flat(path[t]), parts[t]) for t in range(e.pair.num_timesteps)]


def most_components(chain: Chain, x_0: Array) -> int:
    """The largest number of Gaussians that one of the chain's kernels is a mixture of; 1 where it has problems."""
    if chain.problems:
        return 1
    found: list[int] = []

    def run(x: Array) -> None:
        kernels = chain.kernels(dict.fromkeys([0, *chain.times], x))
        found.extend(gaussian_parts(kernel, x)[0].shape[-1] for kernel in kernels.values())

    jax.eval_shape(run, x_0)
    return max(found)


@compiled
def gaussian_parts(kernel: dist.Distribution, x: Array) -> Parts:
    """Log weights (N, M), means (N, M, D) and covariances (N, M, D, D) of a mixture of M Gaussians.

    x (N, *event) has the shape of its draws. A distribution of another kind is one part, of the moments it states.
    """
    base, (n, size) = kernel_base(kernel), (len(x), x[0].size)
    if isinstance(base, dist.MixtureSameFamily) and (base.event_shape == kernel.event_shape or size == 1):
        part, mixing = kernel_base(base.component_distribution), base.mixing_distribution
        M = base.mixture_size
        shape = (n, M, *x.shape[1:]) if base.event_shape else (n, *x.shape[1:], M)
        log_w = mixing.logits if isinstance(mixing, dist.CategoricalLogits) else jnp.log(mixing.probs)
        log_w = jnp.broadcast_to(log_w, (*shape[:-1], M) if not base.event_shape else (n, M)).reshape(n, M)
        if isinstance(part, dist.MultivariateNormal):
            mean = jnp.broadcast_to(part.loc, shape)
            return jax.nn.log_softmax(log_w), mean, jnp.broadcast_to(part.covariance_matrix, (n, M, size, size))
        if isinstance(part, dist.Normal):
            mean, scale = (jnp.broadcast_to(a, shape).reshape(n, M, size) for a in (part.loc, part.scale))
            return jax.nn.log_softmax(log_w), mean, scale[..., None] ** 2 * jnp.eye(size)
    mean, cov = pair.moments(kernel, x)
    return jnp.zeros((n, 1)), mean[:, None], cov[:, None]


@compiled
def _moments(kernel: dist.Distribution, x: Array) -> Moments:
    """Mean and covariance, by those within components and between them."""
    log_w, means, covs = gaussian_parts(kernel, x)
    share = jnp.exp(log_w)
    mean = jnp.einsum("nm,nmd->nd", share, means)
    apart = means - mean[:, None]
    return mean, jnp.einsum("nm,nmde->nde", share, covs) + jnp.einsum("nm,nmd,nme->nde", share, apart, apart)


def _parts_on_a_path(e: Evidence) -> dict[int, tuple[np.ndarray, Parts]]:
    """x_t of the first path of each datum, flat, and the parts of p's kernel there, float64."""
    path = e.point(0)
    found = e.pair.p.each({t: x[None] for t, x in path.items()}, gaussian_parts)
    return {t: (e.flat(path[t]), _float64(a[0] for a in parts)) for t, parts in found.items()}


def _generated(e: Evidence) -> tuple[Path, dict[int, Parts]]:
    """Paths of p, as many as `Evidence.moments` has, and the parts of the kernels that they were drawn from."""
    rows = len(e.probes[0]) - 4
    path = {t: x[:rows] for t, x in e.generated.items()}
    found = e.pair.p.each({t: jnp.asarray(x) for t, x in path.items()}, gaussian_parts)
    return path, {t: _float64(parts) for t, parts in found.items()}


def _float64(parts: Iterable[Any]) -> Parts:
    log_w, means, covs = (np.asarray(a, np.float64) for a in parts)
    return log_w, means, covs


def _by_component(parts: Parts) -> list[tuple[np.ndarray, np.ndarray]]:
    _, means, covs = parts
    return [(means[:, m], covs[:, m]) for m in range(means.shape[1])]


def _log_normal(x: Float[np.ndarray, "N D"], parts: Parts) -> Float[np.ndarray, "N M"]:
    """By SciPy."""
    of_each = [
        [stats.multivariate_normal(mean, cov).logpdf(one) for one, mean, cov in zip(x, *component, strict=True)]
        for component in _by_component(parts)
    ]
    return np.moveaxis(np.array(of_each), 0, -1)


def _rosenblatt(x: Float[np.ndarray, "*n D"], parts: Parts) -> Float[np.ndarray, "*n D"]:
    log_w, means, covs = parts
    L = np.linalg.cholesky(covs)
    u = np.linalg.solve(L, (x[..., None, :] - means)[..., None])[..., 0]
    log_density = stats.norm.logpdf(u) - np.log(np.diagonal(L, axis1=-2, axis2=-1))
    before = np.cumsum(log_density, -1) - log_density
    given = log_softmax(log_w[..., None] + before, -2)
    below, above = (logsumexp(given + stats.norm.logcdf(sign * u), -2) for sign in (1, -1))
    return np.where(below < above, 1, -1) * stats.norm.ppf(np.exp(np.minimum(below, above)))
