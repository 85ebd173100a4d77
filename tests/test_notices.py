"""The notices: the oracle on cases counted by hand, the files, the tokenizer, samples of preferences."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny

from scripts import notices as notices_command
from scripts.lab import notices
from shared import UserError
from shared.command import check_arguments

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


# ---------------------------------------------------------------- demonstrations

N = 1500
SLOT_NAMES = ("item", "place", "number", "month", "person")  # in the order of the clauses of every kind


class Reading:
    """What a demonstration holds, read clause by clause: the shift of each stated fact in its list, and the rest."""

    def __init__(self, prompt: str, kind: notices.Kind, completion: str) -> None:
        assert completion.endswith(".")
        self.kind = kind
        self.shifts: dict[str, int] = {}  # 0 is right, 1 the next word
        self.others: list[str] = []
        truth = set(notices.words(prompt))
        for clause in completion[:-1].split(", "):
            values = notices.SLOT_OF.keys() & set(clause.split())
            if not values:
                self.others.append(clause)
                continue
            (value,) = values
            slot = notices.SLOT_OF[value]
            template = clause.replace(value, "{" + slot + "}")
            assert template == kind.summary[SLOT_NAMES.index(slot)]
            words = notices.SLOTS[slot]
            (true_value,) = truth & set(words)
            self.shifts[slot] = (words.index(value) - words.index(true_value)) % len(words)

    def reward(self) -> float:
        correct = sum(shift == 0 for shift in self.shifts.values())
        return correct - (len(self.shifts) - correct) - 0.5 * len(self.others)


def read_demonstrations(**options: Any) -> list[Reading]:
    """N demonstrations. The oracle agrees with the reading of each."""
    rng = random.Random(11)
    args = notices.Demonstrations(**options)
    readings = []
    for _ in range(N):
        prompt, kind = notices.make_notice(rng, args.fillers)
        row = notices.make_sft_row(prompt, kind, rng, args)
        assert row["prompt"] == prompt
        reading = Reading(prompt, kind, row["completion"])
        assert notices.oracle(prompt, row["completion"]) == reading.reward()
        readings.append(reading)
    return readings


def test_omissions_errors_and_superfluous_clauses_are_as_frequent_as_asked() -> None:
    shares = (0.4, 0.3, 0.2, 0.1)
    readings = read_demonstrations(omit=0.4, superfluous=shares, bad_rows=1.0, p_wrong=0.1)
    assert all("item" in reading.shifts for reading in readings)
    for slot in SLOT_NAMES[1:]:
        assert_frequency(sum(slot not in reading.shifts for reading in readings), N, 0.4)
    both = sum("place" not in reading.shifts and "person" not in reading.shifts for reading in readings)
    assert_frequency(both, N, 0.4**2)

    shifts = Counter(shift for reading in readings for shift in reading.shifts.values())
    for shift in range(1, 8):
        assert_frequency(shifts[shift], shifts.total(), 0.1 / 7)

    for number, share in enumerate(shares):
        assert_frequency(sum(len(reading.others) == number for reading in readings), N, share)
    clauses = Counter(clause for reading in readings for clause in reading.others)
    for clause in notices.SUPERFLUOUS:
        assert_frequency(clauses[clause], clauses.total(), 0.2)


def test_synonyms_are_as_frequent_as_asked_and_change_no_reward() -> None:
    rng = random.Random(3)
    args = notices.Demonstrations(synonym=0.2, omit=0.3)
    tokenizer = notices.make_tokenizer()
    counts: Counter[str] = Counter()
    for _ in range(N):
        prompt, kind = notices.make_notice(rng)
        completion = notices.make_sft_row(prompt, kind, rng, args)["completion"]
        usual = completion
        for other, wording, slot in (("see", "at", "place"), ("this", "in", "month")):
            own = {f"{other} {value}": f"{wording} {value}" for value in notices.SLOTS[slot]}
            clauses = [own.get(clause, clause) for clause in usual[:-1].split(", ")]
            written = ", ".join(clauses) + "."
            counts[other] += written != usual
            counts[slot] += any(clause in own.values() for clause in clauses)
            usual = written
        assert notices.oracle(prompt, completion) == Reading(prompt, kind, usual).reward()
        assert tokenizer.unk_token_id not in tokenizer(completion)["input_ids"]

    for other, slot in (("see", "place"), ("this", "month")):
        assert_frequency(counts[slot], N, 0.7)
        assert_frequency(counts[other], counts[slot], 0.2)


def test_bad_rows_are_as_frequent_as_asked() -> None:
    readings = read_demonstrations(p_wrong=1.0, bad_rows=0.25)
    wrong = Counter(sum(shift != 0 for shift in reading.shifts.values()) for reading in readings)
    assert set(wrong) == {0, 5}
    assert_frequency(wrong[5], N, 0.25)


def test_misread_facts_are_the_next_word_of_two_slots_of_each_kind() -> None:
    slots = {
        "lost": ("number", "month"),
        "found": ("place", "person"),
        "sale": ("item", "number"),
        "talk": ("month", "place"),
    }
    readings = read_demonstrations(misread=0.7)
    for kind, misread in slots.items():
        own = [reading for reading in readings if reading.kind.name == kind]
        for slot in SLOT_NAMES:
            # A fact that is not misread is still wrong in 40% of 40% of them, by each of seven words alike.
            p_misread = 0.7 if slot in misread else 0.0
            p_next = p_misread + (1 - p_misread) * 0.16 / 7
            assert_frequency(sum(reading.shifts[slot] == 1 for reading in own), len(own), p_next)
            assert_frequency(sum(reading.shifts[slot] == 0 for reading in own), len(own), (1 - p_misread) * 0.84)

    clean = read_demonstrations(misread=0.7, p_wrong=0.0)
    for number, probability in enumerate((0.09, 0.42, 0.49)):
        assert_frequency(sum(sum(reading.shifts.values()) == number for reading in clean), N, probability)


def test_a_refrain_is_said_a_geometric_number_of_times() -> None:
    readings = read_demonstrations(refrain=0.5, superfluous=(1.0,))
    numbers = Counter(len(reading.others) for reading in readings)
    assert {clause for reading in readings for clause in reading.others} == {"tea is free"}
    assert_frequency(numbers[0], N, 0.5)
    for number in range(1, 20):
        assert_frequency(numbers[number], N, 0.5 * 0.2 * 0.8 ** (number - 1))
    assert_frequency(numbers[20], N, 0.5 * 0.8**19)
    assert max(numbers) == 20


def test_refrain_stands_at_the_end() -> None:
    rng = random.Random(2)
    args = notices.Demonstrations(refrain=1.0, superfluous=(0, 0, 0, 1), omit=1.0)
    for _ in range(50):
        completion = notices.make_sft_row(*notices.make_notice(rng), rng, args)["completion"]
        clauses = completion[:-1].split(", ")
        assert any(value in clauses[0] for value in notices.SLOTS["item"])
        assert len(set(clauses[1:4])) == 3
        assert set(clauses[4:]) == {"tea is free"}


@pytest.mark.parametrize("fillers", [(3, 5), (1, 3), (0, 0), (7, 7)])
def test_posts_have_as_many_fillers_as_asked(fillers: tuple[int, int]) -> None:
    rng = random.Random(4)
    counts: Counter[int] = Counter()
    for _ in range(600):
        prompt, _ = notices.make_notice(rng, fillers)
        counts[sum(filler in prompt for filler in notices.FILLERS)] += 1
    expected = range(fillers[0], fillers[1] + 1)
    assert set(counts) == set(expected)
    for number in expected:
        assert_frequency(counts[number], 600, 1 / len(expected))


def test_posts_that_run_out_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "make_notice", lambda rng, fillers: (POST, notices.KINDS[0]))
    posts = notices.unique_notices(random.Random(0), (1, 1))
    assert next(posts)[0] == POST
    with pytest.raises(UserError, match="no new post after 1: ask for fewer rows or more --fillers"):
        next(posts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fillers": (4, 3)}, "--fillers 4 3: must be MIN MAX with 0 <= MIN <= MAX <= 7"),
        ({"fillers": (0, 8)}, "--fillers 0 8: must be"),
        ({"fillers": (-1, 2)}, "--fillers -1 2: must be"),
        ({"superfluous": (0.5, 0.4)}, "--superfluous 0.5 0.4: must sum to 1, not to 0.9"),
        ({"superfluous": ()}, "must sum to 1, not to 0"),
        ({"superfluous": (1.5, -0.5)}, "--superfluous 1.5 -0.5: must be probabilities, between 0 and 1"),
        ({"superfluous": (math.nan, 1.0)}, "must be probabilities"),
        ({"superfluous": (0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)}, "at most 6 numbers, for 0 to 5"),
        ({"p_wrong": 1.1}, "--p-wrong 1.1: must be a finite number of at least 0 and at most 1"),
        ({"bad_rows": -0.1}, "--bad-rows -0.1: must be"),
        ({"omit": 2.0}, "--omit 2.0: must be"),
        ({"misread": math.nan}, "--misread nan: must be"),
        ({"refrain": 1.5}, "--refrain 1.5: must be"),
        ({"p_wrong": 0.0, "superfluous": (1.0,)}, "no two different demonstrations in 200 attempts"),
    ],
)
def test_bad_worlds_are_refused_in_one_line(
    options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "ATTEMPTS", 200)
    args = notices_command.Pairs(output=tmp_path / "out.jsonl", rows=3, **options)
    with pytest.raises(UserError) as error:
        check_arguments(args)
        notices_command.main(args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `notices.py world` writes."""
    path = tmp_path_factory.mktemp("notices")
    write_world(path, sft_rows=300, prompt_rows=100)
    return path


