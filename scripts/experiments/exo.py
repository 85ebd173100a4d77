"""EXO, arXiv 2402.00856: its statements about trained models, tried in a small world whose true reward is known.

The policies have 1M parameters, the posts and their summaries are made up, and the judge is the true reward, in the
place of GPT-4 too. The world leaves clauses out (world_a): a policy gains by completeness, correct facts and brevity.

An SFT model of demonstrations writes the completions. In section 4.1 the true reward orders pairs of them and scores
groups. In section 4.2 preferences are sampled from it, and a small reward model, which cannot look facts up, learns
from these. All methods have the same β, learning rate, number of steps and number of completions in a step.

    python scripts/experiments/exo.py
    python scripts/experiments/exo.py --experiment F2a
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scripts.lab.best_of import selection_weights
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
from scripts.lab.frontier import Curve, at_equal_kl, divergence_from, log_weights, optimum_of
from scripts.lab.interval_plots import draw_curve, draw_numbers, legend_below
from scripts.lab.measured import logps_in, policies_in, read, rewards_of, scores_of, tensor_of
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, label_axes
from scripts.lab.policies import Opponents, wins_of_samples
from scripts.lab.row_files import read_jsonl
from scripts.lab.statistics import Statistic, mean_over_seeds, over_seeds
from scripts.lab.worlds import OMISSION, world_a

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Study("exo", "Towards Efficient Exact Optimization of Language Model Alignment (EXO)")

# the paper has β_π = 0.5 on TL;DR and HH; β_r is 1, as the rewards are in nats of preference
BETA = 0.5
BETA_R = 1.0
SIZES = (2, 4, 8)  # K
STEPS = 32  # one epoch
EVERY = 8  # steps between two checkpoints
COMPLETIONS = 64  # of a step, whatever K is
RATE = 1e-4
RATES = (RATE, 3e-4, 1e-3)
LENGTH = "--max-new-tokens 48"
SAMPLING = f"{LENGTH} --batch-size 512"
PREFERENCES = {"pref": "", "clean": "--noise-free"}  # as people prefer, and as the reward ranks
NUM_POSTS = 96  # held-out
NUM_MANY = 128  # completions of each of some posts, N of best-of-N
METHODS = {"exo": "EXO", "dpo": "DPO"}


# ---------------------------------------------------------------- the data


def pairs(plan: Plan, seed: int, kind: str = "pref") -> Artifact:
    """Pairs of completions of the SFT model, ordered by sampled preferences, or ("clean") by the reward itself."""
    return preferences(plan, f"exo/{seed}/pairs_{kind}", drawn(plan, seed, 2), seed, PREFERENCES[kind])


def held_out(plan: Plan, seed: int) -> Artifact:
    """New posts with a pair of demonstrations, of which one is chosen."""
    world = world_a(plan, seed).notices
    pairs = plan.stage(
        f"exo/{seed}/held_out_pairs",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows {NUM_POSTS} --seed {1000 + seed} {OMISSION} "
        "--exclude {sft} {prompts}",
        sft=world / "sft.jsonl",
        prompts=world / "prompts.jsonl",
    )
    return preferences(plan, f"exo/{seed}/held_out", pairs / "rows.jsonl", seed)


def preferences(plan: Plan, name: str, rows: Artifact, seed: int, flags: str = "") -> Artifact:
    """Pairs by the oracle."""
    command = f"scripts/notices.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --seed {seed} {flags}"
    return plan.stage(name, command, rows=rows) / "rows.jsonl"


def drawn(plan: Plan, seed: int, size: int) -> Artifact:
    """Groups of K completions of the SFT model, as many completions for each K."""
    world = world_a(plan, seed)
    stage = plan.stage(
        f"exo/{seed}/drawn_{size}",
        f"scripts/sample.py --model {{sft}} --rows {{prompts}} --output {{out}}/rows.jsonl --num-completions {size} "
        f"--max-rows {STEPS * COMPLETIONS // size} {SAMPLING} --seed {seed}",
        sft=world.sft,
        prompts=world.notices / "prompts.jsonl",
    )
    return stage / "rows.jsonl"


def weak_model(plan: Plan, seed: int) -> Stage:
    """A reward model that is too small to look facts up, trained on the preferences."""
    tiny = plan.stage(
        f"exo/{seed}/tiny",
        f"scripts/notices.py world --output-dir {{out}} --tiny --sft-rows 0 --prompt-rows 0 --seed {seed}",
    )
    return plan.stage(
        f"exo/{seed}/rm",
        "algos/rm.py --model {tiny} --train-data {rows} --output-dir {out} --max-steps 128 --batch-size 32 "
        f"--learning-rate 3e-3 --warmup-steps 10 --save-every 0 --seed {seed}",
        tiny=tiny / "tiny",
        rows=pairs(plan, seed),
    )


def scored(plan: Plan, seed: int, rows: Artifact, name: str, by: str) -> Artifact:
    """Rows with scores of the oracle or of the weak reward model."""
    command = "scripts/score.py --rows {rows} --output {out}/rows.jsonl"
    if by == "oracle":
        stage = plan.stage(f"exo/{seed}/{name}_by_oracle", f"{command} --reward notices", rows=rows)
    else:
        rm = weak_model(plan, seed)
        stage = plan.stage(f"exo/{seed}/{name}_by_weak", f"{command} --reward-models {{rm}}", rows=rows, rm=rm)
    return stage / "rows.jsonl"


# ---------------------------------------------------------------- the policies


def tuning(size: int, rate: float, seed: int) -> str:
    """The flags that all methods share."""
    return (
        f"--model {{sft}} --train-data {{rows}} --output-dir {{out}} --beta {BETA} --batch-size {COMPLETIONS // size} "
        f"--max-steps {STEPS} --learning-rate {rate:g} --lr-schedule constant --warmup-steps 4 "
        f"--save-every {EVERY} --keep {STEPS // EVERY} --seed {seed}"
    )


def by_pairs(plan: Plan, seed: int, method: str, kind: str = "pref") -> Stage:
    """DPO-pref or EXO-pref. `kind` is the order of the pairs."""
    return plan.stage(
        f"exo/{seed}/{method}_{kind}",
        f"algos/{method}.py {tuning(2, RATE, seed)}",
        sft=world_a(plan, seed).sft,
        rows=pairs(plan, seed, kind),
    )


def without_sft(plan: Plan, seed: int) -> Stage:
    """EXO-pref that starts from the base model."""
    return plan.stage(
        f"exo/{seed}/exo_from_base",
        f"algos/exo.py {tuning(2, RATE, seed)}",
        sft=world_a(plan, seed).notices / "base",
        rows=pairs(plan, seed),
    )


def by_rewards(plan: Plan, seed: int, method: str, size: int, by: str = "oracle", rate: float = RATE) -> Stage:
    """EXO-rw or DPO-rw on groups of K completions."""
    kl = {"exo": "reverse", "dpo": "forward"}[method]
    rated = "" if rate == RATE else f"_{rate:g}"
    rows = drawn(plan, seed, size)
    return plan.stage(
        f"exo/{seed}/{method}_rw{size}_{by}{rated}",
        f"algos/exo.py --kl {kl} --beta-r {BETA_R} {tuning(size, rate, seed)}",
        sft=world_a(plan, seed).sft,
        rows=scored(plan, seed, rows, f"drawn_{size}", by),
    )


def by_ppo(plan: Plan, seed: int, by: str = "oracle", rate: float = RATE) -> Stage:
    """PPO with as many completions in each step, and the price β_π β_r of a nat."""
    world = world_a(plan, seed)
    inputs: dict = {"sft": world.sft, "prompts": world.notices / "prompts.jsonl"}
    reward = "notices"
    if by == "weak":
        reward = "{rm}"
        inputs["rm"] = weak_model(plan, seed)
    return plan.stage(
        f"exo/{seed}/ppo_{by}_{rate:g}",
        f"scripts/baselines/ppo.py --model {{sft}} --train-data {{prompts}} --reward {reward} --output-dir {{out}} "
        f"--beta {BETA * BETA_R} --steps {STEPS} --batch-size {COMPLETIONS // 4} --num-completions 4 --epochs 2 "
        f"--minibatches 2 --learning-rate {rate:g} --warmup-steps 4 --value-warmup-steps 2 {LENGTH} "
        f"--seed {seed}",
        **inputs,
    )


def steps_of(method: str) -> range:
    """The steps after which a method is evaluated, fewer of them with K = 2 and 8."""
    every = EVERY
    if method.endswith(("2", "8")):
        every = 2 * EVERY
    return range(every, STEPS + 1, every)


def checkpoints(plan: Plan, method: str, run: Stage) -> dict[str, Artifact]:
    """The models after these steps, by their names."""
    steps = steps_of(method)
    stage = plan.stage(
        f"{run.path.relative_to(plan.directory)}_models",
        f"scripts/export.py {{run}} --every {steps.step} --output-dir {{out}}",
        run=run,
    )
    return {f"{method}_{step}": stage / f"step-{step:06}" for step in steps}


# ---------------------------------------------------------------- the measurements


def evaluation(plan: Plan, seed: int, name: str, policies: dict[str, Stage | Artifact], flags: str) -> Artifact:
    """Rewards and KL of policies on the held-out posts."""
    stage = plan.stage(
        f"exo/{seed}/{name}",
        f"scripts/evaluate.py --policies {names(policies)} --reference {{reference}} --rows {{rows}} "
        f"--output {{out}}/results.json --num-prompts {NUM_POSTS} {SAMPLING} --seed {seed} {flags}",
        reference=world_a(plan, seed).sft,
        rows=held_out(plan, seed),
        **policies,
    )
    return stage / "results.json"


def names(policies: dict[str, Stage | Artifact]) -> str:
    """NAME={NAME} of each policy."""
    return " ".join(f"{policy}={{{policy}}}" for policy in policies)


def along(plan: Plan, seed: int, name: str, runs: dict[str, Stage]) -> Artifact:
    """The evaluation of runs along their way, and of the SFT model."""
    policies: dict[str, Stage | Artifact] = {"sft": world_a(plan, seed).sft}
    for method, run in runs.items():
        policies |= checkpoints(plan, method, run)
    return evaluation(plan, seed, name, policies, "--num-samples 2")


def pairwise(plan: Plan, seed: int) -> Artifact:
    """Of what learned from pairs in the order of their rewards."""
    runs = {method: by_pairs(plan, seed, method, "clean") for method in METHODS}
    return along(plan, seed, "evaluated_pairs", runs)


class Controlled(NamedTuple):
    """What learned from the oracle's rewards: of pairs, of K completions, and PPO at three learning rates."""

    pairs: Artifact
    groups: Artifact
    rates: Artifact


