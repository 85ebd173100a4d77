"""Credit numbers against brute force over all pairs of tokens, stock transformers in float64, and cases by hand."""

import itertools
import json
import math
import random
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from scripts import credit
from scripts.lab import notices, statistics
from shared import UserError

POST = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
SUMMARY = "lost lamp, at school, tag five, in may, call anna."
NUM_ROWS = 24

WordValues = dict[str, float]  # of each word of a summary that states a fact


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(7)
    examples = []
    for post, kind in itertools.islice(notices.unique_notices(rng), NUM_ROWS):
        examples.append({"prompt": post, "completion": notices.make_summary(post, kind, rng)})
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "held_out.jsonl", examples)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A reference and two policies for the notices, with weights far from uniform predictions."""
    folder = tmp_path_factory.mktemp("policies")
    tokenizer = notices.make_tokenizer()
    paths = []
    for seed in (0, 1, 2):
        model = notices.make_model(tokenizer, seed)
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.data *= 4

        path = folder / str(seed)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(str(path))
    return paths


def run(policies: dict[str, str], reference: str, rows: Path, output: Path, **options: Any) -> dict:
    """The measures that a run writes."""
    named = tuple(f"{name}={path}" for name, path in policies.items())
    args = credit.Args(policies=named, reference=reference, rows=str(rows), output=output, **options)
    credit.main(args)
    return json.loads(output.read_text(encoding="utf-8"))["measures"]


def brute_auroc(wrong: list[float], correct: list[float]) -> float:
    """The share of pairs in which the wrong token is the more suspect, a tie as half."""
    total = 0.0
    for wrong_value, correct_value in itertools.product(wrong, correct):
        if wrong_value > correct_value:
            total += 1
        elif wrong_value == correct_value:
            total += 0.5
    return total / (len(wrong) * len(correct))


# ---------------------------------------------------------------- statistics


def test_auroc_equals_all_pairs_with_ties_and_weights() -> None:
    rng = random.Random(0)
    for trial in range(50):
        num_prompts = rng.randint(2, 8)
        num_tokens = rng.randint(1, 6)
        suspicion = []
        is_wrong = []
        for _ in range(num_prompts):
            suspicion.append([number_with_ties(rng) for _ in range(num_tokens)])
            is_wrong.append([rng.random() < 0.4 for _ in range(num_tokens)])
        is_wrong[0][0] = True  # there is one of each kind
        is_wrong[1][0] = False
        weights = [1, 1, *(rng.randint(0, 3) for _ in range(num_prompts - 2))]

        values: dict[bool, list[float]] = {True: [], False: []}
        for prompt, weight in enumerate(weights):
            for value, mark in zip(suspicion[prompt], is_wrong[prompt], strict=True):
                values[mark] += [value] * weight
        expected = brute_auroc(wrong=values[True], correct=values[False])

        auroc = statistics.auroc(torch.tensor(suspicion), torch.tensor(is_wrong), torch.tensor(weights))
        assert auroc == pytest.approx(expected, abs=1e-12), trial


def number_with_ties(rng: random.Random) -> float:
    return rng.choice((rng.gauss(0, 1), float(rng.randint(-2, 2))))


def test_interval_resamples_prompts_not_tokens() -> None:
    """Tokens that agree within a prompt carry no more information than one of them."""
    values = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    is_wrong = torch.tensor([True, False]).expand(30, 2)
    once = statistics.auroc_and_interval(values, is_wrong, 0)
    repeated = statistics.auroc_and_interval(values.repeat(1, 4), is_wrong.repeat(1, 4), 0)
    assert repeated["mean"] == pytest.approx(once["mean"])
    assert repeated["interval"] == pytest.approx(once["interval"])
    assert statistics.auroc_and_interval(values, is_wrong, 1) != once


def test_interval_covers_the_true_auroc_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    is_wrong = torch.tensor([True, False, False]).expand(80, 3)
    num_covered = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        of_prompt = torch.randn(80, 1, generator=generator)  # a prompt's tokens depend on each other
        of_token = torch.randn(80, 3, generator=generator)
        values = 0.8 * of_prompt + 0.6 * of_token + is_wrong
        low, high = statistics.auroc_and_interval(values, is_wrong, seed)["interval"]
        if low <= truth <= high:
            num_covered += 1
    assert 87 <= num_covered <= 99


def test_measures_of_cases_by_hand() -> None:
    """Errors in facts 2 and 4 of two prompts; in the second prompt's summary with both errors there is a tie."""
    is_wrong = torch.tensor(
        [
            [False, True, False, False, False],
            [False, False, False, True, False],
            [False, True, False, True, False],
        ]
    )
    rewards = torch.tensor(
        [
            [[0.0, -3, 0, -2, 0], [0, 0, 0, -1, 0], [0, -5, 0, -4, -3]],
            [[1.0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, -1, 0, -3, -1]],
        ]
    )
    measures = credit.measure(rewards, is_wrong.expand(2, 3, 5), 0)

    # -r of wrong facts: 3, 1, -1, -1; of correct ones: 2, seven times 0, eight times -1
    wins = 16 + (15 + 0) + 2 * (8 / 2)
    assert measures["one_error"]["mean"] == pytest.approx(wins / (4 * 16))
    # -r of the second error: 4, 3; of the correct word there: 2, -1
    assert measures["second_error"]["mean"] == 1.0
    assert measures["both_found"] == {"mean": 0.5, "interval": (0.0, 1.0)}
    assert measures["wrong"] == (-3 - 1 + 1 + 1) / 4
    assert measures["correct"] == (-2 + 8) / 16


