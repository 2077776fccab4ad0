"""The rows of the likelihood and its bound: N9, N11, N12 and N14–N17."""

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy.special import logsumexp

from probdiff.derivation.estimates import Estimate, untrusted
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong
from probdiff.derivation.ledger import Comparison, compare, machine, monte_carlo


def n9(e: Evidence) -> Finding:
    """The mean of log p(x_0) over the data, exactly and from draws."""
    comparison, n = e.mean_log_p("L, mean of log p(x_0)", *_two_routes(e))
    return [comparison], f"L over {n} of {len(e.x_0)} data; nats", None


def n11(e: Evidence) -> Finding:
    """The standard error of L over samples of q(x_0), by formula and by the bootstrap."""
    best = _best(e)
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
    return [monte_carlo(name, "formula", error, "bootstrap", bootstrap, deviation, e.rate, rounding)], detail, None


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
        allowed = e.family.rounding_of_paths(e, e.pair.p)
        found += [machine(name, "closed form", e.exact.log_p.sum(), by_bayes, e.totals["p"] - posterior, allowed)]
        if e.grid is not None:
            error = np.max([np.abs(grid.log_p - e.grid.log_p) for grid in e.grid.coarser()], 0) + e.exact.error
            name = "log p(x_0)"
            found += [compare(name, "closed form", e.exact.log_p, "quadrature", e.grid.log_p, error, "quadrature")]
    left, right = (e.exact, e.ancestral) if e.exact is not None else (e.ancestral, e.importance)
    use = left.trusted & right.trusted
    if use.any():
        found += [_ratio(e, "p(x_0), mean ratio", right, left)]
        detail = f"{right.route} for {use.sum()} of {len(use)} data"
    elif found:
        detail = f"{right.route} have no say: their median k̂ is {np.median(right.pareto_k):.2f}"  # type: ignore[arg-type]
    else:
        raise NotApplicable(untrusted(left, right))
    return found, detail, None


def n14(e: Evidence) -> Finding:
    """The mean importance weight of paths from q over p(x_0)."""
    weights, other = e.importance, e.exact or e.ancestral
    k, w = weights.pareto_k, np.exp(e.log_weights - e.log_weights.max(0))
    assert k is not None
    ess = w.sum(0) ** 2 / np.sum(w**2, 0)
    state = (
        f"effective sample size {np.median(ess):.0f} of {len(w)} in the median, {ess.min():.0f} at least; "
        f"k̂ of half of the draws {np.median(k):.2f} in the median, {k.max():.2f} at most"
    )
    bad = int(np.sum(~(weights.trusted & other.trusted)))
    if bad == len(k):
        raise NotApplicable(f"the estimate fails, which says nothing of the identity: {state}")
    if bad:
        state += f"; for {bad} of {len(k)} data the estimate fails, which says nothing of the identity"
    return [_ratio(e, "E_q[w] over p(x_0), mean over data", weights, other)], state, None


def n15(e: Evidence) -> Finding:
    """The mean over the data of the log of the mean weight, against L."""
    comparison, n = e.mean_log_p("L = mean of log E_q[w]", e.exact or e.ancestral, e.importance)
    return [comparison], f"{n} of {len(e.x_0)} data", None


