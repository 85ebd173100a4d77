"""Columns beside those of a form: each is used, refused, or named."""

import json
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
    write,
)

from scripts.lab.policies import plain_prompt
from scripts.lab.row_files import encode_rows, first_examples, read_examples, summary
from scripts.lab.sampling import as_written
from shared import UserError
from shared.encode import Encoder
from shared.groups import Requires, describe
from shared.rows import DEMONSTRATIONS, FORMS, PROMPT_FORMS, Counts, UserTurn, form_of

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
    counts = Counts()
    assert len(list(read_examples(source, counts))) == 1
    assert summary(source, 1, counts) == "rows 1, kept 1; not used: id"

    first_examples(source, 1)
    assert capsys.readouterr().err == f"{source}: rows 1, kept 1; not used: id\n"


PROMPT_ALONE = {"prompt": TALK}
FORM_ROWS = [
    {"conversations": SHARE_GPT, "chosen": {"from": "gpt", "value": GOOD}, "rejected": [{"from": "gpt", "value": BAD}]},
    {"instruction": USER, "chosen": GOOD, "rejected": BAD},
    {"prompt": TALK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    {"prompt": USER, "chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"prompt": TALK, "chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"messages": TALK, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
    {"messages": [*TALK, assistant(GOOD)], "chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
    {"prompt": TALK, "completions": [GOOD, BAD]},
    {"history": USER, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    {"messages": [*TALK, assistant("ok"), *TALK, assistant(GOOD)]},
    {"prompt": TALK, "completion": [assistant(GOOD), *TALK, assistant(BAD)]},
    {"conversations": [*SHARE_GPT, {"from": "gpt", "value": GOOD}]},
    {"instruction": USER, "output": GOOD},
    {"text": GOOD},
    PROMPT_ALONE,
]
CAPTION = {"caption": "x"}  # a column, or a field of a message, that nothing reads


def messages_of(row: dict) -> list[dict]:
    """The messages of a row, each once."""
    messages: list[dict] = []
    for value in row.values():
        values = value if isinstance(value, list) else [value]
        messages += [part for part in values if isinstance(part, dict) and part not in messages]
    return messages


def with_field(value: Any, message: dict) -> Any:
    """A row or a part of it with another field in each message that is like this one."""
    if value == message:
        return {**message, **CAPTION}
    if isinstance(value, list):
        return [with_field(part, message) for part in value]
    if isinstance(value, dict):
        return {name: with_field(part, message) for name, part in value.items()}
    return value


def is_sampled(message: dict) -> bool:
    """Whether it belongs to the prompt, in rows of one turn."""
    return message.get("role") == "user" or message.get("from") == "human"


def sampling_line(source: str) -> str:
    """What sampling says about its rows."""
    encoder = Encoder(chat())
    kept = len(list(encode_rows(read_examples(source, encoder.counts), encoder, 500)))
    return summary(source, kept, encoder.counts)


def test_every_form_has_a_row() -> None:
    forms = {form_of(row, "", PROMPT_FORMS) for row in FORM_ROWS}
    assert forms == set(PROMPT_FORMS) == {*FORMS, ("prompt",)}


@pytest.mark.parametrize("row", FORM_ROWS, ids=str)
def test_an_unknown_column_of_every_form_is_named(tmp_path: Path, row: dict) -> None:
    source = write(tmp_path / "rows.jsonl", [{**row, **CAPTION}])
    if row != PROMPT_ALONE:
        assert describe(load(source, chat(), FIRST).report).endswith("; not used: caption")
    if "text" not in row:
        assert sampling_line(source).endswith("; not used: caption")


@pytest.mark.parametrize("row", [row for row in FORM_ROWS if messages_of(row)], ids=str)
def test_an_unknown_field_of_every_message_is_named(tmp_path: Path, row: dict) -> None:
    expected = "rows 1, kept 1; not used: caption of messages"
    for message in messages_of(row):
        source = write(tmp_path / "rows.jsonl", [with_field(row, message)])
        if row != PROMPT_ALONE:
            requires = FIRST if "completion" in row or len(row) == 1 else Requires()
            assert describe(load(source, chat(), requires).report) == expected
        if is_sampled(message):
            assert sampling_line(source) == expected


# ---------------------------------------------------------------- tools

TOOLS = [{"type": "function", "function": {"name": "f", "description": "a</s>", "parameters": {}}}]
WITH_TOOLS = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + tiny.CHATML
CHATS = [{**PAIR, "prompt": TALK}, {"messages": [*TALK, assistant(GOOD)]}]
NO_TOOLS = [None, [], "", "[]", " [] ", "null"]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
@pytest.mark.parametrize("row", CHATS, ids=str)
def test_tools_are_for_the_template(tmp_path: Path, row: dict, tools: object) -> None:
    tokenizer = with_template(WITH_TOOLS)
    source = write(tmp_path / "rows.jsonl", [{**row, "tools": tools}])
    groups = load(source, tokenizer, FIRST)
    prompt = groups.tokens[: groups.offsets[0, 1]].tolist()
    assert tokenizer.decode(prompt) == json.dumps(TOOLS) + template(chat(), ("user", USER), ask=True)
    assert tokenizer.convert_tokens_to_ids("</s>") not in prompt
    assert "not used" not in groups.report
    assert load(source, chat(), FIRST).report["not used"] == ["tools"]


@pytest.mark.parametrize("tools", NO_TOOLS, ids=str)
@pytest.mark.parametrize("row", CHATS, ids=str)
def test_no_tools(tmp_path: Path, row: dict, tools: object) -> None:
    source = write(tmp_path / "rows.jsonl", [{**row, "tools": tools}])
    tokenizer = with_template(WITH_TOOLS)
    prompt, _ = only_group(tmp_path, {**row, "tools": tools}, tokenizer, FIRST)
    assert tokenizer.decode(prompt) == template(chat(), ("user", USER), ask=True)
    assert "not used" not in load(source, chat(), FIRST).report


@pytest.mark.parametrize(
    "tools, problem",
    [
        (3, "field 'tools' must be a list of schemas"),
        (TOOLS[0], "field 'tools' must be a list of schemas"),
        (["f"], "field 'tools' must be a list of schemas"),
        (json.dumps(TOOLS[0]), "field 'tools' must be a list of schemas"),
        ("f(x)", "field 'tools' is text, but not JSON"),
    ],
    ids=str,
)
def test_tools_that_are_refused(tmp_path: Path, tools: object, problem: str) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: {problem}"):
        only_group(tmp_path, {**CHATS[0], "tools": tools}, with_template(WITH_TOOLS), FIRST)


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


# ---------------------------------------------------------------- fields of messages

WHOLE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + (':' + message.name if message.name else '') + '\n' }}"
    "{% if message.reasoning_content %}{{ '(' + message.reasoning_content + ')' }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '[' + call.function.name + call.function.arguments + ']' }}"
    "{% endfor %}{{ message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_KNOWN = (
    "{% for message in messages %}{% if message.role in ['user', 'assistant'] %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def with_template(text: str) -> Any:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = text
    return tokenizer


def decoded(folder: Path, row: dict, tokenizer: Any, requires: Requires = FIRST) -> list[str]:
    return [tokenizer.decode(piece) for piece in only_group(folder, row, tokenizer, requires)]


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ASK = "<|im_start|>assistant\n"
CONTENT_PARTS = [{"type": "text", "text": "is it"}, {"type": "text", "text": " ok?", "image": None}]
WHOLE_MESSAGES = [  # messages before the answer, what the template makes of them
    ([*TALK, CALLING, {"role": "tool", "content": "1"}],
     turn("user", USER) + turn("assistant", "[f{}]") + turn("tool", "1")),
    ([{"role": "developer", "content": "be kind"}, *TALK], turn("developer", "be kind") + turn("user", USER)),
    ([{"role": "user", "content": USER, "name": "eve", "tool_calls": None}], turn("user:eve", USER)),
    ([{"role": "user", "content": CONTENT_PARTS}], turn("user", USER)),
    ([{"role": "user", "content": ["is it", " ok?"]}], turn("user", USER)),
    ([*TALK, {**CALLING, "content": ""}, {"from": "observation", "value": "1"}],
     turn("user", USER) + turn("assistant", "[f{}]") + turn("observation", "1")),
]  # fmt: skip


@pytest.mark.parametrize("messages, rendered", WHOLE_MESSAGES, ids=str)
def test_the_template_sees_whole_messages(tmp_path: Path, messages: list[dict], rendered: str) -> None:
    row = {"messages": [*messages, assistant(GOOD)]}
    expected = [rendered + ASK, GOOD + "<|im_end|>"]
    assert decoded(tmp_path, row, with_template(WHOLE)) == expected


def test_fields_of_an_answer_are_trained_on(tmp_path: Path) -> None:
    chosen = [{**assistant(GOOD), "reasoning_content": "so it is"}]
    row = {"prompt": TALK, "chosen": chosen, "rejected": [CALLING]}
    expected = [turn("user", USER) + ASK, f"(so it is){GOOD}<|im_end|>", "[f{}]<|im_end|>"]
    assert decoded(tmp_path, row, with_template(WHOLE), Requires()) == expected


def test_special_tokens_in_fields_of_messages_are_plain_text(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "</s>"}'}}
    messages = [{**TALK[0], "name": "<|im_end|>"}, {**CALLING, "tool_calls": [call]}, *TALK, assistant(GOOD)]
    tokenizer = with_template(WHOLE)
    prompt, _ = only_group(tmp_path, {"messages": messages}, tokenizer, FIRST)
    special = set(tokenizer.all_special_ids) | {i for i in tokenizer.added_tokens_decoder}
    assert [tokenizer.decode([i]) for i in prompt if i in special] == ["<|im_start|>", "<|im_end|>"] * 3 + [
        "<|im_start|>"
    ]
    assert '[f{"a": "</s>"}]' in tokenizer.decode(prompt)


def test_fields_that_the_template_does_not_name_are_named(tmp_path: Path) -> None:
    answer = {**assistant(GOOD), "reasoning_content": "so", "weight": 1, "id": None}
    source = write(tmp_path / "rows.jsonl", [{"messages": [*TALK, answer]}])
    assert load(source, chat(), FIRST).report["not used"] == ["reasoning_content of messages"]
    assert "not used" not in load(source, with_template(WHOLE), FIRST).report


def drops(folder: Path, rows: list[dict], tokenizer: Any, requires: Requires = FIRST) -> dict:
    """The drops of rows, which stand before a row that is kept."""
    kept = {name: rows[0].get(name, "") for name in rows[0]}
    kept |= {"messages": [*TALK, assistant("kept")]}
    return load(write(folder / "rows.jsonl", [*rows, kept]), tokenizer, requires).report["dropped"]


def test_a_role_that_the_template_does_not_render_drops_its_row(tmp_path: Path) -> None:
    messages = [*TALK, {"role": "tool", "content": "1 and 2"}, assistant(GOOD)]
    dropped = drops(tmp_path, [{"messages": messages}], with_template(ONLY_KNOWN))
    assert dropped == {"the chat template leaves out the role 'tool'": 1}

    raising = ONLY_KNOWN.replace("{% endif %}", "{% else %}{{ raise_exception('no tools') }}{% endif %}", 1)
    dropped = drops(tmp_path, [{"messages": messages}], with_template(raising))
    assert dropped == {"refused by the chat template (no tools)": 1}


@pytest.mark.parametrize("weight, dropped", [(0, {"weight 0": 1}), (0.0, {"weight 0": 1}), (1, {}), (None, {})])
def test_an_answer_of_weight_zero_is_not_trained_on(tmp_path: Path, weight: float | None, dropped: dict) -> None:
    answer = {**assistant(GOOD), "weight": weight}
    assert drops(tmp_path, [{"messages": [*TALK, answer]}], chat()) == dropped
    earlier = [*TALK, {**assistant(BAD), "weight": weight}, *TALK, assistant(GOOD)]
    assert drops(tmp_path, [{"messages": earlier}], chat()) == {}


MESSAGE_MISTAKES = [
    ({"role": "User", "content": "a"}, "message 0: unknown role 'User'; write 'user'"),
    ({"role": "", "content": "a"}, "message 0: unknown role ''"),
    ({"from": 3, "value": "a"}, "message 0: unknown role 3"),
    ({"role": "assistant", "content": None, "tool_calls": []}, "message 0: content must be text, not NoneType"),
    ({"role": "user", "content": []}, "message 0: content must be text, not list"),
    ({"role": "user", "content": [3]}, "message 0: a part of content must be text, not int"),
    ({"role": "user", "content": [{"type": "image", "url": "a.png"}]}, "only parts of text are read"),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "only parts of text are read"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, "only parts of text are read"),
    ({"role": "user", "content": "a", "images": ["a.png"]}, "message 0: field 'images' is not empty"),
]


@pytest.mark.parametrize("message, problem", MESSAGE_MISTAKES, ids=str)
def test_messages_that_are_refused(tmp_path: Path, message: dict, problem: str) -> None:
    with pytest.raises(UserError, match=f"line 1: field 'messages', .*{problem}"):
        only_group(tmp_path, {"messages": [message, assistant(GOOD)]}, chat(), FIRST)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("name, value", [("images", ["a.png"]), ("image", {"bytes": "00"}), ("videos", "a.mp4")])
@pytest.mark.parametrize("row", [PAIR, {"messages": [*TALK, assistant(GOOD)]}, {"text": "ok"}], ids=str)
def test_pictures_end_the_run(tmp_path: Path, row: dict, name: str, value: object) -> None:
    source = write(tmp_path / "rows.jsonl", [row, {**row, name: value}])
    with pytest.raises(UserError, match=f"line 2: field '{name}' is not empty, but only text is read"):
        load(source, chat(), FIRST)


@pytest.mark.parametrize("value", [None, [], [None], "", {"bytes": None, "path": None}])
def test_no_pictures_are_fine(tmp_path: Path, value: object) -> None:
    row = {**PAIR, "images": value, "image": value}
    assert only_group(tmp_path, row, plain()) == only_group(tmp_path, PAIR, plain())


# ---------------------------------------------------------------- prompts and answers under other names


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "completion": GOOD},
        {"messages": [*TALK, assistant(GOOD)]},
        {"instruction": USER, "output": GOOD},
    ],
    ids=str,
)
@pytest.mark.parametrize("label, dropped", [(False, {"label is false": 1}), (True, {}), (0, {}), (None, {})])
def test_an_answer_labelled_false_is_not_trained_on(tmp_path: Path, row: dict, label: object, dropped: dict) -> None:
    source = write(tmp_path / "rows.jsonl", [{**row, "label": label}, row])
    report = load(source, chat(), FIRST).report
    assert report["dropped"] == dropped
    assert report.get("not used") == (["label"] if label == 0 and label is not False else None)


