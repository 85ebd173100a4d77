"""Pairs of completions for a judge, the judge's verdicts on them, and what the verdicts say.

paired()      two sources of rows → pairs of completions of the same prompt
judge_all()   pairs → judgments, by asking an endpoint
findings()    judgments → win rate, bias to a position, agreement, each with its interval

The score of a verdict is that of the completion against the baseline: 1 for a win, 0.5 for a tie, 0 for a loss.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from scripts.lab import notices
from scripts.lab.endpoint import Endpoint, Failed, answer_all, key_of
from scripts.lab.questions import Question, completion_text, is_apology, prompt_text
from scripts.lab.row_files import read_examples, summary
from scripts.lab.statistics import mean_and_interval
from shared import UserError
from shared.rows import Counts, Example, Text

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
UNUSABLE = ("unparsed", "refused", "failed")  # outcomes without a score
IDENTICAL = "identical"  # a pair that nobody needs to judge


@dataclass
class Pair:
    """A completion and the baseline's completion of the same prompt."""

    number: int  # of the prompt, from 0
    prompt: str  # as the judge reads it
    completion: str
    baseline: str
    raw_prompt: object  # as the oracle reads it
    location: str  # of the row with the completion
    label: float | None = None  # the score that people gave

    @property
    def is_identical(self) -> bool:
        """Whether both texts are the same, which is a tie."""
        return self.completion == self.baseline


@dataclass
class Judgment:
    """What the judge says of a pair in one order."""

    pair: Pair
    baseline_first: bool  # the baseline is A
    outcome: str  # win, tie, loss, identical or one of UNUSABLE
    answer: str | None = None
    detail: str = ""  # why there is no answer, or how it ended

    @property
    def score(self) -> float | None:
        """Of the completion against the baseline; None if there is none."""
        if self.outcome == IDENTICAL:
            return 0.5
        return SCORES.get(self.outcome)


# ---------------------------------------------------------------- pairs


def paired(
    rows: str, baseline: str | None, num_prompts: int | None, num_completions: int, label_column: str | None
) -> tuple[list[Pair], int]:
    """The pairs of the first prompts that both sources have, and the number of rows without a partner.

    Without a baseline a row's chosen completion is paired with its rejected one. Otherwise the first `num_completions`
    of a row are paired with the baseline's, one by one, or all with its only one. A prompt that comes n times is paired
    n times, in the order of the files. Raises UserError for rows that cannot be paired.
    """
    examples = examples_of(rows)
    if baseline is None:
        matched = [(example, chosen_texts(example), rejected_texts(example)) for example in examples]
    else:
        matched = _matched(examples, examples_of(baseline))
    if not matched:
        raise UserError(f"{baseline}: has no prompt of {rows}")

    pairs = []
    for number, (example, ours, theirs) in enumerate(matched[:num_prompts]):
        pairs += _pairs_of(number, example, ours[:num_completions], theirs[:num_completions], label_column)
    return pairs, len(examples) - len(matched)


def examples_of(source: str) -> list[Example]:
    """The examples of a source. Raises UserError if there are none, and for a row without a completion."""
    counts = Counts()
    examples = list(read_examples(source, counts))
    summary(source, len(examples), counts)
    for example in examples:
        if not example.completions:
            raise UserError(f"{example.location}: has no completion to judge")
    return examples


def _matched(examples: list[Example], others: list[Example]) -> list[tuple[Example, list[Text], list[Text]]]:
    """Each example that has a partner of the same prompt, and the completions of both."""
    partners: dict[str, list[Example]] = defaultdict(list)
    for other in reversed(others):
        partners[prompt_text(other.prompt)].append(other)

    matched = []
    for example in examples:
        candidates = partners[prompt_text(example.prompt)]
        if candidates:
            partner = candidates.pop()  # the first that is left
            matched.append((example, chosen_texts(example), chosen_texts(partner)))
    return matched


def chosen_texts(example: Example) -> list[Text]:
    """All of `completions`, else the chosen or the only completion."""
    if "completions" in example.form:
        return example.texts
    return example.texts[:1]


def rejected_texts(example: Example) -> list[Text]:
    """The rejected completion. Raises UserError if there is none."""
    if "completions" in example.form or len(example.texts) != 2:
        raise UserError(f"{example.location}: is no pair of chosen and rejected; give --baseline")
    return example.texts[1:]


