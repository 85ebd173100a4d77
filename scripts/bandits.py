"""All statements of the papers that can be checked exactly: runs the files of scripts/papers one after another.

python scripts/bandits.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.lab.claim_files import exit_if_any, run_paper
from scripts.lab.commands import checked_command
from scripts.papers import distillation, dpo, exo, r_to_q, typo

PAPERS = (dpo.PAPER, exo.PAPER, typo.PAPER, distillation.PAPER, r_to_q.PAPER)


@dataclass(kw_only=True)
class Args:
    """Check the statements of all papers."""

    output_dir: Path = Path("runs/bandits")
    """directory of the JSON files and the figures"""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # as the papers' own commands do
    surprises = []
    for paper in PAPERS:
        surprises += run_paper(paper, args.output_dir)
        print()
    exit_if_any(surprises)


if __name__ == "__main__":
    checked_command(main, Args)
