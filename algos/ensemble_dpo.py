"""Distillation from an ensemble of reward models (e-DPO), Fisch et al. 2024, arXiv 2405.19316.

    L(θ) = min_i E (r_i(x, y_1) - r_i(x, y_2) - β h)² + γ Ω(θ)                                      (Eq 11, footnote 2)

Details the equation leaves open:
1. The minimum over reward models is of the mean over the whole global batch, over all micro-batches and processes,
   not per example. It must be known before the first backward pass: one more forward pass per step, without
   gradients, which adds about a third to its time.
2. r_i comes with the rows, as lists of scores, one per reward model (scripts/score.py).
3. log π(y|x) is the sum over the completion's tokens, its EOS included.
4. Ω = -[log π_θ(y_w|x) + log π_θ(y_l|x)], or on `reference_samples` where the rows have them, and γ's course are as
   in algos/pessimistic_dpo.py.
5. Held-out rows choose their own reward model, by the mean over all of them. `rm/i` is how often i was chosen.
6. Theorem 2 does not hold for a finite set of reward models: r = ±(1, -1, 0), β = 1, a uniform reference.

    torchrun --nproc-per-node 8 algos/ensemble_dpo.py --model sft/ --train-data scored.jsonl --output-dir ensemble/
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.data import Batch, Needs
from shared.distributed import all_sum, inference
from shared.model import Policy, add_reference_logps, export, load_policy, load_tokenizer
from shared.run import Run, command, learning_rate, preference_metrics


@dataclass(kw_only=True)
class Args:
    beta: float = 0.1
    """strength of the pull towards the reference, per nat of log-ratio"""
    gamma_start: float = 1e-4
    """coefficient γ of Ω at the first step; it changes linearly"""
    gamma_end: float = 1e-2
    """coefficient γ of Ω at the last step"""
    reference: str | None = None
    """directory or hub id of π_ref; default: the starting model"""
    model: str
    """directory or hub id of the model to start from"""
    train_data: str
    """file, directory or hub id (`path:split`) of the rows to train on"""
    eval_data: str | None = None
    """the same for held-out rows"""
    max_length: int | None = None
    """most tokens of prompt plus completion; default: the model's positions"""
    max_prompt_length: int | None = None
    """of a longer prompt, the BOS and this many last tokens are kept; default: all"""

    batch_size: int = 64
    """groups per optimizer step, over all processes"""
    micro_batch_tokens: int = 8192
    """most tokens in one forward pass of one process"""
    epochs: float = 1.0
    """passes over the rows"""
    max_steps: int | None = None
    """optimizer steps, instead of epochs"""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 1e-6
    """highest learning rate of AdamW"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """the rate after warm-up: constant, or falling to 0 at the end"""
    warmup_steps: int = 0
    """steps over which the rate rises linearly"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """the global gradient norm is clipped to this"""
    shuffle: bool = True
    """a new order of the rows in every epoch; else the file's"""
    seed: int = 0
    """of the order of the rows"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the forward and backward pass; weights and optimizer are float32"""
    shard_size: int | None = None
    """processes over which the weights are cut, as those of one machine, with copies on the others; default: all"""
    activation_checkpointing: bool = False
    """compute each layer's activations again in the backward pass instead of keeping them"""

    output_dir: str
    """where log, checkpoints and the trained model go"""
    log_every: int = 10
    """steps between lines of the log"""
    eval_every: int = 100
    """steps between evaluations; 0: never"""
    save_every: int = 500
    """steps between checkpoints; 0: never"""
    keep: int = 2
    """checkpoints kept, the newest ones"""
    resume: bool = False
    """continue from the newest valid checkpoint in the output directory"""
    track: bool = False
    """write TensorBoard events too, into the output directory (`pip install cleanpo[track]`)"""


def distill_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq 7. logps, ref_logps, rewards (B, 2) → (B,)."""
    ratios = logps - ref_logps  # (B, 2), ρ
    return (rewards[:, 0] - rewards[:, 1] - beta * (ratios[:, 0] - ratios[:, 1])) ** 2


def ensemble_losses(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq 7 for each of M reward models. logps, ref_logps (B, 2), rewards (B, 2, M) → (B, M)."""
    return torch.stack([distill_loss(logps, ref_logps, r, beta) for r in rewards.unbind(2)], 1)


def pessimistic_loss(losses: Tensor, logps: Tensor, gamma: float) -> Tensor:
    """Adds γ Ω, Ω = -Σ_c log π_θ(y_c|x). losses (B,), logps (B, C) → (B,)."""
    return losses - gamma * logps.sum(1)


def choose(model: Policy, batches: Iterable[Batch], args: Args) -> Iterator[Batch]:
    """The batches, each with the reward model whose mean loss over all of them, on all processes, is smallest."""
    batches = list(batches)
    with inference(model):
        sums = [ensemble_losses(model.logps(b)[:, :2], b.ref_logps[:, :2], b.scores, args.beta).sum(0) for b in batches]
    best = int(all_sum(torch.stack(sums).sum(0)).argmin())
    for batch in batches:
        batch.best = best
        yield batch


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)  # (B, 2 + M)
    pair, ref_pair = logps[:, :2], batch.ref_logps[:, :2]
    losses = ensemble_losses(pair, ref_pair, batch.scores, args.beta)[:, batch.best]
    samples = logps[:, 2:]  # of π_ref, where the rows have them
    omega = samples.mean(1, keepdim=True) if samples.shape[1] else logps[:, :2]
    gamma = args.gamma_start + (args.gamma_end - args.gamma_start) * batch.progress
    losses = pessimistic_loss(losses, omega, gamma)
    metrics = preference_metrics(args.beta * (pair - ref_pair), pair)
    return losses, metrics | {f"rm/{i}": torch.full_like(losses, i == batch.best) for i in range(batch.scores.size(2))}


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(2, scores=True, samples=None))
    model = load_policy(args.model, run.place, args.activation_checkpointing)
    add_reference_logps(args.reference, model, train, held_out)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.999), 1e-8, args.weight_decay, fused=True
    )
    for step in run.steps(model, optimizer, train):
        for batch in choose(model, train(step), args):
            losses, metrics = objective(model, batch, args)
            # the mean over the global batch: FSDP averages the gradients of the processes
            (losses.sum() * run.place.world / batch.global_groups).backward()
            run.add(losses, metrics)
        grad_norm = clip_grad_norm_(model.parameters(), args.max_grad_norm)
        run.check(step, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.last_step, args)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step)
        run.evaluate(step, objective, model, choose(model, held_out, args))
        run.save(step, model, optimizer)
    export(model, tokenizer, run)


if __name__ == "__main__":
    command(main, Args)