# ---------------------------------------------------------------- errors


def test_summaries_have_errors_in_the_marked_facts_alone(rows: Path) -> None:
    originals = [row["completion"] for row in tiny.read_jsonl(rows)]
    summaries = credit.corrupt_summaries(str(rows), NUM_ROWS, "random", 0)
    columns = zip(summaries.prompts, originals, summaries.texts, summaries.is_wrong, strict=True)
    for prompt, original, texts, marks in columns:
        (first,), (second,), errors = (row.nonzero().flatten().tolist() for row in marks)
        assert errors == [first, second]
        assert first < second

        for text, is_wrong in zip(texts, marks, strict=True):
            marked_words = notices.mark_words(prompt, text)
            fact_marks = [mark for _, mark in marked_words if mark != notices.NEITHER]
            assert [mark == notices.WRONG for mark in fact_marks] == is_wrong.tolist()

            num_errors = int(is_wrong.sum())
            assert notices.oracle(prompt, text) == 5 - 2 * num_errors
            pairs = zip(notices.words(original), notices.words(text), strict=True)
            assert sum(old != new for old, new in pairs) == num_errors
            assert len(text.split()) == len(original.split())


def test_misreadings_are_those_of_the_demonstrations(tmp_path: Path) -> None:
    """The wrong words are what every demonstration with --misread 1 has there."""
    rng = random.Random(0)
    args = notices.Demonstrations(bad_rows=0, superfluous=(1.0,), misread=1)
    posts = [notices.make_notice(rng) for _ in range(NUM_ROWS)]
    examples = [{"prompt": post, "completion": notices.make_summary(post, kind, rng)} for post, kind in posts]
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", examples)

    summaries = credit.corrupt_summaries(str(rows), NUM_ROWS, "misreadings", 0)
    for (post, kind), (first, second, both) in zip(posts, summaries.texts, strict=True):
        assert both == notices.make_demonstration(post, kind, rng, args)
        assert [notices.oracle(post, text) for text in (first, second, both)] == [3, 3, 1]


def test_errors_are_sampled_evenly_and_seeded() -> None:
    rng = random.Random(0)
    pairs: Counter[tuple[bool, ...]] = Counter()
    items: Counter[str] = Counter()  # in the place of the lamp
    for _ in range(2_000):
        texts, is_wrong = credit.corrupt(SUMMARY, credit.random_errors(SUMMARY, rng))
        pairs[tuple(is_wrong[2])] += 1
        if is_wrong[0][0]:
            items[texts[0].split()[1]] += 1

    assert len(pairs) == 10
    for count in pairs.values():
        assert 140 <= count <= 260  # 200 expected, standard deviation 13
    others = {f"{item}," for item in notices.SLOTS["item"]} - {"lamp,"}
    assert set(items) == others
    assert max(items.values()) < 170

    once = credit.random_errors(SUMMARY, random.Random(3))
    assert credit.random_errors(SUMMARY, random.Random(3)) == once
    assert credit.random_errors(SUMMARY, random.Random(4)) != once


# ---------------------------------------------------------------- the whole


