"""Sample completions from a policy, by the `generate` of transformers.

    --num-completions K     writes {"prompt", "completions": [K texts], "finished": [K booleans], "completion_ids",
                            "vocabulary"}
    --reference-samples M   writes every row as it came, with `reference_samples`, `reference_samples_finished`,
                            `reference_sample_ids` and `reference_vocabulary`

The ids are those that were drawn, with the end. Training, scoring and evaluation use them where the vocabulary, whose
hash stands beside them, is their own; a text alone may be encoded otherwise.

Rows are of any form that training reads, or have a `prompt` alone. They are written in the order of the file. A
completion that is not finished was cut off at `--max-new-tokens`, before its EOS. A prompt that leaves the model too
few positions is dropped and counted. A run that was killed continues from OUTPUT.partial and gives the samples that it
would have given without the interruption. Under torchrun every process samples for its share of the rows.

The defaults sample from the policy's own distribution. The values of temperature, top-k and the like in the model
directory's generation_config are not used.

With `--proxy`, a small tuned model and the model that it was tuned from steer the policy, which may be much larger, at
every token: π(a|s) ∝ π_model(a|s) (π_proxy(a|s) / π_proxy-reference(a|s))^β, Eq 14 of arXiv 2404.12358. Temperature,
top-k and top-p apply to the result; the repetition penalty applies to the policy's own logits.

    python scripts/sample.py --model runs/sft --rows runs/world/prompts.jsonl --output runs/samples.jsonl \\
        --num-completions 2 --max-new-tokens 64
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

from scripts.lab.commands import checked_command
from scripts.lab.row_files import (
    EncodedRow,
    count_rows,
    encode_rows,
    read_examples,
    refuse_existing,
    settings_of,
    summary,
    write_windows,
)
from scripts.lab.sampling import (
    Sampling,
    Steering,
    as_written,
    load_proxies,
    load_sampler,
    prompt_room,
    sample_completions,
)
from shared import UserError
from shared.command import Above, AtLeast
from shared.encode import Encoder, completion_text
from shared.rows import Example

WINDOW_BATCHES = 4  # batches whose sequences are sorted by length together


@dataclass(kw_only=True)
class Args(Sampling):
    """Sample completions from a policy."""

    model: str
    """directory or hub id of the policy"""
    rows: str
    """file, directory or hub id (`path:split`) of the rows"""
    output: Path
    """jsonl file to write"""
    num_completions: Annotated[int | None, Above(0)] = None
    """completions per prompt, as rows of their own"""
    reference_samples: Annotated[int | None, Above(0)] = None
    """completions per prompt, as `reference_samples` beside the columns of the rows"""
    max_rows: Annotated[int | None, Above(0)] = None
    """take the first rows only"""
    proxy: str | None = None
    """directory or hub id of a tuned model that steers the policy"""
    proxy_reference: str | None = None
    """directory or hub id of the model that the proxy was tuned from"""
    beta: Annotated[float | None, AtLeast(0)] = None
    """how far the proxy steers, the exponent β; 0 is the policy itself"""


def main(args: Args) -> None:
    """Read the rows, sample, write rows."""
    check_combinations(args)
    total = count_rows(args.rows, args.max_rows)
    models = [args.model]
    if args.proxy is not None:
        models += [args.proxy, args.proxy_reference]
    settings = settings_of(args, *models)
    refuse_existing([args.output], settings)

    model, tokenizer, eos_ids = load_sampler(args.model, args.dtype)
    room = prompt_room(model, args.max_new_tokens)
    steer = None
    if args.proxy is not None:
        pair, eos_ids_of_pair = load_proxies(args.proxy, args.proxy_reference, args.dtype, tokenizer)
        eos_ids = sorted(eos_ids_of_pair.union(eos_ids))
        room = min(room, *(prompt_room(proxy, args.max_new_tokens) for proxy in pair))
        steer = partial(Steering, pair, args.beta)

    count = args.num_completions or args.reference_samples
    encoder = Encoder(tokenizer, today=date.fromisoformat(settings["date"]))

    def compute(number: int, window: list[EncodedRow]) -> Iterator[dict]:
        prompts = [row.prompt for row in window]
        samples = sample_completions(model, eos_ids, prompts, count, args, number, steer=steer)
        for row, completions in zip(window, samples, strict=True):
            texts = [completion_text(tokenizer, row.prompt, ids) for ids in completions]
            finished = [ids[-1] in eos_ids for ids in completions]
            if args.num_completions:
                yield new_row(row.example, encoder, texts, finished, completions)
            else:
                yield row.example.row | {
                    "reference_samples": texts,
                    "reference_samples_finished": finished,
                    "reference_sample_ids": completions,
                    "reference_vocabulary": encoder.vocabulary,
                }

    examples = read_examples(args.rows, encoder.counts, args.max_rows)
    rows = encode_rows(examples, encoder, room)
    window_size = max(1, WINDOW_BATCHES * args.batch_size // count)
    kept = write_windows(args.output, settings, rows, window_size, compute, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary(args.rows, kept, encoder.counts))


def new_row(example: Example, encoder: Encoder, texts: list[str], finished: list[bool], ids: list[list[int]]) -> dict:
    """A row of completions, whose prompt means the same tokens as the example's."""
    row: dict = {"prompt": as_written(example.prompt, encoder)}
    if example.tools:
        row["tools"] = example.tools
    row |= {"completions": texts, "finished": finished}
    return row | {"completion_ids": ids, "vocabulary": encoder.vocabulary}


def check_combinations(args: Args) -> None:
    """Raise UserError unless one form of output is chosen and the flags of the proxy are complete."""
    if (args.num_completions is None) == (args.reference_samples is None):
        raise UserError("give either --num-completions or --reference-samples")
    is_missing = {value is None for value in (args.proxy, args.proxy_reference, args.beta)}
    if len(is_missing) > 1:
        raise UserError("--proxy, --proxy-reference and --beta go together: give all three or none")


if __name__ == "__main__":
    checked_command(main, Args)
