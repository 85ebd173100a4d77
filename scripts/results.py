"""Make docs/results.md from all result files: every statement of the papers, what we found, and the verdict.

python scripts/results.py
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scripts.lab.claim_files import finding_text, read_results
from scripts.lab.claims import Finding, Verdict
from scripts.lab.commands import ROOT, checked_command
from scripts.lab.experiments import Reproduction
from scripts.lab.tables import markdown_table
from shared import UserError
from shared.files import write_text

NOT_HERE = "not checked here"
VERDICTS = (*(verdict.value for verdict in (*Verdict, *Reproduction)), NOT_HERE)
COLUMNS = ("no.", "where", "the paper says", "found", "verdict", "command")
INTRODUCTION = """\
# Results

What the papers state, statement by statement. Each statement is a function with a number, and the command beside it
prints all that this function compares. The verdict follows from these comparisons. `bash scripts/reproduce.sh` runs all
of them, and makes this page.

Statements that can be checked exactly are in [scripts/papers](../scripts/papers). "Holds with a correction" and "false"
are about the statement as it is printed. What is needed beyond it, or right instead, is among the comparisons, and
[errata.md](errata.md) lists the errors.

Statements about trained models are tried in a small world whose true reward is known, in
[scripts/experiments](../scripts/experiments). A comparison holds if the whole 95% interval is on the right side of the
bound; the interval is a bootstrap over seeds and prompts. "Reproduced" means that all comparisons hold, "partly" that
some do. The others are followed by what was tried."""


class Row(NamedTuple):
    """A statement, as a line of a table."""

    number: str
    section: str
    where: str
    statement: str
    findings: str
    verdict: str
    command: str


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
        verdicts = [row.verdict for row in rows_of(paper)]
        counts = [str(verdicts.count(verdict)) for verdict in VERDICTS]
        rows.append([paper["paper"], str(len(verdicts)), *counts])
    return markdown_table(["paper", "statements", *VERDICTS], rows)


def rows_of(paper: dict) -> Iterator[Row]:
    """Each statement of a paper with what was found and its verdict; those not checked here with the reason.

    Raises UserError for an experiment with a number that is none of a statement which is left to experiments.
    """
    for claim in paper["claims"]:
        verdict = claim["verdict"]
        command = f"`{paper['command']} --claim {claim['number']}`"
        yield row_of(claim, claim["section"], findings_text(claim), verdict, command)

    experiments = {}
    if paper["world"]:
        experiments = {experiment["number"]: experiment for experiment in paper["world"]["experiments"]}
    for statement in paper["elsewhere"]:
        experiment = experiments.pop(statement["number"], None)
        if experiment is None:
            yield row_of(statement, statement["section"], statement["reason"], NOT_HERE, "")
        else:
            yield experiment_row(experiment, statement["section"], paper["world"]["command"])

    if experiments:
        numbers = ", ".join(experiments)
        raise UserError(f"{paper['paper']} leaves no statement {numbers} to {paper['world']['command']}")


def row_of(statement: dict, section: str, findings: str, verdict: str, command: str) -> Row:
    return Row(statement["number"], section, statement["where"], statement["statement"], findings, verdict, command)


def experiment_row(experiment: dict, section: str, program: str) -> Row:
    """An experiment; if not all of it holds, with the remark that says what was tried."""
    verdict = experiment["verdict"]
    text = findings_text(experiment)
    if verdict != Reproduction.REPRODUCED.value:
        text = f"{text}<br>{experiment['remark']}"
    command = f"`{program} --experiment {experiment['number']}`"
    return row_of(experiment, section, text, verdict, command)


def findings_text(statement: dict) -> str:
    """All findings of a statement, in a cell."""
    findings = [Finding(**finding) for finding in statement["findings"]]
    return "<br>".join(map(finding_text, findings))


def paper_sections(paper: dict, figures: str) -> Iterator[str]:
    """The part of the page on one paper: title, commands, figures, and a table for each section."""
    yield f"## {paper['paper']}\n\narXiv {paper['arxiv']}. {commands_text(paper)}"
    shown = list(paper["figures"])
    if paper["world"]:
        shown += paper["world"]["figures"]
    for figure in shown:
        yield f"![{figure['caption']}]({figures}/{figure['file']})\n\n{figure['caption']}"

    by_section: dict[str, list[Row]] = {}
    for row in rows_of(paper):
        by_section.setdefault(row.section, []).append(row)
    for title, rows in by_section.items():
        rows.sort(key=lambda row: number_key(row.number))
        yield f"### {title}\n\n{markdown_table(COLUMNS, map(cells_of, rows))}"


def commands_text(paper: dict) -> str:
    """The commands that check a paper's statements, and the seeds of its experiments."""
    text = f"`{paper['command']}`"
    if paper["world"]:
        seeds = ", ".join(map(str, paper["world"]["seeds"]))
        text += f"; experiments, seeds {seeds}: `{paper['world']['command']}`"
    return text


def cells_of(row: Row) -> list[str]:
    cells = [row.number, row.where, row.statement, row.findings, row.verdict, row.command]
    return [in_a_cell(cell) for cell in cells]


def number_key(number: str) -> list[tuple[int, str]]:
    """Sorts T2 before T10."""
    parts = re.findall(r"\d+|\D+", number)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def in_a_cell(text: str) -> str:
    """A text whose vertical bars do not end the table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    checked_command(main, Args)
