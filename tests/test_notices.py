"""The embedded world: the oracle on cases counted by hand, the files, the tokenizer, the preference draws."""

import json
import math
import random
from collections import Counter

import notices
import pytest

POST = "we lost a lamp. it was at the market in june. the tag says four. please call anna. summary:"
CLEAN = "lost lamp, at market, tag four, in june, call anna."


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
        ("\n\t <unk> é 🙂 42", -0.5 * 3),  # divided by < > and the picture: unk | é | 42
    ],
)
def test_oracle(completion, reward):
    assert notices.oracle(POST, completion) == reward


def test_mark_words():
    marks = notices.mark_words(POST, "found lamp, at school, lamp.")
    right, wrong, neither = notices.CORRECT, notices.WRONG, notices.NEITHER
    assert [word for word, _ in marks] == ["found", "lamp", ",", "at", "school", ",", "lamp", "."]
    assert [mark for _, mark in marks] == [neither, right, neither, neither, wrong, neither, neither, neither]


@pytest.mark.parametrize("post", ["", "we lost a lamp.", POST + " lamp", POST + " kettle"])
def test_a_prompt_that_is_no_notice_is_refused(post):
    with pytest.raises(ValueError, match="not a notice"):
        notices.oracle(post, CLEAN)


def test_slots_are_disjoint_and_posts_hold_each_once():
    assert len(notices.SLOT_OF) == sum(len(values) for values in notices.SLOTS.values())
    rng = random.Random(0)
    for _ in range(500):
        prompt, kind = notices.make_notice(rng)
        tokens = Counter(notices.words(prompt))
        for values in notices.SLOTS.values():
            assert sum(tokens[value] for value in values) == 1
        assert notices.oracle(prompt, notices.make_summary(prompt, kind, rng)) == 5.0
        assert notices.oracle(prompt, notices.make_summary(prompt, kind, rng, 1.0, 2)) == -6.0


def test_mean_reward_of_the_demonstrations():
    """E r = 0.6 * 5 + 0.4 * 5 * (0.6 - 0.4) - 0.5 * (0.25 + 2 * 0.15) = 3.125."""
    rng = random.Random(1)
    rows = [notices.make_sft_row(*notices.make_notice(rng), rng) for _ in range(4000)]
    rewards = [notices.oracle(**row) for row in rows]
    assert abs(sum(rewards) / 4000 - 3.125) < 4 * 2.5 / math.sqrt(4000)  # a row's deviation is about 2.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    notices.world(directory, seed=3, sft_rows=300, prompt_rows=100, held_out_rows=50)
    return directory


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_world_files_are_disjoint_and_follow_the_seed(world, tmp_path):
    files = {name: read(world / f"{name}.jsonl") for name in ("sft", "prompts", "held_out")}
    assert {name: len(rows) for name, rows in files.items()} == {"sft": 300, "prompts": 100, "held_out": 50}
    assert len({row["prompt"] for rows in files.values() for row in rows}) == 450
    assert set(files["prompts"][0]) == {"prompt"}
    assert all(notices.oracle(**row) == 5.0 for row in files["held_out"])
    assert not list(world.glob("**/*.tmp"))

    notices.world(tmp_path, seed=3, sft_rows=20, prompt_rows=10, held_out_rows=50)
    assert (tmp_path / "held_out.jsonl").read_bytes() == (world / "held_out.jsonl").read_bytes()
    weights = [path / "base" / "model.safetensors" for path in (world, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_model_directory_loads_and_every_word_has_its_token(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    assert model.config.vocab_size == len(tokenizer) == len(notices.vocabulary())
    for row in read(world / "sft.jsonl") + read(world / "held_out.jsonl"):
        prompt = tokenizer(row["prompt"]).input_ids
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.eos_token_id) == 0
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt, skip_special_tokens=True) == row["prompt"]
        assert tokenizer.decode(completion) == row["completion"]
        assert tokenizer.convert_ids_to_tokens(completion) == notices.words(row["completion"])


def test_any_tokens_survive_decoding_and_encoding(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(notices.SPECIAL), len(tokenizer)) for _ in range(20)]
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (-1.5, 0.5), (2.0, 2.0)])
def test_bradley_terry_frequencies(first, second):
    rng, draws = random.Random(5), 4000
    wins = sum(notices.rank([first, second], rng)[0] == 0 for _ in range(draws))
    expected = 1 / (1 + math.exp(second - first))
    assert abs(wins / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_plackett_luce_frequencies():
    """P(2, 0, 1) = e^r2 / (e^r0 + e^r1 + e^r2) * e^r0 / (e^r0 + e^r1)."""
    rewards, draws = [0.5, -0.5, 1.0], 6000
    rng = random.Random(6)
    order = sum(notices.rank(rewards, rng) == [2, 0, 1] for _ in range(draws))
    a, b, c = map(math.exp, rewards)
    expected = c / (a + b + c) * a / (a + b)
    assert abs(order / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_prefer_writes_pairs_and_rankings(tmp_path):
    # Rewards 5 and -15 apart: the order is certain but for e^-10.
    texts = [CLEAN, "the, " * 20, "the, " * 60]
    for num in (2, 3):
        rows = [{"prompt": POST, "completions": texts[num - 1 :: -1], "finished": [True] * num}]
        notices.write_rows(tmp_path / "rows.jsonl", rows)
        notices.prefer(tmp_path / "rows.jsonl", tmp_path / f"{num}.jsonl", seed=1)
    assert read(tmp_path / "2.jsonl") == [{"prompt": POST, "chosen": texts[0], "rejected": texts[1]}]
    assert read(tmp_path / "3.jsonl") == [{"prompt": POST, "completions": texts}]


def test_prefer_drops_unfinished_and_identical_completions(tmp_path, capsys):
    texts = [("a", "b"), ("a", "c"), ("a", "a"), ("a", "d")]
    finished = [[True, True], [True, False], [True, True], [False, False]]
    rows = [{"prompt": POST, "completions": c, "finished": f} for c, f in zip(texts, finished, strict=True)]
    notices.write_rows(tmp_path / "rows.jsonl", rows)
    notices.prefer(tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert [{row["chosen"], row["rejected"]} for row in read(tmp_path / "out.jsonl")] == [{"a", "b"}]
    counts = "rows 4, kept 1, dropped: identical completions 1, unfinished completion 2"
    assert capsys.readouterr().out == counts + "\n"
    notices.write_rows(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(SystemExit):
        notices.prefer(tmp_path / "rows.jsonl", tmp_path / "none.jsonl")
    assert "no usable row; rows 3, kept 0" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()


GOOD = json.dumps({"prompt": POST, "completions": ["a", "b"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "no rows"),
        (f"{GOOD}\n{{", "line 2: "),
        ('{"completions": ["a", "b"]}', "line 1: needs a string in `prompt`"),
        ('{"prompt": "x", "completions": "ab"}', "line 1: needs a list of strings in `completions`"),
        ('{"prompt": "x", "completions": ["a"]}', "line 1: needs at least 2 completions, found 1"),
        (f"{GOOD}\n" + GOOD.replace('"b"', '"b", "c"'), "line 2: has 3 completions, the lines before 2"),
        (GOOD.replace("}", ', "finished": [true]}'), "line 1: needs 2 booleans in `finished`"),
        ('{"prompt": "hello", "completions": ["a", "b"]}', "line 1: not a notice"),
    ],
)
def test_prefer_refuses_bad_rows_in_one_line(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit) as end:
        notices.prefer(tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and str(tmp_path / "rows.jsonl") in error
    assert message in error
    assert not (tmp_path / "out.jsonl").exists()