def controlled(plan: Plan, seed: int) -> Controlled:
    runs = {}
    policies: dict[str, Stage | Artifact] = {}
    for size in SIZES:
        for method in METHODS:
            runs[f"{method}{size}"] = by_rewards(plan, seed, method, size)
    for rate in RATES:
        policies[f"ppo_{rate:g}"] = by_ppo(plan, seed, "oracle", rate)
        policies[f"exo_{rate:g}"] = by_rewards(plan, seed, "exo", 4, "oracle", rate)
    groups = along(plan, seed, "evaluated_groups", runs)
    rates = evaluation(plan, seed, "evaluated_rates", policies, "--num-samples 2")
    return Controlled(pairwise(plan, seed), groups, rates)


class Many(NamedTuple):
    """128 completions of the SFT model for each of 24 posts, by both rewards."""

    by_oracle: Artifact
    by_weak: Artifact


def many(plan: Plan, seed: int) -> Many:
    stage = plan.stage(
        f"exo/{seed}/many",
        f"scripts/sample.py --model {{sft}} --rows {{rows}} --output {{out}}/rows.jsonl --num-completions {NUM_MANY} "
        f"--max-rows 24 {SAMPLING} --seed {seed}",
        sft=world_a(plan, seed).sft,
        rows=held_out(plan, seed),
    )
    rows = stage / "rows.jsonl"
    return Many(*(scored(plan, seed, rows, "many", by) for by in ("oracle", "weak")))


