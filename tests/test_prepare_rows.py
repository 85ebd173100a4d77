"""Each sub-command against brute force, hand-made rows and binomial bounds; interruption and mistakes."""

import gzip
import itertools
import json
import math
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenised

from scripts import prepare_rows
from scripts.lab.row_files import settings_of
from scripts.lab.selecting import LengthCounts, Picker, Supply, interleaved, mixture_counts
from shared import UserError
from shared.encode import Encoder
from shared.groups import Requires
from shared.rows import PROMPT_FORMS, Counts, Example, parse_rows

SCRIPT = "scripts/prepare_rows.py"
TRANSCRIPT = "\n\nHuman: a b\n\nAssistant:"
LONGER_TRANSCRIPT = f"{TRANSCRIPT} yes\n\nHuman: and?\n\nAssistant:"
USER = {"role": "user", "content": "is it ok?"}
DATA = Path(os.environ.get("CLEANPO_DATA", tiny.ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_model(tmp_path_factory.mktemp("model")))


def prepare(kind: type, rows: list[dict], folder: Path, **options: Any) -> list[dict]:
    """The rows that a sub-command writes."""
    source = tiny.write_jsonl(folder / "rows.jsonl", rows)
    output = folder / "out.jsonl"
    output.unlink(missing_ok=True)
    prepare_rows.main(kind(rows=str(source), output=output, **options))
    return tiny.read_jsonl(output)


def read_again(path: Path) -> list[tuple[Any, list[Any]]]:
    """Prompt and completions of each row, as training reads them."""
    return [(example.prompt, example.texts) for example in parse_rows(str(path), Counts())]


def assert_frequency(count: int, n: int, probability: float) -> None:
    """Within 4.5 binomial deviations."""
    slack = 4.5 * math.sqrt(probability * (1 - probability) / n)
    assert abs(count / n - probability) <= slack


def pair(**columns: Any) -> dict:
    return {"prompt": "lo", "chosen": "a", "rejected": "b", **columns}


# ---------------------------------------------------------------- rename


def test_rename(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "lo", "good": "a", "bad": "b", "id": 7}, {"question": "fi", "good": "c", "bad": "d"}]
    columns = ("question=prompt", "good=chosen", "bad=rejected", "id=number")
    written = prepare(prepare_rows.Rename, rows, tmp_path, columns=columns)
    assert "rows 2, kept 2; not used: number; 2 rows in" in capsys.readouterr().out
    assert written == [pair(number=7), {"prompt": "fi", "chosen": "c", "rejected": "d"}]


def test_names_may_change_places(tmp_path: Path) -> None:
    written = prepare(prepare_rows.Rename, [pair()], tmp_path, columns=("chosen=rejected", "rejected=chosen"))
    assert written == [{"prompt": "lo", "chosen": "b", "rejected": "a"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("question=prompt",), "no row has a column question"),
        (("id=prompt",), "line 1: two columns would be named 'prompt'"),
        (("prompt=x", "chosen=y"), "line 1: unknown columns x, y, rejected, id"),
        (("chosen",), "--columns chosen: must be OLD=NEW"),
        (("chosen=x", "chosen=y"), "chosen gets two names"),
    ],
)
def test_names_that_cannot_be_given(columns: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(prepare_rows.Rename, [pair(id=3)], tmp_path, columns=columns)


# ---------------------------------------------------------------- mix


def mix(folder: Path, sources: list[list[dict]], **options: Any) -> list[dict]:
    paths = []
    for i, rows in enumerate(sources):
        paths.append(str(tiny.write_jsonl(folder / f"{i}.jsonl", rows)))
    output = folder / "mixture.jsonl"
    output.unlink(missing_ok=True)
    prepare_rows.main(prepare_rows.Mix(rows=tuple(paths), output=output, **options))
    return tiny.read_jsonl(output)


def numbered(source: str, n: int) -> list[dict]:
    return [pair(source=source, id=i) for i in range(n)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"a": 60, "b": 30, "c": 10}),
        ({"counts": (5, 30, 1)}, {"a": 5, "b": 30, "c": 1}),
        ({"weights": (2.0, 1.0, 1.0)}, {"a": 20, "b": 10, "c": 10}),
        ({"weights": (0.5, 0.3, 0.2), "total": 11}, {"a": 6, "b": 3, "c": 2}),
    ],
)
def test_a_mixture_has_its_counts(options: dict[str, Any], expected: dict[str, int], tmp_path: Path) -> None:
    sources = [numbered("a", 60), numbered("b", 30), numbered("c", 10)]
    rows = mix(tmp_path, sources, **options)
    assert Counter(row["source"] for row in rows) == expected
    for name in expected:
        ids = [row["id"] for row in rows if row["source"] == name]
        assert ids == sorted(set(ids))
    assert mix(tmp_path, sources, **options) == rows
    assert mix(tmp_path, sources, seed=1, **options) != rows


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.1, 0.7], [3.0, 3.0]])
@pytest.mark.parametrize("available", [[7, 9], [50, 3]])
def test_the_largest_mixture(available: list[int], weights: list[float]) -> None:
    """No larger total keeps each source's exact share within its rows."""
    supplies = [Supply("", number, (), 2) for number in available]
    numbers = mixture_counts(supplies, weights, None)
    total = sum(numbers)
    assert all(number <= most for number, most in zip(numbers, available, strict=True))
    shares = [weight / sum(weights) for weight in weights]
    assert all(abs(number - total * share) < 1 for number, share in zip(numbers, shares, strict=True))
    larger = [(total + 1) * share for share in shares]
    assert any(number > most + 1e-9 for number, most in zip(larger, available, strict=True))


