"""log π(y|x) of the completions of rows, in nats, under one or more policies.

Rows are of any form with one or more completions, in all of them equally many: pairs, ranked or sampled completions.
The sum runs over a completion's tokens, with the EOS unless the row says that it was cut off. Writes a json file:

    {"settings": …, "logps": {NAME: [[K numbers] for each row]}}

    python scripts/logps.py --policies dpo=runs/dpo sft=runs/sft --rows pairs.jsonl --output runs/logps.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.lab.commands import checked_command
from scripts.lab.policies import check_tokenizers, encode_all, evaluation_settings, named_policies
from scripts.lab.row_files import first_examples
from scripts.lab.scoring import make_groups, token_logps_of
from shared import UserError
from shared.command import PositiveInt
from shared.distributed import single_process
from shared.encode import Encoder
from shared.files import write_json
from shared.loading import load_policy_from, load_tokenizer

MICRO_BATCH_TOKENS = 8_192


@dataclass(kw_only=True)
class Args:
    """log π(y|x) of the completions of rows."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy; all have one tokenizer"""
    rows: str
    """file, directory or hub id (`path:split`) of the rows"""
    output: Path
    """json file to write"""
    num_rows: PositiveInt = 512
    """rows, the first of the file"""


def main(args: Args) -> None:
    """Compute and write the log-probs. Raises UserError for rows or policies that cannot be used."""
    policies = named_policies(args.policies)
    first = next(iter(policies.values()))
    check_tokenizers(list(policies.values()), first)
    examples = first_examples(args.rows, args.num_rows)
    numbers = {len(example.completions) for example in examples}
    if len(numbers) > 1 or 0 in numbers:
        counts = " and ".join(map(str, sorted(numbers)))
        raise UserError(f"--rows {args.rows}: rows need completions, equally many in each; these have {counts}")

    tokenizer, config = load_tokenizer(first)
    room = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    groups = make_groups(encode_all(args.rows, examples, Encoder(tokenizer), room, completions=True))
    logps = {}
    with single_process("float32") as ranks:
        for name, path in policies.items():
            policy = load_policy_from(path, ranks)
            token_logps = token_logps_of(policy, groups, MICRO_BATCH_TOKENS, ranks)
            logps[name] = [[float(tokens.nansum()) for tokens in completions] for completions in token_logps]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = evaluation_settings(args, first, len(examples))
    write_json(args.output, {"settings": settings, "logps": logps})
    print(f"written: {args.output}")


if __name__ == "__main__":
    checked_command(main, Args)
