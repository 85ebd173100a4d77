"""The embedded world: notices on a board, their summaries, and an oracle that knows how good a summary is.

A post states five facts (item, place, number, month, person) among filler sentences; a summary states them
in clauses. Every slot has its own value words and each post holds exactly one word of each slot, so the facts
can be read back from the text, and reward, preferences and wrong words are known exactly:

    reward = correct facts - wrong facts - 0.5 * superfluous clauses    (at most 5)

Everything is written as ordinary files: jsonl rows, and a Hugging Face model directory (a word-level
tokenizer and a randomly initialised Llama of about 1M parameters) that is used like any other model.

    python scripts/notices.py world --output-dir runs/world
    python scripts/notices.py prefer --rows runs/samples.jsonl --output runs/pairs.jsonl
"""

import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import tyro

SLOTS: dict[str, tuple[str, ...]] = {
    "item": ("blanket", "bicycle", "guitar", "camera", "lamp", "kettle", "jacket", "violin"),
    "place": ("station", "library", "harbour", "market", "museum", "garden", "bakery", "school"),
    "number": ("three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "month": ("january", "february", "march", "april", "may", "june", "july", "august"),
    "person": ("anna", "boris", "clara", "david", "emma", "felix", "greta", "hugo"),
}
SLOT_OF = {value: slot for slot, values in SLOTS.items() for value in values}


class Kind(NamedTuple):
    """Wordings of one kind of notice. Each wording is a list of sentences that hold every slot once."""

    posts: tuple[tuple[str, ...], ...]
    summary: tuple[str, ...]  # its clauses, one per slot


KINDS = (
    Kind(
        posts=(
            (
                "we lost a {item}.",
                "it was at the {place} in {month}.",
                "the tag says {number}.",
                "please call {person}.",
            ),
            (
                "a {item} is lost.",
                "{person} had it at the {place}.",
                "the tag says {number}.",
                "it was in {month}.",
            ),
        ),
        summary=("lost {item}", "at {place}", "tag {number}", "in {month}", "call {person}"),
    ),
    Kind(
        posts=(
            (
                "we found a {item} at the {place} in {month}.",
                "the tag says {number}.",
                "please call {person}.",
            ),
            ("{person} found a {item}.", "the tag says {number}.", "it was at the {place} in {month}."),
        ),
        summary=("found {item}", "at {place}", "tag {number}", "in {month}", "call {person}"),
    ),
    Kind(
        posts=(
            (
                "a {item} is for sale.",
                "the price is {number} coins.",
                "see it at the {place} in {month}.",
                "please call {person}.",
            ),
            (
                "{person} will sell a {item} in {month}.",
                "come to the {place}.",
                "the price is {number} coins.",
            ),
        ),
        summary=("{item} for sale", "at {place}", "price {number}", "in {month}", "call {person}"),
    ),
    Kind(
        posts=(
            (
                "in {month} we meet at the {place}.",
                "the talk is about a {item}.",
                "it starts at {number}.",
                "please call {person}.",
            ),
            (
                "{person} will talk about a {item}.",
                "come to the {place} at {number}.",
                "the talk is in {month}.",
            ),
        ),
        summary=("talk about {item}", "at {place}", "starts at {number}", "in {month}", "call {person}"),
    ),
)
FILLERS = (
    "thank you all.",
    "it is good to see you again.",
    "the weather was good.",
    "we had a long day.",
    "more news will come soon.",
    "this is the old board.",
    "tea is free as ever.",
)
SUPERFLUOUS = ("thank you all", "more news soon", "tea is free", "good weather", "a long day")
PUNCTUATION = (".", ",", ":")
CUE = "summary:"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MAX_LENGTH = 256  # tokens of prompt and completion
CORRECT, WRONG, NEITHER = 1, -1, 0


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, one per token of the world's tokenizer."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def read_facts(post: str) -> dict[str, str]:
    """The value of each slot. Raises ValueError unless the post holds exactly one word of each slot."""
    found = [(SLOT_OF[word], word) for word in words(post) if word in SLOT_OF]
    if sorted(slot for slot, _ in found) != sorted(SLOTS):
        raise ValueError(f"not a notice, it must state each of {', '.join(SLOTS)} once: {post!r}")
    return dict(found)


def mark_words(prompt: str, completion: str) -> list[tuple[str, int]]:
    """The words of a completion, each with CORRECT, WRONG or NEITHER.

    A value word states a fact, correct if the post says so; said again it states nothing new. A second value
    for a slot is another fact, so that listing all values does not pay.
    """
    facts = set(read_facts(prompt).values())
    marks, stated = [], set()
    for word in words(completion):
        is_new_fact = word in SLOT_OF and word not in stated
        stated.add(word)
        marks.append((word, NEITHER if not is_new_fact else CORRECT if word in facts else WRONG))
    return marks


def oracle(prompt: str, completion: str) -> float:
    """The reward of any text: correct facts - wrong facts - 0.5 per clause without a new fact; at most 5.

    Clauses are divided by punctuation; one without words does not count. Raises ValueError if the prompt is
    not a notice.
    """
    total, clauses, clause = 0, [], []
    for word, mark in mark_words(prompt, completion):
        total += mark
        if re.match(r"\w", word):
            clause.append(mark)
        else:
            clauses.append(clause)
            clause = []
    superfluous = sum(bool(marks) and not any(marks) for marks in [*clauses, clause])
    return total - 0.5 * superfluous


def make_notice(rng: random.Random) -> tuple[str, Kind]:
    """A prompt (about 45 words: the post and the cue) and its kind."""
    kind = rng.choice(KINDS)
    sentences = list(rng.choice(kind.posts))
    for filler in rng.sample(FILLERS, rng.randint(3, 5)):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    facts = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    return f"{' '.join(sentences).format(**facts)} {CUE}", kind


def make_summary(prompt: str, kind: Kind, rng: random.Random, p_wrong: float = 0.0, superfluous: int = 0) -> str:
    """A summary of the notice; each fact is wrong with probability `p_wrong`, independently of the others."""
    facts = read_facts(prompt)
    for slot, values in SLOTS.items():
        if rng.random() < p_wrong:
            facts[slot] = rng.choice([value for value in values if value != facts[slot]])
    clauses = list(kind.summary)
    for clause in rng.sample(SUPERFLUOUS, superfluous):
        clauses.insert(rng.randint(1, len(clauses)), clause)
    return ", ".join(clauses).format(**facts) + "."


def make_sft_row(prompt: str, kind: Kind, rng: random.Random) -> dict[str, str]:
    """A row of the imperfect demonstrations: 60% with all facts right, 40% with each wrong at 0.4;
    0, 1 or 2 superfluous clauses at 0.6, 0.25, 0.15, so that the likeliest summary is a clean one."""
    p_wrong = 0.0 if rng.random() < 0.6 else 0.4
    superfluous = rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0]
    return {"prompt": prompt, "completion": make_summary(prompt, kind, rng, p_wrong, superfluous)}


