"""DPO seen token by token, and beam search on it: From r to Q*, Rafailov et al. 2024, arXiv 2404.12358.

    L(θ) = -E log σ(Σ_t r(s_t^w, a_t^w) - Σ_t r(s_t^l, a_t^l))                                               (Eq 9)
    r(s, a) = β log π_θ(a|s) - β log π_ref(a|s)                                                             (Eq 11)
    y = argmax Σ_t log π_θ(a_t|s_t), searched with beams                                                    (Eq 13)
    π(a|s) ∝ π_base(a|s) (π_proxy(a|s) / π_ref(a|s))^β                                                      (Eq 14)

Details the equations leave open:
1. A state is the prompt with the completion so far, an action its next token; the EOS is the last action. Summed
   over a completion, r is β ρ of algos/dpo.py: the loss and its gradient are DPO's.
2. π_ref is the model as training starts, or `--reference`; its token log-probs are computed once, before step one.
3. After training, prompts of `--eval-data` are decoded at every width of `--beam-widths`, into beams.jsonl.
4. Scores are not divided by the length, as in Eq 13; all tokens take part (appendix E states top-k 50).
5. The paper does not say how a beam search ends. Here, of a step's best continuations, those that end and are among
   the `width` best are finished, the `width` best others go on, until none can overtake the `width` best finished
   ones (so does transformers' `generate`). Equal scores: the better beam, then the lower id.
6. Errors in the paper: π* for π_θ in Eq 9; the sign of V*(s_0) in Eq 13; section 3.3 has exp(r) for exp(r/β) and
   -Z(x) for +β log Z(x).

    torchrun --nproc-per-node 8 algos/token_dpo_beam.py --model sft/ --train-data pairs.jsonl --output-dir dpo/
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from shared import NonFinite, UserError
from shared.data import Batch, Batches, Needs
from shared.logprobs import sequence_logps
from shared.model import Policy, add_reference_logps, export, load_generator, load_policy, load_tokenizer
from shared.run import Run, command, learning_rate, preference_metrics


@dataclass(kw_only=True)
class Args:
    beta: float = 0.1
    """strength of the pull towards the reference, per nat of log-ratio"""
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

    beam_widths: str = "1,2,5,10,20"
    """beams with which held-out prompts are decoded after training"""
    num_prompts: int = 64
    """held-out prompts that are decoded, the first of the file"""
    max_new_tokens: int = 256
    """tokens of a completion, EOS included"""

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


def token_rewards(token_logps: Tensor, ref_token_logps: Tensor, beta: float) -> Tensor:
    """Eq 11, r(s_t, a_t) of each token. token_logps, ref_token_logps (N,) → (N,)."""
    return beta * (token_logps - ref_token_logps)


def token_dpo_loss(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Eq 9. rewards (N,) of the tokens, completion by completion; lengths (B, 2), the preferred one first → (B,)."""
    returns = sequence_logps(rewards, lengths)  # (B, 2), Σ_t r(s_t, a_t)
    return -F.logsigmoid(returns[:, 0] - returns[:, 1])


