"""Scores against stock transformers one completion at a time, every form's columns, interruption, mistakes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scripts import score
from scripts.lab import notices, row_files
from shared import UserError
from shared.groups import Requires, tokenise
from shared.rows import Counts, parse_rows

SCRIPT = "scripts/score.py"
MEANS = [0.5, -2.0, 0.0]  # of each reward model over its training completions
POST = "we lost a lamp. it was at the market in june. the tag says four. please call anna. summary:"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, which is no reward model."""
    return tiny.make_model(tmp_path_factory.mktemp("base"), initializer_range=0.1)


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reward models with stored means."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for seed, mean in enumerate(MEANS):
        torch.manual_seed(seed)
        path = folder / str(seed)
        save_classifier(base, path, reward_mean=mean)
        paths.append(path)
    return paths


def save_classifier(base: Path, path: Path, **config: Any) -> None:
    """The model of `base` with a new head, and the tokenizer of `base`."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=2)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    tiny.make_rows(300, seed=4, path=path)
    return path


def run(rows: Path, output: Path, *models: Path, **options: Any) -> list[dict]:
    paths = tuple(str(path) for path in models)
    args = score.Args(rows=str(rows), output=output, reward_models=paths, **options)
    score.main(args)
    return tiny.read_jsonl(output)


def stock_scores(path: Path, sequences: list[list[int]]) -> list[float]:
    """The logits of transformers' own classifier, one sequence at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in sequences]


