"""Reward model (RM): Bradley-Terry on pairs, Plackett-Luce on K ranked completions.
Both are in the DPO paper (Rafailov et al. 2023, arXiv 2305.18290), Eq 2 and appendix A.3 Eq 18.

    L(φ) = -E log σ(r_φ(x, y_w) - r_φ(x, y_l));    K > 2: -E Σ_k [r_k - log Σ_{j≥k} exp(r_j)]

Details the equation leaves open:
1. r_φ is a linear head on the last hidden state of the completion's last token. That is its EOS, unless it was cut off.
2. Rewards are defined up to a shift that may depend on the prompt. Earlier work normalises them to mean 0 for every
   prompt (section 3). Here the mean over all training completions is stored as `reward_mean` in the model's config, and
   it is not subtracted.
3. The result is a Hugging Face sequence classifier with one label. Such a classifier looks for the last token that is
   not the pad token, so the pad token is set to one that occurs in no row. The model card says how others use it.
4. `rewards/confidences` is the mean probability that the model gives to its favourite. If the model is calibrated, it
   equals `rewards/accuracies` (of pairs).
5. An error in the paper: A.3 says that choices have probability proportional to the reward. Eq 18 has its exponential.

Rows (docs/rows.md): pairs, or K ranked completions.

    torchrun --nproc-per-node 8 algos/rm.py --model sft/ --train-data pairs.jsonl --output-dir rm/
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
from shared.loading import load_reward_model, load_tokenizer
from shared.metrics import preference_metrics
from shared.model import RewardModel, mean_reward
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
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


def rm_loss(rewards: Tensor) -> Tensor:
    """DPO paper Eq 18, and for K = 2 its Eq 2. rewards (B, K), preferred first → (B,)."""
    log_sums = rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K), log Σ_{j≥k} exp(r_j)
    margins = rewards[:, :-1] - log_sums[:, 1:]  # (B, K-1), of each completion over all that follow it
    return -F.logsigmoid(margins).sum(1)


def objective(model: RewardModel, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    rewards = model(batch)  # (B, K)
    losses = rm_loss(rewards)
    return losses, preference_metrics(rewards) | {"rewards/confidences": rewards.softmax(1).amax(1)}


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    requires = Requires("ranking")
    train, held_out = load_batches(args, run.ranks, tokenizer, config, requires)
    model = load_reward_model(args, run.ranks, tokenizer, train, held_out)
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

    model.lm.config.reward_mean = mean_reward(model, train)
    export(model, tokenizer, run.directory, run.model_card(), run.ranks)


if __name__ == "__main__":
    command(main, Args)