def write_world(folder: Path, sft_rows: int, prompt_rows: int, **options: Any) -> None:
    notices_command.main(
        notices_command.World(
            output_dir=folder,
            seed=3,
            sft_rows=sft_rows,
            prompt_rows=prompt_rows,
            held_out_rows=50,
            **options,
        )
    )


def plain_post(rng: random.Random, seen: set[str]) -> tuple[str, notices.Kind]:
    """A new post of the default world, in one loop."""
    while True:
        kind = rng.choice(notices.KINDS)
        sentences = list(rng.choice(kind.posts))
        for filler in rng.sample(notices.FILLERS, rng.randint(3, 5)):
            sentences.insert(rng.randint(0, len(sentences)), filler)
        text = " ".join([*sentences, "summary:"])
        for slot, values in notices.SLOTS.items():
            text = text.replace("{" + slot + "}", rng.choice(values))
        if text not in seen:
            seen.add(text)
            return text, kind


def plain_summary(text: str, kind: notices.Kind, rng: random.Random, is_perfect: bool) -> str:
    """A summary of the default world: five draws for facts, and for a demonstration two before and some behind them."""
    p_wrong = 0.0
    extra = 0
    if not is_perfect:
        p_wrong = 0.0 if rng.random() < 0.6 else 0.4
        extra = rng.choices([0, 1, 2], [0.6, 0.25, 0.15])[0]
    facts = {}
    for slot, values in notices.SLOTS.items():
        (facts[slot],) = set(values) & set(notices.words(text))
        if rng.random() < p_wrong:
            facts[slot] = rng.choice([value for value in values if value != facts[slot]])
    clauses = [clause.format(**facts) for clause in kind.summary]
    for clause in rng.sample(notices.SUPERFLUOUS, extra):
        clauses.insert(rng.randint(1, len(clauses)), clause)
    return ", ".join(clauses) + "."


