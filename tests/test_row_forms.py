"""Rows of every form to token ids, against ids encoded by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenised import (
    BAD,
    FIRST,
    GOOD,
    PAIR,
    SHARE_GPT,
    TALK,
    USER,
    assistant,
    chat,
    ended,
    ids,
    load,
    only_group,
    plain,
    question,
    template,
)

from shared import UserError
from shared.rows import FORMS

STRING_PAIRS = [
    PAIR,
    {"prompt": USER, "completions": [GOOD, BAD]},
    {"prompt": USER, "completions": [BAD, GOOD], "scores": [0.5, 2]},
    {"prompt": USER, "completions": [BAD, GOOD], "scores": [[0, 1], [5, -1]]},
    {"history": USER, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    {"history": USER, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0},
]
CHAT_PAIRS = [
    {"prompt": TALK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    {
        "prompt": USER,
        "chosen": [*TALK, assistant(GOOD)],
        "rejected": [*TALK, assistant(BAD)],
        "score_chosen": 1,
        "score_rejected": 2,
    },
    {"prompt": USER, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"prompt": TALK, "completions": [GOOD, BAD]},
    {
        "conversations": SHARE_GPT,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    {"messages": TALK, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
    {"instruction": USER, "input": "", "chosen": GOOD, "rejected": BAD},
]
PLAIN_DEMONSTRATIONS = [
    {"prompt": USER, "completion": GOOD},
    {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    {"prompt": USER, "completions": [BAD, GOOD, "ok"], "scores": [1, 3, 2]},
]
CHAT_DEMONSTRATIONS = [
    {"prompt": TALK, "completion": [assistant(GOOD)]},
    {"prompt": TALK, "completion": GOOD},
    {"prompt": USER, "completion": [assistant(GOOD)]},
    {"messages": [*TALK, assistant(GOOD)]},
    {"messages": [*TALK, assistant(GOOD), {"role": "user", "content": "thanks"}]},
    {"conversations": [*SHARE_GPT, {"from": "gpt", "value": GOOD}]},
]
INSTRUCTION = {"instruction": "is it", "input": "ok?", "output": GOOD}
TRANSCRIPT = "\n\nHuman: a ok?\n\nAssistant: The sky is bl\n\nHuman: 42\n\nAssistant:"
TEXT = "ok ok, 42 naïve"


@pytest.mark.parametrize("row", STRING_PAIRS, ids=str)
def test_string_pairs(tmp_path: Path, row: dict) -> None:
    prompt = ids(plain(), USER, special=True)
    assert prompt[0] == plain().bos_token_id
    assert prompt.count(plain().bos_token_id) == 1
    assert only_group(tmp_path, row, plain()) == [prompt, ended(plain(), GOOD), ended(plain(), BAD)]


@pytest.mark.parametrize("row", CHAT_PAIRS, ids=str)
def test_chat_pairs(tmp_path: Path, row: dict) -> None:
    prompt, chosen, rejected = only_group(tmp_path, row, chat())

    assert prompt == question(chat())
    for completion, text in ((chosen, GOOD), (rejected, BAD)):
        conversation = template(chat(), ("user", USER), ("assistant", text))
        # the line break that the template writes behind the EOS is left out
        assert prompt + completion == ids(chat(), conversation.rstrip("\n"))
        assert completion[-1] == chat().eos_token_id


def test_a_prompt_of_messages_that_are_repeated_in_part(tmp_path: Path) -> None:
    """No message of the prompt is lost: pairs repeat its beginning, all of it, or its end, or the row is refused."""
    system = {"role": "system", "content": "be kind"}
    more = [assistant("what?"), {"role": "user", "content": "this"}]
    answers = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    pair = {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]}
    longer = {"chosen": [*TALK, *more, assistant(GOOD)], "rejected": [*TALK, *more, assistant(BAD)]}

    whole = only_group(tmp_path, {"prompt": [system, *TALK], **answers}, chat())
    assert only_group(tmp_path, {"prompt": [system, *TALK], **pair}, chat()) == whole
    assert only_group(tmp_path, {"prompt": TALK, **longer}, chat()) == only_group(tmp_path, longer, chat())

    problem = "line 1: fields 'chosen' and 'rejected' begin with other messages than"
    for prompt in ([system], more, [*TALK, *more]):
        with pytest.raises(UserError, match=problem):
            only_group(tmp_path, {"prompt": prompt, **pair}, chat())


def test_transcripts_split_at_the_last_assistant(tmp_path: Path) -> None:
    # a split by common characters would come only after " bl"
    row = {"chosen": TRANSCRIPT + " blue", "rejected": TRANSCRIPT + " blo"}
    prompt = ids(plain(), TRANSCRIPT, special=True)
    assert only_group(tmp_path, row, plain()) == [prompt, ended(plain(), " blue"), ended(plain(), " blo")]


@pytest.mark.parametrize("row", PLAIN_DEMONSTRATIONS, ids=str)
def test_plain_demonstrations(tmp_path: Path, row: dict) -> None:
    prompt = ids(plain(), USER, special=True)
    assert only_group(tmp_path, row, plain(), FIRST) == [prompt, ended(plain(), GOOD)]


@pytest.mark.parametrize("row", CHAT_DEMONSTRATIONS, ids=str)
def test_chat_demonstrations(tmp_path: Path, row: dict) -> None:
    assert only_group(tmp_path, row, chat(), FIRST) == [question(chat()), ended(chat(), GOOD)]


def test_an_instruction_and_its_input_are_one_user_turn(tmp_path: Path) -> None:
    through_template = only_group(tmp_path, INSTRUCTION, chat(), FIRST)
    assert through_template == [question(chat(), "is it\nok?"), ended(chat(), GOOD)]

    prompt = ids(plain(), "is it\nok?\n\n", special=True)
    assert only_group(tmp_path, INSTRUCTION, plain(), FIRST) == [prompt, ended(plain(), GOOD)]


def test_the_loss_of_a_chat_is_on_its_last_answer(tmp_path: Path) -> None:
    row = {"messages": [*TALK, assistant("first"), {"role": "user", "content": "and?"}, assistant(GOOD)]}
    before = template(chat(), ("user", USER), ("assistant", "first"), ("user", "and?"), ask=True)
    assert only_group(tmp_path, row, chat(), FIRST) == [ids(chat(), before), ended(chat(), GOOD)]


@pytest.mark.parametrize("bos", [True, False])
def test_running_text_is_predicted_from_its_first_token_on(tmp_path: Path, bos: bool) -> None:
    tokenizer = tiny.make_tokenizer(bos=bos)
    whole = ids(tokenizer, TEXT, special=True)
    prompt, completion = only_group(tmp_path, {"text": TEXT}, tokenizer, FIRST)
    assert prompt == whole[:1]
    assert completion == [*whole[1:], tokenizer.eos_token_id]


def test_every_form_is_tested() -> None:
    rows = [*STRING_PAIRS, *CHAT_PAIRS, *PLAIN_DEMONSTRATIONS, *CHAT_DEMONSTRATIONS, INSTRUCTION]
    rows.append({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT})
    rows.append({"text": TEXT})
    tested = {form_of_columns(row) for row in rows}
    assert tested == set(FORMS)


def form_of_columns(row: dict) -> tuple[str, ...]:
    return next(form for form in FORMS if all(name in row for name in form))


MISTAKES = [
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing for prompt + chosen + rejected"),
    ('{"a": 1}', "unknown columns a"),
    ('{"prompt": "a", "chosen": "b", "rejected": null}', "line 1: field 'rejected' is null"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}', "line 2: field 'rejected' is"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"chosen": "b", "rejected": "c"}', "line 2: field 'prompt'"),
    ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 1: field 'rejected' is of type int"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": ', "line 3: not valid JSON"),
    ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}',
     "line 1: fields 'chosen' and 'rejected' must both be text or both be messages"),
    ("[1, 2", "not valid JSON"),
    ('["a"]', "row 1: a row must be an object"),
    ("", "no rows"),
    ('{"messages": []}', "field 'messages' has no messages"),
    ('{"messages": [{"role": "User", "content": "a"}]}', "message 0: unknown role 'User'; write 'user'"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 0: unknown role ['user']"),
    ('{"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "human", "value": "b"}, '
     '"rejected": {"from": "gpt", "value": "c"}}', "line 1: a completion must begin with a message of the assistant"),
    ('{"prompt": "a", "completions": ["b", "c"], "finished": false}', "field 'finished' must hold 2 booleans"),
    ('{"prompt": "a", "completions": ["b", "c"], "finished": [1, 0]}', "field 'finished' must hold 2 booleans"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "reference_samples": ["d"], "reference_samples_finished": []}',
     "field 'reference_samples_finished' must hold 1 booleans"),
    ('{"messages": [{"role": "user"}]}', "message 0: content must be text, not NoneType"),
    ('{"prompt": "a", "completion": "b"}', "line 1: this run needs chosen and rejected"),
    ('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": "a", "completions": ["b"]}', "line 2: this run"),
    ('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": "a", "completions": ["b", "c", "d"]}', "line 2: 3 "),
    ('{"prompt": "a", "completions": ["b", "c"], "scores": [1]}', "field 'scores' must hold 2 numbers"),
    ('{"prompt": "a", "completions": ["b", "c"], "scores": ["x", 1]}', "field 'scores' must hold finite numbers"),
    ('{"prompt": "a", "completions": "b"}', "field 'completions' is of type str"),
    ('{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 2}', "field 'labels' is 2"),
    ('{"prompt": "a", "chosen": " ", "rejected": "c"}', "no usable row; rows 1, kept 0, dropped: empty completion 1"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", MISTAKES, ids=lambda value: value[:60])
def test_mistakes_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if text.startswith("["):
        path = tmp_path / "rows.json"
    path.write_text(text)

    problem = problem_of(lambda: load(str(path), plain()))
    assert message in problem
    assert str(path) in problem


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    problem = problem_of(lambda: only_group(tmp_path, CHAT_PAIRS[0], plain()))
    assert "no chat template" in problem


def problem_of(function: Callable[[], Any]) -> str:
    """The one line of the UserError that a function raises."""
    with pytest.raises(UserError) as error:
        function()
    problem = str(error.value)
    assert "\n" not in problem
    return problem
