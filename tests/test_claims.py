"""Claims: verdicts, comparisons, and what a paper's command prints and writes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from scripts import bandits, results
from scripts.lab.claim_files import Args, finding_text, paper_command, read_results, run_paper
from scripts.lab.claims import (
    Finding,
    Paper,
    Verdict,
    given,
    instead,
    judged,
    reported,
    same_digits,
    same_value,
    vanishes,
    verdict_of,
)
from shared import UserError

RIGHT = judged("", "> 0", 1, True)
WRONG = judged("", "> 0", -1, False)
OPEN = reported("", 1)


@pytest.mark.parametrize(
    "findings, verdict",
    [
        ([RIGHT], Verdict.HOLDS),
        ([RIGHT, given(RIGHT), OPEN], Verdict.HOLDS),
        ([RIGHT, given(WRONG)], Verdict.UNDECIDED),
        ([WRONG], Verdict.UNDECIDED),
        ([RIGHT, WRONG, given(RIGHT)], Verdict.FALSE),
        ([WRONG, given(WRONG)], Verdict.UNDECIDED),
        ([WRONG, instead(RIGHT)], Verdict.CORRECTED),
        ([WRONG, instead(RIGHT), instead(WRONG)], Verdict.UNDECIDED),
        ([WRONG, instead(RIGHT), given(WRONG)], Verdict.UNDECIDED),
        ([given(RIGHT), OPEN], Verdict.UNDECIDED),
        ([], Verdict.UNDECIDED),
    ],
)
def test_the_verdict_follows_from_the_findings(findings: list[Finding], verdict: Verdict) -> None:
    assert verdict_of(findings) == verdict


def test_digits_agree_where_they_should() -> None:
    assert same_digits("", "2.398", 2.3984).holds
    assert not same_digits("", "2.398", 2.3974).holds
    assert same_digits("", "1, 0, 0", 0.9996, 0.0004, 0).holds
    assert not same_digits("", "1, 0, 0", 0.99, 0.01, 0).holds


def test_values_agree_where_they_should() -> None:
    assert same_value("", 1.0, 1.0).holds
    assert not same_value("", 1.0, 1.00001).holds
    assert not same_value("", 1.0, float("nan")).holds


def test_what_vanishes_is_small_everywhere() -> None:
    assert vanishes("", torch.tensor([1e-12, -1e-11])).holds
    assert not vanishes("", torch.tensor([0, -1e-3])).holds
    assert not vanishes("", float("nan")).holds
    assert vanishes("", 1e-3, tolerance=1e-2).measured == "< 1e-02"


# ---------------------------------------------------------------- the command


def small_paper(factor: float = 2.0) -> Paper:
    """A paper with a true statement, a false one, and one that is checked elsewhere."""
    paper = Paper("small", "A small paper", "0000.00000")
    sums = paper.section("Sums")

    @sums.claim("T2", "Eq 2")
    def doubling() -> Iterator[Finding]:
        """The sum x + x is 2 x,
        for any x.

        By example | for x = 3.
        """
        yield same_value("3 + 3", 3 * factor, 3 + 3)

    @sums.claim("T10", "Eq 3", expected=Verdict.FALSE)
    def squaring() -> Iterator[Finding]:
        """The square x x is 2 x."""
        yield same_value("3 · 3", 6, 3 * 3)
        yield given(same_value("3 · 3", 9, 3 * 3))

    sums.elsewhere("E1", "Fig 1", "Sums are popular.", "needs a survey")
    return paper


def test_a_paper_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    assert run_paper(small_paper(), tmp_path) == []
    assert "1 holds, 1 false (counterexample), 1 not checked here" in capsys.readouterr().out

    (contents,) = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()]
    doubling, squaring = contents["claims"]
    assert doubling["statement"] == "The sum x + x is 2 x, for any x."
    assert doubling["verdict"] == "holds"
    assert squaring["findings"][1]["role"] == "given"


def test_an_unexpected_verdict_ends_with_code_1_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        paper_command(small_paper(factor=3), Args(output_dir=tmp_path))
    assert stop.value.code == 1
    assert "T2: not decided, expected: holds" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_single_claim_is_shown_with_its_findings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paper_command(small_paper(), Args(claim="T10", output_dir=tmp_path))
    printed = capsys.readouterr().out
    assert "T10, Eq 3: The square x x is 2 x." in printed
    assert "9.0000" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, message", [("T3", "has the claims T2, T10"), ("E1", "needs a survey")])
def test_a_claim_that_is_not_there(number: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        paper_command(small_paper(), Args(claim=number))


# ---------------------------------------------------------------- the page


def test_the_page_has_every_statement_in_order(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_paper(small_paper(), tmp_path)
    page = tmp_path / "results.md"
    results.main(results.Args(results_dir=tmp_path, output=page))

    text = page.read_text(encoding="utf-8")
    assert "| A small paper | 3 | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| false (counterexample) | `python scripts/papers/small.py --claim T10` |" in text
    assert "| E1 | Fig 1 | Sums are popular. | needs a survey | not checked here |  |" in text
    assert text.index("| T2 |") < text.index("| T10 |")


def test_the_page_keeps_what_others_wrote(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = small_paper()
    second = small_paper()
    second.name = "other"
    second.title = "Another paper"
    for paper in (first, second, first):
        run_paper(paper, tmp_path)
    page = tmp_path / "results.md"
    results.main(results.Args(results_dir=tmp_path, output=page))
    text = page.read_text(encoding="utf-8")
    assert text.count("## A small paper") == 1
    assert text.count("## Another paper") == 1


def test_no_result_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no result file"):
        results.main(results.Args(results_dir=tmp_path, output=tmp_path / "results.md"))


def test_vertical_bars_stay_in_their_cell() -> None:
    assert results.in_a_cell("π(a|s)") == "π(a\\|s)"


def test_a_finding_on_one_line() -> None:
    assert finding_text(judged("x", "> 0", 1, True)) == "x: 1.0000 (expected > 0)"
    assert finding_text(reported("x", 1e-5)) == "x: 1.00e-05"


# ---------------------------------------------------------------- what is committed


def test_the_page_is_made_of_the_result_files() -> None:
    papers = read_results(tiny.ROOT / "results")
    committed = (tiny.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert results.page(papers, "../results") == committed


@pytest.mark.parametrize("paper", bandits.PAPERS, ids=lambda paper: paper.name)
def test_the_result_files_have_the_statements_of_the_code(paper: Paper) -> None:
    path = tiny.ROOT / "results" / f"{paper.name}.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    claims = [
        (claim["number"], claim["section"], claim["where"], claim["statement"], claim["remark"], claim["verdict"])
        for claim in written["claims"]
    ]
    assert claims == [
        (claim.number, claim.section, claim.where, claim.statement, claim.remark, claim.expected.value)
        for claim in paper.claims
    ]
    assert written["elsewhere"] == [statement._asdict() for statement in paper.elsewhere]


@pytest.mark.parametrize("paper", bandits.PAPERS, ids=lambda paper: paper.name)
def test_numbers_are_used_once(paper: Paper) -> None:
    numbers = [statement.number for statement in [*paper.claims, *paper.elsewhere]]
    assert sorted(set(numbers)) == sorted(numbers)


def named_in_errata(paper: Paper) -> set[str]:
    """The numbers of claims in the paper's part of docs/errata.md."""
    page = (tiny.ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
    (part,) = [part for part in page.split("\n## ") if f"arXiv {paper.arxiv}" in part]
    return set(re.findall(r"`(\w+)`", part))


@pytest.mark.parametrize("paper", bandits.PAPERS, ids=lambda paper: paper.name)
def test_errata_name_claims(paper: Paper) -> None:
    """They exist, and those that are false are all named."""
    named = named_in_errata(paper)
    assert named <= {claim.number for claim in paper.claims}
    assert named >= {claim.number for claim in paper.claims if claim.expected == Verdict.FALSE}