def stock_logps(path: str, summaries: credit.Summaries) -> list[list[WordValues]]:
    """log π of each fact's token, found by the tokenizer's offsets, with transformers' own model in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    logps = []
    for prompt, texts in zip(summaries.prompts, summaries.texts, strict=True):
        logps.append([fact_logps(model, tokenizer, prompt, text) for text in texts])
    return logps


def fact_logps(model, tokenizer, prompt: str, text: str) -> WordValues:
    encoded = tokenizer(f"{prompt} {text}", return_offsets_mapping=True)
    ids = torch.tensor(encoded.input_ids)
    with torch.no_grad():
        logps = model(ids[None]).logits[0].log_softmax(-1)

    values = {}
    for match in re.finditer(r"\w+", text):
        word = match[0]
        if word not in notices.SLOT_OF:
            continue
        position = len(prompt) + 1 + match.start()
        token = token_at(encoded.offset_mapping, position)
        values[word] = float(logps[token - 1, ids[token]])
    return values


def token_at(offsets: list[tuple[int, int]], position: int) -> int:
    """The token that covers the character at `position`."""
    return next(i for i, (start, end) in enumerate(offsets) if start <= position < end)


@dataclass
class Reward:
    word: str
    value: float
    is_wrong: bool


def expected_measures(prompts: list[str], rewards: list[list[WordValues]]) -> dict[str, float]:
    """The definitions of the script's docstring, pair by pair, from the rewards of words."""
    singles: list[Reward] = []
    second_errors = []
    correct_words = []
    num_found = 0
    for prompt, (first, second, both) in zip(prompts, rewards, strict=True):
        facts = set(notices.read_facts(prompt).values())
        first_rewards = list_rewards(first, facts)
        second_rewards = list_rewards(second, facts)
        both_rewards = list_rewards(both, facts)
        singles += first_rewards + second_rewards

        position = [reward.is_wrong for reward in second_rewards].index(True)
        second_errors.append(both_rewards[position].value)
        correct_words.append(first_rewards[position].value)

        lowest = sorted(both_rewards, key=lambda reward: reward.value)[:2]
        if all(reward.is_wrong for reward in lowest):
            num_found += 1

    wrong = [reward.value for reward in singles if reward.is_wrong]
    correct = [reward.value for reward in singles if not reward.is_wrong]
    return {
        "one_error": brute_auroc(negative(wrong), negative(correct)),
        "second_error": brute_auroc(negative(second_errors), negative(correct_words)),
        "both_found": num_found / len(prompts),
        "wrong": sum(wrong) / len(wrong),
        "correct": sum(correct) / len(correct),
    }


def list_rewards(values: WordValues, facts: set[str]) -> list[Reward]:
    return [Reward(word, value, word not in facts) for word, value in values.items()]


def negative(values: list[float]) -> list[float]:
    return [-value for value in values]


def differences(logps: list[list[WordValues]], ref_logps: list[list[WordValues]]) -> list[list[WordValues]]:
    """log π_θ - log π_ref of each word."""
    rewards = []
    for prompt_logps, prompt_ref_logps in zip(logps, ref_logps, strict=True):
        prompt_rewards = []
        for values, ref_values in zip(prompt_logps, prompt_ref_logps, strict=True):
            prompt_rewards.append({word: values[word] - ref_values[word] for word in values})
        rewards.append(prompt_rewards)
    return rewards


def test_numbers_equal_stock_transformers_and_all_pairs(policies: list[str], rows: Path, tmp_path: Path) -> None:
    reference, first, second = policies
    measures = run({"a": first, "b": second}, reference, rows, tmp_path / "credit.json", seed=5)

    summaries = credit.corrupt_summaries(str(rows), NUM_ROWS, "random", 5)
    ref_logps = stock_logps(reference, summaries)
    rewards = {
        "a": differences(stock_logps(first, summaries), ref_logps),
        "b": differences(stock_logps(second, summaries), ref_logps),
        credit.BASELINE: ref_logps,
    }
    assert set(measures) == set(rewards)
    for name, values in rewards.items():
        for measure, expected in expected_measures(summaries.prompts, values).items():
            number = measures[name][measure]
            if isinstance(number, dict):
                number = number["mean"]
            # one pair of tokens that rounding swaps changes an AUROC by 1e-4
            assert number == pytest.approx(expected, abs=2e-4), (name, measure)


def test_the_reference_itself_knows_nothing(policies: list[str], rows: Path, tmp_path: Path) -> None:
    reference = policies[0]
    measures = run({"same": reference}, reference, rows, tmp_path / "credit.json", num_prompts=5)["same"]
    even = {"mean": 0.5, "interval": [0.5, 0.5]}
    assert measures["one_error"] == even
    assert measures["second_error"] == even
    assert measures["both_found"]["mean"] == 0.0
    assert measures["wrong"] == 0.0
    assert measures["correct"] == 0.0