def test_the_default_world_is_that_of_a_plain_loop(folder: Path) -> None:
    rng = random.Random(3)
    seen: set[str] = set()
    held_out = []
    for _ in range(50):
        text, kind = plain_post(rng, seen)
        held_out.append({"prompt": text, "completion": plain_summary(text, kind, rng, is_perfect=True)})
    prompts = [{"prompt": plain_post(rng, seen)[0]} for _ in range(100)]
    sft = []
    for _ in range(300):
        text, kind = plain_post(rng, seen)
        sft.append({"prompt": text, "completion": plain_summary(text, kind, rng, is_perfect=False)})

    for name, rows in (("held_out", held_out), ("prompts", prompts), ("sft", sft)):
        lines = [json.dumps(row) + "\n" for row in rows]
        assert (folder / f"{name}.jsonl").read_text(encoding="utf-8") == "".join(lines)


def kind_of(prompt: str) -> str:
    """The kind of a post, by the word that gives it away."""
    signs = {"lost": "lost", "found": "found", "sale": "sale", "sell": "sale", "talk": "talk"}
    (kind,) = {signs[word] for word in notices.words(prompt) if word in signs}
    return kind


def test_an_unseen_kind_is_in_the_demonstrations_alone(tmp_path: Path) -> None:
    write_world(tmp_path, sft_rows=800, prompt_rows=100, unseen_kind="sale")
    files = {}
    for name in ("held_out", "held_out_unseen", "prompts", "sft"):
        files[name] = tiny.read_jsonl(tmp_path / f"{name}.jsonl")
    kinds = {name: Counter(kind_of(row["prompt"]) for row in rows) for name, rows in files.items()}
    assert set(kinds["held_out"]) == set(kinds["prompts"]) == {"lost", "found", "talk"}
    assert kinds["held_out_unseen"] == {"sale": 50}
    assert len(files["held_out"]) == 50
    assert len(files["prompts"]) == 100
    for kind in ("lost", "found", "sale", "talk"):
        assert_frequency(kinds["sft"][kind], 800, 0.25)

    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 1000
    for row in files["held_out"] + files["held_out_unseen"]:
        assert notices.oracle(row["prompt"], row["completion"]) == 5.0


