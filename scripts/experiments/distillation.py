"""Reward-model distillation, arXiv 2405.19316: its statements about trained models, tried in a small world.

The world leaves clauses out and adds superfluous ones, so that length says something of the true reward, and not all. A
pair is two demonstrations, labelled by Bradley-Terry on the oracle. A selection by length makes D_ρ of the pairs, and
D_ρ,b of D_ρ. The reward models are too small to look facts up.

Each method has two strengths. A held-out prompt is judged with the strength that is better on the other half of the
prompts, so that no policy is selected by what judges it. The paper has a validation set for that.

    python scripts/experiments/distillation.py
    python scripts/experiments/distillation.py --experiment X6
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.lab import notices
from scripts.lab.claims import Finding, below, judged
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
from scripts.lab.interval_plots import draw_numbers, legend_below
from scripts.lab.measured import logps_in, policies_in, rewards_of, scores_of, tensor_of
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.plots import GREY, PALETTE, canvas, label_axes
from scripts.lab.row_files import read_jsonl
from scripts.lab.statistics import Statistic, mean_over_seeds, over_seeds, wald_test
from scripts.lab.worlds import OMISSION, world_a

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Study("distillation", "Robust Preference Optimization through Reward Model Distillation")

SHORT, NEUTRAL, LONG = 0.1, 0.5, 0.9  # ρ; in .53 of all pairs the longer demonstration is preferred
SHARES = (SHORT, NEUTRAL, LONG)
BIASES = (0.2, 0.5, 0.8)  # b
STRENGTHS = (0.1, 1.0)  # β
NUM_PAIRS = 9_000
NUM_BIASED = 3_600  # pairs of D_ρ
BATCH_SIZE = 16
STEPS = 30
RM_STEPS = 90
EVERY = 30  # steps between two checkpoints of a reward model
ABOUT_EQUAL = 0.2  # of reward, a fifth of a fact
LAST_STEPS = 10
LONGER = Fraction(11, 10)  # times as many tokens as the other one


Models = dict[str, Stage | Artifact]  # policies or reward models by their names in a command line


class Method(NamedTuple):
    """A method: its algorithm and flags, and whether it takes the scores of the ensemble."""

    title: str
    algorithm: str
    flags: str = ""
    has_ensemble: bool = False

    def strength(self, beta: float) -> str:
        """The flag for a β. IPO has τ = β/2, so that its target for h is 1/β."""
        if self.algorithm == "ipo":
            return f"--tau {beta / 2:g}"
        return f"--beta {beta:g}"


METHODS = {
    "dpo": Method("DPO", "dpo"),
    "ipo": Method("IPO", "ipo"),
    "d": Method("d-DPO", "distill_dpo"),
    "p": Method("p-DPO", "pessimistic_dpo"),
    "pd": Method("pd-DPO", "pessimistic_dpo", "--base distill"),
    "e": Method("e-DPO", "ensemble_dpo", has_ensemble=True),
}
DISTILLED = ("d", "pd", "e")


# ---------------------------------------------------------------- the pairs


def demonstrations(plan: Plan, seed: int, name: str, rows: int, pairs_seed: int, flags: str = "") -> Artifact:
    """Preferences between two demonstrations of each of many new posts."""
    world = world_a(plan, seed).notices
    two = plan.stage(
        f"distillation/{seed}/{name}_two",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows {rows} --seed {pairs_seed} {OMISSION} "
        "--exclude {sft} {held_out}",
        sft=world / "sft.jsonl",
        held_out=world / "held_out.jsonl",
    )
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/notices.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --seed {seed} {flags}",
        rows=two / "rows.jsonl",
    )
    return stage / "rows.jsonl"


def labelled(plan: Plan, seed: int) -> Artifact:
    """The pairs of which each D_ρ is a part."""
    return demonstrations(plan, seed, "pairs", NUM_PAIRS, 2000 + seed)


def biased(plan: Plan, seed: int, share: float) -> Artifact:
    """D_ρ."""
    pairs = labelled(plan, seed)
    return selected(plan, seed, pairs, f"pairs_{share}", share, f"--total {NUM_BIASED}", own_seed(seed, share))


def subset(plan: Plan, seed: int, share: float, bias: float) -> Artifact:
    """D_ρ,b, as large as possible. With a seed of its own it shares few rows with the subsets of another ρ."""
    rows = biased(plan, seed, share)
    return selected(plan, seed, rows, f"pairs_{share}_{bias}", bias, "", own_seed(seed, share, bias))


def selected(plan: Plan, seed: int, rows: Artifact, name: str, share: float, flags: str, choice: int) -> Artifact:
    """Pairs of which the longer completion is preferred in a given share."""
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/prepare_rows.py length-bias --rows {{rows}} --output {{out}}/rows.jsonl --model {{model}} "
        f"--share {share} {flags} --seed {choice}",
        rows=rows,
        model=world_a(plan, seed).notices / "base",
    )
    return stage / "rows.jsonl"


def own_seed(seed: int, share: float, bias: float = 0) -> int:
    """A seed that no other set of pairs has."""
    return 1000 * seed + round(100 * share) + round(10 * bias)


# ---------------------------------------------------------------- the reward models


def tiny(plan: Plan, seed: int) -> Artifact:
    """The model that reward models start from."""
    stage = plan.stage(
        f"distillation/{seed}/tiny",
        f"scripts/notices.py world --output-dir {{out}} --tiny --sft-rows 1 --prompt-rows 1 --held-out-rows 1 "
        f"--seed {seed}",
    )
    return stage / "tiny"


def reward_model(plan: Plan, seed: int, rows: Artifact, name: str) -> Stage:
    """A reward model of some pairs, with its checkpoints."""
    return plan.stage(
        f"distillation/{seed}/rm_{name}",
        f"algos/rm.py --model {{model}} --train-data {{rows}} --output-dir {{out}} --max-steps {RM_STEPS} "
        f"--batch-size 32 --learning-rate 3e-3 --warmup-steps 10 --save-every {EVERY} --keep {RM_STEPS // EVERY} "
        f"--seed {seed}",
        model=tiny(plan, seed),
        rows=rows,
    )


def single(plan: Plan, seed: int, share: float) -> Stage:
    """r_ρ."""
    return reward_model(plan, seed, biased(plan, seed, share), f"{share}")


def members(plan: Plan, seed: int, share: float) -> Models:
    """r_ρ,b for each b."""
    return {
        f"rm_{share}_{bias}": reward_model(plan, seed, subset(plan, seed, share, bias), f"{share}_{bias}")
        for bias in BIASES
    }


def checkpoints(plan: Plan, seed: int, share: float) -> Models:
    """r_ρ after a third of its steps, two thirds, and all."""
    stage = plan.stage(
        f"distillation/{seed}/rm_{share}_models",
        f"scripts/export.py {{run}} --every {EVERY} --output-dir {{out}}",
        run=single(plan, seed, share),
    )
    steps = range(EVERY, RM_STEPS + 1, EVERY)
    return {f"rm_{step}": stage / f"step-{step:06}" for step in steps}


def scored(plan: Plan, seed: int, name: str, rows: Artifact, models: Models, flags: str = "") -> Artifact:
    """Rows with the scores of reward models."""
    placeholders = " ".join(f"{{{model}}}" for model in models)
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/score.py --rows {{rows}} --output {{out}}/rows.jsonl --reward-models {placeholders} {flags}",
        rows=rows,
        **models,
    )
    return stage / "rows.jsonl"


# ---------------------------------------------------------------- the policies


def training_rows(plan: Plan, seed: int, share: float, ensemble: str) -> Artifact:
    """The pairs of D_ρ that all policies learn from, with scores of r_ρ, of the r_ρ,b, or of checkpoints of r_ρ."""
    models: Models = {"rm": single(plan, seed, share)}
    if ensemble == "subsets":
        models = members(plan, seed, share)
    elif ensemble == "checkpoints":
        models = checkpoints(plan, seed, share)
    rows = biased(plan, seed, share)
    return scored(plan, seed, f"rows_{share}_{ensemble}", rows, models, f"--max-rows {STEPS * BATCH_SIZE}")


def policy(plan: Plan, seed: int, share: float, name: str, beta: float, ensemble: str | None = None) -> Stage:
    """A policy from the SFT model: one epoch."""
    method = METHODS[name]
    if ensemble is None:
        ensemble = "subsets" if method.has_ensemble else "single"
    else:
        name = f"{name}_{ensemble}"
    return plan.stage(
        f"distillation/{seed}/{name}_{share}_{beta:g}",
        f"algos/{method.algorithm}.py --model {{sft}} --train-data {{rows}} --output-dir {{out}} "
        f"{method.strength(beta)} {method.flags} --batch-size {BATCH_SIZE} --max-steps {STEPS} --learning-rate 3e-4 "
        f"--warmup-steps 3 --save-every 0 --log-every 1 --seed {seed}",
        sft=world_a(plan, seed).sft,
        rows=training_rows(plan, seed, share, ensemble),
    )


def named(policies: Models) -> str:
    """The policies as commands take them, each by a placeholder."""
    return " ".join(f"{policy}={{{policy}}}" for policy in policies)


def evaluation(plan: Plan, seed: int, name: str, policies: Models) -> Artifact:
    """Rewards of the SFT model and of policies on held-out posts."""
    world = world_a(plan, seed)
    policies = {"sft": world.sft, **policies}
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/evaluate.py --policies {named(policies)} --rows {{rows}} --output {{out}}/results.json "
        f"--num-prompts 192 --num-samples 2 --max-new-tokens 48 --batch-size 512 --seed {seed}",
        rows=world.notices / "held_out.jsonl",
        **policies,
    )
    return stage / "results.json"


def logps_of(plan: Plan, seed: int, name: str, rows: Artifact, policies: Models) -> Artifact:
    """log π of the completions of rows under some policies."""
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/logps.py --policies {named(policies)} --rows {{rows}} --output {{out}}/logps.json",
        rows=rows,
        **policies,
    )
    return stage / "logps.json"


Grid = dict[float, Artifact]  # for each ρ the evaluation of all methods with each strength


def grid(plan: Plan, seed: int) -> Grid:
    results = {}
    for share in SHARES:
        policies: Models = {}
        for name in METHODS:
            for beta in STRENGTHS:
                policies[f"{name}_{beta:g}"] = policy(plan, seed, share, name, beta)
        results[share] = evaluation(plan, seed, f"evaluated_{share}", policies)
    return results


class Controlled(NamedTuple):
    """At the smallest ρ, all methods, and e-DPO with checkpoints of r_ρ as the ensemble."""

    grid: Artifact
    control: Artifact


def checkpoint_ensemble(plan: Plan, seed: int) -> Controlled:
    share = SHORT
    policies: Models = {}
    for beta in STRENGTHS:
        policies[f"e_{beta:g}"] = policy(plan, seed, share, "e", beta, "checkpoints")
    return Controlled(grid(plan, seed)[share], evaluation(plan, seed, "evaluated_checkpoints", policies))


def likelihoods(plan: Plan, seed: int) -> dict[str, Artifact]:
    """The logs of the methods without a bias, at the smaller β."""
    logs = {}
    for name in METHODS:
        run = policy(plan, seed, NEUTRAL, name, STRENGTHS[0])
        logs[name] = run / "metrics.jsonl"
    return logs


class Overfitted(NamedTuple):
    """DPO that sees its pairs several times, at a tiny β."""

    logps: Artifact  # of the pairs, under the SFT model and the policy
    results: Artifact


def overfitted(plan: Plan, seed: int) -> Overfitted:
    rows = training_rows(plan, seed, NEUTRAL, "single")
    sft = world_a(plan, seed).sft
    run = plan.stage(
        f"distillation/{seed}/overfitted",
        "algos/dpo.py --model {sft} --train-data {rows} --output-dir {out} --beta 0.01 "
        f"--batch-size {BATCH_SIZE} --epochs 4 --learning-rate 3e-4 --lr-schedule constant --warmup-steps 3 "
        f"--save-every 0 --seed {seed}",
        sft=sft,
        rows=rows,
    )
    logps = logps_of(plan, seed, "logps_overfitted", rows, {"sft": sft, "dpo": run})
    return Overfitted(logps, evaluation(plan, seed, "evaluated_overfitted", {"dpo": run}))


class Members(NamedTuple):
    """What tells which reward model e-DPO distils at one ρ."""

    rows: Artifact  # with the scores of the r_ρ,b
    logps: Artifact  # of their completions, under the SFT model and e-DPO's policies
    logs: dict[float, Artifact]  # by β
    results: Artifact  # of the grid, by which β is selected


Picked = dict[float, Members]  # by ρ


def picked_members(plan: Plan, seed: int) -> Picked:
    picked = {}
    for share in SHARES:
        rows = training_rows(plan, seed, share, "subsets")
        runs: Models = {"sft": world_a(plan, seed).sft}
        logs = {}
        for beta in STRENGTHS:
            run = policy(plan, seed, share, "e", beta)
            runs[f"e_{beta:g}"] = run
            logs[beta] = run / "metrics.jsonl"
        logps = logps_of(plan, seed, f"logps_{share}", rows, runs)
        picked[share] = Members(rows, logps, logs, grid(plan, seed)[share])
    return picked


def probed(plan: Plan, seed: int) -> Artifact:
    """The scores of all reward models on held-out pairs in the order of the oracle: r_ρ and r_ρ,b for each ρ."""
    pairs = demonstrations(plan, seed, "probe", 1_000, 3000 + seed, "--noise-free")
    models: Models = {}
    for share in SHARES:
        models[f"rm_{share}"] = single(plan, seed, share)
        models |= members(plan, seed, share)
    return scored(plan, seed, "probe_scored", pairs, models)


# ---------------------------------------------------------------- what the stages found


@functools.cache
def rewards_in(results: Artifact) -> dict[str, Tensor]:
    """The mean reward of each policy's samples for each prompt, (n,), by the policy's name in the file."""
    return {name: rewards_of(numbers).mean(1) for name, numbers in policies_in(results).items()}


def candidates(results: Artifact, method: str) -> Tensor:
    """The rewards of a method with each strength, (strengths, n)."""
    rewards = rewards_in(results)
    return torch.stack([rewards[f"{method}_{beta:g}"] for beta in STRENGTHS])


def selected_on_the_other_half(rewards: Tensor, selectors: Tensor | None = None) -> Tensor:
    """For each prompt the reward of the candidate that is best on the other half of the prompts: (C, n) → (n,).

    The halves are the even and the odd prompts. selectors: (C, n), what selects, if not the rewards.
    """
    if selectors is None:
        selectors = rewards
    n = rewards.shape[1]
    is_even = torch.arange(n) % 2 == 0
    values = torch.zeros(n, dtype=rewards.dtype)
    for half in (is_even, ~is_even):
        best = int(selectors[:, ~half].mean(1).argmax())
        values[half] = rewards[best, half]
    return values


def judged_rewards(results: Artifact, method: str) -> Tensor:
    """The rewards of a method, selected as the module says, (n,)."""
    return selected_on_the_other_half(candidates(results, method))


def advantages(runs: list[Grid], share: float, method: str) -> list[Tensor]:
    """The rewards of a method less those of the SFT model, for each seed (n,)."""
    values = []
    for run in runs:
        sft = rewards_in(run[share])["sft"]
        values.append(judged_rewards(run[share], method) - sft)
    return values


def differences(runs: list[Grid], share: float, method: str, other: str) -> list[Tensor]:
    """The rewards of a method less those of another one, for each seed (n,)."""
    return [judged_rewards(run[share], method) - judged_rewards(run[share], other) for run in runs]


def less(method: str, other: str) -> str:
    """The words for a difference."""
    return f"{METHODS[method].title} less {METHODS[other].title}"


def largest_p(comparisons: list[list[Tensor]]) -> Finding:
    """The largest p of several differences, each of one number per prompt for each seed; all have to be positive."""
    tests = [wald_test(values) for values in comparisons]
    largest = max(test.p for test in tests)
    least_z = min(test.z for test in tests)
    holds = largest < 0.01 and least_z > 0
    return judged("largest p of a Wald test among these", "< 0.01, all above 0", largest, holds)


# ---------------------------------------------------------------- the main results


@STUDY.experiment("X4", "Fig. 2", grid)
def every_method_gains(runs: list[Grid]) -> Iterator[Finding]:
    """Every method gains over π_SFT, for all length biases ρ.

    Advantage in oracle reward on 192 held-out prompts with two samples each, with the better of two strengths.
    """
    for share in SHARES:
        for name, method in METHODS.items():
            number = mean_over_seeds(advantages(runs, share, name))
            yield above_by_interval(f"ρ = {share}: {method.title}", 0, number)


@STUDY.experiment("X5", "Fig. 2", grid)
def distillation_is_better_without_a_bias_to_length(runs: list[Grid]) -> Iterator[Finding]:
    """For ρ ≤ .5 all methods that distil are better than DPO and IPO.

    Differences between rewards on the same prompts, at ρ = .1 and .5. The reward models of this world are weak: they
    see clauses and not wrong facts, which DPO and IPO do see. A second design had reward models as large as the
    policies: by hand, the SFT model in the place of `tiny`, and `--learning-rate 1e-3 --warmup-steps 6`. The same
    comparisons held but one: at ρ = .1 e-DPO less IPO was 0.26 [-0.05, 0.59].
    """
    comparisons = []
    for share in (SHORT, NEUTRAL):
        for name in DISTILLED:
            for other in ("dpo", "ipo"):
                values = differences(runs, share, name, other)
                comparisons.append(values)
                yield above_by_interval(f"ρ = {share}: {less(name, other)}", 0, mean_over_seeds(values))
    yield largest_p(comparisons)


@STUDY.experiment("X6", "Fig. 2", grid)
def the_ensemble_is_best_if_short_is_preferred(runs: list[Grid]) -> Iterator[Finding]:
    """e-DPO is the best for ρ < .5.

    Differences between rewards on the same prompts, at ρ = .1. With X5's second design e-DPO less IPO was 0.26
    [-0.05, 0.59], and the four others were above 0: "partly".
    """
    for other in METHODS:
        if other != "e":
            number = mean_over_seeds(differences(runs, SHORT, "e", other))
            yield above_by_interval(less("e", other), 0, number)


@STUDY.experiment("X7", "Fig. 2", grid)
def one_reward_model_is_best_if_long_is_preferred(runs: list[Grid]) -> Iterator[Finding]:
    """d-DPO is the best for ρ > .6, better than DPO and IPO.

    Differences between rewards on the same prompts, at ρ = .9, with the better of two β for each method. Two ways of
    distilling from r_ρ alone, d-DPO and pd-DPO, come to the same. A bias to length is of use here, as longer summaries
    are a little better (X2), and DPO learns it from the pairs as well as r_ρ does. The paper's reward models are larger
    than its policies, ours are smaller, and see clauses rather than facts. With those of X5's second design, d-DPO less
    DPO was 0.01 [-0.14, 0.12], less IPO 0.18 [0.09, 0.29], and less p-DPO -0.14 [-0.28, -0.02]: "partly".
    """
    for other in METHODS:
        if other != "d":
            number = mean_over_seeds(differences(runs, LONG, "d", other))
            yield above_by_interval(less("d", other), 0, number)
    yield largest_p([differences(runs, LONG, "d", other) for other in ("dpo", "ipo")])


@STUDY.experiment("X8", "§4.2", grid)
def pessimism_alone_has_no_benefit(runs: list[Grid]) -> Iterator[Finding]:
    """p-DPO has no benefit over distillation.

    p-DPO less the mean of the three methods that distil, on the same prompts. A benefit would be 0.2 of reward, a fifth
    of a fact.
    """
    for share in SHARES:
        values = []
        for run in runs:
            distilled = torch.stack([judged_rewards(run[share], name) for name in DISTILLED])
            values.append(judged_rewards(run[share], "p") - distilled.mean(0))
        yield below_by_interval(f"ρ = {share}: p-DPO less distillation", ABOUT_EQUAL, mean_over_seeds(values))


@STUDY.experiment("X9", "§4.2", grid)
def short_is_harder(runs: list[Grid]) -> Iterator[Finding]:
    """ρ < .5 is the harder setting.

    The advantage at ρ = .9 less that at .1, on the same prompts.
    """
    for name, method in METHODS.items():
        at_short = advantages(runs, SHORT, name)
        at_long = advantages(runs, LONG, name)
        values = [long - short for long, short in zip(at_long, at_short, strict=True)]
        yield above_by_interval(f"{method.title}: ρ = .9 less .1", 0, mean_over_seeds(values))


@STUDY.experiment("X10", "§1", grid)
def without_a_bias_all_are_equal(runs: list[Grid]) -> Iterator[Finding]:
    """On unbiased preferences all methods are about equal.

    At ρ = .5, where the share of all pairs is .53. "About" is 0.2 of reward, a fifth of a fact, from the mean of all
    methods. Those that learn from the pairs themselves are ahead of those that distil, with either β: the pairs tell of
    wrong facts, and the small reward models do not. Those of X5's second design did hardly better: p-DPO was 0.22 above
    the mean, and d-DPO 0.21 below it.
    """
    share = NEUTRAL
    for name, method in METHODS.items():
        values = []
        for run in runs:
            rewards = torch.stack([judged_rewards(run[share], other) for other in METHODS])
            values.append(judged_rewards(run[share], name) - rewards.mean(0))
        number = mean_over_seeds(values)
        yield between_by_interval(f"{method.title} less the mean", -ABOUT_EQUAL, ABOUT_EQUAL, number)


# ---------------------------------------------------------------- the strengths


def log_strength_of(rewards: Tensor) -> Statistic:
    """log10 of the strength with the highest mean reward in each resample of the prompts. rewards: (strengths, n)."""
    logs = tensor_of(list(STRENGTHS)).log10()

    def statistic(counts: Tensor) -> Tensor:
        best = (counts @ rewards.T).argmax(1)
        return logs[best]

    return statistic


def fall_of_strength(run: Grid, methods: Sequence[str]) -> Statistic:
    """log10 of the best strength at the smallest ρ less that at the largest, mean over methods, in each resample."""
    falls = []
    for method in methods:
        at_short = log_strength_of(candidates(run[SHORT], method))
        at_long = log_strength_of(candidates(run[LONG], method))
        falls.append(minus(at_short, at_long))

    def statistic(counts: Tensor) -> Tensor:
        of_methods = [fall(counts) for fall in falls]
        return torch.stack(of_methods).mean(0)

    return statistic


def num_prompts_of(run: Grid) -> int:
    return len(rewards_in(run[SHORT])["sft"])


@STUDY.experiment("X11", "Fig. D.1", grid)
def the_best_strength_falls_with_the_share(runs: list[Grid]) -> Iterator[Finding]:
    """The best β is inversely correlated with ρ, and so is IPO's τ.

    log10 of the better of two strengths at ρ = .1 less that at ρ = .9. Every resample of the prompts makes its own
    choice. τ is that of the paper's fixed gap 1/τ.
    """
    num_prompts = [num_prompts_of(run) for run in runs]
    others = [name for name in METHODS if name != "ipo"]
    for words, methods in (("β, mean of five methods", others), ("IPO's τ", ["ipo"])):
        number = over_seeds([fall_of_strength(run, methods) for run in runs], num_prompts)
        yield above_by_interval(f"fall of the best log10 of {words}", 0, number)


@STUDY.experiment("X12", "Fig. D.1", grid)
def settings_differ_and_seeds_do_not(runs: list[Grid]) -> Iterator[Finding]:
    """Different ρ have different best settings, and the results are robust to the seed.

    What a method gains by the strength that is best at its ρ over that which is best at the opposite ρ, both selected
    on the other half of the prompts. Robust: between seeds, an advantage varies by less than 0.2.
    """
    for share in (SHORT, LONG):
        opposite = LONG if share == SHORT else SHORT
        values = []
        for run in runs:
            gains = []
            for name in METHODS:
                rewards = candidates(run[share], name)
                elsewhere = selected_on_the_other_half(rewards, candidates(run[opposite], name))
                gains.append(selected_on_the_other_half(rewards) - elsewhere)
            values.append(torch.stack(gains).mean(0))
        yield above_by_interval(f"ρ = {share}: gain by its own strength", 0, mean_over_seeds(values))

    if len(runs) > 1:
        deviations = []
        for share in SHARES:
            for name in METHODS:
                means = torch.stack([values.mean() for values in advantages(runs, share, name)])
                deviations.append(means.std())
        mean = float(torch.stack(deviations).mean())
        yield below("standard deviation of an advantage between seeds", ABOUT_EQUAL, mean)


# ---------------------------------------------------------------- the reward models


class Probe(NamedTuple):
    """Held-out pairs, the better summary first."""

    oracle: Tensor  # (n, 2)
    lengths: Tensor  # (n, 2), in tokens, with the EOS
    scores: Tensor  # (n, 2, models)


def read_probe(rows: Artifact) -> Probe:
    oracle = []
    lengths = []
    scores = []
    for row in read_jsonl(rows.path):
        texts = (row["chosen"], row["rejected"])
        oracle.append([notices.oracle(row["prompt"], text) for text in texts])
        lengths.append([length_of(text) for text in texts])
        scores.append(row["scores"])
    return Probe(tensor_of(oracle), tensor_of(lengths), tensor_of(scores))


def length_of(text: str) -> int:
    """The tokens of a summary, with the EOS."""
    return len(notices.words(text)) + 1


def column_of(share: float, bias: float | None = None) -> int:
    """Where the scores of r_ρ, or of r_ρ,b, are in a probe."""
    first = SHARES.index(share) * (1 + len(BIASES))
    return first if bias is None else first + 1 + BIASES.index(bias)


def moments_of(*columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Σ x xᵀ over the completions in each resample, x = (1, columns): counts (R, n) → (R, 1 + k, 1 + k).

    columns: (n, 2) each, one number for each completion of a prompt.
    """
    x = torch.stack([torch.ones_like(columns[0]), *columns], 2)  # (n, 2, 1 + k)
    products = torch.einsum("nci,ncj->nij", x, x)

    def moments(counts: Tensor) -> Tensor:
        return torch.einsum("rn,nij->rij", counts, products)

    return moments


