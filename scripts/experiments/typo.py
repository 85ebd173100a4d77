"""TYPO, arXiv 2407.09072: its statements about trained models, tried where all answers can be listed, and on texts.

Answers: a Llama of 0.1M parameters answers prompts of three groups by one of three words (scripts/lab/answers.py). In
one group the SFT model imitates π*, in the others it does not: these are the paper's x_g, its x_b, and a bad prompt of
ours. Groups share all parameters. A policy's probabilities of the three answers are read from it on new prompts.

Texts: the world of omissions (world_a) in the place of HH, other writers' pairs, and the true reward in the place of
GPT-4.

DPO's β, IPO's τ and TYPO's λ are all λ here. All methods have the same pairs, learning rate and number of steps.

    python scripts/experiments/typo.py
    python scripts/experiments/typo.py --experiment C52
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.ipo import ipo_loss
from algos.typo import typo_loss
from scripts.lab.answers import GROUPS, Group, group_of
from scripts.lab.claims import Finding
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
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.qpo import Labelled, drawn_pairs, minimise_each
from scripts.lab.row_files import read_jsonl
from scripts.lab.statistics import mean_over_seeds
from scripts.lab.tabular import vector
from scripts.lab.worlds import OMISSION, world_a

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Study("typo", "New Desiderata for Direct Preference Optimization (TYPO)")

METHODS = {"dpo": "DPO", "ipo": "IPO", "typo": "TYPO"}
RIVALS = ("dpo", "ipo")
STRENGTH = {"dpo": "--beta", "ipo": "--tau", "typo": "--lam"}
LAMS = (0.04, 0.2, 1.0, 5.0, 25.0)
LEAST = LAMS[0]
LARGEST = LAMS[-1]
ALONE = 1000.0  # a λ beside which ℓ_sup does not count
OF_TRANSFER = 1.0  # λ of the runs in which a group has no preferences
BATCH_SIZE = 128
STEPS = 72  # less than an epoch
DRAWING = "--max-new-tokens 2 --batch-size 2048"

# ---------------------------------------------------------------- answers: the runs


class Base(NamedTuple):
    """The rows of the answers, the SFT model, and two draws of it for each prompt."""

    seed: int
    world: Stage
    sft: Stage
    drawn: Artifact


def base(plan: Plan, seed: int) -> Base:
    world = plan.stage(f"typo/{seed}/world", f"scripts/answers.py world --output-dir {{out}} --seed {seed}")
    sft = plan.stage(
        f"typo/{seed}/sft",
        "algos/sft.py --model {base} --train-data {rows} --output-dir {out} --batch-size 128 --max-steps 256 "
        f"--learning-rate 3e-3 --warmup-steps 20 --save-every 0 --seed {seed}",
        base=world / "base",
        rows=world / "sft.jsonl",
    )
    drawn = plan.stage(
        f"typo/{seed}/drawn",
        "scripts/sample.py --model {sft} --rows {rows} --output {out}/rows.jsonl --num-completions 2 "
        f"{DRAWING} --seed {seed}",
        sft=sft,
        rows=world / "prompts.jsonl",
    )
    return Base(seed, world, sft, drawn / "rows.jsonl")


def labelled(plan: Plan, given: Base, name: str, flags: str = "", sampling: str = "") -> Artifact:
    """Pairs in the order of sampled preferences, with one sample of π_ref each."""
    pairs = plan.stage(
        f"typo/{given.seed}/pairs_{name}",
        f"scripts/answers.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --seed {given.seed} {flags}",
        rows=given.drawn,
    )
    rows = plan.stage(
        f"typo/{given.seed}/rows_{name}",
        "scripts/sample.py --model {sft} --rows {pairs} --output {out}/rows.jsonl --reference-samples 1 "
        f"{DRAWING} --seed {given.seed} {sampling}",
        sft=given.sft,
        pairs=pairs / "rows.jsonl",
    )
    return rows / "rows.jsonl"


def trained(plan: Plan, given: Base, method: str, lam: float, rows: Artifact, name: str = "") -> Stage:
    """A policy that starts from the SFT model. `name` tells apart those on other rows."""
    return plan.stage(
        f"typo/{given.seed}/{method}_{lam:g}{name}",
        f"algos/{method}.py --model {{sft}} --train-data {{rows}} --output-dir {{out}} {STRENGTH[method]} {lam:g} "
        f"--batch-size {BATCH_SIZE} --max-steps {STEPS} --learning-rate 1e-3 --warmup-steps 5 --save-every 0 "
        f"--seed {given.seed}",
        sft=given.sft,
        rows=rows,
    )


class Readout(NamedTuple):
    """Held-out prompts with all their answers, and the log-probs of these under the policies."""

    held_out: Artifact
    logps: Artifact


def readout(plan: Plan, given: Base, name: str, policies: dict[str, Stage]) -> Readout:
    """Of these policies and the SFT model."""
    policies = {"sft": given.sft, **policies}
    held_out = given.world / "held_out.jsonl"
    names = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    stage = plan.stage(
        f"typo/{given.seed}/{name}",
        f"scripts/logps.py --policies {names} --rows {{held_out}} --output {{out}}/logps.json",
        held_out=held_out,
        **policies,
    )
    return Readout(held_out, stage / "logps.json")


def sweep(plan: Plan, seed: int) -> Readout:
    """All methods at all λ."""
    given = base(plan, seed)
    rows = labelled(plan, given, "all")
    policies = {}
    for method in METHODS:
        for i, lam in enumerate(LAMS):
            policies[f"{method}_{i}"] = trained(plan, given, method, lam, rows)
    return readout(plan, given, "sweep", policies)


def terms(plan: Plan, seed: int) -> Readout:
    """Each of TYPO's terms alone."""
    given = base(plan, seed)
    rows = labelled(plan, given, "all")
    policies = {
        "supervised": trained(plan, given, "typo", 0.0, rows),
        "unsupervised": trained(plan, given, "typo", ALONE, rows),
    }
    return readout(plan, given, "terms", policies)