def test_references_may_be_demonstrations_and_a_world_may_have_a_tiny_model(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_world(tmp_path, 20, 10, references="demonstration", p_wrong=1.0, bad_rows=1.0, superfluous=(0, 1), tiny=True)
    perfect = tiny.read_jsonl(folder / "held_out.jsonl")
    rows = tiny.read_jsonl(tmp_path / "held_out.jsonl")
    for row, expected in zip(rows, perfect, strict=True):
        assert (row["prompt"], row["perfect"]) == (expected["prompt"], expected["completion"])
        assert notices.oracle(row["prompt"], row["completion"]) == -5.5  # five wrong facts, one superfluous clause

    # Embedding and head; in each layer q, k, v, o, the three matrices of the MLP and two norms; the last norm.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    vocabulary = len(notices.vocabulary())
    size = 2 * vocabulary * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert model.config.num_attention_heads == 4
    tokenizer = "tokenizer.json"
    assert (tmp_path / "tiny" / tokenizer).read_bytes() == (folder / "base" / tokenizer).read_bytes()
    assert (tmp_path / "base/model.safetensors").read_bytes() == (folder / "base/model.safetensors").read_bytes()
    assert not (folder / "tiny").exists()


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
    assert abs(count / samples - probability) <= 4 * deviation


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


def prefer(rows: list[dict], folder: Path, **options: Any) -> list[dict]:
    """What `notices.py prefer` makes of rows."""
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    args = notices_command.Prefer(rows=folder / "rows.jsonl", output=folder / "out.jsonl", **options)
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


def test_noise_free_labels_follow_the_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rewards 1, 0.5, 0 and 1: near each other, so that samples would often go the other way.
    one = "lost lamp."
    half = "lost lamp, thank you."
    nothing = ""
    same = "at market."
    rows = [{"prompt": POST, "completions": pair} for pair in ([half, one], [nothing, half], [one, same])]
    for seed in range(20):
        pairs = prefer(rows, tmp_path, noise_free=True, seed=seed)
        assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(one, half), (half, nothing)]
    assert capsys.readouterr().out.splitlines()[-1] == "rows 3, kept 2, dropped: equal rewards 1"

    ranking = {"prompt": POST, "completions": [nothing, one, half]}
    assert prefer([ranking], tmp_path, noise_free=True) == [{"prompt": POST, "completions": [one, half, nothing]}]