def length_slope_of(scores: Tensor, probe: Probe) -> Statistic:
    """The coefficient of length in the regression of scores (n, 2) on the oracle's reward and length, per token."""
    moments = moments_of(probe.oracle, probe.lengths, scores)

    def statistic(counts: Tensor) -> Tensor:
        of_resample = moments(counts)
        gram = of_resample[:, :3, :3]
        with_scores = of_resample[:, :3, 3]
        coefficients = torch.linalg.solve(gram, with_scores)
        return coefficients[:, 2]

    return statistic


def correlation_of(first: Tensor, second: Tensor) -> Statistic:
    """Pearson's correlation of two numbers of each completion, (n, 2) each."""
    moments = moments_of(first, second)

    def statistic(counts: Tensor) -> Tensor:
        of_resample = moments(counts)
        means = of_resample / of_resample[:, :1, :1]
        products_of_means = means[:, 1:, :1] * means[:, :1, 1:]
        covariance = means[:, 1:, 1:] - products_of_means
        variances = covariance.diagonal(dim1=1, dim2=2)
        return covariance[:, 0, 1] / variances.prod(1).sqrt()

    return statistic


def minus(first: Statistic, second: Statistic) -> Statistic:
    return lambda counts: first(counts) - second(counts)


def longer_is_preferred(pairs: Artifact) -> Tensor:
    """Whether the longer summary is preferred, for the pairs of which one is longer, (n,), ones and zeros."""
    values = []
    for row in read_jsonl(pairs.path):
        chosen, rejected = length_of(row["chosen"]), length_of(row["rejected"])
        if max(chosen, rejected) >= LONGER * min(chosen, rejected):
            values.append(float(chosen > rejected))
    return tensor_of(values)


