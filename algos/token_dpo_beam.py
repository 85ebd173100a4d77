"""DPO seen token by token, and beam search on it: From r to Q*, Rafailov et al. 2024, arXiv 2404.12358.

    L(θ) = -E log σ(Σ_t r(s_t^w, a_t^w) - Σ_t r(s_t^l, a_t^l))                                               (Eq 9)
    r(s, a) = β log π_θ(a|s) - β log π_ref(a|s)                                                             (Eq 11)
    y = argmax Σ_t log π_θ(a_t|s_t), searched with beams                                                    (Eq 13)
    π(a|s) ∝ π_base(a|s) (π_proxy(a|s) / π_ref(a|s))^β                                                      (Eq 14)

Details the equations leave open:
1. A state is the prompt with the completion so far. An action is its next token, and the last action is the EOS. Summed
   over a completion, r is β ρ of algos/dpo.py. The loss and its gradient are DPO's: of a return, not of a dense reward.
2. π_ref is the starting model, or `--reference`. Its token log-probs are computed once, before the first step.
3. The search is a function of any model. `scripts/sample.py --beams` decodes the prompts of a file with it.
4. The paper leaves the end of the search open. Here, continuations that end and are among a step's `width` best are
   finished. The `width` best others go on, as in transformers, until none can overtake the `width` best finished ones.

Rows (docs/rows.md): pairs. Errors in the paper: docs/errata.md.

    torchrun --nproc-per-node 8 algos/token_dpo_beam.py --model sft/ --train-data pairs.jsonl --output-dir dpo/
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from shared import NonFinite
from shared.batches import Batch, load_batches
from shared.command import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, command
from shared.export import export
from shared.groups import Requires
from shared.loading import load_policy, load_tokenizer
from shared.logprobs import sum_over_completions
from shared.metrics import preference_metrics
from shared.model import Policy
from shared.reference import add_reference_logps
from shared.run import Run
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    beta: PositiveFloat = 0.1
    """reward per nat of log-ratio: a larger β keeps the policy closer to the reference"""
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


def token_rewards(token_logps: Tensor, ref_token_logps: Tensor, beta: float) -> Tensor:
    """Eq 11, r(s_t, a_t) of each token. token_logps, ref_token_logps (N,) → (N,)."""
    return beta * (token_logps - ref_token_logps)


def token_dpo_loss(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Eq 9. rewards (N,) of the tokens, completion by completion; lengths (B, 2), the preferred one first → (B,)."""
    returns = sum_over_completions(rewards, lengths)  # (B, 2), Σ_t r(s_t, a_t)
    return -F.logsigmoid(returns[:, 0] - returns[:, 1])


