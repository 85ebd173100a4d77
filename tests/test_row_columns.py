"""Columns beside those of a form: each is used, refused, or named."""

from collections import Counter
from pathlib import Path

import pytest
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
    write,
)

from scripts.lab.policies import plain_prompt
from scripts.lab.row_files import first_examples, read_examples, summary
from scripts.lab.sampling import as_written
from shared import UserError
from shared.encode import Encoder
from shared.groups import Requires, describe
from shared.rows import UserTurn

# ---------------------------------------------------------------- columns that are not used

DEMONSTRATION = {"prompt": USER, "completion": GOOD}
RANKED = {"prompt": USER, "completions": [GOOD, "no"], "scores": [2, 1]}


@pytest.mark.parametrize(
    "row, requires, names",
    [
        ({**PAIR, "source": "web", "id": 7}, Requires(), ["id", "source"]),
        ({**PAIR, "finished": [True, True], "flag": False}, Requires(), ["finished", "flag"]),
        ({**PAIR, "input": "x", "messages": TALK}, Requires(), ["input", "messages"]),
        ({**PAIR, "score_chosen": 2, "score_rejected": 1}, Requires(), None),
        ({**RANKED, "finished": [True, False]}, Requires(), None),
        ({**RANKED, "score_chosen": 2}, Requires(), ["score_chosen"]),
        ({**DEMONSTRATION, "scores": [1], "tools": [{"name": "f"}]}, FIRST, ["scores", "tools"]),
        ({**DEMONSTRATION, "id": None, "source": "", "tools": [], "meta": {"a": [None]}}, FIRST, None),
    ],
    ids=str,
)
def test_columns_that_are_not_used_are_named(
    tmp_path: Path, row: dict, requires: Requires, names: list[str] | None
) -> None:
    report = load(write(tmp_path / "rows.jsonl", [row]), plain(), requires).report
    assert report.get("not used") == names
    if names:
        assert describe(report).endswith(f"; not used: {', '.join(names)}")
    else:
        assert "not used" not in describe(report)


def test_a_column_of_a_later_row_is_named_once(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": "ok", "id": 1}, {**PAIR, "rejected": "a", "id": 2, "source": "web"}]
    report = load(write(tmp_path / "rows.jsonl", rows), plain()).report
    assert describe(report) == "rows 3, kept 3; not used: id, source"


def test_the_scripts_name_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", [{**PAIR, "id": 7}])
    unused: set[str] = set()
    assert len(list(read_examples(source, Counter(), unused=unused))) == 1
    assert summary(source, 1, Counter(), unused) == "rows 1, kept 1; not used: id"

    first_examples(source, 1)
    assert capsys.readouterr().err == f"{source}: rows 1, kept 1; not used: id\n"


# ---------------------------------------------------------------- system and history

SYSTEM = "be brief"
EARLIER = [("user", "first?"), ("assistant", "ok")]
CHAT_ROWS = [
    {"instruction": USER, "input": "", "output": GOOD},
    {"instruction": USER, "chosen": GOOD, "rejected": BAD},
    {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    {"prompt": USER, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"prompt": TALK, "completions": [GOOD, BAD]},
    {"messages": [*TALK, assistant(GOOD)]},
    {"conversations": [*SHARE_GPT, {"from": "gpt", "value": GOOD}]},
]


@pytest.mark.parametrize("row", CHAT_ROWS, ids=str)
def test_system_and_history_come_before_the_prompt(tmp_path: Path, row: dict) -> None:
    def prompt_with(**columns: object) -> list[int]:
        prompt, completion = only_group(tmp_path, {**row, **columns}, chat(), FIRST)
        assert completion == ended(chat(), GOOD)
        return prompt

    system = ("system", SYSTEM)
    user = ("user", USER)
    history = [["first?", "ok"]]
    with_system = template(chat(), system, user, ask=True)
    assert prompt_with(system=SYSTEM) == ids(chat(), with_system)
    assert prompt_with(history=history) == ids(chat(), template(chat(), *EARLIER, user, ask=True))
    everything = template(chat(), system, *EARLIER, user, ask=True)
    assert prompt_with(system=SYSTEM, history=history) == ids(chat(), everything)
    assert prompt_with(system=None, history=[]) == prompt_with(system="", history=None) == question(chat())


def test_a_system_message_may_be_repeated_in_its_column(tmp_path: Path) -> None:
    message = {"role": "system", "content": SYSTEM}
    row = {"messages": [message, *TALK, assistant(GOOD)], "history": [["first?", "ok"]]}
    everything = template(chat(), ("system", SYSTEM), *EARLIER, ("user", USER), ask=True)
    for columns in ({}, {"system": SYSTEM}):
        assert only_group(tmp_path, {**row, **columns}, chat(), FIRST)[0] == ids(chat(), everything)


def test_a_system_message_alone_is_a_prompt(tmp_path: Path) -> None:
    row = {"messages": [assistant(GOOD)], "system": SYSTEM}
    expected = ids(chat(), template(chat(), ("system", SYSTEM), ask=True))
    assert only_group(tmp_path, row, chat(), FIRST) == [expected, ended(chat(), GOOD)]


CONTEXT_MISTAKES = [
    ({**PAIR, "system": SYSTEM}, "line 1: field 'system' has no place before plain text"),
    ({**PAIR, "history": [["a", "b"]]}, "line 1: field 'history' has no place before plain text"),
    ({"text": "ok", "system": SYSTEM}, "line 1: field 'system' has no place before plain text"),
    ({**CHAT_ROWS[1], "system": 3}, "line 1: field 'system' is of type int"),
    ({**CHAT_ROWS[1], "history": "first?"}, "line 1: field 'history' is of type str"),
    ({**CHAT_ROWS[1], "history": [["first?"]]}, "line 1: field 'history' must hold pairs"),
    ({"messages": [{"role": "system", "content": "a"}, *TALK, assistant(GOOD)], "system": SYSTEM},
     "line 1: field 'system' differs from the system message"),
]  # fmt: skip


@pytest.mark.parametrize("row, message", CONTEXT_MISTAKES, ids=str)
def test_a_context_without_a_place_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        only_group(tmp_path, row, chat(), FIRST)


@pytest.mark.parametrize("columns, name", [({"system": SYSTEM}, "system"), ({"history": [["a", "b"]]}, "history")])
def test_a_context_needs_a_chat_template(tmp_path: Path, columns: dict, name: str) -> None:
    row = {**CHAT_ROWS[0], **columns}
    with pytest.raises(UserError, match=f"line 1: field '{name}' has no place in plain text"):
        only_group(tmp_path, row, plain(), FIRST)


def test_a_context_is_written_into_sampled_rows() -> None:
    turn = UserTurn(USER, ({"role": "system", "content": SYSTEM},))
    expected = [{"role": "system", "content": SYSTEM}, *TALK]
    assert as_written(turn, Encoder(chat())) == expected
    assert plain_prompt(turn) == expected
