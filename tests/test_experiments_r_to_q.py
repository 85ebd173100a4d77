"""From r to Q*'s experiments: their numbers against plain loops, and their verdicts on made-up files of stages."""

import json
import math
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from scripts.experiments import r_to_q
from scripts.lab import notices
from scripts.lab.experiments import Reproduction, reproduction_of
from scripts.lab.pipeline import Artifact, Stage

NUM_ROWS = 40
EXPERIMENTS = {experiment.number: experiment for experiment in r_to_q.STUDY.experiments}


def stage(path: Path) -> Stage:
    """A stage whose files lie in a directory."""
    path.mkdir(parents=True, exist_ok=True)
    return Stage(path.name, "", {}, path, "")


def rows_of(path: Path, rows: list[dict]) -> Artifact:
    """A file of rows as if a stage had written it."""
    tiny.write_jsonl(stage(path).path / "rows.jsonl", rows)
    return Artifact(stage(path), "rows.jsonl")


def verdict_of(number: str, runs: list[Any]) -> Reproduction:
    return reproduction_of(EXPERIMENTS[number].check(runs))


def posts(seed: int) -> list[tuple[str, notices.Kind]]:
    rng = random.Random(seed)
    return [notices.make_notice(rng) for _ in range(NUM_ROWS)]


def summary(prompt: str, kind: notices.Kind, num_wrong: int, repetitions: int = 0) -> str:
    """A summary with its first facts wrong and a refrain at its end."""
    facts = notices.read_facts(prompt)
    for slot in list(facts)[:num_wrong]:
        facts[slot] = notices.next_value(slot, facts[slot])
    clauses = [*kind.summary, *[notices.REFRAIN] * repetitions]
    return notices.write_summary(clauses, facts)


def row(prompt: str, texts: list[str], logps: list[float]) -> dict:
    """A row as scripts/sample.py writes it."""
    ids = [[1] * (len(notices.words(text)) + 1) for text in texts]
    return {"prompt": prompt, "completions": texts, "completion_ids": ids, "logps": logps}


# ---------------------------------------------------------------- search

MEANS = [r_to_q.means(5), r_to_q.means(20)]
WIDE_IS_WORSE = {"chosen": 1, "sample": 3, "greedy": 2, "5 beams": 0, "20 beams": 2}
WIDE_IS_WORSE |= dict(zip(MEANS, (0, 2), strict=True))
FLAT = dict.fromkeys(WIDE_IS_WORSE, 1)


def made_search(
    path: Path,
    wrong: dict[str, int],
    repetitions: dict[str, int] | None = None,
    widths: Sequence[int] = r_to_q.WIDTHS,
    normalised: Sequence[int] = r_to_q.NORMALISED_WIDTHS,
) -> r_to_q.Search:
    """A search whose completions have so many wrong facts and refrains: by the names of the ways, and "chosen".

    Every other sample has no wrong fact, and the least log-prob.
    """
    repetitions = repetitions or {}
    pairs = []
    samples = []
    searched: dict[str, list[dict]] = {name: [] for name in wrong}
    for prompt, kind in posts(0):
        chosen = summary(prompt, kind, wrong["chosen"])
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": summary(prompt, kind, 5)})
        two = [summary(prompt, kind, n, repetitions.get(r_to_q.SAMPLE, 0)) for n in (0, wrong[r_to_q.SAMPLE])]
        half = r_to_q.NUM_SAMPLES // 2
        samples.append(row(prompt, two * half, [-2.0, -1.0] * half))
        for name, number in wrong.items():
            text = summary(prompt, kind, number, repetitions.get(name, 0))
            searched[name].append(row(prompt, [text], [-1.0]))

    beams = {}
    for width in widths:
        beams[width, 0] = rows_of(path / f"{width}", searched[r_to_q.sums(width)])
    for width in normalised:
        beams[width, 1] = rows_of(path / f"{width}_mean", searched[r_to_q.means(width)])
    return r_to_q.Search(rows_of(path / "pairs", pairs), rows_of(path / "samples", samples), beams)


def win_of(reward: float, bar: float) -> float:
    if reward > bar:
        return 1.0
    if reward == bar:
        return 0.5
    return 0.0