def unique_notices(rng: random.Random) -> Iterator[tuple[str, Kind]]:
    """Notices without end, no two with the same text."""
    seen = set()
    while True:
        prompt, kind = make_notice(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, kind


def rank(rewards: list[float], rng: random.Random) -> list[int]:
    """Indices, best first, drawn from Plackett-Luce: P(k first) = softmax(rewards)_k, then the rest alike.

    With two rewards this is Bradley-Terry, P(0 before 1) = sigmoid(r_0 - r_1).
    """
    # The order of reward + Gumbel noise is a Plackett-Luce draw; the bounds keep the logarithms finite.
    noisy = [reward - math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12))) for reward in rewards]
    return sorted(range(len(rewards)), key=lambda k: -noisy[k])


def prefer_row(row: dict, rng: random.Random) -> dict:
    """A row of `prompt`, `completions` [K] with one draw of the oracle's preferences: `prompt`, `chosen`,
    `rejected` at K = 2, else `prompt`, `completions` best first."""
    prompt, completions = row["prompt"], row["completions"]
    rewards = [oracle(prompt, completion) for completion in completions]
    ranked = [completions[k] for k in rank(rewards, rng)]
    if len(ranked) == 2:
        return {"prompt": prompt, "chosen": ranked[0], "rejected": ranked[1]}
    return {"prompt": prompt, "completions": ranked}


def unusable(row: dict) -> str | None:
    """Why a row says nothing about what the oracle prefers."""
    if not all(row.get("finished", ())):
        return "unfinished completion"
    return "identical completions" if len(set(row["completions"])) < len(row["completions"]) else None


