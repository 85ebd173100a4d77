"""Pessimistic preference optimisation (p-DPO, pd-DPO), Fisch et al. 2024, arXiv 2405.19316.

    L(θ) = L_base(θ) + γ Ω(θ),    Ω = -E [log π_θ(y_w|x) + log π_θ(y_l|x)]                              (Eqs 11, 13)

`--base dpo` is p-DPO, `--base distill` is pd-DPO on the mean of the reward models. Ω stands for KL(π_ref || π_θ).

Details the equation leaves open:
1. Rows (docs/rows.md): pairs, with scores for `--base distill`. log π(y|x) is the sum over the tokens and the EOS.
2. Ω is taken on the pair, as in section 5, or on `reference_samples`: -mean_m log π_θ(ŷ_m|x), which is half as large.
3. γ changes linearly from `--gamma-start` to `--gamma-end`. Ω is a mean over the batch (docs/errata.md), like the loss.
4. On the pair, p-DPO is DPO with label smoothing γ/β plus 2γ times -log π_θ(y_w): h is finite (Propositions 1 and 3).

    torchrun --nproc-per-node 8 algos/pessimistic_dpo.py --model sft/ --train-data pairs.jsonl --output-dir pessimistic/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.batches import Batch, load_batches
from shared.command import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, command
from shared.export import export
from shared.groups import Requires
from shared.loading import load_policy, load_tokenizer
from shared.metrics import preference_metrics
from shared.model import Policy
from shared.reference import add_reference_logps
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    beta: PositiveFloat = 0.1
    """reward per nat of log-ratio: a larger β keeps the policy closer to the reference"""
    base: Literal["dpo", "distill"] = "dpo"
    """the loss that γ Ω is added to: p-DPO or pd-DPO"""
    gamma_start: NonNegativeFloat = 1e-4
    """coefficient γ of Ω at the first step; it changes linearly from there"""
    gamma_end: NonNegativeFloat = 1e-2
    """coefficient γ of Ω at the last step"""
    reference: str | None = None
    """directory or hub id of π_ref; default: the starting model"""
    model: str
    """directory or hub id of the model to start from"""
    train_data: str
    """file, directory or hub id (`path:split`) of the rows to train on"""
    eval_data: str | None = None
    """held-out rows, in one of the same forms"""
    max_length: PositiveInt | None = None
    """largest number of tokens of prompt plus completion; default: the model's positions"""
    max_prompt_length: PositiveInt | None = None
    """longer prompts are truncated from the left to this many tokens, and keep their BOS; default: no limit"""

    batch_size: PositiveInt = 64
    """groups per optimizer step, over all processes"""
    micro_batch_tokens: PositiveInt = 8192
    """largest number of tokens in one forward pass of one process"""
    epochs: PositiveFloat = 1.0
    """passes over the rows"""
    max_steps: PositiveInt | None = None
    """optimizer steps, instead of epochs"""
    learning_rate: Annotated[NonNegativeFloat, tyro.conf.arg(aliases=["--lr"])] = 1e-6
    """peak learning rate of AdamW"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning rate after the warm-up: constant, or falling to 0 at the end"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate rises linearly"""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are clipped to this global norm"""
    shuffle: bool = True
    """shuffle the rows anew in every epoch, instead of taking them in the order of the file"""
    seed: Seed = 0
    """seed for shuffling"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward and backward pass; weights and optimizer state stay float32"""
    shard_size: PositiveInt | None = None
    """processes that share one copy of the weights (FSDP), such as those of one machine; default: all processes"""
    activation_checkpointing: bool = False
    """recompute each layer's activations in the backward pass, which needs less memory and more time"""
    compile: bool = False
    """compile layers and head (`torch.compile`): on a GPU faster, after about a minute at the start"""
    lora_rank: PositiveInt | None = None
    """train a LoRA adapter of this rank on all linear layers (`pip install -e .[lora]`); default: train all weights"""
    lora_alpha: PositiveInt | None = None
    """strength of the adapter, which is scaled by α / rank; default: twice the rank, or that of `--model`"""

    output_dir: str
    """directory for the log, the checkpoints and the trained model"""
    log_every: PositiveInt = 10
    """steps between lines of the log"""
    eval_every: NonNegativeInt = 100
    """steps between evaluations; 0: never"""
    save_every: NonNegativeInt = 500
    """steps between checkpoints; 0: never"""
    keep: PositiveInt = 2
    """number of newest checkpoints to keep"""
    resume: bool = False
    """continue from the newest valid checkpoint in the output directory"""
    track: bool = False
    """also write TensorBoard events into the output directory (`pip install -e .[track]`)"""


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO paper Eq 7, and Eq 20 for K > 2. logps, ref_logps (B, K), preferred first → (B,)."""
    rewards = beta * (logps - ref_logps)  # (B, K), β ρ
    if rewards.shape[1] > 2 and label_smoothing:
        raise ValueError("label smoothing is defined for pairs only")
    if rewards.shape[1] > 2:
        return plackett_luce_loss(rewards)
    margins = rewards[:, 0] - rewards[:, 1]  # (B,), β h
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def plackett_luce_loss(rewards: Tensor) -> Tensor:
    """-log P(y_1 > y_2 > ... > y_K), DPO paper Eqs 18 and 20. rewards (B, K), the most preferred first → (B,)."""
    log_sums = rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K), log Σ_{j≥k} exp(r_j)
    margins = rewards[:, :-1] - log_sums[:, 1:]  # (B, K-1), of each completion over all that follow it
    return -F.logsigmoid(margins).sum(1)


def distill_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq 7. logps, ref_logps, rewards (B, 2) → (B,)."""
    ratios = logps - ref_logps  # (B, 2), ρ
    h = ratios[:, 0] - ratios[:, 1]  # (B,)
    return (rewards[:, 0] - rewards[:, 1] - beta * h) ** 2


