"""The derivation of the diffusion ELBO, N1…N17, checked by machine on any pair of chains."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike
from numpyro.infer import TraceMeanField_ELBO

from probdiff.chains import Diffusion
from probdiff.checks import check_bits, check_data, check_key
from probdiff.derivation import bound_rows, chain_rows
from probdiff.derivation.bits import PairOfBits
from probdiff.derivation.evidence import Evidence, Family, Finding, NotApplicable, Wrong
from probdiff.derivation.gaussian import GaussianPair
from probdiff.derivation.gradient import jittered
from probdiff.derivation.ledger import Comparison, Ledger, Row, Verdict
from probdiff.derivation.pair import Pair, Program, supports
from probdiff.derivation.statements import Statement
from probdiff.reference import feller, oracle, oracle_of_bits
from probdiff.types import Key, Params

__all__ = [
    "Comparison",
    "Ledger",
    "Row",
    "Statement",
    "check",
    "feller",
    "forms",
    "oracle",
    "oracle_of_bits",
    "typical_params",
]

# what computes each row, and the rows that it cannot do without, in an order in which all can be computed;
# "q" and "p" stand for a chain that has the right sites
_ROWS: dict[str, tuple[Callable[[Evidence], Finding], tuple[str, ...]]] = {
    "N2": (chain_rows.n2, ("q", "p")),
    "N3": (chain_rows.n3, ("q", "p", "N2")),
    "N5": (chain_rows.n5, ("q", "p")),
    "N13": (chain_rows.n13, ("q", "p")),
    "N1": (chain_rows.n1, ("q", "p", "N2")),
    "N6": (chain_rows.n6, ("q", "p", "N3")),
    "N8": (chain_rows.n8, ("q", "p")),
    "N7": (chain_rows.n7, ("q", "p")),
    "N4": (chain_rows.n4, ("q", "p", "N5", "N13")),
    "N10": (chain_rows.n10, ("N4",)),
    "N12": (bound_rows.n12, ("q", "p", "N13", "N8")),
    "N9": (bound_rows.n9, ("N12",)),
    "N11": (bound_rows.n11, ("N12",)),
    "N14": (bound_rows.n14, ("N5", "N12")),
    "N15": (bound_rows.n15, ("N14",)),
    "N16": (bound_rows.n16, ("q", "p")),
    "N17": (bound_rows.n17, ("N2", "N14")),
}


def check(
    model: Program,
    guide: Program,
    x: ArrayLike,
    *,
    rng_key: Key,
    params: Params | None = None,
    beta: ArrayLike | None = None,
    f_mu: Callable[[Array, int], Array] | None = None,
    f_sigma: Callable[[Array, int], Array] | None = None,
    forms: Mapping[str, tuple[Program, Program, Any]] | None = None,
    num_draws: int = 1000,
    max_data: int = 16,
    failure_rate: float = 1e-4,
) -> Ledger:
    """Checks N1…N17 on a model p(x_0…x_T) and a guide q(x_1…x_T given x_0): one row for each statement.

    Any two NumPyro programs with sites x_0, …, x_T (model) and x_1, …, x_T (guide), called as `model(x)` and
    `guide(x)` with data x (N, *event), which the model observes at x_0; they must take any number of rows. The
    guide's sites ascend or descend in t. Where the x_t have densities the statements are of the Gaussian chain, x being
    floating-point; where they are bits, such as `dist.Bernoulli`, of the binomial one, x being 0 or 1 of any dtype, and
    the programs get it in that dtype. `params`: the values of their NumPyro params; the initial ones where None.
    Of x, at most `max_data` rows are used, drawn at random, each with `num_draws` paths. All numbers are in nats.

    What the programs do not say of themselves can be given, and is then checked: `beta` (T,), else the param "beta",
    else read off the forward kernels; `f_mu(x_t, t)` (N, *event) and `f_sigma(x_t, t)`, the covariance matrix
    (D, D) or (N, D, D), of N8. `forms`: other pairs whose ELBO must be the same K, name → (model, guide, elbo).

    p(x_0) is a closed form where the reverse chain is linear and Gaussian, quadrature where D = 1, a sum over all
    states of up to 10 bits unless T is large, else an estimate from draws, whose failure (k̂) is told apart from that of
    the identity. A right pair fails any row by Monte Carlo error with probability at most `failure_rate`, to the
    accuracy with which means of draws are normal. Tolerances of rounding are those of JAX's current precision;
    gradients are always taken in float64.

    Raises `ValueError` or `TypeError` for arguments that cannot be meant, such as chains of counts or bits that are not
    0 or 1; what is wrong with the programs is in the rows.
    """
    for name, program in (("model", model), ("guide", guide), ("f_mu", f_mu), ("f_sigma", f_sigma)):
        if not callable(program) and not (program is None and name.startswith("f_")):
            raise TypeError(f"{name} is {program!r}; it must be a function")
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"params is {params!r}; it must be a dict of NumPyro params, or None")
    if np.ndim(x) == 0:
        raise ValueError(f"x is {x!r}; it must be data of shape (N, *event)")
    family, data = _family_and_data(model, guide, params, np.asarray(x))
    key_rows, key = jax.random.split(check_key(rng_key))
    for name, value, least in (("num_draws", num_draws, 100), ("max_data", max_data, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
    if not isinstance(failure_rate, float) or not 0 < failure_rate < 1:
        raise ValueError(f"failure_rate is {failure_rate!r}; it must be between 0 and 1")
    for name, form in (forms or {}).items():
        if not isinstance(form, tuple) or len(form) != 3 or not hasattr(form[2], "loss"):
            raise TypeError(f"forms[{name!r}] is {form!r}; it must be (model, guide, elbo)")
    if len(data) > max_data:
        rows = jax.random.permutation(key_rows, len(data))[:max_data]
        data = data[np.sort(np.asarray(rows))]
    pair = Pair(model, guide, jnp.asarray(data), params)
    given_beta = None if beta is None else np.asarray(beta, np.float64)
    if given_beta is not None and given_beta.shape != (pair.num_timesteps,):
        raise ValueError(f"beta has shape {given_beta.shape}; these chains have T = {pair.num_timesteps}")
    claims = {"f_mu": f_mu, "f_sigma": f_sigma}
    rows_by_tag = _rows(Evidence(pair, family, key, num_draws, failure_rate, given_beta, claims, forms or {}))
    title = (
        f"N1…N17 on {len(data)} of {len(np.asarray(x)):,} data of shape {data.shape[1:]}, T = {pair.num_timesteps}, "
        f"{num_draws:,} paths each, {jnp.result_type(float)}, log densities in nats"
    )
    return Ledger(tuple(rows_by_tag[statement.tag] for statement in family.statements), title, failure_rate)


def _family_and_data(model: Program, guide: Program, params: Params | None, x: np.ndarray) -> tuple[Family, np.ndarray]:
    """What the pair draws, and x as it wants it: floating-point numbers, or bits of the dtype that x has."""
    drawn = set().union(*(supports(program, params, x) for program in (guide, model)))
    if others := drawn - {"bits", "numbers"}:
        raise TypeError(f"the pair draws x_t from {', '.join(sorted(others))}; x_t must have a density or be bits")
    if drawn == {"bits", "numbers"}:
        raise TypeError("some x_t of the pair are bits and some have a density; they must be of one kind")
    if drawn == {"bits"}:
        return PairOfBits(), check_bits(x, x.shape[1:], "x").astype(x.dtype)
    return GaussianPair(), check_data(x, x.shape[1:], "x").astype(jnp.result_type(float))


def typical_params(d: Diffusion, rng_key: Key) -> Params:
    """Initial params of a diffusion, the network's moved at random by a tenth of their size, so that none is zero."""
    return jittered(d.initial_params(rng_key), ["network$params"], rng_key)