@pytest.mark.parametrize("row", [row for row in FORM_ROWS if form_of(row, "", PROMPT_FORMS) in DEMONSTRATIONS], ids=str)
def test_labels_are_the_scores_of_groups_of_one(tmp_path: Path, row: dict) -> None:
    """So that an algorithm for unpaired rows can read them."""
    rows = [{**row, "label": label} for label in (True, False, False)]
    requires = Requires("first", scores=True)
    groups = load(write(tmp_path / "rows.jsonl", rows), chat(), requires)
    assert groups.num_completions == 1
    assert groups.scores.tolist() == [[[1.0]], [[0.0]], [[0.0]]]
    assert groups.report["dropped"] == {}
    assert "not used" not in groups.report

    source = write(tmp_path / "rows.jsonl", [*rows, row])
    with pytest.raises(UserError, match="line 4: this run needs scores"):
        load(source, chat(), requires)
    report = load(source, chat(), FIRST).report
    assert report["dropped"] == {"label is false": 2}


SECOND = {"role": "user", "content": "and?"}
WHOLE_PAIR = {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]}
LONE_PAIR = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
DICT_PAIR = {"chosen": assistant(GOOD), "rejected": assistant(BAD)}
TEXT_PAIR = {"chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, **LONE_PAIR},
        {"messages": TALK, **DICT_PAIR},
        {"messages": TALK, **TEXT_PAIR},
        {"messages": TALK, **WHOLE_PAIR},
        {"messages": WHOLE_PAIR["chosen"], **WHOLE_PAIR},
        {"messages": WHOLE_PAIR["rejected"], **WHOLE_PAIR},
        {"conversations": SHARE_GPT, **LONE_PAIR},
        {"conversations": SHARE_GPT, **TEXT_PAIR},
        {"prompt": TALK, **DICT_PAIR},
        {"prompt": USER, **DICT_PAIR},
        {"prompt": f"{USER}\n", **WHOLE_PAIR},
        {"prompt": "", **WHOLE_PAIR},
        WHOLE_PAIR,
    ],
    ids=str,
)
def test_the_prompt_of_a_pair(tmp_path: Path, row: dict) -> None:
    expected = [question(chat()), ended(chat(), GOOD), ended(chat(), BAD)]
    assert only_group(tmp_path, row, chat()) == expected


