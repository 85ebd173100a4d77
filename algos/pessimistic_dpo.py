"""Pessimistic preference optimisation (p-DPO, pd-DPO), Fisch et al. 2024, arXiv 2405.19316.

    L(θ) = L_base(θ) + γ Ω(θ),    Ω = -E [log π_θ(y_w|x) + log π_θ(y_l|x)]                              (Eqs 11, 13)

`--base dpo` is p-DPO, `--base distill` pd-DPO with one reward model (the mean of several). Ω stands for the
forward KL(π_ref || π_θ).

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, its EOS included.
2. Ω is taken on the pair, as in the paper (section 5), or, where the rows have `reference_samples`, on those: -mean_m
   log π_θ(ŷ_m|x). For completions drawn from π_ref the pair's Ω is twice the cross-entropy in expectation, so that
   the same γ regularises half as strongly on samples.
3. γ is the coefficient itself and changes linearly from `--gamma-start` to `--gamma-end`. It is Eq 11's β/α;
   section 4.1 writes α/β, which contradicts it.
4. On one pair, Ω on it and π_θ(y_w) fixed, p-DPO's optimum is finite (Proposition 3): β h = log(α - 1) for
   α = β/γ > 1, as far as π_θ(y_l) ≤ 1 - π_θ(y_w) allows; it is negative for α < 2. Without Ω it is infinite
   (Proposition 1).
5. π_ref is the model as training starts, or `--reference`; its log-probs are computed once, before the first step.

    torchrun --nproc-per-node 8 algos/pessimistic_dpo.py --model sft/ --train-data pairs.jsonl --output-dir pessimistic/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.data import Batch, Needs
from shared.model import Policy, add_reference_logps, export, load_policy, load_tokenizer
from shared.run import Run, command, learning_rate, preference_metrics


@dataclass(kw_only=True)
class Args:
    beta: float = 0.1
    """strength of the pull towards the reference, per nat of log-ratio"""
    base: Literal["dpo", "distill"] = "dpo"
    """the loss that γ Ω is added to: p-DPO or pd-DPO"""
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


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The DPO paper's Eq 7, and for K > 2 its Eq 20. logps, ref_logps (B, K), preferred first → (B,)."""
    rewards = beta * (logps - ref_logps)  # (B, K)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)[:, 1:]  # (B, K-1), log Σ_{j>k} exp(β ρ_j)
    h = rewards[:, :-1] - rest  # β h of a pair
    return -((1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)).sum(1)


def distill_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq 7. logps, ref_logps, rewards (B, 2) → (B,)."""
    ratios = logps - ref_logps  # (B, 2), ρ
    return (rewards[:, 0] - rewards[:, 1] - beta * (ratios[:, 0] - ratios[:, 1])) ** 2


def pessimistic_loss(losses: Tensor, logps: Tensor, gamma: float) -> Tensor:
    """Adds γ Ω, Ω = -Σ_c log π_θ(y_c|x). losses (B,), logps (B, C) → (B,)."""
    return losses - gamma * logps.sum(1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)  # (B, 2 + M)
    pair, ref_pair = logps[:, :2], batch.ref_logps[:, :2]
    if args.base == "dpo":
        losses = dpo_loss(pair, ref_pair, args.beta)
    else:
        losses = distill_loss(pair, ref_pair, batch.scores.mean(2), args.beta)
    samples = logps[:, 2:]  # of π_ref, where the rows have them
    omega = samples.mean(1, keepdim=True) if samples.shape[1] else logps[:, :2]
    gamma = args.gamma_start + (args.gamma_end - args.gamma_start) * batch.progress
    losses = pessimistic_loss(losses, omega, gamma)
    metrics = preference_metrics(args.beta * (pair - ref_pair), pair)
    return losses, metrics


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(2, scores=args.base == "distill", samples=None))
    model = load_policy(args.model, run.place, args.activation_checkpointing)
    add_reference_logps(args.reference, model, train, held_out)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.999), 1e-8, args.weight_decay, fused=True
    )
    for step in run.steps(model, optimizer, train):
        for batch in train(step):
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
        run.evaluate(step, objective, model, held_out)
        run.save(step, model, optimizer)
    export(model, tokenizer, run)


if __name__ == "__main__":
    command(main, Args)
