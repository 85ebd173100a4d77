"""Unlikelihood, an opponent of DPO in Rafailov et al. 2023, arXiv 2305.18290 (section 6 and appendix C.3).

    L(θ) = -E [log π_θ(y_w|x) - α log π_θ(y_l|x)]

It makes y_w more and y_l less probable, without a reference. The file is a fork of algos/dpo.py with another loss: it
shows what such a fork changes (README.md, "Forking a file").

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, including its EOS. The paper divides neither term by length.
2. The paper minimises log π_θ(y_l|x). Welleck et al. 2019 (arXiv 1908.04319) maximise Σ_t log(1 - π_θ(y_t|x, y_<t)) of
   unwanted tokens, which is bounded. The paper cites them, but describes and uses the first form.
3. The loss has no lower bound for α > 0, because log π_θ(y_l|x) has none. The gradient on y_l does not fade as y_l gets
   rare, and the policy degenerates. The paper leaves it out of summaries and dialogue for that (C.3). So α and the
   number of steps decide how far the policy moves. Stop by the reward of samples (scripts/evaluate.py), not by it.
4. At π_ref, the gradient of DPO is β/2 times that of this loss at α = 1. DPO's weight σ(-β h) is what differs later.
5. α = 0 is Preferred-FT (algos/sft.py), per sequence. The paper takes α from 0.05, 0.1, 0.5 and 1.
6. The reward that is logged is log π_θ(y|x) itself.

Rows (docs/rows.md): pairs.

    torchrun --nproc-per-node 8 scripts/baselines/unlikelihood.py --model sft/ --train-data pairs.jsonl \\
        --output-dir unlikelihood/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared.batches import Batch, load_batches
from shared.command import AtLeast, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, command
from shared.export import export
from shared.groups import Requires
from shared.loading import load_policy, load_tokenizer
from shared.metrics import preference_metrics
from shared.model import Policy
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    alpha: Annotated[float, AtLeast(0, at_most=1)] = 0.5
    """weight α of the rejected completion's log-prob, which is minimised"""
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


def unlikelihood_loss(logps: Tensor, alpha: float) -> Tensor:
    """DPO paper, section 6 and C.3. logps (B, 2), preferred first → (B,), without a lower bound for α > 0."""
    return -(logps[:, 0] - alpha * logps[:, 1])


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)
    losses = unlikelihood_loss(logps, args.alpha)
    return losses, preference_metrics(logps, logps)


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    requires = Requires("pair")
    train, held_out = load_batches(args, run.ranks, tokenizer, config, requires)
    model = load_policy(args, run.ranks)
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
