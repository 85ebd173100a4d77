"""Supervised fine-tuning (SFT): maximum likelihood on completions; on preference rows the Preferred-FT of the DPO
paper (Rafailov et al. 2023, arXiv 2305.18290, section 6).

    L(θ) = -E Σ_t log π_θ(y_t | x, y_<t)

Details the equation leaves open:
1. The sum runs over the completion's tokens, its EOS included; the prompt has no loss.
2. The batch's loss is the mean per token of the whole global batch, a choice of this project: the papers write the
   expectation per sequence, whose gradient is this one times the mean length of the batch's completions.
3. Of a chat, the last assistant turn is the completion; of ranked completions or a pair, the preferred one is.
4. A completion that `--max-length` cuts off has no EOS.

    torchrun --nproc-per-node 8 algos/sft.py --model base/ --train-data rows.jsonl --output-dir sft/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.data import Batch, Needs
from shared.model import Policy, export, load_policy, load_tokenizer
from shared.run import Run, command, learning_rate


@dataclass(kw_only=True)
class Args:
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
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 1e-5
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


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each token. token_logps (N,) → (N,)."""
    return -token_logps


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    losses = sft_loss(model(batch))
    return losses, {}


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    train, held_out = run.load_batches(tokenizer, config, Needs(completions=1))
    model = load_policy(args.model, run.place, args.activation_checkpointing)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.999), 1e-8, args.weight_decay, fused=True
    )
    for step in run.steps(model, optimizer, train):
        for batch in train(step):
            losses, metrics = objective(model, batch, args)
            # the mean over the global batch: FSDP averages the gradients of the processes
            (losses.sum() * run.place.world / batch.global_tokens).backward()
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
