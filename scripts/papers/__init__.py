"""The papers' experiments on tabular policies, one file per paper.

A check is a function that compares what a paper states with what our losses give, and yields findings. This module
compares, prints the findings section by section, and saves the figures.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scripts.lab.plots import require_matplotlib
from shared.files import replacing, storage_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(kw_only=True)
class Args:
    """The papers' experiments on tabular policies."""

    output_dir: Path = Path("runs/bandits")
    """directory of the figures"""


class Finding(NamedTuple):
    """A statement, what is expected and what we measured, as printed on one line."""

    statement: str
    expected: str
    measured: str
    holds: bool | None  # None: the number is reported, not judged

    @property
    def verdict(self) -> str:
        """The last word of the printed line."""
        if self.holds is None:
            return "reported"
        if self.holds:
            return "ok"
        return "NOT"


Check = Callable[[], Iterable[Finding]]
Figures = Mapping[str, Callable[[], "Figure"]]  # by file name


class Section(NamedTuple):
    """Checks that are printed together under a title."""

    title: str
    checks: tuple[Check, ...]
    remarks: str = ""


# ---------------------------------------------------------------- expected against measured


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


def same_value(statement: str, expected: float, measured: float, tolerance: float = 1e-8) -> Finding:
    """Compare a number with its closed form. The tolerance is relative above 1, absolute below."""
    difference = abs(measured - expected)
    holds = difference <= tolerance * max(1, abs(expected))
    return Finding(statement, f"{expected:.6f}", f"{measured:.6f}", holds)


def judged(statement: str, expected: str, measured: float, holds: bool) -> Finding:
    """A number that meets, or does not, a condition put in words."""
    return Finding(statement, expected, number_text(measured), holds)


def reported(statement: str, measured: float) -> Finding:
    """A number for which nothing is expected."""
    return Finding(statement, "", number_text(measured), None)


def number_text(number: float) -> str:
    """Four decimals, or scientific notation for a small number other than 0."""
    if 0 < abs(number) < 1e-3:
        return f"{number:.2e}"
    return f"{number:.4f}"


# ---------------------------------------------------------------- the command


def run_experiments(args: Args, sections: Iterable[Section], figures: Figures) -> None:
    """Print all sections and save all figures. Exits with code 1 if a finding disagrees."""
    require_matplotlib()
    num_wrong = 0
    for section in sections:
        num_wrong += print_section(section)

    summary = f"{num_wrong} disagree"
    if figures:
        paths = save_figures(args.output_dir, figures)
        summary += f"; figures: {', '.join(map(str, paths))}"

    print(f"\n{summary}")
    if num_wrong:
        raise SystemExit(1)


def print_section(section: Section) -> int:
    """Print the findings of a section as they come, and return how many disagree."""
    print(f"\n{section.title}")
    if section.remarks:
        print(f"\n{section.remarks}")
    print(f"\n{'':78}{'expected':>26}{'got':>26}")

    num_wrong = 0
    for check in section.checks:
        for finding in check():
            if finding.holds is False:
                num_wrong += 1
            columns = f"{finding.statement:76}{finding.expected:>26}{finding.measured:>26}"
            print(f"  {columns}  {finding.verdict}", flush=True)
    return num_wrong


def save_figures(directory: Path, figures: Figures) -> list[Path]:
    """Make the figures, and return where they are."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in figures.items():
        figure = plot()
        path = directory / name
        with storage_errors(path), replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        paths.append(path)
    return paths
