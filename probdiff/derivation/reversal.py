"""The reversal of the notes, N6–N8: for small steps it has the form of q, and p runs it from noise to data."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from scipy import stats

from probdiff.derivation.comparisons import markov
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong
from probdiff.derivation.ledger import compare, machine, monte_carlo
from probdiff.derivation.rows import row


@row(
    "N6",
    "for small steps q(x_{t-1} | x_t) has the form of q(x_t | x_{t-1}) (Feller)",
    r"\beta_t \to 0:\ q(x^{(t-1)} \mid x^{(t)}) \to \mathcal N",
    needs=("q", "p", "N3"),
    erratum="the label (A) is used twice, here and in N9; Feller's paper is of 1949",
    of_bits=(
        "for small steps q(x_{t-1} | x_t) has the form of q(x_t | x_{t-1}), a product of Bernoullis (Feller)",
        r"\beta_t \to 0:\ q(x^{(t-1)} \mid x^{(t)}) \to \prod_i \mathcal B",
    ),
    reads=True,
)
def n6(e: Evidence) -> Finding:
    """How far a reversed kernel is from the form of q(x_t | x_{t−1}), against its law as β → 0, and its size here."""
    law = e.reader.reversal(e)
    orders, ratios = np.diff(np.log2(law.kl)), law.kl / law.limit
    observed = (("order in β", orders, law.order), (f"KL over {law.formula}", ratios, 1.0))
    found = [
        compare(name, "observed", 2 * v[0] - v[1], "theory", theory, abs(v[1] - v[0]), "next order in β")
        for name, v, theory in observed
    ]
    if law.here is None:
        return found, "q(x_0 | x_1) is as discrete as the data", None
    sizes, first, part = law.here
    detail = (
        f"at this chain's own β_t, E KL(q(x_{{t−1}} | x_t) ‖ {part}, these data "
        f"being all of q(x_0), adds up to {sizes.sum():.3g} nats over t = {first}…T, "
        f"most at t = {first + sizes.argmax()}: {sizes.max():.3g}"
    )
    return found, detail, float(sizes.sum())


@row(
    "N7",
    "p runs from p(x_T) = N(0, I) to the data distribution",
    r"p(x^{(T)}) = \mathcal N(0, I) \longrightarrow p(x^{(0)})",
    needs=("q", "p"),
    erratum="the arrow is labelled as starting from p(x_t); it starts from p(x_T)",
    of_bits=(
        "p runs from p(x_T) = Bernoulli(π) of each bit to the data distribution",
        r"p(x^{(T)}) = \mathcal B(\pi) \longrightarrow p(x^{(0)})",
    ),
    reads=True,
)
def n7(e: Evidence) -> Finding:
    """p(x_T) as the site states it and from draws; draws of x_0 against p(x_0) where that is known."""
    found = e.reader.terminal_draws(e)
    if not e.holds["N8"]:  # so what p(x_0) is, is not known
        return found, "", None
    x_0 = e.flat(e.generated[0]).reshape(-1, e.pair.size)
    n = len(x_0)
    if e.p is not None:
        means, covs = e.p.marginals()
        z = np.linalg.solve(np.linalg.cholesky(covs[-1]), (x_0 - means[-1][0]).T)
        found += [
            e.chi_square("covariance of x_0, standardised by p(x_0) in closed form", np.mean(z**2, 1), n),
            monte_carlo("mean of x_0, standardised", "draws", z.mean(1), "zero", 0.0, 1 / np.sqrt(n), e.failure_rate),
        ]
    elif e.grid is not None:
        critical = stats.kstwo.isf(e.failure_rate, n) + 1e-3  # the nodes are not infinitely close
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


@row(
    "N8",
    "p is first-order Markov with p(x_{t-1} | x_t) = N(f_μ(x_t, t), f_Σ(x_t, t))",
    r"p(x^{(t-1)} \mid x^{(t)}) = \mathcal N(f_\mu(x^{(t)}, t), f_\Sigma(x^{(t)}, t))",
    needs=("q", "p"),
    of_bits=(
        "p is first-order Markov with p(x_{t-1} | x_t) a distribution of bits, of rates f_μ(x_t, t) and covariance f_Σ",
        r"p(x^{(t-1)} \mid x^{(t)}) = \mathcal B(f_\mu(x^{(t)}, t)) \text{ or a mixture of such}",
    ),
    of_mixtures=(
        "p is first-order Markov with p(x_{t-1} | x_t) a mixture of M Gaussians, of mean f_μ(x_t, t), covariance f_Σ",
        r"p(x^{(t-1)} \mid x^{(t)}) = \sum_{m=1}^M w_m\, \mathcal N(f_{\mu,m}(x^{(t)}, t), f_{\Sigma,m}(x^{(t)}, t))",
    ),
    reads=True,
)
def n8(e: Evidence) -> Finding:
    """Markov as N2; each reverse kernel as its site states it, from its density, from draws and as claimed."""
    p, T = e.pair.p, e.pair.num_timesteps
    found = markov(e, p)
    path = e.point(0)
    # the site x_0 keeps its value while the argument x_0 changes
    before = np.stack([np.float64(v[0]) for v in e.draws[2].values()])
    other = p.log_probs_of(path, jnp.asarray(e.reader.other(np.asarray(path[0]))))
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
    try:
        found += e.reader.reverse_kernels(e)
    except NotApplicable as why:
        raise NotApplicable(str(why), [*found, *why.comparisons]) from why
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
