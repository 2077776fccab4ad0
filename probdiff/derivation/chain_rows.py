"""The rows of the two chains: N1–N8, N10 and N13."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from scipy import stats
from scipy.special import logsumexp

from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong, stray_dependencies
from probdiff.derivation.ledger import Comparison, compare, machine, monte_carlo
from probdiff.derivation.pair import Chain
from probdiff.reference.linear_gaussian import dense, normal_log_prob

_DENSE = 400  # dimensions of the largest dense normal


def n1(e: Evidence) -> Finding:
    """KL(q(x_T | x_0) ‖ p(x_T)) in closed form, from ᾱ_T and from draws; and that of the marginal q(x_T)."""
    if e.q is None:
        raise NotApplicable(f"{e.family.no_closed_form}, so q(x_T | x_0) has no closed form")
    T, D, prior = e.pair.num_timesteps, e.pair.size, e.family.prior
    kl = e.family.kl_to_prior(e)
    x_T = e.flat(e.draws[0][T])
    S, N = x_T.shape[:2]
    log_prior = e.family.log_prior(e, x_T)
    each = e.q.log_marginal(T, x_T.reshape(-1, D)).reshape(N, S, N)  # of each datum's draws, given each datum
    log_ratio = np.einsum("nsn->sn", each) - log_prior
    found = [
        monte_carlo(
            f"mean KL(q(x_T | x_0) ‖ {prior})",
            "closed form",
            kl.mean(),
            "draws",
            log_ratio.mean(),
            log_ratio.mean(1).std() / np.sqrt(len(log_ratio)),
            e.rate,
            e.rounding(kl),
        )
    ]
    if e.holds["N3"]:
        per_datum = e.family.kl_from_alpha_bar(e, float(np.prod(1 - e.beta)))
        scale = 1e3 * e.eps * (D + np.abs(kl).max())
        found += [machine("KL of each datum", "from the kernels", kl, "from ᾱ_T", per_datum, scale)]
    # q(x_T) over the data is a mixture with one part for each datum
    drawn = logsumexp(each, axis=0) - np.log(N) - log_prior
    marginal, error = drawn.mean(), drawn.mean(1).std() / np.sqrt(len(drawn))
    found += [
        monte_carlo(
            f"KL(q(x_T | x_0) ‖ {prior}) ≥ KL(q(x_T) ‖ {prior})",
            "mean over data",
            kl.mean(),
            "marginal",
            marginal,
            error,
            e.rate,
            e.rounding(kl),
            at_least=True,
        )
    ]
    detail = (
        f"KL(q(x_T | x_0) ‖ {prior}) is {kl.mean():.3g} nats on average over {len(kl)} data, {kl.max():.3g} at most; "
        f"KL(q(x_T) ‖ {prior}) is {marginal:.2g} ± {error:.1g}"
    )
    return found, detail, kl.mean() if kl.mean() > e.rounding(kl) else None


def n2(e: Evidence) -> Finding:
    """Mixed second derivatives or differences of log q(x_1…x_T | x_0), and NumPyro's dependency inspection."""
    return _markov(e, e.pair.q), "", None


def n3(e: Evidence) -> Finding:
    """Each forward kernel as its site states it, from its log density, and from draws."""
    if e.q is None:
        raise Wrong(e.family.not_of_n3)
    T, (beta, route) = e.pair.num_timesteps, e.beta_and_route
    if beta.shape != (T,) or not np.all((beta > 0) & (beta <= 1)):
        raise Wrong(f"β ({route}) is {beta}; it must be {T} numbers in (0, 1]")
    found = e.family.steps(e) + e.family.kernels(e, e.pair.q) + e.family.step_draws(e)
    return found, f"β_t from {route}", None


def n4(e: Evidence) -> Finding:
    """dK/du of every param of the guide, by differentiation and by finite differences."""
    return _gradient(e, e.pair.forward_params, "β_t is fixed: the guide has no NumPyro param")


