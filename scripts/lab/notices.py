"""The notices: posts on a board, summaries of them, and an oracle that knows how good a summary is.

A post states five facts (item, place, number, month, person) among filler sentences. A summary states them in clauses.
Every slot has its own value words and each post holds exactly one word of each slot. The facts can therefore be read
back from the text, and reward, preferences and wrong words are known exactly:

    reward = correct facts - wrong facts - 0.5 * superfluous clauses    (at most 5)

The tokenizer has one token per word, and the base model is a Llama of about 1M parameters with random weights.
"""

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SLOTS: dict[str, tuple[str, ...]] = {
    "item": ("blanket", "bicycle", "guitar", "camera", "lamp", "kettle", "jacket", "violin"),
    "place": ("station", "library", "harbour", "market", "museum", "garden", "bakery", "school"),
    "number": ("three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "month": ("january", "february", "march", "april", "may", "june", "july", "august"),
    "person": ("anna", "boris", "clara", "david", "emma", "felix", "greta", "hugo"),
}
SLOT_OF = {value: slot for slot, values in SLOTS.items() for value in values}


class Kind(NamedTuple):
    """The wordings of one kind of notice."""

    posts: tuple[tuple[str, ...], ...]  # each a list of sentences, which together hold every slot once
    summary: tuple[str, ...]  # clauses, one per slot


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


# ---------------------------------------------------------------- reward


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, one per token of the notices' tokenizer."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def read_facts(post: str) -> dict[str, str]:
    """The value of each slot. Raises ValueError unless the post holds exactly one word of each slot."""
    values = [word for word in words(post) if word in SLOT_OF]
    slots = [SLOT_OF[value] for value in values]
    if sorted(slots) != sorted(SLOTS):
        raise ValueError(f"not a notice, it must state each of {', '.join(SLOTS)} once: {post!r}")
    return dict(zip(slots, values, strict=True))


def mark_words(prompt: str, completion: str) -> list[tuple[str, int]]:
    """The words of a completion, each with CORRECT, WRONG or NEITHER.

    A value word states a fact, which is correct if the post says so. The same word again states nothing new. A second
    value for a slot is another fact, so that listing all values does not pay.
    """
    facts = set(read_facts(prompt).values())
    marks = []
    stated = set()
    for word in words(completion):
        if word not in SLOT_OF or word in stated:
            mark = NEITHER
        elif word in facts:
            mark = CORRECT
        else:
            mark = WRONG
        stated.add(word)
        marks.append((word, mark))
    return marks


def oracle(prompt: str, completion: str) -> float:
    """The reward of any text: correct facts - wrong facts - 0.5 per clause without a new fact; at most 5.

    Punctuation separates clauses; a clause without words does not count. Raises ValueError if the prompt is not a
    notice.
    """
    total = 0
    clauses: list[list[int]] = [[]]  # the marks of each clause's words
    for word, mark in mark_words(prompt, completion):
        total += mark
        if re.match(r"\w", word):
            clauses[-1].append(mark)
        else:
            clauses.append([])

    superfluous = 0
    for marks in clauses:
        if marks and not any(marks):
            superfluous += 1
    return total - 0.5 * superfluous


# ---------------------------------------------------------------- rows


def make_notice(rng: random.Random) -> tuple[str, Kind]:
    """A prompt of about 45 words, the post and the cue, and its kind."""
    kind = rng.choice(KINDS)
    sentences = list(rng.choice(kind.posts))
    for filler in rng.sample(FILLERS, rng.randint(3, 5)):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    facts = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    post = " ".join(sentences).format(**facts)
    return f"{post} {CUE}", kind


def unique_notices(rng: random.Random) -> Iterator[tuple[str, Kind]]:
    """Notices without end, no two with the same text."""
    seen = set()
    while True:
        prompt, kind = make_notice(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, kind


def make_summary(prompt: str, kind: Kind, rng: random.Random, p_wrong: float = 0.0, superfluous: int = 0) -> str:
    """A summary of the notice; each fact is wrong with probability `p_wrong`, independently of the others."""
    facts = read_facts(prompt)
    for slot, values in SLOTS.items():
        if rng.random() < p_wrong:
            wrong_values = [value for value in values if value != facts[slot]]
            facts[slot] = rng.choice(wrong_values)
    clauses = list(kind.summary)
    for clause in rng.sample(SUPERFLUOUS, superfluous):
        clauses.insert(rng.randint(1, len(clauses)), clause)
    return ", ".join(clauses).format(**facts) + "."


def make_sft_row(prompt: str, kind: Kind, rng: random.Random) -> dict[str, str]:
    """A row of the imperfect demonstrations.

    In 60% of them all facts are right; in the others each fact is wrong with probability 0.4. They have 0, 1 or 2
    superfluous clauses with probabilities 0.6, 0.25 and 0.15, so that the likeliest summary is a clean one.
    """
    p_wrong = 0.4
    if rng.random() < 0.6:
        p_wrong = 0.0
    superfluous = rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0]
    return {"prompt": prompt, "completion": make_summary(prompt, kind, rng, p_wrong, superfluous)}


# ---------------------------------------------------------------- preferences


def rank_by_preference(rewards: list[float], rng: random.Random) -> list[int]:
    """Indices, best first, sampled from Plackett-Luce.

    P(k first) = softmax(rewards)_k, and the rest is ranked in the same way. With two rewards this is Bradley-Terry,
    P(0 before 1) = sigmoid(r_0 - r_1).
    """
    # The order of reward + Gumbel noise is a sample from Plackett-Luce.
    noisy_rewards = []
    for reward in rewards:
        uniform = rng.uniform(1e-12, 1 - 1e-12)  # the bounds keep the logarithms finite
        noisy_rewards.append(reward - math.log(-math.log(uniform)))
    return sorted(range(len(rewards)), key=lambda k: -noisy_rewards[k])


def prefer_row(row: dict, rng: random.Random) -> dict:
    """A sample of the oracle's preferences on a row of `prompt`, `completions` [K].

    Returns `prompt`, `chosen`, `rejected` for K = 2, else `prompt`, `completions` best first.
    """
    prompt = row["prompt"]
    completions = row["completions"]
    rewards = [oracle(prompt, completion) for completion in completions]
    ranking = [completions[k] for k in rank_by_preference(rewards, rng)]
    if len(ranking) == 2:
        chosen, rejected = ranking
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "completions": ranking}


