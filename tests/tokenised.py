"""Rows as training loads them, and the same token ids encoded by hand."""

import functools
import json
from pathlib import Path
from typing import Any

import tiny

from shared.groups import Groups, Requires, load_groups

RANKING = Requires("ranking")
FIRST = Requires("first")
LENGTH = 512

USER = "is it ok?"
GOOD = "yes, it is"
BAD = "no"
PAIR = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
TALK = [{"role": "user", "content": USER}]
SHARE_GPT = [{"from": "human", "value": USER}]


@functools.cache
def plain() -> Any:
    """A tokenizer without a chat template."""
    return tiny.make_tokenizer()


@functools.cache
def chat() -> Any:
    """A tokenizer with a chat template."""
    return tiny.make_tokenizer(chat=True)


def assistant(content: str) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def write(path: Path, rows: list[dict]) -> str:
    """Write rows as jsonl; their source."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return str(path)


def load(source: str, tokenizer: Any, requires: Requires = RANKING, length: int = LENGTH) -> Groups:
    """The groups of a source with prompts that are not truncated."""
    return load_groups(source, tokenizer, requires, length, None)


def pieces(groups: Groups, i: int) -> list[list[int]]:
    """The prompt and the completions of a group, as ids."""
    offsets = groups.offsets[i].tolist()
    bounds = zip(offsets, offsets[1:], strict=False)
    return [groups.tokens[start:end].tolist() for start, end in bounds]


def only_group(
    folder: Path,
    row: dict,
    tokenizer: Any,
    requires: Requires = RANKING,
    max_length: int = LENGTH,
    max_prompt_length: int | None = None,
) -> list[list[int]]:
    """The prompt and the completions of one row, as ids."""
    source = write(folder / "rows.jsonl", [row])
    groups = load_groups(source, tokenizer, requires, max_length, max_prompt_length)
    assert len(groups) == 1
    return pieces(groups, 0)


def ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of a text, without the special tokens that the tokenizer adds unless asked for."""
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def ended(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a completion with its EOS."""
    return [*ids(tokenizer, text), tokenizer.eos_token_id]


def template(tokenizer: Any, *messages: tuple[str, str], ask: bool = False) -> str:
    """Messages (role, content) through the chat template; ask: with the beginning of an answer."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)


def question(tokenizer: Any, text: str = USER) -> list[int]:
    """Token ids of a chat prompt of one user turn."""
    return ids(tokenizer, template(tokenizer, ("user", text), ask=True))
