"""Every algorithm on the notices, from the same model and rows, in one table.

Makes the notices, an SFT model, a reward model and an ensemble of three on random thirds of its rows, pairs of the SFT
model's own completions with their scores and with samples of it, trains all algorithms on them, and compares the
policies on held-out prompts. Each stage is a command of its own. It is shown as it starts, and also works by hand.
`family.md` and `family.json` hold the tables, `results.json` is written by scripts/evaluate.py. After an interruption
the program continues after the last finished stage, if the arguments are the same.

The reward models learn from rankings of eight made-up summaries, which Plackett-Luce draws from the oracle. They have
to look every fact up in the post, which takes many more summaries than a policy needs that can do it already. Each
fact is wrong independently of the others, so that no fact explains preferences from which another is to be learned.

The accuracy that no reward model can exceed on pairs drawn by Bradley-Terry is listed next to theirs as the ceiling:
the mean over held-out pairs of max(σ(Δr), σ(-Δr)), with Δr from the oracle.

    python scripts/family.py
"""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

from scripts.lab import notices
from scripts.lab.commands import ROOT, checked_command
from scripts.lab.policies import MEASURES, comparison_rows
from scripts.lab.row_files import read_jsonl
from scripts.lab.stages import Stages, shell_path
from scripts.lab.statistics import interval_text, mean_and_interval
from scripts.lab.tables import markdown_table
from shared import UserError
from shared.command import Above, AtLeast
from shared.files import write_text

RECORD = "family.json"  # the commands that were run and the numbers; it also marks the directory as this program's own
ENSEMBLE = ("rm_0", "rm_1", "rm_2")
NUM_RANKED = 36_000  # rows of the reward model
NUM_SUMMARIES = 8  # in each of these rows


class Training(NamedTuple):
    """One training: `rows` and `model` name a file and a directory in the output directory."""

    algorithm: str
    rows: str
    options: str
    model: str = "sft"

    def command_line(self, out: str, name: str, steps: int, learning_rate: float, seed: int) -> str:
        """The command line that trains {out}/`name`."""
        paths = f"--model {out}/{self.model} --train-data {out}/{self.rows}.jsonl --output-dir {out}/{name}"
        schedule = f"--max-steps {steps} --learning-rate {learning_rate} --warmup-steps {steps // 12}"
        return f"algos/{self.algorithm}.py {paths} {schedule} --save-every 0 --seed {seed} {self.options}"


# The oracle's rewards are in nats of preference, so that the optimum of DPO and of the distillation losses is
# π_ref exp(r/β); exo has the same optimum if β_π β_r = β. IPO's gap is that of a reward gap of 1 (τ = β/2), and ε is
# about the share of pairs that the noise turned around.
POLICIES = {
    "dpo": Training("dpo", "pairs", "--beta 0.3"),
    "ipo": Training("ipo", "pairs", "--tau 0.15"),
    "exo-pref": Training("exo", "pairs", "--beta 0.3 --epsilon 0.2"),
    "exo-rw": Training("exo", "four_scored", "--beta 0.3 --beta-r 1"),
    "typo": Training("typo", "reference", "--lam 0.1"),
    "distill_dpo": Training("distill_dpo", "scored", "--beta 0.3"),
    "pessimistic_dpo": Training("pessimistic_dpo", "reference", "--beta 0.3 --gamma-start 1e-3 --gamma-end 1e-1"),
    "ensemble_dpo": Training("ensemble_dpo", "ensemble", "--beta 0.3"),
}


@dataclass(kw_only=True)
class Args:
    """Every algorithm on the notices, in one table."""

    output_dir: Path = ROOT / "runs" / "family"
    """where everything is written; what an earlier run with other arguments left there is removed"""
    steps: Annotated[int, Above(0)] = 60
    """optimizer steps of every policy, of 64 rows each; SFT takes 16 times as many, the reward model 36 times, those of
    the ensemble 12 times, of 16 rows each"""
    num_prompts: Annotated[int, Above(0)] = 256
    """held-out prompts, with 4 completions of every policy"""
    max_rows: Annotated[int | None, Above(0)] = None
    """take no more rows and prompts, to try the program out"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the notices, the thirds, the order of the rows, the samples and the bootstrap"""


# ---------------------------------------------------------------- the stages