def test_writes_both_files_whole_and_a_table(
    policies: list[str], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from matplotlib import image

    output = tmp_path / "new" / "credit.json"
    named = dict.fromkeys(("dpo", "exo", "typo"), policies[1])
    measures = run(named, policies[0], rows, output, num_prompts=3)
    assert {path.name for path in output.parent.iterdir()} == {"credit.json", "credit.png"}
    contents = json.loads(output.read_text(encoding="utf-8"))
    assert contents["settings"]["num_prompts"] == 3
    wrong = []
    for rewards, marks in zip(contents["values"]["dpo"], contents["is_wrong"], strict=True):
        wrong += [rewards[i][marks[i].index(True)] for i in (0, 1)]
    assert measures["dpo"]["wrong"] == pytest.approx(sum(wrong) / 6)

    height, width, _ = image.imread(output.with_suffix(".png")).shape
    assert 600 < height < width  # four panels in two lines

    _, *lines = capsys.readouterr().out.splitlines()[-5:]
    assert list(measures) == ["dpo", "exo", "typo", credit.BASELINE]
    for line, (name, numbers) in zip(lines, measures.items(), strict=True):
        assert line.startswith(f"{name}  ")
        assert f"{numbers['one_error']['mean']:.3f} [" in line
        assert line.endswith(f"{numbers['correct']:+.2f}")


# ---------------------------------------------------------------- mistakes


@pytest.fixture
def options(policies: list[str], rows: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments without a mistake."""
    return {
        "policies": (f"a={policies[1]}",),
        "reference": policies[0],
        "rows": str(rows),
        "output": tmp_path / "credit.json",
    }


def refused(options: dict[str, Any], message: str) -> None:
    """The run ends with one line and writes nothing."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        credit.main(credit.Args(**options))
    assert "\n" not in str(error.value)
    assert not list(options["output"].parent.glob("credit.*"))


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (POST, SUMMARY.replace("lamp", "guitar"), "line 2: a summary to put"),
        (POST, "lost lamp.", "line 2: not a notice"),
        ("hello", SUMMARY, "line 2: not a notice"),
        (POST, [{"role": "assistant", "content": "a"}], "line 2: needs a notice"),
        (POST, SUMMARY.replace("lamp", "Lamp"), "are not its words"),
    ],
)
def test_rows_without_a_correct_summary(
    prompt: str, completion: str | list, message: str, options: dict[str, Any], tmp_path: Path
) -> None:
    good_row = {"prompt": POST, "completion": SUMMARY}
    bad_row = {"prompt": prompt, "completion": completion}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [good_row, bad_row])
    refused({**options, "rows": str(rows)}, message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": POST}, "line 1: needs a notice"),
        (
            {"messages": [{"role": "user", "content": POST}]},
            "no usable row; rows 1, kept 0, dropped: no assistant turn 1",
        ),
    ],
)
def test_rows_without_a_summary(row: dict, message: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    refused({**options, "rows": str(rows)}, message)


def test_misreadings_need_the_notices_own_words(options: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": POST, "completion": "a lamp, at school, tag five, in may, call anna."}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    message = "line 1: --errors misreadings needs a summary in the notices' own words"
    refused({**options, "rows": str(rows), "errors": "misreadings"}, message)


def test_mistakes_end_with_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    other = str(tiny.make_model(tmp_path / "other"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output": tmp_path / "credit.png"}, "must end in .json"),
        ({"policies": ("dpo",)}, "NAME=DIR"),
        ({"policies": (f"a={other}",)}, "another tokenizer"),
        ({"policies": (f"a={other}",), "reference": other}, "are not its words"),
        ({"policies": ("a=./none",)}, "none: no such file or directory"),
        ({"reference": "./none"}, "none: no such file or directory"),
        ({"rows": str(tmp_path / "none.jsonl")}, "none.jsonl"),
    ]
    for changes, message in cases:
        refused({**options, **changes}, message)


def test_the_command_line_checks_ranges(options: dict[str, Any], tmp_path: Path) -> None:
    (policy,) = options["policies"]
    line = tiny.command("scripts/credit.py", 1, {**options, "policies": policy, "num_prompts": 0})
    ended = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "credit.py: --num-prompts 0: must be a finite number above 0\n"
    assert not list(tmp_path.glob("credit.*"))
