"""Completions of a policy: sampled by the `generate` of transformers, or found by beam search.

    --num-completions K     writes {"prompt", "completions": [K texts], "finished": [K booleans], "logps": [K numbers],
                            "completion_ids", "vocabulary"}
    --reference-samples M   writes every row as it came, with `reference_samples`, `reference_samples_finished`,
                            `reference_sample_ids` and `reference_vocabulary`

The ids are those that were drawn, with the end. Training, scoring and evaluation use them where the vocabulary, whose
hash stands beside them, is their own; a text alone may be encoded otherwise. `logps` are log π(y|x) in nats, of the
policy itself at temperature 1, whatever changed the distribution that was sampled from. A completion that was cut off
has the log-prob of the tokens that it has.

Rows are of any form that training reads, or have a `prompt` alone. They are written in the order of the file. A
completion that is not finished was cut off at `--max-new-tokens`, before its EOS. A prompt that leaves the model too
few positions is dropped and counted. A run that was killed continues from OUTPUT.partial and gives the rows that it
would have given without the interruption. Under torchrun every process takes its share of the rows.

The defaults sample from the policy's own distribution. The values of temperature, top-k and the like in the model
directory's generation_config are not used.

With `--beams W`, nothing is drawn. A row gets the K ≤ W completions of the highest log π(y|x) / |y|^P that W beams
find, best first, by the search of algos/token_dpo_beam.py (Eq 13 of arXiv 2404.12358). P is `--length-penalty`, and |y|
counts the tokens with the EOS. With W = 1 and P = 0 the search is greedy. A row has fewer than K completions only if
fewer are possible.

With `--proxy`, a small tuned model and the model that it was tuned from steer the policy, which may be much larger, at
every token: π(a|s) ∝ π_model(a|s) (π_proxy(a|s) / π_proxy-reference(a|s))^β, Eq 14 of arXiv 2404.12358. Temperature,
top-k and top-p apply to the result; the repetition penalty applies to the policy's own logits. `logps` are those of
the steered policy.

    python scripts/sample.py --model runs/sft --rows runs/world/prompts.jsonl --output runs/samples.jsonl \\
        --num-completions 2 --max-new-tokens 64
    python scripts/sample.py --model runs/dpo --rows runs/world/prompts.jsonl --output runs/beams.jsonl \\
        --num-completions 1 --beams 5 --max-new-tokens 64
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
    sample_with_logps,
    search_completions,
)
from shared import UserError
from shared.command import Above, AtLeast
from shared.encode import Encoder, completion_text
from shared.rows import Example

WINDOW_BATCHES = 4  # batches whose sequences are sorted by length together
# Flags that change the distribution that is sampled from.
OF_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(kw_only=True)
class Args(Sampling):
    """Sample completions from a policy, or search them."""

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
    beams: Annotated[int | None, Above(0)] = None
    """search with so many beams instead of sampling"""
    length_penalty: Annotated[float | None, AtLeast(0)] = None
    """of a search, the power of a completion's length that divides its log-prob; default: 0"""
    max_rows: Annotated[int | None, Above(0)] = None
    """take the first rows only"""
    proxy: str | None = None
    """directory or hub id of a tuned model that steers the policy"""
    proxy_reference: str | None = None
    """directory or hub id of the model that the proxy was tuned from"""
    beta: Annotated[float | None, AtLeast(0)] = None
    """how far the proxy steers, the exponent β; 0 is the policy itself"""


def main(args: Args) -> None:
    """Read the rows, sample or search, write rows."""
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
        if args.beams is None:
            drawn_of_rows = sample_with_logps(model, eos_ids, prompts, count, args, number, steer=steer)
        else:
            penalty = args.length_penalty or 0.0
            drawn_of_rows = search_completions(model, eos_ids, prompts, count, args.beams, penalty, args)
        for row, drawn in zip(window, drawn_of_rows, strict=True):
            completions = [ids for ids, _ in drawn]
            texts = [completion_text(tokenizer, row.prompt, ids) for ids in completions]
            finished = [ids[-1] in eos_ids for ids in completions]
            if args.num_completions:
                columns = {"completions": texts, "finished": finished, "logps": [logp for _, logp in drawn]}
                columns |= {"completion_ids": completions, "vocabulary": encoder.vocabulary}
                yield new_row(row.example, encoder, columns)
            else:
                yield row.example.row | {
                    "reference_samples": texts,
                    "reference_samples_finished": finished,
                    "reference_sample_ids": completions,
                    "reference_vocabulary": encoder.vocabulary,
                }

    examples = read_examples(args.rows, encoder.counts, args.max_rows)
    rows = encode_rows(examples, encoder, room)
    window_size = max(1, WINDOW_BATCHES * args.batch_size // (args.beams or count))
    kept = write_windows(args.output, settings, rows, window_size, compute, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary(args.rows, kept, encoder.counts))


def new_row(example: Example, encoder: Encoder, columns: dict) -> dict:
    """A row of completions, which `columns` hold, and of a prompt that means the same tokens as the example's."""
    row: dict = {"prompt": as_written(example.prompt, encoder)}
    if example.tools:
        row["tools"] = example.tools
    return row | columns


def check_combinations(args: Args) -> None:
    """Raise UserError unless one form of output is chosen, and flags that go together are given together."""
    if (args.num_completions is None) == (args.reference_samples is None):
        raise UserError("give either --num-completions or --reference-samples")
    is_missing = {value is None for value in (args.proxy, args.proxy_reference, args.beta)}
    if len(is_missing) > 1:
        raise UserError("--proxy, --proxy-reference and --beta go together: give all three or none")
    if args.beams is None and args.length_penalty is not None:
        raise UserError("--length-penalty is of beam search: give --beams too")
    if args.beams is not None:
        check_search(args, args.beams)


def check_search(args: Args, beams: int) -> None:
    """Raise UserError for a flag that beam search has no use for, and for more completions than beams."""
    if args.num_completions is None:
        raise UserError("--reference-samples are drawn, not searched: leave --beams out, or give --num-completions")
    if args.num_completions > beams:
        raise UserError(f"--num-completions {args.num_completions}: {beams} beams find at most {beams}; raise --beams")
    if args.proxy is not None:
        raise UserError("--proxy steers what is sampled: leave it or --beams out")
    for name in OF_SAMPLING:
        value = getattr(args, name)
        if value != getattr(Sampling, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} changes what is sampled, and --beams samples nothing: leave one out")


if __name__ == "__main__":
    checked_command(main, Args)
