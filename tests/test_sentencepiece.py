"""Tokenizers that put a blank before a text: a completion has the ids that it has behind its prompt."""

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenised import FIRST, assistant, load, only_group, pieces, write

from shared.encode import completion_text
from shared.groups import Requires

KINDS = ("legacy", "first", "always", "never")
APART = "completions encoded apart from their prompt"
USER = {"role": "user", "content": "I ok?"}
PROMPT_OF_CHAT = "<|im_start|>user\nI ok?<|im_end|>\n<|im_start|>assistant\n"


@functools.cache
def plain(kind: str) -> Any:
    return tiny.make_sentencepiece(kind)


@functools.cache
def chat(kind: str) -> Any:
    return tiny.make_sentencepiece(kind, chat=True)


def whole(tokenizer: Any, prompt: str, completion: str, special: bool = True) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those behind them when the stock tokenizer sees both at once."""
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    ids = tokenizer(prompt + completion, add_special_tokens=special)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids, "the prompt ends within a word"
    return prompt_ids, ids[len(prompt_ids) :]


def exactly(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text by the BPE alone, with nothing added."""
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(text.replace(" ", "▁"))]


# ---------------------------------------------------------------- together

PROMPTS = ["I ok?\n", "I ok?", "Q: a 42\n\n", "日"]
COMPLETIONS = [("?ok a", "?no"), (" ok a", " no"), ("\nok", "\n ok"), ("日 é", "\n"), (" ", "  ok ")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_have_the_ids_behind_their_prompt(tmp_path: Path, kind: str, prompt: str) -> None:
    tokenizer = plain(kind)
    rows = []
    expected = []
    for chosen, rejected in COMPLETIONS:
        if not chosen.strip() or not rejected.strip():
            chosen += "ok"
            rejected += "no"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        prompt_ids, chosen_ids = whole(tokenizer, prompt, chosen)
        _, rejected_ids = whole(tokenizer, prompt, rejected)
        eos = tokenizer.eos_token_id
        expected.append([prompt_ids, [*chosen_ids, eos], [*rejected_ids, eos]])

    groups = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert [pieces(groups, i) for i in range(len(rows))] == expected
    assert APART not in groups.report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["ok a", " ok", "日x", "a\nok"])
def test_answers_have_the_ids_behind_the_header(tmp_path: Path, kind: str, answer: str) -> None:
    """Also those of a second turn, whose context begins with the end of the first."""
    tokenizer = chat(kind)
    turns = [assistant(answer), USER, assistant(answer)]
    context = f"<|im_end|>\n{PROMPT_OF_CHAT}"
    prompt_ids, answer_ids = whole(tokenizer, PROMPT_OF_CHAT, answer, special=False)
    _, both = whole(tokenizer, PROMPT_OF_CHAT, f"{answer}{context}{answer}", special=False)

    eos = tokenizer.eos_token_id
    for completion, expected in (([assistant(answer)], answer_ids), (turns, both)):
        groups = load(write(tmp_path / "rows.jsonl", [{"prompt": [USER], "completion": completion}]), tokenizer, FIRST)
        assert pieces(groups, 0) == [prompt_ids, [*expected, eos]]
        assert APART not in groups.report


@pytest.mark.parametrize("kind", KINDS)
def test_running_text_is_encoded_at_once(tmp_path: Path, kind: str) -> None:
    for text in ("ok a 42", " ok", "a</s>"):
        first, rest = only_group(tmp_path, {"text": text}, plain(kind), FIRST)
        assert first == [plain(kind).bos_token_id]
        assert plain(kind).decode(rest).strip() == f"{text}</s>".strip()
        if "</s>" not in text:
            assert [*first, *rest[:-1]] == plain(kind)(text)["input_ids"]


# ---------------------------------------------------------------- apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt, first", [("Q: ", "ok a"), ("I o", "k a"), ("a 4", "2 ok")])
def test_a_prompt_whose_end_joins_the_answer(tmp_path: Path, kind: str, prompt: str, first: str) -> None:
    """It keeps its own ids. The completions are encoded without it, all of them, and without a blank before."""
    tokenizer = plain(kind)
    others = ["?no", " ok", "\nok"]
    rows = [{"prompt": prompt, "completions": [first, *others], "scores": [4, 3, 2, 1]}]
    groups = load(write(tmp_path / "rows.jsonl", rows), tokenizer)

    prompt_ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + first)["input_ids"][: len(prompt_ids)] != prompt_ids
    completions = [[*exactly(tokenizer, text), tokenizer.eos_token_id] for text in (first, *others)]
    assert pieces(groups, 0) == [prompt_ids, *completions]
    assert groups.report[APART] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_apart_or_not_by_themselves(tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": "Q: ", "chosen": "ok", "rejected": "?no"},
        {"prompt": "Q:", "chosen": " ok", "rejected": "?no"},
        {"prompt": "Q: ", "chosen": "?ok", "rejected": "?no"},
        {"prompt": "Q: ", "chosen": "?ok", "rejected": "ok"},
    ]
    groups = load(write(tmp_path / "rows.jsonl", rows), plain(kind))
    assert groups.report[APART] == 2
    assert load(write(tmp_path / "rows.jsonl", rows), plain(kind), FIRST).report[APART] == 1
    prompt, *_ = pieces(groups, 0)
    assert pieces(groups, 2)[0] == pieces(groups, 3)[0] == prompt == plain(kind)("Q: ")["input_ids"]


