"""TYPO, Hu, He and Wipf 2024 (New Desiderata for Direct Preference Optimization), arXiv 2407.09072.

    L(θ) = E softplus(log π_θ(y_l|x) - log π_θ(y_w|x)) - λ E_{ŷ ~ π_ref} log π_θ(ŷ|x)                   (Eqs 14, 16, 17)

A preference loss without a reference inside, and a supervised term that preserves what π_ref does.

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, its EOS included. The paper divides neither term by length;
   `--length-normalise` divides both.
2. The first term is DPO's with β = 1 and without the reference.
3. The expectation is the mean over the rows' `reference_samples`, drawn from π_ref beforehand (scripts/sample.py);
   one that was cut off (`reference_samples_finished`) has no EOS.
4. The paper samples with top-k 60, top-p 0.8 and a repetition penalty of 1.1, which is another distribution than
   π_ref; the equation asks for plain samples at temperature 1, the default of scripts/sample.py.
5. The reward that is logged is log π_θ(y|x) itself.
6. The paper's settings: λ 0.05, learning rate 1e-6, batch 40, one sample per prompt.

    torchrun --nproc-per-node 8 algos/typo.py --model sft/ --train-data pairs_with_samples.jsonl --output-dir typo/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.data import Batch, Needs
from shared.model import Policy, export, load_policy, load_tokenizer
from shared.run import Run, command, learning_rate, preference_metrics


@dataclass(kw_only=True)
class Args:
    lam: float = 0.05
    """weight λ of the supervised term"""
    length_normalise: bool = False
    """divide every log-prob in the loss by its number of tokens"""
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


def typo_loss(logps: Tensor, sample_logps: Tensor, lam: float) -> Tensor:
    """Eqs 14, 16, 17. logps (B, 2), preferred first; sample_logps (B, M) → (B,)."""
    return F.softplus(logps[:, 1] - logps[:, 0]) - lam * sample_logps.mean(1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)  # (B, 2 + M)
    losses = typo_loss(*(logps / batch.lengths if args.length_normalise else logps).tensor_split([2], 1), args.lam)
    return losses, preference_metrics(logps[:, :2], logps[:, :2])


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    train, held_out = run.load_batches(tokenizer, config, Needs(completions=2, samples=True))
    model = load_policy(args.model, run.place, args.activation_checkpointing)
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
