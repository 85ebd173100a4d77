"""Efficient Exact Optimization (EXO), Ji et al. 2024, arXiv 2402.00856.

    L(θ) = E KL(q || p),    q = softmax_k(β_π ρ_k),    ρ = log π_θ(y|x) - log π_ref(y|x)                (Eqs 13-15, 18)

EXO-pref: p = (1 - ε, ε) over a pair (Eq 18). EXO-rw: p = softmax_k(r_k / β_r) over K completions with the scores of
a reward model (Eqs 13-15). `--kl forward` is DPO-rw, the cross-entropy -Σ p log q under the same target (Eq 19); on
pairs, that is DPO with label smoothing ε.

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, its EOS included.
2. With `--beta-r` the target comes from the rows' scores (their mean over reward models), else from `--epsilon`.
3. ε = 1e-3 as in the paper: the optimum of a pair is at β_π h = log((1-ε)/ε) = 6.907. The published code fixes the
   target's logits to (0, -10) instead, whose optimum is at 10.
4. KL(q || p) differs from the expectation under the policy at finite K: Eq 16 holds as K grows, with completions
   drawn from π_ref, each as often as it was drawn; with `--beta-r` equal texts are therefore kept.
5. The paper divides all logits by a temperature of 0.8, in training too; here π_θ is the model's own distribution.
   To sample as the paper does: scripts/sample.py --temperature 0.8 (instructions: 0.95 and --top-p 0.9).
6. The paper's settings: β_π (`--beta`) 0.1 (IMDB) or 0.5, β_r 0.1, learning rate 1e-6, batch 64, K 4 (IMDB: also 8).

    torchrun --nproc-per-node 8 algos/exo.py --model sft/ --train-data pairs.jsonl --output-dir exo/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
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
    epsilon: float = 1e-3
    """target probability of the rejected completion of a pair"""
    beta_r: float | None = None
    """temperature of the rows' scores, which then are the target; default: preference pairs"""
    kl: Literal["reverse", "forward"] = "reverse"
    """KL(policy || target), EXO; or the cross-entropy under the target, DPO-rw"""
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
        target_logps = logps.new_tensor([1 - args.epsilon, args.epsilon]).log().expand_as(logps)
    loss = exo_loss if args.kl == "reverse" else dpo_rw_loss
    losses = loss(logps, batch.ref_logps, target_logps, args.beta)
    return losses, preference_metrics(args.beta * (logps - batch.ref_logps), logps)


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(None if args.beta_r else 2, scores=bool(args.beta_r)))
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