class Densities(NamedTuple):
    """Completions of the SFT model with their rewards, and their log-probs under the policies."""

    many: Many
    logps: Artifact


def densities(plan: Plan, seed: int) -> Densities:
    completions = many(plan, seed)
    policies: dict[str, Stage | Artifact] = {"sft": world_a(plan, seed).sft}
    for size in SIZES:
        for method in METHODS:
            policies[f"{method}{size}"] = by_rewards(plan, seed, method, size)
    logps = plan.stage(
        f"exo/{seed}/logps",
        f"scripts/logps.py --policies {names(policies)} --rows {{rows}} --output {{out}}/logps.json",
        rows=completions.by_oracle,
        **policies,
    )
    return Densities(completions, logps / "logps.json")


class Table(NamedTuple):
    """The policies of Table 1 by the oracle and the weak reward model."""

    results: Artifact
    chosen: Artifact  # held-out pairs with the weak model's scores
    many: Many


def table_1(plan: Plan, seed: int) -> Table:
    policies: dict[str, Stage | Artifact] = {
        "sft": world_a(plan, seed).sft,
        "dpo_pref": by_pairs(plan, seed, "dpo"),
        "exo_pref": by_pairs(plan, seed, "exo"),
        "ppo": by_ppo(plan, seed, "weak"),
        "dpo_rw": by_rewards(plan, seed, "dpo", 4, "weak"),
        "exo_rw": by_rewards(plan, seed, "exo", 4, "weak"),
    }
    stage = plan.stage(
        f"exo/{seed}/table",
        f"scripts/evaluate.py --policies {names(policies)} --rows {{rows}} --output {{out}}/results.json "
        f"--num-prompts {NUM_POSTS} --num-samples 4 {SAMPLING} --seed {seed} --against-rows --best-of 1 "
        "--select-by {rm}",
        rows=held_out(plan, seed),
        rm=weak_model(plan, seed),
        **policies,
    )
    chosen = scored(plan, seed, held_out(plan, seed), "held_out", "weak")
    return Table(stage / "results.json", chosen, many(plan, seed))


def starts(plan: Plan, seed: int) -> Artifact:
    """EXO-pref on other writers' pairs, from the base model and after SFT on their chosen completions."""
    policies: dict[str, Stage | Artifact] = {
        "sft": world_a(plan, seed).sft,
        "with_sft": by_pairs(plan, seed, "exo"),
        "without_sft": without_sft(plan, seed),
    }
    return evaluation(plan, seed, "starts", policies, "--num-samples 2")


# ---------------------------------------------------------------- numbers from what the stages have left


def curve_of(policies: dict[str, dict], points: Sequence[str], value: Callable[[Tensor], Tensor]) -> Curve:
    """The curve of the SFT model and these policies. value: of the rewards (n, K), such as their sigmoid."""
    kls = []
    values = []
    for point in ("sft", *points):
        kls.append(tensor_of(policies[point]["step_kls"]).mean(1))
        values.append(value(rewards_of(policies[point])).mean(1))
    return Curve(torch.stack(kls), torch.stack(values))


def checkpoint_names(method: str) -> list[str]:
    return [f"{method}_{step}" for step in steps_of(method)]


def curves(runs: Sequence[Artifact], method: str, value: Callable[[Tensor], Tensor] = Tensor.clone) -> list[Curve]:
    """For each seed the curve of a method's checkpoints."""
    return [curve_of(policies_in(run), checkpoint_names(method), value) for run in runs]


def ppo_curves(runs: Sequence[Controlled], value: Callable[[Tensor], Tensor] = Tensor.clone) -> list[Curve]:
    """For each seed the curve of PPO's three learning rates."""
    points = [f"ppo_{rate:g}" for rate in RATES]
    of_seeds = []
    for run in runs:
        policies = policies_in(run.rates) | {"sft": policies_in(run.groups)["sft"]}
        of_seeds.append(curve_of(policies, points, value))
    return of_seeds


def difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> dict:
    """The mean difference at equal KL."""
    statistics = [at_equal_kl(our, their) for our, their in zip(ours, theirs, strict=True)]
    return over_seeds(statistics, [curve.kls.shape[1] for curve in ours])


def last_points(name: str, found: Sequence[Curve]) -> Iterator[Finding]:
    """Where the curves end."""
    yield reported_with_interval(f"{name} at the end, KL", mean_over_seeds([curve.kls[-1] for curve in found]))
    yield reported_with_interval(f"{name} at the end, reward", mean_over_seeds([curve.values[-1] for curve in found]))


def reward_differences(
    runs: Sequence[tuple[Artifact, Artifact]], ours: str, theirs: str, value: Callable[[Tensor], Tensor] | None = None
) -> dict:
    """The mean difference of two policies' rewards, post by post, or of another value of each post's rewards."""
    differences = []
    for our_results, their_results in runs:
        pair = [rewards_of(policies_in(our_results)[ours]), rewards_of(policies_in(their_results)[theirs])]
        our_values, their_values = (value(rewards) if value else rewards.mean(1) for rewards in pair)
        differences.append(our_values - their_values)
    return mean_over_seeds(differences)


