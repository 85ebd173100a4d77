"""The notices: the oracle on cases counted by hand, the files, the tokenizer, samples of preferences."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny

from scripts import notices as notices_command
from scripts.lab import notices
from shared import UserError

POST = "we lost a lamp. it was at the market in june. the tag says four. please call anna. summary:"
CLEAN = "lost lamp, at market, tag four, in june, call anna."


# ---------------------------------------------------------------- reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (CLEAN, 5.0),
        ("anna june four market lamp", 5.0),  # any order, any wording, one clause
        ("LOST Lamp , at market,tag four,in june,call anna", 5.0),  # spacing and case do not matter
        ("lost lamp, at market, tag four, in june, call boris.", 3.0),  # 4 right, 1 wrong
        ("lost kettle, at school, tag six, in may, call boris.", -5.0),
        ("lost lamp, at market.", 2.0),  # missing facts cost nothing but themselves
        ("lost lamp, thank you all, at market, more news soon.", 1.0),  # 2 right, 2 clauses too many
        ("lost lamp, lost lamp, lamp.", 0.0),  # a fact said again is a superfluous clause
        ("at market lamp lamp lamp.", 2.0),  # but costs nothing within a clause that has news
        ("at school, at market.", 0.0),  # a second value for a slot is another fact
        ("at school, at school.", -1.5),  # wrong once, then superfluous
        ("january february march april may june july august", -6.0),  # listing all values does not pay
        ("", 0.0),
        (",,.,:.", 0.0),
        ("the the the", -0.5),
        ("\n\t <unk> é 🙂 42", -0.5 * 3),  # < > and the picture separate three clauses: unk | é | 42
    ],
)
def test_oracle(completion: str, reward: float) -> None:
    assert notices.oracle(POST, completion) == reward


def test_mark_words() -> None:
    marks = notices.mark_words(POST, "found lamp, at school, lamp.")
    assert marks == [
        ("found", notices.NEITHER),
        ("lamp", notices.CORRECT),
        (",", notices.NEITHER),
        ("at", notices.NEITHER),
        ("school", notices.WRONG),
        (",", notices.NEITHER),
        ("lamp", notices.NEITHER),
        (".", notices.NEITHER),
    ]


@pytest.mark.parametrize("post", ["", "we lost a lamp.", POST + " lamp", POST + " kettle"])
def test_a_prompt_that_is_no_notice_is_refused(post: str) -> None:
    with pytest.raises(ValueError, match="not a notice"):
        notices.oracle(post, CLEAN)


def test_slots_are_disjoint_and_posts_hold_each_once() -> None:
    assert len(notices.SLOT_OF) == sum(len(values) for values in notices.SLOTS.values())
    rng = random.Random(0)
    for _ in range(500):
        prompt, kind = notices.make_notice(rng)
        counts = Counter(notices.words(prompt))
        for values in notices.SLOTS.values():
            assert sum(counts[value] for value in values) == 1

        perfect = notices.make_summary(prompt, kind, rng)
        assert notices.oracle(prompt, perfect) == 5.0
        all_wrong = notices.make_summary(prompt, kind, rng, p_wrong=1.0, superfluous=2)
        assert notices.oracle(prompt, all_wrong) == -6.0


def test_mean_reward_of_the_demonstrations() -> None:
    """E r = 0.6 * 5 + 0.4 * 5 * (0.6 - 0.4) - 0.5 * (0.25 + 2 * 0.15) = 3.125."""
    rng = random.Random(1)
    rewards = []
    for _ in range(4000):
        prompt, kind = notices.make_notice(rng)
        row = notices.make_sft_row(prompt, kind, rng)
        rewards.append(notices.oracle(row["prompt"], row["completion"]))
    mean = sum(rewards) / 4000
    assert abs(mean - 3.125) < 4 * 2.5 / math.sqrt(4000)  # a row's deviation is about 2.5


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `notices.py world` writes."""
    path = tmp_path_factory.mktemp("notices")
    write_world(path, sft_rows=300, prompt_rows=100)
    return path


def write_world(folder: Path, sft_rows: int, prompt_rows: int) -> None:
    notices_command.main(
        notices_command.World(
            output_dir=folder,
            seed=3,
            sft_rows=sft_rows,
            prompt_rows=prompt_rows,
            held_out_rows=50,
        )
    )


def test_rows_are_disjoint_and_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    sft = tiny.read_jsonl(folder / "sft.jsonl")
    prompts = tiny.read_jsonl(folder / "prompts.jsonl")
    held_out = tiny.read_jsonl(folder / "held_out.jsonl")
    assert len(sft) == 300
    assert len(prompts) == 100
    assert len(held_out) == 50
    assert len({row["prompt"] for row in sft + prompts + held_out}) == 450
    assert set(prompts[0]) == {"prompt"}
    for row in held_out:
        assert notices.oracle(row["prompt"], row["completion"]) == 5.0
    assert not list(folder.glob("**/*.tmp"))

    write_world(tmp_path, sft_rows=20, prompt_rows=10)
    for name in ("held_out.jsonl", "base/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_model_directory_loads_and_every_word_has_its_token(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 0.8e6 < size < 1.2e6
    assert model.config.vocab_size == len(tokenizer) == len(notices.vocabulary())

    rows = tiny.read_jsonl(folder / "sft.jsonl") + tiny.read_jsonl(folder / "held_out.jsonl")
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in prompt
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt, skip_special_tokens=True) == row["prompt"]
        assert tokenizer.decode(completion) == row["completion"]
        assert tokenizer.convert_ids_to_tokens(completion) == notices.words(row["completion"])


