"""Reward model (RM): Bradley-Terry on pairs, Plackett-Luce on K ranked completions; DPO paper (Rafailov et al. 2023,
arXiv 2305.18290), Eq 2 and appendix A.3 Eq 18.

    L(φ) = -E log σ(r_φ(x, y_w) - r_φ(x, y_l));    K > 2: -E Σ_k [r_k - log Σ_{j≥k} exp(r_j)]

Details the equation leaves open:
1. r_φ is a linear head on the last hidden state of the completion's last token, its EOS unless it was cut off.
2. Rewards are defined up to a shift that may depend on the prompt. Earlier work normalises them to mean 0 for every
   prompt (section 3); here the one mean over all training completions is stored as `reward_mean` in the model's
   config, and not subtracted.
3. The result is a Hugging Face sequence classifier with one label. Those look for the last token that is not the pad
   token, so that another pad token than the EOS is set.
4. `rewards/confidences` is the mean probability that the model gives to its favourite; where it is calibrated, it
   equals `rewards/accuracies` (of pairs).

    torchrun --nproc-per-node 8 algos/rm.py --model sft/ --train-data pairs.jsonl --output-dir rm/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.data import Batch, Needs
from shared.model import RewardModel, export, load_reward_model, load_tokenizer, mean_reward
from shared.run import Run, command, learning_rate, preference_metrics


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


def rm_loss(rewards: Tensor) -> Tensor:
    """Eq 2, and for K > 2 Eq 18. rewards (B, K), preferred first → (B,)."""
    rest = rewards.flip(1).logcumsumexp(1).flip(1)[:, 1:]  # (B, K-1), log Σ_{j>k} exp(r_j)
    return -F.logsigmoid(rewards[:, :-1] - rest).sum(1)


def objective(model: RewardModel, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    rewards = model(batch)  # (B, K)
    losses = rm_loss(rewards)
    return losses, preference_metrics(rewards) | {"rewards/confidences": rewards.softmax(1).amax(1)}


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    train, held_out = run.load_batches(tokenizer, config, Needs())
    model = load_reward_model(args.model, run.place, args.activation_checkpointing, tokenizer, args.seed)
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
    model.lm.config.reward_mean = mean_reward(model, train)
    export(model, tokenizer, run)


if __name__ == "__main__":
    command(main, Args)