# ---------------------------------------------------------------- Section 4.1


@STUDY.experiment("F2a", "Fig. 2", pairwise, quick=True)
def exo_pref_has_the_better_frontier(runs: list[Artifact]) -> Iterator[Finding]:
    """At equal KL, EXO-pref has a higher oracle reward than DPO-pref by a large margin.

    Pairs of the SFT model's completions, in the order of their true reward as in the paper. Other settings did not help
    EXO either (one seed, 128 posts): with a learning rate of 3e-4 the difference was -0.10 [-0.20, -0.02], with β = 0.1
    it was -0.01 [-0.03, 0.01]. Both start in the same direction, EXO-pref only harder (N4), and after one epoch both
    are far from their optima. There, and in families too small for the optimum, they would have to differ (F3h).
    """
    exo, dpo = curves(runs, "exo"), curves(runs, "dpo")
    yield above_by_interval("EXO-pref less DPO-pref, reward at equal KL", 0, difference(exo, dpo))
    yield from last_points("EXO-pref", exo)
    yield from last_points("DPO-pref", dpo)


@STUDY.experiment("F2c", "Fig. 2", controlled)
def dpo_rw_is_better_than_dpo_pref(runs: list[Controlled]) -> Iterator[Finding]:
    """DPO-rw with K = 4 is better than DPO-pref.

    As many completions, in groups of four with their true rewards, and in pairs in the order of their rewards.
    """
    rw = curves([run.groups for run in runs], "dpo4")
    pref = curves([run.pairs for run in runs], "dpo")
    yield above_by_interval("DPO-rw less DPO-pref, reward at equal KL", 0, difference(rw, pref))
    yield from last_points("DPO-rw", rw)
    yield from last_points("DPO-pref", pref)


@STUDY.experiment("F2h", "Fig. 2", controlled)
def exo_converges_as_groups_grow(runs: list[Controlled]) -> Iterator[Finding]:
    """EXO-rw's frontier improves as K grows, and converges.

    K = 2, 4 and 8 with the same number of completions, so that there are fewer groups of larger K, and fewer prompts.
    Their frontiers lie within about 0.1 of each other, at 1e-4 as at 3e-4 for K = 4 (C12).
    """
    of_size = {size: curves([run.groups for run in runs], f"exo{size}") for size in SIZES}
    yield above_by_interval("K = 4 less K = 2, reward at equal KL", 0, difference(of_size[4], of_size[2]))
    yield between_by_interval("K = 8 less K = 4, reward at equal KL", -0.1, 0.1, difference(of_size[8], of_size[4]))
    for size in SIZES:
        yield from last_points(f"K = {size}", of_size[size])


@STUDY.experiment("F2i", "Fig. 2", controlled)
def dpo_rw_is_worse_with_larger_groups(runs: list[Controlled]) -> Iterator[Finding]:
    """DPO-rw's frontier is worse with K = 8 than with K = 4.

    The same number of completions. EXO-rw is compared with it at each K.
    """
    of_size = {size: curves([run.groups for run in runs], f"dpo{size}") for size in SIZES}
    yield below_by_interval("K = 8 less K = 4, reward at equal KL", 0, difference(of_size[8], of_size[4]))
    yield reported_with_interval("K = 4 less K = 2, reward at equal KL", difference(of_size[4], of_size[2]))
    for size in SIZES:
        exo = curves([run.groups for run in runs], f"exo{size}")
        yield above_by_interval(
            f"EXO-rw less DPO-rw, K = {size}, reward at equal KL", 0, difference(exo, of_size[size])
        )
        yield from last_points(f"DPO-rw, K = {size}", of_size[size])


@STUDY.experiment("F2j", "Fig. 2", controlled)
def exo_has_a_better_frontier_than_ppo(runs: list[Controlled]) -> Iterator[Finding]:
    """EXO-rw's frontier lies above PPO's.

    Both with the true reward. PPO's curve joins its last policies at three learning rates, EXO-rw's (K = 4) its
    checkpoints. PPO at the smallest rate is as good: it learns from completions of its own, and the true reward cannot
    be exploited. With the weak reward model EXO-rw is better (T1c), and PPO at the largest rate is far worse (C12).
    """
    exo = curves([run.groups for run in runs], "exo4")
    ppo = ppo_curves(runs)
    yield above_by_interval("EXO-rw less PPO, reward at equal KL", 0, difference(exo, ppo))
    yield from last_points("EXO-rw", exo)
    yield from last_points("PPO at its highest rate", ppo)


@STUDY.experiment("F7", "Fig. 7", controlled)
def exo_has_the_best_frontier_of_accuracy(runs: list[Controlled]) -> Iterator[Finding]:
    """The frontier of classifier accuracy against KL is best for EXO.

    As in the paper the accuracy is the sigmoid of the reward. It saturates where rewards are high, so that it shows
    less than the reward itself (F2a, F2j), which has no advantage either.
    """
    pairs = [run.pairs for run in runs]
    groups = [run.groups for run in runs]
    exo_pref, dpo_pref = (curves(pairs, method, torch.sigmoid) for method in METHODS)
    exo_rw, dpo_rw = (curves(groups, f"{method}4", torch.sigmoid) for method in METHODS)
    ppo = ppo_curves(runs, torch.sigmoid)
    yield above_by_interval("EXO-pref less DPO-pref, at equal KL", 0, difference(exo_pref, dpo_pref), ".3f")
    yield above_by_interval("EXO-rw less DPO-rw, K = 4", 0, difference(exo_rw, dpo_rw), ".3f")
    yield above_by_interval("EXO-rw less PPO", 0, difference(exo_rw, ppo), ".3f")


