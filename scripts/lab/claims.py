"""Statements of a paper as functions, what they find, and the verdict that follows from it.

A claim is a generator of findings. The first paragraph of its docstring is the statement in the paper's sense; a second
one may say how it is checked. A finding compares an expected with a measured value, in one of three roles:

- as it comes, it is what the paper says;
- `instead(...)` is what is right where the paper is not;
- `given(...)` is a number known beforehand from elsewhere, which shows that the computation is right.

The verdict follows from the findings (`verdict_of`), and the decorator states which one is expected:

    PAPER = Paper("dpo", "Direct Preference Optimization", "2305.18290")
    OBJECTIVE = PAPER.section("The objective and its optimum")

    @OBJECTIVE.claim("T8", "Eq 4")
    def the_optimum_is_the_tilted_reference() -> Iterator[Finding]:
        \"\"\"The policy π_ref exp(r/β)/Z maximises Eq 3, with the value β log Z.\"\"\"
        yield same_value("value at the optimum", log_partition, value)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Verdict(str, Enum):
    """What the findings of a claim amount to."""

    HOLDS = "holds"
    CORRECTED = "holds with a correction"
    FALSE = "false (counterexample)"
    UNDECIDED = "not decided"


class Finding(NamedTuple):
    """What is compared, what is expected of it, and what was measured."""

    statement: str
    expected: str
    measured: str
    holds: bool | None  # None: the number is reported, not judged
    role: str = "paper"  # or "instead", "given"
    interval: tuple[float, float] | None = None  # 95%, where the number has one


Check = Callable[[], Iterable[Finding]]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A numbered statement of a paper, and the function that checks it."""

    number: str
    where: str  # in the paper
    check: Callable[..., Iterable[Finding]]

    @property
    def statement(self) -> str:
        """The first paragraph of the function's docstring, on one line."""
        return " ".join(self._paragraphs[0].split())

    @property
    def remark(self) -> str:
        """The rest of the docstring, on one line."""
        rest = " ".join(self._paragraphs[1:])
        return " ".join(rest.split())

    @property
    def _paragraphs(self) -> list[str]:
        text = self.check.__doc__
        assert text is not None, f"{self.number}: the docstring is the statement"
        return text.strip().split("\n\n")


@dataclass(frozen=True, kw_only=True)
class Claim(Statement):
    """A statement that is checked exactly, and the verdict that is expected."""

    section: str
    check: Check
    expected: Verdict


class Elsewhere(NamedTuple):
    """A numbered statement that no function here can check."""

    number: str
    section: str
    where: str
    statement: str
    reason: str


class Outcome(NamedTuple):
    """What a claim's function has found."""

    claim: Claim
    findings: list[Finding]
    verdict: Verdict

    @property
    def is_expected(self) -> bool:
        return self.verdict == self.claim.expected


@dataclass
class Paper:
    """The claims and the figures of one paper, in order."""

    name: str  # of its file and of what it writes
    title: str
    arxiv: str
    claims: list[Claim] = field(default_factory=list)
    elsewhere: list[Elsewhere] = field(default_factory=list)
    figures: list[tuple[str, Callable[[], "Figure"]]] = field(default_factory=list)  # caption and function

    def section(self, title: str) -> "Section":
        return Section(self, title)

    def figure(self, caption: str) -> Callable[[Callable[[], "Figure"]], Callable[[], "Figure"]]:
        """Register a function that draws a figure. The caption says what it shows."""

        def register(draw: Callable[[], "Figure"]) -> Callable[[], "Figure"]:
            self.figures.append((caption, draw))
            return draw

        return register


class Section(NamedTuple):
    """Claims that stand together in the tables."""

    paper: Paper
    title: str

    def claim(self, number: str, where: str, expected: Verdict = Verdict.HOLDS) -> Callable[[Check], Check]:
        """Register a function as the check of a statement. `where` is its place in the paper."""

        def register(check: Check) -> Check:
            claim = Claim(number=number, section=self.title, where=where, check=check, expected=expected)
            self.paper.claims.append(claim)
            return check

        return register

    def elsewhere(self, number: str, where: str, statement: str, reason: str) -> None:
        """Register a statement that has no function here, and say why not."""
        self.paper.elsewhere.append(Elsewhere(number, self.title, where, statement, reason))


# ---------------------------------------------------------------- verdicts