def pessimistic_loss(losses: Tensor, logps: Tensor, gamma: float) -> Tensor:
    """Adds γ Ω, Ω = -Σ_c log π_θ(y_c|x). losses (B,), logps (B, C) → (B,)."""
    return losses - gamma * logps.sum(1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)  # (B, 2 + M)
    pair = logps[:, :2]
    ref_pair = batch.ref_logps[:, :2]
    if args.base == "dpo":
        losses = dpo_loss(pair, ref_pair, args.beta)
    else:
        losses = distill_loss(pair, ref_pair, batch.scores.mean(2), args.beta)
    samples = logps[:, 2:]  # (B, M), where the rows have samples of π_ref
    omega_logps = samples.mean(1, keepdim=True) if samples.shape[1] else pair
    gamma = args.gamma_start + (args.gamma_end - args.gamma_start) * batch.progress
    losses = pessimistic_loss(losses, omega_logps, gamma)
    return losses, preference_metrics(args.beta * (pair - ref_pair), pair)


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    requires = Requires("pair", scores=args.base == "distill", samples="optional")
    train, held_out = load_batches(args, run.ranks, tokenizer, config, requires)
    model = load_policy(args, run.ranks)
    add_reference_logps(args.reference, model, train, held_out)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=args.weight_decay,
        fused=True,
    )

    steps_done = run.resume(model, optimizer, train, held_out)
    run.evaluate(steps_done, objective, model, held_out)
    for step in range(steps_done + 1, train.last_step + 1):
        # the step
        for batch in train.of_step(step):
            losses, metrics = objective(model, batch, args)
            # the mean over the global batch; FSDP averages the gradients of the processes
            (losses.sum() * run.ranks.world_size / batch.global_groups).backward()
            run.meter.add(losses, metrics)
        grad_norm = clip_grad_norm_(model.parameters(), args.max_grad_norm)
        totals = run.reduce_metrics()
        run.stop_if_not_finite(step, totals, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train.last_step, args)
        optimizer.step()
        optimizer.zero_grad()

        # after the step
        run.log(step, totals, grad_norm)
        run.evaluate(step, objective, model, held_out)
        run.save(step, model, optimizer)

    export(model, tokenizer, run.directory, run.model_card(), run.ranks)


if __name__ == "__main__":
    command(main, Args)
