"""scripts/baselines/unlikelihood.py: the loss, three steps against the float64 loop, and what it does to a policy."""

from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import reference
import tiny
import torch
from exactness import check_agreement, compare_run
from settings import BATCH, OPTIONS, STEPS
from torch import Tensor
from torch.autograd import gradcheck

from algos.dpo import dpo_loss
from scripts.baselines.unlikelihood import unlikelihood_loss

SCRIPT = "scripts/baselines/unlikelihood.py"
ALPHA = 0.3
alphas = pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 0.5, 1.0])


def pairs_of_log_probs(n: int = 6) -> Tensor:
    """Random float64 log-probs (n, 2) of completions."""
    generator = torch.Generator().manual_seed(0)
    return -30 + 3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    "logp_chosen, logp_rejected, alpha, loss",
    [
        (-2.0, -3.0, 0.0, 2.0),
        (-2.0, -3.0, 0.5, 0.5),
        (-2.0, -3.0, 1.0, -1.0),
        (-3.0, -2.0, 1.0, 1.0),
        (0.0, -4.0, 0.25, -1.0),
    ],
)
def test_unlikelihood_by_hand(logp_chosen: float, logp_rejected: float, alpha: float, loss: float) -> None:
    logps = torch.tensor([[logp_chosen, logp_rejected]])
    assert unlikelihood_loss(logps, alpha).tolist() == [loss]


@alphas
def test_unlikelihood_gradient(alpha: float) -> None:
    """By finite differences; and it is −1 on the chosen, α on the rejected log-prob, wherever they are."""
    logps = pairs_of_log_probs().requires_grad_()
    assert gradcheck(partial(unlikelihood_loss, alpha=alpha), (logps,))
    (gradient,) = torch.autograd.grad(unlikelihood_loss(logps, alpha).sum(), logps)
    assert gradient.tolist() == [[-1, alpha] for _ in gradient]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_begins_as_unlikelihood(beta: float) -> None:
    """At π_ref, DPO's gradient is β/2 times that of unlikelihood with α = 1; elsewhere it is not."""
    logps = pairs_of_log_probs().requires_grad_()

    def gradients(ref_logps: Tensor) -> tuple[Tensor, Tensor]:
        losses = (dpo_loss(logps, ref_logps, beta).sum(), unlikelihood_loss(logps, 1.0).sum())
        dpo, unlikelihood = (torch.autograd.grad(loss, logps)[0] for loss in losses)
        return dpo, beta / 2 * unlikelihood

    ours, theirs = gradients(logps.detach())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours, theirs = gradients(torch.full_like(logps, -30))
    assert not torch.allclose(ours, theirs, rtol=1e-2)


def test_there_is_no_lower_bound() -> None:
    """Gradient descent on the logits of three completions: the loss falls by the same amount for ever."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = []
    for _ in range(400):
        loss = unlikelihood_loss(logits.log_softmax(0)[None, :2], ALPHA).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= gradient
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    # where π(y_w) is 1, a step of rate 1 raises the chosen logit by α and lowers the rejected one by α
    assert losses[-101] - losses[-1] == pytest.approx(100 * 2 * ALPHA**2, rel=1e-6)


# ---------------------------------------------------------------- runs


def unlikelihood_of_group(group: reference.ScoredGroup, alpha: float) -> Tensor:
    """−log π of the chosen completion + α log π of the rejected one."""
    chosen, rejected = group.logps
    return alpha * rejected - chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and pairs."""
    path = tmp_path_factory.mktemp("unlikelihood")
    tiny.make_model(path / "llama", "llama", seed=3)
    tiny.make_rows(STEPS * BATCH, seed=12, k=2, path=path / "pairs.jsonl")
    return path


def test_unlikelihood_runs_as_a_command(folder: Path, tmp_path: Path) -> None:
    """Three steps against the float64 loop, which has no reference either."""
    loss = reference.mean_loss(partial(unlikelihood_of_group, alpha=ALPHA), reference.log_probabilities)
    lines = compare_run(SCRIPT, tmp_path / "out", folder / "llama", folder / "pairs.jsonl", loss, alpha=ALPHA)
    for line in lines:
        assert line["rewards/chosen"] == line["logps/chosen"]
        assert line["rewards/rejected"] == line["logps/rejected"]
    cached = [path for path in (tmp_path / "out.cache").rglob("*") if "reference" in path.name]
    assert cached == []


@pytest.mark.slow
def test_unlikelihood_on_two_processes(folder: Path, tmp_path: Path) -> None:
    """The numbers of one process, and a budget that splits every batch changes nothing."""
    options: dict[str, Any] = {**OPTIONS, "model": folder / "llama", "train_data": folder / "pairs.jsonl"}
    alone = tiny.run(SCRIPT, tmp_path / "one", 1, alpha=ALPHA, **options)
    together = tiny.run(SCRIPT, tmp_path / "two", 2, alpha=ALPHA, micro_batch_tokens=200, **options)
    check_agreement(together, alone, STEPS, ("loss", "grad_norm", "logps/chosen", "logps/rejected"))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_makes_rejected_completions_fall(folder: Path, tmp_path: Path, alpha: float) -> None:
    """Without α the chosen completions rise alone; with it the rejected ones fall."""
    options: dict[str, Any] = {**OPTIONS, "model": folder / "llama", "train_data": folder / "pairs.jsonl"}
    options |= {"batch_size": STEPS * BATCH, "max_steps": 6, "alpha": alpha}
    harness.run(tmp_path / "out", script=SCRIPT, **options)
    lines = tiny.training_lines(tmp_path / "out" / "metrics.jsonl")
    risen = [lines[-1][name] - lines[0][name] for name in ("logps/chosen", "logps/rejected")]
    if alpha == 0:
        assert min(risen) > 1
    else:
        assert risen[1] < min(-1, risen[0] - 1)


@pytest.mark.parametrize("alpha", ["-0.1", "1.5", "nan"])
def test_an_alpha_out_of_range_is_refused(folder: Path, tmp_path: Path, alpha: str) -> None:
    options = {"model": folder / "llama", "train_data": folder / "pairs.jsonl", "alpha": alpha}
    words = f"--alpha {float(alpha)}: must be a finite number of at least 0 and at most 1"
    harness.refused(tmp_path / "out", words, script=SCRIPT, **options)
