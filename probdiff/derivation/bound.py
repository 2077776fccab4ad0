"""From the importance weights to the bound, N14–N17."""

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy.special import logsumexp

from probdiff.derivation.comparisons import best_estimate, mean_ratio
from probdiff.derivation.estimates import untrusted
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong
from probdiff.derivation.ledger import Comparison, compare, machine, monte_carlo
from probdiff.derivation.pair import Chain, Program
from probdiff.derivation.rows import row
from probdiff.derivation.sites import compiled_sites

_CHAIN = r"\prod_{t=1}^{T} \frac{p(x^{(t-1)} \mid x^{(t)})}{q(x^{(t)} \mid x^{(t-1)})}"
_FEW_SITES = 6


@row(
    "N14",
    "p(x_0) = E_q[p(x_T) ∏_t p(x_{t-1} | x_t) / q(x_t | x_{t-1})]",
    rf"p(x^{{(0)}}) = \mathbb E_{{q(x^{{(1 \dots T)}} \mid x^{{(0)}})}}\Big[ p(x^{{(T)}}) {_CHAIN} \Big] \quad (4)",
    needs=("N5", "N12"),
    erratum="(4) is printed with p(x_0) where p(x_T) must stand in front of the product",
)
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
    return [mean_ratio(e, "E_q[w] over p(x_0), mean over data", weights, other)], state, None


@row(
    "N15",
    "L = ∫ q(x_0) log E_q[p(x_T) ∏_t p(x_{t-1} | x_t) / q(x_t | x_{t-1})] dx_0",
    rf"L = \int q(x^{{(0)}}) \log \mathbb E_q\Big[ p(x^{{(T)}}) {_CHAIN} \Big] dx^{{(0)}}",
    needs=("N14",),
    erratum="printed with q(x_1) and dx_1; it is q(x_0) and dx_0",
)
def n15(e: Evidence) -> Finding:
    """The mean over the data of the log of the mean weight, against L."""
    comparison, n = e.mean_log_p("L = mean of log E_q[w]", e.exact or e.ancestral, e.importance)
    return [comparison], f"{n} of {len(e.x_0)} data", None


@row(
    "N16",
    "Jensen: f(s·x + (1−s)·y) ≤ s·f(x) + (1−s)·f(y) for convex f and s in [0, 1]",
    r"f(s x + (1-s) y) \le s f(x) + (1-s) f(y)",
    needs=("q", "p"),
    erratum="stated for convex f; log is concave, so the sign turns when it is applied",
)
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


@row(
    "N17",
    "L ≥ K = E_q[log p(x_T) + Σ_t log p(x_{t-1} | x_t) − Σ_t log q(x_t | x_{t-1})]",
    r"L \ge K = \mathbb E_q\Big[ \log p(x^{(T)}) + \sum_t \log p(x^{(t-1)} \mid x^{(t)}) "
    r"- \sum_t \log q(x^{(t)} \mid x^{(t-1)}) \Big]",
    needs=("N2", "N14"),
    erratum="the notes stop at N16; this is the step that they lead to",
)
def n17(e: Evidence) -> Finding:
    """K by hand, from NumPyro, exactly and in other forms; and L − K against the KL divergence that it is."""
    pair, w = e.pair, e.log_weights
    by_hand, error = w.mean(), w.mean(1).std() / np.sqrt(len(w))
    # the same path in NumPyro's ELBO
    fixed = handlers.substitute(pair.q.program, data={f"x_{t}": e.point(0)[t] for t in pair.q.times})
    programs = compiled_sites(pair.p.program), compiled_sites(fixed)
    loss = Trace_ELBO().loss(jax.random.key(0), pair.params, *programs, pair.x)
    rounding = 100 * e.eps * sum(np.abs(np.float64(v[0])).sum() for part in e.draws[1:] for v in part.values())
    found = [
        machine("K of one path of each datum", "Trace_ELBO", -float(loss), "written out by hand", w[0].sum(), rounding)
    ]
    best, detail = best_estimate(e), f"K is {by_hand:.5g} ± {error:.2g} nats per datum"
    reference, reference_error = by_hand, error
    if e.elbo_and_gap is not None:
        k, distance, allowance, route = e.elbo_and_gap
        reference, reference_error = k.mean(), 0.0
        found += [
            monte_carlo(
                "K", route, k.mean(), "draws, by hand", by_hand, error, e.failure_rate, allowance + e.rounding(k)
            ),
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
            monte_carlo(
                "L − K", best.route, gap, "zero", 0.0, deviation, e.failure_rate, best.bias @ weights, at_least=True
            )
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
        programs = compiled_sites(model), compiled_sites(guide)
        run = jax.vmap(lambda key: -elbo.loss(key, e.pair.params, *programs, e.pair.x))
        draws = (jax.jit(run) if _is_short(e, model) else run)(keys)
    except Exception as wrong:  # whatever a user's program may raise
        raise Wrong(f"the form {name} cannot be run: {type(wrong).__name__}: {wrong}") from wrong
    draws = np.asarray(draws, np.float64) / len(e.x_0)
    deviation = np.sqrt(draws.var() / len(draws) + error**2)
    return monte_carlo("K", "N17", reference, name, draws.mean(), deviation, e.failure_rate, e.rounding(draws))


def _is_short(e: Evidence, program: Program) -> bool:
    """Whether a program has few sites, so that the whole of it compiles fast."""
    chain = Chain("", program)
    chain.params.update(e.pair.params)
    return sum(site["type"] == "sample" for site in chain.described(e.pair.x).values()) <= _FEW_SITES
