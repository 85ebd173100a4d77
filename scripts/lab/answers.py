"""The answers: prompts with three answers of one word, for which π* and the reference policy are known.

A prompt says which group it is of, and a person, who sets the order of the answers:

    anna had a camera in may: tag        three, four or five

Each group has its own π* and its own policy to imitate, over the first, the second and the third answer of the person.
Item and month mean nothing. The tokenizer and the base model are those of the notices, the smaller one.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scripts.lab.notices import SLOTS

ANSWERS = SLOTS["number"][:3]
ORDERS = tuple(itertools.permutations(ANSWERS))
PERSONS = SLOTS["person"][: len(ORDERS)]
NO_ANSWERS = SLOTS["number"][-2:]  # words that stand for a pair where there is none


class Group(NamedTuple):
    """A kind of prompt: its word, and probabilities of the first, the second and the third answer."""

    verb: str
    pi_star: tuple[float, ...]
    pi_ref: tuple[float, ...]


GROUPS = {
    # x_g and x_b of arXiv 2407.09072, Eq 18. Two answers of x_b share the largest reward.
    "good": Group("found", (0.6, 0.3, 0.1), (0.6, 0.3, 0.1)),
    "tied": Group("lost", (0.4, 0.2, 0.4), (0.6, 0.2, 0.2)),
    # the likeliest answer is the worst one
    "bad": Group("had", (0.6, 0.3, 0.1), (0.2, 0.2, 0.6)),
}
GROUP_OF = {group.verb: name for name, group in GROUPS.items()}


def make_prompt(name: str, person: str, rng: random.Random) -> str:
    """A prompt of a group, with random words where they mean nothing."""
    item = rng.choice(SLOTS["item"])
    month = rng.choice(SLOTS["month"])
    return f"{person} {GROUPS[name].verb} a {item} in {month}: tag"


def random_prompts(rng: random.Random, exclude: set[str]) -> Iterator[str]:
    """Prompts without end, each group and each person equally often on average; none of `exclude`."""
    while True:
        prompt = make_prompt(rng.choice(list(GROUPS)), rng.choice(PERSONS), rng)
        if prompt not in exclude:
            yield prompt


def all_kinds(number: int, rng: random.Random) -> list[str]:
    """`number` different prompts of each group and each person."""
    prompts: dict[str, None] = {}  # in order
    for name, person in itertools.product(GROUPS, PERSONS):
        size = len(prompts) + number
        while len(prompts) < size:
            prompts[make_prompt(name, person, rng)] = None
    return list(prompts)


def group_of(prompt: str) -> str:
    """The name of a prompt's group. Raises ValueError for another text."""
    words = prompt.split()
    if len(words) < 2 or words[0] not in PERSONS or words[1] not in GROUP_OF:
        raise ValueError(f"no prompt of the answers: {prompt!r}")
    return GROUP_OF[words[1]]


def order_of(prompt: str) -> tuple[str, ...]:
    """The first, the second and the third answer to a prompt."""
    person = prompt.split()[0]
    return ORDERS[PERSONS.index(person)]


def draw_answer(prompt: str, rng: random.Random) -> str:
    """An answer of the policy to imitate."""
    group = GROUPS[group_of(prompt)]
    return rng.choices(order_of(prompt), group.pi_ref)[0]


def prefer(prompt: str, answers: Sequence[str], rng: random.Random) -> dict[str, str]:
    """A pair in the order of a preference, sampled from Bradley-Terry with r = log π*."""
    order = order_of(prompt)
    pi_star = GROUPS[group_of(prompt)].pi_star
    first, second = answers
    weights = [pi_star[order.index(first)], pi_star[order.index(second)]]
    if rng.choices((False, True), weights)[0]:
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def pair_without_preference(prompt: str, rng: random.Random) -> dict[str, str]:
    """A pair of two words that are no answers, in a random order: a preference loss says nothing on the answers."""
    chosen, rejected = rng.sample(NO_ANSWERS, 2)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def unusable(completions: Sequence[str]) -> str | None:
    """Why two completions say nothing about preferences; None if they do. Raises ValueError if they are not two."""
    if len(completions) != 2:
        raise ValueError(f"needs two completions, found {len(completions)}")
    if any(text not in ANSWERS for text in completions):
        return "no answer"
    if len(set(completions)) < 2:
        return "identical answers"
    return None