@STUDY.experiment("F8", "Fig. 8", controlled)
def exo_is_fast_and_stable(runs: list[Controlled]) -> Iterator[Finding]:
    """EXO has high, stable rewards after fewer steps than PPO and DPO (the first step: N4).

    Rewards after the first quarter of the steps. PPO, which has no checkpoints, has had all of its steps by then, at
    the same learning rate. Stable: the standard deviation of a post's rewards. EXO and DPO learn equally fast at both
    settings of F2a that were tried besides. PPO makes four updates in a step, the others one.
    """
    pairs = [(run.pairs, run.pairs) for run in runs]
    groups = [(run.groups, run.groups) for run in runs]
    with_ppo = [(run.groups, run.rates) for run in runs]
    first = f"after {EVERY} steps, "
    difference_of_pairs = reward_differences(pairs, f"exo_{EVERY}", f"dpo_{EVERY}")
    yield above_by_interval(f"{first}EXO-pref less DPO-pref, reward", 0, difference_of_pairs)
    difference_of_groups = reward_differences(groups, f"exo4_{EVERY}", f"dpo4_{EVERY}")
    yield above_by_interval(f"{first}EXO-rw less DPO-rw, reward", 0, difference_of_groups)
    to_ppo = reward_differences(with_ppo, f"exo4_{STEPS // 2}", f"ppo_{RATE:g}")
    yield above_by_interval("EXO-rw after half the steps less PPO after all, reward", 0, to_ppo)

    last = f"exo_{STEPS}", f"dpo_{STEPS}"
    spreads = reward_differences(pairs, *last, value=spread_of_samples)
    yield below_by_interval("EXO-pref less DPO-pref at the end, standard deviation", 0, spreads)
    to_ppo = reward_differences(with_ppo, f"exo4_{STEPS}", f"ppo_{RATE:g}", value=spread_of_samples)
    yield below_by_interval("EXO-rw less PPO at the end, standard deviation", 0, to_ppo)


def spread_of_samples(rewards: Tensor) -> Tensor:
    """The standard deviation of each post's rewards, (n, K) → (n,)."""
    return rewards.std(1)


# ---------------------------------------------------------------- density ratios


class Shares(NamedTuple):
    """Log-shares of M completions of the SFT model, in the order of log π_sft, (n, M) each."""

    optimum: Tensor
    policies: dict[str, Tensor]


def shares_of(run: Densities) -> Shares:
    """The densities of π*_β and of the policies, for β = β_π β_r."""
    logps = logps_in(run.logps)
    rewards = scores_of(run.many.by_oracle)
    sft = logps.pop("sft")
    order = sft.argsort(1)
    policies = {}
    for name, values in logps.items():
        policies[name] = log_weights(values - sft).gather(1, order)
    return Shares(log_weights(rewards / (BETA * BETA_R)).gather(1, order), policies)


def mass_of(log_shares: Tensor, quarter: int) -> Tensor:
    """What a quarter of the completions has of a density, (n, M) → (n,); 0 is the least likely one."""
    return log_shares.exp().chunk(4, 1)[quarter].sum(1)


@STUDY.experiment("F3h", "Fig. 3", densities)
def exo_follows_the_optimum(runs: list[Densities]) -> Iterator[Finding]:
    """EXO's density ratio follows that of π*_β where π_sft is high, and DPO overestimates the tail.

    128 completions of the SFT model for each of 24 posts, self-normalised weights, K = 4, and β = β_π β_r = 0.5.
    Instead of the paper's DPO-pref this is DPO-rw, whose optimum is the same π*_β. Without one of its own, the density
    of a policy that stays at π_sft is uniform.
    """
    shares = [shares_of(run) for run in runs]
    exo, dpo = ([share.policies[f"{method}4"] for share in shares] for method in METHODS)
    optimum = [share.optimum for share in shares]
    tails = masses_over(dpo, optimum, 0)
    yield above_by_interval("DPO-rw less π*, mass of the least likely quarter", 0, tails, ".3f")
    yield below_by_interval("EXO-rw less DPO-rw, mass of the least likely quarter", 0, masses_over(exo, dpo, 0), ".3f")

    errors = []
    for i in range(len(runs)):
        ours = (mass_of(exo[i], 3) - mass_of(optimum[i], 3)).abs()
        theirs = (mass_of(dpo[i], 3) - mass_of(optimum[i], 3)).abs()
        errors.append(ours - theirs)
    yield below_by_interval(
        "EXO-rw less DPO-rw, error of the likeliest quarter's mass", 0, mean_over_seeds(errors), ".3f"
    )
    for size in SIZES:
        for method, name in METHODS.items():
            policies = [share.policies[f"{method}{size}"] for share in shares]
            pairs = list(zip(policies, optimum, strict=True))
            reverse = mean_over_seeds([divergence_from(policy, best) for policy, best in pairs])
            yield reported_with_interval(f"KL({name}-rw ‖ π*), K = {size}", reverse)
            forward = mean_over_seeds([divergence_from(best, policy) for policy, best in pairs])
            yield reported_with_interval(f"KL(π* ‖ {name}-rw), K = {size}", forward)


def masses_over(ours: Sequence[Tensor], theirs: Sequence[Tensor], quarter: int) -> dict:
    """The mean difference of the masses of a quarter."""
    return mean_over_seeds(
        [mass_of(our, quarter) - mass_of(their, quarter) for our, their in zip(ours, theirs, strict=True)]
    )


# ---------------------------------------------------------------- Section 4.2

VERDICTS = ("RM against SFT", "RM against chosen", "oracle against SFT", "oracle against chosen")
RM_DIGITS = 4  # as evaluation rounds them