def test_transcripts_beside_messages_hold_their_prompt(tmp_path: Path) -> None:
    talk = "\n\nHuman: a\n\nAssistant:"
    row = {"chosen": f"{talk} ok", "rejected": f"{talk} no"}
    assert only_group(tmp_path, {"messages": TALK, **row}, chat()) == only_group(tmp_path, row, chat())


def test_a_text_prompt_may_be_any_turn_of_the_user(tmp_path: Path) -> None:
    talk = [*TALK, assistant("ok"), SECOND]
    pair = {"chosen": [*talk, assistant(GOOD)], "rejected": [*talk, assistant(BAD)]}
    expected = only_group(tmp_path, pair, chat())
    for prompt in (USER, "and?"):
        assert only_group(tmp_path, {"prompt": prompt, **pair}, chat()) == expected


PREFILLED = [*TALK, assistant("Sure,")]
PROMPT_MISTAKES = [
    ({"prompt": "other?", **WHOLE_PAIR}, "'chosen' and 'rejected' have no turn of the user like 'prompt'"),
    ({"prompt": GOOD, **WHOLE_PAIR}, "'chosen' and 'rejected' have no turn of the user like 'prompt'"),
    ({"prompt": PREFILLED, **LONE_PAIR}, "line 1: the prompt ends with a message of the assistant"),
    ({"messages": PREFILLED, **TEXT_PAIR}, "line 1: the prompt ends with a message of the assistant"),
    ({"prompt": PREFILLED, "completions": [GOOD, BAD]}, "line 1: the prompt ends with a message of the assistant"),
    ({"prompt": PREFILLED, "completion": GOOD}, "line 1: the prompt ends with a message of the assistant"),
    ({"question": USER, **LONE_PAIR}, "line 1: chosen has no prompt; is it in `question`?"),
    ({"question": USER, **DICT_PAIR}, "line 1: chosen has no prompt; is it in `question`?"),
    ({"input": TALK, "id": 7, **LONE_PAIR}, "line 1: chosen has no prompt; is it in `input`?"),
    ({"system": SYSTEM, "question": USER, **TEXT_PAIR}, "line 1: chosen has no prompt; is it in `question`?"),
    ({"query": USER, "source": "web", **TEXT_PAIR}, "line 1: chosen has no prompt; is it in `query` or `source`?"),
    (LONE_PAIR, r"line 1: chosen has no prompt \(form"),
]  # fmt: skip


