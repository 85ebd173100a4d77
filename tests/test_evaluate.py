"""Evaluation and report against independent expectations: hand-made scores, stock transformers, hostile text."""

import json
import math
import re
import subprocess
from pathlib import Path

import evaluate
import notices
import pytest
import report
import torch
import worlds

from shared import UserError
from shared.run import check_arguments

EOS = 1  # its id in the tokenizer of `worlds`
PROMPT = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"


def make_args(**values: object) -> evaluate.Args:
    defaults = dict(policies=(), rows=Path(), output=Path(), num_samples=3, max_new_tokens=60, batch_size=8)
    return evaluate.Args(**{**defaults, **values})


# ---------------------------------------------------------------- statistics


def test_win_rate_counts_all_pairs_and_ties_half() -> None:
    rewards, baseline = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [4.0, 5.0]]),
    )
    # pairs by hand: 1-1 tie, 1-0, 2-1, 2-0 won; four ties; all lost
    assert evaluate.win_rates(rewards, baseline).tolist() == [3.5 / 4, 0.5, 0.0]


def test_a_policy_wins_half_of_the_pairs_against_itself() -> None:
    rewards = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert evaluate.win_rates(rewards, rewards).tolist() == [0.5] * 50


def test_bootstrap_equals_the_normal_interval_of_a_large_sample() -> None:
    values = torch.randn(4_000, generator=torch.Generator().manual_seed(1), dtype=torch.double) * 3 + 2
    half = 1.959964 * float(values.std()) / math.sqrt(len(values))
    low, high = evaluate.bootstrap(values, seed=0)
    mean = float(values.mean())
    # the quantiles of 2,000 resamples have a standard error of about 6% of a half width
    assert (low - mean) / -half == pytest.approx(1, abs=0.15)
    assert (high - mean) / half == pytest.approx(1, abs=0.15)


