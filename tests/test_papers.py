"""The statements of the papers: the verdict of each is the expected one, and their figures can be drawn.

The other test_paper_*.py plant mistakes that must turn verdicts, and compare the tools with other means.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import bandits
from scripts.lab.claim_files import save_figures
from scripts.lab.claims import Claim, Paper, run_claim

SLOW = {  # claims that take some seconds
    "dpo": ("T1", "T4"),
    "exo": ("A1", "D4", "D7", "F2b", "F2d", "F2f", "F6b", "N6"),
    "typo": ("C21", "C43", "C46", "C47", "C49", "L4"),
    "distillation": ("T17", "T39", "T46"),
    "r_to_q": ("C9", "C22"),
}


def claims() -> Iterator[Any]:
    for paper in bandits.PAPERS:
        for claim in paper.claims:
            marks = []
            if claim.number in SLOW[paper.name]:
                marks.append(pytest.mark.slow)
            yield pytest.param(claim, id=f"{paper.name}-{claim.number}", marks=marks)


@pytest.mark.parametrize("claim", claims())
def test_the_verdict_is_the_expected_one(claim: Claim) -> None:
    outcome = run_claim(claim)
    assert outcome.is_expected, outcome.findings
    assert len(outcome.findings) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("paper", bandits.PAPERS, ids=lambda paper: paper.name)
def test_figures_are_saved(paper: Paper, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for figure in save_figures(paper, tmp_path):
        assert (tmp_path / figure["file"]).stat().st_size > 10_000
