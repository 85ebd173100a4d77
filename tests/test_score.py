"""Scores against stock transformers one completion at a time, what every form gets, interruption, mistakes."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import notices
import pytest
import score
import torch
import worlds
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared import UserError
from shared.data import Needs, tokenise
from shared.rows import parse

SCRIPT = "scripts/score.py"
POST = "we lost a lamp. it was at the market in june. the tag says four. please call anna. summary:"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reward models with stored means, and a language model, which is none."""
    folder = tmp_path_factory.mktemp("models")
    base, found = worlds.make_model(folder / "base", initializer_range=0.1), []
    tokenizer = AutoTokenizer.from_pretrained(base)
    for seed, mean in enumerate((0.5, -2.0, 0.0)):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=2)
        model.config.reward_mean = mean
        model.save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
        found.append(folder / str(seed))
    return [*found, base]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    worlds.make_rows(300, seed=4, path=path)
    return path


def run(rows: Path, output: Path, *models: Path, **options: object) -> list[dict]:
    paths = tuple(map(str, models))
    score.main(score.Args(rows=str(rows), output=output, reward_models=paths, **options))
    return worlds.read_jsonl(output)


def stock(path: Path, prompt: str, completions: list[str], finished: list[bool] | None = None) -> list[float]:
    """The logits of transformers' own classifier, one completion at a time, without padding."""
    tokenizer, found = AutoTokenizer.from_pretrained(path), []
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for completion, end in zip(completions, finished or [True] * len(completions), strict=True):
        ids = tokenizer(prompt).input_ids + tokenizer(completion, add_special_tokens=False).input_ids
        with torch.no_grad():
            found.append(model(torch.tensor([ids + [tokenizer.eos_token_id] * end])).logits.item())
    return found


