"""Rows that are selected, dropped, truncated and counted on their way to groups, and the cache of the result."""

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tokenised import (
    BAD,
    FIRST,
    GOOD,
    LENGTH,
    PAIR,
    RANKING,
    TALK,
    USER,
    assistant,
    chat,
    ended,
    ids,
    load,
    only_group,
    pieces,
    plain,
    question,
    write,
)

from shared import UserError
from shared.batches import load_batches
from shared.distributed import Ranks
from shared.groups import Requires, as_tensor, describe, load_groups

# ---------------------------------------------------------------- truncation

LONG = {"prompt": "a é I ok 42 7 a é", "chosen": "ok ok ok ok ok ok", "rejected": "ok"}


def test_a_prompt_keeps_its_bos_and_its_end(tmp_path: Path) -> None:
    prompt, chosen, rejected = only_group(tmp_path, LONG, plain())
    truncated = only_group(tmp_path, LONG, plain(), max_length=8, max_prompt_length=4)
    assert truncated == [[plain().bos_token_id, *prompt[-4:]], chosen[:3], rejected[:3]]
    # the shorter completion still has its EOS, the longer one has not
    assert truncated[1][-1] != plain().eos_token_id
    assert truncated[2][-1] == plain().eos_token_id

    limit = len(prompt) - 1  # besides the BOS
    assert only_group(tmp_path, LONG, plain(), max_prompt_length=limit)[0] == prompt


def test_truncated_prompts_and_completions_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [LONG])
    report = load_groups(source, plain(), RANKING, 8, 4).report
    assert report["prompts cut"] == 1
    assert report["completions cut"] == 1


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted_once(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [LONG, {**LONG, "prompt": "a"}])
    report = load_groups(source, plain(), RANKING, 5, 4).report
    assert report["dropped"] == {"prompt too long": 1}
    assert "prompts cut" not in report


def test_a_completion_that_fills_its_room_loses_only_its_eos(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [LONG])
    prompt, chosen, _ = pieces(load(source, plain()), 0)
    length = len(prompt) + len(chosen)

    whole = load(source, plain(), length=length)
    assert "completions cut" not in whole.report
    without_eos = load(source, plain(), length=length - 1)
    assert without_eos.report["completions cut"] == 1
    assert pieces(without_eos, 0)[1] == chosen[:-1]


# ---------------------------------------------------------------- what is dropped