@STUDY.experiment("X1", "§4.1", labelled)
def the_longer_one_is_preferred(runs: list[Artifact]) -> Iterator[Finding]:
    """After relabelling by the oracle, the longer response is preferred in 61% of the examples.

    The labelled demonstrations from which D_ρ is selected. Longer is, as in the paper, 10% more tokens. The share is a
    property of the demonstrations: with fewer superfluous clauses (`--superfluous 0.7 0.2 0.1`), which are long and
    worth nothing, it is .61 (seed 0).
    """
    number = mean_over_seeds([longer_is_preferred(run) for run in runs])
    yield above_by_interval("share of the pairs", 0.5, number, ".3f")
    yield between_by_interval("the same share", 0.56, 0.66, number, ".3f")


@STUDY.experiment("X2", "footnote 3", probed)
def length_correlates_with_reward(runs: list[Artifact]) -> Iterator[Finding]:
    """Length correlates with reward.

    Correlation of the number of tokens with the oracle's reward, and with that of the model r_ρ of unbiased pairs
    (ρ = .5), over demonstrations of up to 1,000 held-out posts.
    """
    probes = [read_probe(run) for run in runs]
    sizes = [len(probe.oracle) for probe in probes]
    oracle = [correlation_of(probe.oracle, probe.lengths) for probe in probes]
    learned = []
    for probe in probes:
        scores = probe.scores[:, :, column_of(NEUTRAL)]
        learned.append(correlation_of(scores, probe.lengths))
    yield above_by_interval("the oracle's reward and length", 0, over_seeds(oracle, sizes))
    yield above_by_interval("the reward of r_ρ at ρ = .5 and length", 0, over_seeds(learned, sizes))