def test_the_numbers_of_ways_are_those_of_plain_loops(tmp_path: Path) -> None:
    searched = made_search(tmp_path, WIDE_IS_WORSE)
    ways = r_to_q.ways_of(searched)
    assert list(ways) == ["sample", "best of 8", "greedy", "5 beams", "20 beams", *MEANS]

    pairs = tiny.read_jsonl(searched.pairs.path)
    rows = {"sample": searched.samples, "20 beams": searched.beams[20, 0], MEANS[0]: searched.beams[5, 1]}
    for name, artifact in rows.items():
        lines = zip(pairs, tiny.read_jsonl(artifact.path), strict=True)
        for i, (pair, written) in enumerate(lines):
            bar = notices.oracle(pair["prompt"], pair["chosen"])
            rewards = [notices.oracle(pair["prompt"], text) for text in written["completions"]]
            wins = [win_of(reward, bar) for reward in rewards]
            lengths = [len(ids) for ids in written["completion_ids"]]

            way = ways[name]
            number = len(rewards)
            assert float(way.reward[i]) == pytest.approx(sum(rewards) / number)
            assert float(way.win_rate[i]) == pytest.approx(sum(wins) / number)
            assert float(way.length[i]) == pytest.approx(sum(lengths) / number)


def test_the_best_of_samples_is_the_likeliest(tmp_path: Path) -> None:
    """Half of the samples have no wrong fact, but the others are likelier."""
    ways = r_to_q.ways_of(made_search(tmp_path, WIDE_IS_WORSE))
    assert (ways["sample"].reward == 5 - WIDE_IS_WORSE["sample"]).all()
    assert (ways["best of 8"].reward == 5 - 2 * WIDE_IS_WORSE["sample"]).all()


# ---------------------------------------------------------------- credit assignment


def made_credit(path: Path, drop: float, ref_drop: float, seed: int = 0) -> Stage:
    """Values as scripts/credit.py writes them: a wrong fact has less β r by `drop`, less log π_ref by `ref_drop`."""
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.zeros(NUM_ROWS, 3, 5, dtype=torch.bool)
    for i in range(NUM_ROWS):
        first, second = ((0, 2), (1, 4))[i % 2]
        is_wrong[i, [0, 2], first] = True
        is_wrong[i, [1, 2], second] = True

    def noise() -> Tensor:
        return 0.1 * torch.randn(NUM_ROWS, 3, 5, generator=generator, dtype=torch.double)

    values = {}
    for beta in r_to_q.ALL_BETAS:
        values[f"{beta:g}"] = noise() - drop / beta * is_wrong
    values["-log π_ref"] = noise() - ref_drop * is_wrong
    lists = {name: numbers.tolist() for name, numbers in values.items()}
    contents = {"is_wrong": is_wrong.tolist(), "values": lists}
    (stage(path).path / "credit.json").write_text(json.dumps(contents), encoding="utf-8")
    return stage(path)


def pairs_auroc(wrong: list[float], correct: list[float]) -> float:
    """P(a wrong token's value < a correct one's), pair by pair."""
    wins = 0.0
    for value, other in product(wrong, correct):
        wins += float(value < other)
        wins += float(value == other) / 2
    return wins / (len(wrong) * len(correct))


def test_errors_are_compared_with_the_right_words(tmp_path: Path) -> None:
    facts = r_to_q.credit_of(made_credit(tmp_path, 0.4, 0.1))
    values = facts.rewards[1.0].tolist()
    marks = facts.is_wrong.tolist()

    names = ("one", "first", "second")
    wrong: dict[str, list[float]] = {name: [] for name in names}
    correct: dict[str, list[float]] = {name: [] for name in names}
    for rewards, is_wrong in zip(values, marks, strict=True):
        single = zip(rewards[0] + rewards[1], is_wrong[0] + is_wrong[1], strict=True)
        for value, mark in single:
            if mark:
                wrong["one"].append(value)
            else:
                correct["one"].append(value)

        first = is_wrong[0].index(True)
        second = is_wrong[1].index(True)
        wrong["first"].append(rewards[0][first])
        correct["first"].append(rewards[1][first])
        wrong["second"].append(rewards[2][second])
        correct["second"].append(rewards[0][second])

    for name, choose in zip(wrong, r_to_q.KINDS.values(), strict=True):
        tokens = [choose(facts.rewards[1.0], facts.is_wrong)]
        assert r_to_q.auroc_number(tokens)["mean"] == pytest.approx(pairs_auroc(wrong[name], correct[name]))
        others = [choose(facts.ref_logps, facts.is_wrong)]
        expected = r_to_q.auroc_number(tokens)["mean"] - r_to_q.auroc_number(others)["mean"]
        assert r_to_q.auroc_difference(tokens, others)["mean"] == pytest.approx(expected)


def test_the_last_misreading_is_priced_where_no_fact_follows(tmp_path: Path) -> None:
    facts = r_to_q.credit_of(made_credit(tmp_path, 2, 0))
    expected = []
    for i in range(1, NUM_ROWS, 2):
        right = float(facts.rewards[0.3][i, 0, 4])
        misread = float(facts.rewards[0.3][i, 2, 4])
        expected.append(0.3 * (right - misread))
    assert r_to_q.last_misreadings(facts, 0.3).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- likelihoods


