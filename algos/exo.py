"""Efficient Exact Optimization (EXO), Ji et al. 2024, arXiv 2402.00856.

    L(θ) = E KL(q || p),    q = softmax_k(β_π ρ_k),    ρ = log π_θ(y|x) - log π_ref(y|x)                (Eqs 13-15, 18)

EXO-pref has p = (1 - ε, ε) over a pair (Eq 18). EXO-rw has p = softmax_k(r_k / β_r) over K completions with the scores
of a reward model (Eqs 13-15). `--kl forward` is DPO-rw, the cross-entropy -Σ p log q under the same target (Eq 19). On
pairs, that is DPO with label smoothing ε.

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, including its EOS.
2. With `--beta-r` the target comes from the rows' scores (their mean over reward models), else from `--epsilon`.
3. ε = 1e-3 as in the paper. The optimum of a pair is then at β_π h = log((1-ε)/ε) = 6.907. The published code fixes the
   target's logits to (0, -10) instead. Its optimum is at 10.
4. KL(q || p) differs from the expectation under the policy at finite K. Eq 16 holds as K grows, with completions drawn
   from π_ref, each as often as it was drawn. With `--beta-r`, equal texts are therefore kept. At π_θ = π_ref the mean
   gradient of EXO has the right direction at every K, and that of DPO-rw has not. EXO seeks modes at large K only.
5. The paper divides all logits by a temperature of 0.8, in training too. Here π_θ is the model's own distribution.
   Samples as in the paper (scripts/sample.py --temperature 0.8; instructions: 0.95, --top-p 0.9) are not from π_ref,
   unless the temperature is made part of the SFT model (scripts/prepare_model.py temperature).
6. The paper's settings: β_π (`--beta`) 0.1 (IMDB) or 0.5, β_r 0.1, learning rate 1e-6, batch 64, K 4 (IMDB: also 8).
7. On pairs, Eq 19 is DPO at ε = 0 only.
8. Errors in the paper (docs/errata.md): If labels are right with probability P, the optimum of Eq 18 is at β_π h =
   (2P - 1) log((1-ε)/ε), and not at their log-odds log(P/(1-P)) as DPO's is. With several pairs it also depends on
   which of them are asked for.

Rows (docs/rows.md): pairs, or K ranked completions; with `--beta-r`, their scores.

    torchrun --nproc-per-node 8 algos/exo.py --model sft/ --train-data pairs.jsonl --output-dir exo/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.batches import Batch, load_batches
from shared.command import Above, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, command
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
    epsilon: Annotated[float, Above(0, at_most=0.5)] = 1e-3
    """target probability of the rejected completion of a pair"""
    beta_r: PositiveFloat | None = None
    """temperature of the rows' scores, which make the target then; default: the target comes from --epsilon"""
    kl: Literal["reverse", "forward"] = "reverse"
    """reverse: KL(policy || target), which is EXO; forward: cross-entropy under the target, which is DPO-rw"""
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


def exo_loss(logps: Tensor, ref_logps: Tensor, target_logps: Tensor, beta: float) -> Tensor:
    """KL(q || p), Eqs 15 and 18. logps, ref_logps, target_logps = log p (B, K) → (B,)."""
    log_q = (beta * (logps - ref_logps)).log_softmax(1)
    return (log_q.exp() * (log_q - target_logps)).sum(1)


def dpo_rw_loss(logps: Tensor, ref_logps: Tensor, target_logps: Tensor, beta: float) -> Tensor:
    """-Σ p log q, Eq 19. logps, ref_logps, target_logps = log p (B, K) → (B,)."""
    log_q = (beta * (logps - ref_logps)).log_softmax(1)
    return -(target_logps.exp() * log_q).sum(1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)
    if args.beta_r:
        target_logps = (batch.scores.mean(2) / args.beta_r).log_softmax(1)
    else:
        target = logps.new_tensor([1 - args.epsilon, args.epsilon])
        target_logps = target.log().expand_as(logps)
    loss = exo_loss if args.kl == "reverse" else dpo_rw_loss
    losses = loss(logps, batch.ref_logps, target_logps, args.beta)
    rewards = args.beta * (logps - batch.ref_logps)
    return losses, preference_metrics(rewards, logps)


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    requires = Requires("ranking", scores=True) if args.beta_r else Requires("pair")
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
