"""What a paper's command prints and writes: a table of its claims, its figures, and a JSON file of both."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.lab.claims import Claim, Finding, Outcome, Paper, rows_of_findings, run_claim
from scripts.lab.plots import require_matplotlib
from scripts.lab.tables import aligned
from shared import UserError
from shared.files import replacing, storage_errors, write_json


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
        print_findings(outcome)
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


def print_findings(outcome: Outcome) -> None:
    """Print one claim with all its findings."""
    claim = outcome.claim
    print(f"{claim.number}, {claim.where}: {claim.statement}")
    if claim.remark:
        print(claim.remark)

    heading = ["role", "", "expected", "measured", "agrees"]
    lines = [heading, *rows_of_findings(outcome.findings)]
    print(f"\n{aligned(lines)}\n\n{outcome.verdict.value}")


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
    figures = []
    for caption, draw in paper.figures:
        name = f"{paper.name}_{draw.__name__}.png"
        figure = draw()
        path = directory / name
        with storage_errors(path), replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        figures.append({"file": name, "caption": caption})
    return figures


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
        "where": claim.where,
        "statement": claim.statement,
        "remark": claim.remark,
        "verdict": outcome.verdict.value,
        "findings": [finding._asdict() for finding in outcome.findings],
    }


def read_results(directory: Path) -> list[dict]:
    """The contents of all result files of a directory, ordered by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]


def finding_text(finding: Finding) -> str:
    """A finding on one line: what was measured, and what was expected."""
    if not finding.expected:
        return f"{finding.statement}: {finding.measured}"
    return f"{finding.statement}: {finding.measured} (expected {finding.expected})"
