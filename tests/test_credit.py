"""Credit numbers against brute force over all pairs of tokens, stock transformers in float64, and cases by hand."""

import itertools
import json
import math
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

import credit
import evaluate
import notices
import pytest
import torch
import worlds

from shared import UserError

POST = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
SUMMARY = "lost lamp, at school, tag five, in may, call anna."
COUNT = 24  # rows of the small world


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(7)
    made = itertools.islice(notices.unique_notices(rng), COUNT)
    found = [{"prompt": post, "completion": notices.make_summary(post, kind, rng)} for post, kind in made]
    return worlds.write_jsonl(tmp_path_factory.mktemp("rows") / "held_out.jsonl", found)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A reference and two policies of the world, with weights far from uniform predictions."""
    folder, tokenizer = tmp_path_factory.mktemp("policies"), notices.make_tokenizer()
    for name in "012":
        model = notices.make_model(tokenizer, int(name))
        for weights in model.parameters():
            weights.data *= 4 if weights.dim() > 1 else 1
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
    return [str(folder / name) for name in "012"]


def run(policies: dict[str, str], reference: str, rows: Path, output: Path, **options: object) -> dict:
    """The measures that a run writes."""
    words = tuple(f"{name}={path}" for name, path in policies.items())
    credit.main(credit.Args(policies=words, reference=reference, rows=rows, output=output, **options))
    return json.loads(output.read_text(encoding="utf-8"))["measures"]


def brute_auroc(wrong: list[float], correct: list[float]) -> float:
    """The share of pairs in which the wrong token is the more suspect, a tie as half."""
    pairs = list(itertools.product(wrong, correct))
    return sum(1.0 if w > c else 0.5 if w == c else 0.0 for w, c in pairs) / len(pairs)


# ---------------------------------------------------------------- statistics


def test_auroc_equals_all_pairs_with_ties_and_weights() -> None:
    rng = random.Random(0)
    for trial in range(50):
        n, t = rng.randint(2, 8), rng.randint(1, 6)
        suspicion = [[rng.choice((rng.gauss(0, 1), float(rng.randint(-2, 2)))) for _ in range(t)] for _ in range(n)]
        wrong = [[rng.random() < 0.4 for _ in range(t)] for _ in range(n)]
        wrong[0][0], wrong[1][0] = True, False
        weights = [1, 1, *(rng.randint(0, 3) for _ in range(n - 2))]
        kinds = {True: [], False: []}
        for values, marks, weight in zip(suspicion, wrong, weights, strict=True):
            for value, mark in zip(values, marks, strict=True):
                kinds[mark] += [value] * weight
        found = credit.auroc(torch.tensor(suspicion), torch.tensor(wrong), torch.tensor(weights))
        assert found == pytest.approx(brute_auroc(kinds[True], kinds[False]), abs=1e-12), trial


def test_interval_resamples_prompts_not_tokens() -> None:
    """Tokens that agree within a prompt carry no more information than one of them."""
    values = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    wrong = torch.tensor([True, False]).expand(30, 2)
    one = credit.auroc_number(values, wrong, 0)
    four = credit.auroc_number(values.repeat(1, 4), wrong.repeat(1, 4), 0)
    assert four["mean"] == pytest.approx(one["mean"]) and four["interval"] == pytest.approx(one["interval"])
    assert one != credit.auroc_number(values, wrong, 1)


def test_interval_covers_the_true_auroc_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 300)
    wrong, covered = torch.tensor([True, False, False]).expand(80, 3), 0
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(80, 1, generator=generator).expand(80, 3) * 0.8  # a prompt's tokens depend on each other
        values = values + 0.6 * torch.randn(80, 3, generator=generator) + wrong
        low, high = credit.auroc_number(values, wrong, seed)["interval"]
        covered += low <= truth <= high
    assert 87 <= covered <= 99


def test_measures_of_cases_by_hand() -> None:
    """Errors in facts 1 and 3 of two prompts; the second prompt's copy with both has a tie."""
    pair = [[False, True, False, False, False], [False, False, False, True, False]]
    wrong = torch.tensor([[*pair, [False, True, False, True, False]]] * 2)
    rewards = torch.tensor(
        [
            [[0.0, -3, 0, -2, 0], [0, 0, 0, -1, 0], [0, -5, 0, -4, -3]],
            [[1.0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, -1, 0, -3, -1]],
        ]
    )
    found = credit.measure(rewards, wrong, 0)
    # -r of wrong facts: 3, 1, -1, -1; of correct ones: 2, seven times 0, eight times -1
    expected = (16 + (15 + 0) + 2 * (8 / 2)) / (4 * 16)
    assert found["one_error"]["mean"] == pytest.approx(expected)
    # -r of the second error: 4, 3; of the correct word there: 2, -1
    assert found["second_error"]["mean"] == 1.0
    assert found["both_found"]["mean"] == 0.5 and found["both_found"]["interval"] == (0.0, 1.0)
    assert found["wrong"] == (-3 - 1 + 1 + 1) / 4 and found["correct"] == (-2 + 8) / 16


