"""Chat templates that write the date: it is fixed for a run, and the report's hash follows it."""

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tokenised import FIRST, LENGTH, RANKING, TALK, assistant, chat, pieces, plain, write

from shared.batches import load_batches
from shared.distributed import Ranks
from shared.groups import Groups, describe, load_groups

DAY = date(2031, 3, 4)
LATER_DAY = date(2031, 3, 5)
ROW = {"messages": [*TALK, assistant("ok")]}
QUESTION = "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n"


def with_date(expression: str) -> Any:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = expression + "\n" + tiny.CHATML
    return tokenizer


def load_on(day: date, source: str, tokenizer: Any) -> Groups:
    return load_groups(source, tokenizer, FIRST, LENGTH, None, day)


@pytest.mark.parametrize(
    "expression, written",
    [
        ("{{ strftime_now('%d %b %Y') }}", "04 Mar 2031"),
        ('{{ strftime_now( "%Y-%m-%d" ) }}', "2031-03-04"),
        ("{% set today = strftime_now('%Y') + '!' %}{{ today }}", "2031!"),
        ("{% set format = '%d.%m.' %}{{ strftime_now(format) }}", "04.03."),
        ("{{ strftime_now('%-d %B, %H:%M') }}", "4 March, 00:00"),
        ("{% macro day() %}{{ strftime_now('%F') }}{% endmacro %}{{ day() | trim }}", "2031-03-04"),
        ("{{ strftime_now(format='%A') if strftime_now is defined }}", "Tuesday"),
    ],
)
def test_the_date_is_that_of_the_run(tmp_path: Path, expression: str, written: str) -> None:
    tokenizer = with_date(expression)
    source = write(tmp_path / "rows.jsonl", [ROW])
    groups = load_on(DAY, source, tokenizer)
    assert groups.report["date"] == "2031-03-04"
    prompt, completion = pieces(groups, 0)
    assert tokenizer.decode(prompt) == f"{written}\n{QUESTION}"
    assert tokenizer.decode(completion) == "ok<|im_end|>"
    assert describe(groups.report) == "rows 1, kept 1"
    assert load_groups(source, tokenizer, FIRST, LENGTH, None).report["date"] == str(date.today())


def test_the_hash_is_that_of_the_tokens(tmp_path: Path) -> None:
    tokenizer = with_date("{{ strftime_now('%d') }}")
    source = write(tmp_path / "rows.jsonl", [ROW])
    first = load_on(DAY, source, tokenizer).report["sha256"]
    other_file = write(tmp_path / "other.jsonl", [{**ROW, "id": 7}])
    assert load_on(DAY, other_file, tokenizer).report["sha256"] == first
    assert load_on(LATER_DAY, source, tokenizer).report["sha256"] != first

    other_row = write(tmp_path / "other.jsonl", [{"messages": [*TALK, assistant("no")]}])
    assert load_on(DAY, other_row, tokenizer).report["sha256"] != first


def test_the_hash_covers_which_tokens_count(tmp_path: Path) -> None:
    hashes = set()
    for weight in (0, 1):
        turns = [{**assistant("ok"), "weight": weight}, *TALK, assistant("no")]
        source = write(tmp_path / "rows.jsonl", [{"prompt": TALK, "completion": turns}])
        hashes.add(load_on(DAY, source, chat()).report["sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize("tokenizer, row", [(chat(), ROW), (plain(), {"prompt": "a", "completion": "ok"})])
def test_templates_without_a_date(tmp_path: Path, tokenizer: Any, row: dict) -> None:
    source = write(tmp_path / "rows.jsonl", [row])
    reports = [load_on(day, source, tokenizer).report for day in (DAY, LATER_DAY)]
    assert reports[0] == reports[1]
    assert "date" not in reports[0]


# ---------------------------------------------------------------- a run that goes on


def load_run(folder: Path, tokenizer: Any, resume: bool, run_json: dict | None) -> list[Groups]:
    """The training and the held-out groups of a run."""
    source = write(folder / "rows.jsonl", [{"prompt": TALK, "chosen": "ok", "rejected": "no"}])
    if run_json is not None:
        (folder / "run.json").write_text(json.dumps(run_json))
    args = SimpleNamespace(
        train_data=source,
        eval_data=source,
        output_dir=str(folder),
        resume=resume,
        max_length=LENGTH,
        max_prompt_length=None,
        batch_size=1,
        micro_batch_tokens=LENGTH,
        shuffle=False,
        epochs=1,
        max_steps=None,
    )
    ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
    config = tiny.make_config("llama", vocab=1000, max_position_embeddings=LENGTH)
    return [batches.groups for batches in load_batches(args, ranks, tokenizer, config, RANKING)]


EARLIER = {"data": {"train": {"date": "2031-03-04"}}}
WITHOUT = {"data": {"train": {"rows": 1}}}
TODAY = str(date.today())


@pytest.mark.parametrize(
    "resume, run_json, day",
    [
        (True, EARLIER, "2031-03-04"),
        (True, WITHOUT, TODAY),
        (True, None, TODAY),
        (False, EARLIER, TODAY),
        (False, None, TODAY),
    ],
)
def test_a_run_that_goes_on_has_the_date_of_its_first_day(
    tmp_path: Path, resume: bool, run_json: dict | None, day: str
) -> None:
    tokenizer = with_date("{{ strftime_now('%Y-%m-%d') }}")
    for groups in load_run(tmp_path, tokenizer, resume, run_json):
        assert groups.report["date"] == day
        assert tokenizer.decode(pieces(groups, 0)[0]) == f"{day}\n{QUESTION}"


def test_a_run_without_a_date(tmp_path: Path) -> None:
    for groups in load_run(tmp_path, chat(), True, WITHOUT):
        assert "date" not in groups.report
