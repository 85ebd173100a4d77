"""Scored completions → pairs, other labels, and the best of N. Ids that a policy drew go with their completions.

best_of()       the best of the first N completions
pairs_of()      all pairs of K completions, or the best against the worst
relabelled()    a row whose order follows its scores, or is a sample of the Bradley-Terry model
"""

import random
from itertools import combinations

from scripts.lab.notices import rank_by_preference
from scripts.lab.preparing import is_drawn, of_completions, prompt_of, reordered, rewards_of, rewritten
from shared import UserError
from shared.rows import Counts, Dropped, Example

LABEL_SCORES = "label_scores"


def best_of(example: Example, num_completions: int | None) -> dict:
    """The row with the completion of the highest score alone; the first of those with equal scores.

    num_completions: choose among the first of them, by default among all. A pair becomes `prompt`, `completion`,
    `score`. Raises Dropped if the row has fewer.
    """
    rewards = rewards_of(example)
    if num_completions is not None:
        if len(rewards) < num_completions:
            raise Dropped(f"fewer than {num_completions} completions")
        rewards = rewards[:num_completions]

    best = max(range(len(rewards)), key=lambda i: rewards[i])
    if "completions" in example.form:
        return of_completions(example.row, [best])
    completion = example.texts[best]
    return rewritten(example, {"prompt": prompt_of(example), "completion": completion, "score": rewards[best]})


# ---------------------------------------------------------------- pairs


def pairs_of(example: Example, counts: Counts, best_against_worst: bool, margin: float) -> list[dict]:
    """Rows of two completions, the better one first.

    best_against_worst: one pair for each row, otherwise all K (K - 1) / 2. margin: the least difference of the scores.
    Completions with equal scores are never a pair. Without scores the order is the ranking, and a margin has no
    meaning. Raises Dropped if no pair is left.
    """
    num_completions = len(example.completions)
    if num_completions < 2:
        raise UserError(f"{example.location}: pairs need two completions; the row has {num_completions}")
    ranks = list(range(num_completions))
    if not example.scores and not is_drawn(example) and not margin:
        rewards = [-float(rank) for rank in ranks]
    else:
        rewards = rewards_of(example)

    candidates = list(combinations(ranks, 2))
    if best_against_worst:
        ranks.sort(key=lambda i: -rewards[i])
        candidates = [(ranks[0], ranks[-1])]

    rows = []
    for pair in candidates:
        better, worse = sorted(pair, key=lambda i: -rewards[i])
        difference = rewards[better] - rewards[worse]
        if difference == 0:
            counts.noted["pairs with equal scores"] += 1
        elif difference < margin:
            counts.noted["pairs within the margin"] += 1
        else:
            rows.append(reordered(example, [better, worse]))
    if not rows:
        raise Dropped("no pair left")
    return rows


# ---------------------------------------------------------------- labels


def relabelled(example: Example, counts: Counts, seed: int | None) -> dict:
    """The row with its completions in a new order, by their scores.

    seed: None for the order of the scores, else for a sample of the Bradley-Terry model, P(i before j) =
    sigmoid(r_i - r_j), or of Plackett-Luce for more than two. A row's sample depends on the seed and on its number in
    the source alone.

    Training ranks a row of completions by its `scores`. A sampled order would be lost there, so these rows have
    `label_scores` instead. Raises Dropped if two scores are equal and no seed decides.
    """
    rewards = rewards_of(example)
    if seed is None:
        if len(set(rewards)) < len(rewards):
            raise Dropped("equal scores")
        order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    else:
        rng = random.Random(f"{seed} {example.number}")
        order = rank_by_preference(rewards, rng)

    if order != sorted(order):
        counts.noted["other order than before"] += 1
    row = reordered(example, order)
    is_sampled_ranking = seed is not None and "completions" in example.form
    if is_sampled_ranking:
        row[LABEL_SCORES] = row.pop("scores")
    return row
