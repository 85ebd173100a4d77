"""The siblings of dpo against the float64 loop: scores, samples of π_ref, ensembles, reward models."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from exactness import (
    check_first_loss,
    compare_evaluation,
    compare_metrics,
    compare_models,
    compare_run,
    evaluation_lines,
    train_reference,
)
from settings import BATCH, BETA, OPTIONS, PREFERENCE_METRICS, REWARD_METRICS, STEPS, TOKEN_METRICS
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

ROWS = STEPS * BATCH
GAMMAS = {"gamma_start": 0.02, "gamma_end": 0.3}  # large enough that another schedule of γ shows at every step
ENSEMBLE_GAMMAS = {"gamma_start": 0.0005, "gamma_end": 0.005}  # small enough that γ Ω does not hide the minimum


def with_scores(rows: list[dict], seed: int) -> list[dict]:
    """`score_chosen`, `score_rejected`: in a third of the rows the rejected completion has the higher score."""
    rng = random.Random(seed)
    scored = []
    for row in rows:
        score_chosen = rng.gauss(0.5, 1)
        score_rejected = rng.gauss(0, 1)
        scored.append({**row, "score_chosen": score_chosen, "score_rejected": score_rejected})
    return scored


def with_samples(rows: list[dict], seed: int) -> list[dict]:
    """Two `reference_samples` of different lengths; the second is truncated in two rows of three."""
    rng = random.Random(seed)
    sampled = []
    for i, row in enumerate(rows):
        samples = []
        for _ in range(2):
            length = rng.randint(1, 20)
            samples.append(tiny.text(rng, length))
        have_eos = [True, i % 3 == 0]
        sampled.append({**row, "reference_samples": samples, "reference_samples_finished": have_eos})
    return sampled


def with_score_lists(rows: list[dict], seed: int, models: int = 1) -> list[dict]:
    """`completions` in any order with `scores`: numbers, or one list per completion of R reward models' numbers."""
    rng = random.Random(seed)
    scored = []
    for row in rows:
        completions = reference.completions_of(row)
        scores: list[Any] = []
        for _ in completions:
            numbers = [rng.gauss(0, 1) for _ in range(models)]
            scores.append(numbers if models > 1 else numbers[0])
        scored.append({"prompt": row["prompt"], "completions": completions, "scores": scores})
    return scored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with all that a form may carry, and a tiny Llama."""
    path = tmp_path_factory.mktemp("family")
    pairs = tiny.make_rows(ROWS, seed=12, k=2)
    scored = with_scores(pairs, 1)
    ensemble = with_score_lists(pairs, 30, models=3)
    fours = tiny.make_rows(ROWS, seed=14, k=4)
    tiny.write_jsonl(path / "pairs.jsonl", pairs)
    tiny.write_jsonl(path / "scored.jsonl", scored)
    tiny.write_jsonl(path / "samples.jsonl", with_samples(scored, 2))
    tiny.write_jsonl(path / "fours.jsonl", with_score_lists(fours, 3))
    tiny.write_jsonl(path / "ensemble.jsonl", ensemble)
    tiny.write_jsonl(path / "ensemble_samples.jsonl", with_samples(ensemble, 2))
    tiny.make_model(path / "llama", "llama", seed=3)
    return path


Compare = Callable[..., list[dict]]


@pytest.fixture
def compare(folder: Path, tmp_path: Path) -> Compare:
    """Compare a run of an algorithm over one of the files with the float64 loop."""

    def run(algorithm: str, data: str, loss: reference.Loss, **options: object) -> list[dict]:
        script = f"algos/{algorithm}.py"
        return compare_run(script, tmp_path / "out", folder / "llama", folder / data, loss, **options)

    return run


def check_start(lines: list[dict]) -> None:
    """Training starts at π_ref: every reward is 0 at step one, and not after."""
    assert lines[0]["rewards/margins"] == 0
    assert lines[0]["rewards/accuracies"] == 0
    assert lines[1]["rewards/margins"] != 0


def test_ipo(compare: Compare) -> None:
    lines = compare("ipo", "pairs.jsonl", reference.ipo(tau=0.2), tau=0.2)
    check_start(lines)
    check_first_loss(lines, 1 / (4 * 0.2**2))


def test_token_dpo_beam(compare: Compare) -> None:
    """What is logged of the tokens, too."""
    metrics = (*PREFERENCE_METRICS, *TOKEN_METRICS)
    lines = compare("token_dpo_beam", "pairs.jsonl", reference.token_dpo(BETA), metrics=metrics, beta=BETA)
    check_start(lines)
    for name in TOKEN_METRICS:
        assert lines[0][name] == 0
        assert lines[1][name] != 0


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_exo_pairs(compare: Compare, kl: str) -> None:
    """Scores in the rows do not matter without --beta-r."""
    options = {"beta": BETA, "epsilon": 0.02, "kl": kl}
    lines = compare("exo", "scored.jsonl", reference.exo(**options), **options)
    check_start(lines)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_exo_rewards(compare: Compare, kl: str) -> None:
    options = {"beta": BETA, "beta_r": 0.7, "kl": kl}
    loss = reference.exo(epsilon=0.0, **options)
    lines = compare("exo", "fours.jsonl", loss, **options)
    check_start(lines)


@pytest.mark.parametrize("length_normalise", [False, True])
def test_typo(compare: Compare, length_normalise: bool) -> None:
    """The reward is log π; where the loss divides by length, what is logged does not."""
    options = {"lam": 0.3, "length_normalise": length_normalise}
    compare("typo", "samples.jsonl", reference.typo(**options), **options)


def test_typo_without_its_unsupervised_term(compare: Compare) -> None:
    """At λ = 0 the loss is the supervised term alone, which is rm's of log π."""
    compare("typo", "samples.jsonl", reference.rm(), lam=0.0)


