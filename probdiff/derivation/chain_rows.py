"""The rows of the two chains: N1–N8, N10 and N13."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from scipy import stats
from scipy.special import logsumexp

from probdiff.derivation import feller
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong, stray_dependencies
from probdiff.derivation.ledger import Comparison, compare, machine, monte_carlo
from probdiff.derivation.linear import dense, forward_covariance, normal_kl, normal_log_prob
from probdiff.derivation.pair import Chain

_DENSE = 400  # dimensions of the largest dense normal


def n1(e: Evidence) -> Finding:
    """KL(q(x_T | x_0) ‖ N(0, I)) in closed form, from ᾱ_T and from draws; and that of the marginal q(x_T)."""
    if e.q is None:
        raise NotApplicable("q is not linear-Gaussian, so q(x_T | x_0) has no closed form")
    q, D = e.q, e.pair.size
    means, covs = q.marginals()
    mean, cov = means[-1], covs[-1]
    kl = normal_kl(mean, cov, np.zeros_like(mean), np.eye(D))
    x_T = e.flat(e.draws[0][e.pair.num_timesteps])
    log_ratio = np.stack([normal_log_prob(x, mean, cov) for x in x_T]) - stats.norm.logpdf(x_T).sum(-1)
    found = [
        monte_carlo(
            "mean KL(q(x_T | x_0) ‖ N(0, I))",
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
        alpha_bar = float(np.prod(1 - e.beta))
        per_datum = D * (-alpha_bar - np.log1p(-alpha_bar)) + alpha_bar * np.sum(e.x_0**2, 1)
        scale = 1e3 * e.eps * (D + np.abs(kl).max())
        found += [machine("KL of each datum", "from the kernels", kl, "from ᾱ_T", per_datum / 2, scale)]
    # q(x_T) over the data is a mixture of one normal for each datum
    each = np.stack([normal_log_prob(x_T.reshape(-1, D), m, cov) for m in mean])
    log_q_T = logsumexp(each, axis=0) - np.log(len(mean))
    drawn = log_q_T.reshape(len(x_T), -1) - stats.norm.logpdf(x_T).sum(-1)
    marginal, error = drawn.mean(), drawn.mean(1).std() / np.sqrt(len(drawn))
    found += [
        monte_carlo(
            "KL(q(x_T | x_0) ‖ N(0, I)) ≥ KL(q(x_T) ‖ N(0, I))",
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
        f"KL(q(x_T | x_0) ‖ N(0, I)) is {kl.mean():.3g} nats on average over {len(kl)} data, {kl.max():.3g} at most; "
        f"KL(q(x_T) ‖ N(0, I)) is {marginal:.2g} ± {error:.1g}"
    )
    return found, detail, kl.mean() if kl.mean() > e.rounding(kl) else None


def n2(e: Evidence) -> Finding:
    """Mixed second derivatives of log q(x_1…x_T | x_0), and NumPyro's dependency inspection."""
    return _markov(e, e.pair.q), "", None


def n3(e: Evidence) -> Finding:
    """Mean and covariance of each forward kernel: as the sites state them, from their densities, and from draws."""
    if e.q is None:
        raise Wrong("the mean is not linear in x_{t−1}, or the covariance depends on it")
    q, T, D, (beta, route) = e.q, e.pair.num_timesteps, e.pair.size, e.beta_and_route
    if beta.shape != (T,) or not np.all((beta > 0) & (beta <= 1)):
        raise Wrong(f"β ({route}) is {beta}; it must be {T} numbers in (0, 1]")
    shrink = np.sqrt(1 - beta)
    tolerance = 200 * e.eps
    eye = np.eye(D)
    times = range(1, T + 1)
    name = "Jacobian of the mean" if e.pair.q.ascending else "slope, by Bayes' rule"
    found = [
        machine(name, "from q", q.A, "√(1−β_t)·I", shrink[:, None, None] * eye, tolerance),
        machine("mean at zero", "from q", q.b, "zero", 0.0, tolerance * (np.abs(e.x_0).max() + 5)),
        machine("covariance, over β_t", "from q", q.S / beta[:, None, None], f"I ({route})", eye, tolerance),
    ]
    found += _kernels_are_normal(e, e.pair.q)
    path = {t: e.flat(x).reshape(-1, D) for t, x in e.draws[0].items()}
    count = path[0].size
    spread = [max(np.sum(path[t - 1] ** 2), 1e-12) for t in times]  # zero for t = 1 where all data are zero
    slopes = [np.sum((path[t] - shrink[t - 1] * path[t - 1]) * path[t - 1]) / spread[t - 1] for t in times]
    errors = [np.sqrt(beta[t - 1] / spread[t - 1]) for t in times]
    residuals = [(path[t] - shrink[t - 1] * path[t - 1]) / np.sqrt(beta[t - 1]) for t in times]
    found += [
        monte_carlo("slope of x_t in x_{t−1}", "draws", slopes + shrink, "√(1−β_t)", shrink, errors, e.rate),
        e.chi_square("variance of the draws, over β_t", np.array([np.mean(z**2) for z in residuals]), count),
    ]
    if D > 1:
        signs = np.asarray(jax.random.rademacher(e.key(), (D,)), np.float64)
        along = np.array([np.mean((z @ signs) ** 2) / D for z in residuals])
        found += [e.chi_square("variance along a random diagonal, over β_t", along, len(path[0]))]
    return found, f"β_t from {route}", None