def proxy_logps(base_logps: Tensor, proxy_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Eq 14, log π(·|s) of a base steered by a tuned proxy and the proxy's reference, all (..., V) → (..., V)."""
    return (base_logps - beta * ref_logps + beta * proxy_logps).log_softmax(-1)


def objective(model: Policy, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, and what is logged of it."""
    token_logps = model(batch)  # (N,)
    rewards = token_rewards(token_logps, batch.ref_logps, args.beta)
    losses = token_dpo_loss(rewards, batch.lengths)
    metrics = preference_metrics(*(sequence_logps(values, batch.lengths) for values in (rewards, token_logps)))
    for name, values in {"token_rewards": rewards, "negative_tokens": (rewards < 0).float()}.items():
        means = sequence_logps(values, batch.lengths) / batch.lengths  # (B, 2), over each completion's tokens
        metrics |= {f"{name}/chosen": means[:, 0], f"{name}/rejected": means[:, 1]}
    return losses, metrics


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, (R, V) → log-probs (R, k), ids (R, k); of equal ones, the lowest ids."""
    top, ids = logits.topk(k)  # which of equal ones it takes, and in which order, is left open
    if (logits >= top[:, -1:]).sum() > top.numel():
        ids = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    ids = ids.sort(1).values
    ids = ids.gather(1, logits.gather(1, ids).argsort(dim=1, descending=True, stable=True))
    return (logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)).cpu(), ids.cpu()


def advance(beams: list, logps: Tensor, ids: Tensor, width: int, ends: Callable) -> tuple[list, list]:
    """One token more for one prompt.

    beams: (row, token ids, log π) each, best first; logps, ids (beams, k): their likeliest next tokens
    → those that ended, those that go on, in the same form, row being the index of the beam that they continue.
    """
    sums = (torch.tensor([logp for *_, logp in beams], dtype=torch.double)[:, None] + logps).flatten()
    best = sums.argsort(descending=True, stable=True)[: 2 * width]
    found = zip((best // logps.shape[1]).tolist(), ids.flatten()[best].tolist(), sums[best].tolist(), strict=True)
    ended, going = [], []
    for rank, (row, token, logp) in enumerate(found):
        beam = (row, [*beams[row][1], token], logp)
        if not ends(beam[1]):
            going.append(beam)
        elif rank < width:
            ended.append(beam)
    return ended, going[:width]


@torch.inference_mode()
def beam_searches(
    model, prompts: list[list[int]], width: int, max_new_tokens: int, eos_token_id: int, length_penalty: float = 0.0
) -> list[list[tuple[list[int], float]]]:
    """`beam_search` from several prompts at once."""

    def value(beam: tuple, length: int | None = None) -> float:
        return beam[2] / (length or len(beam[1])) ** length_penalty

    def ends(y: list[int]) -> bool:
        return y[-1] == eos_token_id or len(y) == max_new_tokens

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    running, finished, cache = [[(0, [], 0.0)] for _ in prompts], [[] for _ in prompts], None
    while True:
        places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, -ids.shape[1] :]}
        out = model(ids, **places, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found, cache = likeliest(out.logits[:, -1].float(), min(2 * width, out.logits.shape[-1])), out.past_key_values
        if found[0].isnan().any():
            raise NonFinite("beam search: the model's logits are not numbers")
        sizes, rows = [len(beams) for beams in running], []  # rows of the cache that the next step continues
        pieces = [x.split(sizes) for x in found]
        for i, (logps, tokens) in enumerate(zip(*pieces, strict=True)):
            ended, going = advance(running[i], logps, tokens, width, ends)
            finished[i] = sorted(finished[i] + ended, key=value, reverse=True)[:width]
            bound = max_new_tokens if length_penalty > 0 else None  # log π only falls, its mean may rise
            if len(finished[i]) == width and going and value(finished[i][-1]) >= value(going[0], bound):
                going = []
            rows += [sum(sizes[:i]) + row for row, *_ in going]
            running[i] = going
        if not rows:
            return [[(y, logp) for _, y, logp in beams] for beams in finished]
        if rows != list(range(sum(sizes))):
            cache.batch_select_indices(torch.tensor(rows, device=model.device))
        ids = torch.tensor([[y[-1]] for beams in running for _, y, _ in beams], device=model.device)
        mask = torch.cat([mask[rows], torch.ones_like(ids)], 1)


def beam_search(
    model, prompt_ids, width: int, max_new_tokens: int, eos_token_id: int, length_penalty: float = 0.0
) -> list[tuple[list[int], float]]:
    """Eq 13: the completions of a prompt with the highest log π(y|x) / |y|^length_penalty that `width` beams find.

    model: a causal language model of transformers; prompt_ids: a list or tensor of ids → (token ids, log π(y|x)) of
    at most `width` completions, best first, each with its EOS unless it was cut off at `max_new_tokens`. Width 1 is
    greedy (length_penalty 0), |V|^max_new_tokens exhaustive. Raises NonFinite where the model's logits are NaN.
    """
    prompt = torch.as_tensor(prompt_ids).flatten().tolist()
    if not prompt or width < 1 or max_new_tokens < 1:
        raise ValueError("beam search needs a prompt, and a width and max_new_tokens of at least 1")
    return beam_searches(model, [prompt], width, max_new_tokens, eos_token_id, length_penalty)[0]


def held_out_prompts(held_out: Batches | None, config, args: Args) -> dict[int, list[int]]:
    """Row → ids of the prompts to decode. Raises UserError for bad widths, or no room for `--max-new-tokens`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.beam_widths):
        raise UserError(f"--beam-widths {args.beam_widths}: must be numbers above 0 with commas between, as 1,2,5")
    if held_out is None:
        return {}
    groups, positions = held_out.groups, getattr(config, "max_position_embeddings", sys.maxsize)
    slices = zip(groups.rows.tolist(), groups.offsets[: args.num_prompts, :2].tolist(), strict=False)
    prompts = {row: groups.tokens[a:b].tolist() for row, (a, b) in slices if b - a <= positions - args.max_new_tokens}
    if not prompts:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: no prompt of --eval-data leaves room for that many")
    return prompts


def decode(prompts: dict[int, list[int]], tokenizer, run: Run) -> None:
    """The best completion of each width from each prompt, by the exported model, into beams.jsonl."""
    if not prompts:
        return
    text = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    args, place, eos, lines = run.args, run.place, tokenizer.eos_token_id, []
    widths = [int(width) for width in args.beam_widths.split(",")]
    dist.barrier()  # until the model is written
    model = load_generator(str(run.out), place.dtype, place.device)
    mine, size = list(prompts.items())[place.rank :: place.world], max(1, 128 // max(widths))  # sequences at a time
    for start in tqdm(range(0, len(mine), size), "beam search", disable=None if place.main else True):
        some = dict(mine[start : start + size])
        searches = [beam_searches(model, [*some.values()], width, args.max_new_tokens, eos) for width in widths]
        for (row, prompt), *found in zip(some.items(), *searches, strict=True):
            ys, logps = zip(*(hypotheses[0] for hypotheses in found), strict=True)
            line = {"row": row, "prompt": text(prompt), "widths": widths, "completions": [*map(text, ys)]}
            finished = [y[-1] == eos for y in ys]
            lines.append(line | {"finished": finished, "logps": logps, "lengths": [*map(len, ys)]})
    parts = [None] * place.world
    dist.all_gather_object(parts, lines)
    lines = [parts[i % place.world][i // place.world] for i in range(len(prompts))]
    if place.main:
        run.write("beams.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for i, width in enumerate(widths):
        logp, length = (sum(line[name][i] for line in lines) / len(lines) for name in ("logps", "lengths"))
        run.say(f"{len(lines)} prompts, {width} beams: log π(y|x) {logp:.4g} nats, {length:.4g} tokens")


def main(args: Args) -> None:
    run = Run(args)
    tokenizer, config = load_tokenizer(args.model, args.reference)
    train, held_out = run.load_batches(tokenizer, config, Needs(completions=2))
    prompts = held_out_prompts(held_out, config, args)
    model = load_policy(args.model, run.place, args.activation_checkpointing)
    add_reference_logps(args.reference, model, train, held_out, per_token=True)
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
    decode(prompts, tokenizer, run)


if __name__ == "__main__":
    command(main, Args)