def test_distill_dpo(compare: Compare, folder: Path) -> None:
    """Rows of chosen and rejected keep their order where the scores say otherwise."""
    gaps = []
    for row in tiny.read_jsonl(folder / "scored.jsonl")[:BATCH]:
        gaps.append(row["score_chosen"] - row["score_rejected"])
    assert min(gaps) < 0 < max(gaps)

    lines = compare("distill_dpo", "scored.jsonl", reference.distill_dpo(BETA), beta=BETA)
    check_start(lines)
    squares = [gap**2 for gap in gaps]
    check_first_loss(lines, reference.mean(squares), rel=2e-6)


@pytest.mark.parametrize("base", ["dpo", "distill"])
@pytest.mark.parametrize("data", ["scored.jsonl", "samples.jsonl"])
def test_pessimistic_dpo(compare: Compare, base: str, data: str) -> None:
    """Ω over the pair, or over samples of π_ref where the rows have them."""
    loss = reference.pessimistic_dpo(BETA, base, STEPS, *GAMMAS.values())
    lines = compare("pessimistic_dpo", data, loss, beta=BETA, base=base, **GAMMAS)
    check_start(lines)


# ---------------------------------------------------------------- the minimum over reward models


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to split a list into parts."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def check_that_parts_show(losses_of_steps: list[Tensor], expected: list[dict]) -> None:
    """The data tells the minimum of a whole batch from the minima of smaller parts.

    losses_of_steps: (B, R) each. However a batch is split, at some step the parts' own minima add up to a loss that
    differs by over 10%; and each step has another least reward model.
    """
    least_models = {int(losses.mean(0).argmin()) for losses in losses_of_steps}
    assert len(least_models) == STEPS
    for parts in partitions(list(range(BATCH))):
        if len(parts) == 1:
            continue
        gaps = []
        for losses, line in zip(losses_of_steps, expected, strict=True):
            minimum = losses.mean(0).min()
            minima_of_parts = [losses[part].sum(0).min() for part in parts]
            gap = minimum - sum(minima_of_parts) / BATCH
            gaps.append(float(gap) / abs(line["loss"]))
        assert max(gaps) > 0.1, parts


