"""The report of a quickstart: hostile text, marks that follow the oracle, nothing from outside, missing files."""

import json
import re
from pathlib import Path

import pytest
import tiny

from scripts import report
from scripts.lab import notices
from shared import UserError

PROMPT = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def write_run(folder: Path, texts: list[str]) -> None:
    """The files that the report reads, with few numbers."""
    write_json(folder / "results.json", make_results(texts))
    stage = {"command": "python a.py --x '<i>'", "seconds": 1.0}
    write_json(folder / "quickstart.json", {"commands": [stage], "seconds": 2.0})

    run = {
        "args": {"batch_size": 4, "beta": 0.3},
        "steps": 2,
        "data": {"train": {"rows": 9, "kept": 8}},
        "versions": {"torch": "2"},
        "commit": None,
        "device": "cpu",
    }
    metrics = dict.fromkeys(METRICS, 0.5)
    lines = [{"step": 1, **metrics}, {"step": 2, **metrics}, {"step": 2, "eval/loss": 0.4}]
    for name in ("sft", "dpo"):
        (folder / name).mkdir()
        write_json(folder / name / "run.json", run)
        tiny.write_jsonl(folder / name / "metrics.jsonl", lines)


def make_results(texts: list[str]) -> dict:
    """Results of two policies that wrote the same texts."""
    number = {"mean": 1.0, "interval": [0.5, 1.5]}
    policy = {measure: number for measure in report.MEASURES}
    policy["rewards"] = [[notices.oracle(PROMPT, text) for text in texts]]
    policy["completions"] = [texts]
    settings = {"reference": "a", "num_samples": 2, "num_prompts": 1, "temperature": 1.0}
    return {"settings": settings, "prompts": [PROMPT], "policies": {"sft": policy, "<b>dpo": policy}}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_report_escapes_text_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    write_run(tmp_path, ["lost lamp, <script>alert(1)</script> & more.", "lost <b>lamp</b>"])
    report.main(report.Args(run_dir=tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert "<script" not in page.lower()
    assert "<b>" not in page
    assert "<i>'" not in page
    assert "&lt;" in page
    assert not re.search(r"https?:|//\w|src=|@import|url\((?!#)", page)
    assert page.count("<svg") == 10
    assert page.count("</svg>") == 10


def test_marks_follow_the_oracle() -> None:
    text = "lost guitar, at school, tea is free, in may"
    marked = report.mark_html(PROMPT, text)

    assert '<span class="wrong">guitar</span>' in marked
    assert '<span class="correct">school</span>' in marked
    assert '<span class="correct">may</span>' in marked
    assert '<span class="superfluous">tea is free</span>' in marked
    assert marked.count("<span") == 4
    assert notices.oracle(PROMPT, text) == 2 - 1 - 0.5


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        report.main(report.Args(run_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []
