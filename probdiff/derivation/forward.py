"""The forward process of the notes, N1–N5: q carries data to noise by kernels whose β_t can be learned."""

import numpy as np
from scipy.special import logsumexp

from probdiff.derivation.comparisons import gradient, markov, product_of_factors
from probdiff.derivation.evidence import Evidence, Finding, NotApplicable, Wrong
from probdiff.derivation.ledger import machine, monte_carlo
from probdiff.derivation.rows import row


@row(
    "N1",
    "q carries the data distribution q(x_0) to q(x_T) = N(0, I)",
    r"q(x^{(0)}) \longrightarrow q(x^{(T)}) = \mathcal N(0, I)",
    needs=("q", "p", "N2"),
    erratum="holds exactly only as ∏(1−β_t) → 0; at finite T its cost is the ELBO's prior term KL(q(x_T|x_0) ‖ p(x_T))",
    of_bits=(
        "q carries the data distribution q(x_0) to q(x_T) = Bernoulli(π) of each bit",
        r"q(x^{(0)}) \longrightarrow q(x^{(T)}) = \mathcal B(\pi)",
    ),
    reads=True,
)
def n1(e: Evidence) -> Finding:
    """KL(q(x_T | x_0) ‖ p(x_T)) in closed form, from ᾱ_T and from draws; and that of the marginal q(x_T)."""
    if e.q is None:
        raise NotApplicable("q is not of the form of N3, so q(x_T | x_0) has no closed form")
    T, D, terminal = e.pair.num_timesteps, e.pair.size, e.terminal.name
    kl = e.terminal.kl()
    x_T = e.flat(e.draws[0][T])
    S, N = x_T.shape[:2]
    log_terminal = e.terminal.log_prob(x_T)
    each = e.q.log_marginal(T, x_T.reshape(-1, D)).reshape(N, S, N)  # of each datum's draws, given each datum
    log_ratio = np.einsum("nsn->sn", each) - log_terminal
    found = [
        monte_carlo(
            f"mean KL(q(x_T | x_0) ‖ {terminal})",
            "closed form",
            kl.mean(),
            "draws",
            log_ratio.mean(),
            log_ratio.mean(1).std() / np.sqrt(len(log_ratio)),
            e.failure_rate,
            e.rounding(kl),
        )
    ]
    if e.holds["N3"]:
        per_datum = e.terminal.kl_from_alpha_bar(float(np.prod(1 - e.beta)))
        scale = 1e3 * e.eps * (D + np.abs(kl).max())
        found += [machine("KL of each datum", "from the kernels", kl, "from ᾱ_T", per_datum, scale)]
    # q(x_T) over the data is a mixture with one part for each datum
    drawn = logsumexp(each, axis=0) - np.log(N) - log_terminal
    marginal, error = drawn.mean(), drawn.mean(1).std() / np.sqrt(len(drawn))
    found += [
        monte_carlo(
            f"KL(q(x_T | x_0) ‖ {terminal}) ≥ KL(q(x_T) ‖ {terminal})",
            "mean over data",
            kl.mean(),
            "marginal",
            marginal,
            error,
            e.failure_rate,
            e.rounding(kl),
            at_least=True,
        )
    ]
    detail = (
        f"KL(q(x_T | x_0) ‖ {terminal}) is {kl.mean():.3g} nats on average over {len(kl)} data, "
        f"{kl.max():.3g} at most; "
        f"KL(q(x_T) ‖ {terminal}) is {marginal:.2g} ± {error:.1g}"
    )
    return found, detail, kl.mean() if kl.mean() > e.rounding(kl) else None


@row(
    "N2",
    "q is first-order Markov: q(x_t | x_{t-1}, …, x_0) = q(x_t | x_{t-1})",
    r"q(x^{(t)} \mid x^{(t-1)}, \dots, x^{(0)}) = q(x^{(t)} \mid x^{(t-1)})",
    needs=("q", "p"),
)
def n2(e: Evidence) -> Finding:
    """Mixed second derivatives or differences of log q(x_1…x_T | x_0), and NumPyro's dependency inspection."""
    return markov(e, e.pair.q), "", None


@row(
    "N3",
    "q(x_t | x_{t-1}) = N(√(1−β_t)·x_{t-1}, β_t·I)",
    r"q(x^{(t)} \mid x^{(t-1)}) = \mathcal N(\sqrt{1-\beta_t}\, x^{(t-1)}, \beta_t I)",
    needs=("q", "p", "N2"),
    of_bits=(
        "q(x_t | x_{t-1}) = Bernoulli(x_{t-1}·(1−β_t) + π·β_t) of each bit",
        r"q(x^{(t)} \mid x^{(t-1)}) = \mathcal B(x^{(t-1)} (1-\beta_t) + \pi \beta_t)",
    ),
    reads=True,
)
def n3(e: Evidence) -> Finding:
    """Each forward kernel as its site states it, from its log density, and from draws."""
    if e.q is None:
        raise Wrong(e.reader.not_of_n3)
    T, (beta, route) = e.pair.num_timesteps, e.beta_and_route
    if beta.shape != (T,) or not np.all((beta > 0) & (beta <= 1)):
        raise Wrong(f"β ({route}) is {beta}; it must be {T} numbers in (0, 1]")
    return e.reader.forward_kernels(e), f"β_t from {route}", None


@row(
    "N4",
    "β_t is a learnable parameter",
    r"\partial K / \partial \beta_t",
    needs=("q", "p", "N5", "N13"),
    reads=True,
)
def n4(e: Evidence) -> Finding:
    """dK/du of every param of the guide, by differentiation and by finite differences."""
    return gradient(e, e.pair.forward_params, "β_t is fixed: the guide has no NumPyro param")


@row(
    "N5",
    "q(x_0…x_T) = q(x_0) ∏_t q(x_t | x_{t-1})",
    r"q(x^{(0 \dots T)}) = q(x^{(0)}) \prod_{t=1}^{T} q(x^{(t)} \mid x^{(t-1)}) \quad (1)",
    needs=("q", "p"),
    erratum="the first line of (1) conditions x_T on x_0…x_T; it is x_0…x_{T-1}",
)
def n5(e: Evidence) -> Finding:
    """log q of a path as NumPyro counts it, as the sum of its factors, and built from ᾱ alone."""
    found = product_of_factors(e, e.pair.q, e.draws[1])
    if e.holds["N3"]:
        of_ᾱ, route = e.reader.log_q_from_alpha_bar(e)
        scale = e.reader.rounding_of_paths(e, e.pair.q)
        found += [machine("one path of each datum", "NumPyro", e.totals["q"], route, of_ᾱ, scale)]
    return found, "", None