def transfer(plan: Plan, seed: int) -> Readout:
    """TYPO and DPO without a pair on good prompts, and TYPO with their samples alone."""
    given = base(plan, seed)
    without = labelled(plan, given, "without_good", "--without good")
    unlabelled = labelled(plan, given, "unlabelled_good", "--unlabelled good")
    policies = {
        "dpo_without": trained(plan, given, "dpo", OF_TRANSFER, without, "_without_good"),
        "typo_without": trained(plan, given, "typo", OF_TRANSFER, without, "_without_good"),
        "typo_unlabelled": trained(plan, given, "typo", OF_TRANSFER, unlabelled, "_unlabelled_good"),
    }
    return readout(plan, given, "transfer", policies)


def truncation(plan: Plan, seed: int) -> Readout:
    """ℓ_unsup alone on samples as the paper draws them, and on plain ones."""
    given = base(plan, seed)
    plain = labelled(plan, given, "all")
    truncated = labelled(plan, given, "truncated", sampling="--top-k 60 --top-p 0.8 --repetition-penalty 1.1")
    policies = {
        "plain": trained(plan, given, "typo", ALONE, plain),
        "truncated": trained(plan, given, "typo", ALONE, truncated, "_truncated"),
    }
    return readout(plan, given, "truncation", policies)


# ---------------------------------------------------------------- answers: the numbers


