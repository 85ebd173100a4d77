"""Which rows of a source are taken, and in which order. A row takes one byte of memory at most.

side_of()         a number in [0, 1) that the prompt alone decides, for train and held-out
human_turns()     the turns of the human in a prompt
Picker            k of n rows, each set equally likely, in one pass
mixture()         so many rows of each of several sources
length_biased()   the pairs of D_ρ and D_ρ,b of arXiv 2405.19316
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from scripts.lab.preparing import as_demonstration, as_pair, is_demonstration, rewards_of
from scripts.lab.row_files import encode_in_chunks
from shared import UserError
from shared.encode import EncodedExample, Encoder
from shared.rows import (
    PROMPT_FORMS,
    TRANSCRIPT_SPLITTER,
    TRANSCRIPT_USER,
    Counts,
    Dropped,
    Example,
    Form,
    UserTurn,
    is_blank,
    parse_rows,
)

NOT_CHOSEN = "not chosen"
Item = TypeVar("Item")


# ---------------------------------------------------------------- prompts


def side_of(example: Example, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone. Running text is its own prompt."""
    prompt = example.prompt
    if isinstance(prompt, UserTurn):
        prompt = prompt.messages()
    if prompt is None:
        prompt = example.texts[0]
    content = json.dumps([seed, prompt], sort_keys=True)
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def human_turns(example: Example) -> int:
    """The number of turns of the human in a prompt. A text that is no transcript is one turn."""
    prompt = example.prompt
    if isinstance(prompt, UserTurn):
        prompt = prompt.messages()
    if isinstance(prompt, list):
        return sum(message["role"] == "user" for message in prompt)
    if prompt is None:
        raise UserError(f"{example.location}: running text has no prompt")
    if TRANSCRIPT_SPLITTER not in prompt:
        return 1
    return prompt.count(TRANSCRIPT_USER)


# ---------------------------------------------------------------- random choices


@dataclass
class Picker:
    """Says of n rows in turn whether to take each; takes k of them, and every set of k is equally likely."""

    rng: random.Random
    needed: int  # of k, not taken yet
    remaining: int  # of n, not asked about yet

    def takes_next(self) -> bool:
        """Whether the next row is taken."""
        is_taken = self.rng.randrange(self.remaining) < self.needed
        self.remaining -= 1
        if is_taken:
            self.needed -= 1
        return is_taken


def interleaved(streams: list[Iterator[Item]], numbers: list[int], rng: random.Random) -> Iterator[Item]:
    """The items of streams with these numbers of items; each order in which the streams can take turns is as likely.

    Items of one stream keep their order. At the end every stream is read to its end.
    """
    remaining = list(numbers)
    while any(remaining):
        (index,) = rng.choices(range(len(streams)), remaining)
        remaining[index] -= 1
        yield next(streams[index])
    for stream in streams:
        yield from stream


# ---------------------------------------------------------------- mixtures


@dataclass
class Supply:
    """What a source has to give to a mixture."""

    source: str
    number: int  # of usable rows
    form: Form
    num_completions: int  # of its first row


def supply_of(source: str) -> Supply:
    """Read a source once. Raises UserError if it has no usable row."""
    counts = Counts()
    number = 0
    first = None
    for example in parse_rows(source, counts, PROMPT_FORMS):
        number += 1
        if first is None:
            first = example
    if first is None:
        raise UserError(f"{source}: no usable row; dropped: {dict(counts.dropped)}")
    return Supply(source, number, first.form, len(first.completions))


def common_form(supplies: list[Supply]) -> Callable[[Example], dict]:
    """How the rows of sources become rows of one form: as they are, or all pairs, or all demonstrations.

    Raises UserError if the sources have nothing in common.
    """
    first = supplies[0]
    if all((supply.form, supply.num_completions) == (first.form, first.num_completions) for supply in supplies):
        return lambda example: example.row
    if all(is_demonstration(supply.form) for supply in supplies):
        return as_demonstration
    if all(supply.num_completions == 2 and "completions" not in supply.form for supply in supplies):
        return as_pair
    described = [f"{supply.source} has {' + '.join(supply.form)} [{supply.num_completions}]" for supply in supplies]
    raise UserError(f"one file cannot hold these rows: {', '.join(described)}")


