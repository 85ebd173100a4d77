"""Identity Preference Optimization (IPO), Azar et al. 2023, arXiv 2310.12036; as in TYPO Eq 10 (λ = τ) and in the
reward-distillation paper, section 5 and appendix B.

    L(θ) = E (h - 1/(2τ))²,    h = ρ_w - ρ_l,    ρ = log π_θ(y|x) - log π_ref(y|x)

Details the equation leaves open:
1. log π(y|x) is the sum over the completion's tokens, its EOS included. TRL and HALOs take the mean over tokens
   instead, which is another loss: with it the same τ pulls long completions apart much further.
2. `--tau` is the τ of the line above, the target gap of the log-ratios being 1/(2τ); TYPO writes 1/(2λ). The
   reward-distillation paper's appendix B has the gap at τ⁻¹: its τ is twice this one.
3. The implicit reward that is logged is τ ρ.
4. π_ref is the model as training starts, or `--reference`; its log-probs are computed once, before the first step.
5. With τ = β/2, β² times this loss is the distillation loss of algos/distill_dpo.py for a reward gap of 1.

    torchrun --nproc-per-node 8 algos/ipo.py --model sft/ --train-data pairs.jsonl --output-dir ipo/
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
    tau: float = 0.1
    """regularisation: the log-ratios of a pair are pulled to a gap of 1/(2τ) nats"""
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


def ipo_loss(logps: Tensor, ref_logps: Tensor, tau: float) -> Tensor:
    """(h - 1/(2τ))². logps, ref_logps (B, 2), preferred first → (B,)."""
    ratios = logps - ref_logps  # (B, 2), ρ
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * tau)) ** 2


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    logps = model.logps(batch)
    losses = ipo_loss(logps, batch.ref_logps, args.tau)
    return losses, preference_metrics(args.tau * (logps - batch.ref_logps), logps)


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(completions=2))
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