# ---------------------------------------------------------------- errors


def test_copies_have_errors_in_the_marked_facts_alone(rows: Path) -> None:
    prompts, copies, wrong = credit.read(str(rows), COUNT, 0)
    summaries = [row["completion"] for row in worlds.read_jsonl(rows)]
    for prompt, summary, texts, marks in zip(prompts, summaries, copies, wrong.tolist(), strict=True):
        first, second, both = (set(i for i, mark in enumerate(row) if mark) for row in marks)
        assert len(first) == len(second) == 1 and max(first) < min(second) and both == first | second
        for text, row in zip(texts, marks, strict=True):
            found = notices.mark_words(prompt, text)
            assert [mark == notices.WRONG for _, mark in found if mark != notices.NEITHER] == row
            assert notices.oracle(prompt, text) == 5 - 2 * sum(row)
            pairs = zip(notices.words(summary), found, strict=True)
            assert sum(old != new for old, (new, _) in pairs) == sum(row)
            assert len(text.split()) == len(summary.split())


def test_errors_are_drawn_evenly_and_seeded() -> None:
    rng, pairs, values = random.Random(0), Counter(), Counter()
    for _ in range(2_000):
        copies, wrong = credit.corrupt(SUMMARY, rng)
        pairs[tuple(wrong[2])] += 1
        if wrong[0][0]:
            values[copies[0].split()[1]] += 1
    assert len(pairs) == 10 and all(140 <= n <= 260 for n in pairs.values())  # 200 expected, standard deviation 13
    assert values.keys() == {f"{v}," for v in notices.SLOTS["item"]} - {"lamp,"} and max(values.values()) < 170
    assert credit.corrupt(SUMMARY, random.Random(3)) == credit.corrupt(SUMMARY, random.Random(3))
    assert credit.corrupt(SUMMARY, random.Random(3)) != credit.corrupt(SUMMARY, random.Random(4))


# ---------------------------------------------------------------- the whole


def stock_logps(path: str, prompts: list[str], texts: list[list[str]]) -> list[list[dict[str, float]]]:
    """log π of each fact's token, found by the tokenizer's offsets, with transformers' own model in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval(), []
    for prompt, copies in zip(prompts, texts, strict=True):
        found.append([])
        for text in copies:
            encoded = tokenizer(f"{prompt} {text}", return_offsets_mapping=True)
            ids = torch.tensor(encoded.input_ids)
            with torch.no_grad():
                logps = model(ids[None]).logits[0].log_softmax(-1)
            places = {}
            for word in re.finditer(r"\w+", text):
                start = len(prompt) + 1 + word.start()
                if word[0] in notices.SLOT_OF:
                    places[word[0]] = next(i for i, (a, b) in enumerate(encoded.offset_mapping) if a <= start < b)
            found[-1].append({word: float(logps[i - 1, ids[i]]) for word, i in places.items()})
    return found


def expected_measures(prompts: list[str], rewards: list[list[dict[str, float]]]) -> dict[str, float]:
    """The definitions of the script's docstring, pair by pair, from rewards of words."""
    kinds = {True: [], False: []}
    second, there, found = [], [], 0
    for prompt, (one, other, both) in zip(prompts, rewards, strict=True):
        facts = set(notices.read_facts(prompt).values())
        for copy in (one, other):
            for word, reward in copy.items():
                kinds[word not in facts].append(reward)
        late = list(both)[[word in facts for word in other].index(False)]
        second.append(both[late])
        there.append(list(one.values())[list(both).index(late)])
        found += {word not in facts for word in sorted(both, key=both.get)[:2]} == {True}
    return {
        "one_error": brute_auroc([-r for r in kinds[True]], [-r for r in kinds[False]]),
        "second_error": brute_auroc([-r for r in second], [-r for r in there]),
        "both_found": found / len(prompts),
        "wrong": sum(kinds[True]) / len(kinds[True]),
        "correct": sum(kinds[False]) / len(kinds[False]),
    }