def proxy_logps(base_logps: Tensor, proxy_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Eq 14, log π(·|s) of a base steered by a tuned proxy and the proxy's reference, all (..., V) → (..., V)."""
    return (base_logps - beta * ref_logps + beta * proxy_logps).log_softmax(-1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    token_logps = model(batch)  # (N,)
    rewards = token_rewards(token_logps, batch.ref_token_logps, args.beta)
    losses = token_dpo_loss(rewards, batch.lengths)

    returns = sum_over_completions(rewards, batch.lengths)
    logps = sum_over_completions(token_logps, batch.lengths)
    metrics = preference_metrics(returns, logps)
    for name, values in {"token_rewards": rewards, "negative_tokens": (rewards < 0).float()}.items():
        # (B, 2), over the tokens of each completion
        means = sum_over_completions(values, batch.lengths) / batch.lengths
        metrics[f"{name}/chosen"] = means[:, 0]
        metrics[f"{name}/rejected"] = means[:, 1]
    return losses, metrics


class Beam(NamedTuple):
    """A completion during the search, and the beam of the step before that it continues."""

    parent: int  # index among the prompt's beams of the step before
    token_ids: list[int]
    logp: float  # log π(y|x)

    def score(self, length_penalty: float, length: int | None = None) -> float:
        """log π(y|x) / |y|^length_penalty, or with another length than |y|."""
        return self.logp / (length or len(self.token_ids)) ** length_penalty


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, (R, V) → log-probs (R, k), ids (R, k); of equal ones, the lowest ids."""
    top_logits, ids = logits.topk(k)  # topk leaves open which of several equal ones it takes, and their order
    has_ties = (logits >= top_logits[:, -1:]).sum() > top_logits.numel()
    if has_ties:
        ids = logits.argsort(dim=1, descending=True, stable=True)[:, :k]

    ids = ids.sort(1).values
    order = logits.gather(1, ids).argsort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    logps = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
    return logps.cpu(), ids.cpu()


def extend(
    beams: list[Beam], logps: Tensor, ids: Tensor, width: int, has_ended: Callable[[list[int]], bool]
) -> tuple[list[Beam], list[Beam]]:
    """Extend the beams of one prompt, best first, by one token.

    logps, ids (beams, k): the likeliest next tokens of each. Returns the beams that have ended, and those that go on.
    """
    beam_logps = torch.tensor([beam.logp for beam in beams], dtype=torch.double)
    sums = (beam_logps[:, None] + logps).flatten()
    best = sums.argsort(descending=True, stable=True)[: 2 * width]

    parents = (best // logps.shape[1]).tolist()
    candidates = zip(parents, ids.flatten()[best].tolist(), sums[best].tolist(), strict=True)

    ended = []
    going_on = []
    for rank, (parent, token_id, logp) in enumerate(candidates):
        beam = Beam(parent, [*beams[parent].token_ids, token_id], logp)
        if not has_ended(beam.token_ids):
            going_on.append(beam)
        elif rank < width:
            ended.append(beam)
    return ended, going_on[:width]


@torch.inference_mode()
def beam_searches(
    model, prompts: list[list[int]], width: int, max_new_tokens: int, end_ids: list[int], length_penalty: float = 0.0
) -> list[list[tuple[list[int], float]]]:
    """`beam_search` from several prompts at once."""

    def has_ended(token_ids: list[int]) -> bool:
        return token_ids[-1] in end_ids or len(token_ids) == max_new_tokens

    sequences = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ids = pad_sequence(sequences, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True, padding_side="left")
    cache = None
    running = [[Beam(0, [], 0.0)] for _ in prompts]  # of each prompt, best first
    finished: list[list[Beam]] = [[] for _ in prompts]
    while True:
        # forward: the likeliest next tokens of all running beams
        position_ids = (mask.cumsum(1) - 1).clamp(0)[:, -ids.shape[1] :]
        caching = {"past_key_values": cache, "use_cache": True}
        output = model(ids, attention_mask=mask, position_ids=position_ids, logits_to_keep=1, **caching)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        logps, token_ids = likeliest(logits, min(2 * width, logits.shape[-1]))
        if logps.isnan().any():
            raise NonFinite("beam search: the model's logits are not numbers")

        # extend: the beams of each prompt by one token
        num_beams = [len(beams) for beams in running]
        next_of_prompts = zip(logps.split(num_beams), token_ids.split(num_beams), strict=True)
        cache_rows = []  # those that the beams that go on continue
        for i, (next_logps, next_ids) in enumerate(next_of_prompts):
            ended, going_on = extend(running[i], next_logps, next_ids, width, has_ended)
            finished[i] += ended
            finished[i].sort(key=lambda beam: beam.score(length_penalty), reverse=True)
            del finished[i][width:]
            if is_settled(finished[i], going_on, width, max_new_tokens, length_penalty):
                going_on = []
            cache_rows += [sum(num_beams[:i]) + beam.parent for beam in going_on]
            running[i] = going_on
        if not cache_rows:
            return [[(beam.token_ids, beam.logp) for beam in beams] for beams in finished]

        # reorder: the cache and the mask follow the beams
        if cache_rows != list(range(sum(num_beams))):
            cache.batch_select_indices(torch.tensor(cache_rows, device=model.device))
        last_ids = [[beam.token_ids[-1]] for beams in running for beam in beams]
        ids = torch.tensor(last_ids, device=model.device)
        mask = torch.cat([mask[cache_rows], torch.ones_like(ids)], 1)


def is_settled(finished: list[Beam], going_on: list[Beam], width: int, limit: int, length_penalty: float) -> bool:
    """Whether no beam that goes on can overtake the `width` finished ones."""
    if len(finished) < width or not going_on:
        return False
    # log π(y|x) only falls with more tokens, but divided by a power of the length it may rise
    best_length = limit if length_penalty > 0 else None
    return finished[-1].score(length_penalty) >= going_on[0].score(length_penalty, best_length)


def beam_search(
    model, prompt_ids, width: int, max_new_tokens: int, eos_token_id: int | list[int], length_penalty: float = 0.0
) -> list[tuple[list[int], float]]:
    """Eq 13: the completions of a prompt with the highest log π(y|x) / |y|^length_penalty that `width` beams find.

    model: a causal language model of transformers; prompt_ids: a list or tensor of ids → (token ids, log π(y|x)) of
    at most `width` completions, best first, each with its EOS, which may be one of several, unless it was cut off at
    `max_new_tokens`. Width 1 is greedy (length_penalty 0), |V|^max_new_tokens exhaustive. Raises NonFinite for NaN.
    """
    end_ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    prompt = torch.as_tensor(prompt_ids).flatten().tolist()
    if not prompt or width < 1 or max_new_tokens < 1:
        raise ValueError("beam search needs a prompt, and a width and max_new_tokens of at least 1")
    return beam_searches(model, [prompt], width, max_new_tokens, end_ids, length_penalty)[0]


def main(args: Args) -> None:
    # set-up
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    requires = Requires("pair")
    train, held_out = load_batches(args, run.ranks, tokenizer, config, requires)
    model = load_policy(args, run.ranks)
    add_reference_logps(args.reference, model, train, held_out, per_token=True)
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
