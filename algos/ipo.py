"""Identity Preference Optimization (IPO), Azar et al. 2023, arXiv 2310.12036.
It is also in TYPO, Eq 10 (λ = τ), and in the reward-distillation paper, section 5 and appendix B.

    L(θ) = E (h - 1/(2τ))²,    h = ρ_w - ρ_l,    ρ = log π_θ(y|x) - log π_ref(y|x)

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, including its EOS. TRL and HALOs take the mean over tokens. That
   is another loss: the same τ pulls long completions apart much further.
2. `--tau` is the τ of the line above, so the target gap of the log-ratios is 1/(2τ). TYPO writes 1/(2λ). The
   reward-distillation paper's appendix B has the gap at τ⁻¹, so its τ is twice this one.
3. The implicit reward that is logged is τ ρ.
4. π_ref is the starting model, or `--reference`. Its log-probs are computed once, before the first step.
5. With τ = β/2, β² times this loss is the distillation loss of algos/distill_dpo.py for a reward gap of 1.
6. With pairs from π_ref the optimum is π_ref exp(r/τ)/Z, where r(y) is the probability that y wins against a completion
   of π_ref.
7. An error in TYPO (docs/errata.md): the two sides of Eq 10 are not equal. They differ by a number without θ.

Rows (docs/rows.md): pairs.

    torchrun --nproc-per-node 8 algos/ipo.py --model sft/ --train-data pairs.jsonl --output-dir ipo/
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
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
from shared.reference import add_reference_logps
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    tau: PositiveFloat = 0.1
    """strength of the regularisation: the target gap of a pair's log-ratios is 1/(2τ) nats"""
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


def ipo_loss(logps: Tensor, ref_logps: Tensor, tau: float) -> Tensor:
    """(h - 1/(2τ))². logps, ref_logps (B, 2), preferred first → (B,)."""
    ratios = logps - ref_logps  # (B, 2), ρ
    h = ratios[:, 0] - ratios[:, 1]  # (B,)
    return (h - 1 / (2 * tau)) ** 2


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)
    losses = ipo_loss(logps, batch.ref_logps, args.tau)
    rewards = args.tau * (logps - batch.ref_logps)
    return losses, preference_metrics(rewards, logps)


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    requires = Requires("pair")
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