def command_lines(out: str, args: Args) -> list[str]:
    """The stages in order, as they can be typed in the repository root. `out` is the output directory."""
    return [
        *pair_lines(out, args),
        *reward_model_lines(out, args),
        *row_lines(out, args),
        *policy_lines(out, args),
        evaluation_line(out, args),
    ]


def max_prompts(args: Args) -> int:
    """Prompts that the SFT model answers twice, at most."""
    return args.max_rows or 4096


def sampling_line(out: str, args: Args) -> str:
    """The start of every command line that samples from the SFT model."""
    return f"scripts/sample.py --model {out}/sft --max-new-tokens 40 --seed {args.seed}"


def pair_lines(out: str, args: Args) -> list[str]:
    """The notices, the SFT model, and pairs of its completions, for training and held out."""
    sft_rows = args.max_rows or 64_000
    sft = Training("sft", "world/sft", "--log-every 50", model="world/base")
    sampling = f"{sampling_line(out, args)} --num-completions 2"
    limit = f"--max-rows {max_prompts(args)}"
    prefer = f"scripts/notices.py prefer --seed {args.seed}"
    return [
        f"scripts/notices.py world --output-dir {out}/world --sft-rows {sft_rows} --seed {args.seed}",
        sft.command_line(out, "sft", 16 * args.steps, 2e-3, args.seed),
        f"{sampling} --rows {out}/world/prompts.jsonl {limit} --output {out}/two.jsonl",
        f"{prefer} --rows {out}/two.jsonl --output {out}/pairs.jsonl",
        f"{sampling} --rows {out}/world/held_out.jsonl {limit} --output {out}/held_out_two.jsonl",
        f"{prefer} --rows {out}/held_out_two.jsonl --output {out}/held_out_pairs.jsonl",
    ]


def reward_model_lines(out: str, args: Args) -> list[str]:
    """The reward model and the ensemble."""
    evaluation = f"--eval-every 360 --eval-data {out}/held_out_pairs.jsonl"
    options = f"--batch-size 16 --log-every 100 {evaluation}"
    learning_rate = 5e-4

    reward_model = Training("rm", "ranked", options)
    lines = [reward_model.command_line(out, "rm", 36 * args.steps, learning_rate, args.seed)]
    for i, name in enumerate(ENSEMBLE):
        member = Training("rm", f"third_{i}", options)
        lines.append(member.command_line(out, name, 12 * args.steps, learning_rate, args.seed + i))
    return lines


def row_lines(out: str, args: Args) -> list[str]:
    """The rows of the algorithms that need more than pairs: scores, samples, and four completions."""
    ensemble = " ".join(f"{out}/{name}" for name in ENSEMBLE)
    score = "scripts/score.py --rows"
    sampling = sampling_line(out, args)
    four_limit = min(args.max_rows or 2048, 2048)
    return [
        f"{score} {out}/held_out_pairs.jsonl --output {out}/held_out_scored.jsonl --reward-models {out}/rm {ensemble}",
        f"{score} {out}/pairs.jsonl --output {out}/scored.jsonl --reward-models {out}/rm",
        f"{score} {out}/pairs.jsonl --output {out}/ensemble.jsonl --reward-models {ensemble}",
        f"{sampling} --reference-samples 1 --rows {out}/pairs.jsonl --output {out}/reference.jsonl",
        f"{sampling} --num-completions 4 --rows {out}/world/prompts.jsonl --max-rows {four_limit} "
        f"--output {out}/four.jsonl",
        f"{score} {out}/four.jsonl --output {out}/four_scored.jsonl --reward-models {out}/rm",
    ]


def policy_lines(out: str, args: Args) -> list[str]:
    """Every algorithm, from the SFT model."""
    lines = []
    for name, training in POLICIES.items():
        lines.append(training.command_line(out, name, args.steps, 1e-4, args.seed))
    return lines


def evaluation_line(out: str, args: Args) -> str:
    """The comparison of the policies, SFT first."""
    named = " ".join(f"{name}={out}/{name}" for name in ("sft", *POLICIES))
    num_prompts = min(args.num_prompts, max_prompts(args))
    return (
        f"scripts/evaluate.py --policies {named} --rows {out}/world/held_out.jsonl --output {out}/results.json "
        f"--max-new-tokens 40 --num-prompts {num_prompts} --seed {args.seed}"
    )


# ---------------------------------------------------------------- the reward models' rows