def _pairs_of(
    number: int, example: Example, ours: list[Text], theirs: list[Text], label_column: str | None
) -> list[Pair]:
    if len(theirs) == 1:
        theirs = theirs * len(ours)
    if len(ours) != len(theirs):
        problem = f"{len(ours)} completions against {len(theirs)} of the baseline"
        raise UserError(f"{example.location}: {problem}; give --num-completions 1")
    labels = _labels_of(example, label_column, len(ours))
    for text in (example.prompt, *ours, *theirs):
        if isinstance(text, list) and any(message.get("tool_calls") for message in text):
            raise UserError(f"{example.location}: calls tools, which a judge is not shown")

    prompt = prompt_text(example.prompt)
    pairs = []
    for our_text, their_text, label in zip(ours, theirs, labels, strict=True):
        our_text = completion_text(our_text)
        their_text = completion_text(their_text)
        pairs.append(Pair(number, prompt, our_text, their_text, example.prompt, example.location, label))
    return pairs


def _labels_of(example: Example, column: str | None, num_pairs: int) -> list[float | None]:
    """The scores that people gave: one number, or one for each completion."""
    if column is None:
        return [None] * num_pairs
    if column not in example.row:
        raise UserError(f"{example.location}: has no column {column!r}")
    values = example.row[column]
    if not isinstance(values, list):
        values = [values]
    labels = values[:num_pairs]
    if len(labels) != num_pairs or any(label not in (0, 0.5, 1, None) for label in labels):
        form = "1 (the row's completion is better), 0 (the baseline's) or 0.5 (a tie)"
        raise UserError(f"{example.location}: field {column!r} must hold {form}, for each completion")
    return labels


# ---------------------------------------------------------------- orders and verdicts


def orders_of(pair: Pair, both_orders: bool, seed: int) -> list[bool]:
    """For each time that a pair is asked, whether the baseline is A. One order depends on the seed and the texts."""
    if pair.is_identical:
        return []
    if both_orders:
        return [False, True]
    rng = random.Random(f"{seed} {pair.prompt} {pair.completion} {pair.baseline}")
    return [rng.random() < 0.5]


def question_about(question: Question, pair: Pair, baseline_first: bool) -> str:
    """The question with the pair in one order."""
    if baseline_first:
        return question.about(pair.prompt, pair.baseline, pair.completion)
    return question.about(pair.prompt, pair.completion, pair.baseline)


def judgment_of(question: Question, pair: Pair, baseline_first: bool, response: dict | Failed) -> Judgment:
    """The verdict in a response. A response that holds none is a refusal, or it could not be parsed."""
    if isinstance(response, Failed):
        return Judgment(pair, baseline_first, "failed", None, str(response))

    choice = response["choices"][0]
    refusal = choice["message"].get("refusal")
    answer = choice["message"].get("content") or ""
    ending = str(choice.get("finish_reason") or "")
    verdict = question.verdict(answer)
    if refusal or ending == "content_filter":
        return Judgment(pair, baseline_first, "refused", refusal or answer, ending)
    if verdict is None:
        outcome = "unparsed"
        if is_apology(answer):
            outcome = "refused"
        return Judgment(pair, baseline_first, outcome, answer, ending)
    if verdict == "tie":
        return Judgment(pair, baseline_first, "tie", answer, ending)

    prefers_baseline = (verdict == "A") == baseline_first
    outcome = "win"
    if prefers_baseline:
        outcome = "loss"
    return Judgment(pair, baseline_first, outcome, answer, ending)


@dataclass
class Judged:
    """A pair with its judgments: one, or one in each order."""

    pair: Pair
    judgments: list[Judgment]

    @property
    def score(self) -> float | None:
        """The mean over the orders. None unless all have one: with one order left, the position would count."""
        scores = [judgment.score for judgment in self.judgments if judgment.score is not None]
        if len(scores) < len(self.judgments):
            return None
        return sum(scores) / len(scores)


def judge_all(
    pairs: list[Pair],
    question: Question,
    body_about: Callable[[str], dict],
    both_orders: bool,
    seed: int,
    endpoint: Endpoint,
    concurrency: int,
) -> tuple[list[Judged], dict[str, dict | Failed]]:
    """Each pair with its judgments, and the responses by their keys.

    body_about: the request that asks a question.
    """
    requests = []
    for index, pair in enumerate(pairs):
        for baseline_first in orders_of(pair, both_orders, seed):
            body = body_about(question_about(question, pair, baseline_first))
            requests.append((index, baseline_first, body))
    answers = answer_all(endpoint, [body for _, _, body in requests], concurrency)

    judged = [Judged(pair, []) for pair in pairs]
    for index, baseline_first, body in requests:
        response = answers[key_of(endpoint.url, body)]
        judged[index].judgments.append(judgment_of(question, pairs[index], baseline_first, response))
    for item in judged:
        if not item.judgments:
            item.judgments.append(Judgment(item.pair, False, IDENTICAL))
    return judged, answers


# ---------------------------------------------------------------- findings