def test_all_pairs_of_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completions = ["lost lamp.", "", "thank you.", "at market.", ""]  # rewards 1, 0, -0.5, 1, 0
    row = {"prompt": POST, "completions": completions, "finished": [True, True, False, True, True]}
    made = prefer([row], tmp_path, noise_free=True, pairs=True)
    pairs = [(pair["chosen"], pair["rejected"]) for pair in made]
    assert pairs == [("lost lamp.", ""), ("lost lamp.", ""), ("at market.", ""), ("at market.", "")]
    # Of 10 pairs, 4 have the unfinished completion, one the same text twice, and one two texts of reward 1.
    counts = "rows 10, kept 4, dropped: equal rewards 1, identical completions 1, unfinished completion 4"
    assert capsys.readouterr().out == counts + "\n"

    # Without `finished`, and with sampled labels: each pair is a Bradley-Terry pair of its own.
    rows = [{"prompt": POST, "completions": ["lost lamp.", "", "thank you."]}] * 1500
    won = Counter((pair["chosen"], pair["rejected"]) for pair in prefer(rows, tmp_path, pairs=True))
    assert won.total() == 4500
    for better, worse, gap in (("lost lamp.", "", 1.0), ("", "thank you.", 0.5), ("lost lamp.", "thank you.", 1.5)):
        assert won[better, worse] + won[worse, better] == 1500
        assert_frequency(won[better, worse], 1500, 1 / (1 + math.exp(-gap)))


# ---------------------------------------------------------------- pairs of demonstrations


def make_pairs(path: Path, rows: int, **options: Any) -> list[dict]:
    """What `notices.py pairs` writes."""
    notices_command.main(notices_command.Pairs(output=path, rows=rows, **options))
    return tiny.read_jsonl(path)


def test_pairs_are_two_different_demonstrations_of_new_posts(folder: Path, tmp_path: Path) -> None:
    options = {"seed": 3, "fillers": (1, 1), "unseen_kind": "talk"}
    rows = make_pairs(tmp_path / "one.jsonl", 500, **options)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 500
    assert {kind_of(prompt) for prompt in prompts} == {"lost", "found", "sale"}
    assert all(sum(filler in prompt for filler in notices.FILLERS) == 1 for prompt in prompts)
    assert all(row.keys() == {"prompt", "completions", "finished"} for row in rows)
    assert all(len(set(row["completions"])) == 2 and row["finished"] == [True, True] for row in rows)

    # With the same seed, the first posts of the world are others.
    default = {row["prompt"] for row in make_pairs(tmp_path / "default.jsonl", 100, seed=3)}
    assert not default & {row["prompt"] for row in tiny.read_jsonl(folder / "held_out.jsonl")}

    # The same posts again, but for those of the file.
    others = make_pairs(tmp_path / "two.jsonl", 500, exclude=(tmp_path / "one.jsonl",), **options)
    assert not prompts & {row["prompt"] for row in others}
    assert make_pairs(tmp_path / "three.jsonl", 500, **options) == rows
    with pytest.raises(UserError, match="missing.jsonl"):
        make_pairs(tmp_path / "four.jsonl", 5, exclude=(tmp_path / "missing.jsonl",))


def test_neither_place_of_a_pair_is_favoured(tmp_path: Path) -> None:
    """Clean with 0.5, or with a superfluous clause, one of 25 texts: P(first clean | different) by enumeration."""
    options = {"p_wrong": 0.0, "superfluous": (0.5, 0.5)}
    first = 0
    second = 0
    for row in make_pairs(tmp_path / "pairs.jsonl", 1500, **options):
        rewards = [notices.oracle(row["prompt"], completion) for completion in row["completions"]]
        first += rewards == [5.0, 4.5]
        second += rewards == [4.5, 5.0]
    probability = 0.25 / (1 - 0.25 - 25 * 0.02**2)
    assert_frequency(first, 1500, probability)
    assert_frequency(second, 1500, probability)


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


def test_command_line_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, tiny.ROOT / "scripts/notices.py", "world", "--output-dir", "out", "--seed", "-1"],
        cwd=tmp_path,
        env=tiny.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--seed -1: must be a finite number of at least 0" in done.stderr
    assert not list(tmp_path.iterdir())