def mixture_counts(supplies: list[Supply], weights: list[float], total: int | None) -> list[int]:
    """How many rows to take of each source, for a mixture of `total` rows with these weights.

    total: by default the largest for which no row is taken twice. What rounding leaves goes to the largest remainders.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if total is None:
        limits = [supply.number / share for supply, share in zip(supplies, shares, strict=True)]
        total = math.floor(min(limits))

    wanted = [total * share for share in shares]
    numbers = [math.floor(number) for number in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda i: numbers[i] - wanted[i])
    for index in by_remainder[: total - sum(numbers)]:
        numbers[index] += 1
    return numbers


def mixture(supplies: list[Supply], numbers: list[int], seed: int, counts: Counts) -> Iterator[dict]:
    """So many rows of each source, chosen without replacement and interleaved at random, in one form.

    Rows that are not chosen are counted as dropped. Raises UserError if a source has too few rows.
    """
    to_row = common_form(supplies)
    streams = []
    for index, (supply, number) in enumerate(zip(supplies, numbers, strict=True)):
        if number > supply.number:
            raise UserError(f"{supply.source}: {number} rows are needed, but it has {supply.number} that can be used")
        picker = Picker(random.Random(f"{seed} {index}"), number, supply.number)
        streams.append(_chosen_rows(supply, picker, to_row, counts))
    return interleaved(streams, numbers, random.Random(seed))


def _chosen_rows(supply: Supply, picker: Picker, to_row: Callable[[Example], dict], counts: Counts) -> Iterator[dict]:
    for example in parse_rows(supply.source, counts, PROMPT_FORMS):
        if picker.takes_next():
            counts.noted.update(example.notes)
            yield to_row(example)
        else:
            counts.dropped[NOT_CHOSEN] += 1


# ---------------------------------------------------------------- length


@dataclass
class LengthCounts:
    """How many pairs prefer the longer completion, and how many the shorter one."""

    longer: int = 0
    shorter: int = 0

    def subset(self, share: float, total: int | None) -> "LengthCounts":
        """A subset of `total` pairs, by default the largest, in which the longer one is preferred in `share` of them.

        Raises UserError if there are too few pairs.
        """
        exact = Fraction(str(share))
        if total is None:
            limits = []
            if exact > 0:
                limits.append(self.longer / exact)
            if exact < 1:
                limits.append(self.shorter / (1 - exact))
            total = math.floor(min(limits))

        longer = math.floor(total * exact + Fraction(1, 2))
        wanted = LengthCounts(longer, total - longer)
        if wanted.longer > self.longer or wanted.shorter > self.shorter:
            raise UserError(f"a share of {share} in {total} pairs takes {wanted}; there are {self}")
        return wanted

    def __str__(self) -> str:
        return f"{self.longer} that prefer the longer and {self.shorter} that prefer the shorter"


def by_length(examples: Iterable[Example], encoder: Encoder, more: float) -> Iterator[tuple[int, bool]]:
    """The numbers of the rows of which one completion is longer, and whether it is preferred, as `prefers_longer` says.

    Other rows are counted in the encoder's counts.
    """
    for encoded in encode_in_chunks(examples, encoder):
        try:
            is_longer = prefers_longer(encoded, more)
        except Dropped as reason:
            encoder.counts.dropped[str(reason)] += 1
            continue
        encoder.counts.noted.update(encoded.notes)
        yield encoded.example.number, is_longer


class LengthPreferences:
    """Whether the longer completion of each pair is preferred, in one byte for each row of a source."""

    SHORTER = 1
    LONGER = 2

    def __init__(self, numbered: Iterable[tuple[int, bool]]):
        """`numbered`: what `by_length` gives."""
        self._of_rows = bytearray()  # 0 for rows that are left out
        for number, is_longer in numbered:
            self._of_rows.extend(bytes(number - len(self._of_rows)))
            self._of_rows[number - 1] = self.LONGER if is_longer else self.SHORTER

    def counts(self) -> LengthCounts:
        """The pairs of each kind."""
        return LengthCounts(self._of_rows.count(self.LONGER), self._of_rows.count(self.SHORTER))

    def of(self, examples: Iterable[Example]) -> Iterator[tuple[Example, bool]]:
        """Those examples of the source that are such pairs, each with whether its longer completion is preferred."""
        for example in examples:
            is_known = example.number <= len(self._of_rows)
            if is_known and self._of_rows[example.number - 1]:
                yield example, self._of_rows[example.number - 1] == self.LONGER


def length_biased(
    pairs: Iterable[tuple[Example, bool]], available: LengthCounts, wanted: LengthCounts, seed: int, counts: Counts
) -> Iterator[Example]:
    """A subset of the pairs, each such subset equally likely, in their order.

    pairs: each with whether its longer completion is preferred. available: the counts of all pairs; wanted: those of
    the subset. Pairs that are not chosen are counted as dropped.
    """
    pickers = {
        True: Picker(random.Random(f"{seed} longer"), wanted.longer, available.longer),
        False: Picker(random.Random(f"{seed} shorter"), wanted.shorter, available.shorter),
    }
    for example, is_longer in pairs:
        if pickers[is_longer].takes_next():
            yield example
        else:
            counts.dropped[NOT_CHOSEN] += 1


def prefers_longer(encoded: EncodedExample, more: float) -> bool:
    """Whether the longer completion of a pair is the preferred one.

    more: the longer one has at least this share more tokens; 0.1 for 10%. Tokens are counted as training counts them,
    with the end. Raises Dropped if neither is longer, if the scores are equal, or if a completion is empty.
    """
    example = encoded.example
    if len(encoded.completions) != 2:
        raise UserError(f"{example.location}: length bias needs pairs; the row has {len(encoded.completions)}")
    if any(map(is_blank, example.texts)) or any(completion.is_empty for completion in encoded.completions):
        raise Dropped("empty completion")
    lengths = [sum(completion.is_counted) for completion in encoded.completions]
    if _second_is_preferred(example):
        lengths.reverse()

    preferred, other = lengths
    ratio = 1 + Fraction(str(more))
    if preferred >= ratio * other:
        return True
    if other >= ratio * preferred:
        return False
    raise Dropped("about equally long")


def _second_is_preferred(example: Example) -> bool:
    """Whether scores put the second completion first, as they do for training."""
    if example.ranked or not example.scores:
        return False
    first, second = rewards_of(example)
    if first == second:
        raise Dropped("equal scores")
    return second > first
