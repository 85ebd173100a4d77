"""Completions of several turns, by chat templates of every shape: which tokens count, and what stands between them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shapes import (
    CHATML,
    ONE_TURN,
    QUESTION,
    R1,
    SHAPES,
    THREE_TURNS,
    Expected,
    Shape,
    make_tokenizer,
    marked,
    tokenizer_of,
    tool,
    user,
)
from tokenised import (
    BAD,
    FIRST,
    GOOD,
    RANKING,
    TALK,
    assistant,
    chat,
    load,
    plain,
    write,
)
from transformers.utils import chat_template_utils

from scripts.lab.row_files import encode_rows, read_examples
from shared.batches import Batches
from shared.distributed import Ranks
from shared.encode import Encoder, end_ids
from shared.groups import Groups, Requires

ALL_TURNS = Requires("first", turns="all")


def completions(groups: Groups, i: int = 0) -> list[Expected]:
    """The prompt of a group with each of its completions."""
    offsets = groups.offsets[i].tolist()
    prompt = groups.tokens[offsets[0] : offsets[1]].tolist()
    pieces = []
    for start, end in zip(offsets[1:], offsets[2:], strict=False):
        pieces.append(Expected(prompt, groups.tokens[start:end].tolist(), groups.is_counted[start:end].tolist()))
    return pieces


def load_row(folder: Path, row: dict, tokenizer: Any, requires: Requires = FIRST) -> Groups:
    return load(write(folder / "rows.jsonl", [row]), tokenizer, requires)


def notes(groups: Groups) -> dict:
    """What the report says beside the number of rows."""
    usual = ("source", "rows", "kept", "dropped", "sha256")
    return {name: value for name, value in groups.report.items() if name not in usual}


# ---------------------------------------------------------------- templates of every shape


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("completion, text", [(ONE_TURN, "one"), (THREE_TURNS, "three")], ids=["one", "three"])
def test_templates_of_every_shape(tmp_path: Path, name: str, completion: list[dict], text: str) -> None:
    tokenizer = tokenizer_of(name)
    shape = SHAPES[name]
    groups = load_row(tmp_path, {"prompt": QUESTION, "completion": completion}, tokenizer)
    assert completions(groups) == [marked(tokenizer, getattr(shape, text))]
    assert notes(groups) == dict.fromkeys(shape.notes, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_what_ends_a_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert end_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(list(SHAPES[name].ends)))


# ---------------------------------------------------------------- other templates

CALL = {"function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": "so", "tool_calls": [CALL]}
# a message that calls ends with another token
TWO_ENDS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    "{{ '<|eom|>' if message.tool_calls else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_ENDS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
NO_TURNS = "the chat template does not show where a turn begins and ends"


def with_template(text: str, *special: str) -> Any:
    return make_tokenizer(Shape(text, ("<|im_start|>", "<|im_end|>", *special), "</s>", (), "", ""))


def drops(folder: Path, rows: list[dict], tokenizer: Any, requires: Requires = FIRST) -> dict:
    """The drops of rows, which stand before one that is kept."""
    kept = {"prompt": QUESTION, "completion": [assistant("kept")]}
    groups = load(write(folder / "rows.jsonl", [*rows, kept]), tokenizer, requires)
    assert len(groups) == len(rows) + 1 - sum(groups.report["dropped"].values())
    return groups.report["dropped"]


def test_the_words_of_a_tool_are_never_counted(tmp_path: Path) -> None:
    """Where a turn does not end as the others do, its end is not looked for behind the tool's."""
    tokenizer = with_template(TWO_ENDS, "<|eom|>")
    row = {"prompt": QUESTION, "completion": [CALLING, tool("42"), assistant("yes")]}
    assert drops(tmp_path, [row], tokenizer) == {NO_TURNS: 1}