@pytest.mark.parametrize("row, message", PROMPT_MISTAKES, ids=str)
def test_prompts_that_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    source = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load(source, chat(), FIRST)


# ---------------------------------------------------------------- scores

SCORED = {"prompt": USER, "completions": [BAD, GOOD], "scores": [0, 1]}
UNSCORED = {"prompt": "a", "completions": [BAD, GOOD], "scores": None}
NO_COLUMN = {"prompt": "a", "completions": [BAD, GOOD]}


@pytest.mark.parametrize("requires", [Requires(), Requires("pair"), FIRST], ids=str)
@pytest.mark.parametrize("rows", [[SCORED, UNSCORED], [SCORED, NO_COLUMN], [SCORED, SCORED, UNSCORED]], ids=str)
def test_scores_missing_in_one_row(tmp_path: Path, rows: list[dict], requires: Requires) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=f"line {len(rows)}: no scores, but earlier rows have them"):
        load(source, plain(), requires)


@pytest.mark.parametrize("rows", [[UNSCORED, SCORED], [NO_COLUMN, NO_COLUMN, SCORED]], ids=str)
def test_scores_in_one_row_only(tmp_path: Path, rows: list[dict]) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=f"line {len(rows)}: scores, but earlier rows have none"):
        load(source, plain())


def test_the_order_of_a_pair_needs_no_scores(tmp_path: Path) -> None:
    rows = [{**PAIR, "score_chosen": 2, "score_rejected": 1}, {**PAIR, "prompt": "a", "score_chosen": None}]
    assert len(load(write(tmp_path / "rows.jsonl", rows), plain())) == 2