def budget_of_largest(model: Path, rows: list[dict]) -> int:
    """A micro-batch budget that the largest group fills, so that every step has several micro-batches."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = [reference.encode(tokenizer, row).size for row in rows]
    for start in range(0, ROWS, BATCH):
        assert sum(sizes[start : start + BATCH]) > max(sizes), "one micro-batch holds a step"
    return max(sizes)


@pytest.mark.parametrize("data", ["ensemble.jsonl", "ensemble_samples.jsonl"])
def test_ensemble_dpo(folder: Path, tmp_path: Path, data: str) -> None:
    """The least mean of the whole batch, over several micro-batches; at an evaluation that of all held-out rows."""
    model = folder / "llama"
    output_dir = tmp_path / "out"
    rows = tiny.read_jsonl(folder / data)
    losses_of_steps: list[Tensor] = []
    loss = reference.ensemble_dpo(BETA, STEPS, *ENSEMBLE_GAMMAS.values(), losses_of_steps)
    expected, trained = train_reference(model, rows, loss)
    check_that_parts_show(losses_of_steps, expected)

    options = {**OPTIONS, **ENSEMBLE_GAMMAS, "beta": BETA, "micro_batch_tokens": budget_of_largest(model, rows)}
    evaluates = data == "ensemble_samples.jsonl"
    if evaluates:
        held_out = tiny.make_rows(2 * BATCH, seed=31, k=2)
        held_out = with_score_lists(held_out, 32, models=3)
        held_out = with_samples(held_out, 33)
        options["eval_data"] = tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out)
        options["eval_every"] = STEPS
    lines = tiny.run("algos/ensemble_dpo.py", output_dir, model=model, train_data=folder / data, **options)
    compare_metrics(lines, expected, PREFERENCE_METRICS)
    compare_models(output_dir, trained, rows)
    check_start(lines)

    if evaluates:
        evaluation = reference.evaluate(model, model, trained, held_out, loss, STEPS)
        check_that_batches_show(losses_of_steps[-1])
        first, last = evaluation_lines(output_dir)
        assert first["eval/rewards/margins"] == 0
        compare_evaluation(last, evaluation)


def check_that_batches_show(losses: Tensor) -> None:
    """The minimum over all held-out rows (2B, R) is not the mean of the minima of two batches."""
    first, second = losses.split(BATCH)
    mean_of_minima = (first.mean(0).min() + second.mean(0).min()) / 2
    minimum = losses.mean(0).min()
    assert float(mean_of_minima) < 0.95 * float(minimum)


# ---------------------------------------------------------------- reward models


def pad_as_saved(tokenizer: PreTrainedTokenizerBase) -> None:
    """The pad token that tiny models have."""


def pad_with_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """No pad token, as in the original Llama; another special token is there to take its place."""
    tokenizer.pad_token = None


def pad_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in many fine-tuned models."""
    tokenizer.pad_token = tokenizer.eos_token


def write_more_rows(path: Path, data: Path) -> list[dict]:
    """The rows of a file and three more, written to `path`."""
    rows = tiny.read_jsonl(data)
    if data.name == "fours.jsonl":
        more = tiny.make_rows(3, seed=15, k=4)
        rows += with_score_lists(more, 5)
    else:
        rows += tiny.make_rows(3, seed=15, k=2)
    tiny.write_jsonl(path, rows)
    return rows


