"""Draw K completions per prompt from a policy, with transformers' own `generate`.

Rows of `--rows` (jsonl) need a `prompt`: a string, or chat messages, which go through the tokenizer's chat
template. Rows of `--output` are {"prompt": as it came, "completions": [K texts], "finished": [K booleans]} in
the order of the file; a completion that is not finished was cut off at `--max-new-tokens`, before its EOS.
While the program runs, complete rows stand in `OUTPUT.partial`.

The defaults sample from the policy's own distribution: whatever the model directory's generation_config says
about temperature, top-k and the like is not used.

    python scripts/sample.py --model runs/sft --rows runs/world/prompts.jsonl --output runs/samples.jsonl \\
        --num-completions 2 --max-new-tokens 64
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

import tyro
from tqdm import tqdm

WINDOW = 16  # batches whose sequences are sorted by length together


@dataclass(kw_only=True)
class Args:
    """Draw K completions per prompt from a policy."""

    model: str
    """directory or hub id of the policy"""
    rows: Path
    """jsonl file of rows with a `prompt`"""
    output: Path
    """jsonl file to write"""
    num_completions: int = 1
    """completions per prompt"""
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
    max_rows: int | None = None
    """take the first rows only"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_prompts(path: Path, max_rows: int | None) -> list[str | list[dict]]:
    """The prompts of a jsonl file; one that cannot be read ends the program."""
    prompts = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(islice(file, max_rows), start=1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
                    fail(f"{path}, line {number}: needs a `prompt`, a string or a list of chat messages")
                prompts.append(row["prompt"])
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError as error:
        fail(f"{path}, line {len(prompts) + 1}: {error}")
    return prompts or fail(f"{path}: no rows")


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt, with the tokenizer's special tokens; chat messages by its template."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def make_batches(lengths: list[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences that are generated together.

    Sequences are sorted by length within windows of `WINDOW * batch_size`, so that there is little padding
    and the output can be written in order, with few rows waiting. `lengths` counts prompt and new tokens.
    """
    window = WINDOW * batch_size
    for start in range(0, len(lengths), window):
        indices = range(start, min(start + window, len(lengths)))
        batch = []
        # Longest first: the first sequence of a batch is its width, and memory runs out early if at all.
        for index in sorted(indices, key=lambda i: -lengths[i]):
            full = len(batch) == batch_size or batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens
            if full:
                yield batch
                batch = []
            batch.append(index)
        yield batch


def generate(model, prompts: list[list[int]], config) -> list[list[int]]:
    """New token ids of each prompt, up to and including the first EOS, by the `GenerationConfig` alone."""
    import torch
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
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def end_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and the model's (a chat model has several)."""
    own = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(ids - {None})


def sample(
    model,
    tokenizer,
    prompts: list[list[int]],
    *,
    num_completions: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 128,
    batch_tokens: int = 65_536,
    seed: int = 0,
) -> Iterator[tuple[list[str], list[bool]]]:
    """Yields the K completions of each prompt (token ids), in order, and whether each ended with EOS.

    Sets torch's global seed before every batch, from `seed` and the batch's number.
    """
    import torch
    from transformers import GenerationConfig

    ends = end_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    lengths = [len(ids) + max_new_tokens for ids in prompts for _ in range(num_completions)]
    drawn: dict[int, list[int]] = {}  # sequence k of prompt i under i * num_completions + k
    row = 0
    for number, batch in enumerate(make_batches(lengths, batch_size, batch_tokens)):
        torch.manual_seed(random.Random(f"{seed} {number}").getrandbits(63))
        drawn |= zip(batch, generate(model, [prompts[i // num_completions] for i in batch], config), strict=True)
        while all(row * num_completions + k in drawn for k in range(num_completions)):
            group = [drawn.pop(row * num_completions + k) for k in range(num_completions)]
            yield [decode(tokenizer, ids) for ids in group], [ids[-1] in ends for ids in group]
            row += 1


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a completion, blanks as the model wrote them."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_policy(name: str, dtype: str):
    """Model and tokenizer, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        fail(f"--model {name}: {str(error).splitlines()[0]}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def check_lengths(path: Path, prompts: list[list[int]], max_new_tokens: int, positions: int | None) -> None:
    """Ends the program where a prompt is empty or leaves too few of the model's positions."""
    for number, ids in enumerate(prompts, start=1):
        if not ids:
            fail(f"{path}, line {number}: the prompt has no tokens")
        if positions is not None and len(ids) + max_new_tokens > positions:
            fail(
                f"{path}, line {number}: {len(ids)} prompt tokens and --max-new-tokens {max_new_tokens} "
                f"are more than the model's {positions} positions"
            )


def check_args(args: Args) -> None:
    """Ends the program where a number is out of range."""
    for name in (
        "num_completions",
        "temperature",
        "top_p",
        "repetition_penalty",
        "max_new_tokens",
        "batch_size",
    ):
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')} must be greater than 0")
    if args.top_k < 0 or args.top_p > 1:
        fail("--top-k must be at least 0 and --top-p at most 1")


def main(args: Args) -> None:
    """Reads the prompts, samples, writes the rows."""
    check_args(args)
    rows = read_prompts(args.rows, args.max_rows)
    model, tokenizer = load_policy(args.model, args.dtype)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in rows]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_lengths(args.rows, prompts, args.max_new_tokens, positions)
    drawn = sample(
        model,
        tokenizer,
        prompts,
        num_completions=args.num_completions,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(args.output.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for prompt, (completions, finished) in zip(rows, tqdm(drawn, total=len(rows), unit="row"), strict=True):
            row = {"prompt": prompt, "completions": completions, "finished": finished}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    os.replace(partial, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