def check_row(row: object, num_completions: int | None) -> None:
    """Raises ValueError unless the row has a notice as `prompt` and a list of at least two strings as
    `completions`, as many as `num_completions` where that is given."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError("needs a string in `prompt`")
    completions = row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
        raise ValueError("needs a list of strings in `completions`")
    if len(completions) < 2:
        raise ValueError(f"needs at least 2 completions, found {len(completions)}")
    if num_completions is not None and len(completions) != num_completions:
        raise ValueError(f"has {len(completions)} completions, the lines before {num_completions}")
    finished = row.get("finished", [True] * len(completions))
    if not isinstance(finished, list) or [type(end) for end in finished] != [bool] * len(completions):
        raise ValueError(f"needs {len(completions)} booleans in `finished`")
    read_facts(row["prompt"])


def vocabulary() -> list[str]:
    """Every token of the world: the special ones, punctuation, and the words of all templates and slots."""
    wordings = [text for kind in KINDS for texts in (*kind.posts, kind.summary) for text in texts]
    templates = " ".join([CUE, *wordings, *FILLERS, *SUPERFLUOUS])
    plain = words(re.sub(r"\{\w+\}", " ", templates))
    # A dict keeps the first of each and their order, so that ids are the same in every run.
    return list(dict.fromkeys([*SPECIAL.values(), *PUNCTUATION, *plain, *SLOT_OF]))


def make_tokenizer():
    """A word-level `PreTrainedTokenizerFast`: BOS before a text, no EOS, one token per word or mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # Words are joined by blanks, without one before a punctuation mark.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **SPECIAL)


def make_model(tokenizer, seed: int):
    """A Llama of about 1M parameters (float32) with random weights that depend on `seed` alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_base(directory: Path, seed: int) -> None:
    """Writes model and tokenizer into `directory`, each file moved there complete."""
    temporary = directory.with_name(directory.name + ".tmp")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(temporary)
    make_model(tokenizer, seed).save_pretrained(temporary)
    directory.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(directory / path.name)
    temporary.rmdir()


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl file of notices with K completions each; a bad one ends the program."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                check_row(row, len(rows[0]["completions"]) if rows else None)
                rows.append(row)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError as error:
        fail(f"{path}, line {len(rows) + 1}: {error}")
    return rows or fail(f"{path}: no rows")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes a jsonl file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


app = tyro.extras.SubcommandApp()


@app.command
def world(
    output_dir: Path,
    seed: int = 0,
    sft_rows: int = 32_000,
    prompt_rows: int = 4_096,
    held_out_rows: int = 512,
) -> None:
    """Write a model directory `base` and `sft.jsonl`, `prompts.jsonl`, `held_out.jsonl`, no post twice.

    Args:
        output_dir: directory to write into
        seed: seed of the model's weights and of the rows
        sft_rows: rows of imperfect demonstrations, `prompt` and `completion`
        prompt_rows: rows with a `prompt` alone
        held_out_rows: rows with a `prompt` and a perfect `completion`
    """
    # Held-out rows come first, so that they stay the same whatever the number of the others.
    rng = random.Random(seed)
    notices = unique_notices(rng)
    held_out = []
    for prompt, kind in islice(notices, held_out_rows):
        held_out.append({"prompt": prompt, "completion": make_summary(prompt, kind, rng)})
    prompts = [{"prompt": prompt} for prompt, _ in islice(notices, prompt_rows)]
    sft = [make_sft_row(prompt, kind, rng) for prompt, kind in islice(notices, sft_rows)]
    write_rows(output_dir / "held_out.jsonl", held_out)
    write_rows(output_dir / "prompts.jsonl", prompts)
    write_rows(output_dir / "sft.jsonl", sft)
    save_base(output_dir / "base", seed)


@app.command
def prefer(rows: Path, output: Path, seed: int = 0) -> None:
    """Draw the oracle's preferences: Bradley-Terry from two completions, Plackett-Luce from more.

    Rows with an unfinished completion, and rows with identical completions, are dropped and counted.

    Args:
        rows: jsonl file with `prompt`, `completions` [K] and `finished` [K], as `sample.py` writes it
        output: jsonl file to write: `prompt`, `chosen`, `rejected`, or for K > 2 ranked `completions`
        seed: seed of the draws
    """
    rng, found = random.Random(seed), read_rows(rows)
    dropped = Counter(filter(None, map(unusable, found)))
    counts = f"rows {len(found)}, kept {len(found) - dropped.total()}" + ", dropped: " * bool(dropped)
    counts += ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
    if dropped.total() == len(found):
        fail(f"{rows}: no usable row; {counts}")
    write_rows(output, [prefer_row(row, rng) for row in found if not unusable(row)])
    print(counts)


if __name__ == "__main__":
    app.cli(description=__doc__)