def stock_scores_of_texts(
    path: Path, prompt: str, completions: list[str], finished: list[bool] | None = None
) -> list[float]:
    """The same of prompt and completion, with an EOS after those that are finished, by default all."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if finished is None:
        finished = [True] * len(completions)
    sequences = []
    for completion, has_eos in zip(completions, finished, strict=True):
        ids = tokenizer(prompt).input_ids + tokenizer(completion, add_special_tokens=False).input_ids
        if has_eos:
            ids.append(tokenizer.eos_token_id)
        sequences.append(ids)
    return stock_scores(path, sequences)


# ---------------------------------------------------------------- values


def test_scores_equal_stock_transformers(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    rows = tiny.read_jsonl(pairs)
    scored = run(pairs, tmp_path / "out.jsonl", models[0], normalise=False)
    assert [{name: row[name] for name in rows[0]} for row in scored] == rows
    for row in scored[:20] + scored[-20:]:
        expected = stock_scores_of_texts(models[0], row["prompt"], [row["chosen"], row["rejected"]])
        assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(expected, abs=1e-4)


def test_several_models_and_their_means(models: list[Path], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.make_rows(12, seed=6, k=3))
    plain = run(rows, tmp_path / "plain", *models, normalise=False)
    normalised = run(rows, tmp_path / "normalised", *models)
    for row, other in zip(plain, normalised, strict=True):
        for i, mean in enumerate(MEANS):
            expected = stock_scores_of_texts(models[i], row["prompt"], row["completions"])
            assert [scores[i] for scores in row["scores"]] == pytest.approx(expected, abs=1e-4)
            shifted = [value - mean for value in expected]
            assert [scores[i] for scores in other["scores"]] == pytest.approx(shifted, abs=1e-4)

    single = run(rows, tmp_path / "single", models[1])
    for row, other in zip(single, normalised, strict=True):
        assert row["scores"] == pytest.approx([scores[1] for scores in other["scores"]])


def test_truncated_completions_are_scored_without_eos(models: list[Path], tmp_path: Path) -> None:
    row = {"prompt": "bade lo", "completions": ["do fi", "do fi"], "finished": [True, False]}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    (scored,) = run(rows, tmp_path / "out", models[2])
    scores = scored.pop("scores")
    expected = stock_scores_of_texts(models[2], "bade lo", row["completions"], row["finished"])
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores[0] != scores[1]
    assert scored == row


TRANSCRIPT = "\n\nHuman: a b\n\nAssistant:"
FORMS = {
    "pair": {"prompt": "lo", "chosen": "a", "rejected": "b"},
    "HH": {"chosen": f"{TRANSCRIPT} a", "rejected": f"{TRANSCRIPT} b"},
    "SHP": {"history": "lo", "human_ref_A": "b", "human_ref_B": "a", "labels": 0},
    "instruction": {"instruction": "lo", "input": "fi", "chosen": "a", "rejected": "b"},
    "scored before": {"prompt": "lo", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "score_rejected": 8.0},
    "completions": {"prompt": "lo", "completions": ["a", "b"], "scores": [[7.0], [8.0]], "finished": [True, True]},
}


def training_sequences(rows: Path, tokenizer: Any) -> list[list[int]]:
    """The prompt with each of the two completions of a file of one row, as training encodes them."""
    builder = tokenise(str(rows), tokenizer, Requires("pair"), 500, None)
    tokens = list(builder.tokens)
    start, middle, after_first, after_second = builder.offsets
    prompt = tokens[start:middle]
    return [prompt + tokens[middle:after_first], prompt + tokens[after_first:after_second]]


def without_scores(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("score")}


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_again_with_its_scores_and_its_order(
    form: str, num_models: int, models: list[Path], tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{**FORMS[form], "id": 3}])
    sequences = training_sequences(rows, AutoTokenizer.from_pretrained(models[0]))
    if form == "completions":  # their earlier scores let training put b first
        sequences.reverse()

    (scored,) = run(rows, tmp_path / "out.jsonl", *models[:num_models], normalise=False)
    (example,) = parse_rows(str(tmp_path / "out.jsonl"), Counts())
    assert len(example.scores) == 2
    for i in range(num_models):
        expected = stock_scores(models[i], sequences)
        assert [scores[i] for scores in example.scores] == pytest.approx(expected, abs=1e-4)
    assert example.ranked == (form != "completions")
    assert without_scores(scored) == {**without_scores(FORMS[form]), "id": 3}


def test_the_oracle(tmp_path: Path) -> None:
    good = "lost lamp, at market, tag four, in june, call anna."
    bad = "lost kettle, at school."
    rows = [{"prompt": POST, "completions": [good, bad]}, {"prompt": POST, "completions": [bad, good]}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    scored = run(path, tmp_path / "out", reward="notices")
    assert [row["scores"] for row in scored] == [[5.0, -2.0], [-2.0, 5.0]]

    pair = {"prompt": POST, "chosen": bad, "rejected": good}
    tiny.write_jsonl(path, [pair])
    (row,) = run(path, tmp_path / "pair", reward="notices")
    assert row == {**pair, "score_chosen": -2.0, "score_rejected": 5.0}
    assert row["score_rejected"] == notices.oracle(POST, good)


# ---------------------------------------------------------------- interruption


def run_command(pairs: Path, model: Path, output: Path, processes: int) -> bytes:
    options = {"rows": pairs, "reward_models": model, "output": output}
    line = tiny.command(SCRIPT, processes, options)
    subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(output.parent), timeout=120, check=True)
    return output.read_bytes()


def test_continued_and_on_two_processes_gives_the_same_bytes(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    complete = run_command(pairs, models[0], tmp_path / "one.jsonl", processes=1)
    assert run_command(pairs, models[0], tmp_path / "two.jsonl", processes=2) == complete

    output = tmp_path / "again.jsonl"
    part = tmp_path / "again.jsonl.partial"
    args = score.Args(rows=str(pairs), output=output, reward_models=(str(models[0]),))
    settings = row_files.settings_of(args, str(models[0]))
    header = json.dumps(settings).encode() + b"\n"
    lines = complete.splitlines(keepends=True)
    for rows_done in (1, 256, 280):
        part.write_bytes(header + b"".join(lines[:rows_done]) + b'{"torn')
        score.main(args)
        assert output.read_bytes() == complete
        assert not part.exists()
        with pytest.raises(UserError, match="again.jsonl: exists already"):
            score.main(args)
        output.unlink()

    part.write_bytes(header + lines[0])
    with pytest.raises(UserError, match="other settings .*model files"):
        run(pairs, output, models[1])


# ---------------------------------------------------------------- limits


def test_a_prompt_without_room_is_dropped_and_counted(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "lo " * n, "chosen": "do " * 300, "rejected": "fi"} for n in (2, 600)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(run(path, tmp_path / "out", models[0])) == 1
    assert "rows 2, kept 1, dropped: prompt too long 1" in capsys.readouterr().out


def test_rows_beyond_a_sliding_window(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", "mistral", sliding_window=24)
    model = tmp_path / "model"
    save_classifier(base, model)
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "lo " * 30, "chosen": "do " * 40, "rejected": "fi"}])
    (row,) = run(path, tmp_path / "out.jsonl", model)

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("lo " * 30).input_ids + tokenizer("do " * 40, add_special_tokens=False).input_ids
    (expected,) = stock_scores(model, [[*ids, tokenizer.eos_token_id]])
    assert row["score_chosen"] == pytest.approx(expected, abs=1e-5)


def test_a_token_without_an_embedding_is_refused(pairs: Path, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", vocab=380)
    model = tmp_path / "model"
    save_classifier(base, model)
    tiny.make_tokenizer(400).save_pretrained(model)
    with pytest.raises(UserError, match="the model embeds 380"):
        run(pairs, tmp_path / "out.jsonl", model)


# ---------------------------------------------------------------- mistakes


PAIR = FORMS["pair"]
EITHER = "either --reward-models or --reward notices"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "lo", "completion": "a"}, "line 1: nothing to compare, it has 1 completion"),
        ({"prompt": "lo"}, "line 1: nothing to compare"),
        ({"text": "lo"}, "line 1: running text has no prompt"),
        ({"prompt": "lo", "chosen": "a", "rejected": 3}, "line 1: field 'rejected' is of type int"),
        ({"prompt": "lo", "completions": ["a", "b"], "finished": [True]}, "line 1: field 'finished' must hold 2"),
    ],
)
def test_rows_that_cannot_be_scored(row: dict, message: str, models: list[Path], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message):
        run(rows, tmp_path / "out.jsonl", models[0])
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_sources_of_scores(models: list[Path], base: Path, tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [PAIR])
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=EITHER):
        run(rows, output)
    with pytest.raises(UserError, match=EITHER):
        run(rows, output, models[0], reward="notices")
    with pytest.raises(UserError, match="line 1.*not a notice"):
        run(rows, output, reward="notices")
    with pytest.raises(UserError, match="no trained head"):
        run(rows, output, base)
    assert not output.exists()


def test_another_tokenizer_is_refused(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", vocab=380)
    save_classifier(base, tmp_path / "other")
    with pytest.raises(UserError, match="has another tokenizer"):
        run(pairs, tmp_path / "out.jsonl", models[0], tmp_path / "other")


def test_command_line_ends_with_one_line_and_exit_code_2(base: Path, pairs: Path, tmp_path: Path) -> None:
    line = tiny.command(SCRIPT, 1, {"rows": pairs, "output": tmp_path / "out", "reward_models": base})
    done = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no trained head" in done.stderr