def n4(e: Evidence) -> Finding:
    """dK/du of every param of the guide, by differentiation and by finite differences."""
    return _gradient(e, e.pair.forward_params, "β_t is fixed: the guide has no NumPyro param")


def n5(e: Evidence) -> Finding:
    """log q of a path as NumPyro counts it, as the sum of its factors, and by the dense normal built from ᾱ."""
    found = _product(e, e.pair.q, e.draws[1])
    if e.holds["N3"]:
        T = e.pair.num_timesteps
        x_0 = e.x_0
        alpha_bar = np.cumprod(1 - e.beta)
        path = np.stack([e.flat(e.draws[0][t][0]) for t in range(1, T + 1)])  # (T, N, D)
        residual = path - np.sqrt(alpha_bar)[:, None, None] * x_0
        of_ᾱ = stats.multivariate_normal(cov=forward_covariance(e.beta)).logpdf(residual.reshape(T, -1).T).sum()
        scale = e.rounding_of_paths(e.pair.q)
        found += [
            machine("one path of each datum", "NumPyro", e.totals["q"], "(T·D)-dimensional normal from ᾱ", of_ᾱ, scale)
        ]
    return found, "", None


def n6(e: Evidence) -> Finding:
    """KL of a mixture's reversed kernel to its nearest Gaussian against β³·((log q)‴)²/12, and its size here."""
    q = feller.Mixture(np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.35, 0.5]))
    kl, limit = feller.rate(q, 0.2, [1e-4, 2e-4, 4e-4])
    orders, ratios = np.diff(np.log2(kl)), kl / limit
    observed = (("order in β", orders, 3.0), ("KL over β³·((log q)‴)²/12", ratios, 1.0))
    found = [
        compare(name, "observed", 2 * v[0] - v[1], "theory", theory, abs(v[1] - v[0]), "next order in β")
        for name, v, theory in observed
    ]
    if e.pair.num_timesteps == 1:
        return found, "q(x_0 | x_1) is as discrete as the data", None
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(1 - e.beta, 1e-200)))])
    sizes = feller.chain_non_gaussianity(e.x_0[:32, 0], log_alpha_bar, e.beta)
    detail = (
        f"at this chain's own β_t, E KL(q(x_{{t−1}} | x_t) ‖ nearest Gaussian) of the first coordinate, these data "
        f"being all of q(x_0), adds up to {sizes.sum():.3g} nats over t = 2…T, "
        f"most at t = {2 + sizes.argmax()}: {sizes.max():.3g}"
    )
    return found, detail, float(sizes.sum())


