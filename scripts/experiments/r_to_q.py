"""From r to Q*, arXiv 2404.12358: its experiments in worlds whose demonstrations misread the posts.

All policies are Llamas of 1M parameters or fewer, and the judge is the oracle that also labels the pairs.

    python scripts/experiments/r_to_q.py
    python scripts/experiments/r_to_q.py --experiment C35 --seeds 0
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scripts.lab import notices
from scripts.lab.best_of import selection_weights
from scripts.lab.claims import Finding, given
from scripts.lab.commands import checked_command
from scripts.lab.experiments import (
    Args,
    Study,
    above_by_interval,
    below_by_interval,
    between_by_interval,
    experiments_command,
    reported_with_interval,
)
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, label_axes
from scripts.lab.row_files import read_jsonl
from scripts.lab.statistics import Statistic, auroc_of, auroc_over_seeds, mean_over_seeds, over_seeds, win_rates
from scripts.lab.worlds import MISREADING, world_a, world_c

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Study("r_to_q", "From r to Q*: Your Language Model is Secretly a Q-Function")
BETAS = (0.1, 0.3, 1.0)  # of Fig. 2
LARGE_BETA = 3.0
WIDTHS = (1, 2, 5, 20)
NORMALISED_WIDTHS = (5, 20)  # of searches by log π / length
NEW_TOKENS = 96  # of a completion, at most; a perfect summary has 17
NUM_PROMPTS = 192
NUM_SAMPLES = 8
PAIR_ROWS = 3_072
DPO_STEPS = 48


# ---------------------------------------------------------------- stages


class Pairs(NamedTuple):
    """Pairs of demonstrations of fresh posts, with the oracle's preferences."""

    train: Artifact
    held_out: Artifact


def preferences(plan: Plan, name: str, flags: str, seed: int) -> Pairs:
    """Pairs for training and others for evaluation."""
    made = []
    for part, rows, rows_seed in (("train", PAIR_ROWS, 2 * seed), ("held_out", 512, 2 * seed + 1)):
        written = plan.stage(
            f"r_to_q/{seed}/{name}/{part}_demonstrations",
            f"scripts/notices.py pairs --output {{out}}/demonstrations.jsonl --rows {rows} --seed {rows_seed} {flags}",
        )
        preferred = plan.stage(
            f"r_to_q/{seed}/{name}/{part}_pairs",
            f"scripts/notices.py prefer --rows {{rows}} --output {{out}}/pairs.jsonl --seed {rows_seed}",
            rows=written / "demonstrations.jsonl",
        )
        made.append(preferred / "pairs.jsonl")
    return Pairs(*made)


def tune(plan: Plan, name: str, model: Stage | Artifact, rows: Artifact, seed: int, beta: float) -> Stage:
    """DPO of a model on pairs."""
    return plan.stage(
        f"r_to_q/{seed}/{name}",
        f"algos/token_dpo_beam.py --model {{model}} --train-data {{rows}} --output-dir {{out}} --beta {beta} "
        f"--max-steps {DPO_STEPS} --learning-rate 3e-4 --warmup-steps 4 --save-every 0 --seed {seed}",
        model=model,
        rows=rows,
    )


def imitate(
    plan: Plan, name: str, model: Stage | Artifact, rows: Artifact, seed: int, steps: int, rate: float
) -> Stage:
    """SFT of a model, on the chosen completions if the rows are pairs."""
    return plan.stage(
        f"r_to_q/{seed}/{name}",
        f"algos/sft.py --model {{model}} --train-data {{rows}} --output-dir {{out}} --max-steps {steps} "
        f"--learning-rate {rate} --warmup-steps {steps // 6} --save-every 0 --seed {seed}",
        model=model,
        rows=rows,
    )


class Policies(NamedTuple):
    """π_ref, the pairs, and DPO's policies by β."""

    sft: Stage
    world: Stage
    pairs: Pairs
    dpo: dict[float, Stage]


def policies(plan: Plan, seed: int) -> Policies:
    """The world of misreadings."""
    world, sft = world_c(plan, seed)
    pairs = preferences(plan, "misread", MISREADING, seed)
    dpo = {beta: tune(plan, f"misread/dpo_{beta:g}", sft, pairs.train, seed, beta) for beta in (*BETAS, LARGE_BETA)}
    return Policies(sft, world, pairs, dpo)


class Search(NamedTuple):
    """What one policy writes for the prompts of held-out pairs: samples, and searches by (beams, length penalty)."""

    pairs: Artifact
    samples: Artifact
    beams: dict[tuple[int, int], Artifact]


def search(plan: Plan, name: str, policy: Stage, rows: Artifact, seed: int) -> Search:
    """Samples and all searches of a policy."""
    line = (
        f"scripts/sample.py --model {{policy}} --rows {{rows}} --output {{out}}/rows.jsonl --max-rows {NUM_PROMPTS} "
        f"--max-new-tokens {NEW_TOKENS}"
    )
    samples = plan.stage(
        f"r_to_q/{seed}/{name}/samples", f"{line} --num-completions {NUM_SAMPLES} --seed {seed}", policy=policy, rows=rows
    )
    beams = {}
    for width, penalty in [*((width, 0) for width in WIDTHS), *((width, 1) for width in NORMALISED_WIDTHS)]:
        found = plan.stage(
            f"r_to_q/{seed}/{name}/beams_{width}_{penalty}",
            f"{line} --num-completions 1 --beams {width} --length-penalty {penalty}",
            policy=policy,
            rows=rows,
        )
        beams[width, penalty] = found / "rows.jsonl"
    return Search(rows, samples / "rows.jsonl", beams)


def searches(plan: Plan, seed: int) -> dict[float, Search]:
    """The searches of Fig. 2, for each β."""
    made = policies(plan, seed)
    found = {}
    for beta in BETAS:
        found[beta] = search(plan, f"search_{beta:g}", made.dpo[beta], made.pairs.held_out, seed)
    return found


def credit(plan: Plan, seed: int) -> Stage:
    """The token rewards of the misread facts, for each β."""
    made = policies(plan, seed)
    named = " ".join(f"{beta:g}={{dpo_{i}}}" for i, beta in enumerate(made.dpo))
    inputs = {f"dpo_{i}": policy for i, policy in enumerate(made.dpo.values())}
    return plan.stage(
        f"r_to_q/{seed}/credit",
        f"scripts/credit.py --policies {named} --reference {{sft}} --rows {{rows}} --output {{out}}/credit.json "
        f"--errors misreadings --num-prompts 256 --seed {seed}",
        sft=made.sft,
        rows=made.world / "held_out.jsonl",
        **inputs,
    )