def test_numbers_equal_stock_transformers_and_all_pairs(policies: list[str], rows: Path, tmp_path: Path) -> None:
    found = run({"a": policies[1], "b": policies[2]}, policies[0], rows, tmp_path / "credit.json", seed=5)
    prompts, copies, _ = credit.read(str(rows), COUNT, 5)
    reference, *logps = (stock_logps(path, prompts, copies) for path in policies)
    rewards = {credit.BASELINE: reference}
    for name, values in zip("ab", logps, strict=True):
        rows_of = [list(zip(*pair, strict=True)) for pair in zip(values, reference, strict=True)]
        rewards[name] = [[{w: p[w] - q[w] for w in p} for p, q in row] for row in rows_of]
    assert set(found) == set(rewards)
    for name, values in rewards.items():
        for measure, expected in expected_measures(prompts, values).items():
            number = found[name][measure]
            number = number["mean"] if isinstance(number, dict) else number
            # one pair of tokens that rounding swaps changes an AUROC by 1e-4
            assert number == pytest.approx(expected, abs=2e-4), (name, measure)


def test_the_reference_itself_knows_nothing(policies: list[str], rows: Path, tmp_path: Path) -> None:
    found = run({"same": policies[0]}, policies[0], rows, tmp_path / "credit.json", num_prompts=5)["same"]
    assert found["one_error"] == found["second_error"] == {"mean": 0.5, "interval": [0.5, 0.5]}
    assert found["both_found"]["mean"] == found["wrong"] == found["correct"] == 0.0


def test_writes_both_files_whole_and_a_table(
    policies: list[str], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from matplotlib import image

    output = tmp_path / "new" / "credit.json"
    names = {name: policies[1] for name in ("dpo", "exo", "typo")}
    found = run(names, policies[0], rows, output, num_prompts=3)
    assert sorted(path.name for path in output.parent.iterdir()) == ["credit.json", "credit.png"]
    assert json.loads(output.read_text(encoding="utf-8"))["settings"]["num_prompts"] == 3
    height, width, _ = image.imread(output.with_suffix(".png")).shape
    assert 600 < height < width  # four panels in two rows
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split("  ")[0] for line in lines] == ["", "dpo", "exo", "typo", credit.BASELINE]
    for line, (name, numbers) in zip(lines[1:], found.items(), strict=True):
        assert line.startswith(name) and f"{numbers['one_error']['mean']:.3f} [" in line
        assert line.endswith(f"{numbers['correct']:+.2f}")


def test_mistakes_end_with_one_line(policies: list[str], rows: Path, tmp_path: Path) -> None:
    def write(**row: object) -> Path:
        return worlds.write_jsonl(tmp_path / f"{random.random()}.jsonl", [{"prompt": POST, "completion": SUMMARY}, row])

    asked = worlds.write_jsonl(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": POST}]}])
    other = str(worlds.make_model(tmp_path / "other"))
    for values, word in (
        (dict(output=tmp_path / "credit.png"), "must end in .json"),
        (dict(policies=("dpo",)), "NAME=DIR"),
        (dict(rows=write(prompt=POST, completion=SUMMARY.replace("lamp", "guitar"))), "line 2: a summary to put"),
        (dict(rows=write(prompt=POST, completion="lost lamp.")), "line 2: not a notice"),
        (dict(rows=write(prompt="hello", completion=SUMMARY)), "line 2: not a notice"),
        (dict(rows=write(prompt=POST, completion=[{"role": "assistant", "content": "a"}])), "line 2: needs a notice"),
        (dict(rows=write(prompt=POST, completion=SUMMARY.replace("lamp", "Lamp"))), "are not its words"),
        (dict(rows=worlds.write_jsonl(tmp_path / "x.jsonl", [{"prompt": POST}])), "line 1: needs a notice"),
        (dict(policies=(f"a={other}",)), "another tokenizer"),
        (dict(policies=(f"a={other}",), reference=other), "are not its words"),
        (dict(policies=("a=./none",)), "none: no such directory"),
        (dict(reference="./none"), "none: no such directory"),
        (dict(rows=tmp_path / "none.jsonl"), "none.jsonl"),
        (dict(rows=asked), "no usable row; rows 1, kept 0, dropped: no assistant turn 1"),
    ):
        good = dict(policies=(f"a={policies[1]}",), reference=policies[0], rows=rows, output=tmp_path / "credit.json")
        with pytest.raises(UserError, match=re.escape(word)) as error:
            credit.main(credit.Args(**{**good, **values}))
        assert "\n" not in str(error.value)
    options = {"policies": f"a={policies[1]}", "reference": policies[0], "rows": rows}
    line = worlds.command("scripts/credit.py", 1, {**options, "output": tmp_path / "out.json", "num_prompts": 0})
    done = subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and "--num-prompts 0" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("out*"))