# what a tool says stands inside the turn that called it, before its text
FOLDED = (
    "{% for message in messages %}{% if message.role != 'tool' %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.tool_calls %}{{ 'f=' + (loop.nextitem.content if loop.nextitem else '') }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("content", ["so", ""])
def test_the_words_of_a_tool_inside_an_answer_are_never_counted(tmp_path: Path, content: str) -> None:
    row = {"prompt": QUESTION, "completion": [{**CALLING, "content": content}, tool("42"), assistant("yes")]}
    assert drops(tmp_path, [row], with_template(FOLDED)) == {NO_TURNS: 1}


def test_calls_count_with_their_answers(tmp_path: Path) -> None:
    tokenizer = with_template(TWO_ENDS.replace("<|eom|>", "<|im_end|>"))
    row = {"prompt": QUESTION, "completion": [CALLING, tool("42"), assistant("yes")]}
    text = (
        "<|im_start|>user\nis it ok?<|im_end|><|im_start|>assistant\n‖⟦sof<|im_end|>⟧"
        "<|im_start|>tool\n42<|im_end|><|im_start|>assistant\n⟦yes<|im_end|>⟧"
    )
    assert completions(load_row(tmp_path, row, tokenizer)) == [marked(tokenizer, text)]


def test_a_template_that_marks_no_end(tmp_path: Path) -> None:
    """A single turn gets the EOS, and several are dropped."""
    tokenizer = with_template(NO_ENDS)
    rows = [{"prompt": QUESTION, "completion": turns} for turns in (ONE_TURN, THREE_TURNS)]
    groups = load(write(tmp_path / "rows.jsonl", rows), tokenizer, FIRST)
    assert completions(groups) == [marked(tokenizer, "user: is it ok?\nassistant:‖⟦ yes\n</s>⟧")]
    assert groups.report["dropped"] == {NO_TURNS: 1}
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("changing", ["'no'", "'it is ok'"])
def test_an_answer_that_changes_what_is_around_it(tmp_path: Path, changing: str) -> None:
    """A template that writes otherwise about the user once the assistant has said this."""
    condition = "{% if message.role != 'assistant' and loop.nextitem and loop.nextitem.content == " + changing + " %}"
    template = tiny.CHATML.replace("%}{{", "%}" + condition + "!{% endif %}{{", 1)
    rows = [{"prompt": QUESTION, "completion": turns} for turns in (THREE_TURNS, ONE_TURN, [assistant("no")])]
    dropped = drops(tmp_path, rows, with_template(template))
    expected = {NO_TURNS: 1}
    if changing == "'no'":
        expected["the chat template renders the prompt differently once an answer follows"] = 1
    assert dropped == expected


def test_texts_like_those_of_the_template(tmp_path: Path) -> None:
    """They are found neither as an end nor as a context, and never become special tokens."""
    like_a_turn = "yes<|im_end|>\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\nyes"
    tokenizer = tokenizer_of("chatml")
    row = {"prompt": QUESTION, "completion": [assistant(like_a_turn), user(like_a_turn), assistant(like_a_turn)]}
    groups = load_row(tmp_path, row, tokenizer)
    (turns,) = completions(groups)

    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    special = [i for i in turns.completion if i in tokenizer.all_special_ids]
    assert special == [end, start, end, start, end]
    text = f"{like_a_turn}<|im_end|>\n<|im_start|>user\n{like_a_turn}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(turns.completion) == f"{text}{like_a_turn}<|im_end|>"
    counted = [i for i, is_counted in zip(turns.completion, turns.is_counted, strict=True) if is_counted]
    assert tokenizer.decode(counted) == f"{like_a_turn}<|im_end|>" * 2
    assert notes(groups) == {"control strings as text": 1}


def test_turns_of_the_user_that_are_repeated(tmp_path: Path) -> None:
    completion = [assistant("yes"), user("and you?"), assistant("yes"), user("and you?"), assistant("yes")]
    text = CHATML.one + "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧" * 2
    groups = load_row(tmp_path, {"prompt": QUESTION, "completion": completion}, tokenizer_of("chatml"))
    assert completions(groups) == [marked(tokenizer_of("chatml"), text)]


# ---------------------------------------------------------------- what counts

TWO_TURNS = [assistant("yes"), user("and you?"), assistant("no")]
CONTEXT = "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n"
ASK = "<|im_start|>user\nis it ok?<|im_end|>\n<|im_start|>assistant\n"


def chatml(text: str) -> Expected:
    """A completion after QUESTION; in its text `…` is the context between two answers, and `.` the end of a turn."""
    completion = text.replace("…", CONTEXT).replace(".", "<|im_end|>")
    return marked(chat(), f"{ASK}‖{completion}")


def with_weights(messages: list[dict], *weights: float) -> list[dict]:
    """The messages, and a weight for each of the assistant's."""
    remaining = iter(weights)
    weighted = []
    for message in messages:
        if message["role"] == "assistant":
            message = {**message, "weight": next(remaining)}
        weighted.append(message)
    return weighted


@pytest.mark.parametrize(
    "weights, text",
    [((1, 1), "⟦yes.⟧…⟦no.⟧"), ((0, 1), "yes.…⟦no.⟧"), ((1, 0), "⟦yes.⟧"), ((0.0, 1.0), "yes.…⟦no.⟧")],
)
def test_turns_of_weight_zero_are_context(tmp_path: Path, weights: tuple[float, float], text: str) -> None:
    """And as context they are left out where nothing that counts follows."""
    row = {"prompt": QUESTION, "completion": with_weights(TWO_TURNS, *weights)}
    groups = load_row(tmp_path, row, chat())
    assert completions(groups) == [chatml(text)]
    assert notes(groups) == {}


def test_completions_of_weight_zero_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"prompt": QUESTION, "completion": with_weights(TWO_TURNS, 0, 0)},
        {"prompt": QUESTION, "completion": with_weights(ONE_TURN, 0)},
    ]
    assert drops(tmp_path, rows, chat()) == {"weight 0": 2}