def n5(e: Evidence) -> Finding:
    """log q of a path as NumPyro counts it, as the sum of its factors, and built from ᾱ alone."""
    found = _product(e, e.pair.q, e.draws[1])
    if e.holds["N3"]:
        of_ᾱ, route = e.family.log_q_from_alpha_bar(e)
        scale = e.family.rounding_of_paths(e, e.pair.q)
        found += [machine("one path of each datum", "NumPyro", e.totals["q"], route, of_ᾱ, scale)]
    return found, "", None


def n6(e: Evidence) -> Finding:
    """How far a reversed kernel is from the form of q(x_t | x_{t−1}), against its law as β → 0, and its size here."""
    kl, limit, order, formula = e.family.reversal()
    orders, ratios = np.diff(np.log2(kl)), kl / limit
    observed = (("order in β", orders, order), (f"KL over {formula}", ratios, 1.0))
    found = [
        compare(name, "observed", 2 * v[0] - v[1], "theory", theory, abs(v[1] - v[0]), "next order in β")
        for name, v, theory in observed
    ]
    here = e.family.reversal_here(e)
    if here is None:
        return found, "q(x_0 | x_1) is as discrete as the data", None
    sizes, first, of_what = here
    detail = (
        f"at this chain's own β_t, E KL(q(x_{{t−1}} | x_t) ‖ {of_what}, these data "
        f"being all of q(x_0), adds up to {sizes.sum():.3g} nats over t = {first}…T, "
        f"most at t = {first + sizes.argmax()}: {sizes.max():.3g}"
    )
    return found, detail, float(sizes.sum())


def n7(e: Evidence) -> Finding:
    """p(x_T) as the site states it and from draws; draws of x_0 against p(x_0) where that is known."""
    found = e.family.prior_draws(e)
    if not e.holds["N8"]:  # so what p(x_0) is, is not known
        return found, "", None
    x_0 = e.flat(e.generated[0]).reshape(-1, e.pair.size)
    n = len(x_0)
    if e.p is not None:
        means, covs = e.p.marginals()
        z = np.linalg.solve(np.linalg.cholesky(covs[-1]), (x_0 - means[-1][0]).T)
        found += [
            e.chi_square("covariance of x_0, standardised by p(x_0) in closed form", np.mean(z**2, 1), n),
            monte_carlo("mean of x_0, standardised", "draws", z.mean(1), "zero", 0.0, 1 / np.sqrt(n), e.rate),
        ]
    elif e.grid is not None:
        critical = stats.kstwo.isf(e.rate, n) + 1e-3  # the nodes are not infinitely close
        found += [
            compare(
                "p(x_0)",
                "largest gap of distribution functions",
                e.grid.largest_gap(x_0),
                e.grid.route,
                0.0,
                critical,
                "Monte Carlo, Kolmogorov and Smirnov",
            )
        ]
    return found, "", None


def n8(e: Evidence) -> Finding:
    """Markov as N2; each reverse kernel as its site states it, from its density, from draws and as claimed."""
    p, T = e.pair.p, e.pair.num_timesteps
    found = _markov(e, p)
    path = e.point(0)
    # the site x_0 keeps its value while the argument x_0 changes
    before = np.stack([np.float64(v[0]) for v in e.draws[2].values()])
    other = p.log_probs_of(path, e.family.another(path[0]))
    after = np.stack([np.asarray(other[t], np.float64) for t in e.draws[2]])
    found += [
        machine(
            "log p of a path as the program's argument x_0 changes",
            "before",
            before,
            "after",
            after,
            200 * e.eps * np.abs(before).sum(0),
        )
    ]
    found += e.family.kernels(e, p)
    try:
        found += e.family.reverse_draws(e)
    except NotApplicable as why:
        raise NotApplicable(str(why), found) from why
    for name, index in (("f_mu", 0), ("f_sigma", 1)):
        claim = e.claims[name]
        if claim is None:
            continue
        program = handlers.substitute(handlers.seed(claim, jax.random.key(0)), data=e.pair.params)
        for t in range(T, 0, -1):
            of_site = e.moments["p"][t - 1][index][0]
            try:
                of_claim = np.asarray(program(path[t], t), np.float64)
            except Exception as error:  # whatever a user's function may raise
                raise Wrong(f"{name}(x_t, {t}) cannot be run: {type(error).__name__}: {error}") from error
            if of_claim.size not in (of_site.size, of_site[0].size):
                raise Wrong(f"{name}(x_t, {t}) has shape {of_claim.shape}; wanted is {of_site.shape}")
            of_claim = np.broadcast_to(of_claim.reshape(-1, *of_site.shape[1:]), of_site.shape)
            scale = 200 * e.eps * (np.abs(of_site).max() + np.abs(np.asarray(path[t])).max() * (1 - index))
            found += [machine(f"{name} at t = {t}", f"site x_{t - 1}", of_site, name, of_claim, scale)]
    linear = "" if e.p is None else "f_μ is linear in x_t and f_Σ does not depend on it"
    return found, linear, None