def test_every_choice_is_equally_likely() -> None:
    n = 6000
    choices: Counter[tuple[int, ...]] = Counter()
    for seed in range(n):
        picker = Picker(random.Random(seed), 2, 5)
        choices[tuple(i for i in range(5) if picker.takes_next())] += 1
    assert set(choices) == set(itertools.combinations(range(5), 2))
    for count in choices.values():
        assert_frequency(count, n, 1 / 10)


def test_every_order_of_the_sources_is_equally_likely() -> None:
    n = 6000
    orders: Counter[str] = Counter()
    for seed in range(n):
        orders["".join(interleaved([iter("aa"), iter("b"), iter("c")], [2, 1, 1], random.Random(seed)))] += 1
    assert set(orders) == {"".join(order) for order in itertools.permutations("aabc")}
    for count in orders.values():
        assert_frequency(count, n, 1 / 12)


def test_pairs_of_unlike_forms_become_one_form(tmp_path: Path) -> None:
    sources = [
        [{"chosen": f"{TRANSCRIPT} a\n\nHuman: more", "rejected": f"{TRANSCRIPT} b", "id": 1}],
        [{"history": "lo", "human_ref_A": "x", "human_ref_B": "y", "labels": 0, "score_A": 3}],
        [{"instruction": "do", "input": "it", "chosen": "a", "rejected": "b", "system": "be kind"}],
        [{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "g"}}],
    ]
    sources[3][0]["rejected"] = {"from": "gpt", "value": "h"}
    rows = mix(tmp_path, sources)
    assert all({"prompt", "chosen", "rejected"} <= row.keys() for row in rows)
    assert sorted(row.get("id", row.get("score_A", 0)) for row in rows) == [0, 0, 1, 3]

    written = read_again(tmp_path / "mixture.jsonl")
    system = {"role": "system", "content": "be kind"}
    question = {"role": "user", "content": "q"}
    assert (TRANSCRIPT, [" a", " b"]) in written
    assert ("lo", ["y", "x"]) in written
    instruction = [system, {"role": "user", "content": "do\nit"}]
    assert (instruction, [[tokenised.assistant("a")], [tokenised.assistant("b")]]) in written
    assert ([question], [[tokenised.assistant("g")], [tokenised.assistant("h")]]) in written


