"""TYPO, Hu, He and Wipf 2024 (New Desiderata for Direct Preference Optimization), arXiv 2407.09072.

    L(θ) = E softplus(log π_θ(y_l|x) - log π_θ(y_w|x)) - λ E_{ŷ ~ π_ref} log π_θ(ŷ|x)                   (Eqs 14, 16, 17)

The first term is a preference loss without a reference. The second term is on samples of π_ref, and preserves its
behaviour.

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, including its EOS. The paper divides neither term by length.
   `--length-normalise` divides both.
2. The first term is DPO's with β = 1 and without the reference.
3. The expectation is the mean over the rows' `reference_samples`, drawn from π_ref beforehand (scripts/sample.py). A
   sample that was cut off (`reference_samples_finished`) has no EOS.
4. The paper samples with top-k 60, top-p 0.8 and a repetition penalty of 1.1. That is another distribution than π_ref.
   The equation asks for plain samples at temperature 1, the default of scripts/sample.py. With others, a large λ gives
   the distribution that they come from.
5. The reward that is logged is log π_θ(y|x) itself.
6. The paper's settings: λ 0.05, learning rate 1e-6, batch 40, one sample per prompt.
7. With two completions the optimum is the mixture (p* + λ π_ref)/(1 + λ). With any number, it is never farther from π*
   in total variation than π_ref is (`python scripts/papers/typo.py --claim C27`).
8. Errors in the paper (docs/errata.md): Eq 17 takes an expectation over y of a KL divergence that already sums over y.

Rows (docs/rows.md): pairs with `reference_samples` of scripts/sample.py.

    torchrun --nproc-per-node 8 algos/typo.py --model sft/ --train-data pairs_with_samples.jsonl --output-dir typo/
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
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    lam: NonNegativeFloat = 0.05
    """weight λ of the unsupervised term, which preserves what π_ref does"""
    length_normalise: bool = False
    """divide every log-prob in the loss by its number of tokens"""
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


def typo_loss(logps: Tensor, sample_logps: Tensor, lam: float) -> Tensor:
    """Eqs 14, 16, 17. logps (B, 2), preferred first; sample_logps (B, M) → (B,)."""
    supervised = F.softplus(logps[:, 1] - logps[:, 0])  # ℓ_sup, which compares the pair
    unsupervised = -sample_logps.mean(1)  # ℓ_unsup, which preserves π_ref
    return supervised + lam * unsupervised


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)  # (B, 2 + M)
    pair = logps[:, :2]
    terms = logps / batch.lengths if args.length_normalise else logps
    losses = typo_loss(terms[:, :2], terms[:, 2:], args.lam)
    return losses, preference_metrics(pair, pair)


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model)
    requires = Requires("pair", samples="required")
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