@STUDY.experiment("X3", "§4.1", probed, quick=True)
def sensitivity_to_length_differs(runs: list[Artifact]) -> Iterator[Finding]:
    """The sensitivity to length of reward models differs with the share b of their training set.

    Coefficient of length, in nats of preference for a token, at an equal reward by the oracle: that of r_ρ,b with
    b = .8 less that with b = .2, for each ρ.
    """
    probes = [read_probe(run) for run in runs]
    sizes = [len(probe.oracle) for probe in probes]

    def slopes(column: int) -> list[Statistic]:
        return [length_slope_of(probe.scores[:, :, column], probe) for probe in probes]

    for share in SHARES:
        high = slopes(column_of(share, BIASES[-1]))
        low = slopes(column_of(share, BIASES[0]))
        number = over_seeds(list(map(minus, high, low)), sizes)
        yield above_by_interval(f"ρ = {share}: b = .8 less b = .2", 0, number)
    for share in SHARES:
        for bias in (None, *BIASES):
            name = f"r_ρ with ρ = {share}" if bias is None else f"ρ = {share}, b = {bias}"
            yield reported_with_interval(name, over_seeds(slopes(column_of(share, bias)), sizes))


# ---------------------------------------------------------------- the member that e-DPO distils


def selected_strength(members: Members) -> float:
    """The β of e-DPO that is better on all prompts."""
    best = int(candidates(members.results, "e").mean(1).argmax())
    return STRENGTHS[best]


