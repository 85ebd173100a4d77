"""The siblings of dpo against the float64 loop: scores, samples of π_ref, ensembles, reward models."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reference
import tiny
import torch
from test_exactness import BATCH, OPTIONS, PAIR_METRICS, STEPS, compare, compare_models, train_reference
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BETA, GAMMA_START, GAMMA_END = 0.1, 0.02, 0.3  # large enough that another schedule of γ shows at every step
ENSEMBLE_GAMMA_START, ENSEMBLE_GAMMA_END = 0.0005, 0.005  # small enough that γ Ω does not hide the minimum
ENSEMBLE_SEED = 30
REWARD_METRICS = (*PAIR_METRICS[:3], "rewards/accuracies")
ALL_METRICS = (*PAIR_METRICS, "rewards/accuracies")
TOKEN_METRICS = [f"{name}/{side}" for name in ("token_rewards", "negative_tokens") for side in ("chosen", "rejected")]
ROWS = STEPS * BATCH


def with_scores(rows: list[dict], seed: int) -> list[dict]:
    """`score_chosen`, `score_rejected`: in a third of the rows the rejected completion has the higher score."""
    rng = random.Random(seed)
    return [{**row, "score_chosen": rng.gauss(0.5, 1), "score_rejected": rng.gauss(0, 1)} for row in rows]


def with_samples(rows: list[dict], seed: int) -> list[dict]:
    """Two `reference_samples` of different lengths; the second is cut off in two rows of three."""
    rng, found = random.Random(seed), []
    for i, row in enumerate(rows):
        samples = [tiny.text(rng, rng.randint(1, 20)) for _ in range(2)]
        found.append({**row, "reference_samples": samples, "reference_samples_finished": [True, i % 3 == 0]})
    return found


def listed(rows: list[dict], seed: int, models: int = 1) -> list[dict]:
    """`completions` in any order with `scores`: numbers, or one list per completion of R reward models' numbers."""
    rng, found = random.Random(seed), []
    for row in rows:
        completions = row.get("completions") or [row["chosen"], row["rejected"]]
        scores = [[rng.gauss(0, 1) for _ in range(models)] for _ in completions]
        flat = [score[0] for score in scores]
        found.append({"prompt": row["prompt"], "completions": completions, "scores": flat if models == 1 else scores})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with all that a form may carry, and a tiny Llama."""
    path = tmp_path_factory.mktemp("family")
    pairs, fours = tiny.make_rows(ROWS, seed=12, k=2), tiny.make_rows(ROWS, seed=14, k=4)
    tiny.write_jsonl(path / "pairs.jsonl", pairs)
    tiny.write_jsonl(path / "scored.jsonl", with_scores(pairs, 1))
    tiny.write_jsonl(path / "samples.jsonl", with_samples(with_scores(pairs, 1), 2))
    tiny.write_jsonl(path / "fours.jsonl", listed(fours, 3))
    ensemble = listed(pairs, ENSEMBLE_SEED, models=3)
    tiny.write_jsonl(path / "ensemble.jsonl", ensemble)
    tiny.write_jsonl(path / "ensemble_samples.jsonl", with_samples(ensemble, 2))
    tiny.make_model(path / "llama", "llama", seed=3)
    return path


def check(
    folder: Path,
    algorithm: str,
    data: str,
    loss: reference.Loss,
    output_dir: Path,
    keys: tuple[str, ...] = ALL_METRICS,
    **options: object,
) -> list[dict]:
    """One run against the float64 loop: metrics of each step and the model at the end."""
    rows, model = tiny.read_jsonl(folder / data), folder / "llama"
    options = {**OPTIONS, **options}
    lines = tiny.run(f"algos/{algorithm}.py", output_dir, model=model, train_data=folder / data, **options)
    expected, trained = train_reference(model, rows, loss)
    compare(lines, expected, keys)
    compare_models(output_dir, trained, rows)
    return lines


def at_reference(lines: list[dict]) -> None:
    """Training starts at π_ref: every reward is 0 at step one, and not after."""
    assert lines[0]["rewards/margins"] == lines[0]["rewards/accuracies"] == 0 != lines[1]["rewards/margins"]


def test_ipo(folder: Path, tmp_path: Path) -> None:
    lines = check(folder, "ipo", "pairs.jsonl", reference.ipo(0.2), tmp_path / "out", tau=0.2)
    at_reference(lines)
    assert lines[0]["loss"] == pytest.approx(1 / (4 * 0.2**2), rel=1e-6)


def test_token_dpo_beam(folder: Path, tmp_path: Path) -> None:
    """What is logged of the tokens, too; nothing is decoded without held-out rows."""
    keys, options = (*ALL_METRICS, *TOKEN_METRICS), dict(beta=BETA, max_new_tokens=4)
    lines = check(folder, "token_dpo_beam", "pairs.jsonl", reference.token_dpo(BETA), tmp_path / "out", keys, **options)
    at_reference(lines)
    assert all(lines[0][key] == 0 != lines[1][key] for key in TOKEN_METRICS)
    assert not (tmp_path / "out" / "beams.jsonl").exists()


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_exo_pairs(folder: Path, tmp_path: Path, kl: str) -> None:
    """Scores in the rows do not matter without --beta-r."""
    options = dict(beta=BETA, epsilon=0.02, kl=kl)
    at_reference(check(folder, "exo", "scored.jsonl", reference.exo(**options), tmp_path / "out", **options))


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_exo_rewards(folder: Path, tmp_path: Path, kl: str) -> None:
    options = dict(beta=BETA, beta_r=0.7, kl=kl)
    loss = reference.exo(epsilon=0.0, **options)
    at_reference(check(folder, "exo", "fours.jsonl", loss, tmp_path / "out", **options))


@pytest.mark.parametrize("length_normalise", [False, True])
def test_typo(folder: Path, tmp_path: Path, length_normalise: bool) -> None:
    """The reward is log π; where the loss divides by length, what is logged does not."""
    options = dict(lam=0.3, length_normalise=length_normalise)
    check(folder, "typo", "samples.jsonl", reference.typo(**options), tmp_path / "out", ALL_METRICS, **options)


def test_distill_dpo(folder: Path, tmp_path: Path) -> None:
    """Rows of chosen and rejected keep their order where the scores say otherwise."""
    rows = tiny.read_jsonl(folder / "scored.jsonl")
    gaps = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert min(gaps[:BATCH]) < 0 < max(gaps[:BATCH])
    lines = check(folder, "distill_dpo", "scored.jsonl", reference.distill_dpo(BETA), tmp_path / "out", beta=BETA)
    at_reference(lines)
    assert lines[0]["loss"] == pytest.approx(reference.mean(gap**2 for gap in gaps[:BATCH]), rel=2e-6)


@pytest.mark.parametrize("base", ["dpo", "distill"])
@pytest.mark.parametrize("data", ["scored.jsonl", "samples.jsonl"])
def test_pessimistic_dpo(folder: Path, tmp_path: Path, base: str, data: str) -> None:
    """Ω over the pair, or over samples of π_ref where the rows have them."""
    loss = reference.pessimistic_dpo(BETA, base, STEPS, GAMMA_START, GAMMA_END)
    options = dict(beta=BETA, base=base, gamma_start=GAMMA_START, gamma_end=GAMMA_END)
    at_reference(check(folder, "pessimistic_dpo", data, loss, tmp_path / "out", **options))


# ---------------------------------------------------------------- the minimum over reward models


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut a list into parts."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


@pytest.mark.parametrize("name", ["ensemble.jsonl", "ensemble_samples.jsonl"])
def test_ensemble_dpo(folder: Path, tmp_path: Path, name: str) -> None:
    """The least mean of the whole batch, over several micro-batches.

    The data must tell it from minima of smaller parts: however a batch is cut, at some step the parts' own minima
    add up to a loss that differs by over 10%; and each step has another least reward model.
    """
    seen: list[torch.Tensor] = []
    loss = reference.ensemble_dpo(BETA, STEPS, ENSEMBLE_GAMMA_START, ENSEMBLE_GAMMA_END, seen)
    rows, model, data = tiny.read_jsonl(folder / name), folder / "llama", folder / name
    expected, trained = train_reference(model, rows, loss)
    assert len({int(losses.mean(0).argmin()) for losses in seen}) == STEPS
    for parts in partitions(list(range(BATCH))):
        if len(parts) == 1:
            continue
        wholes = [float(losses.mean(0).min()) for losses in seen]
        cut = [float(sum(losses[part].sum(0).min() for part in parts)) / BATCH for losses in seen]
        gaps = [(a - b) / abs(line["loss"]) for a, b, line in zip(wholes, cut, expected, strict=True)]
        assert max(gaps) > 0.1, parts

    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = [reference.encode(tokenizer, row) for row in rows]
    sizes = [len(group.prompt) + sum(map(len, group.completions + group.samples)) for group in groups]
    budget = max(sizes)
    assert all(sum(sizes[i : i + BATCH]) > budget for i in range(0, ROWS, BATCH)), "one micro-batch holds a step"
    held_out = with_samples(listed(tiny.make_rows(2 * BATCH, seed=31, k=2), 32, models=3), 33)
    options = dict(beta=BETA, gamma_start=ENSEMBLE_GAMMA_START, gamma_end=ENSEMBLE_GAMMA_END, eval_every=STEPS)
    if "samples" in name:
        options["eval_data"] = tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out)
    options = {**OPTIONS, **options, "micro_batch_tokens": budget}
    lines = tiny.run("algos/ensemble_dpo.py", tmp_path / "out", model=model, train_data=data, **options)
    compare(lines, expected, ALL_METRICS)
    compare_models(tmp_path / "out", trained, rows)
    at_reference(lines)
    if "eval_data" in options:  # the least over all held-out rows, in however many batches they come
        wanted = reference.evaluate(model, model, trained, held_out, loss, STEPS)
        halves = [seen[-1][i : i + BATCH].mean(0) for i in (0, BATCH)]
        assert float(sum(half.min() for half in halves)) / 2 < 0.95 * float(seen[-1].mean(0).min())
        (line,) = [line for line in tiny.read_jsonl(tmp_path / "out" / "metrics.jsonl") if "eval/loss" in line]
        for key in ("loss", *ALL_METRICS):
            assert line[f"eval/{key}"] == pytest.approx(wanted[key], rel=1e-4, abs=1e-3), key


# ---------------------------------------------------------------- reward models


def make_reward_model(directory: Path, architecture: str, chat: bool = False) -> Path:
    """A language model's body with a known head, saved as a sequence classifier by transformers."""
    tiny.make_model(directory, architecture, seed=3, bos=architecture != "gpt2", chat=chat)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    model.score.weight.data = 0.3 * torch.randn(model.score.weight.shape, generator=generator)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pad_with(directory: Path, change: Callable[[object], None]) -> None:
    """Change a saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    change(tokenizer)
    tokenizer.save_pretrained(directory)


def rewards_of(output_dir: Path, groups: list[reference.Group], side: str | None) -> list[float]:
    """Rewards by the stock class: one by one, or in one batch padded on one side with the tokenizer's pad token."""
    model = AutoModelForSequenceClassification.from_pretrained(output_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert model.config.num_labels == 1
    assert tokenizer.pad_token_id == model.config.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = [group.prompt + completion for group in groups for completion in group.completions]
    with torch.no_grad():
        if side is None:
            return [float(model(input_ids=torch.tensor([each])).logits[0, 0]) for each in ids]
        padded = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        mask = padded["attention_mask"]
        assert mask.sum() < mask.numel() and bool((padded["input_ids"][mask == 0] == tokenizer.pad_token_id).all())
        # learned positions count from the first token that is not padding
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return model(**padded, position_ids=positions).logits[:, 0].tolist()


def drop_pad(tokenizer) -> None:  # noqa: ANN001
    """No pad token, as in the original Llama; another special token is there to take its place."""
    tokenizer.pad_token = None


def pad_is_eos(tokenizer) -> None:  # noqa: ANN001
    """As in many fine-tuned models."""
    tokenizer.pad_token = tokenizer.eos_token


@pytest.mark.parametrize(
    "architecture,data,tokenizer",
    [("llama", "pairs.jsonl", None), ("llama", "fours.jsonl", drop_pad), ("gpt2", "pairs.jsonl", pad_is_eos)],
)
def test_rm(folder: Path, tmp_path: Path, architecture: str, data: str, tokenizer: Callable | None) -> None:
    """Losses, and the model that comes out: the same rewards however padded, and their mean in its configuration.

    Rewards are what the loop's are, for GPT-2 up to a shift. The rows are more than the steps use, and the mean is
    over those that they use.
    """
    model = make_reward_model(tmp_path / "start", architecture, chat=architecture == "gpt2")
    if tokenizer is not None:
        pad_with(model, tokenizer)
    rows, out = tiny.read_jsonl(folder / data), tmp_path / "out"
    extra = tiny.make_rows(3, seed=15, k=4 if "fours" in data else 2)
    rows += listed(extra, 5) if "fours" in data else extra
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = tiny.run("algos/rm.py", out, model=model, train_data=tmp_path / "rows.jsonl", **OPTIONS)
    expected, trained = train_reference(model, rows, reference.rm(), rewards=True)
    compare(lines, expected, REWARD_METRICS if architecture == "llama" else ("rewards/margins", "rewards/accuracies"))
    assert lines[0]["rewards/margins"] != 0

    start = AutoTokenizer.from_pretrained(model)
    groups = [reference.encode(start, row) for row in rows]
    with torch.no_grad():
        wanted = [float(reference.reward(trained, g.prompt, c)) for g in groups for c in g.completions]
    assert max(wanted) - min(wanted) > 0.1
    alone = rewards_of(out, groups, None)
    assert alone == pytest.approx(wanted, abs=1e-3) or architecture == "gpt2"
    # GPT-2's last norm has a bias, on which the loss does not depend: AdamW makes steps of its gradient's rounding
    centred = [[reward - reference.mean(rewards) for reward in rewards] for rewards in (alone, wanted)]
    assert centred[0] == pytest.approx(centred[1], abs=1e-3)
    for side in ("left", "right"):
        assert rewards_of(out, groups, side) == pytest.approx(alone, abs=1e-4), side
    saved = AutoModelForSequenceClassification.from_pretrained(out)
    assert saved.config.reward_mean == pytest.approx(reference.mean(alone), abs=1e-4)


def test_rm_refuses_a_tokenizer_whose_only_special_token_is_eos(folder: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line: padding could not be told from the end."""
    model, out = tiny.make_model(tmp_path / "start", "gpt2", bos=False), tmp_path / "out"
    process = tiny.start("algos/rm.py", out, model=model, train_data=folder / "pairs.jsonl", **OPTIONS)
    assert process.wait(timeout=120) == 2
    log = Path(f"{out}.log").read_text(encoding="utf-8")
    (line,) = [line for line in log.splitlines() if line.startswith("rm.py:")]
    assert "pad token" in line and "Traceback" not in log
    assert not (out / "model.safetensors").exists()
