"""Rows of scripts/sample.py: the ids that a policy drew are those that are trained on and scored."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shapes import tokenizer_of
from tokenised import (
    BAD,
    FIRST,
    GOOD,
    RANKING,
    TALK,
    USER,
    assistant,
    chat,
    ids,
    load,
    only_group,
    pieces,
    plain,
    question,
    write,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scripts import sample, score
from shared import UserError
from shared.encode import Encoder
from shared.groups import Groups, Requires, check_fit

OTHER = "drawn ids other than those of their text"
FOREIGN = "drawn ids of another vocabulary not used"
SAMPLES = Requires("first", samples="required")


def spelled(tokenizer: Any, text: str) -> list[int]:
    """A text in ids of single characters, which no tokenizer gives for a word."""
    (*letters,) = map(tokenizer.convert_tokens_to_ids, text)
    assert letters != ids(tokenizer, text)
    return letters


def drawn_row(tokenizer: Any, prompt: object, texts: list[str], all_ids: list[list[int]], **columns: object) -> dict:
    finished = [row_ids[-1] == tokenizer.eos_token_id for row_ids in all_ids]
    row = {"prompt": prompt, "completions": texts, "finished": finished, "completion_ids": all_ids}
    return {**row, "vocabulary": Encoder(tokenizer).vocabulary, **columns}


def counts(groups: Groups) -> tuple[int, int]:
    """Rows with other ids than their text's, and rows whose ids are not used."""
    return groups.report.get(OTHER, 0), groups.report.get(FOREIGN, 0)


# ---------------------------------------------------------------- ids or text