def n10(e: Evidence) -> Finding:
    """dK/du of every param of both programs, by differentiation and by finite differences."""
    return _gradient(e, e.pair.forward_params + e.pair.reverse_params, "neither chain has a NumPyro param")


def n13(e: Evidence) -> Finding:
    """log p of a path as NumPyro counts it, as the sum of its factors, and by a dense normal for a linear chain."""
    found = _product(e, e.pair.p, e.draws[2])
    if e.p is not None and (e.pair.num_timesteps + 1) * e.pair.size <= _DENSE:
        mean, cov = dense(e.p)
        path = np.concatenate([e.flat(e.draws[0][t][0]) for t in range(e.pair.num_timesteps, -1, -1)], 1)
        scale = e.family.rounding_of_paths(e, e.pair.p)
        log_p = normal_log_prob(path, mean, cov).sum()
        found += [machine("one path of each datum", "NumPyro", e.totals["p"], "dense normal of the path", log_p, scale)]
    return found, "", None


def _markov(e: Evidence, chain: Chain) -> list[Comparison]:
    size, rounding, what = e.family.couplings(e, chain)
    t, s = np.indices(size.shape)
    far = np.where(abs(t - s) > 1, size, 0.0)
    worst = np.unravel_index(far.argmax(), far.shape)
    where = f", x_{min(worst)} and x_{max(worst)}" if far.max() > 0 else ""
    stray = stray_dependencies(chain, e.family.anything(e.pair.x), e.pair.x.dtype)
    reads = f" ({'; '.join(stray[:3])})" if stray else ""
    return [
        machine(f"{what} of log {chain.name}, |s−t| > 1{where}", "largest", far.max(), "zero", 0.0, rounding),
        compare(
            f"dependencies beyond the neighbour{reads}", "NumPyro's inspection", len(stray), "none", 0, 0.0, "a count"
        ),
    ]


def _product(e: Evidence, chain: Chain, log_probs: dict[int, np.ndarray]) -> list[Comparison]:
    terms = np.stack([np.float64(v[0]) for v in log_probs.values()])  # (sites, N)
    allowed = 100 * e.eps * np.abs(terms).sum()
    alone = chain.log_probs({t: jnp.asarray(x[:1, :1]) for t, x in e.draws[0].items()})
    of_first = sum(float(v[0, 0]) for v in alone.values())
    return [
        machine("one path of each datum", "NumPyro", e.totals[chain.name], "sum of the factors", terms.sum(), allowed),
        machine("one path of the first datum", "alone", of_first, "among the others", terms[:, 0].sum(), allowed),
    ]


def _gradient(e: Evidence, names: list[str], why_not: str) -> Finding:
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
                e.rate,
                1e-9 * max(abs(mean.exact) for mean in means),
            )
        ]
        if means
        else []
    )
    return [worst, *of_draws], f"{len(slopes)} derivatives of {', '.join(names)}", None