@pytest.mark.parametrize(
    "columns, name",
    [
        ({"score_chosen": "8.5", "score_rejected": "3"}, "score_chosen"),
        ({"score_chosen": 8.5, "score_rejected": float("nan")}, "score_rejected"),
        ({"score_chosen": True, "score_rejected": False}, "score_chosen"),
        ({"score_chosen": 1, "score_rejected": 1e39}, "score_rejected"),
    ],
    ids=str,
)
def test_a_score_of_a_pair_is_named(tmp_path: Path, columns: dict, name: str) -> None:
    with pytest.raises(UserError, match=f"line 1: field '{name}' must be a finite number of float32"):
        only_group(tmp_path, {**PAIR, **columns}, plain())


def test_booleans_are_no_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: field 'scores' must hold finite numbers"):
        only_group(tmp_path, {**SCORED, "scores": [True, False]}, plain())


def test_ties_and_reversals_of_pairs_are_counted_and_kept(tmp_path: Path) -> None:
    scores = [(5, 5), (1, 9), (2, 9), (9, 1), (None, 1)]
    rows = []
    for number, (chosen, rejected) in enumerate(scores):
        rows.append({**PAIR, "prompt": f"{number}", "score_chosen": chosen, "score_rejected": rejected})
    rows.append({**PAIR, "scores": [[1, 2], [2, 2]]})
    source = write(tmp_path / "rows.jsonl", rows)

    report = load(source, plain()).report
    assert describe(report) == "rows 6, kept 6; scores against the order 3; tied scores 1"
    assert report["tied scores"] == 1
    assert load(source, plain(), FIRST).report["scores against the order"] == 3


def test_scores_in_the_order_of_a_pair_are_not_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{**PAIR, "score_chosen": 9, "score_rejected": 1}])
    assert describe(load(source, plain()).report) == "rows 1, kept 1"