def test_rows_are_dropped_for_counted_reasons(tmp_path: Path) -> None:
    rows = [
        PAIR,
        PAIR,
        {**PAIR, "chosen": BAD, "rejected": GOOD},
        {**PAIR, "chosen": " \n"},
        {**PAIR, "rejected": ""},
        {**PAIR, "rejected": GOOD},
        {**PAIR, "prompt": ""},
        {**PAIR, "prompt": "ok " * 500},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    groups = load(source, plain(), length=100)

    assert groups.report == {
        "source": source,
        "rows": 8,
        "kept": 4,
        "dropped": {"empty completion": 2, "identical completions": 1, "prompt too long": 1},
        "duplicates": 1,
        "contradictions": 1,
        "sha256": groups.report["sha256"],
    }
    assert describe(groups.report) == (
        "rows 8, kept 4, dropped: empty completion 2, identical completions 1, prompt too long 1; "
        "contradictions 1; duplicates 1"
    )
    assert groups.row_numbers.tolist() == [1, 2, 3, 7]


def test_an_empty_prompt_is_the_bos_or_dropped(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": ""}])
    assert pieces(load(source, plain()), 1)[0] == [plain().bos_token_id]
    without_bos = load(source, tiny.make_tokenizer(bos=False))
    assert without_bos.report["dropped"] == {"empty prompt": 1}


def test_completions_that_a_template_makes_identical_are_dropped(tmp_path: Path) -> None:
    trimming = tiny.make_tokenizer(chat=True)
    trimming.chat_template = tiny.CHATML.replace("message['content']", "message['content'] | trim")

    row = {"chosen": [*TALK, assistant(GOOD + " ")], "rejected": [*TALK, assistant(GOOD)]}
    _, chosen, rejected = only_group(tmp_path, row, chat())
    assert chosen != rejected
    with pytest.raises(UserError, match="dropped: identical completions 1"):
        only_group(tmp_path, row, trimming)


@pytest.mark.parametrize(
    "row, length",
    [
        ({"prompt": "a a", "chosen": "ok ok ok 1", "rejected": "ok ok ok 2"}, 6),
        ({"prompt": "a", "chosen": "ok ok ok", "rejected": "ok ok"}, 4),
        ({"prompt": "a", "completions": ["ok ok", "42", "ok ok ok"]}, 4),
    ],
)
def test_completions_that_truncation_makes_identical_are_dropped(tmp_path: Path, row: dict, length: int) -> None:
    """The dropped row is not counted among those that were truncated."""
    source = write(tmp_path / "rows.jsonl", [row, row])
    assert len(load(source, plain())) == 2
    with pytest.raises(UserError, match="kept 0, dropped: identical completions after truncation 2$"):
        load(source, plain(), length=length)
    assert len(load(source, plain(), FIRST, length)) == 2


def test_scores_keep_completions_that_truncation_makes_identical(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "ok ok 42", "rejected": "ok ok 7", "score_chosen": 1, "score_rejected": 0}
    _, chosen, rejected = only_group(tmp_path, row, plain(), Requires("pair", scores=True), max_length=4)
    assert chosen == rejected


def test_samples_that_truncation_makes_identical_stay(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "ok", "rejected": "42", "reference_samples": ["ok ok 42", "ok ok 7"]}
    _, _, _, *samples = only_group(tmp_path, row, plain(), Requires("pair", samples="required"), max_length=4)
    assert samples[0] == samples[1]


def test_identical_completions_stay_if_scores_or_only_the_first_are_required(tmp_path: Path) -> None:
    answer = [*TALK, assistant(GOOD)]
    row = {"chosen": answer, "rejected": answer, "score_chosen": 1, "score_rejected": 0}
    prompt = question(chat())
    completion = ended(chat(), GOOD)

    with pytest.raises(UserError, match="dropped: identical completions 1"):
        only_group(tmp_path, row, chat())
    assert only_group(tmp_path, row, chat(), Requires("pair", scores=True)) == [prompt, completion, completion]
    assert only_group(tmp_path, row, chat(), FIRST) == [prompt, completion]


def test_ties_are_dropped(tmp_path: Path) -> None:
    all_scores = [[1, 1], [2, 1], [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]]
    rows = [{"prompt": USER, "completions": [GOOD, BAD], "scores": scores} for scores in all_scores]
    groups = load(write(tmp_path / "rows.jsonl", rows), plain())
    assert groups.report["dropped"] == {"tied scores": 2}


def test_transcripts_without_a_common_prompt_are_dropped(tmp_path: Path) -> None:
    talk = "\n\nHuman: ok\n\nAssistant:"
    rows = [
        {"chosen": talk + " a", "rejected": talk + " b"},
        {"chosen": talk + " a", "rejected": "x" + talk},
        {"chosen": talk + " a", "rejected": "b"},
    ]
    groups = load(write(tmp_path / "rows.jsonl", rows), plain())
    assert groups.report["dropped"] == {"prompts differ": 1, "no Assistant turn": 1}


RENDERED = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
SAMPLED = {"reference_samples": ["a</s>", "7"]}


@pytest.mark.parametrize(
    "row, tokenizer, requires, count",
    [
        ({"prompt": RENDERED, "chosen": "ok<|im_end|>", "rejected": "no<|im_end|>"}, chat(), RANKING, 2),
        ({"text": RENDERED + "ok"}, chat(), FIRST, 2),
        ({**PAIR, "chosen": "ok</s>"}, plain(), RANKING, 2),
        ({"messages": [*TALK, assistant("ok <|im_start|>")]}, chat(), FIRST, 2),
        ({**PAIR, **SAMPLED}, plain(), Requires("pair", samples="required"), 2),
        ({**PAIR, **SAMPLED}, plain(), RANKING, 0),  # which reads no samples
        ({"prompt": RENDERED, "chosen": "ok", "rejected": "no"}, plain(), RANKING, 0),  # not its tokens
        ({**PAIR, "chosen": "\U000f00000;"}, plain(), RANKING, 0),
        ({"messages": [*TALK, assistant("ok")]}, chat(), FIRST, 0),  # only the template writes tokens
    ],
)
def test_rows_with_control_strings_are_counted(
    tmp_path: Path, row: dict, tokenizer: Any, requires: Requires, count: int
) -> None:
    report = load(write(tmp_path / "rows.jsonl", [row, row]), tokenizer, requires).report
    assert report.get("control strings as text", 0) == count
    assert ("; control strings as text 2" in describe(report)) == (count == 2)


def test_the_advice_on_control_strings_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lengths = {"max_length": LENGTH, "max_prompt_length": None}
    steps = {"batch_size": 1, "micro_batch_tokens": LENGTH, "shuffle": False, "epochs": 1, "max_steps": None}
    for answer, count in (("ok</s>", 1), ("ok", 0)):
        source = write(tmp_path / "rows.jsonl", [{**PAIR, "chosen": answer}])
        paths = {"train_data": source, "eval_data": source, "output_dir": str(tmp_path), "resume": False}
        args = SimpleNamespace(**paths, **lengths, **steps)
        config = tiny.make_config("llama", vocab=1000, max_position_embeddings=LENGTH)
        ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
        load_batches(args, ranks, plain(), config, RANKING)
        assert capsys.readouterr().out.count("give their messages instead") == count


# ---------------------------------------------------------------- cache and memory


def test_the_cache_follows_the_content(tmp_path: Path) -> None:
    first = only_group(tmp_path, PAIR, plain())
    prompt, chosen, rejected = first
    assert only_group(tmp_path, PAIR, plain()) == first
    assert only_group(tmp_path, PAIR, plain(), FIRST) == [prompt, chosen]

    swapped = {**PAIR, "chosen": BAD, "rejected": GOOD}
    assert only_group(tmp_path, swapped, plain()) == [prompt, rejected, chosen]
    assert only_group(tmp_path, PAIR, chat())[1] == [*ids(chat(), GOOD), chat().eos_token_id] != chosen


def test_a_tokenizer_without_an_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        only_group(tmp_path, PAIR, tokenizer)


def test_collected_ids_become_a_tensor_without_a_copy() -> None:
    """Memory of a start-up grows by the ids themselves; one object for each number would take eight times as much."""
    values = array("i", [5, -1, 7])
    tensor = as_tensor(values, torch.int32)
    assert tensor.tolist() == [5, -1, 7]
    assert tensor.data_ptr() == values.buffer_info()[0]
    assert as_tensor(array("q"), torch.int64).shape == (0,)