WHOLE = "⟦yes.⟧…⟦no.⟧"
NUM_CONTEXT = len(chat()(CONTEXT, add_special_tokens=False)["input_ids"])
NUM_ANSWER = len(chat()("yes", add_special_tokens=False)["input_ids"])
CUT = [
    (NUM_ANSWER + NUM_CONTEXT + 3, WHOLE),
    (NUM_ANSWER + NUM_CONTEXT + 2, "⟦yes.⟧…⟦no⟧"),
    (NUM_ANSWER + NUM_CONTEXT + 1, "⟦yes.⟧"),
    (NUM_ANSWER + NUM_CONTEXT, "⟦yes.⟧"),
    (NUM_ANSWER + 2, "⟦yes.⟧"),
    (NUM_ANSWER + 1, "⟦yes.⟧"),
    (NUM_ANSWER, "⟦yes⟧"),
    (1, "⟦y⟧"),
]


@pytest.mark.parametrize("num_tokens, kept", CUT)
def test_completions_that_are_cut(tmp_path: Path, num_tokens: int, kept: str) -> None:
    """Within an answer, before its end, and at either end of the context, which is then left out."""
    source = write(tmp_path / "rows.jsonl", [{"prompt": QUESTION, "completion": TWO_TURNS}])
    groups = load(source, chat(), FIRST, len(chatml("").prompt) + num_tokens)
    assert completions(groups) == [chatml(kept)]
    assert notes(groups) == ({} if kept == WHOLE else {"completions cut": 1})


def test_a_completion_that_is_cut_before_what_counts_is_dropped(tmp_path: Path) -> None:
    prompt = chatml("").prompt
    completion = with_weights(TWO_TURNS, 0, 1)
    short = {"prompt": QUESTION, "completion": ONE_TURN}
    source = write(tmp_path / "rows.jsonl", [{"prompt": QUESTION, "completion": completion}, short])
    length = len(prompt) + NUM_ANSWER + 1 + NUM_CONTEXT
    report = load(source, chat(), FIRST, length).report
    assert report["dropped"] == {"empty completion after truncation": 1}
    assert len(load(source, chat(), FIRST, length + 1)) == 2