def picks(members: Members) -> Tensor:
    """Which r_ρ,b had the smallest loss at each step, (steps, members), ones and zeros."""
    lines = read_jsonl(members.logs[selected_strength(members)].path)
    columns = [f"rm/{i}" for i in range(len(BIASES))]
    steps = [[line[column] for column in columns] for line in lines if columns[0] in line]
    return tensor_of(steps)


def best_matches(members: Members) -> Tensor:
    """Which r_ρ,b matches the final policy best on each training pair, (n, members), ones and zeros."""
    beta = selected_strength(members)
    logps = logps_in(members.logps)
    ratios = logps[f"e_{beta:g}"] - logps["sft"]  # (n, 2)
    h = ratios[:, 0] - ratios[:, 1]
    differences_of_rewards = beta * h.unsqueeze(1)
    errors = (reward_gaps(members) - differences_of_rewards) ** 2
    return F.one_hot(errors.argmin(1), len(BIASES)).double()


def reward_gaps(members: Members) -> Tensor:
    """Δr of each r_ρ,b on the training pairs, (n, members)."""
    scores = scores_of(members.rows)  # (n, 2, members)
    return scores[:, 0] - scores[:, 1]


def mean_bias(shares: Tensor) -> Tensor:
    """The mean b of what is picked or matches, (n, members) → (n,)."""
    return shares @ tensor_of(list(BIASES))


