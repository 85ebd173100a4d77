"""Draw completions from a policy, with transformers' own `generate`.

    --num-completions K     writes {"prompt", "completions": [K texts], "finished": [K booleans]}
    --reference-samples M   writes every row as it came, with `reference_samples` and `reference_samples_finished`

Rows are of any form that training reads, or have a `prompt` alone, and are written in the order of the file. A
completion that is not finished was cut off at `--max-new-tokens`, before its EOS. A prompt that leaves the model too
few positions is dropped and counted. A run that was killed continues from OUTPUT.partial, with the same draws as
without the interruption; under torchrun every process draws for its share of the rows.

The defaults sample from the policy's own distribution: whatever the model directory's generation_config says
about temperature, top-k and the like is not used.

With `--proxy`, a small tuned model and what it was tuned from steer the policy, which may be much larger, at every
token: π(a|s) ∝ π_model(a|s) (π_proxy(a|s) / π_proxy-reference(a|s))^β, Eq 14 of arXiv 2404.12358. Temperature, top-k
and top-p apply to that; the repetition penalty to the policy's own logits, before.

    python scripts/sample.py --model runs/sft --rows runs/world/prompts.jsonl --output runs/samples.jsonl \\
        --num-completions 2 --max-new-tokens 64
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import streaming
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from algos.token_dpo_beam import proxy_logps
from shared import UserError
from shared.data import Encoder
from shared.rows import Text, Turn
from shared.run import command

WINDOW = 4  # batches whose sequences are sorted by length together


@dataclass(kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """divides the logits"""
    top_k: int = 0
    """sample among the k likeliest tokens only; 0 for all, 1 is greedy"""
    top_p: float = 1.0
    """sample among the likeliest tokens that hold this probability together; 1 for all"""
    repetition_penalty: float = 1.0
    """divides positive and multiplies negative logits of tokens seen before; 1 for none"""
    max_new_tokens: int = 256
    """tokens of a completion, EOS included"""
    batch_size: int = 128
    """sequences that are generated together, at most"""
    batch_tokens: int = 65_536
    """tokens of them together, prompt, completion and padding, at most (but one sequence always fits)"""
    seed: int = 0
    """seed of the draws"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """the model's number format"""

    def __post_init__(self) -> None:
        if self.top_p > 1:
            raise UserError(f"--top-p {self.top_p}: must be at most 1")


@dataclass(kw_only=True)
class Args(Sampling):
    """Draw completions from a policy."""

    model: str
    """directory or hub id of the policy"""
    rows: str
    """file, directory or hub id (`path:split`) of the rows"""
    output: Path
    """jsonl file to write"""
    num_completions: int | None = None
    """completions per prompt, as rows of their own"""
    reference_samples: int | None = None
    """completions per prompt, as `reference_samples` beside what the rows hold"""
    max_rows: int | None = None
    """take the first rows only"""
    proxy: str | None = None
    """directory or hub id of a tuned model that steers the policy"""
    proxy_reference: str | None = None
    """directory or hub id of what the proxy was tuned from"""
    beta: float | None = None
    """how far the proxy steers, the exponent β; 0 is the policy itself"""


def make_batches(lengths: list[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences that are generated together, of similar lengths (prompt and new tokens)."""
    batch = []
    # Longest first: the first sequence of a batch is its width, and memory runs out early if at all.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if len(batch) == batch_size or batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


class Steering:
    """What `generate` draws from in place of the policy's own distribution: Eq 14 of arXiv 2404.12358.

    pair: the proxy and its reference; mask (B, T): 1 for the prompts' tokens, 0 for the padding on their left.
    """

    def __init__(self, pair: list, beta: float, mask: Tensor):
        self.pair, self.beta, self.mask, self.seen, self.caches = pair, beta, mask, 0, [None, None]

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """All tokens so far (B, T), the policy's logits of the next one (B, V) → log π (B, V)."""
        new, self.seen = slice(self.seen, None), input_ids.shape[1]
        mask = F.pad(self.mask, (0, self.seen - self.mask.shape[1]), value=1)
        places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, new]}
        found = [logits]
        for i, model in enumerate(self.pair):
            past = {"past_key_values": self.caches[i], "use_cache": True}
            out = model(input_ids[:, new], **places, **past, logits_to_keep=1)
            self.caches[i] = out.past_key_values
            found.append(out.logits[:, -1].float())
        shared = min(x.shape[1] for x in found)  # models of one family pad their embeddings to different sizes
        logps = proxy_logps(*(x[:, :shared].log_softmax(-1) for x in found), self.beta)
        return F.pad(logps, (0, logits.shape[1] - shared), value=-torch.inf)


def generate(model, prompts: list[list[int]], config, steer: Callable | None = None) -> list[list[int]]:
    """New token ids of each prompt, up to and including the first EOS, by the `GenerationConfig` alone.

    steer: makes a `Steering` of the mask.
    """
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    # The mask hides the padding from the model, but not from the repetition penalty: a token that the prompt
    # holds anyway changes nothing there.
    input_ids = [[ids[0]] * (width - len(ids)) + ids for ids in prompts]
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    # `generate` fills what a given config leaves open from the model's own, so that one steps aside.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            torch.tensor(input_ids, device=model.device),
            attention_mask=mask,
            generation_config=config,
            logits_processor=[steer(mask)] if steer else None,
        )
    finally:
        model.generation_config = own
    return [cut_after(ids, config.eos_token_id) for ids in output[:, width:].tolist()]