def test_completions_with_different_numbers_of_turns(tmp_path: Path) -> None:
    rejected = [assistant("no"), user("and you?"), assistant("it is ok"), user("and you?"), assistant("a")]
    rows = [
        {"prompt": QUESTION, "chosen": TWO_TURNS, "rejected": rejected},
        {"prompt": QUESTION, "chosen": [assistant("a")], "rejected": TWO_TURNS},
    ]
    groups = load(write(tmp_path / "rows.jsonl", rows), chat())
    assert completions(groups, 0) == [chatml(WHOLE), chatml("⟦no.⟧…⟦it is ok.⟧…⟦a.⟧")]
    assert completions(groups, 1) == [chatml("⟦a.⟧"), chatml(WHOLE)]


# ---------------------------------------------------------------- turns behind the last answer

LATER_TURNS = "turns after the last answer left out"
LATER = [
    {"prompt": QUESTION, "chosen": [*TWO_TURNS, user("thanks")], "rejected": [assistant("a"), user("bye")]},
    {"chosen": [*QUESTION, *TWO_TURNS, user("thanks")], "rejected": [*QUESTION, assistant("a")]},
    {"chosen": [*QUESTION, *TWO_TURNS], "rejected": [*QUESTION, assistant("a"), user("bye"), user("bye")]},
    {"messages": QUESTION, "chosen": TWO_TURNS, "rejected": [assistant("a"), tool("7")]},
]


@pytest.mark.parametrize("row", LATER, ids=str)
def test_pairs_that_end_with_the_user(tmp_path: Path, row: dict) -> None:
    groups = load_row(tmp_path, row, chat(), RANKING)
    assert completions(groups) == [chatml(WHOLE), chatml("⟦a.⟧")]
    assert notes(groups) == {LATER_TURNS: 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*QUESTION, assistant("a"), user("thanks")]},
        {"conversations": [{"from": "human", "value": "is it ok?"}, {"from": "gpt", "value": "a"}, user("thanks")]},
        {"prompt": "is it ok?", "completion": [assistant("a"), user("thanks")]},
    ],
    ids=str,
)
def test_chats_that_end_with_the_user(tmp_path: Path, row: dict) -> None:
    groups = load_row(tmp_path, row, chat())
    assert completions(groups) == [chatml("⟦a.⟧")]
    assert notes(groups) == {LATER_TURNS: 1}


@pytest.mark.parametrize(
    "chosen, rejected", [(" yes\n\nHuman: thanks", " no"), (" yes", " no\n\nHuman: b\n\nHuman: c")]
)
def test_transcripts_that_end_with_the_user(tmp_path: Path, chosen: str, rejected: str) -> None:
    talk = "\n\nHuman: a?\n\nAssistant:"
    groups = load_row(tmp_path, {"chosen": talk + chosen, "rejected": talk + rejected}, plain(), RANKING)
    assert completions(groups) == [marked(plain(), f"<s>{talk}‖⟦{answer}</s>⟧") for answer in (" yes", " no")]
    assert notes(groups) == {LATER_TURNS: 1}


def test_a_text_that_looks_like_a_transcript_is_whole(tmp_path: Path) -> None:
    """Beside a prompt of its own, and behind another prompt."""
    completion = " yes\n\nHuman: thanks"
    for prompt in ("\n\nHuman: a?\n\nAssistant:", "a?"):
        groups = load_row(tmp_path, {"prompt": prompt, "completion": completion}, plain())
        assert completions(groups) == [marked(plain(), f"<s>{prompt}‖⟦{completion}</s>⟧")]
        assert notes(groups) == {}


