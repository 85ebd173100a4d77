"""Make docs/results.md from all result files: every statement of the papers, what we found, and the verdict.

python scripts/results.py
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.lab.claim_files import finding_text, read_results
from scripts.lab.claims import Finding, Verdict
from scripts.lab.commands import ROOT, checked_command
from scripts.lab.tables import markdown_table
from shared import UserError
from shared.files import write_text

NOT_HERE = "not checked here"
VERDICTS = (*(verdict.value for verdict in Verdict), NOT_HERE)
INTRODUCTION = """\
# Results

What the papers state, statement by statement. Each statement is a function in [scripts/papers](../scripts/papers) with
a number: `python scripts/papers/dpo.py --claim T8` runs one and prints all that it compares. The verdict follows from
these comparisons. `bash scripts/reproduce.sh --exact` runs all of them, and makes this page.

"Holds with a correction" and "false" are about the statement as it is printed. What is needed beyond it, or right
instead, is among the comparisons, and [errata.md](errata.md) lists the errors."""


@dataclass(kw_only=True)
class Args:
    """Make docs/results.md from all result files."""

    results_dir: Path = ROOT / "results"
    """directory of the result files, one JSON file per command that wrote them"""

    output: Path = ROOT / "docs" / "results.md"
    """page to write; links to figures are relative to it"""


def main(args: Args) -> None:
    papers = read_results(args.results_dir)
    if not papers:
        raise UserError(f"--results-dir {args.results_dir}: no result file; python scripts/papers/dpo.py writes one")

    figures = os.path.relpath(args.results_dir, args.output.parent)
    write_text(args.output, page(papers, Path(figures).as_posix()))
    print(f"written: {args.output}")


def page(papers: list[dict], figures: str) -> str:
    """The text of the page. `figures` is the directory of the figures, as a link from the page."""
    sections = [INTRODUCTION, counts_table(papers)]
    for paper in papers:
        sections += paper_sections(paper, figures)
    return "\n\n".join(sections) + "\n"


def counts_table(papers: Iterable[dict]) -> str:
    """How many statements of each paper have which verdict."""
    rows = []
    for paper in papers:
        verdicts = [verdict for _, _, verdict in statements_of(paper)]
        counts = [str(verdicts.count(verdict)) for verdict in VERDICTS]
        rows.append([paper["paper"], str(len(verdicts)), *counts])
    return markdown_table(["paper", "statements", *VERDICTS], rows)


def statements_of(paper: dict) -> Iterator[tuple[dict, str, str]]:
    """Each statement with what was found and its verdict; those not checked here with the reason."""
    for claim in paper["claims"]:
        findings = [Finding(**finding) for finding in claim["findings"]]
        yield claim, "<br>".join(map(finding_text, findings)), claim["verdict"]
    for statement in paper["elsewhere"]:
        yield statement, statement["reason"], NOT_HERE


def paper_sections(paper: dict, figures: str) -> Iterator[str]:
    """The part of the page on one paper: title, command, figures, and a table for each section."""
    yield f"## {paper['paper']}\n\narXiv {paper['arxiv']}. `{paper['command']}`"
    for figure in paper["figures"]:
        yield f"![{figure['caption']}]({figures}/{figure['file']})\n\n{figure['caption']}"

    by_section: dict[str, list[list[str]]] = {}
    for statement, findings, verdict in statements_of(paper):
        cells = [statement["number"], statement["where"], statement["statement"], findings, verdict]
        by_section.setdefault(statement["section"], []).append([in_a_cell(cell) for cell in cells])

    for title, rows in by_section.items():
        rows.sort(key=lambda cells: number_key(cells[0]))
        columns = ["no.", "where", "the paper says", "found", "verdict"]
        yield f"### {title}\n\n{markdown_table(columns, rows)}"


def number_key(number: str) -> list[tuple[int, str]]:
    """Sorts T2 before T10."""
    parts = re.findall(r"\d+|\D+", number)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def in_a_cell(text: str) -> str:
    """A text whose vertical bars do not end the table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    checked_command(main, Args)