def n16(e: Evidence) -> Finding:
    """Jensen's inequality at random points for random convex functions, for −log, and for the drawn weights."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(e.key())))
    x, y = np.exp(rng.normal(0, 2, size=(2, 500)))
    s = rng.uniform(size=500)
    slopes, offsets = rng.normal(size=(2, 20))
    convex = {
        "the largest of 20 random lines": lambda v: np.max(np.outer(slopes, v) + offsets[:, None], 0),
        "a random sum of exponentials": lambda v: np.abs(offsets) @ np.exp(np.outer(slopes / 10, v) / 10),
        "−log": lambda v: -np.log(v),
    }
    found = []
    for name, f in convex.items():
        chord, curve = s * f(x) + (1 - s) * f(y), f(s * x + (1 - s) * y)
        rounding = 1e-13 * (np.abs(chord) + np.abs(curve))
        found += [
            machine(f"f is {name}", "s·f(x) + (1−s)·f(y)", chord, "f(s·x + (1−s)·y)", curve, rounding, at_least=True)
        ]
    w = e.log_weights
    log_mean = logsumexp(w, axis=0) - np.log(len(w))
    found += [
        machine(
            "the drawn weights, each datum",
            "log of the mean",
            log_mean,
            "mean of the log",
            w.mean(0),
            1e-12 * np.abs(w).max(),
            at_least=True,
        )
    ]
    return (
        found,
        f"Jensen's gap of the {len(w)} drawn weights: {np.mean(log_mean - w.mean(0)):.3g} nats on average",
        None,
    )


def n17(e: Evidence) -> Finding:
    """K by hand, from NumPyro, exactly and in other forms; and L − K against the KL divergence that it is."""
    pair, w = e.pair, e.log_weights
    by_hand, error = w.mean(), w.mean(1).std() / np.sqrt(len(w))
    # the same path in NumPyro's ELBO
    fixed = handlers.substitute(pair.q.program, data={f"x_{t}": e.point(0)[t] for t in pair.q.times})
    loss = Trace_ELBO().loss(jax.random.key(0), pair.params, pair.p.program, fixed, pair.x)
    rounding = 100 * e.eps * sum(np.abs(np.float64(v[0])).sum() for part in e.draws[1:] for v in part.values())
    found = [
        machine("K of one path of each datum", "Trace_ELBO", -float(loss), "written out by hand", w[0].sum(), rounding)
    ]
    best, detail = _best(e), f"K is {by_hand:.5g} ± {error:.2g} nats per datum"
    reference, reference_error = by_hand, error
    if e.elbo_and_gap is not None:
        k, distance, allowance, route = e.elbo_and_gap
        reference, reference_error = k.mean(), 0.0
        found += [
            monte_carlo("K", route, k.mean(), "draws, by hand", by_hand, error, e.rate, allowance + e.rounding(k)),
            compare(
                "L − K of each datum",
                route,
                best.log_p - k,
                "E_q KL(q(x_1…x_T | x_0) ‖ p(x_1…x_T | x_0)), by Bayes' rule",
                distance,
                allowance,
                route,
            ),
            compare("L − K of each datum", route, best.log_p - k, "zero", 0.0, allowance, route, at_least=True),
        ]
        detail = f"L − K is {np.mean(best.log_p - k):.4g} nats; K is {k.mean():.5g}"
    elif best.trusted.any():
        use = best.trusted
        weights = use / use.sum()
        gap = best.log_p[use].mean() - w[:, use].mean()
        deviation = np.sqrt(best.variance(weights) + (w @ weights).var() / len(w))
        found += [
            monte_carlo("L − K", best.route, gap, "zero", 0.0, deviation, e.rate, best.bias @ weights, at_least=True)
        ]
        detail += f"; L − K is {gap:.3g} ± {deviation:.1g}"
    forms = dict(e.forms)
    if not pair.q.ascending or pair.num_timesteps == 1:
        forms["TraceMeanField_ELBO"] = (pair.p.program, pair.q.program, TraceMeanField_ELBO())
    for name, form in forms.items():
        found += [_same_elbo(e, name, form, reference, reference_error)]
    if e.elbo_and_gap is None and not best.trusted.any():
        raise NotApplicable(f"L − K is not known: {untrusted(e.ancestral, e.importance)}; {detail}", found)
    return found, detail, None


def _same_elbo(e: Evidence, name: str, form: tuple, reference: float, error: float) -> Comparison:
    model, guide, elbo = form
    keys = jax.random.split(e.key(), e.num_draws)
    try:
        draws = jax.vmap(lambda key: -elbo.loss(key, e.pair.params, model, guide, e.pair.x))(keys)
    except Exception as wrong:  # whatever a user's program may raise
        raise Wrong(f"the form {name} cannot be run: {type(wrong).__name__}: {wrong}") from wrong
    draws = np.asarray(draws, np.float64) / len(e.x_0)
    deviation = np.sqrt(draws.var() / len(draws) + error**2)
    return monte_carlo("K", "N17", reference, name, draws.mean(), deviation, e.rate, e.rounding(draws))


def _best(e: Evidence) -> Estimate:
    """log p(x_0) by the most exact route there is."""
    if e.exact is not None:
        return e.exact
    return e.ancestral if e.ancestral.trusted.sum() >= e.importance.trusted.sum() else e.importance


def _two_routes(e: Evidence) -> tuple[Estimate, Estimate]:
    """An exact value and an estimate, that of ancestral draws if it can be; or both estimates."""
    if e.exact is None:
        return e.ancestral, e.importance
    return e.exact, e.ancestral if e.ancestral.trusted.any() else e.importance


def _ratio(e: Evidence, name: str, estimate: Estimate, other: Estimate) -> Comparison:
    """The mean over trusted data of estimate/other, which is one up to Monte Carlo error."""
    use = estimate.trusted & other.trusted
    ratio = np.where(use, np.exp(estimate.log_p - other.log_p), 0.0)
    weights = use / use.sum()
    deviation = np.sqrt(estimate.variance(weights * ratio) + other.variance(weights * ratio))
    allowance = 2 * other.bias @ weights + other.error
    return monte_carlo(
        name, f"{estimate.route} over {other.route}", ratio @ weights, "one", 1.0, deviation, e.rate, allowance
    )
