"""Comparisons that several rows of the ledger make."""

import jax.numpy as jnp
import numpy as np

from probdiff.derivation.estimates import Estimate
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong, stray_dependencies
from probdiff.derivation.ledger import Comparison, compare, machine, monte_carlo
from probdiff.derivation.pair import Chain


def markov(e: Evidence, chain: Chain) -> list[Comparison]:
    found = []
    if e.has_reader:
        size, rounding, what = e.reader.couplings(e, chain)
        t, s = np.indices(size.shape)
        far = np.where(abs(t - s) > 1, size, 0.0)
        worst = np.unravel_index(far.argmax(), far.shape)
        where = f", x_{min(worst)} and x_{max(worst)}" if far.max() > 0 else ""
        name = f"{what} of log {chain.name}, |s−t| > 1{where}"
        found += [machine(name, "largest", far.max(), "zero", 0.0, rounding)]
    stray = stray_dependencies(chain, e.pair.x)
    reads = f" ({'; '.join(stray[:3])})" if stray else ""
    return [
        *found,
        compare(
            f"dependencies beyond the neighbour{reads}", "NumPyro's inspection", len(stray), "none", 0, 0.0, "a count"
        ),
    ]


def product_of_factors(e: Evidence, chain: Chain, log_probs: dict[int, np.ndarray]) -> list[Comparison]:
    terms = np.stack([np.float64(v[0]) for v in log_probs.values()])  # (sites, N)
    allowed = 100 * e.eps * np.abs(terms).sum()
    alone = chain.log_probs({t: jnp.asarray(x[:1, :1]) for t, x in e.draws[0].items()})
    of_first = sum(float(v[0, 0]) for v in alone.values())
    return [
        machine("one path of each datum", "NumPyro", e.totals[chain.name], "sum of the factors", terms.sum(), allowed),
        machine("one path of the first datum", "alone", of_first, "among the others", terms[:, 0].sum(), allowed),
    ]


def gradient(e: Evidence, names: list[str], why_not: str) -> Finding:
    if not names:
        raise NotApplicable(why_not)
    slopes = [slope for slope in e.slopes if slope.param in names]
    wrong = [slope.name for slope in slopes if not np.isfinite(slope.differentiated)]
    if wrong:
        raise Wrong(f"the gradient of K with respect to {', '.join(wrong)} is not finite")
    still = [slope for slope in slopes if slope.zero]
    if still:
        largest = max(still, key=lambda slope: abs(slope.near))
        known = f"finite differences give {largest.near:.3g} for {largest.name}"
        if abs(largest.near) <= largest.rounding:
            known = "and so are finite differences: K does not depend on it"
        raise Wrong(f"the gradient of K with respect to {', '.join(slope.name for slope in still)} is zero; {known}")
    found = [
        compare(
            f"dK/du, u the unconstrained {slope.name}",
            "differentiated",
            slope.differentiated,
            "finite differences",
            slope.near,
            2 * abs(slope.near - slope.wide) + slope.rounding,
            "finite differences and rounding, float64",
        )
        for slope in slopes
    ]
    worst = max(found, key=lambda one: one.excess)
    means = [mean for mean in e.mean_slopes if mean.param in names]
    of_draws = (
        [
            monte_carlo(
                "dK/du of each unconstrained param",
                "mean of draws, by the score function",
                [mean.drawn for mean in means],
                "sum over all paths, differentiated",
                [mean.exact for mean in means],
                [mean.error for mean in means],
                e.failure_rate,
                1e-9 * max(abs(mean.exact) for mean in means),
            )
        ]
        if means
        else []
    )
    return [worst, *of_draws], f"{len(slopes)} derivatives of {', '.join(names)}", None


def best_estimate(e: Evidence) -> Estimate:
    """log p(x_0) by the most exact route there is."""
    if e.exact is not None:
        return e.exact
    return e.ancestral if e.ancestral.trusted.sum() >= e.importance.trusted.sum() else e.importance


def two_routes(e: Evidence) -> tuple[Estimate, Estimate]:
    """An exact value and an estimate, that of ancestral draws if it can be; or both estimates."""
    if e.exact is None:
        return e.ancestral, e.importance
    return e.exact, e.ancestral if e.ancestral.trusted.any() else e.importance


def mean_ratio(e: Evidence, name: str, estimate: Estimate, other: Estimate) -> Comparison:
    """The mean over trusted data of estimate/other, which is one up to Monte Carlo error."""
    use = estimate.trusted & other.trusted
    ratio = np.where(use, np.exp(estimate.log_p - other.log_p), 0.0)
    weights = use / use.sum()
    deviation = np.sqrt(estimate.variance(weights * ratio) + other.variance(weights * ratio))
    allowance = 2 * other.bias @ weights + other.error
    return monte_carlo(
        name, f"{estimate.route} over {other.route}", ratio @ weights, "one", 1.0, deviation, e.failure_rate, allowance
    )