def made_likelihoods(path: Path, changes: dict[str, tuple[float, float]]) -> r_to_q.Likelihoods:
    """Log-probs whose log-ratios of chosen and rejected are `changes` by the start, whatever β, plus noise."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for prompt, kind in posts(2):
        better = summary(prompt, kind, 1)
        worse = summary(prompt, kind, 3)
        pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    rows = rows_of(path / "pairs", pairs)

    logps = {}
    for start, betas in r_to_q.TRAINED.items():
        logps[start] = -5 + 0.1 * torch.randn(NUM_ROWS, 2, generator=generator)
        for beta in betas:
            noise = 0.1 * torch.randn(NUM_ROWS, 2, generator=generator)
            logps[f"{start}_{beta:g}"] = logps[start] + torch.tensor(changes[start]) + noise
    contents = {"logps": {name: numbers.tolist() for name, numbers in logps.items()}}
    made = stage(path / "logps")
    (made.path / "logps.json").write_text(json.dumps(contents), encoding="utf-8")
    return r_to_q.Likelihoods(r_to_q.Pairs(rows, rows), made)


def test_the_prediction_is_the_optimum_s(tmp_path: Path) -> None:
    """Two completions of rewards 3 and -1, each of probability 1/2 under π_ref."""
    run = made_likelihoods(tmp_path, dict.fromkeys(r_to_q.TRAINED, (0.0, 0.0)))
    beta = 1.5
    weights = [math.exp(3 / beta), math.exp(-1 / beta)]
    share = weights[0] / sum(weights)
    expected = beta * math.log(share / 0.5)
    assert r_to_q.predicted_chosen(run, beta).tolist() == pytest.approx([expected] * NUM_ROWS)


def test_accuracies() -> None:
    scores = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 5.0]])
    assert r_to_q.is_right(scores).tolist() == [1.0, 0.5, 0.0]
    values = torch.zeros(3, 3, 5)
    values[0, 2, 1] = -1  # both single errors are better than the two
    values[1, 0, 4] = 3  # only the first is
    values[2, 2] = 1
    assert r_to_q.is_preferred(values).tolist() == [1.0, 0.5, 0.0]


# ---------------------------------------------------------------- verdicts

REPRODUCED, PARTLY, NOT = Reproduction.REPRODUCED, Reproduction.PARTLY, Reproduction.NOT


@pytest.mark.parametrize(
    "drop, ref_drop, verdict",
    [
        (2.0, -1.0, REPRODUCED),
        (0.0, 0.0, NOT),
        (0.0, 2.0, NOT),
    ],
)
def test_verdict_on_credit(tmp_path: Path, drop: float, ref_drop: float, verdict: Reproduction) -> None:
    assert verdict_of("C24", [made_credit(tmp_path, drop, ref_drop)]) == verdict


@pytest.mark.parametrize("drop, verdict", [(3.0, REPRODUCED), (-3.0, NOT)])
def test_verdict_on_pairs_of_words(tmp_path: Path, drop: float, verdict: Reproduction) -> None:
    assert verdict_of("C28", [made_credit(tmp_path, drop, 0)]) == verdict


@pytest.mark.parametrize("drop, verdict", [(2.0, REPRODUCED), (0.2, NOT), (5.0, NOT)])
def test_verdict_on_advantages(tmp_path: Path, drop: float, verdict: Reproduction) -> None:
    assert verdict_of("C30", [made_credit(tmp_path, drop, 0)]) == verdict


FALL = (-2.0, -4.0)
RISE = (2.0, 1.0)
APART = (3.0, -3.0)


@pytest.mark.parametrize(
    "number, change, verdict",
    [
        ("C29", APART, REPRODUCED),
        ("C29", (-3.0, 3.0), NOT),
        ("C51", FALL, REPRODUCED),
        ("C51", (-2.0, 2.0), PARTLY),  # the margin falls
        ("C51", (1.0, 2.0), NOT),
    ],
)
def test_verdicts_on_likelihoods(
    tmp_path: Path, number: str, change: tuple[float, float], verdict: Reproduction
) -> None:
    run = made_likelihoods(tmp_path, dict.fromkeys(r_to_q.TRAINED, change))
    assert verdict_of(number, [run]) == verdict


@pytest.mark.parametrize(
    "after_sft, without, verdict",
    [(FALL, RISE, REPRODUCED), (FALL, FALL, PARTLY), (RISE, RISE, NOT)],
)
def test_verdict_on_the_chosen(
    tmp_path: Path, after_sft: tuple[float, float], without: tuple[float, float], verdict: Reproduction
) -> None:
    """At the optimum, the chosen of these pairs rise without SFT, whatever β."""
    changes = {r_to_q.PREFERRED: after_sft, r_to_q.SFT: without, r_to_q.EARLY: without}
    assert verdict_of("C55", [made_likelihoods(tmp_path, changes)]) == verdict


@pytest.mark.parametrize("number", ["C35", "C38"])
@pytest.mark.parametrize("wrong, verdict", [(WIDE_IS_WORSE, REPRODUCED), (FLAT, NOT)])
def test_verdicts_on_five_beams(tmp_path: Path, number: str, wrong: dict, verdict: Reproduction) -> None:
    made = made_search(tmp_path, wrong)
    assert verdict_of(number, [dict.fromkeys(r_to_q.BETAS, made)]) == verdict


@pytest.mark.parametrize("number", ["C36", "C37"])
@pytest.mark.parametrize("wide, verdict", [(True, REPRODUCED), (False, NOT)])
def test_verdicts_on_many_beams(tmp_path: Path, number: str, wide: bool, verdict: Reproduction) -> None:
    made = made_search(tmp_path, FLAT)
    if wide:
        refrains = {"20 beams": 4, MEANS[1]: 4}
        made = made_search(tmp_path, WIDE_IS_WORSE, refrains)
    run = r_to_q.Widths(dict.fromkeys(r_to_q.BETAS, made), made)
    assert verdict_of(number, [run]) == verdict


@pytest.mark.parametrize("change, verdict", [(1, REPRODUCED), (-1, NOT)])
def test_verdict_on_over_optimisation(tmp_path: Path, change: int, verdict: Reproduction) -> None:
    """The wider search has a higher log-ratio and, or else, the better summaries."""
    wrong = {**FLAT, "5 beams": 1 - change, "20 beams": 1 + change}
    searched = made_search(tmp_path, wrong)
    ref_logps = {}
    for width, ref_logp in ((5, -1.0), (20, -1.0 - change)):
        ref_logps[width] = stage(tmp_path / f"learned_{width}") / "logps.json"
        contents = {"logps": {"ref": [[ref_logp]] * NUM_ROWS}}
        ref_logps[width].path.write_text(json.dumps(contents), encoding="utf-8")
    found = {width: searched.beams[width, 0] for width in (5, 20)}
    run = r_to_q.Learned(0.1, found, ref_logps)
    assert verdict_of("C39", [{"one": run, "another": run}]) == verdict


@pytest.mark.parametrize(
    "wrong, repetitions, verdict",
    [
        ((3, 2, 0, 2), (1, 1, 0, 1), REPRODUCED),
        ((3, 2, 0, 0), (1, 1, 0, 0), PARTLY),
        ((1, 0, 2, 0), (0, 0, 1, 0), NOT),
    ],
)
def test_verdict_on_beams_of_ppo(tmp_path: Path, wrong: tuple, repetitions: tuple, verdict: Reproduction) -> None:
    names = [r_to_q.SAMPLE, *map(r_to_q.sums, r_to_q.PPO_WIDTHS)]
    errors = {"chosen": 1, **dict(zip(names, wrong, strict=True))}
    said_again = dict(zip(names, repetitions, strict=True))
    made = made_search(tmp_path, errors, said_again, r_to_q.PPO_WIDTHS, ())
    assert verdict_of("C43", [made]) == verdict


@pytest.mark.parametrize("copied, verdict", [(True, REPRODUCED), (False, NOT)])
def test_verdict_on_copies(tmp_path: Path, copied: bool, verdict: Reproduction) -> None:
    searched = made_search(tmp_path, FLAT)
    if copied:
        rows = [row(prompt, [f"a summary of {prompt}"], [-1.0]) for prompt, _ in posts(0)]
        searched.beams[20, 0] = rows_of(tmp_path / "copies", rows)
    assert verdict_of("C44", [dict.fromkeys(r_to_q.BETAS, searched)]) == verdict


def drawn(path: Path, num_wrong: int) -> Artifact:
    """A file of one sample for each prompt."""
    rows = [row(prompt, [summary(prompt, kind, num_wrong)], [-1.0]) for prompt, kind in posts(0)]
    return rows_of(path, rows)


@pytest.mark.parametrize("num_wrong, verdict", [(2, REPRODUCED), (4, NOT)])
def test_verdict_on_a_proxy(tmp_path: Path, num_wrong: int, verdict: Reproduction) -> None:
    base = drawn(tmp_path / "base", 3)
    steered = dict.fromkeys(r_to_q.STEERING, drawn(tmp_path / "steered", num_wrong))
    run = r_to_q.Proxies({**steered, 0.0: base}, base)
    assert verdict_of("C47", [run]) == verdict


@pytest.mark.parametrize("num_wrong, verdict", [(4, REPRODUCED), (2, NOT)])
def test_verdict_without_sft(tmp_path: Path, num_wrong: int, verdict: Reproduction) -> None:
    run = r_to_q.Early(drawn(tmp_path / "early", num_wrong), drawn(tmp_path / "full", 3))
    assert verdict_of("C62", [run]) == verdict