def over_prompts(judged: Iterable[Judged], value: Callable[[Judged], float | None], seed: int) -> dict | None:
    """The mean of a value of pairs and its interval. Prompts are resampled. None if no pair has the value."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for item in judged:
        number = value(item)
        if number is not None:
            by_prompt[item.pair.number].append(number)
    if not by_prompt:
        return None
    means = [sum(values) / len(values) for values in by_prompt.values()]
    count = sum(map(len, by_prompt.values()))
    return {**mean_and_interval(torch.tensor(means, dtype=torch.double), seed), "pairs": count}


def findings(judged: list[Judged], seed: int) -> dict:
    """Win rate, shares of wins, ties and losses, the bounds of the win rate, bias to a position, and counts.

    The bounds are the win rates of all pairs together if those without a score were lost, and if they were won.
    """
    bounds = []
    for missing in (0.0, 1.0):
        number = over_prompts(judged, partial(score_or, missing), seed)
        assert number is not None
        bounds.append(number["mean"])

    scores = [item.score for item in judged if item.score is not None]
    return {
        "win_rate": over_prompts(judged, lambda item: item.score, seed),
        "win_rate_bounds": bounds,
        "wins": sum(score > 0.5 for score in scores),
        "ties": sum(score == 0.5 for score in scores),
        "losses": sum(score < 0.5 for score in scores),
        "unusable_pairs": len(judged) - len(scores),
        "first_preferred": over_prompts(judged, first_preferred, seed),
        "orders_agree": over_prompts(judged, orders_agree, seed),
        "judgments": outcome_counts(judged),
    }


def score_or(missing: float, judged: Judged) -> float:
    """The score, or `missing` where there is none."""
    if judged.score is None:
        return missing
    return judged.score


def first_preferred(judged: Judged) -> float | None:
    """The mean over the orders of 1 if what was shown first is preferred, 0.5 for a tie, 0 otherwise."""
    if judged.score is None or judged.pair.is_identical:
        return None
    values = []
    for judgment in judged.judgments:
        score = judgment.score
        assert score is not None
        if judgment.baseline_first:
            score = 1 - score
        values.append(score)
    return sum(values) / len(values)


def orders_agree(judged: Judged) -> float | None:
    """Whether both orders have the same verdict, 1 or 0. None if there are not two."""
    if judged.score is None or len(judged.judgments) < 2:
        return None
    outcomes = {judgment.outcome for judgment in judged.judgments}
    return float(len(outcomes) == 1)


def agreement(judged: list[Judged], reference: Callable[[Pair], float | None], seed: int) -> dict:
    """How a reference scores the same pairs, and how often the judge agrees with it.

    The agreement is over pairs on which the reference has a preference. It is the mean over the judgments of 1 for the
    same preference, 0.5 for a tie, 0 for the opposite one.
    """

    def reference_score(item: Judged) -> float | None:
        if item.score is None:
            return None
        return reference(item.pair)

    def agrees(item: Judged) -> float | None:
        score = item.score
        target = reference_score(item)
        if score is None or target is None or target == 0.5:
            return None
        if target == 0:
            return 1 - score
        return score

    return {
        "agreement": over_prompts(judged, agrees, seed),
        "win_rate": over_prompts(judged, reference_score, seed),
        "ties": sum(reference_score(item) == 0.5 for item in judged),
    }


def notices_score(pair: Pair) -> float:
    """The score of a pair by the oracle of the notices. Raises UserError if the prompt is no notice."""
    if not isinstance(pair.raw_prompt, str):
        raise UserError(f"{pair.location}: --oracle notices scores plain texts, not chat messages")
    try:
        ours = notices.oracle(pair.raw_prompt, pair.completion)
        theirs = notices.oracle(pair.raw_prompt, pair.baseline)
    except ValueError as error:
        raise UserError(f"{pair.location}: --oracle notices: {error}") from None
    if ours == theirs:
        return 0.5
    return float(ours > theirs)


def outcome_counts(judged: list[Judged]) -> dict[str, int]:
    """How many judgments have each outcome."""
    counts = Counter(dict.fromkeys((*SCORES, IDENTICAL, *UNUSABLE), 0))
    for item in judged:
        counts.update(judgment.outcome for judgment in item.judgments)
    return dict(counts)


def outcome_text(judged: list[Judged]) -> str:
    """The outcomes that there are, in words, with the last failure."""
    counts = [f"{outcome} {count}" for outcome, count in outcome_counts(judged).items() if count]
    text = ", ".join(counts)
    failures = [judgment.detail for item in judged for judgment in item.judgments if judgment.outcome == "failed"]
    if failures:
        text += f"; the last failure: {failures[-1]}"
    return text