@pytest.mark.parametrize(
    "architecture, data, change_tokenizer",
    [
        ("llama", "pairs.jsonl", pad_as_saved),
        ("llama", "fours.jsonl", pad_with_nothing),
        ("gpt2", "pairs.jsonl", pad_with_eos),
    ],
)
def test_rm(folder: Path, tmp_path: Path, architecture: str, data: str, change_tokenizer: Callable) -> None:
    """Losses, and the model that comes out: the same rewards however padded, and their mean in its configuration.

    Rewards are those of the loop, for GPT-2 up to a shift: its last norm has a bias, on which the loss does not
    depend, and AdamW makes steps of the rounding of its gradient. The rows are more than the steps use, and the mean is
    over all of them.
    """
    is_gpt2 = architecture == "gpt2"
    model = tiny.make_reward_model(tmp_path / "start", architecture, bos=not is_gpt2, chat=is_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    change_tokenizer(tokenizer)
    tokenizer.save_pretrained(model)
    rows = write_more_rows(tmp_path / "rows.jsonl", folder / data)
    output_dir = tmp_path / "out"
    lines = tiny.run("algos/rm.py", output_dir, model=model, train_data=tmp_path / "rows.jsonl", **OPTIONS)

    expected, trained = train_reference(model, rows, reference.rm(), rewards=True)
    metrics = REWARD_METRICS
    if is_gpt2:
        metrics = ("rewards/margins", "rewards/accuracies")
    compare_metrics(lines, expected, metrics)
    assert lines[0]["rewards/margins"] != 0

    groups = [reference.encode(tokenizer, row) for row in rows]
    wanted = rewards_of_loop(trained, groups)
    assert max(wanted) - min(wanted) > 0.1
    rewards = rewards_one_by_one(output_dir, groups)
    if not is_gpt2:
        assert rewards == pytest.approx(wanted, abs=1e-3)
    assert centred(rewards) == pytest.approx(centred(wanted), abs=1e-3)
    for side in ("left", "right"):
        padded = rewards_padded(output_dir, groups, side)
        assert padded == pytest.approx(rewards, abs=1e-4), side
    saved, _ = load_trained(output_dir)
    mean = reference.mean(rewards)
    assert saved.config.reward_mean == pytest.approx(mean, abs=1e-4)


def centred(rewards: list[float]) -> list[float]:
    """Rewards without their mean."""
    mean = reference.mean(rewards)
    return [reward - mean for reward in rewards]


def sequences(groups: list[reference.Group]) -> list[list[int]]:
    """Each completion behind its prompt."""
    ids = []
    for group in groups:
        ids += [group.prompt + completion for completion in group.completions]
    return ids


@torch.no_grad()
def rewards_of_loop(model: torch.nn.Module, groups: list[reference.Group]) -> list[float]:
    """Rewards by the float64 loop."""
    rewards = []
    for group in groups:
        for completion in group.completions:
            reward = reference.reward(model, group.prompt, completion)
            rewards.append(float(reward))
    return rewards


def load_trained(output_dir: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The reward model and the tokenizer of a run, by the stock classes; the pad token is known and not the EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(output_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert model.config.num_labels == 1
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    return model, tokenizer


@torch.no_grad()
def rewards_one_by_one(output_dir: Path, groups: list[reference.Group]) -> list[float]:
    """Rewards by the stock class, one by one."""
    model, _ = load_trained(output_dir)
    rewards = []
    for ids in sequences(groups):
        logits = model(input_ids=torch.tensor([ids])).logits
        rewards.append(float(logits[0, 0]))
    return rewards


@torch.no_grad()
def rewards_padded(output_dir: Path, groups: list[reference.Group], side: str) -> list[float]:
    """Rewards by the stock class, in one batch padded on one side with the tokenizer's pad token."""
    model, tokenizer = load_trained(output_dir)
    padded = tokenizer.pad({"input_ids": sequences(groups)}, padding_side=side, return_tensors="pt")
    mask = padded["attention_mask"]
    padding = padded["input_ids"][mask == 0]
    assert len(padding) > 0
    assert bool((padding == tokenizer.pad_token_id).all())
    # learned positions count from the first token that is not padding
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(**padded, position_ids=positions).logits[:, 0].tolist()


def test_rm_refuses_a_tokenizer_whose_only_special_token_is_eos(folder: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line: padding could not be told from the end."""
    model = tiny.make_model(tmp_path / "start", "gpt2", bos=False)
    output_dir = tmp_path / "out"
    process = tiny.start("algos/rm.py", output_dir, model=model, train_data=folder / "pairs.jsonl", **OPTIONS)
    assert process.wait(timeout=120) == 2
    log = tiny.read_log(output_dir)
    errors = [line for line in log.splitlines() if line.startswith("rm.py:")]
    assert len(errors) == 1
    assert "pad token" in errors[0]
    assert "Traceback" not in log
    assert not (output_dir / "model.safetensors").exists()