def test_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(200):
        values = torch.rand(100, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        low, high = evaluate.bootstrap(values, seed)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198


def test_bootstrap_is_seeded_and_has_no_width_without_spread() -> None:
    values = torch.arange(20.0)
    assert evaluate.bootstrap(values, 3) == evaluate.bootstrap(values, 3) != evaluate.bootstrap(values, 4)
    assert evaluate.bootstrap(torch.full((9,), 2.5), 0) == (2.5, 2.5)


def test_intervals_resample_prompts_not_completions() -> None:
    """Completions that agree within a prompt carry no more information than one of them."""
    one = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    samples = evaluate.Samples([[[1]] * 5] * 40, [[""] * 5] * 40, [[True] * 5] * 40)
    same = evaluate.summarise(one.expand(40, 5), one, one.expand(40, 5), samples, seed=0)
    assert same["reward"]["interval"] == pytest.approx(evaluate.bootstrap(one[:, 0], 0))
    assert same["length"] == {"mean": 1.0, "interval": (1.0, 1.0)} and same["finished"] == 1.0


# ---------------------------------------------------------------- KL


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("policies")
    return [str(worlds.make_model(folder / str(seed), seed=seed, initializer_range=0.1)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def drawn(policies: list[str]) -> tuple[list, list[evaluate.Samples], list[torch.Tensor]]:
    prompts = [row["prompt"] for row in worlds.make_rows(7, seed=5, k=1)]
    encoded, samples = zip(*(evaluate.draw(path, prompts, make_args()) for path in policies), strict=True)
    for sample in samples:
        sample.ids[0][0], sample.finished[0][0] = [9, EOS], True  # an EOS that is certainly there
    ratios = evaluate.log_ratios(policies, policies[0], list(encoded), list(samples))
    return list(encoded), list(samples), ratios


def stock_logps(path: str, prompt: list[int], completion: list[int]) -> float:
    """log π(y|x) by transformers' own forward pass, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[torch.arange(len(completion)), completion].sum())


def test_kl_of_a_policy_to_itself_is_exactly_zero(drawn: tuple) -> None:
    assert drawn[2][0].tolist() == [[0.0] * 3] * 7


def test_log_ratios_equal_those_of_stock_transformers(policies: list[str], drawn: tuple) -> None:
    encoded, samples, ratios = drawn
    expected = [
        [stock_logps(policies[1], x, y) - stock_logps(policies[0], x, y) for y in row]
        for x, row in zip(encoded[1], samples[1].ids, strict=True)
    ]
    torch.testing.assert_close(ratios[1], torch.tensor(expected, dtype=torch.double), atol=2e-5, rtol=1e-5)


def test_samples_keep_the_eos_only_where_there_is_one(drawn: tuple) -> None:
    for sample in drawn[1]:
        for row, finished in zip(sample.ids, sample.finished, strict=True):
            assert finished == [ids[-1] == EOS for ids in row]
            assert all(EOS not in ids[:-1] and 1 <= len(ids) <= 60 for ids in row)


# ---------------------------------------------------------------- command line and report


def test_mistakes_end_with_one_line(policies: list[str], tmp_path: Path) -> None:
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "not a notice"}])
    good = worlds.write_jsonl(tmp_path / "good.jsonl", [{"prompt": PROMPT}])
    asked = worlds.write_jsonl(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "why?"}]}])
    text = worlds.write_jsonl(tmp_path / "text.jsonl", [{"text": PROMPT}])
    other = worlds.make_model(tmp_path / "other", vocab=380)
    for values, word in (
        (dict(policies=("sft",)), "NAME=DIR"),
        (dict(policies=("a=x", "a=y")), "NAME=DIR"),
        (dict(policies=("a=x",), num_samples=0), "--num-samples"),
        (dict(policies=("a=x",)), "not a notice"),
        (dict(policies=(f"a={policies[0]}", f"b={other}"), rows=good), "another tokenizer"),
        (dict(policies=(f"a={policies[0]}", "b=x"), rows=good), "x: cannot be loaded"),
        (dict(policies=("a=x",), rows=tmp_path / "none.jsonl"), "none.jsonl"),
        (dict(policies=("a=x",), rows=asked), "no usable row; rows 1, kept 0, dropped: no assistant turn 1"),
        (dict(policies=("a=x",), rows=text), "line 1: running text has no prompt"),
    ):
        args = make_args(**{"rows": rows, "output": tmp_path / "out.json", **values})
        with pytest.raises(UserError, match=re.escape(word)):
            check_arguments(args)
            evaluate.main(args)
    line = worlds.command("scripts/evaluate.py", 1, {"policies": "a=x", "rows": rows, "output": tmp_path / "out.json"})
    done = subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and "not a notice" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_reward_model_scores_what_stock_transformers_scores(policies: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    path, tokenizer = str(tmp_path / "rm"), AutoTokenizer.from_pretrained(policies[0])
    model = AutoModelForSequenceClassification.from_pretrained(policies[0], num_labels=1).eval()
    model.config.reward_mean = 0.25
    for part in (model, tokenizer):
        part.save_pretrained(path)
    prompts, texts, finished = ["bade", "bade lo,"], ["do", "fi sapa"], [True, False]
    found = evaluate.score(path, prompts, texts, finished)
    for value, x, y, end in zip(found, prompts, texts, finished, strict=True):
        ids = tokenizer(x).input_ids + tokenizer(y, add_special_tokens=False).input_ids + [EOS] * end
        with torch.no_grad():
            assert value == pytest.approx(model(torch.tensor([ids])).logits.item() - 0.25, abs=1e-4)


def write_run(folder: Path, texts: list[str]) -> None:
    """The files that the report reads, with few numbers."""
    rewards = [evaluate.score("notices", [PROMPT], [text])[0] for text in texts]
    number = {"mean": 1.0, "interval": [0.5, 1.5]}
    policy = {
        **dict.fromkeys(report.MEASURES, number),
        "rewards": [rewards],
        "completions": [texts],
    }
    settings = {"reference": "a", "num_samples": 2, "num_prompts": 1, "temperature": 1.0}
    results = {"settings": settings, "prompts": [PROMPT], "policies": {"sft": policy, "<b>dpo": policy}}
    (folder / "results.json").write_text(json.dumps(results))
    quickstart = {"commands": [{"command": "python a.py --x '<i>'", "seconds": 1.0}], "seconds": 2.0}
    (folder / "quickstart.json").write_text(json.dumps(quickstart))
    run = {
        "args": {"batch_size": 4, "beta": 0.3},
        "steps": 2,
        "data": {"train": {"rows": 9, "kept": 8}},
        "versions": {"torch": "2"},
        "commit": None,
        "device": "cpu",
    }
    names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    line = dict.fromkeys(names, 0.5)
    for name in ("sft", "dpo"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps(run))
        worlds.write_jsonl(
            folder / name / "metrics.jsonl",
            [{"step": 1, **line}, {"step": 2, **line}, {"step": 2, "eval/loss": 0.4}],
        )


def test_report_escapes_text_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    write_run(tmp_path, ["lost lamp, <script>alert(1)</script> & more.", "lost <b>lamp</b>"])
    report.main(report.Args(run_dir=tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower() and "&lt;" in page and "<b>" not in page and "<i>'" not in page
    assert not re.search(r"https?:|//\w|src=|@import|url\((?!#)", page)
    assert page.count("<svg") == page.count("</svg>") == 10


def test_marks_follow_the_oracle() -> None:
    marked = report.mark_html(PROMPT, "lost guitar, at school, tea is free, in may")
    assert '<span class="wrong">guitar</span>' in marked and '<span class="correct">may</span>' in marked
    assert '<span class="superfluous">tea is free</span>' in marked and marked.count("<span") == 4
    assert notices.oracle(PROMPT, "lost guitar, at school, tea is free, in may") == 0.5


def test_report_without_its_files_ends_with_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(report.Args(run_dir=tmp_path))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "results.json" in error and error.count("\n") == 1