@STUDY.experiment("X13", "Fig. C.1", picked_members)
def members_of_the_opposite_bias_match(runs: list[Picked]) -> Iterator[Finding]:
    """The reward model that matches an example best tends to have the opposite bias b.

    The mean b of the best match of each training pair, and of what e-DPO picked at each step, at ρ = .1 less at .9. By
    the theory on tabular policies e-DPO picks the model with the least mean square of its reward gaps. That is b = .5
    here at every ρ, because a strong bias makes large gaps, and the other two change nothing: neither by pairs nor by
    steps does the pick depend on ρ. With X5's second design the best matches and the picks had the bias of the pairs
    rather than the opposite one: their mean b was lower at ρ = .1 than at .9, by 0.09 and 0.18.
    """
    for words, shares_of in (("best matches", best_matches), ("picks", picks)):
        values = []
        for run in runs:
            at_short = mean_bias(shares_of(run[SHORT]))
            at_long = mean_bias(shares_of(run[LONG]))
            values.append(at_short - at_long)
        yield above_by_interval(f"mean b of the {words}, ρ = .1 less .9", 0, mean_over_seeds(values))
    for share in SHARES:
        for i, bias in enumerate(BIASES):
            matched = mean_over_seeds([best_matches(run[share])[:, i] for run in runs])
            yield reported_with_interval(f"ρ = {share}: best match b = {bias}", matched)
            picked = mean_over_seeds([picks(run[share])[:, i] for run in runs])
            yield reported_with_interval(f"ρ = {share}: picked b = {bias}", picked)
            squares = mean_over_seeds([reward_gaps(run[share])[:, i] ** 2 for run in runs])
            yield reported_with_interval(f"ρ = {share}: mean square gap of b = {bias}", squares)