class Rated(NamedTuple):
    """Rewards by the weak model and by the oracle, of samples, (n, K) each, or of the chosen completion, (n, 1)."""

    weak: Tensor
    oracle: Tensor

    def wins(self, sft: "Rated", chosen: "Rated") -> dict[str, Tensor]:
        """The win rate of each sample in each column of the table, (n, K)."""
        by_model = wins_of_samples(self.weak, Opponents(sft.weak, chosen.weak))
        by_oracle = wins_of_samples(self.oracle, Opponents(sft.oracle, chosen.oracle))
        return dict(zip(VERDICTS, (*by_model.values(), *by_oracle.values()), strict=True))


class Contest(NamedTuple):
    """What a table compares, of one seed."""

    policies: dict[str, Rated]
    chosen: Rated
    many: Rated  # for each of the first posts, the completions among which the best is chosen

    def columns(self, policy: str) -> dict[str, Tensor]:
        """The win rate of a policy for each post, (n,), or of the best of N for each of the first posts."""
        if policy != "best_of":
            wins = self.policies[policy].wins(self.policies["sft"], self.chosen)
            return {verdict: values.mean(1) for verdict, values in wins.items()}

        n = len(self.many.weak)
        sft, chosen = (Rated(rated.weak[:n], rated.oracle[:n]) for rated in (self.policies["sft"], self.chosen))
        weights = selection_weights(self.many.weak, NUM_MANY)
        return {verdict: (weights * values).sum(1) for verdict, values in self.many.wins(sft, chosen).items()}


def contest_of(run: Table) -> Contest:
    results = read(run.results)
    policies = {}
    for name, numbers in results["policies"].items():
        policies[name] = Rated(tensor_of(numbers["selector_rewards"]), rewards_of(numbers))

    weak = tensor_of([row["score_chosen"] for row in read_jsonl(run.chosen.path)]).unsqueeze(1)
    chosen = Rated(weak.round(decimals=RM_DIGITS), tensor_of(results["row_rewards"]).unsqueeze(1))
    by_weak = scores_of(run.many.by_weak).round(decimals=RM_DIGITS)
    return Contest(policies, chosen, Rated(by_weak, scores_of(run.many.by_oracle)))


def win_differences(contests: Sequence[Contest], ours: str, theirs: str) -> dict[str, dict]:
    """For each column the mean difference of two policies' win rates, on the posts that both have."""
    differences: dict[str, list[Tensor]] = {verdict: [] for verdict in VERDICTS}
    for contest in contests:
        our_columns, their_columns = contest.columns(ours), contest.columns(theirs)
        for verdict, columns in differences.items():
            n = min(len(our_columns[verdict]), len(their_columns[verdict]))
            columns.append(our_columns[verdict][:n] - their_columns[verdict][:n])
    return {verdict: mean_over_seeds(columns) for verdict, columns in differences.items()}


def higher_win_rates(runs: Sequence[Table], ours: str, theirs: str) -> Iterator[Finding]:
    """State that a policy has higher win rates than another one in all columns."""
    contests = [contest_of(run) for run in runs]
    for verdict, number in win_differences(contests, ours, theirs).items():
        yield above_by_interval(f"{verdict}, {title_of(ours)} less {title_of(theirs)}", 0, number, ".3f")
    for policy in (ours, theirs):
        yield from reported_win_rates(contests, policy)


def reported_win_rates(contests: Sequence[Contest], policy: str) -> Iterator[Finding]:
    columns = [contest.columns(policy) for contest in contests]
    for verdict in VERDICTS:
        number = mean_over_seeds([column[verdict] for column in columns])
        yield reported_with_interval(f"{verdict}, {title_of(policy)}", number, ".3f")


def title_of(policy: str) -> str:
    """Its name in the paper."""
    method, _, setting = policy.partition("_")
    if policy == "best_of":
        return f"best of {NUM_MANY}"
    return f"{method.upper()}-{setting}" if setting else method.upper()


def comparable_to_best_of(runs: Sequence[Table]) -> Iterator[Finding]:
    """State that EXO-rw is within 0.1 of the best of N in all columns."""
    contests = [contest_of(run) for run in runs]
    for verdict, number in win_differences(contests, "best_of", "exo_rw").items():
        yield between_by_interval(f"{verdict}, best of {NUM_MANY} less EXO-rw", -0.1, 0.1, number, ".3f")
    for policy in ("best_of", "exo_rw"):
        yield from reported_win_rates(contests, policy)


@STUDY.experiment("T1a", "Table 1", table_1)
def exo_pref_wins_on_tldr(runs: list[Table]) -> Iterator[Finding]:
    """On TL;DR, EXO-pref has higher win rates than DPO-pref.

    Pairs of the SFT model's completions with sampled preferences.
    """
    yield from higher_win_rates(runs, "exo_pref", "dpo_pref")


@STUDY.experiment("T1b", "Table 1", table_1)
def exo_rw_wins_on_tldr(runs: list[Table]) -> Iterator[Finding]:
    """On TL;DR, EXO-rw has higher win rates than DPO-rw.

    K = 4, scores of the weak reward model.
    """
    yield from higher_win_rates(runs, "exo_rw", "dpo_rw")


@STUDY.experiment("T1c", "Table 1", table_1)
def exo_rw_wins_over_ppo_on_tldr(runs: list[Table]) -> Iterator[Finding]:
    """On TL;DR, EXO-rw has higher win rates than PPO.

    PPO samples as many completions as EXO-rw has, and maximises the same weak reward with the price β_π β_r for a nat.
    """
    yield from higher_win_rates(runs, "exo_rw", "ppo")


