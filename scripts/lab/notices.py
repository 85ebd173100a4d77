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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from shared import UserError
from shared.command import AtLeast

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

    name: str
    posts: tuple[tuple[str, ...], ...]  # each a list of sentences, which together hold every slot once
    summary: tuple[str, ...]  # clauses, one per slot
    misread: tuple[str, str]  # the slots that demonstrations may misread


KINDS = (
    Kind(
        name="lost",
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
        misread=("number", "month"),
    ),
    Kind(
        name="found",
        posts=(
            (
                "we found a {item} at the {place} in {month}.",
                "the tag says {number}.",
                "please call {person}.",
            ),
            ("{person} found a {item}.", "the tag says {number}.", "it was at the {place} in {month}."),
        ),
        summary=("found {item}", "at {place}", "tag {number}", "in {month}", "call {person}"),
        misread=("place", "person"),
    ),
    Kind(
        name="sale",
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
        misread=("item", "number"),
    ),
    Kind(
        name="talk",
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
        misread=("month", "place"),
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
# A second wording, of as many words and of the same reward. None of its words is new to the tokenizer.
SYNONYMS = {"at {place}": "see {place}", "in {month}": "this {month}"}
SUPERFLUOUS = ("thank you all", "more news soon", "tea is free", "good weather", "a long day")
REFRAIN = "tea is free"
REFRAIN_AGAIN = 0.8  # probability that a refrain is said once more
REFRAIN_LIMIT = 20  # repetitions, so that a summary fits into MAX_LENGTH
PUNCTUATION = (".", ",", ":")
CUE = "summary:"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MAX_LENGTH = 256  # tokens of prompt and completion
CORRECT, WRONG, NEITHER = 1, -1, 0
ATTEMPTS = 10_000  # draws in vain before something is said not to exist


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


@dataclass(kw_only=True)
class Demonstrations:
    """What posts look like, and how far their demonstrations, summaries by imperfect writers, are from perfect."""

    fillers: tuple[int, int] = (3, 5)
    """fewest and most filler sentences of a post"""
    p_wrong: Annotated[float, AtLeast(0, at_most=1)] = 0.4
    """probability that a fact of a bad demonstration is wrong, independently of the others"""
    bad_rows: Annotated[float, AtLeast(0, at_most=1)] = 0.4
    """share of bad demonstrations"""
    omit: Annotated[float, AtLeast(0, at_most=1)] = 0.0
    """probability that a clause is left out, independently of the others; the first never is"""
    synonym: Annotated[float, AtLeast(0, at_most=1)] = 0.0
    """probability that place or month is stated in another wording, each independently"""
    superfluous: tuple[float, ...] = (0.6, 0.25, 0.15)
    """probabilities of 0, 1, 2, ... superfluous clauses"""
    misread: Annotated[float, AtLeast(0, at_most=1)] = 0.0
    """probability that a fact is read as the next word of its list, for each of two slots that the kind of post sets"""
    refrain: Annotated[float, AtLeast(0, at_most=1)] = 0.0
    """probability that a summary ends by one superfluous clause said over and over"""
    unseen_kind: Literal["lost", "found", "sale", "talk"] | None = None
    """kind of post that only the demonstrations of `sft.jsonl` and a held-out file of its own show"""


def check_demonstrations(args: Demonstrations) -> None:
    """Raise UserError for numbers of fillers, or probabilities of superfluous clauses, that cannot be."""
    least, most = args.fillers
    if not 0 <= least <= most <= len(FILLERS):
        raise UserError(f"--fillers {least} {most}: must be MIN MAX with 0 <= MIN <= MAX <= {len(FILLERS)}")

    given = " ".join(str(p) for p in args.superfluous)
    if not all(0 <= p <= 1 for p in args.superfluous):
        raise UserError(f"--superfluous {given}: must be probabilities, between 0 and 1")
    if not math.isclose(sum(args.superfluous), 1, abs_tol=1e-9):
        raise UserError(f"--superfluous {given}: must sum to 1, not to {sum(args.superfluous):.6g}")
    if len(args.superfluous) > len(SUPERFLUOUS) + 1:
        raise UserError(f"--superfluous {given}: at most {len(SUPERFLUOUS) + 1} numbers, for 0 to {len(SUPERFLUOUS)}")


def make_notice(rng: random.Random, fillers: tuple[int, int] = (3, 5)) -> tuple[str, Kind]:
    """A prompt, the post and the cue, of about 45 words with three to five fillers, and its kind.

    fillers: fewest and most filler sentences.
    """
    kind = rng.choice(KINDS)
    sentences = list(rng.choice(kind.posts))
    for filler in rng.sample(FILLERS, rng.randint(*fillers)):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    facts = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    post = " ".join(sentences).format(**facts)
    return f"{post} {CUE}", kind


def unique_notices(
    rng: random.Random, fillers: tuple[int, int] = (3, 5), exclude: Iterable[str] = ()
) -> Iterator[tuple[str, Kind]]:
    """Notices without end, no two with the same text and none of the prompts `exclude`.

    Raises UserError if hardly a text is left.
    """
    seen = set(exclude)
    in_vain = 0
    while in_vain < ATTEMPTS:
        in_vain += 1
        prompt, kind = make_notice(rng, fillers)
        if prompt not in seen:
            seen.add(prompt)
            in_vain = 0
            yield prompt, kind
    raise UserError(f"no new post after {len(seen)}: ask for fewer rows or more --fillers")


def with_errors(truth: dict[str, str], p_wrong: float, rng: random.Random) -> dict[str, str]:
    """The value of each slot; each is wrong with probability `p_wrong`, independently of the others."""
    facts = dict(truth)
    for slot, values in SLOTS.items():
        if rng.random() < p_wrong:
            wrong_values = [value for value in values if value != truth[slot]]
            facts[slot] = rng.choice(wrong_values)
    return facts


def insert_superfluous(clauses: list[str], number: int, rng: random.Random) -> None:
    """Put different superfluous clauses anywhere behind the first clause."""
    for clause in rng.sample(SUPERFLUOUS, number):
        clauses.insert(rng.randint(1, len(clauses)), clause)


def write_summary(clauses: list[str], facts: dict[str, str]) -> str:
    """The text of a summary."""
    return ", ".join(clauses).format(**facts) + "."


def make_summary(prompt: str, kind: Kind, rng: random.Random, p_wrong: float = 0.0, superfluous: int = 0) -> str:
    """A summary of the notice; each fact is wrong with probability `p_wrong`, independently of the others."""
    facts = with_errors(read_facts(prompt), p_wrong, rng)
    clauses = list(kind.summary)
    insert_superfluous(clauses, superfluous, rng)
    return write_summary(clauses, facts)


def make_demonstration(prompt: str, kind: Kind, rng: random.Random, args: Demonstrations) -> str:
    """A summary by an imperfect writer.

    By default all facts are right in 60% of them; in the others each fact is wrong with probability 0.4. They have 0, 1
    or 2 superfluous clauses with probabilities 0.6, 0.25 and 0.15, so that the likeliest summary is a clean one.
    """
    p_wrong = args.p_wrong
    if rng.random() < 1 - args.bad_rows:
        p_wrong = 0.0
    superfluous = rng.choices(range(len(args.superfluous)), args.superfluous)[0]

    truth = read_facts(prompt)
    facts = with_errors(truth, p_wrong, rng)
    # What is misread is the next word, whether or not there would have been another error.
    for slot in kind.misread:
        if happens(args.misread, rng):
            facts[slot] = next_value(slot, truth[slot])

    clauses = [kind.summary[0]]
    for clause in kind.summary[1:]:
        if happens(args.omit, rng):
            continue
        if clause in SYNONYMS and happens(args.synonym, rng):
            clause = SYNONYMS[clause]
        clauses.append(clause)
    insert_superfluous(clauses, superfluous, rng)
    if happens(args.refrain, rng):
        clauses += [REFRAIN] * draw_repetitions(rng)
    return write_summary(clauses, facts)


def happens(probability: float, rng: random.Random) -> bool:
    """Whether something of this probability happens. At 0 nothing is drawn, so the draws of other rows stay."""
    return probability > 0 and rng.random() < probability


def next_value(slot: str, value: str) -> str:
    """The word behind this one in the slot's list; the first one behind the last."""
    values = SLOTS[slot]
    return values[(values.index(value) + 1) % len(values)]


def draw_repetitions(rng: random.Random) -> int:
    """How often a refrain is said: n with probability 0.2 * 0.8^(n - 1), all beyond the limit counted to it."""
    repetitions = 1
    while repetitions < REFRAIN_LIMIT and rng.random() < REFRAIN_AGAIN:
        repetitions += 1
    return repetitions


def make_sft_row(prompt: str, kind: Kind, rng: random.Random, args: Demonstrations | None = None) -> dict[str, str]:
    """A row of the imperfect demonstrations, by default as `Demonstrations` has them."""
    return {"prompt": prompt, "completion": make_demonstration(prompt, kind, rng, args or Demonstrations())}


def make_pair(prompt: str, kind: Kind, rng: random.Random, args: Demonstrations) -> dict:
    """A row of two different demonstrations, as `sample.py` writes completions.

    Both are drawn again until they differ, so that neither place is favoured. Raises UserError if they hardly ever do.
    """
    for _ in range(ATTEMPTS):
        completions = [make_demonstration(prompt, kind, rng, args) for _ in range(2)]
        if completions[0] != completions[1]:
            return {"prompt": prompt, "completions": completions, "finished": [True, True]}
    raise UserError(f"no two different demonstrations in {ATTEMPTS} attempts: raise --p-wrong or another probability")


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


def rewards_of(row: dict) -> list[float]:
    """The oracle's rewards of a row of `prompt`, `completions` [K]."""
    return [oracle(row["prompt"], completion) for completion in row["completions"]]


def prefer_row(row: dict, rng: random.Random, noise_free: bool = False) -> dict:
    """A sample of the oracle's preferences on a row of `prompt`, `completions` [K], or its order of their rewards.

    Returns `prompt`, `chosen`, `rejected` for K = 2, else `prompt`, `completions` best first.
    """
    prompt = row["prompt"]
    completions = row["completions"]
    rewards = rewards_of(row)
    if noise_free:
        order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
    else:
        order = rank_by_preference(rewards, rng)
    ranking = [completions[k] for k in order]
    if len(ranking) == 2:
        chosen, rejected = ranking
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "completions": ranking}


def pairs_of(row: dict) -> Iterator[dict]:
    """Each two of a row's K completions as a row of its own, K (K - 1) / 2 in all."""
    for places in combinations(range(len(row["completions"])), 2):
        pair = {"prompt": row["prompt"], "completions": [row["completions"][k] for k in places]}
        if "finished" in row:
            pair["finished"] = [row["finished"][k] for k in places]
        yield pair


def unusable(row: dict, noise_free: bool = False) -> str | None:
    """Why a row says nothing about the oracle's preferences; None if it does."""
    if not all(row.get("finished", ())):
        return "unfinished completion"
    completions = row["completions"]
    if len(set(completions)) < len(completions):
        return "identical completions"
    if noise_free and len(set(rewards_of(row))) < len(completions):
        return "equal rewards"
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


class Shape(NamedTuple):
    """The size of a Llama."""

    hidden: int
    intermediate: int
    layers: int


BASE = Shape(hidden=128, intermediate=448, layers=4)
TINY = Shape(hidden=64, intermediate=192, layers=2)  # too small to look facts up: a base of weak reward models


def make_model(tokenizer: "PreTrainedTokenizerBase", seed: int, shape: Shape = BASE) -> "LlamaForCausalLM":
    """A Llama (float32), by default of about 1M parameters, with random weights that depend on seed and shape alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(directory: Path, seed: int, shape: Shape = BASE) -> None:
    """Write model and tokenizer into `directory`, each file moved there complete."""
    temporary = directory.with_name(directory.name + ".tmp")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(temporary)
    make_model(tokenizer, seed, shape).save_pretrained(temporary)
    directory.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(directory / path.name)
    temporary.rmdir()