def test_an_answer_that_joins_a_context(tmp_path: Path) -> None:
    """The prompt and the contexts keep their ids, and so do the answers before."""
    tokenizer = tiny.make_sentencepiece("first", chat=True)
    tokenizer.chat_template = tiny.CHATML.replace("assistant\n'", "assistant '").replace(
        "['role'] + '\n'", "['role'] + (' ' if message['role'] == 'assistant' else '\n')"
    )
    row = {"prompt": [USER], "completion": [assistant("?ok"), USER, assistant("ok")]}
    groups = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, FIRST)
    header = "<|im_start|>user\nI ok?<|im_end|>\n<|im_start|>assistant "
    context = tokenizer(f"<|im_end|>\n{header}", add_special_tokens=False)["input_ids"]
    completion = [*exactly(tokenizer, "?ok"), *context, *exactly(tokenizer, "ok"), tokenizer.eos_token_id]
    assert pieces(groups, 0) == [tokenizer(header, add_special_tokens=False)["input_ids"], completion]
    assert groups.report[APART] == 1


# ---------------------------------------------------------------- control strings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["x</s>y", "</s>", " a </s> ok", "</s></s> a", "a<s>", "\n</s>\nok"])
@pytest.mark.parametrize("prompt", ["I ok?\n", "Q: ", "a</s>", "</s>b?"])
def test_control_strings_decode_to_themselves(tmp_path: Path, kind: str, text: str, prompt: str) -> None:
    """Behind a prompt as in it: no special token, and no blank at either end."""
    tokenizer = plain(kind)
    row = {"prompt": prompt, "chosen": text, "rejected": "?no"}
    (bos, *prompt_ids), (*ids, eos), _ = only_group(tmp_path, row, tokenizer)
    assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {bos, eos} & {*prompt_ids, *ids}
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(prompt_ids + ids) == prompt + text


@pytest.mark.parametrize("kind", KINDS)
def test_control_strings_in_messages_decode_to_themselves(tmp_path: Path, kind: str) -> None:
    tokenizer = chat(kind)
    messages = [{"role": "user", "content": "x</s>y<|im_end|>"}, assistant("x<|im_end|> y")]
    prompt, (*answer, end) = only_group(tmp_path, {"messages": messages}, tokenizer, FIRST)
    text = tokenizer.decode(prompt).replace("> ", ">")  # some tokenizers put a blank behind special tokens
    assert text == "<|im_start|>user\nx</s>y<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt + answer).removeprefix(tokenizer.decode(prompt)) == "x<|im_end|> y"
    assert end == tokenizer.eos_token_id
    assert [i for i in answer if i in tokenizer.all_special_ids] == []


# ---------------------------------------------------------------- what was sampled

DRAWN = ["ok a", " ok", "\nok", "日x é", "?", " 42 naïve  ok "]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["I ok?\n", "Q:"])
def test_the_text_of_what_was_drawn_gives_its_ids(tmp_path: Path, kind: str, prompt: str) -> None:
    tokenizer = plain(kind)
    texts = [text for text in DRAWN if prompt.endswith("\n") or not text[0].isalpha()]
    drawn = [whole(tokenizer, prompt, text)[1] for text in texts]
    prompt_ids = tokenizer(prompt)["input_ids"]
    eos = tokenizer.eos_token_id
    sampled = [completion_text(tokenizer, prompt_ids, [*ids, eos]) for ids in drawn]
    assert sampled == texts

    row = {"prompt": prompt, "completions": sampled, "finished": [True] * len(sampled)}
    assert only_group(tmp_path, row, tokenizer) == [prompt_ids, *([*ids, eos] for ids in drawn)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_drawn_answer_gives_its_ids(tmp_path: Path, kind: str) -> None:
    tokenizer = chat(kind)
    drawn = [whole(tokenizer, PROMPT_OF_CHAT, text, special=False)[1] for text in DRAWN]
    prompt_ids = tokenizer(PROMPT_OF_CHAT, add_special_tokens=False)["input_ids"]
    sampled = [completion_text(tokenizer, prompt_ids, ids) for ids in drawn]
    assert sampled == DRAWN

    row = {"messages": [USER, assistant("ok")], "reference_samples": sampled}
    row["reference_samples_finished"] = [False] * len(sampled)
    _, _, *samples = only_group(tmp_path, row, tokenizer, Requires("first", samples="required"))
    assert samples == drawn