def test_scores_equal_stock_transformers(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    rows = worlds.read_jsonl(pairs)
    scored = run(pairs, tmp_path / "out.jsonl", models[0], normalise=False)
    assert [{name: row[name] for name in rows[0]} for row in scored] == rows
    for row in scored[:20] + scored[-20:]:
        expected = stock(models[0], row["prompt"], [row["chosen"], row["rejected"]])
        assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(expected, abs=1e-4)


def test_several_models_and_their_means(models: list[Path], tmp_path: Path) -> None:
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", worlds.make_rows(12, seed=6, k=3))
    plain = run(rows, tmp_path / "plain", *models[:3], normalise=False)
    normal = run(rows, tmp_path / "normal", *models[:3])
    for row, other in zip(plain, normal, strict=True):
        expected = [stock(path, row["prompt"], row["completions"]) for path in models[:3]]
        for i, mean in enumerate((0.5, -2.0, 0.0)):
            assert [scores[i] for scores in row["scores"]] == pytest.approx(expected[i], abs=1e-4)
            shifted = [value - mean for value in expected[i]]
            assert [scores[i] for scores in other["scores"]] == pytest.approx(shifted, abs=1e-4)
    single = run(rows, tmp_path / "single", models[1])
    assert [row["scores"] for row in single] == [pytest.approx([s[1] for s in row["scores"]]) for row in normal]


def test_completions_that_were_cut_off_are_scored_without_eos(models: list[Path], tmp_path: Path) -> None:
    row = {"prompt": "bade lo", "completions": ["do fi", "do fi"], "finished": [True, False]}
    (scored,) = run(worlds.write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "out", models[2])
    assert scored["scores"] == pytest.approx(stock(models[2], "bade lo", row["completions"], [True, False]), abs=1e-4)
    assert scored["scores"][0] != scored["scores"][1] and scored | row == scored


HH = "\n\nHuman: a b\n\nAssistant:"
FORMS = {
    "pair": {"prompt": "lo", "chosen": "a", "rejected": "b"},
    "HH": {"chosen": HH + " a", "rejected": HH + " b"},
    "SHP": {"history": "lo", "human_ref_A": "b", "human_ref_B": "a", "labels": 0},
    "instruction": {"instruction": "lo", "input": "fi", "chosen": "a", "rejected": "b"},
    "scored before": {"prompt": "lo", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "score_rejected": 8.0},
    "completions": {"prompt": "lo", "completions": ["a", "b"], "scores": [[7.0], [8.0]], "finished": [True, True]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_again_with_its_scores_and_its_order(form: str, models: list[Path], tmp_path: Path) -> None:
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [FORMS[form] | {"id": 3}])
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    build = tokenise(str(rows), tokenizer, Needs(completions=2), 500, None)
    ids = list(build.tokens)
    start, *ends = build.offsets
    expected = []
    for path in models[:2]:
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        groups = [ids[start : ends[0]] + ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        with torch.no_grad():
            expected.append([model(torch.tensor([group])).logits.item() for group in groups])
    if form == "completions":  # its earlier scores put b first
        expected = [values[::-1] for values in expected]
    for m in (1, 2):
        scored = run(rows, tmp_path / f"{m}.jsonl", *models[:m], normalise=False)
        (example,) = parse(str(tmp_path / f"{m}.jsonl"), Counter())
        for i in range(m):
            assert [scores[i] for scores in example.scores] == pytest.approx(expected[i], abs=1e-4)
        assert len(example.scores) == 2 and example.ordered == (form != "completions")
        names = ("scores", "score_chosen", "score_rejected")
        kept, original = ({k: v for k, v in row.items() if k not in names} for row in (scored[0], FORMS[form]))
        assert kept == original | {"id": 3}


def test_the_oracle(tmp_path: Path) -> None:
    texts = ["lost lamp, at market, tag four, in june, call anna.", "lost kettle, at school."]
    rows = [{"prompt": POST, "completions": texts}, {"prompt": POST, "completions": texts[::-1]}]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["scores"] for row in run(path, tmp_path / "out", reward="notices")] == [[5.0, -2.0], [-2.0, 5.0]]
    pair = {"prompt": POST, "chosen": texts[1], "rejected": texts[0]}
    (scored,) = run(worlds.write_jsonl(path, [pair]), tmp_path / "pair", reward="notices")
    assert scored == pair | {"score_chosen": -2.0, "score_rejected": 5.0}
    assert scored["score_rejected"] == notices.oracle(POST, texts[0])


def test_continued_and_on_two_processes_gives_the_same_bytes(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    options = {"rows": pairs, "reward_models": models[0]}
    for name, processes in (("whole", 1), ("two", 2)):
        line = worlds.command(SCRIPT, processes, {**options, "output": tmp_path / f"{name}.jsonl"})
        done = subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), timeout=120)
        assert done.returncode == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    output, part = tmp_path / "again.jsonl", tmp_path / "again.jsonl.partial"
    args = score.Args(rows=str(pairs), output=output, reward_models=(str(models[0]),))
    header = json.dumps(score.streaming.settings(args, str(models[0]))).encode() + b"\n"
    for rows in (1, 256, 280):
        part.write_bytes(header + b"".join(whole.splitlines(keepends=True)[:rows]) + b'{"torn')
        score.main(args)
        assert output.read_bytes() == whole and not part.exists()
    part.write_bytes(header + whole.splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="other settings .*model files"):
        run(pairs, output, models[1])


def test_a_prompt_without_room_is_dropped_and_counted(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": "lo " * n, "chosen": "do " * 300, "rejected": "fi"} for n in (2, 600)]
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(run(rows, tmp_path / "out", models[0])) == 1
    assert "rows 2, kept 1, dropped: prompt too long 1" in capsys.readouterr().out


def test_a_model_that_packed_rows_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A window shorter than a row, which packed rows would not have, is where rows end; a token needs an embedding."""
    rows = [{"prompt": "lo " * n, "chosen": "do " * 40, "rejected": "fi"} for n in (2, 30)]
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", rows)
    for name, architecture, options in (
        ("window", "mistral", {"sliding_window": 24}),
        ("few", "llama", {"vocab": 380}),
    ):
        base = worlds.make_model(tmp_path / "base", architecture, **options)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=2)
        model.save_pretrained(tmp_path / name)
        worlds.make_tokenizer().save_pretrained(tmp_path / name)
    (row,) = run(rows, tmp_path / "out.jsonl", tmp_path / "window")
    assert "rows 2, kept 1, dropped: prompt too long 1" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "window")
    ids = tokenizer("lo " * 2).input_ids + tokenizer("do " * 40, add_special_tokens=False).input_ids
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "window").eval()
    assert row["score_chosen"] == pytest.approx(model(torch.tensor([ids[:24]])).logits.item(), abs=1e-5)
    pairs = worlds.make_rows(20, seed=4, path=tmp_path / "pairs.jsonl") and tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match="the model embeds 380"):
        run(pairs, tmp_path / "out.jsonl", tmp_path / "few")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "lo", "chosen": "a", "rejected": "b"}, {"models": [3]}, "no trained head"),
        ({"prompt": "lo", "chosen": "a", "rejected": "b"}, {"models": []}, "either --reward-models or --reward"),
        ({"prompt": "lo", "chosen": "a", "rejected": "b"}, {"reward": "notices"}, "either --reward-models or"),
        ({"prompt": "lo", "chosen": "a", "rejected": "b"}, {"models": [], "reward": "notices"}, "line 1.*not a notice"),
        ({"prompt": "lo", "completion": "a"}, {}, "line 1: nothing to compare, it has 1 completion"),
        ({"prompt": "lo"}, {}, "line 1: nothing to compare"),
        ({"text": "lo"}, {}, "line 1: running text has no prompt"),
        ({"prompt": "lo", "chosen": "a", "rejected": 3}, {}, "line 1: field 'rejected' is of type int"),
        ({"prompt": "lo", "completions": ["a", "b"], "finished": [True]}, {}, "line 1: field 'finished' must hold 2"),
    ],
)
def test_mistakes(row: dict, options: dict, message: str, models: list[Path], tmp_path: Path) -> None:
    rows, options = worlds.write_jsonl(tmp_path / "rows.jsonl", [row]), dict(options)
    chosen = [models[i] for i in options.pop("models", [0])]
    with pytest.raises(UserError, match=message):
        run(rows, tmp_path / "out.jsonl", *chosen, **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_tokenizers_and_command_line(models: list[Path], pairs: Path, tmp_path: Path) -> None:
    base = worlds.make_model(tmp_path / "base", vocab=380)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has another tokenizer"):
        run(pairs, tmp_path / "out.jsonl", models[0], tmp_path / "other")
    line = worlds.command(SCRIPT, 1, {"rows": pairs, "output": tmp_path / "out", "reward_models": models[3]})
    done = subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "no trained head" in done.stderr
    assert done.stderr.count("\n") == 1