class Answered(NamedTuple):
    """The probabilities of the first, second, third answer and of all other texts, (n, 4), of each policy."""

    groups: list[str]
    policies: dict[str, Tensor]

    def of(self, policy: str, group: str) -> Tensor:
        """On the prompts of a group."""
        is_there = torch.tensor([name == group for name in self.groups])
        return self.policies[policy][is_there]

    def distance(self, policy: str, group: str) -> Tensor:
        """The total variation to π* of each prompt of a group, (n,)."""
        return total_variations(self.of(policy, group), target_of(group))

    def shift(self, policy: str, group: str) -> Tensor:
        """The total variation to the SFT model."""
        return total_variations(self.of(policy, group), self.of("sft", group))


def answered(run: Readout) -> Answered:
    """What a stage has read."""
    groups = [group_of(row["prompt"]) for row in read_jsonl(run.held_out.path)]
    policies = {}
    for name, logps in json.loads(run.logps.path.read_text(encoding="utf-8"))["logps"].items():
        chances = torch.tensor(logps, dtype=torch.double).exp()
        policies[name] = with_the_rest(chances)
    return Answered(groups, policies)


def with_the_rest(chances: Tensor) -> Tensor:
    """Probabilities of answers and, behind them, of everything else, (n, 3) → (n, 4)."""
    rest = 1 - chances.sum(1, keepdim=True)
    return torch.cat([chances, rest], 1)


def target_of(group: str) -> Tensor:
    """π*, with nothing for other texts."""
    return vector(*GROUPS[group].pi_star, 0)


def total_variations(p: Tensor, q: Tensor) -> Tensor:
    """The distance of each row, (n, 4), to that of `q`, (n, 4) or (4,): (n,)."""
    return (p - q).abs().sum(1) / 2


def change(runs: Sequence[Answered], policy: str, group: str) -> dict:
    """How much farther from π* a policy is than the SFT model."""
    return mean_over_seeds([run.distance(policy, group) - run.distance("sft", group) for run in runs])


def distance(runs: Sequence[Answered], policy: str, group: str) -> dict:
    return mean_over_seeds([run.distance(policy, group) for run in runs])


def shift(runs: Sequence[Answered], policy: str, group: str) -> dict:
    return mean_over_seeds([run.shift(policy, group) for run in runs])


def likeliest_share(policies: Tensor) -> Tensor:
    """The largest of the answers' probabilities, when they are to sum to 1: (n, 4) → (n,)."""
    chances = policies[:, :-1]
    return chances.amax(1) / chances.sum(1)


def rest_of(runs: Sequence[Answered], policy: str) -> dict:
    """The probability of what is no answer, over all groups."""
    return mean_over_seeds([run.policies[policy][:, -1] for run in runs])


def lam_text(method: str, i: int) -> str:
    return f"{METHODS[method]}, λ = {LAMS[i]:g}"


# ---------------------------------------------------------------- answers: the optimum of a bandit


def bandit_optima(method: str, group: Group, lams: Sequence[float]) -> Tensor:
    """The optimum of each λ for a policy that is free at each prompt, with pairs as in Eq 1: (number of λ, 3)."""
    pi_ref = vector(*group.pi_ref)
    data = drawn_pairs(vector(*group.pi_star), pi_ref)

    def loss(logits: Tensor, lam: float) -> Tensor:
        losses = losses_of(method, logits.log_softmax(0), pi_ref, data, lam)
        return (data.weights * losses).sum()

    strengths = vector(*lams)
    starts = pi_ref.log().expand(len(strengths), -1)
    return minimise_each(loss, starts, strengths).softmax(1)


def losses_of(method: str, logps: Tensor, pi_ref: Tensor, data: Labelled, lam: float) -> Tensor:
    """The loss of each pair."""
    pairs = logps[data.pairs]
    if method == "dpo":
        return dpo_loss(pairs, pi_ref.log()[data.pairs], lam)
    if method == "ipo":
        return ipo_loss(pairs, pi_ref.log()[data.pairs], lam)
    # linear in the samples' log-probs, whose expectation stands for the samples
    expected_logp = (pi_ref * logps).sum()
    return typo_loss(pairs, expected_logp.expand(len(pairs), 1), lam)