class Success(NamedTuple):
    """What tells why e-DPO is better at the smallest ρ."""

    members: Members
    probe: Artifact
    controlled: Controlled


def success(plan: Plan, seed: int) -> Success:
    members = picked_members(plan, seed)[SHORT]
    return Success(members, probed(plan, seed), checkpoint_ensemble(plan, seed))


@STUDY.experiment("X14", "§4.2", success)
def the_ensemble_lacks_the_bias(runs: list[Success]) -> Iterator[Finding]:
    """e-DPO is successful because it distils models without the bias of the training set.

    At ρ = .1. The member that was picked most often and r_ρ are compared on unbiased held-out pairs: in the share that
    they order as the oracle does, and in their coefficients of length. And e-DPO with the members is compared with
    e-DPO on checkpoints of r_ρ, all of which have the bias. With X5's second design the first two were above 0, and
    e-DPO with the members gained 0.36 [-0.00, 0.69] over checkpoints: "partly".
    """
    share = SHORT
    accuracies = []
    slopes = []
    sizes = []
    for run in runs:
        probe = read_probe(run.probe)
        bias = BIASES[int(picks(run.members).sum(0).argmax())]
        picked = probe.scores[:, :, column_of(share, bias)]
        single_model = probe.scores[:, :, column_of(share)]
        accuracies.append(is_right(picked) - is_right(single_model))
        slopes.append(minus(length_slope_of(picked, probe), length_slope_of(single_model, probe)))
        sizes.append(len(probe.oracle))
    yield above_by_interval("accuracy of the member less that of r_ρ", 0, mean_over_seeds(accuracies))
    yield above_by_interval("coefficient of length of the member less that of r_ρ", 0, over_seeds(slopes, sizes))
    yield above_by_interval("reward by the members less by checkpoints of r_ρ", 0, ensembles_apart(runs))


def is_right(scores: Tensor) -> Tensor:
    """Whether the first score is higher, (n, 2) → (n,), ones and zeros."""
    return (scores[:, 0] > scores[:, 1]).double()


def ensembles_apart(runs: list[Success]) -> dict:
    """The rewards of e-DPO less those with checkpoints of r_ρ as the ensemble."""
    values = []
    for run in runs:
        of_subsets = judged_rewards(run.controlled.grid, "e")
        values.append(of_subsets - judged_rewards(run.controlled.control, "e"))
    return mean_over_seeds(values)


@STUDY.experiment("X15", "footnote 4", checkpoint_ensemble)
def checkpoints_bring_nothing(runs: list[Controlled]) -> Iterator[Finding]:
    """An ensemble of checkpoints of one reward model brings nothing.

    At ρ = .1, e-DPO on r_ρ after 30, 60 and 90 steps, less d-DPO and pd-DPO on r_ρ after 90. "Nothing" is less than 0.2
    of reward, a fifth of a fact. They bring a quarter of what the r_ρ,b bring (X6), perhaps because an early checkpoint
    has less of the bias. With X5's second design they brought nothing, 0.08 [0.01, 0.17] and 0.07 [0.00, 0.17].
    """
    for other in ("d", "pd"):
        values = [judged_rewards(run.control, "e") - judged_rewards(run.grid, other) for run in runs]
        yield below_by_interval(f"by checkpoints less {METHODS[other].title}", ABOUT_EQUAL, mean_over_seeds(values))


# ---------------------------------------------------------------- the likelihoods