def test_demonstrations_of_unlike_forms_become_one_form(tmp_path: Path) -> None:
    sources = [
        [{"instruction": "do", "output": "yes", "history": [["a", "b"]]}],
        [{"messages": [USER, tokenised.assistant("ok")], "label": False}],
        [{"prompt": "lo", "completion": "fi", "text": "kept"}],
    ]
    rows = mix(tmp_path, sources)
    assert {row.get("label") for row in rows} == {None, False}
    assert "kept" in [row.get("text") for row in rows]
    earlier = [{"role": "user", "content": "a"}, tokenised.assistant("b")]
    assert sorted(map(str, read_again(tmp_path / "mixture.jsonl"))) == sorted(
        map(
            str,
            [
                ("lo", ["fi"]),
                ([USER], [[tokenised.assistant("ok")]]),
                ([*earlier, {"role": "user", "content": "do"}], [[tokenised.assistant("yes")]]),
            ],
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": (1, 4)}, "1.jsonl: 4 rows are needed, but it has 3"),
        ({"weights": (1.0, 1.0), "total": 8}, "1.jsonl: 4 rows are needed"),
        ({"counts": (1,)}, "--counts: 1 numbers for 2 sources"),
        ({"weights": (1.0, -1.0)}, "--weights: must be finite numbers above 0"),
        ({"weights": (1.0, 1.0), "counts": (1, 1)}, "either --weights or --counts"),
        ({"total": 2}, "--total goes with --weights"),
    ],
)
def test_mixtures_that_cannot_be_made(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        mix(tmp_path, [numbered("a", 9), numbered("b", 3)], **options)


@pytest.mark.parametrize("other", [{"prompt": "lo", "completion": "a"}, {"prompt": "lo", "completions": ["a", "b"]}])
def test_rows_that_one_file_cannot_hold(other: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one file cannot hold these rows: .*0.jsonl has prompt \+ chosen"):
        mix(tmp_path, [[pair()], [other]])


# ---------------------------------------------------------------- split


def split(folder: Path, rows: list[dict], **options: Any) -> tuple[list[dict], list[dict]]:
    held_out = folder / "held_out.jsonl"
    held_out.unlink(missing_ok=True)
    train = prepare(prepare_rows.Split, rows, folder, held_out_output=held_out, **options)
    return train, tiny.read_jsonl(held_out)


def test_a_split_is_by_prompt(tmp_path: Path) -> None:
    n = 2000
    rows = [pair(prompt=f"lo {i % n}", id=i) for i in range(2 * n)]
    train, held_out = split(tmp_path, rows, held_out_share=0.2)
    assert sorted(train + held_out, key=lambda row: row["id"]) == rows
    assert [row["id"] for row in train] == sorted(row["id"] for row in train)
    prompts = {row["prompt"] for row in held_out}
    assert not prompts & {row["prompt"] for row in train}
    assert_frequency(len(prompts), n, 0.2)

    # another file has its prompts on the same sides
    others = [{"prompt": row["prompt"], "completion": "x"} for row in reversed(rows[: n // 2])]
    _, held_out_again = split(tmp_path, others, held_out_share=0.2)
    assert {row["prompt"] for row in held_out_again} == prompts & {row["prompt"] for row in others}

    # another seed is independent of the first one
    _, held_out_otherwise = split(tmp_path, rows, held_out_share=0.2, seed=1)
    both = prompts & {row["prompt"] for row in held_out_otherwise}
    assert_frequency(len(both), n, 0.04)


def test_a_split_with_an_empty_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out.jsonl: no row would be left for it; rows 1, kept 1"):
        split(tmp_path, [pair()], held_out_share=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# ---------------------------------------------------------------- single turn


@pytest.mark.parametrize(
    ("row", "is_kept"),
    [
        ({"chosen": f"{TRANSCRIPT} a", "rejected": f"{TRANSCRIPT} b"}, True),
        ({"chosen": f"{LONGER_TRANSCRIPT} a", "rejected": f"{LONGER_TRANSCRIPT} b"}, False),
        # turns after the last answer are no part of the prompt
        ({"chosen": f"{TRANSCRIPT} a\n\nHuman: x", "rejected": f"{TRANSCRIPT} b\n\nHuman: y"}, True),
        ({"prompt": TRANSCRIPT, "chosen": "a", "rejected": "b"}, True),
        ({"prompt": LONGER_TRANSCRIPT, "chosen": "a", "rejected": "b"}, False),
        (pair(), True),
        ({"prompt": [USER], "completion": "a"}, True),
        ({"prompt": [USER, tokenised.assistant("x"), USER], "completion": "a"}, False),
        ({"instruction": "do", "output": "a"}, True),
        ({"instruction": "do", "output": "a", "history": [["x", "y"]]}, False),
    ],
)
def test_single_turns(row: dict, is_kept: bool, tmp_path: Path) -> None:
    if is_kept:
        assert prepare(prepare_rows.SingleTurn, [row], tmp_path) == [row]
        return
    with pytest.raises(UserError, match="no usable row; rows 1, kept 0, dropped: several turns of the human 1"):
        prepare(prepare_rows.SingleTurn, [row], tmp_path)


# ---------------------------------------------------------------- prefixes


def test_prefixes_are_the_first_tokens(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = [{"text": tiny.text(rng, 12), "label": i % 2, "prompt_id": i} for i in range(300)]
    rows.append({"text": "a", "label": 1, "prompt_id": 300})
    written = prepare(prepare_rows.Prefixes, rows, tmp_path, model=model)
    line = capsys.readouterr().out
    assert "rows 301, kept 300, dropped: too few tokens 1" in line

    tokenizer = tokenised.plain()
    lengths: Counter[int] = Counter()
    others = 0
    for row, new in zip(rows, written, strict=False):
        assert new["prompt"] + new["completion"] == row["text"]
        assert (new["label"], new["prompt_id"], "text" in new) == (row["label"], row["prompt_id"], False)
        ids = tokenised.ids(tokenizer, str(row["text"]))
        prefix = tokenised.ids(tokenizer, new["prompt"])
        if prefix == ids[: len(prefix)]:
            lengths[len(prefix)] += 1
        else:
            others += 1
    assert others < 15
    assert (f"prefixes that alone have other tokens {others}" in line) == (others > 0)
    assert lengths.keys() == set(range(2, 9))
    for count in lengths.values():
        assert_frequency(count, len(written), 1 / 7)


def test_prefixes_of_one_length_and_strings_of_special_tokens(model: str, tmp_path: Path) -> None:
    rows = [{"text": "do re fi lo a naïve ok"}, {"text": f"do {tiny.EOS} fi lo a naïve ok"}]
    first, second = prepare(prepare_rows.Prefixes, rows, tmp_path, model=model, min_tokens=3, max_tokens=3)
    ids = tokenised.ids(tokenised.plain(), rows[0]["text"])
    assert tokenised.ids(tokenised.plain(), first["prompt"]) == ids[:3]
    assert second["prompt"] + second["completion"] == rows[1]["text"]


def test_rows_without_a_text_have_no_prefix(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: prefixes are of running text"):
        prepare(prepare_rows.Prefixes, [pair()], tmp_path, model=model)
    with pytest.raises(UserError, match="--min-tokens 9 is more than --max-tokens 8"):
        prepare(prepare_rows.Prefixes, [{"text": "a b"}], tmp_path, model=model, min_tokens=9)


# ---------------------------------------------------------------- pairs


def drawn_row(rng: random.Random, k: int) -> dict:
    """A row as sample.py and score.py write it; the ids of each completion are its own."""
    texts = [tiny.text(rng, 4) for _ in range(k)]
    ids = [[*tokenised.ids(tokenised.plain(), text), i + 7] for i, text in enumerate(texts)]
    return {
        "prompt": tiny.text(rng, 5),
        "completions": texts,
        "finished": [rng.random() < 0.5 for _ in range(k)],
        "completion_ids": ids,
        "vocabulary": Encoder(tokenised.plain()).vocabulary,
        "scores": [float(rng.randint(-4, 4)) for _ in range(k)],
        "id": rng.random(),
    }


def by_hand(row: dict, order: list[int]) -> dict:
    """The row with some of its completions and all that belongs to them."""
    new = dict(row)
    for name in ("completions", "finished", "completion_ids", "scores"):
        new[name] = [row[name][i] for i in order]
    return new


def test_all_pairs_with_a_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    rows = [drawn_row(rng, 4) for _ in range(30)]
    for margin in (0.0, 2.0):
        expected = []
        for row in rows:
            expected += pairs_by_hand(row, max(margin, 0.5))
        written = prepare(prepare_rows.Pairs, rows, tmp_path, margin=margin)
        assert written == expected
        assert f"rows 30, kept 30; pairs with equal scores {count_ties(rows)}" in capsys.readouterr().out


def pairs_by_hand(row: dict, margin: float) -> list[dict]:
    scores = row["scores"]
    pairs = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if scores[i] - scores[j] >= margin:
            pairs.append(by_hand(row, [i, j]))
        if scores[j] - scores[i] >= margin:
            pairs.append(by_hand(row, [j, i]))
    return pairs


def count_ties(rows: list[dict]) -> int:
    return sum(a == b for row in rows for a, b in itertools.combinations(row["scores"], 2))


def test_best_against_worst_and_several_reward_models(tmp_path: Path) -> None:
    row = drawn_row(random.Random(2), 3)
    row["scores"] = [[1.0, 2.0], [9.0, -8.0], [0.0, 5.0]]  # means 1.5, 0.5, 2.5
    assert prepare(prepare_rows.Pairs, [row], tmp_path, select="best-worst") == [by_hand(row, [2, 1])]
    with pytest.raises(UserError, match="dropped: no pair left 1; pairs within the margin 1"):
        prepare(prepare_rows.Pairs, [row], tmp_path, select="best-worst", margin=2.5)


def test_training_reads_drawn_pairs_with_their_ids(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = prepare(prepare_rows.Pairs, [drawn_row(rng, 3) for _ in range(5)], tmp_path)
    groups = tokenised.load(str(tmp_path / "out.jsonl"), tokenised.plain(), Requires("pair"))
    assert len(groups) == len(rows)
    for i, row in enumerate(rows):
        assert tokenised.pieces(groups, i)[1:] == row["completion_ids"]
        assert row["scores"][0] > row["scores"][1]


def test_pairs_of_other_rows(tmp_path: Path) -> None:
    scored = pair(score_chosen=1.0, score_rejected=2.0)
    assert prepare(prepare_rows.Pairs, [scored], tmp_path) == [
        {"prompt": "lo", "chosen": "b", "rejected": "a", "score_chosen": 2.0, "score_rejected": 1.0}
    ]
    ranking = {"prompt": "lo", "completions": ["a", "b", "c"]}
    texts = [row["completions"] for row in prepare(prepare_rows.Pairs, [ranking], tmp_path)]
    assert texts == [["a", "b"], ["a", "c"], ["b", "c"]]
    for row, options in ((ranking, {"margin": 0.1}), ({**ranking, "finished": [True, True, True]}, {})):
        with pytest.raises(UserError, match="line 1: no scores; add them with scripts/score.py"):
            prepare(prepare_rows.Pairs, [row], tmp_path, **options)


# ---------------------------------------------------------------- relabel

SCORES = {"score_chosen": 1.0, "score_rejected": 2.0}
FORMS: dict[str, dict] = {
    "pair": pair(**SCORES, chosen_model="m", rejected_model="n"),
    "HH": {"chosen": f"{TRANSCRIPT} a", "rejected": f"{TRANSCRIPT} b", "scores": [[1.0, 1.0], [3.0, 0.0]]},
    "SHP": {"history": "lo", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, **SCORES},
    "instruction": {"instruction": "lo", "input": "fi", "chosen": "a", "rejected": "b", **SCORES},
    "chat": {"messages": [USER], "chosen": tokenised.assistant("a"), "rejected": tokenised.assistant("b"), **SCORES},
    "completions": {"prompt": "lo", "completions": ["a", "b"], "scores": [1.0, 2.0], "finished": [True, False]},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_higher_score_becomes_the_preferred_one(form: str, tmp_path: Path) -> None:
    row = FORMS[form]
    ((prompt, (first, second)),) = read_again(tiny.write_jsonl(tmp_path / "before.jsonl", [row]))
    (written,) = prepare(prepare_rows.Relabel, [row], tmp_path)
    assert read_again(tmp_path / "out.jsonl") == [(prompt, [second, first])]
    (example,) = parse_rows(str(tmp_path / "out.jsonl"), Counts())
    means = [sum(scores) / len(scores) for scores in example.scores]
    assert means == sorted(means, reverse=True)
    assert written.keys() == row.keys()
    if form == "pair":
        assert (written["chosen_model"], written["rejected_model"]) == ("n", "m")
    if form == "completions":
        assert written["finished"] == [False, True]
    # what is in order already stays as it is
    assert prepare(prepare_rows.Relabel, [written], tmp_path) == [written]


def test_equal_scores_need_a_seed(tmp_path: Path) -> None:
    rows = [pair(score_chosen=2.0, score_rejected=2.0), pair(**SCORES)]
    assert len(prepare(prepare_rows.Relabel, rows, tmp_path)) == 1
    assert len(prepare(prepare_rows.Relabel, rows, tmp_path, by="bradley-terry")) == 2


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7])
def test_bradley_terry_frequencies(difference: float, tmp_path: Path) -> None:
    n = 3000
    rows = [pair(score_chosen=5.0 + difference, score_rejected=5.0, id=i) for i in range(n)]
    written = prepare(prepare_rows.Relabel, rows, tmp_path, by="bradley-terry")
    kept = [row["id"] for row in written if row["chosen"] == "a"]
    assert_frequency(len(kept), n, 1 / (1 + math.exp(-difference)))
    for row in written:
        assert row["score_chosen"] == (5.0 + difference if row["chosen"] == "a" else 5.0)

    # a row's sample does not depend on the rows before it, and another seed gives other samples
    assert prepare(prepare_rows.Relabel, rows[:50], tmp_path, by="bradley-terry") == written[:50]
    assert prepare(prepare_rows.Relabel, rows, tmp_path, by="bradley-terry", seed=1) != written


def test_a_sampled_ranking_is_what_training_reads(tmp_path: Path) -> None:
    n = 2000
    scores = [0.0, 1.0, -1.0]
    row = {"prompt": "lo", "completions": ["a", "b", "c"], "scores": scores, "completion_ids": [[5], [6], [7]]}
    row |= {"logps": [-5.0, -6.0, -7.0]}
    written = prepare(prepare_rows.Relabel, [row] * n, tmp_path, by="bradley-terry")
    best = Counter(new["completions"][0] for new in written)
    for text, score in zip("abc", scores, strict=True):
        assert_frequency(best[text], n, math.exp(score) / sum(map(math.exp, scores)))

    ids = {"a": 5, "b": 6, "c": 7}
    for new in written:
        assert [[ids[text]] for text in new["completions"]] == new["completion_ids"]
        assert [-ids[text] for text in new["completions"]] == new["logps"]
        assert [scores["abc".index(text)] for text in new["completions"]] == new["label_scores"]
    groups = tokenised.load(str(tmp_path / "out.jsonl"), tokenised.plain())
    for i in range(20):
        texts = [tokenised.plain().decode(ids[:-1]) for ids in tokenised.pieces(groups, i)[1:]]
        assert texts == written[i]["completions"]


# ---------------------------------------------------------------- length bias


def test_sizes_of_the_paper_s_sets() -> None:
    """The largest D_ρ,b from 30,000 rows of D_ρ."""
    largest = {
        0.2: [30_000, 15_000, 12_000, 10_000, 7_500],
        0.5: [18_750, 25_000, 30_000, 25_000, 18_750],
        0.8: [7_500, 10_000, 12_000, 15_000, 30_000],
    }
    for rho, sizes in largest.items():
        d_rho = LengthCounts(100_000, 100_000).subset(rho, 30_000)
        assert (d_rho.longer, d_rho.shorter) == (round(30_000 * rho), round(30_000 * (1 - rho)))
        for b, size in zip((0.2, 0.4, 0.5, 0.6, 0.8), sizes, strict=True):
            subset = d_rho.subset(b, None)
            assert (subset.longer, subset.shorter) == (round(size * b), size - round(size * b))


@pytest.mark.parametrize(("longer", "shorter"), [(0, 5), (7, 0), (7, 5), (3, 11)])
def test_the_largest_subset(longer: int, shorter: int) -> None:
    """Brute force: the largest total whose exact parts are there."""
    for share in (0.0, 0.1, 0.3, 0.5, 1.0):
        subset = LengthCounts(longer, shorter).subset(share, None)
        possible = []
        for total in range(longer + shorter + 1):
            if total * share <= longer + 1e-9 and total * (1 - share) <= shorter + 1e-9:
                possible.append(total)
        assert subset.longer + subset.shorter == max(possible)


def length_rows(lengths: list[tuple[int, int]]) -> list[dict]:
    """Pairs whose completions have these numbers of tokens, with the end."""
    rows = []
    for i, (chosen, rejected) in enumerate(lengths):
        rows.append(pair(chosen="#" * (chosen - 1), rejected="#" * (rejected - 1), id=i))
    return rows


def test_longer_is_at_least_ten_per_cent_more_tokens(model: str, tmp_path: Path) -> None:
    assert len(tokenised.ids(tokenised.plain(), "#" * 9)) == 9
    lengths = [(10, 11), (11, 10), (19, 20), (20, 19), (20, 22), (29, 31), (30, 33), (5, 5), (9, 2)]
    rows = length_rows(lengths)
    preferred_longer = prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=1.0)
    assert [row["id"] for row in preferred_longer] == [1, 8]
    preferred_shorter = prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=0.0)
    assert [row["id"] for row in preferred_shorter] == [0, 4, 6]
    twice = prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=1.0, more=1.0)
    assert [row["id"] for row in twice] == [8]


def test_shares_of_biased_sets_and_their_subsets(model: str, tmp_path: Path) -> None:
    rng = random.Random(4)
    lengths = [(rng.randint(2, 30), rng.randint(2, 30)) for _ in range(400)]
    rows = length_rows(lengths)
    for row in rows[::2]:  # a pair keeps its order, whatever its scores
        row["scores"] = [1.0, 2.0]
    written = prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=0.3, total=200)
    assert share_of_longer(written, lengths) == (60, 140)
    ids = [row["id"] for row in written]
    assert ids == sorted(set(ids))
    assert written == [rows[i] for i in ids]

    subsets = []
    for seed in (0, 1):
        subset = prepare(prepare_rows.LengthBias, written, tmp_path, model=model, share=0.6, seed=seed)
        assert share_of_longer(subset, lengths) == (60, 40)
        assert all(row in written for row in subset)
        subsets.append(subset)
    assert subsets[0] != subsets[1]
    with pytest.raises(
        UserError, match="a share of 0.5 in 200 pairs takes 100 .*; there are 60 that prefer the longer"
    ):
        prepare(prepare_rows.LengthBias, written, tmp_path, model=model, share=0.5, total=200)


def test_each_row_of_a_biased_set_is_counted_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out at the start, between, and at the end; and each is encoded once."""
    lengths = [(5, 5), (9, 2), (2, 9), (6, 1), (12, 3), (7, 7)]
    rows = length_rows(lengths)
    rows[3]["rejected"] = ""
    encoded = []
    encode = Encoder.encode

    def counted(self: Encoder, examples: list[Example], num_completions: int | None = None) -> Iterator:
        encoded.extend(example.number for example in examples)
        return encode(self, examples, num_completions)

    monkeypatch.setattr(Encoder, "encode", counted)
    written = prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=1.0, total=1)
    assert [row["id"] for row in written] in ([1], [4])
    line = (
        "rows 6, kept 1, dropped: about equally long 2, empty completion 1, not chosen 2; "
        "longer preferred before the choice 2; shorter preferred before the choice 1; "
    )
    assert line in capsys.readouterr().out
    assert encoded == [1, 2, 3, 4, 5, 6]


def share_of_longer(rows: list[dict], lengths: list[tuple[int, int]]) -> tuple[int, int]:
    chosen_is_longer = [lengths[row["id"]][0] > lengths[row["id"]][1] for row in rows]
    return sum(chosen_is_longer), len(rows) - sum(chosen_is_longer)


def test_scores_decide_in_rows_of_completions(model: str, tmp_path: Path) -> None:
    row = {"prompt": "lo", "completions": [" a a", " a a a a"], "scores": [1.0, 2.0]}
    rows = [row, {**row, "scores": [2.0, 1.0]}, {**row, "scores": [1.0, 1.0]}]
    assert prepare(prepare_rows.LengthBias, rows, tmp_path, model=model, share=1.0) == rows[:1]
    three = {"prompt": "lo", "completions": ["a", "b", "c"]}
    with pytest.raises(UserError, match="line 1: length bias needs pairs; the row has 3"):
        prepare(prepare_rows.LengthBias, [three], tmp_path, model=model, share=1.0)


# ---------------------------------------------------------------- best of N


def test_best_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(5)
    rows = [drawn_row(rng, 4) for _ in range(20)]
    for first in (None, 2):
        expected = []
        for row in rows:
            scores = row["scores"][:first]
            expected.append(by_hand(row, [scores.index(max(scores))]))
        assert prepare(prepare_rows.BestOf, rows, tmp_path, first=first) == expected

    groups = tokenised.load(str(tmp_path / "out.jsonl"), tokenised.plain(), tokenised.FIRST)
    assert [tokenised.pieces(groups, i)[1] for i in range(20)] == [row["completion_ids"][0] for row in expected]

    rows = [drawn_row(rng, 2), drawn_row(rng, 3)]
    assert len(prepare(prepare_rows.BestOf, rows, tmp_path, first=3)) == 1
    assert "rows 2, kept 1, dropped: fewer than 3 completions 1" in capsys.readouterr().out


def test_best_of_a_pair(tmp_path: Path) -> None:
    row = pair(**SCORES, id=3)
    assert prepare(prepare_rows.BestOf, [row], tmp_path) == [
        {"prompt": "lo", "completion": "b", "score": 2.0, **SCORES, "id": 3}
    ]
    with pytest.raises(UserError, match="line 1: no scores"):
        prepare(prepare_rows.BestOf, [pair()], tmp_path)


# ---------------------------------------------------------------- TL;DR

POST = {"subreddit": "cats", "title": "My cat", "post": "She {sleeps}.\nAll day."}
POST_PROMPT = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: She {sleeps}.\nAll day.\n\nTL;DR:"


def comparison(**columns: Any) -> dict:
    info = {"id": "t3", "site": None, "article": None, **POST}
    summaries = [{"text": " Cat sleeps.", "policy": "sup2", "note": "x"}, {"text": "A cat \n", "policy": "ref"}]
    return {"info": info, "summaries": summaries, "choice": 1, "worker": "w", "split": "train", **columns}


def test_comparisons(tmp_path: Path) -> None:
    rows = [comparison(), comparison(choice=0)]
    first, second = prepare(prepare_rows.Tldr, rows, tmp_path)
    assert first == {
        "prompt": POST_PROMPT,
        "chosen": " A cat",
        "rejected": " Cat sleeps.",
        "info": {"id": "t3", "site": None, "article": None},
        "chosen_info": {"policy": "ref"},
        "rejected_info": {"policy": "sup2", "note": "x"},
        "worker": "w",
        "split": "train",
    }
    assert (second["chosen"], second["rejected_info"]) == (" Cat sleeps.", {"policy": "ref"})


def test_posts_and_news_articles(tmp_path: Path) -> None:
    (post,) = prepare(prepare_rows.Tldr, [{"id": "t3", **POST, "summary": "Cat sleeps."}], tmp_path)
    assert post == {"prompt": POST_PROMPT, "completion": " Cat sleeps.", "id": "t3"}
    news = comparison(info={"id": "n", "article": "Rain.", "title": "Wet", "post": None, "subreddit": None})
    (row,) = prepare(prepare_rows.Tldr, [news], tmp_path)
    assert row["prompt"] == "Article:\nRain.\n\nTL;DR:"
    assert row["info"] == {"id": "n", "title": "Wet", "post": None, "subreddit": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (comparison(choice=2), "line 1: field 'choice' is 2, must be 0 or 1"),
        (comparison(choice=True), "line 1: field 'choice' is True"),
        (comparison(summaries=[{"text": "a"}]), "line 1: field 'summaries' must be a list of two objects"),
        (comparison(summaries=[{"text": "a"}, {"text": 3}]), "line 1: field 'text' of a summary must be text, not int"),
        (comparison(info={"title": "a", "post": "b"}), "line 1: field 'subreddit' must be text, not NoneType"),
        ({"info": {}, "summary": {}}, "line 1: unknown columns info, summary"),
    ],
)
def test_malformed_comparisons(row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(prepare_rows.Tldr, [row], tmp_path)


# ---------------------------------------------------------------- files


def relabel_args(folder: Path) -> prepare_rows.Relabel:
    source = folder / "rows.jsonl"
    if not source.exists():
        tiny.write_jsonl(source, [pair(score_chosen=0.0, score_rejected=1.0, id=i) for i in range(700)])
    return prepare_rows.Relabel(rows=str(source), output=folder / "out.jsonl", by="bradley-terry")


def header(args: Any) -> bytes:
    settings = {"command": type(args).__name__, **settings_of(args)}
    return json.dumps(settings).encode() + b"\n"


def test_killed_and_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    args = relabel_args(tmp_path)
    prepare_rows.main(args)
    complete = args.output.read_bytes()
    lines = complete.splitlines(keepends=True)
    part = tmp_path / "out.jsonl.partial"
    for rows_done in (0, 1, 256, 600, 700):
        for output_is_there in (False, True):
            args.output.unlink()
            if output_is_there:
                args.output.write_bytes(complete)
            part.write_bytes(header(args) + b"".join(lines[:rows_done]) + b'{"torn')
            prepare_rows.main(args)
            assert args.output.read_bytes() == complete
            assert not part.exists()


def test_a_split_continues_wherever_it_was_killed(tmp_path: Path) -> None:
    rows = [pair(prompt=str(i)) for i in range(600)]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    train = tmp_path / "train.jsonl"
    held_out = tmp_path / "held_out.jsonl"
    args = prepare_rows.Split(rows=str(source), output=train, held_out_output=held_out, held_out_share=0.5)
    prepare_rows.main(args)
    complete = train.read_bytes(), held_out.read_bytes()
    some_rows = b"".join(complete[1].splitlines(keepends=True)[:9])

    for part_of_held_out in (header(args), header(args) + some_rows):
        held_out.unlink()
        (tmp_path / "held_out.jsonl.partial").write_bytes(part_of_held_out)
        prepare_rows.main(args)
        assert (train.read_bytes(), held_out.read_bytes()) == complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "rows.jsonl", "train.jsonl"]

    held_out.unlink()
    with pytest.raises(UserError, match="train.jsonl: exists already"):
        prepare_rows.main(args)
    args.held_out_output = train
    with pytest.raises(UserError, match="are the same file"):
        prepare_rows.main(args)


def test_an_output_is_never_overwritten(tmp_path: Path) -> None:
    args = relabel_args(tmp_path)
    args.output.write_text("mine")
    with pytest.raises(UserError, match="out.jsonl: exists already"):
        prepare_rows.main(args)

    # nor by a run with other settings than those of the one that was interrupted
    part = tmp_path / "out.jsonl.partial"
    part.write_bytes(header(args) + b'{"a": 1}\n')
    args.seed = 1
    with pytest.raises(UserError, match="out.jsonl: exists already"):
        prepare_rows.main(args)
    assert args.output.read_text() == "mine"
    args.output.unlink()
    with pytest.raises(UserError, match="other settings .*seed 0 → 1"):
        prepare_rows.main(args)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        prepare_rows.main(relabel_args(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def run_command(kind: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [*tiny.command(SCRIPT, 1, {}), kind, *words]
    return subprocess.run(
        line, cwd=tiny.ROOT, env=tiny.environment(folder), capture_output=True, text=True, timeout=120
    )


def test_a_malformed_row_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [pair(score_chosen=0.0, score_rejected=1.0) for _ in range(600)]
    rows.append({**rows[0], "chosen": 3})
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    done = run_command("relabel", tmp_path, "--rows", str(source), "--output", str(tmp_path / "new" / "out.jsonl"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"prepare_rows.py: {source}, line 601: field 'chosen' is of type int, must be text or a list of messages "
        "(form prompt + chosen + rejected)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.skipif(not DATA.exists(), reason="no folder of real rows")
def test_real_transcripts_of_one_turn(tmp_path: Path) -> None:
    source = DATA / "hh-harmless.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    expected = []
    for row in rows:
        prompt = row["chosen"].rpartition("\n\nAssistant:")[0]
        is_same = prompt == row["rejected"].rpartition("\n\nAssistant:")[0]
        if is_same and prompt.count("\n\nHuman:") == 1:
            expected.append(row)

    args = prepare_rows.SingleTurn(rows=str(source), output=tmp_path / "out.jsonl")
    prepare_rows.main(args)
    assert tiny.read_jsonl(args.output) == expected
    assert len(expected) > 400
    again = [(example.prompt, example.texts) for example in parse_rows(str(args.output), Counts(), PROMPT_FORMS)]
    assert len(again) == len(expected)