def unusable(row: dict) -> str | None:
    """Why a row says nothing about the oracle's preferences; None if it does."""
    if not all(row.get("finished", ())):
        return "unfinished completion"
    completions = row["completions"]
    if len(set(completions)) < len(completions):
        return "identical completions"
    return None


def check_row(row: object, num_completions: int | None) -> None:
    """Raise ValueError unless the row has a notice as `prompt` and a list of at least two strings as `completions`.

    num_completions: their number in the rows before, if there are any.
    """
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
    if not isinstance(finished, list) or [type(value) for value in finished] != [bool] * len(completions):
        raise ValueError(f"needs {len(completions)} booleans in `finished`")

    read_facts(row["prompt"])


# ---------------------------------------------------------------- model


def vocabulary() -> list[str]:
    """Every token: the special ones, punctuation, and the words of all templates and slots."""
    wordings: list[str] = []
    for kind in KINDS:
        for sentences in (*kind.posts, kind.summary):
            wordings += sentences
    templates = " ".join([CUE, *wordings, *FILLERS, *SUPERFLUOUS])
    template_words = words(re.sub(r"\{\w+\}", " ", templates))
    tokens = [*SPECIAL.values(), *PUNCTUATION, *template_words, *SLOT_OF]
    # A dict drops repetitions and keeps the order, so that ids are the same in every run.
    return list(dict.fromkeys(tokens))


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A word-level `PreTrainedTokenizerFast`: BOS before a text, no EOS, one token per word or punctuation mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    split_at_spaces = pre_tokenizers.WhitespaceSplit()
    split_at_punctuation = pre_tokenizers.Punctuation("isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_at_spaces, split_at_punctuation])

    # Words are joined by spaces, without a space before a punctuation mark.
    join_words = decoders.WordPiece(cleanup=True)
    tokenizer.decoder = decoders.Sequence([join_words, decoders.Replace(" :", ":")])

    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, ids[bos])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **SPECIAL)


def make_model(tokenizer: "PreTrainedTokenizerBase", seed: int) -> "LlamaForCausalLM":
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
    """Write model and tokenizer into `directory`, each file moved there complete."""
    temporary = directory.with_name(directory.name + ".tmp")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(temporary)
    make_model(tokenizer, seed).save_pretrained(temporary)
    directory.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(directory / path.name)
    temporary.rmdir()
