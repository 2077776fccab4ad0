"""A row of the ledger: a statement N1…N17 in words and in LaTeX, with what is checked of it, declared in one place."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from probdiff.derivation.evidence import Evidence, Finding
from probdiff.derivation.ledger import Statement


@dataclass(frozen=True)
class Check:
    """What computes a row, and the rows that it cannot do without.

    `needs` has tags, and "q" and "p" for a chain that has the right sites. A check that `reads` asks the reader of the
    pair's distributions, and does not apply where there is none.
    """

    statements: dict[str, Statement]  # by the wording that a reader asks for
    needs: tuple[str, ...]
    reads: bool
    compute: Callable[[Evidence], Finding]


CHECKS: dict[str, Check] = {}


def row(
    tag: str,
    text: str,
    latex: str,
    *,
    needs: tuple[str, ...],
    erratum: str | None = None,
    of_bits: tuple[str, str] | None = None,
    of_mixtures: tuple[str, str] | None = None,
    reads: bool = False,
) -> Callable[[Callable[[Evidence], Finding]], Callable[[Evidence], Finding]]:
    """Declares the function that it decorates as the check of a statement.

    `of_bits` and `of_mixtures` are the text and the LaTeX where the statement reads otherwise for chains of bits, and
    for kernels that are mixtures of Gaussians.
    """

    def declare(compute: Callable[[Evidence], Finding]) -> Callable[[Evidence], Finding]:
        statement = Statement(tag, text, latex, erratum)
        statements = {"numbers": statement}
        for wording, other in (("bits", of_bits), ("mixtures", of_mixtures)):
            words, equation = other or (text, latex)
            statements[wording] = replace(statement, text=words, latex=equation)
        CHECKS[tag] = Check(statements, needs, reads, compute)
        return compute

    return declare
