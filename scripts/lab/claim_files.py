"""What a paper's command prints and writes: a table of its claims, its figures, and a JSON file of both."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scripts.lab.claims import Claim, Finding, Outcome, Paper, Statement, rows_of_findings, run_claim
from scripts.lab.plots import require_matplotlib
from scripts.lab.tables import aligned
from shared import UserError
from shared.files import replacing, storage_errors, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORLD = "_world"  # ends the names of what the experiments write


@dataclass(kw_only=True)
class Args:
    """Check the statements of a paper."""

    claim: str | None = None
    """number of a single claim, such as T8: print all its findings and write nothing"""

    output_dir: Path = Path("results")
    """directory of the JSON file and the figures"""


def paper_command(paper: Paper, args: Args) -> None:
    """Check one claim of a paper, or all of them. Exits with code 1 if a verdict is not the expected one."""
    torch.set_num_threads(1)  # with so few numbers, threads would only wait for each other
    if args.claim is None:
        surprises = run_paper(paper, args.output_dir)
    else:
        outcome = run_claim(claim_of(paper, args.claim))
        print_findings(outcome.claim, outcome.findings, outcome.verdict)
        surprises = surprises_of([outcome])
    exit_if_any(surprises)


def run_paper(paper: Paper, output_dir: Path) -> list[str]:
    """Print the claims with their verdicts, and write `{paper.name}.json` and the figures.

    Returns the claims whose verdict is not the expected one. If there are any, nothing is written.
    """
    require_matplotlib()
    outcomes = print_claims(paper)
    surprises = surprises_of(outcomes)
    if not surprises:
        output_dir.mkdir(parents=True, exist_ok=True)
        figures = save_figures(paper, output_dir)
        path = output_dir / f"{paper.name}.json"
        write_json(path, as_json(paper, outcomes, figures))
        print(f"written: {path}")
    return surprises


def claim_of(paper: Paper, number: str) -> Claim:
    """The claim of that number. Raises UserError if there is none, or if it is checked elsewhere."""
    for claim in paper.claims:
        if claim.number == number:
            return claim
    for statement in paper.elsewhere:
        if statement.number == number:
            raise UserError(f"--claim {number}: not checked here: {statement.reason}")
    numbers = ", ".join(claim.number for claim in paper.claims)
    raise UserError(f"--claim {number}: {paper.title} has the claims {numbers}")


def surprises_of(outcomes: list[Outcome]) -> list[str]:
    """The claims whose verdict is not the expected one, with both."""
    surprises = []
    for outcome in outcomes:
        if not outcome.is_expected:
            claim = outcome.claim
            surprises.append(f"{claim.number}: {outcome.verdict.value}, expected: {claim.expected.value}")
    return surprises


def exit_if_any(surprises: list[str]) -> None:
    """Print the claims that are not as expected, and exit with code 1 if there are any."""
    if surprises:
        shown = "\n".join(surprises)
        print(f"\nnot as expected:\n{shown}")
        raise SystemExit(1)


# ---------------------------------------------------------------- the terminal


def print_claims(paper: Paper) -> list[Outcome]:
    """Run the claims and print each as it comes, under its section."""
    print(f"{paper.title} (arXiv {paper.arxiv})")
    section = ""
    outcomes = []
    for claim in paper.claims:
        if claim.section != section:
            section = claim.section
            print(f"\n{section}\n")

        outcome = run_claim(claim)
        outcomes.append(outcome)
        mark = ""
        if not outcome.is_expected:
            mark = "   NOT AS EXPECTED"
        print(f"  {claim.number:5} {claim.where:24} {outcome.verdict.value:24} {claim.statement}{mark}", flush=True)

    print(f"\n{counts_text(paper, outcomes)}")
    return outcomes


def print_findings(statement: Statement, findings: Iterable[Finding], verdict: Enum) -> None:
    """Print one statement with all its findings."""
    print(f"{statement.number}, {statement.where}: {statement.statement}")
    if statement.remark:
        print(statement.remark)

    heading = ["role", "", "expected", "measured", "agrees"]
    lines = [heading, *rows_of_findings(findings)]
    print(f"\n{aligned(lines)}\n\n{verdict.value}")


def counts_text(paper: Paper, outcomes: list[Outcome]) -> str:
    """How many claims have which verdict."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.verdict.value] = counts.get(outcome.verdict.value, 0) + 1
    parts = [f"{count} {verdict}" for verdict, count in counts.items()]
    if paper.elsewhere:
        parts.append(f"{len(paper.elsewhere)} not checked here")
    return ", ".join(parts)


# ---------------------------------------------------------------- files


def save_figures(paper: Paper, directory: Path) -> list[dict[str, str]]:
    """Draw the figures, and return the file and the caption of each."""
    return [
        save_figure(draw, caption, f"{paper.name}_{draw.__name__}.png", directory) for caption, draw in paper.figures
    ]


def save_figure(draw: Callable[[], "Figure"], caption: str, name: str, directory: Path) -> dict[str, str]:
    """Draw a figure into a file of that name, and return its name and caption."""
    figure = draw()
    path = directory / name
    with storage_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return {"file": name, "caption": caption}


def as_json(paper: Paper, outcomes: list[Outcome], figures: list[dict[str, str]]) -> dict:
    """All that docs/results.md shows of a paper."""
    claims = [claim_as_json(outcome) for outcome in outcomes]
    elsewhere = [statement._asdict() for statement in paper.elsewhere]
    return {
        "paper": paper.title,
        "arxiv": paper.arxiv,
        "command": f"python scripts/papers/{paper.name}.py",
        "claims": claims,
        "elsewhere": elsewhere,
        "figures": figures,
    }


def claim_as_json(outcome: Outcome) -> dict:
    claim = outcome.claim
    return {
        "number": claim.number,
        "section": claim.section,
        **statement_as_json(claim, outcome.findings, outcome.verdict),
    }


def statement_as_json(statement: Statement, findings: Iterable[Finding], verdict: Enum) -> dict:
    """A statement with its findings and the verdict that follows from them."""
    return {
        "number": statement.number,
        "where": statement.where,
        "statement": statement.statement,
        "remark": statement.remark,
        "verdict": verdict.value,
        "findings": [finding_as_json(finding) for finding in findings],
    }


def finding_as_json(finding: Finding) -> dict:
    """A finding's fields; only those with an interval have that field."""
    fields = finding._asdict()
    if finding.interval is None:
        del fields["interval"]
    return fields


def read_results(directory: Path) -> list[dict]:
    """The contents of the papers' result files, ordered by name.

    Each has under "world" the contents of the file that the paper's experiments wrote, or None if there is none.
    Raises UserError for such a file without one of the paper.
    """
    papers = {}
    worlds = {}
    for path in sorted(directory.glob("*.json")):
        contents = json.loads(path.read_text(encoding="utf-8"))
        if path.stem.endswith(WORLD):
            worlds[path.stem.removesuffix(WORLD)] = contents
        else:
            papers[path.stem] = contents

    for name in worlds:
        if name not in papers:
            raise UserError(
                f"{directory}: no {name}.json beside {name}{WORLD}.json; scripts/papers/{name}.py writes it"
            )
    return [{**contents, "world": worlds.get(name)} for name, contents in papers.items()]


def finding_text(finding: Finding) -> str:
    """A finding on one line: what was measured, and what was expected."""
    text = f"{finding.statement}: {finding.measured}"
    if not finding.expected:
        return text
    if finding.holds is False:
        return f"{text} (expected {finding.expected}: no)"
    return f"{text} (expected {finding.expected})"