def run_claim(claim: Claim) -> Outcome:
    """Run a claim's function, and judge what it has found."""
    findings = list(claim.check())
    return Outcome(claim, findings, verdict_of(findings))


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """The verdict that follows from a claim's findings.

    Where all that the paper says holds, the claim holds. Where something does not, the claim holds with a correction if
    there is one, and else is false. A verdict against the paper needs a correction or a number known beforehand. If
    one of these fails, or nothing was judged, nothing is decided.
    """
    judgments: dict[str, list[bool]] = {"paper": [], "instead": [], "given": []}
    for finding in findings:
        if finding.holds is not None:
            judgments[finding.role].append(finding.holds)

    paper, corrections, known = judgments["paper"], judgments["instead"], judgments["given"]
    if not paper or not all(corrections + known):
        return Verdict.UNDECIDED
    if all(paper):
        return Verdict.HOLDS
    if corrections:
        return Verdict.CORRECTED
    if known:
        return Verdict.FALSE
    return Verdict.UNDECIDED


def instead(finding: Finding) -> Finding:
    """Mark a finding as the correction of what the paper says."""
    return finding._replace(role="instead")


def given(finding: Finding) -> Finding:
    """Mark a finding as the comparison with a number known beforehand."""
    return finding._replace(role="given")


# ---------------------------------------------------------------- expected against measured


def same_value(statement: str, expected: float, measured: float, tolerance: float = 1e-8) -> Finding:
    """Compare a number with another one. The tolerance is relative above 1, absolute below."""
    difference = abs(measured - expected)
    holds = difference <= tolerance * max(1, abs(expected))
    return Finding(statement, number_text(expected), number_text(measured), holds)


def same_digits(statement: str, expected: str, *measured: float) -> Finding:
    """Compare numbers with a list such as ".6, .3, .1": to as many digits as it gives, to three at least."""
    printed = [number.strip() for number in expected.split(",")]
    places = 3
    for number in printed:
        _, _, decimals = number.partition(".")
        places = max(places, len(decimals))

    tolerance = 0.5 * 10**-places + 1e-12
    holds = all(abs(x - float(y)) <= tolerance for x, y in zip(measured, printed, strict=True))
    rounded = [f"{x:.{places}f}" for x in measured]
    return Finding(statement, expected, ", ".join(rounded), holds)


def vanishes(statement: str, differences: float | Tensor, tolerance: float = 1e-10) -> Finding:
    """State that a number, or each entry of a tensor, is 0 up to rounding. The largest size is reported."""
    largest = float(abs(differences)) if isinstance(differences, float) else float(differences.abs().max())
    holds = largest <= tolerance
    measured = number_text(largest)
    if holds:
        measured = f"< {tolerance:.0e}"  # rounding differs between machines
    return Finding(statement, "0", measured, holds)


def judged(statement: str, expected: str, measured: float, holds: bool) -> Finding:
    """A number that meets, or does not, a condition put in words."""
    return Finding(statement, expected, number_text(measured), bool(holds))


def above(statement: str, bound: float, values: float | Tensor) -> Finding:
    """State that a number, or each entry of a tensor, is larger than a bound. The least is reported."""
    least = float(torch.as_tensor(values, dtype=torch.float64).min())
    return judged(statement, f"> {bound:g}", least, least > bound)


def below(statement: str, bound: float, values: float | Tensor) -> Finding:
    """State that a number, or each entry of a tensor, is smaller than a bound. The largest is reported."""
    largest = float(torch.as_tensor(values, dtype=torch.float64).max())
    return judged(statement, f"< {bound:g}", largest, largest < bound)


def reported(statement: str, measured: float) -> Finding:
    """A number for which nothing is expected."""
    return Finding(statement, "", number_text(measured), None)


def number_text(number: float) -> str:
    """Four decimals, or scientific notation for what is smaller than a thousandth or larger than a hundred thousand."""
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        return f"{number:.4f}"
    return f"{number:.2e}"


def rows_of_findings(findings: Iterable[Finding]) -> Iterator[list[str]]:
    """Findings as lines of a table: the role, the statement, expected, measured, and a mark."""
    for finding in findings:
        mark = {True: "yes", False: "NO", None: ""}[finding.holds]
        yield [finding.role, finding.statement, finding.expected, finding.measured, mark]