def forms(d: Diffusion) -> dict[str, tuple[Program, Program, Any]]:
    """The other forms of a diffusion's pair, whose ELBO is the same K, N17: name → (model, guide, elbo)."""
    return {
        "TraceMeanField_ELBO": (d.reverse, d.forward_posterior, TraceMeanField_ELBO()),
        "the at-time pair": (d.reverse_at_time, d.forward_at_time, TraceMeanField_ELBO()),
    }


def _rows(e: Evidence) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    roots: dict[str, set[str]] = {  # which failures a row, or a chain, goes back to
        "q": {"N5"} if e.pair.q.problems else set(),
        "p": {"N13"} if e.pair.p.problems else set(),
    }
    by_tag = {statement.tag: statement for statement in e.family.statements}
    for tag, (compute, needs) in _ROWS.items():
        problems = {"N5": e.pair.q, "N13": e.pair.p}[tag].problems if tag in ("N5", "N13") else []
        broken = set().union(*(roots[need] for need in needs))
        if problems:
            rows[tag] = Row(by_tag[tag], "fails", detail="; ".join(problems))
        elif broken:
            rows[tag] = Row(by_tag[tag], "depends", detail=f"on {', '.join(sorted(broken, key=_number))}")
        else:
            rows[tag] = _row(by_tag[tag], compute, e)
        roots[tag] = {tag} if rows[tag].verdict == "fails" else broken
        e.holds[tag] = rows[tag].verdict in ("holds", "approximate")
    return rows


def _row(statement: Statement, compute: Callable[[Evidence], Finding], e: Evidence) -> Row:
    try:
        comparisons, detail, size = compute(e)
    except NotApplicable as why:
        failed = not all(comparison.holds for comparison in why.comparisons)
        return Row(statement, "fails" if failed else "not applicable", why.comparisons, str(why))
    except Wrong as wrong:
        return Row(statement, "fails", detail=str(wrong))
    except np.linalg.LinAlgError as wrong:
        return Row(statement, "fails", detail=f"a covariance of the pair is not positive definite: {wrong}")
    verdict: Verdict = "holds" if size is None else "approximate"
    if not all(comparison.holds for comparison in comparisons):
        verdict = "fails"
    return Row(statement, verdict, tuple(comparisons), detail, size)


def _number(tag: str) -> int:
    return int(tag[1:])
