"""Draw completions from a policy, with transformers' own `generate`.

    --num-completions K     writes {"prompt", "completions": [K texts], "finished": [K booleans]}
    --reference-samples M   writes every row as it came, with `reference_samples` and `reference_samples_finished`

Rows are of any form that training reads, or have a `prompt` alone, and are written in the order of the file. A
completion that is not finished was cut off at `--max-new-tokens`, before its EOS. A prompt that leaves the model too
few positions is dropped and counted. A run that was killed continues from OUTPUT.partial, with the same draws as
without the interruption; under torchrun every process draws for its share of the rows.

The defaults sample from the policy's own distribution: whatever the model directory's generation_config says
about temperature, top-k and the like is not used.

    python scripts/sample.py --model runs/sft --rows runs/world/prompts.jsonl --output runs/samples.jsonl \\
        --num-completions 2 --max-new-tokens 64
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import streaming
import torch
from tqdm import tqdm

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


def generate(model, prompts: list[list[int]], config) -> list[list[int]]:
    """New token ids of each prompt, up to and including the first EOS, by the `GenerationConfig` alone."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    # The mask hides the padding from the model, but not from the repetition penalty: a token that the prompt
    # holds anyway changes nothing there.
    input_ids = [[ids[0]] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    # `generate` fills what a given config leaves open from the model's own, so that one steps aside.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            torch.tensor(input_ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
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
        drawn |= zip(batch, generate(model, [prompts[i // count] for i in batch], config), strict=True)
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
    total, made_with = streaming.check(args.rows, args.max_rows), streaming.settings(args, args.model)
    model, tokenizer, ends = load(args.model, args.dtype)
    per_prompt, encoder, dropped = args.num_completions or args.reference_samples, Encoder(tokenizer), Counter()

    def compute(number: int, window: list[streaming.Row]) -> Iterator[dict]:
        drawn = draw(model, ends, [row.prompt for row in window], per_prompt, args, number)
        for row, ids in zip(window, drawn, strict=True):
            texts, finished = [decode(tokenizer, y) for y in ids], [y[-1] in ends for y in ids]
            if args.num_completions:
                yield {"prompt": as_written(row.example.prompt, encoder), "completions": texts, "finished": finished}
            else:
                yield row.own | {"reference_samples": texts, "reference_samples_finished": finished}

    examples = streaming.read(args.rows, dropped, args.max_rows)
    rows = streaming.encode(examples, tokenizer, dropped, room(model, args.max_new_tokens))
    size = max(1, WINDOW * args.batch_size // per_prompt)
    kept = streaming.write(args.output, made_with, rows, size, compute, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(streaming.summary(args.rows, kept, dropped))


if __name__ == "__main__":
    command(main, Args)
