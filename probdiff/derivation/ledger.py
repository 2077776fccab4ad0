"""The ledger: one row for each statement, with what was compared and the verdict."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Statement:
    """One of N1…N17: its tag, the words, the same in LaTeX, and what had to be corrected in the notes, if anything."""

    tag: str
    text: str
    latex: str
    erratum: str | None = None


Verdict = Literal["holds", "fails", "approximate", "not applicable", "depends"]


@dataclass(frozen=True)
class Comparison:
    """Two routes to one number: it holds where |left − right| ≤ tolerance, and fails where either is NaN.

    `at_least`: what is claimed is left ≥ right instead, to the tolerance. `source` says where the tolerance is from.
    """

    name: str
    left_route: str
    left: float
    right_route: str
    right: float
    tolerance: float
    source: str
    at_least: bool = False

    @property
    def difference(self) -> float:
        return self.left - self.right

    @property
    def excess(self) -> float:
        """How far the difference goes towards its tolerance, or beyond it: more than one fails."""
        return float(_excess(np.asarray(self.difference), np.asarray(self.tolerance), self.at_least))

    @property
    def holds(self) -> bool:
        return self.excess <= 1

    def __str__(self) -> str:
        relation = "≥" if self.at_least else "="
        return (
            f"{self.name}: {self.left_route} {self.left:.6g} {relation} {self.right_route} {self.right:.6g}; "
            f"difference {self.difference:.1e}, tolerance {self.tolerance:.1e} ({self.source})"
        )


def compare(
    name: str,
    left_route: str,
    left: ArrayLike,
    right_route: str,
    right: ArrayLike,
    tolerance: ArrayLike,
    source: str,
    at_least: bool = False,
) -> Comparison:
    """The comparison of the entry of the arrays that is furthest towards its tolerance or beyond it."""
    arrays = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (left, right, tolerance)))
    with np.errstate(invalid="ignore"):
        worst = _excess(arrays[0] - arrays[1], arrays[2], at_least).argmax()
    a, b, allowed = (float(array.flat[worst]) for array in arrays)
    return Comparison(name, left_route, a, right_route, b, allowed, source, at_least)


def _excess(difference: np.ndarray, tolerance: np.ndarray, at_least: bool) -> np.ndarray:
    wrong = -difference if at_least else np.abs(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(wrong <= 0, 0.0, wrong / tolerance)
    return np.where((tolerance >= 0) & np.isfinite(wrong), ratio, np.inf)


def machine(
    name: str,
    left_route: str,
    left: ArrayLike,
    right_route: str,
    right: ArrayLike,
    tolerance: ArrayLike,
    at_least: bool = False,
) -> Comparison:
    """A comparison whose tolerance is what rounding does to either side."""
    return compare(name, left_route, left, right_route, right, tolerance, "machine precision", at_least)


def monte_carlo(
    name: str,
    left_route: str,
    left: ArrayLike,
    right_route: str,
    right: ArrayLike,
    standard_error: ArrayLike,
    failure_rate: float,
    allowance: ArrayLike = 0.0,
    at_least: bool = False,
) -> Comparison:
    """A comparison that fails by chance at `failure_rate`, which the entries of the arrays share.

    `allowance` is added to the tolerance for a bias that is known, or for rounding.
    """
    z = stats.norm.isf(failure_rate / (2 * np.size(np.broadcast_arrays(left, right)[0])))
    tolerance = z * np.asarray(standard_error) + allowance
    source = f"Monte Carlo, {z:.1f} standard errors"
    return compare(name, left_route, left, right_route, right, tolerance, source, at_least)


def bernstein(
    name: str,
    left_route: str,
    left: ArrayLike,
    right_route: str,
    right: ArrayLike,
    count: ArrayLike,
    variance: ArrayLike,
    failure_rate: float,
    bound: float = 1.0,
) -> Comparison:
    """Means of `count` independent numbers against their expectations, which fails by chance at most at `failure_rate`.

    `variance`: the mean variance of the numbers, or more; none is further than `bound` from its expectation. By
    Bernstein's inequality P(|mean − expectation| ≥ u) ≤ 2·exp(−count·u²/(2·(variance + bound·u/3))), rare events or
    not. A mean of no numbers is not judged.
    """
    shares = 2 * np.size(np.broadcast_arrays(left, right)[0])
    count = np.asarray(count, np.float64)
    per_number = np.log(shares / failure_rate) / np.maximum(count, 1)
    third = bound * per_number / 3
    tolerance = third + np.sqrt(third**2 + 2 * np.asarray(variance) * per_number)
    source = "Monte Carlo, Bernstein's inequality"
    return compare(name, left_route, np.where(count > 0, left, right), right_route, right, tolerance, source)


@dataclass(frozen=True)
class Row:
    """A statement, the comparisons that were made for it, and the verdict.

    `size` is of an approximation, in nats. `detail` says how large it is, why a row does not apply, on which row it
    depends, or what is wrong.
    """

    statement: Statement
    verdict: Verdict
    comparisons: tuple[Comparison, ...] = ()
    detail: str = ""
    size: float | None = None

    @property
    def worst(self) -> Comparison | None:
        """The comparison that is furthest towards its tolerance or beyond it."""
        return max(self.comparisons, key=lambda one: one.excess, default=None)

    def __str__(self) -> str:
        lines = [f"{self.statement.tag:<4} {self.verdict:<15} {self.statement.text}"]
        shown = [c for c in self.comparisons if not c.holds] or ([self.worst] if self.worst else [])
        lines += [f"     {comparison}" for comparison in shown]
        lines += [f"     {self.detail}"] if self.detail else []
        lines += [f"     erratum: {self.statement.erratum}"] if self.statement.erratum else []
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Ledger:
    """One row for each of N1…N17, in order; `ledger["N3"]` is a row, and `print` and notebooks show all of them.

    `failure_rate`: the chance that a right pair fails a row by Monte Carlo error.
    """

    rows: tuple[Row, ...]
    title: str
    failure_rate: float

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, tag: str) -> Row:
        for row in self.rows:
            if row.statement.tag == tag:
                return row
        raise KeyError(f"{tag!r} is no statement; they are N1 to N17")

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "fails")

    def assert_holds(self) -> None:
        """Raises `AssertionError` with the rows that fail."""
        if self.failures:
            raise AssertionError("\n".join(["the derivation fails:", *map(str, self.failures)]))

    def to_frame(self) -> pd.DataFrame:
        """A row for each statement, with the comparison of each that is furthest towards its tolerance."""
        frame = pd.DataFrame([_record(row, row.worst) for row in self.rows])
        return frame.set_index("tag")

    def comparisons(self) -> pd.DataFrame:
        """A row for each comparison that was made."""
        records = [_record(row, one) for row in self.rows for one in row.comparisons]
        return pd.DataFrame(records, columns=list(_record(self.rows[0], None))).set_index("tag")

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.rows), self._summary])

    __repr__ = __str__

    @property
    def _summary(self) -> str:
        verdicts = [row.verdict for row in self.rows]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts, key=_ORDER.index)))
        return (
            f"{counts}. A right pair fails a row by Monte Carlo error with probability at most {self.failure_rate:g}."
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in _COLUMNS)
        body = "".join(_html_row(row) for row in self.rows)
        return (
            f"<p>{html.escape(self.title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self._summary)}</p>"
        )


_ORDER: list[Verdict] = ["holds", "approximate", "fails", "depends", "not applicable"]
_COLUMNS = ("", "statement", "verdict", "left", "right", "difference", "tolerance", "notes")
_COLOURS = {"holds": "#1a7f37", "approximate": "#9a6700", "fails": "#cf222e"}


def _record(row: Row, one: Comparison | None) -> dict[str, object]:
    return {
        "tag": row.statement.tag,
        "statement": row.statement.text,
        "verdict": row.verdict,
        "what": one.name if one else "",
        "left route": one.left_route if one else "",
        "left": one.left if one else np.nan,
        "right route": one.right_route if one else "",
        "right": one.right if one else np.nan,
        "difference": one.difference if one else np.nan,
        "tolerance": one.tolerance if one else np.nan,
        "tolerance from": one.source if one else "",
        "size": np.nan if row.size is None else row.size,
        "detail": row.detail,
        "erratum": row.statement.erratum or "",
        "latex": row.statement.latex,
    }


def _html_row(row: Row) -> str:
    one = row.worst
    numbers = ["", "", "", ""]
    if one:
        numbers = [
            f"{one.left:.6g}<br><small>{html.escape(one.left_route)}</small>",
            f"{one.right:.6g}<br><small>{html.escape(one.right_route)}</small>",
            f"{one.difference:.1e}",
            f"{one.tolerance:.1e}<br><small>{html.escape(one.source)}</small>",
        ]
    notes = [one.name] if one else []
    notes += [row.detail] if row.detail else []
    notes += [f"erratum: {row.statement.erratum}"] if row.statement.erratum else []
    colour = _COLOURS.get(row.verdict, "inherit")
    cells = [
        f"<b>{row.statement.tag}</b>",
        f"${html.escape(row.statement.latex)}$",
        f"<b style='color:{colour}'>{row.verdict}</b>",
        *numbers,
        "<br>".join(html.escape(note) for note in notes),
    ]
    return "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"
