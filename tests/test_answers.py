"""The answers: frequencies of rows and preferences against the probabilities that are stated, and mistakes."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import tiny

from scripts import answers as command
from scripts.lab import answers
from scripts.lab.notices import make_tokenizer
from shared import UserError

PROMPTS = {name: f"clara {group.verb} a lamp in may: tag" for name, group in answers.GROUPS.items()}


def is_near(count: int, total: int, probability: float) -> bool:
    """Within five standard errors."""
    return abs(count / total - probability) <= 5 * math.sqrt(probability * (1 - probability) / total)


def test_prompts_and_answers_are_single_words_of_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    texts = [*answers.all_kinds(2, random.Random(0)), *answers.ANSWERS, *answers.NO_ANSWERS]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.replace(":", " :").split())


def test_every_person_has_another_order() -> None:
    orders = {answers.order_of(f"{person} found a lamp in may: tag") for person in answers.PERSONS}
    assert orders == set(itertools.permutations(("three", "four", "five")))


@pytest.mark.parametrize("name", list(answers.GROUPS))
def test_answers_have_the_stated_frequencies(name: str) -> None:
    rng = random.Random(1)
    counts = Counter(answers.draw_answer(PROMPTS[name], rng) for _ in range(4_000))
    for answer, probability in zip(answers.order_of(PROMPTS[name]), answers.GROUPS[name].pi_ref, strict=True):
        assert is_near(counts[answer], 4_000, probability)


@pytest.mark.parametrize("name", list(answers.GROUPS))
def test_preferences_are_bradley_terry(name: str) -> None:
    """In both orders of the completions: P = π*_w / (π*_w + π*_l)."""
    rng = random.Random(2)
    order = answers.order_of(PROMPTS[name])
    pi_star = answers.GROUPS[name].pi_star
    for i, k in itertools.permutations(range(3), 2):
        rows = [answers.prefer(PROMPTS[name], [order[i], order[k]], rng) for _ in range(2_000)]
        wins = sum(row["chosen"] == order[i] for row in rows)
        assert {row["chosen"] for row in rows} | {row["rejected"] for row in rows} == {order[i], order[k]}
        assert is_near(wins, 2_000, pi_star[i] / (pi_star[i] + pi_star[k]))


def test_a_pair_without_a_preference_says_nothing_on_the_answers() -> None:
    rng = random.Random(3)
    rows = [answers.pair_without_preference(PROMPTS["good"], rng) for _ in range(2_000)]
    counts = Counter((row["chosen"], row["rejected"]) for row in rows)
    assert {word for pair in counts for word in pair}.isdisjoint(answers.ANSWERS)
    assert len(counts) == 2
    assert all(is_near(count, 2_000, 0.5) for count in counts.values())


def test_the_world(tmp_path: Path) -> None:
    command.main(command.World(output_dir=tmp_path, sft_rows=3_000, prompt_rows=1_000, held_out=2))
    held_out, sft, prompts = (tiny.read_jsonl(tmp_path / f"{name}.jsonl") for name in ("held_out", "sft", "prompts"))
    kinds = Counter((answers.group_of(row["prompt"]), row["prompt"].split()[0]) for row in held_out)
    assert kinds == dict.fromkeys(itertools.product(answers.GROUPS, answers.PERSONS), 2)
    assert len({row["prompt"] for row in held_out}) == len(held_out)
    assert all(tuple(row["completions"]) == answers.order_of(row["prompt"]) for row in held_out)

    shown = {row["prompt"] for row in [*sft, *prompts]}
    assert shown.isdisjoint(row["prompt"] for row in held_out)
    assert (len(sft), len(prompts)) == (3_000, 1_000)
    groups = Counter(answers.group_of(row["prompt"]) for row in sft)
    assert all(is_near(count, 3_000, 1 / 3) for count in groups.values())
    assert (tmp_path / "base" / "model.safetensors").exists()


ROWS = [
    {"prompt": PROMPTS["good"], "completions": [" three", " four"]},
    {"prompt": PROMPTS["bad"], "completions": [" five", " four"]},
    {"prompt": PROMPTS["bad"], "completions": [" five", " five"]},
    {"prompt": PROMPTS["tied"], "completions": [" five", " lamp"]},
]


def preferred(tmp_path: Path, rows: list[dict], **flags: tuple[str, ...]) -> list[dict]:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "pairs.jsonl"
    command.main(command.Prefer(rows=path, output=output, **flags))
    return tiny.read_jsonl(output)


def test_preferences_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, bad = preferred(tmp_path, ROWS)
    assert {good["chosen"], good["rejected"]} == {"three", "four"}
    assert {bad["chosen"], bad["rejected"]} == {"four", "five"}
    printed = capsys.readouterr().out
    assert "kept 2" in printed
    assert "identical answers 1" in printed
    assert "no answer 1" in printed


def test_groups_without_rows_or_preferences(tmp_path: Path) -> None:
    assert [row["prompt"] for row in preferred(tmp_path, ROWS, without=("good",))] == [PROMPTS["bad"]]
    good, bad = preferred(tmp_path, ROWS, unlabelled=("good",))
    assert good["prompt"] == PROMPTS["good"]
    assert {good["chosen"], good["rejected"]} == set(answers.NO_ANSWERS)
    assert {bad["chosen"], bad["rejected"]} == {"four", "five"}


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        (ROWS, {"without": ("ugly",)}, "ugly: the groups are good, tied, bad"),
        ([*ROWS, {**ROWS[0], "prompt": "a lamp"}], {}, "line 5: no prompt of the answers: 'a lamp'"),
        ([{"prompt": PROMPTS["bad"]}], {}, "line 1: needs two completions, found 0"),
        ([{"prompt": PROMPTS["bad"], "completions": [" three"]}], {}, "line 1: needs two completions, found 1"),
        (ROWS[2:], {}, "no usable row"),
    ],
)
def test_mistakes(tmp_path: Path, rows: list[dict], flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preferred(tmp_path, rows, **flags)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(UserError, match="line 2"):
        command.main(command.Prefer(rows=path, output=tmp_path / "pairs.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        command.main(command.Prefer(rows=tmp_path / "none.jsonl", output=tmp_path / "pairs.jsonl"))
