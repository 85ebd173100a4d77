"""Direct Preference Optimization (DPO), Rafailov et al. 2023, arXiv 2305.18290.

    L(θ) = -E log σ(β h),    h = ρ_w - ρ_l,    ρ = log π_θ(y|x) - log π_ref(y|x)                             (Eq 7)

Over K > 2 ranked completions the preference model is Plackett-Luce (appendix A.3, Eq 20), the same number at K = 2:

    L(θ) = -E Σ_k [β ρ_k - log Σ_{j≥k} exp(β ρ_j)]

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, its EOS included, the prompt excluded, in float32.
2. π_ref is the model as training starts, or `--reference`; its log-probs are computed once, before the first step.
3. A completion that `--max-length` cuts off has no EOS.
4. `--label-smoothing` ε, for pairs, is not in the paper but in its code: the label is wrong with probability ε.
5. The paper trains with RMSprop and 150 steps of warm-up; here, as in every file, it is AdamW.
6. Appendix A.4 has w and l swapped against Eq 7, which is implemented: in Eqs 21 and 22, and in the weight σ of the
   final gradient. Section 4 has it right.
7. The batch's loss is the mean over the groups of the whole global batch.

    torchrun --nproc-per-node 8 algos/dpo.py --model sft/ --train-data pairs.jsonl --output-dir dpo/
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
    label_smoothing: float = 0.0
    """probability that a pair's label is wrong"""
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


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)
    losses = dpo_loss(logps, batch.ref_logps, args.beta, args.label_smoothing)
    return losses, preference_metrics(args.beta * (logps - batch.ref_logps), logps)


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(completions=2 if args.label_smoothing else None))
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