@pytest.mark.parametrize("prompt, tokenizer", [(USER, plain()), (TALK, chat())], ids=["plain", "chat"])
def test_ids_of_the_same_vocabulary_are_used(tmp_path: Path, prompt: object, tokenizer: Any) -> None:
    """Whatever the text gives; a completion that was cut off has no end."""
    eos = tokenizer.eos_token_id
    finished = [*spelled(tokenizer, "ok"), eos]
    cut_off = spelled(tokenizer, "dapu")
    usual = [*ids(tokenizer, "dapu"), eos]
    row = drawn_row(tokenizer, prompt, ["ok", "dapu", "dapu"], [finished, cut_off, usual], scores=[1, 3, 2])
    groups = load(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    expected = ids(tokenizer, USER, special=True)
    if prompt == TALK:
        expected = question(tokenizer)
    assert pieces(groups, 0) == [expected, cut_off, usual, finished]
    assert counts(groups) == (1, 0)

    usual_row = drawn_row(tokenizer, prompt, ["ok"], [[*ids(tokenizer, "ok"), eos]])
    groups = load(write(tmp_path / "rows.jsonl", [usual_row]), tokenizer, FIRST)
    assert pieces(groups, 0) == [expected, [*ids(tokenizer, "ok"), eos]]
    assert counts(groups) == (0, 0)


@pytest.mark.parametrize("vocabulary", ["0123456789abcdef", None, 7, "another"])
def test_ids_of_another_vocabulary_are_not_used(tmp_path: Path, vocabulary: object) -> None:
    if vocabulary == "another":
        vocabulary = Encoder(tiny.make_tokenizer(vocab=380)).vocabulary
    row = drawn_row(plain(), USER, ["ok", "dapu"], [[5, 6, 7], [8]], finished=[True, False], vocabulary=vocabulary)
    groups = load(write(tmp_path / "rows.jsonl", [row]), plain())
    prompt = ids(plain(), USER, special=True)
    finished = [*ids(plain(), "ok"), plain().eos_token_id]
    assert pieces(groups, 0) == [prompt, finished, ids(plain(), "dapu")]
    assert counts(groups) == (0, 1)


def test_the_vocabulary_is_the_meaning_of_the_ids() -> None:
    vocabulary = Encoder(plain()).vocabulary
    other_template = tiny.make_tokenizer()
    other_template.chat_template = "x"
    assert vocabulary == Encoder(tiny.make_tokenizer()).vocabulary == Encoder(other_template).vocabulary
    swapped = tiny.make_tokenizer(bos=False)
    assert Encoder(swapped).vocabulary != vocabulary
    assert Encoder(chat()).vocabulary != vocabulary


def test_ids_are_cut_as_texts_are(tmp_path: Path) -> None:
    letters = spelled(plain(), "dapu")
    row = drawn_row(plain(), USER, ["dapu", "ok"], [letters, [*spelled(plain(), "ok"), plain().eos_token_id]])
    prompt = ids(plain(), USER, special=True)
    groups = load(write(tmp_path / "rows.jsonl", [row]), plain(), length=len(prompt) + 2)
    assert pieces(groups, 0) == [prompt, letters[:2], spelled(plain(), "ok")]
    assert groups.report["completions cut"] == 2


@pytest.mark.parametrize("vocabulary", [Encoder(plain()).vocabulary, "another"])
def test_ids_of_reference_samples(tmp_path: Path, vocabulary: str) -> None:
    row = {
        "prompt": USER,
        "completion": "a",
        "reference_samples": ["ok", "dapu"],
        "reference_samples_finished": [True, False],
        "reference_sample_ids": [[*spelled(plain(), "ok"), plain().eos_token_id], spelled(plain(), "dapu")],
        "reference_vocabulary": vocabulary,
    }
    groups = load(write(tmp_path / "rows.jsonl", [row]), plain(), SAMPLES)
    if vocabulary == "another":
        expected = [[*ids(plain(), "ok"), plain().eos_token_id], ids(plain(), "dapu")]
        assert counts(groups) == (0, 1)
    else:
        expected = row["reference_sample_ids"]
        assert counts(groups) == (1, 0)
    assert pieces(groups, 0)[2:] == expected
    assert counts(load(write(tmp_path / "rows.jsonl", [row]), plain(), FIRST)) == (0, 0)


# ---------------------------------------------------------------- malformed ids

MALFORMED = [
    [[5]],  # of one completion of two
    [[5], []],
    [[5], ["a"]],
    [[5], [-1]],
    [[5], [True]],
    [[5], 6],
    [[5], [6.0]],
    [[5], [2**31]],  # beyond int32
]


@pytest.mark.parametrize("value", MALFORMED, ids=str)
@pytest.mark.parametrize("name", ["completion_ids", "reference_sample_ids"])
def test_malformed_ids_end_with_their_line(tmp_path: Path, name: str, value: list) -> None:
    good = {"prompt": USER, "completions": ["ok", "no"], "reference_samples": ["ok", "no"]}
    source = write(tmp_path / "rows.jsonl", [good, {**good, name: value}])
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: field '{name}' must hold 2 lists of token ids"):
        load(source, plain())


def test_ids_that_are_no_list(tmp_path: Path) -> None:
    row = {"prompt": USER, "completions": ["ok", "no"], "completion_ids": "5 6"}
    with pytest.raises(UserError, match="line 1: field 'completion_ids' is of type str, must be a list"):
        load(write(tmp_path / "rows.jsonl", [row]), plain())


def test_ids_that_the_model_does_not_embed(tmp_path: Path) -> None:
    row = drawn_row(plain(), USER, ["ok", "no"], [[5, 2**31 - 1], [6]])
    groups = load(write(tmp_path / "rows.jsonl", [row]), plain())
    with pytest.raises(UserError, match=f"^rows: token id {2**31 - 1}, but the model embeds 400$"):
        check_fit(groups, tiny.make_config("llama", 400), "rows")


# ---------------------------------------------------------------- templates that think


@pytest.mark.parametrize(
    "name, texts",
    [
        ("qwen 3", ["<think>\nso it", "<think>\nhm\n</think>\n\nno"]),
        ("r1", ["so it", "hm\n</think>\n\nno"]),
        ("gemma", [" so it ", " no "]),
        ("mistral", ["so it", " no"]),
    ],
)
@pytest.mark.parametrize("with_ids", [False, True])
def test_what_was_drawn_follows_the_whole_prompt(tmp_path: Path, name: str, texts: list[str], with_ids: bool) -> None:
    """Without thoughts, blanks or ends that the template would write."""
    tokenizer = tokenizer_of(name)
    end = {"gemma": "<end_of_turn>"}.get(name, tokenizer.eos_token)
    expected = [ids(tokenizer, texts[0]), [*ids(tokenizer, texts[1]), tokenizer.convert_tokens_to_ids(end)]]
    row = {"prompt": TALK, "completions": texts, "finished": [False, True]}
    if with_ids:
        row |= {"completion_ids": expected, "vocabulary": Encoder(tokenizer).vocabulary}
    groups = load(write(tmp_path / "rows.jsonl", [row]), tokenizer)

    prompt = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert pieces(groups, 0) == [ids(tokenizer, prompt), *expected]
    assert groups.report == {
        "source": str(tmp_path / "rows.jsonl"),
        "rows": 1,
        "kept": 1,
        "dropped": {},
        "sha256": groups.report["sha256"],
    }


def test_texts_that_were_not_drawn_go_through_the_template(tmp_path: Path) -> None:
    row = {"prompt": TALK, "completions": ["so it", "no"]}
    tokenizer = tokenizer_of("qwen 3")
    _, first, _ = only_group(tmp_path, row, tokenizer)
    assert tokenizer.decode(first) == "<think>\n\n</think>\n\nso it<|im_end|>"


def test_samples_beside_an_answer_with_another_prompt_are_dropped(tmp_path: Path) -> None:
    """The template puts its <think> before what a policy writes, but not before an answer of the row."""
    row = {"messages": [*TALK, assistant("yes")], "reference_samples": ["so", "it"]}
    source = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=r"dropped: drawn completions follow the '<think>\\n' of the chat template"):
        load(source, tokenizer_of("r1"), SAMPLES)
    assert len(load(source, tokenizer_of("r1"), FIRST)) == 1
    assert len(load(source, tokenizer_of("qwen 3"), SAMPLES)) == 1


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with one label and a chat tokenizer whose template thinks."""
    path = tmp_path_factory.mktemp("rm")
    tokenizer = tokenizer_of("r1")
    config = tiny.make_config("llama", len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    config.architectures = ["LlamaForSequenceClassification"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_ids_are_scored(reward_model: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("r1")
    all_ids = [spelled(tokenizer, "dapu"), [*spelled(tokenizer, "ok"), tokenizer.eos_token_id], [7]]
    rows = [
        drawn_row(tokenizer, TALK, ["dapu", "ok", "x"], all_ids),
        drawn_row(tokenizer, TALK, ["dapu", "ok", "x"], all_ids, vocabulary="another"),
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    score.main(score.Args(rows=source, output=tmp_path / "out.jsonl", reward_models=(str(reward_model),)))

    prompt = ids(tokenizer, tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))
    texts = [ids(tokenizer, "dapu"), [*ids(tokenizer, "ok"), tokenizer.eos_token_id], ids(tokenizer, "x")]
    stock_model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    for row, completions in zip(tiny.read_jsonl(tmp_path / "out.jsonl"), (all_ids, texts), strict=True):
        with torch.no_grad():
            expected = [stock_model(torch.tensor([prompt + completion])).logits.item() for completion in completions]
        assert row["scores"] == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- from sampling to training


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("policy") / "chat", chat=True, initializer_range=0.1)


PROMPTS = [
    {"prompt": TALK},
    {"messages": [*TALK, assistant("ok")]},
    {"instruction": "dapu", "output": "ok"},
    {"prompt": "a 42"},
]


@pytest.mark.parametrize("row", PROMPTS, ids=str)
@pytest.mark.parametrize("column", ["completion_ids", "reference_sample_ids"])
def test_what_was_sampled_is_trained_on(policy: Path, tmp_path: Path, row: dict, column: str) -> None:
    if "prompt" in row and column == "reference_sample_ids":
        row = {**row, "completion": "ok"}
    source = write(tmp_path / "rows.jsonl", [{**row, "id": number} for number in range(6)])
    options = {"num_completions": 3} if column == "completion_ids" else {"reference_samples": 3}
    output = tmp_path / "out.jsonl"
    sample.main(sample.Args(model=str(policy), rows=source, output=output, max_new_tokens=12, **options))

    tokenizer = AutoTokenizer.from_pretrained(policy)
    requires = RANKING if column == "completion_ids" else SAMPLES
    written = tiny.read_jsonl(output)
    groups = load(str(output), tokenizer, requires)
    assert len(groups) > 3

    num_others = 0
    texts = "completions" if column == "completion_ids" else "reference_samples"
    for i, number in enumerate(groups.row_numbers.tolist()):
        drawn = written[number - 1]
        assert pieces(groups, i)[-3:] == drawn[column]
        usual = []
        for text, completion_ids in zip(drawn[texts], drawn[column], strict=True):
            is_finished = completion_ids[-1] == tokenizer.eos_token_id
            usual.append(ids(tokenizer, text) + [tokenizer.eos_token_id] * is_finished)
        num_others += int(usual != drawn[column])
    assert counts(groups) == (num_others, 0)
    assert num_others > 0


def test_several_messages_are_not_drawn(tmp_path: Path) -> None:
    answers = [[assistant(GOOD), *TALK, assistant(BAD)], [assistant(BAD)]]
    row = {"prompt": TALK, "completions": answers, "finished": [True, True]}
    with pytest.raises(UserError, match="line 1: field 'completions': what a policy drew is one text"):
        load(write(tmp_path / "rows.jsonl", [row]), chat())
