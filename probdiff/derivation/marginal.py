"""The likelihood of the notes, N9–N13: L, p(x_0) as an integral over paths, and the joint of the reverse chain."""

import jax
import numpy as np

from probdiff.derivation.comparisons import best_estimate, gradient, mean_ratio, product_of_factors, two_routes
from probdiff.derivation.estimates import untrusted
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable
from probdiff.derivation.ledger import compare, machine, monte_carlo
from probdiff.derivation.rows import row
from probdiff.reference.linear_gaussian import dense, normal_log_prob

_DENSE = 400  # dimensions of the largest dense normal


@row(
    "N9",
    "L = ∫ q(x_0) log p(x_0) dx_0 is maximised",
    r"L = \int q(x^{(0)}) \log p(x^{(0)})\, dx^{(0)}",
    needs=("N12",),
    erratum="the label (A) is used twice, here and in N6",
)
def n9(e: Evidence) -> Finding:
    """The mean of log p(x_0) over the data, exactly and from draws."""
    comparison, n = e.mean_log_p("L, mean of log p(x_0)", *two_routes(e))
    return [comparison], f"L over {n} of {len(e.x_0)} data; nats", None


@row(
    "N10",
    "the parameters of q and of p are found so that L, through its bound K, is largest",
    r"\partial K / \partial (\beta, f_\mu, f_\Sigma)",
    needs=("N4",),
    reads=True,
)
def n10(e: Evidence) -> Finding:
    """dK/du of every param of both programs, by differentiation and by finite differences."""
    return gradient(e, e.pair.forward_params + e.pair.reverse_params, "neither chain has a NumPyro param")


@row(
    "N11",
    "q(x_0) is not known explicitly, only samples of it are",
    r"L \approx \frac1N \sum_n \log p(x_n^{(0)})",
    needs=("N12",),
)
def n11(e: Evidence) -> Finding:
    """The standard error of L over samples of q(x_0), by formula and by the bootstrap."""
    best = best_estimate(e)
    log_p = best.log_p[best.trusted]
    n = len(log_p)
    if n < 4:
        raise NotApplicable(f"p(x_0) is known for {n} data, too few for a standard error of L")
    error, resamples = log_p.std(ddof=1) / np.sqrt(n), 4000
    drawn = np.asarray(jax.random.randint(e.key(), (resamples, n), 0, n))
    bootstrap = log_p[drawn].mean(1).std() * np.sqrt(n / (n - 1))
    detail = f"L is {log_p.mean():.4g} ± {error:.2g} nats over {n} samples of q(x_0), and nothing else of it was used"
    deviation = error / np.sqrt(resamples)  # wider than that of a normal, 1/√(2B)
    name, rounding = "standard error of L over samples of q(x_0)", 1e-12 * np.abs(log_p).max()
    return (
        [monte_carlo(name, "formula", error, "bootstrap", bootstrap, deviation, e.failure_rate, rounding)],
        detail,
        None,
    )


@row(
    "N12",
    "p(x_0) = ∫ p(x_0…x_T) dx_1…x_T",
    r"p(x^{(0)}) = \int p(x^{(0 \dots T)})\, dx^{(1 \dots T)} \quad (2)",
    needs=("q", "p", "N13", "N8"),
)
def n12(e: Evidence) -> Finding:
    """p(x_0) by quadrature, in closed form, by Bayes' rule on a path, and from draws."""
    found, detail = [], ""
    if e.grid is not None:
        allowed = max((abs(grid.mass - e.grid.mass) for grid in e.grid.coarser()), default=0.0)
        allowed += e.rounding(np.ones(1))
        name, route = "Σ p(x_0)" if e.grid.of_states else "∫ p(x_0) dx_0", e.grid.route
        found += [compare(name, route, e.grid.mass, "one", 1.0, allowed, route)]
    if e.p is not None and e.exact is not None:
        path = [e.flat(e.draws[0][t][0]) for t in range(e.pair.num_timesteps + 1)]
        posterior = e.p.flipped().log_prob_given_first(path).sum()
        name, by_bayes = "log p(x_0), all data", "log p(x_0…x_T) − log p(x_1…x_T | x_0) on a path"
        allowed = e.reader.rounding_of_paths(e, e.pair.p)
        found += [machine(name, "closed form", e.exact.log_p.sum(), by_bayes, e.totals["p"] - posterior, allowed)]
        if e.grid is not None:
            error = np.max([np.abs(grid.log_p - e.grid.log_p) for grid in e.grid.coarser()], 0) + e.exact.error
            name = "log p(x_0)"
            found += [compare(name, "closed form", e.exact.log_p, "quadrature", e.grid.log_p, error, "quadrature")]
    left, right = (e.exact, e.ancestral) if e.exact is not None else (e.ancestral, e.importance)
    use = left.trusted & right.trusted
    if use.any():
        found += [mean_ratio(e, "p(x_0), mean ratio", right, left)]
        detail = f"{right.route} for {use.sum()} of {len(use)} data"
    elif found:
        detail = f"{right.route} have no say: their median k̂ is {np.median(right.pareto_k):.2f}"  # type: ignore[arg-type]
    else:
        raise NotApplicable(untrusted(left, right))
    return found, detail, None


@row(
    "N13",
    "p(x_0…x_T) = p(x_T) ∏_t p(x_{t-1} | x_t)",
    r"p(x^{(0 \dots T)}) = p(x^{(T)}) \prod_{t=1}^{T} p(x^{(t-1)} \mid x^{(t)}) \quad (3)",
    needs=("q", "p"),
    erratum="(3) is printed with p(x_0) where p(x_T) must stand in front of the product",
)
def n13(e: Evidence) -> Finding:
    """log p of a path as NumPyro counts it, as the sum of its factors, and by a dense normal for a linear chain."""
    found = product_of_factors(e, e.pair.p, e.draws[2])
    if e.p is not None and (e.pair.num_timesteps + 1) * e.pair.size <= _DENSE:
        mean, cov = dense(e.p)
        path = np.concatenate([e.flat(e.draws[0][t][0]) for t in range(e.pair.num_timesteps, -1, -1)], 1)
        scale = e.reader.rounding_of_paths(e, e.pair.p)
        log_p = normal_log_prob(path, mean, cov).sum()
        found += [machine("one path of each datum", "NumPyro", e.totals["p"], "dense normal of the path", log_p, scale)]
    return found, "", None