# ---------------------------------------------------------------- all turns of a chat

SYSTEM = {"role": "system", "content": "a"}
EARLIER = [*QUESTION, assistant("yes"), user("and you?")]
SHARE_GPT = [
    {"from": "human", "value": "is it ok?"},
    {"from": "gpt", "value": "yes"},
    {"from": "human", "value": "and you?"},
    {"from": "gpt", "value": "no"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*QUESTION, *TWO_TURNS]},
        {"conversations": SHARE_GPT},
        {"prompt": EARLIER, "completion": "no"},
        {"prompt": EARLIER, "completion": [assistant("no")]},
        {"prompt": EARLIER, "chosen": [assistant("no")], "rejected": [assistant("a")]},
        {"chosen": [*EARLIER, assistant("no")], "rejected": [*EARLIER, assistant("a")]},
        {"messages": EARLIER, "chosen": "no", "rejected": "a"},
        {"instruction": "and you?", "output": "no", "history": [["is it ok?", "yes"]]},
        {"messages": [user("and you?"), assistant("no")], "history": [["is it ok?", "yes"]]},
        {"prompt": EARLIER, "completions": ["no", "a"]},
    ],
    ids=str,
)
def test_all_turns_of_a_chat(tmp_path: Path, row: dict) -> None:
    assert completions(load_row(tmp_path, row, chat(), ALL_TURNS)) == [chatml(WHOLE)]
    (last,) = completions(load_row(tmp_path, row, chat()))
    assert last == marked(chat(), f"{ASK}yes<|im_end|>{CONTEXT}‖⟦no<|im_end|>⟧")


def test_all_turns_begin_behind_the_system_message(tmp_path: Path) -> None:
    row = {"messages": [SYSTEM, *QUESTION, *with_weights(TWO_TURNS, 0, 1)]}
    expected = marked(chat(), f"<|im_start|>system\na<|im_end|>\n{ASK}‖yes<|im_end|>{CONTEXT}⟦no<|im_end|>⟧")
    assert completions(load_row(tmp_path, row, chat(), ALL_TURNS)) == [expected]


def test_all_turns_of_what_has_no_turns(tmp_path: Path) -> None:
    for row, text in (({"prompt": "a", "completion": "ok"}, "<s>a‖⟦ok</s>⟧"), ({"text": "a ok"}, "<s>‖⟦a ok</s>⟧")):
        assert completions(load_row(tmp_path, row, plain(), ALL_TURNS)) == [marked(plain(), text)]


def test_what_a_policy_drew_follows_its_whole_prompt(tmp_path: Path) -> None:
    row = {"prompt": EARLIER, "completions": ["no", "a"], "finished": [True, False]}
    expected = marked(chat(), f"{ASK}yes<|im_end|>{CONTEXT}‖⟦no<|im_end|>⟧")
    assert completions(load_row(tmp_path, row, chat(), ALL_TURNS)) == [expected]


# ---------------------------------------------------------------- thoughts

LOST = {"thoughts left out by the chat template": 1}
NOT_LOST = {}


@pytest.mark.parametrize(
    "messages, lost",
    [
        ([*QUESTION, assistant("<think>\nso\n</think>\n\nyes"), user("and?"), assistant("no")], LOST),
        ([*QUESTION, {**assistant("yes"), "reasoning_content": "so"}, user("and?"), assistant("no")], LOST),
        # thoughts that the answers or the template say as well
        ([*QUESTION, assistant("<think>\nyes\n</think>\n\nyes"), user("and?"), assistant("no")], LOST),
        ([*QUESTION, {**assistant("yes"), "reasoning_content": "ok"}, user("and?"), assistant("no")], LOST),
        ([*QUESTION, assistant("yes"), user("and?"), assistant("<think>\nso\n</think>\n\nno")], NOT_LOST),
        ([*QUESTION, assistant("yes"), user("and?"), {**assistant("no"), "reasoning_content": "so"}], NOT_LOST),
        ([*QUESTION, assistant("<think>so</think>yes"), tool("7"), assistant("no")], NOT_LOST),
        ([*QUESTION, assistant("<think>\n\n</think>\n\nyes"), user("and?"), assistant("no")], NOT_LOST),
    ],
    ids=str,
)
@pytest.mark.parametrize("requires", [FIRST, ALL_TURNS], ids=["last", "all"])
def test_thoughts_that_a_template_drops_are_counted(
    tmp_path: Path, messages: list[dict], lost: dict, requires: Requires
) -> None:
    groups = load_row(tmp_path, {"messages": messages}, tokenizer_of("qwen 3"), requires)
    assert notes(groups) == lost