def start_over(out: Path, record: Path) -> None:
    """Empty the output directory. Raises UserError if it holds files that are not from this program."""
    if out.exists() and any(out.iterdir()) and not record.exists():
        raise UserError(f"--output-dir {out}: holds something that is not from this program; give another one")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def write_rankings(out: Path, args: Args) -> None:
    """Write the rankings that the reward model learns from, and a random third of them for each of the ensemble."""
    rng = random.Random(f"family {args.seed}")  # not the posts of `notices.py world`
    num_rows = min(NUM_RANKED, args.max_rows or NUM_RANKED)
    lines = [json.dumps(row) + "\n" for row in ranked_rows(num_rows, rng)]
    write_text(out / "ranked.jsonl", "".join(lines))
    for i in range(len(ENSEMBLE)):
        third = rng.sample(lines, len(lines) // 3)
        write_text(out / f"third_{i}.jsonl", "".join(third))


def ranked_rows(n: int, rng: random.Random) -> Iterator[dict]:
    """n posts with eight different summaries each, in an order that is drawn from the oracle's preferences."""
    for prompt, kind in islice(notices.unique_notices(rng), n):
        summaries: list[str] = []
        while len(summaries) < NUM_SUMMARIES:
            (superfluous,) = rng.choices((0, 1, 2), (0.6, 0.25, 0.15))
            summary = notices.make_summary(prompt, kind, rng, 0.4, superfluous)
            if summary not in summaries:
                summaries.append(summary)
        yield notices.prefer_row({"prompt": prompt, "completions": summaries}, rng)


# ---------------------------------------------------------------- numbers and tables


def reward_model_accuracies(rows: list[dict], seed: int) -> dict[str, dict]:
    """The accuracy of each reward model on held-out pairs, and the highest that their noise allows.

    rows: pairs with `scores` [2][1 + M], chosen first: those of the reward model and of the M models of the ensemble.
    """
    scores = torch.tensor([row["scores"] for row in rows], dtype=torch.double)
    chosen = scores[:, 0]
    rejected = scores[:, 1]
    is_right = (chosen > rejected).double()  # (n, 1 + M)

    gaps = []
    for row in rows:
        reward_chosen = notices.oracle(row["prompt"], row["chosen"])
        reward_rejected = notices.oracle(row["prompt"], row["rejected"])
        gaps.append(abs(reward_rejected - reward_chosen))
    ceiling = torch.tensor(gaps, dtype=torch.double).sigmoid()

    numbers = {}
    for i, name in enumerate(("rm", *ENSEMBLE)):
        numbers[name] = mean_and_interval(is_right[:, i], seed)
    numbers["ceiling"] = mean_and_interval(ceiling, seed)
    return numbers


def policy_numbers(results: dict) -> dict[str, dict]:
    """Each policy's measures, from the results of scripts/evaluate.py."""
    numbers = {}
    for name, policy in results["policies"].items():
        numbers[name] = {measure: policy[measure] for measure in MEASURES}
    return numbers


def tables(reward_models: dict[str, dict], policies: dict[str, dict]) -> str:
    """The policies and the reward models as Markdown, 95% intervals in brackets."""
    columns = ["policy", "oracle reward", "KL to SFT (nats)", "length (tokens)", "win rate against SFT"]
    policy_table = markdown_table(columns, comparison_rows(policies))

    rows = [[name, interval_text(number, ".3f")] for name, number in reward_models.items()]
    reward_model_table = markdown_table(["reward model", "accuracy on held-out pairs"], rows)
    return f"{policy_table}\n\n{reward_model_table}\n"


def main(args: Args) -> None:
    """Run all stages that are not finished, then write and print the tables."""
    out = args.output_dir.resolve()
    record = out / RECORD
    stages = Stages(record, command_lines(shell_path(out), args))
    if not stages.resume():
        start_over(out, record)
        stages.write_record()
        write_rankings(out, args)
    stages.run()

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    pairs = read_jsonl(out / "held_out_scored.jsonl")
    reward_models = reward_model_accuracies(pairs, args.seed)
    policies = policy_numbers(results)
    stages.write_record(reward_models=reward_models, policies=policies)

    text = tables(reward_models, policies)
    write_text(out / "family.md", text)
    print(f"\n{text}\n{stages.seconds:.0f} s in all; the same in {out / 'family.md'}")


if __name__ == "__main__":
    checked_command(main, Args)
