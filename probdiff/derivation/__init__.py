"""The derivation of the diffusion ELBO, N1…N17, checked by machine on any pair of chains."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike
from numpyro import validation_enabled
from numpyro.infer import TraceMeanField_ELBO

from probdiff.chains import Diffusion
from probdiff.checks import check_bits, check_count, check_data, check_key
from probdiff.derivation import bound, forward, marginal, reversal  # noqa: F401  # each declares its rows
from probdiff.derivation.bits import PairOfBits
from probdiff.derivation.evidence import Evidence, NotApplicable, Reader, Wrong
from probdiff.derivation.gaussian import GaussianPair
from probdiff.derivation.gradient import jittered
from probdiff.derivation.ledger import Comparison, Ledger, Row, Statement, Verdict
from probdiff.derivation.mixtures import PairOfMixtures, most_components
from probdiff.derivation.pair import Pair, Program, supports
from probdiff.derivation.rows import CHECKS, Check
from probdiff.locks import one_at_a_time
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

# an order in which each row comes after those that it needs
_ORDER = ("N2", "N3", "N5", "N13", "N1", "N6", "N8", "N7", "N4", "N10", "N12", "N9", "N11", "N14", "N15", "N16", "N17")


@one_at_a_time
@validation_enabled(is_validate=False)  # it compiles a program for each constant that is checked
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
    reader, drawn, data = _reader_and_data(model, guide, params, np.asarray(x))
    keys = jax.random.split(check_key(rng_key))
    check_count(num_draws, "num_draws", 100)
    check_count(max_data, "max_data", 1)
    if not isinstance(failure_rate, float) or not 0 < failure_rate < 1:
        raise ValueError(f"failure_rate is {failure_rate!r}; it must be between 0 and 1")
    for name, form in (forms or {}).items():
        if not isinstance(form, tuple) or len(form) != 3 or not hasattr(form[2], "loss"):
            raise TypeError(f"forms[{name!r}] is {form!r}; it must be (model, guide, elbo)")
    if len(data) > max_data:
        rows = jax.random.permutation(keys[0], len(data))[:max_data]
        data = data[np.sort(np.asarray(rows))]
    pair = Pair(model, guide, jnp.asarray(data), params)
    if isinstance(reader, GaussianPair) and (components := most_components(pair.p, pair.x)) > 1:
        reader = PairOfMixtures(components)
    given_beta = None if beta is None else np.asarray(beta, np.float64)
    if given_beta is not None and given_beta.shape != (pair.num_timesteps,):
        raise ValueError(f"beta has shape {given_beta.shape}; these chains have T = {pair.num_timesteps}")
    claims = {"f_mu": f_mu, "f_sigma": f_sigma}
    evidence = Evidence(pair, reader, drawn, keys[1], num_draws, failure_rate, given_beta, claims, forms or {})
    rows_by_tag = _rows(evidence)
    title = (
        f"N1…N17 on {len(data)} of {len(np.asarray(x)):,} data of shape {data.shape[1:]}, T = {pair.num_timesteps}, "
        f"{num_draws:,} paths each, {jnp.result_type(float)}, log densities in nats"
    )
    return Ledger(tuple(rows_by_tag[tag] for tag in sorted(_ORDER, key=_number)), title, failure_rate)


def _reader_and_data(
    model: Program, guide: Program, params: Params | None, x: np.ndarray
) -> tuple[Reader | None, str, np.ndarray]:
    """What knows the distributions of the pair, if anything, their name, and x in the dtype that they want."""
    drawn = set().union(*(supports(program, params, x) for program in (guide, model)))
    if len(drawn) > 1:
        raise TypeError(f"some x_t of the pair are {' and some '.join(sorted(drawn))}; they must be of one kind")
    if drawn == {"bits"}:
        return PairOfBits(), "bits", check_bits(x, x.shape[1:], "x").astype(x.dtype)
    if drawn <= {"numbers"}:
        return GaussianPair(), "numbers", check_data(x, x.shape[1:], "x").astype(jnp.result_type(float))
    check_data(x.astype(np.float64), x.shape[1:], "x")
    return None, drawn.pop(), x


@one_at_a_time
def typical_params(d: Diffusion, rng_key: Key) -> Params:
    """Initial params of a diffusion, the network's moved at random by a tenth of their size, so that none is zero."""
    return jittered(jax.jit(d.initial_params)(rng_key), ["network$params"], rng_key)


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
    for tag in _ORDER:
        declared = CHECKS[tag]
        statement = declared.statements[e.reader.wording if e.has_reader else "numbers"]
        problems = {"N5": e.pair.q, "N13": e.pair.p}[tag].problems if tag in ("N5", "N13") else []
        broken = set().union(*(roots[need] for need in declared.needs))
        if problems:
            rows[tag] = Row(statement, "fails", detail="; ".join(problems))
        elif broken:
            rows[tag] = Row(statement, "depends", detail=f"on {', '.join(sorted(broken, key=_number))}")
        else:
            rows[tag] = _row(statement, declared, e)
        roots[tag] = {tag} if rows[tag].verdict == "fails" else broken
        e.holds[tag] = rows[tag].verdict in ("holds", "approximate")
    return rows


def _row(statement: Statement, declared: Check, e: Evidence) -> Row:
    try:
        if declared.reads:
            _ = e.reader  # raises where there is none
        comparisons, detail, size = declared.compute(e)
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