def cut_after(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` up to and including the first of `ends`, or all of them."""
    return ids[: next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))]


def end_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and the model's (a chat model has several)."""
    own = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(ids - {None})


def draw(
    model,
    ends: list[int],
    prompts: list[list[int]],
    count: int,
    how: Sampling,
    window: int = 0,
    progress: str | None = None,
    steer: Callable | None = None,
) -> Iterator[list[list[int]]]:
    """Yields `count` completions of each prompt, token ids with the EOS that ended them, in order.

    Sets torch's global seed before every batch, from the seed, the window's number and the batch's.
    """
    from transformers import GenerationConfig

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
    options = {name: getattr(how, name) for name in names}
    config = GenerationConfig(do_sample=True, eos_token_id=ends, pad_token_id=ends[0], **options)
    lengths = [len(ids) + how.max_new_tokens for ids in prompts for _ in range(count)]
    drawn: dict[int, list[int]] = {}  # completion k of prompt i under i * count + k
    batches = list(make_batches(lengths, how.batch_size, how.batch_tokens))
    for number, batch in enumerate(tqdm(batches, progress, unit="batch", disable=progress is None)):
        torch.manual_seed(random.Random(f"{how.seed} {window} {number}").getrandbits(63))
        drawn |= zip(batch, generate(model, [prompts[i // count] for i in batch], config, steer), strict=True)
    for i in range(len(prompts)):
        yield [drawn[i * count + k] for k in range(count)]


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a completion, blanks as the model wrote them."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load(path: str, dtype: str):
    """Model, tokenizer and the ids that end a completion, on this process's GPU if there is one."""
    from shared.model import load_generator, load_tokenizer

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    tokenizer, model = load_tokenizer(path)[0], load_generator(path, getattr(torch, dtype), device)
    if not (ends := end_ids(model, tokenizer)):
        raise UserError(f"model {path}: the tokenizer has no EOS token; set one so that completions can end")
    return model, tokenizer, ends


def load_pair(proxy: str, reference: str, dtype: str, tokenizer) -> tuple[list, set[int]]:
    """Proxy and reference, and the ids that end their completions. Raises UserError where ids mean other tokens."""
    pair, ends = [], set()
    for flag, path in {"--proxy": proxy, "--proxy-reference": reference}.items():
        model, own, more = load(path, dtype)
        if own.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{flag} {path}: has another tokenizer than the policy that it would steer")
        pair.append(model)
        ends.update(more)
    return pair, ends


def room(model, max_new_tokens: int) -> int:
    """One more than the longest prompt that leaves positions for all new tokens. Raises UserError where none does."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if max_new_tokens >= positions:
        raise UserError(f"--max-new-tokens {max_new_tokens}: the model has {positions} positions, with the prompt's")
    return positions - max_new_tokens + 1


def as_written(prompt: Text, encoder: Encoder) -> str | list[dict]:
    """A prompt in the form in which `prompt`, `completions` rows mean the same tokens."""
    if not isinstance(prompt, Turn):
        return prompt
    return [{"role": "user", "content": str(prompt)}] if encoder.is_chat(prompt) else f"{prompt}\n\n"


def main(args: Args) -> None:
    """Reads the rows, samples, writes rows."""
    if (args.num_completions is None) == (args.reference_samples is None):
        raise UserError("give either --num-completions or --reference-samples")
    proxy = [args.proxy, args.proxy_reference]
    if len({value is None for value in (*proxy, args.beta)}) > 1:
        raise UserError("--proxy, --proxy-reference and --beta go together: give all three or none")
    total, paths = streaming.check(args.rows, args.max_rows), [args.model, *filter(None, proxy)]
    made_with = streaming.settings(args, *paths)
    model, tokenizer, ends = load(args.model, args.dtype)
    pair, more = load_pair(*proxy, args.dtype, tokenizer) if args.proxy else ([], ())
    ends, steer = sorted({*ends, *more}), partial(Steering, pair, args.beta) if pair else None
    per_prompt, encoder, dropped = args.num_completions or args.reference_samples, Encoder(tokenizer), Counter()

    def compute(number: int, window: list[streaming.Row]) -> Iterator[dict]:
        drawn = draw(model, ends, [row.prompt for row in window], per_prompt, args, number, steer=steer)
        for row, ids in zip(window, drawn, strict=True):
            texts, finished = [decode(tokenizer, y) for y in ids], [y[-1] in ends for y in ids]
            if args.num_completions:
                yield {"prompt": as_written(row.example.prompt, encoder), "completions": texts, "finished": finished}
            else:
                yield row.own | {"reference_samples": texts, "reference_samples_finished": finished}

    examples = streaming.read(args.rows, dropped, args.max_rows)
    space = min(room(m, args.max_new_tokens) for m in (model, *pair))
    rows = streaming.encode(examples, tokenizer, dropped, space)
    size = max(1, WINDOW * args.batch_size // per_prompt)
    kept = streaming.write(args.output, made_with, rows, size, compute, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(streaming.summary(args.rows, kept, dropped))


if __name__ == "__main__":
    command(main, Args)