@STUDY.experiment("T1d", "Table 1", table_1)
def best_of_is_comparable_on_tldr(runs: list[Table]) -> Iterator[Finding]:
    """On TL;DR, Best-of-128 is comparable to EXO-rw (see X2 to X4).

    24 of the 96 posts. The weak reward model chooses. Comparable: within 0.1, as in the paper. Here the best of 128
    exploits the weak model: by that model's own measure it wins nearly always, by the oracle's as often as EXO-rw.
    """
    yield from comparable_to_best_of(runs)


# ---------------------------------------------------------------- the beginning and the tuning


@STUDY.experiment("C11", "§3.2, below Eq 18", starts)
def sft_on_chosen_closes_the_gap(runs: list[Artifact]) -> Iterator[Finding]:
    """SFT on data of the same domain or on the chosen completions closes the gap to the pairs' distribution.

    EXO-pref on the same pairs from the random base model, which is as far from the pairs as a model can be, and after
    SFT on demonstrations, whose model has written the pairs. The SFT takes eleven times as many steps.
    """
    of_both = [(run, run) for run in runs]
    with_less_without = reward_differences(of_both, "with_sft", "without_sft")
    yield above_by_interval("EXO-pref with SFT less EXO-pref without, reward", 0, with_less_without)
    yield above_by_interval("EXO-pref with SFT less SFT, reward", 0, reward_differences(of_both, "with_sft", "sft"))
    without = [rewards_of(policies_in(run)["without_sft"]).mean(1) for run in runs]
    yield reported_with_interval("EXO-pref without SFT, reward", mean_over_seeds(without))


@STUDY.experiment("C12", "Appendix C", controlled)
def ppo_is_sensitive(runs: list[Controlled]) -> Iterator[Finding]:
    """PPO is sensitive to its hyperparameters; DPO and EXO converge within one epoch.

    Spread: the highest less the lowest mean reward at learning rates 1e-4, 3e-4 and 1e-3, EXO-rw's with K = 4.
    Converged: the reward changes by less than 0.2 in the last quarter of an epoch.
    """
    spreads = []
    sizes = []
    for run in runs:
        policies = policies_in(run.rates)
        ppo, exo = (rewards_at_rates(policies, method) for method in ("ppo", "exo"))
        spreads.append(difference_of_spreads(ppo, exo))
        sizes.append(ppo.shape[1])
    yield above_by_interval("PPO less EXO-rw, spread of the reward", 0, over_seeds(spreads, sizes))

    last, before = STEPS, STEPS - EVERY
    groups = [(run.groups, run.groups) for run in runs]
    pairs = [(run.pairs, run.pairs) for run in runs]
    change = reward_differences(groups, f"exo4_{last}", f"exo4_{before}")
    yield between_by_interval("EXO-rw, change in the last quarter", -0.2, 0.2, change)
    change = reward_differences(pairs, f"dpo_{last}", f"dpo_{before}")
    yield between_by_interval("DPO-pref, change in the last quarter", -0.2, 0.2, change)
    for method in ("ppo", "exo"):
        for rate in RATES:
            rewards = [rewards_of(policies_in(run.rates)[f"{method}_{rate:g}"]).mean(1) for run in runs]
            yield reported_with_interval(f"{method.upper()}, learning rate {rate:g}, reward", mean_over_seeds(rewards))


def rewards_at_rates(policies: dict[str, dict], method: str) -> Tensor:
    """The mean reward of each post at each learning rate, (C, n)."""
    return torch.stack([rewards_of(policies[f"{method}_{rate:g}"]).mean(1) for rate in RATES])


def difference_of_spreads(ours: Tensor, theirs: Tensor) -> Statistic:
    """How much further apart the means of one set of policies are than those of another; (C, n) each."""

    def spread(counts: Tensor, rewards: Tensor) -> Tensor:
        means = counts @ rewards.T / counts.sum(1, keepdim=True)
        return means.max(1).values - means.min(1).values

    return lambda counts: spread(counts, ours) - spread(counts, theirs)


# ---------------------------------------------------------------- figures

OPTIMUM_BETAS = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5)
COLORS = {"exo": BLUE, "dpo": ORANGE, "ppo": GREEN, "best_of": PURPLE}
SIZE_COLORS = dict(zip(SIZES, (BLUE, ORANGE, GREEN), strict=True))


class Frontier(NamedTuple):
    controlled: Controlled
    many: Many


def frontier_stages(plan: Plan, seed: int) -> Frontier:
    return Frontier(controlled(plan, seed), many(plan, seed))


def draw_optimum(axes: "Axes", completions: Sequence[Many]) -> None:
    """The curve of π*_β."""
    x, y = [], []
    for beta in OPTIMUM_BETAS:
        of_seeds = [optimum_of(scores_of(many.by_oracle), beta) for many in completions]
        x.append(mean_over_seeds([kl for kl, _ in of_seeds])["mean"])
        y.append(mean_over_seeds([reward for _, reward in of_seeds])["mean"])
    axes.plot(x, y, "--", color=GREY, linewidth=1, label="π*, from samples")


