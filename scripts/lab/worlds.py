"""The worlds of the papers' experiments, as stages that their programs share: notices, and an SFT model of them.

World A leaves clauses out: its SFT model is imperfect when sampled, and its likeliest summary is perfect. World C
misreads two of the five facts by a rule, so that the likeliest summary is wrong.
"""

from typing import NamedTuple

from scripts.lab.pipeline import Plan, Stage

OMISSION = "--fillers 1 3 --omit 0.4 --superfluous 0.4 0.3 0.2 0.1 --bad-rows 1 --p-wrong 0.1"
MISREADING = "--fillers 1 3 --misread 0.7"
BATCH_SIZE = 64  # rows of a step, in SFT


class WorldStages(NamedTuple):
    """The rows and the base model, and the SFT model."""

    notices: Stage
    sft: Stage


def world_a(plan: Plan, seed: int) -> WorldStages:
    """The world of omissions."""
    return world(plan, "a", OMISSION, 350, seed)


def world_c(plan: Plan, seed: int) -> WorldStages:
    """The world of misreadings, which takes longer to learn."""
    return world(plan, "c", MISREADING, 650, seed)


def world(plan: Plan, name: str, flags: str, sft_steps: int, seed: int) -> WorldStages:
    """A world with these flags of `notices.py world`, and an SFT model that sees each demonstration once."""
    notices = plan.stage(
        f"{name}/{seed}/world",
        f"scripts/notices.py world --output-dir {{out}} --sft-rows {BATCH_SIZE * sft_steps} --seed {seed} {flags}",
    )
    sft = plan.stage(
        f"{name}/{seed}/sft",
        f"algos/sft.py --model {{base}} --train-data {{rows}} --output-dir {{out}} --batch-size {BATCH_SIZE} "
        f"--max-steps {sft_steps} --learning-rate 2e-3 --warmup-steps 50 --save-every 0 --seed {seed}",
        base=notices / "base",
        rows=notices / "sft.jsonl",
    )
    return WorldStages(notices, sft)
