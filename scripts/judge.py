"""Let a language model judge which completions are better, as the papers do: a win rate with its interval.

The judge is any OpenAI-compatible endpoint (`--endpoint http://…/v1`). Its key, if it wants one, is read from an
environment variable. Two sets of completions of the same prompts are compared:

    --rows --baseline    rows of `completions`, as scripts/sample.py writes them, or the `chosen` of pairs, in either
    --rows alone         pairs: their chosen against their rejected; the win rate is the agreement with the pairs

Pairs are shown in a random order that the seed fixes, or with `--both-orders` in both. The questions ask what the
papers' prompts ask, in our wording: `summary`, `concise-summary` and `dialogue` (DPO), `multi-turn` (EXO),
`helpful-harmless` (TYPO). `--question FILE` takes a text of your own with {prompt}, {a} and {b}; docs/judge.md says
where the papers' texts are.

Every answer is kept on disk, so that the same run again costs nothing and an interrupted one goes on. Answers without a
verdict, refusals and failed requests are counted. OUTPUT is written with the numbers, and beside it a jsonl file with
every judgment and its raw answer.

    python scripts/judge.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B --question concise-summary \\
        --rows runs/samples.jsonl --baseline held_out_pairs.jsonl --both-orders --output runs/judge.json
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from scripts.lab.commands import checked_command
from scripts.lab.endpoint import Endpoint, Failed, check_key, failure_counts
from scripts.lab.judging import Judged, agreement, findings, judge_all, notices_score, outcome_text, paired
from scripts.lab.questions import Question, question_of
from scripts.lab.row_files import write_jsonl
from scripts.lab.statistics import interval_text
from scripts.lab.tables import aligned
from shared import UserError
from shared.command import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from shared.files import write_json


@dataclass(kw_only=True)
class Args:
    """Let a language model judge which completions are better."""

    endpoint: str
    """address of the judge up to /v1, such as http://localhost:8000/v1"""
    model: str
    """name of the judge at the endpoint"""
    rows: str
    """file, directory or hub id (`path:split`) of the completions"""
    output: Path
    """json file to write; the judgments go to a jsonl file of the same name"""
    baseline: str | None = None
    """file, directory or hub id of the completions to win against; default: the rejected of `--rows`"""
    question: str = "concise-summary"
    """name of a question, or a file with {prompt}, {a} and {b}"""
    both_orders: bool = False
    """ask twice, with either completion first; otherwise once, in a random order"""
    num_prompts: PositiveInt | None = None
    """take the first prompts only"""
    num_completions: PositiveInt = 1
    """completions of each prompt, at most"""
    oracle: Literal["notices"] | None = None
    """compare the judge with this oracle"""
    labels: str | None = None
    """column of `--rows` with people's verdicts: 1 for its completion, 0 for the baseline's, 0.5 for a tie"""
    temperature: NonNegativeFloat = 0.0
    """sampling temperature of the judge"""
    max_tokens: PositiveInt = 256
    """tokens of an answer, at most"""
    parameters: str = "{}"
    """JSON object of other fields of each request; null leaves a field out"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key, if it wants one"""
    concurrency: PositiveInt = 8
    """requests under way at the same time"""
    timeout: PositiveFloat = 120.0
    """seconds until an answer counts as lost"""
    retries: NonNegativeInt = 5
    """repetitions of a request after an error that may pass"""
    max_requests: PositiveInt | None = None
    """budget: requests that are sent at most, the repeated ones included"""
    seed: Seed = 0
    """seed of the orders and of the intervals"""