@STUDY.figure(
    "Frontiers of the true reward against KL to the SFT model: after 8, 16, 24 and 32 steps, PPO's at three learning "
    "rates. Dashed: the best that is possible. Bars: 95% over seeds and posts.",
    frontier_stages,
)
def frontiers(runs: list[Frontier]) -> "Figure":
    figure, panels = canvas([["pairs", "ppo"], ["exo", "dpo"]], (9, 7.2))
    for axes in panels.values():
        draw_optimum(axes, [run.many for run in runs])
    all_controlled = [run.controlled for run in runs]
    pairs = [run.pairs for run in all_controlled]
    groups = [run.groups for run in all_controlled]
    for method, name in METHODS.items():
        draw_curve(panels["pairs"], curves(pairs, method), color=COLORS[method], label=f"{name}-pref")
        for size in SIZES:
            draw_curve(panels[method], curves(groups, f"{method}{size}"), color=SIZE_COLORS[size], label=f"K = {size}")
    draw_curve(panels["ppo"], ppo_curves(all_controlled), color=COLORS["ppo"], label="PPO")
    draw_curve(panels["ppo"], curves(groups, "exo4"), color=COLORS["exo"], label="EXO-rw, K = 4")
    titles = {"pairs": "Pairs", "ppo": "PPO", "exo": "EXO-rw", "dpo": "DPO-rw"}
    alike = [panels[name] for name in ("pairs", "exo", "dpo")]
    highest = max(axes.get_ylim()[1] for axes in alike)
    lowest = min(axes.get_ylim()[0] for axes in alike)
    for axes in alike:
        axes.set_ylim(lowest, highest)
    panels["ppo"].set_xscale("symlog", linthresh=1)
    for name, axes in panels.items():
        label_axes(axes, titles[name], "KL to SFT (nats)", "true reward")
    return figure


@STUDY.figure(
    "The true reward against steps, its 95% intervals as bars, and the mean standard deviation of a post's rewards "
    "as bands.",
    controlled,
)
def learning_curves(runs: list[Controlled]) -> "Figure":
    figure, panels = canvas([["pref", "rw"]], (8, 3.6))
    pairs = [run.pairs for run in runs]
    groups = [run.groups for run in runs]
    for method, name in METHODS.items():
        draw_steps(panels["pref"], pairs, method, f"{name}-pref")
        draw_steps(panels["rw"], groups, f"{method}4", f"{name}-rw, K = 4")
    ppo = mean_over_seeds([rewards_of(policies_in(run.rates)[f"ppo_{RATE:g}"]).mean(1) for run in runs])
    draw_numbers(panels["rw"], [STEPS], [ppo], color=COLORS["ppo"], label="PPO, at its end", fmt="s")
    label_axes(panels["pref"], "Pairs", "steps", "true reward")
    label_axes(panels["rw"], "Rewards", "steps", "true reward")
    return figure


def draw_steps(axes: "Axes", runs: Sequence[Artifact], method: str, label: str) -> None:
    """The reward after each EVERY steps."""
    color = COLORS[method.rstrip("248")]
    rewards = []
    spreads = []
    for point in ("sft", *checkpoint_names(method)):
        of_seeds = [rewards_of(policies_in(run)[point]) for run in runs]
        rewards.append(mean_over_seeds([values.mean(1) for values in of_seeds]))
        spreads.append(mean_over_seeds([spread_of_samples(values) for values in of_seeds])["mean"])
    steps = (0, *steps_of(method))
    means = tensor_of([number["mean"] for number in rewards])
    draw_numbers(axes, steps, rewards, color=color, label=label)
    spread = tensor_of(spreads)
    axes.fill_between(steps, means - spread, means + spread, color=color, alpha=0.1, linewidth=0)


NUM_BINS = 8


@STUDY.figure(
    "Density ratios to the SFT model on its own completions, in eighths of them from the least to the most likely one, "
    "mean over posts.",
    densities,
)
def density_ratios(runs: list[Densities]) -> "Figure":
    figure, panels = canvas([list(SIZES)], (10, 3.4))
    shares = [shares_of(run) for run in runs]
    for size, axes in panels.items():
        draw_ratios(axes, [share.optimum for share in shares], BLACK, "π*")
        for method, name in METHODS.items():
            draw_ratios(axes, [share.policies[f"{method}{size}"] for share in shares], COLORS[method], f"{name}-rw")
        axes.axhline(1, color=GREY, linewidth=0.7)
        label_axes(axes, f"K = {size}", "eighth of the samples, by log π of SFT", "density ratio")
    return figure


def draw_ratios(axes: "Axes", shares: Sequence[Tensor], color: str, label: str) -> None:
    """The mean density ratio in each eighth, with 95% intervals."""
    numbers = []
    for i in range(NUM_BINS):
        masses = [share.exp().chunk(NUM_BINS, 1)[i].sum(1) * NUM_BINS for share in shares]
        numbers.append(mean_over_seeds(masses))
    draw_numbers(axes, range(1, NUM_BINS + 1), numbers, color=color, label=label)


@STUDY.figure("Win rates by the weak reward model and by the oracle, with 95% intervals: Table 1.", table_1)
def win_rate_table(runs: list[Table]) -> "Figure":
    figure, panels = canvas([["table"]], (10, 3.4))
    draw_win_rates(panels["table"], [contest_of(run) for run in runs])
    label_axes(panels["table"], "Table 1", "", "win rate")
    legend_below(figure, panels.values(), 6)
    return figure


def draw_win_rates(axes: "Axes", contests: Sequence[Contest]) -> None:
    """A point for each policy in each column."""
    policies = ("dpo_pref", "exo_pref", "best_of", "ppo", "dpo_rw", "exo_rw")
    for i, policy in enumerate(policies):
        columns = [contest.columns(policy) for contest in contests]
        numbers = [mean_over_seeds([column[verdict] for column in columns]) for verdict in VERDICTS]
        x = [j + 0.12 * (i - 2.5) for j in range(len(VERDICTS))]
        method = "best_of" if policy == "best_of" else policy.partition("_")[0]
        fmt = "o" if policy.endswith("pref") else "s"
        draw_numbers(axes, x, numbers, color=COLORS[method], label=title_of(policy), fmt=fmt)
    axes.axhline(0.5, color=GREY, linewidth=0.7)
    axes.set_xticks(range(len(VERDICTS)), VERDICTS)
    axes.set_ylim(0, 1.02)


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
