"""The log π(y|x) of given completions under several policies, in nats, each at temperature 1.

Rows have `completions` [K], as sample.py writes them; K may be 1, and any other form of training will do. Drawn ids are
kept. The file holds [K] numbers for each row, under the name of each policy.

    python scripts/logps.py --policies sft=runs/sft exo=runs/exo --rows runs/samples.jsonl --output runs/logps.json
"""

from dataclasses import dataclass
from pathlib import Path

from scripts.lab.commands import checked_command
from scripts.lab.policies import MICRO_BATCH_TOKENS, check_tokenizers, encode_all, named_policies
from scripts.lab.row_files import read_examples
from scripts.lab.scoring import make_groups, over_groups
from shared import UserError
from shared.distributed import single_process
from shared.encode import Encoder
from shared.files import write_json
from shared.groups import full_attention_length
from shared.loading import load_policy_from, load_tokenizer
from shared.rows import Counts


@dataclass(kw_only=True)
class Args:
    """Log-probs of given completions."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy"""
    rows: str
    """file, directory or hub id (`path:split`) of the rows, which have equally many completions"""
    output: Path
    """json file to write"""


def main(args: Args) -> None:
    """Read the rows, and write the log-probs under each policy."""
    directories = named_policies(args.policies)
    paths = list(directories.values())
    check_tokenizers(paths, paths[0])
    examples = list(read_examples(args.rows, Counts()))
    sizes = {len(example.completions) for example in examples}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"{args.rows}: needs rows with equally many completions, at least one each")

    logps = {}
    with single_process("float32") as ranks:
        tokenizer, _ = load_tokenizer(paths[0])
        for name, path in directories.items():
            policy = load_policy_from(path, ranks)
            room = full_attention_length(policy.lm.config)
            rows = encode_all(args.rows, examples, Encoder(tokenizer), room, completions=True)
            values = over_groups(policy, policy.logps, make_groups(rows), MICRO_BATCH_TOKENS, ranks)
            logps[name] = values.tolist()
    write_json(args.output, {"rows": args.rows, "logps": logps})


if __name__ == "__main__":
    checked_command(main, Args)
