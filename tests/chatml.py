"""Chats of several turns as rows, and their token ids from ChatML that is put together by hand."""

import random
from typing import Any

import reference
import tiny

HEADER = "<|im_start|>assistant\n"
END = "<|im_end|>"
Messages = list[dict]
Pieces = list[tuple[str, bool]]  # texts one after another, and whether the model writes them


# ---------------------------------------------------------------- rows


def make_chats(n: int, seed: int, k: int = 2, samples: int = 0) -> list[dict]:
    """Prompts of one to three turns of the user, and completions with one to three turns of the assistant.

    k = 1 gives `prompt`, `completion`; 2 `prompt`, `chosen`, `rejected`; more `completions`, which are texts. Every row
    has scores, by which k > 2 are ranked. Nothing is to be learnt from some turns that have a weight of 0.
    samples: so many `reference_samples`, of which each second one is truncated in two rows of three.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        row: dict[str, Any] = {"prompt": _prompt(rng)}
        if k == 1:
            row["completion"] = _turns(rng)
        elif k == 2:
            row |= {"chosen": _turns(rng), "rejected": _turns(rng)}
            row |= {"score_chosen": rng.gauss(0.5, 1), "score_rejected": rng.gauss(0, 1)}
        else:
            row["completions"] = [_text(rng) for _ in range(k)]
            row["scores"] = [rng.gauss(0, 1) for _ in range(k)]
        if samples:
            row["reference_samples"] = [_text(rng) for _ in range(samples)]
            row["reference_samples_finished"] = [number % 2 == 0 or i % 3 == 0 for number in range(samples)]
        rows.append(row)
    return rows


def _text(rng: random.Random) -> str:
    return rng.choice(("", " ")) + tiny.text(rng, rng.randint(1, 5))


def _message(rng: random.Random, role: str) -> dict:
    return {"role": role, "content": _text(rng)}


def _prompt(rng: random.Random) -> Messages:
    messages = []
    if rng.random() < 0.3:
        messages.append(_message(rng, "system"))
    for _ in range(rng.randint(0, 2)):
        messages += [_message(rng, "user"), _message(rng, "assistant")]
    return [*messages, _message(rng, "user")]


def _turns(rng: random.Random) -> Messages:
    """The first turn is the assistant's, and so is the last, from which there is something to be learnt or not."""
    messages = [_message(rng, "assistant")]
    for _ in range(rng.randint(0, 2)):
        messages += [_message(rng, "user"), _message(rng, "assistant")]
        if rng.random() < 0.3:
            messages[-1]["weight"] = 0
    return messages


# ---------------------------------------------------------------- token ids


def encode(tokenizer: Any, row: dict, max_length: int = 512, max_prompt_length: int = 512) -> reference.Group:
    """Prompt and completions as ChatML is tokenised in one piece; the model writes answers and the ends of turns."""
    prompt = "".join(text for text, _ in _pieces(row["prompt"])) + HEADER
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    group = reference.Group(prompt_ids[-max_prompt_length:], [], row, [], [])
    room = max_length - len(group.prompt)

    def ids_behind(pieces: Pieces) -> tuple[list[int], list[bool]]:
        ids, is_counted = _tokenise(tokenizer, [(prompt, False), *pieces])
        start = len(prompt_ids)
        assert ids[:start] == prompt_ids
        end = min(len(ids), start + room)
        while not is_counted[end - 1]:
            end -= 1
        return ids[start:end], is_counted[start:end]

    completions = reference.completions_of(row)
    for k in reference.order_of(row):
        _header, *pieces = _pieces(completions[k])  # the prompt ends with the header
        ids, is_counted = ids_behind(pieces)
        group.completions.append(ids)
        group.is_counted.append(is_counted)
    scores = reference.scores_of(row)
    if scores:
        group.scores = [scores[k] for k in reference.order_of(row)]

    samples = row.get("reference_samples", [])
    for sample, is_finished in zip(samples, row.get("reference_samples_finished", []), strict=True):
        end = END if is_finished else ""
        ids, _ = ids_behind([(sample + end, True)])
        group.samples.append(ids)
    return group


def encode_all_turns(tokenizer: Any, row: dict) -> reference.Group:
    """As `encode`, but all that the assistant says is in the completion."""
    messages = row.get("messages")
    if messages is None:
        messages = row["prompt"] + row["completion"]
    roles = [message["role"] for message in messages]
    first = roles.index("assistant")
    return encode(tokenizer, {"prompt": messages[:first], "completion": messages[first:]})


def _pieces(messages: Messages | str) -> Pieces:
    """The pieces of ChatML of messages, or of one text of the assistant."""
    if isinstance(messages, str):
        messages = [{"role": "assistant", "content": messages}]
    pieces = []
    for message in messages:
        is_learnt = message["role"] == "assistant" and message.get("weight") != 0
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((message["content"] + END, is_learnt))
        pieces.append(("\n", False))
    return pieces


def _tokenise(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """The ids of all pieces as one text, and of each whether its first character is in a piece that counts."""
    text = ""
    is_counted: list[bool] = []  # of each character
    for piece, counts in pieces:
        text += piece
        is_counted += [counts] * len(piece)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoding["offset_mapping"]]
    return encoding["input_ids"], [is_counted[start] for start in starts]
