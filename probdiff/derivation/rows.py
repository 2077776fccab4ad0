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

    statement: Statement
    of_bits: Statement
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
    reads: bool = False,
) -> Callable[[Callable[[Evidence], Finding]], Callable[[Evidence], Finding]]:
    """Declares the function that it decorates as the check of a statement.

    `of_bits` is the text and the LaTeX where the statement reads otherwise for chains of bits.
    """

    def declare(compute: Callable[[Evidence], Finding]) -> Callable[[Evidence], Finding]:
        statement = Statement(tag, text, latex, erratum)
        other = statement if of_bits is None else replace(statement, text=of_bits[0], latex=of_bits[1])
        CHECKS[tag] = Check(statement, other, needs, reads, compute)
        return compute

    return declare