def last_log_ratios(log: Artifact, method: str) -> Tensor:
    """log π_θ/π_ref of the preferred completions in each of the last LAST_STEPS batches, in nats."""
    strength = STRENGTHS[0] / 2 if method == "ipo" else STRENGTHS[0]
    rewards = [line["rewards/chosen"] for line in read_jsonl(log.path) if "rewards/chosen" in line]
    return tensor_of(rewards[-LAST_STEPS:]) / strength


@STUDY.experiment("T8", "§2.3", overfitted)
def overfitted_policies_leave_the_good_responses(runs: list[Overfitted]) -> Iterator[Finding]:
    """DPO can overfit to almost never producing anything like the good responses.

    DPO sees 480 pairs four times, at ρ = .5 and β = .01. Almost never: the chosen completions of these pairs become a
    thousand times less likely, and samples for held-out posts worse than the SFT model's.
    """
    changes = []
    rewards = []
    for run in runs:
        logps = logps_in(run.logps)
        changes.append((logps["dpo"] - logps["sft"])[:, 0])
        results = rewards_in(run.results)
        rewards.append(results["dpo"] - results["sft"])
    yield below_by_interval("log π_θ/π_ref of the chosen", -math.log(1000), mean_over_seeds(changes))
    yield below_by_interval("reward of samples less that of SFT", 0, mean_over_seeds(rewards))


@STUDY.experiment("X16", "§2.3, §5", likelihoods)
def the_likelihood_of_the_preferred_falls(runs: list[dict[str, Artifact]]) -> Iterator[Finding]:
    """The likelihood of preferred completions falls under DPO, less under distillation.

    log π_θ/π_ref of the chosen ones in the last ten batches, each of which is seen once, at ρ = .5 and β = .1; other
    methods less DPO on the same batches. The intervals are over these batches. With so small a β distillation asks for
    log-ratios Δr/β of ten times the reward gap, and it takes them from the preferred completions, too.
    """
    of_method = {name: [last_log_ratios(run[name], name) for run in runs] for name in METHODS}
    yield below_by_interval("DPO", 0, mean_over_seeds(of_method["dpo"]))
    for name in METHODS:
        if name == "dpo":
            continue
        values = [ours - theirs for ours, theirs in zip(of_method[name], of_method["dpo"], strict=True)]
        number = mean_over_seeds(values)
        if name in DISTILLED:
            yield above_by_interval(less(name, "dpo"), 0, number)
        else:
            yield reported_with_interval(less(name, "dpo"), number)


# ---------------------------------------------------------------- figures


@STUDY.figure(
    "Advantage in oracle reward over the SFT model against the share ρ of pairs that prefer the longer summary, with "
    "95% intervals (Fig. 2 of the paper). Each method has the better of two strengths.",
    grid,
)
def advantage(runs: list[Grid]) -> "Figure":
    figure, panels = canvas(["a"], (6, 4))
    axes = panels["a"]
    axes.axhline(0, color=GREY, linewidth=0.8)
    for i, (name, color) in enumerate(zip(METHODS, PALETTE, strict=False)):
        numbers = [mean_over_seeds(advantages(runs, share, name)) for share in SHARES]
        shifted = [share + 0.012 * (i - 2.5) for share in SHARES]
        draw_numbers(axes, shifted, numbers, color=color, label=METHODS[name].title)
    axes.set_xticks(SHARES)
    label_axes(axes, "", "ρ, share of pairs that prefer the longer summary", "reward less that of SFT")
    return figure


@STUDY.figure(
    "Reward of each strength β (IPO: τ = β) on the held-out prompts, with 95% intervals (Fig. D.1 of the paper).", grid
)
def strengths(runs: list[Grid]) -> "Figure":
    figure, panels = canvas([SHARES], (9, 3.2))
    for share in SHARES:
        axes = panels[share]
        for i, (name, color) in enumerate(zip(METHODS, PALETTE, strict=False)):
            rewards = [candidates(run[share], name) for run in runs]
            numbers = [mean_over_seeds([values[j] for values in rewards]) for j in range(len(STRENGTHS))]
            shifted = [beta * 1.06 ** (i - 2.5) for beta in STRENGTHS]
            draw_numbers(axes, shifted, numbers, color=color, label=METHODS[name].title)
        sft = mean_over_seeds([rewards_in(run[share])["sft"] for run in runs])
        axes.axhline(sft["mean"], color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        label_axes(axes, f"ρ = {share}", "β", "reward (line: SFT)")
    legend_below(figure, panels.values(), len(METHODS))
    return figure


@STUDY.figure(
    "Which reward model r_ρ,b e-DPO distils: left, the shares of the steps at which it had the smallest loss; right, "
    "of the training pairs that it matches best at the end (Fig. C.1 of the paper).",
    picked_members,
)
def members_distilled(runs: list[Picked]) -> "Figure":
    figure, panels = canvas([("picks", "matches")], (7, 3.2))
    for panel, shares_of, title in (("picks", picks, "picked, by steps"), ("matches", best_matches, "best match")):
        axes = panels[panel]
        bottoms = torch.zeros(len(SHARES), dtype=torch.double)
        for i, (bias, color) in enumerate(zip(BIASES, PALETTE, strict=False)):
            of_shares = []
            for share in SHARES:
                of_seeds = [shares_of(run[share])[:, i].mean() for run in runs]
                of_shares.append(torch.stack(of_seeds).mean())
            heights = torch.stack(of_shares)
            axes.bar([str(share) for share in SHARES], heights, bottom=bottoms, color=color, label=f"b = {bias}")
            bottoms += heights
        label_axes(axes, title, "ρ", "share")
    legend_below(figure, panels.values(), len(BIASES))
    return figure


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