@pytest.mark.parametrize("answer", ["<think>so</think>yes", "so</think>yes"])
def test_a_template_that_shows_no_thoughts(tmp_path: Path, answer: str) -> None:
    groups = load_row(tmp_path, {"prompt": QUESTION, "completion": answer}, tokenizer_of("r1"))
    assert completions(groups) == [marked(tokenizer_of("r1"), R1.one)]
    assert notes(groups) == LOST | dict.fromkeys(R1.notes, 1)
    assert notes(load_row(tmp_path, {"prompt": QUESTION, "completion": answer}, chat())) == {}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("value", ["so", "yes", ["so"]], ids=str)
def test_thoughts_in_a_field(tmp_path: Path, name: str, value: object) -> None:
    """A template that shows the field for the last answer alone."""
    template = tiny.CHATML.replace(
        "message['content']", f"(message.{name} or '' if loop.last else '') ~ message.content"
    )
    messages = [*QUESTION, {**assistant("yes"), name: value}, user("and?"), {**assistant("no"), name: value}]
    row = {"messages": messages}
    assert notes(load_row(tmp_path, row, with_template(template))) == LOST
    row = {"messages": [*QUESTION, assistant("yes"), *messages[2:]]}
    assert notes(load_row(tmp_path, row, with_template(template))) == {}
    assert notes(load_row(tmp_path, row, chat())) == {"not used": [f"{name} of messages"], **LOST}


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_thoughts_under_another_name(tmp_path: Path, name: str) -> None:
    """As recent versions of transformers have it, a template finds them under its own name."""
    answer = {**assistant("yes"), name: "so"}
    tokenizer = tokenizer_of("qwen 3")
    thoughts = ""
    noted = LOST
    if hasattr(chat_template_utils, "_REASONING_FIELDS"):
        thoughts = "so"
        noted = {}

    groups = load_row(tmp_path, {"prompt": QUESTION, "completion": [answer]}, tokenizer)
    text = f"{ASK}‖⟦<think>\n{thoughts}\n</think>\n\nyes<|im_end|>⟧"
    assert completions(groups) == [marked(tokenizer, text)]
    assert notes(groups) == noted


def test_thoughts_of_an_answer_before_the_last_question_are_not_trained_on(tmp_path: Path) -> None:
    """With all turns, an answer has the tokens that a model would read, not those that it wrote."""
    messages = [*QUESTION, assistant("<think>\nso\n</think>\n\nyes"), user("and you?"), assistant("no")]
    text = f"{ASK}‖⟦yes<|im_end|>⟧{CONTEXT}⟦<think>\n\n</think>\n\nno<|im_end|>⟧"
    groups = load_row(tmp_path, {"messages": messages}, tokenizer_of("qwen 3"), ALL_TURNS)
    assert completions(groups) == [marked(tokenizer_of("qwen 3"), text)]


# ---------------------------------------------------------------- calls

# calls are shown where a message says nothing else
CALLS_ALONE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% if message.tool_calls and not message.content %}"
    "{% for call in message.tool_calls %}{{ (call.function or call).name }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOST_CALLS = {"calls left out by the chat template": 1}