def n7(e: Evidence) -> Finding:
    """p(x_T) against N(0, I), as the site states it and from draws; draws of x_0 against p(x_0) where that is known."""
    T, D = e.pair.num_timesteps, e.pair.size
    log_prior, x_T = np.float64(e.draws[2][T]), e.flat(e.draws[0][T])
    scale = 200 * e.eps * (D + np.sum(x_T**2, -1))
    normal = stats.norm.logpdf(x_T).sum(-1)
    found = [machine("log p(x_T)", "the site", log_prior, "N(0, I), SciPy", normal, scale)]
    drawn = e.flat(e.generated[T]).reshape(-1, D)
    n = len(drawn)
    found += [
        e.chi_square("variance of x_T", np.mean(drawn**2, 0), n),
        monte_carlo("mean of x_T", "draws", drawn.mean(0), "zero", 0.0, 1 / np.sqrt(n), e.rate),
    ]
    if not e.holds["N8"]:  # so what p(x_0) is, is not known
        return found, "", None
    x_0 = e.flat(e.generated[0]).reshape(-1, D)
    if e.p is not None:
        means, covs = e.p.marginals()
        z = np.linalg.solve(np.linalg.cholesky(covs[-1]), (x_0 - means[-1][0]).T)
        found += [
            e.chi_square("covariance of x_0, standardised by p(x_0) in closed form", np.mean(z**2, 1), n),
            monte_carlo("mean of x_0, standardised", "draws", z.mean(1), "zero", 0.0, 1 / np.sqrt(n), e.rate),
        ]
    elif e.grid is not None:
        distance = stats.kstest(x_0[:, 0], e.grid.cdf).statistic
        critical = stats.kstwo.isf(e.rate, n) + 1e-3  # the nodes are not infinitely close
        found += [
            compare(
                "p(x_0)",
                "largest gap of distribution functions",
                distance,
                "quadrature",
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
    other = p.log_probs_of(path, path[0][::-1] + 1.0)
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
    found += _kernels_are_normal(e, p)
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
    # draws, standardised by what the kernels state of themselves
    D = e.pair.size
    signs = np.asarray(jax.random.rademacher(e.key(), (D,)), np.float64)
    squares, along, means = [], [], []
    for t in range(T):
        mean, cov = (values[4:] for values in e.moments["p"][t])
        z = np.linalg.solve(np.linalg.cholesky(cov), (e.flat(e.generated[t][: len(mean)]) - mean)[..., None])[..., 0]
        squares.append(np.mean(z**2))
        along.append(np.mean((z @ signs) ** 2) / D)
        means.append(np.mean(z @ signs) / np.sqrt(D))
    n = z[..., 0].size
    found += [
        e.chi_square("variance of the draws, over f_Σ", np.array(squares), n * D),
        e.chi_square("variance of the draws along a random diagonal, over f_Σ", np.array(along), n),
        monte_carlo("mean of the draws, less f_μ", "draws", means, "zero", 0.0, 1 / np.sqrt(n), e.rate),
    ]
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
        scale = e.rounding_of_paths(e.pair.p)
        log_p = normal_log_prob(path, mean, cov).sum()
        found += [machine("one path of each datum", "NumPyro", e.totals["p"], "dense normal of the path", log_p, scale)]
    return found, "", None


def _markov(e: Evidence, chain: Chain) -> list[Comparison]:
    keys = jax.random.split(e.key(), len(e.draws[0]))
    path = {t: x[:2] for t, x in e.point(0).items()}
    direction = {t: jax.random.normal(key, x.shape, x.dtype) for key, (t, x) in zip(keys, path.items(), strict=True)}
    columns = {t: np.abs(e.flat(x)).max((-2, -1)) for t, x in chain.curvature(path, direction).items()}
    size = np.stack([columns[t] for t in sorted(columns)])  # (of x_t, along x_s)
    t, s = np.indices(size.shape)
    far = np.where(abs(t - s) > 1, size, 0.0)
    worst = np.unravel_index(far.argmax(), far.shape)
    where = f", x_{min(worst)} and x_{max(worst)}" if far.max() > 0 else ""
    stray = stray_dependencies(chain, e.pair.x)
    reads = f" ({'; '.join(stray[:3])})" if stray else ""
    return [
        machine(
            f"mixed second derivatives of log {chain.name}, |s−t| > 1{where}",
            "largest",
            far.max(),
            "zero",
            0.0,
            100 * e.eps * size.max(),
        ),
        compare(
            f"dependencies beyond the neighbour{reads}", "NumPyro's inspection", len(stray), "none", 0, 0.0, "a count"
        ),
    ]


def _kernels_are_normal(e: Evidence, chain: Chain) -> list[Comparison]:
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
        scale.append(e.rounding_of_kernel(x, mean, cov))
        size = np.abs(cov).max((1, 2))
        ratio.append(np.abs(np.asarray(from_density[t][1], np.float64) - cov).max((1, 2)) / size)
        error.append(300 * e.eps * np.linalg.cond(cov))
    return [
        machine(f"log density of each kernel of {chain.name}", "the site", stated, "normal, SciPy", normal, scale),
        machine("covariance against −(∇² log density)⁻¹", "relative difference", ratio, "zero", 0.0, error),
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
    return [worst], f"{len(slopes)} derivatives of {', '.join(names)}", None