def test_any_tokens_survive_decoding_and_encoding(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    first_word = len(notices.SPECIAL)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(first_word, len(tokenizer)) for _ in range(20)]
        text = tokenizer.decode(ids)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids


# ---------------------------------------------------------------- preferences


def assert_frequency(count: int, samples: int, probability: float) -> None:
    """The share of `count` is within four binomial deviations of `probability`."""
    deviation = math.sqrt(probability * (1 - probability) / samples)
    assert abs(count / samples - probability) < 4 * deviation


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (-1.5, 0.5), (2.0, 2.0)])
def test_bradley_terry_frequencies(first: float, second: float) -> None:
    rng = random.Random(5)
    wins = 0
    for _ in range(4000):
        best = notices.rank_by_preference([first, second], rng)[0]
        wins += best == 0
    assert_frequency(wins, 4000, 1 / (1 + math.exp(second - first)))


def test_plackett_luce_frequencies() -> None:
    """P(2, 0, 1) = e^r2 / (e^r0 + e^r1 + e^r2) * e^r0 / (e^r0 + e^r1)."""
    rng = random.Random(6)
    rewards = [0.5, -0.5, 1.0]
    count = 0
    for _ in range(6000):
        count += notices.rank_by_preference(rewards, rng) == [2, 0, 1]
    a, b, c = (math.exp(reward) for reward in rewards)
    assert_frequency(count, 6000, c / (a + b + c) * a / (a + b))


def prefer(rows: list[dict], folder: Path) -> list[dict]:
    """What `notices.py prefer` makes of rows."""
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    args = notices_command.Prefer(rows=folder / "rows.jsonl", output=folder / "out.jsonl")
    notices_command.main(args)
    return tiny.read_jsonl(folder / "out.jsonl")


def test_prefer_writes_pairs_and_rankings(tmp_path: Path) -> None:
    # The rewards 5, -10 and -30 are far apart: the order is certain but for e^-15.
    best = CLEAN
    middle = "the, " * 20
    worst = "the, " * 60
    two = {"prompt": POST, "completions": [middle, best], "finished": [True, True]}
    assert prefer([two], tmp_path) == [{"prompt": POST, "chosen": best, "rejected": middle}]
    three = {"prompt": POST, "completions": [worst, middle, best], "finished": [True, True, True]}
    assert prefer([three], tmp_path) == [{"prompt": POST, "completions": [best, middle, worst]}]


def test_prefer_drops_unfinished_and_identical_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": POST, "completions": ["a", "b"], "finished": [True, True]},
        {"prompt": POST, "completions": ["a", "c"], "finished": [True, False]},
        {"prompt": POST, "completions": ["a", "a"], "finished": [True, True]},
        {"prompt": POST, "completions": ["a", "d"], "finished": [False, False]},
    ]
    (preference,) = prefer(rows, tmp_path)
    assert {preference["chosen"], preference["rejected"]} == {"a", "b"}
    counts = "rows 4, kept 1, dropped: identical completions 1, unfinished completion 2"
    assert capsys.readouterr().out == counts + "\n"

    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(UserError, match="rows.jsonl: no usable row; rows 3, kept 0"):
        prefer(rows[1:], tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


GOOD = json.dumps({"prompt": POST, "completions": ["a", "b"]})
THREE = json.dumps({"prompt": POST, "completions": ["a", "b", "c"]})
UNEQUAL = json.dumps({"prompt": POST, "completions": ["a", "b"], "finished": [True]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": No such file"),
        ("", ": no rows"),
        (f"{GOOD}\n{{", ", line 2: "),
        ('{"completions": ["a", "b"]}', ", line 1: needs a string in `prompt`"),
        ('{"prompt": "x", "completions": "ab"}', ", line 1: needs a list of strings in `completions`"),
        ('{"prompt": "x", "completions": ["a"]}', ", line 1: needs at least 2 completions, found 1"),
        (f"{GOOD}\n{THREE}", ", line 2: has 3 completions, the lines before 2"),
        (UNEQUAL, ", line 1: needs 2 booleans in `finished`"),
        ('{"prompt": "hello", "completions": ["a", "b"]}', ", line 1: not a notice"),
    ],
)
def test_prefer_refuses_bad_rows(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    args = notices_command.Prefer(rows=path, output=tmp_path / "out.jsonl")
    with pytest.raises(UserError) as error:
        notices_command.main(args)
    problem = str(error.value)
    assert problem.startswith(f"{path}{message}")
    assert "\n" not in problem
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world", "--output-dir", "out", "--seed", "-1"], "--seed -1: must be a finite number of at least 0"),
        (["prefer", "--rows", "missing.jsonl", "--output", "out"], "missing.jsonl: No such file or directory"),
    ],
)
def test_command_line_ends_with_one_line_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, tiny.ROOT / "scripts/notices.py", *words],
        cwd=tmp_path,
        env=tiny.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