def main(args: Args) -> None:
    """Pair the completions, ask the judge, write judgments and numbers."""
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: must end in .json")
    question = question_of(args.question)
    parameters = parameters_of(args)
    key = check_key(args.key_variable, os.environ.get(args.key_variable))
    endpoint = Endpoint(args.endpoint, key, args.timeout, args.retries, args.max_requests)

    pairs, num_unmatched = paired(args.rows, args.baseline, args.num_prompts, args.num_completions, args.labels)
    if args.oracle:
        for pair in pairs:
            notices_score(pair)  # a prompt that is no notice ends the run before anything is asked

    body_about = partial(request_body, args, parameters)
    judged, answers = judge_all(pairs, question, body_about, args.both_orders, args.seed, endpoint, args.concurrency)

    # the judgments are there to be read even if none of them can be used
    judgments = args.output.with_suffix(".jsonl")
    write_jsonl(judgments, judgment_rows(judged))
    print(f"requests sent: {endpoint.sent}; judgments: {outcome_text(judged)}", file=sys.stderr)
    if all(item.score is None for item in judged):
        raise UserError(f"{judgments}: holds no judgment that can be used; {outcome_text(judged)}")

    results = results_of(args, question, judged, answers, num_unmatched)
    write_json(args.output, results)
    print(table(results))


def parameters_of(args: Args) -> dict:
    """The further fields of each request. Raises UserError if they are no JSON object."""
    try:
        parameters = json.loads(args.parameters)
    except ValueError as error:
        raise UserError(f"--parameters: not JSON ({error})") from None
    if not isinstance(parameters, dict):
        raise UserError("--parameters: must be a JSON object")
    return parameters


def request_body(args: Args, parameters: dict, text: str) -> dict:
    """A request with one message."""
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        **parameters,
    }
    return {name: value for name, value in body.items() if value is not None}


def results_of(
    args: Args, question: Question, judged: list[Judged], answers: dict[str, dict | Failed], num_unmatched: int
) -> dict:
    """All numbers, with what they depend on."""
    settings = dataclasses.asdict(args)
    settings["output"] = str(args.output)
    results: dict[str, Any] = {"args": settings, "question": question.text}
    results["prompts"] = len({item.pair.number for item in judged})
    results["pairs"] = len(judged)
    results["rows_without_partner"] = num_unmatched
    results |= findings(judged, args.seed)
    results["failures"] = dict(failure_counts(answers))
    results["usage"] = usage_of(answers)
    if args.oracle:
        results["oracle"] = agreement(judged, notices_score, args.seed)
    if args.labels:
        results["labels"] = agreement(judged, lambda pair: pair.label, args.seed)
    return results


def usage_of(answers: dict[str, dict | Failed]) -> dict[str, int]:
    """The tokens of all questions and answers, as the endpoint counts them."""
    totals = {"prompt_tokens": 0, "completion_tokens": 0}
    for answer in answers.values():
        if isinstance(answer, Failed) or not isinstance(answer.get("usage"), dict):
            continue
        for name in totals:
            totals[name] += answer["usage"].get(name) or 0
    return totals


def judgment_rows(judged: list[Judged]) -> Iterator[dict]:
    """One row for each judgment, with its texts and the raw answer."""
    for item in judged:
        for judgment in item.judgments:
            pair = judgment.pair
            yield {
                "prompt_number": pair.number,
                "prompt": pair.prompt,
                "completion": pair.completion,
                "baseline": pair.baseline,
                "baseline_first": judgment.baseline_first,
                "outcome": judgment.outcome,
                "score": judgment.score,
                "answer": judgment.answer,
                "detail": judgment.detail,
            }


def table(results: dict) -> str:
    """The numbers with their intervals, a line each."""
    numbers = {
        "win rate": results["win_rate"],
        "first preferred": results["first_preferred"],
        "both orders agree": results["orders_agree"],
    }
    for name in ("oracle", "labels"):
        if name in results:
            numbers[f"win rate by the {name}"] = results[name]["win_rate"]
            numbers[f"agreement with the {name}"] = results[name]["agreement"]

    lines = [["measure", "mean [95% interval]", "pairs"]]
    for name, number in numbers.items():
        if number is not None:
            lines.append([name, interval_text(number, ".3f"), str(number["pairs"])])
    return aligned(lines)


if __name__ == "__main__":
    checked_command(main, Args)