@pytest.mark.parametrize("call", [CALL, {"name": "f", "arguments": "{}"}], ids=["function", "name"])
@pytest.mark.parametrize("content, lost", [("so", LOST_CALLS), ("f", LOST_CALLS), ("", {})])
def test_calls_that_a_template_drops_are_counted(tmp_path: Path, call: dict, content: str, lost: dict) -> None:
    calling = {"role": "assistant", "content": content, "tool_calls": [call]}
    for completion in ([calling], [calling, tool("42"), assistant("yes")]):
        groups = load_row(tmp_path, {"prompt": QUESTION, "completion": completion}, with_template(CALLS_ALONE))
        assert notes(groups) == lost


# ---------------------------------------------------------------- packed rows


def test_packed_rows_with_context(tmp_path: Path) -> None:
    rows = [
        {"prompt": QUESTION, "chosen": TWO_TURNS, "rejected": [assistant("a b")]},
        {"prompt": [user("a")], "chosen": [assistant("7")], "rejected": with_weights(THREE_TURNS, 1, 0, 1)},
    ]
    groups = load(write(tmp_path / "rows.jsonl", rows), chat())
    batches = Batches(groups, 2, 1000, None, Ranks(0, 1, torch.device("cpu"), torch.float32))
    (batch,) = batches.of_step(1)

    targets = []
    predictors = []
    lengths = []
    last_positions = []
    start = 0
    for i in range(2):
        prompt_end = start + len(completions(groups, i)[0].prompt) - 1
        start = prompt_end + 1
        for piece in completions(groups, i):
            counted = [k for k, is_counted in enumerate(piece.is_counted) if is_counted]
            targets += [piece.completion[k] for k in counted]
            predictors += [start + k - 1 if k else prompt_end for k in counted]
            lengths.append(len(counted))
            last_positions.append(start + counted[-1])
            start += len(piece.completion)

    assert batch.targets.tolist() == targets
    assert batch.predictor_positions[batch.predictor_of_token].tolist() == predictors
    assert batch.predictor_positions.tolist() == sorted(set(predictors))
    assert groups.tokens[batch.target_index].tolist() == targets
    assert batch.lengths.flatten().tolist() == lengths
    assert batch.last_positions.flatten().tolist() == last_positions
    assert (
        batch.global_tokens == len(targets) < sum(len(p.completion) for i in range(2) for p in completions(groups, i))
    )
    assert batch.input_ids.shape == (1, start)


@pytest.mark.parametrize("weight, kept", [(0, 0), (1, 1)])
def test_a_completion_without_counted_tokens_is_not_scored(tmp_path: Path, weight: int, kept: int) -> None:
    """Its reward would be read from a token that is not its own."""
    row = {"prompt": TALK, "chosen": [{**assistant(GOOD), "weight": weight}], "rejected": [assistant(BAD)]}
    encoder = Encoder(chat())
    examples = read_examples(write(tmp_path / "rows.jsonl", [row]), encoder.counts)
    assert len(list(encode_rows(examples, encoder, 100, completions=True))) == kept
    assert encoder.counts.dropped.total() == 1 - kept


def test_ranked_completions_may_be_messages(tmp_path: Path) -> None:
    """The tokens are those of pairs with the same messages."""
    answers = [[assistant(GOOD), *TALK, assistant(BAD)], [assistant(BAD)], [assistant("ok")]]
    ranked = {"prompt": TALK, "completions": [answers[1], answers[0], answers[2]], "scores": [1, 2, 0]}
    groups = load(write(tmp_path / "ranked.jsonl", [ranked]), chat(), RANKING)
    expected = []
    for chosen, rejected in ((0, 1), (1, 2)):
        pair = {"prompt": TALK, "chosen": answers[chosen], "rejected": answers[rejected]}
        expected.append(completions(load(write(tmp_path / "pair.jsonl", [pair]), chat(), RANKING)))
    assert completions(groups) == [*expected[0], expected[1][1]]
