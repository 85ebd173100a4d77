"""DPO, arXiv 2305.18290: its experiments in a small world whose true reward is known.

The policies have 1M parameters, posts and summaries are made up, and the judge is the true reward, in the place of
GPT-4 and of people too. The demonstrations misread two of the five facts (world_c), so that the SFT model's likeliest
summary is wrong, and greedy decoding leaves something to learn. One kind of post is in no pair and no prompt.

As in section 6.1, the SFT model writes four completions of each prompt, and these make up to six pairs, ordered by the
true reward without noise. DPO, Preferred-FT, unlikelihood and the reward model all learn from these pairs. All see
as many pairs in a step. PPO samples as many completions in a step as DPO reads.

    python scripts/experiments/dpo.py
    python scripts/experiments/dpo.py --experiment E1 --seeds 0
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scripts.lab.best_of import kl_bound, selection_weights
from scripts.lab.claims import Finding, given, reported
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
from scripts.lab.frontier import Curve, at_equal_kl, interpolated, log_weights, mean_points, optimum_of
from scripts.lab.interval_plots import draw_curve, draw_numbers
from scripts.lab.measured import logps_in, policies_in, read, rewards_of, scores_of, tensor_of
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.plots import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, canvas, label_axes
from scripts.lab.statistics import Statistic, mean_over_seeds, over_seeds, win_rates
from scripts.lab.worlds import MISREADING, OMISSION, world_c

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Study("dpo", "Direct Preference Optimization")

BETAS = (0.05, 0.1, 1.0, 5.0)  # of section 6.1
ALPHAS = (0.1, 1.0)  # of unlikelihood; 1 is DPO without the weight of its gradient
MAIN = "dpo_0.1"  # the policy of all other comparisons
STEPS = 48
EVERY = 16  # steps between two checkpoints
PAIRS = 32  # of a step, in all methods
PPO_STEPS = 32
RM_STEPS = 96
RATE = 1e-4
PPO_RATE = 3e-4
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
UNSEEN_KIND = "talk"
NUM_PAIRED = 384  # prompts whose completions make the pairs
NUM_POSTS = 128  # of an evaluation
NUM_MANY = 64  # completions of each of some posts, the largest N of best-of-N
MANY_POSTS = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)  # N
OPTIMUM_BETAS = (16.0, 8.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
ENOUGH = 4.0  # effective number of samples from which the optimum is believed
SAMPLING = "--max-new-tokens 48 --batch-size 512"


# ---------------------------------------------------------------- the data


class Data(NamedTuple):
    """The SFT model, prompts, held-out posts of the known kinds and of the unseen one, and pairs."""

    sft: Stage
    prompts: Artifact
    held_out: Artifact  # with a demonstration each
    unseen: Artifact
    pairs: Artifact


def data(plan: Plan, seed: int) -> Data:
    sft = world_c(plan, seed).sft
    world = plan.stage(
        f"dpo/{seed}/world",
        f"scripts/notices.py world --output-dir {{out}} --sft-rows 0 --prompt-rows 2048 --held-out-rows {NUM_POSTS} "
        f"--references demonstration --unseen-kind {UNSEEN_KIND} {MISREADING} --seed {1000 + seed}",
    )
    prompts = world / "prompts.jsonl"
    pairs = preferences(plan, f"dpo/{seed}/pairs", written(plan, seed, "drawn", sft, prompts, NUM_PAIRED, 4), seed)
    return Data(sft, prompts, world / "held_out.jsonl", world / "held_out_unseen.jsonl", pairs)


def written(plan: Plan, seed: int, name: str, model: Stage, rows: Artifact, num_rows: int, size: int) -> Artifact:
    """Completions of a model for the first rows, `size` for each."""
    stage = plan.stage(
        f"dpo/{seed}/{name}",
        f"scripts/sample.py --model {{model}} --rows {{rows}} --output {{out}}/rows.jsonl --max-rows {num_rows} "
        f"--num-completions {size} {SAMPLING} --seed {seed}",
        model=model,
        rows=rows,
    )
    return stage / "rows.jsonl"


def preferences(plan: Plan, name: str, rows: Artifact, seed: int) -> Artifact:
    """All pairs of each prompt's completions in the order of their true reward."""
    stage = plan.stage(
        name,
        f"scripts/notices.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --noise-free --pairs --seed {seed}",
        rows=rows,
    )
    return stage / "rows.jsonl"


# ---------------------------------------------------------------- the models


def tuned(plan: Plan, seed: int, name: str, command: str, rate: float = RATE) -> Stage:
    """A model that starts from the SFT model and learns from the pairs."""
    made = data(plan, seed)
    return tuned_from(plan, seed, name, command, made.sft, made.pairs, rate)


def tuned_from(
    plan: Plan, seed: int, name: str, command: str, model: Stage, rows: Artifact, rate: float = RATE
) -> Stage:
    """A model that starts from another one and learns from rows."""
    return plan.stage(
        f"dpo/{seed}/{name}",
        f"{command} --model {{sft}} --train-data {{rows}} --output-dir {{out}} --batch-size {PAIRS} "
        f"--max-steps {STEPS} --learning-rate {rate:g} --lr-schedule constant --warmup-steps 6 "
        f"--save-every {EVERY} --keep 3 --seed {seed}",
        sft=model,
        rows=rows,
    )


def dpo(plan: Plan, seed: int, beta: float) -> Stage:
    return tuned(plan, seed, f"dpo_{beta:g}", f"algos/dpo.py --beta {beta:g}")


def preferred_ft(plan: Plan, seed: int) -> Stage:
    """SFT on the chosen completions."""
    return tuned(plan, seed, "preferred_ft", "algos/sft.py", rate=3 * RATE)


def unlikelihood(plan: Plan, seed: int, alpha: float) -> Stage:
    return tuned(plan, seed, f"unlikelihood_{alpha:g}", f"scripts/baselines/unlikelihood.py --alpha {alpha:g}")


class RewardModel(NamedTuple):
    """A reward model at the end of its run, and its best checkpoint."""

    last: Stage
    best: Stage


def reward_model(plan: Plan, seed: int) -> RewardModel:
    """As large as the policies, from the SFT model. Pairs of demonstrations choose the checkpoint."""
    made = data(plan, seed)
    validation = plan.stage(
        f"dpo/{seed}/validation",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows 256 --unseen-kind {UNSEEN_KIND} {MISREADING} "
        f"--seed {seed} --exclude {{held_out}} {{prompts}}",
        held_out=made.held_out,
        prompts=made.prompts,
    )
    every = RM_STEPS // 3
    last = plan.stage(
        f"dpo/{seed}/rm",
        "algos/rm.py --model {sft} --train-data {rows} --eval-data {validation} --output-dir {out} "
        f"--batch-size {PAIRS} --max-steps {RM_STEPS} --learning-rate 1e-3 --warmup-steps 6 --save-every {every} "
        f"--eval-every {every} --keep 3 --seed {seed}",
        sft=made.sft,
        rows=made.pairs,
        validation=preferences(plan, f"dpo/{seed}/validation_pairs", validation / "rows.jsonl", seed),
    )
    best = plan.stage(
        f"dpo/{seed}/rm_best", "scripts/export.py {run} --best rewards/accuracies --output-dir {out}", run=last
    )
    return RewardModel(last, best)


def ppo(plan: Plan, seed: int, by: str) -> Stage:
    """PPO on the true reward or on the reward model's."""
    made = data(plan, seed)
    inputs: dict[str, Any] = {"sft": made.sft, "prompts": made.prompts}
    reward = "notices"
    if by == "rm":
        reward = "{rm}"
        inputs["rm"] = reward_model(plan, seed).best
    return plan.stage(
        f"dpo/{seed}/ppo_{by}",
        f"scripts/baselines/ppo.py --model {{sft}} --train-data {{prompts}} --reward {reward} --output-dir {{out}} "
        f"--beta 0.1 --steps {PPO_STEPS} --batch-size {PAIRS // 2} --num-completions 4 --epochs 2 --minibatches 2 "
        f"--learning-rate {PPO_RATE:g} --warmup-steps 2 --max-new-tokens 48 --seed {seed}",
        **inputs,
    )


def checkpoints(plan: Plan, seed: int, name: str, run: Stage) -> dict[str, Artifact]:
    """The models after each EVERY steps, by their names."""
    stage = plan.stage(
        f"dpo/{seed}/{name}_models", f"scripts/export.py {{run}} --every {EVERY} --output-dir {{out}}", run=run
    )
    return {f"{name}_{step}": stage / f"step-{step:06}" for step in steps_of()}


def steps_of() -> range:
    return range(EVERY, STEPS + 1, EVERY)


# ---------------------------------------------------------------- the measurements


def evaluation(plan: Plan, seed: int, name: str, policies: dict[str, Any], rows: Artifact, flags: str) -> Artifact:
    """Rewards and KL of policies on held-out posts, and the reward of each post's demonstration."""
    names = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    stage = plan.stage(
        f"dpo/{seed}/{name}",
        f"scripts/evaluate.py --policies {names} --reference {{reference}} --rows {{rows}} "
        f"--output {{out}}/results.json --num-prompts {NUM_POSTS} --against-rows {SAMPLING} --seed {seed} {flags}",
        reference=data(plan, seed).sft,
        rows=rows,
        **policies,
    )
    return stage / "results.json"


def by_oracle(plan: Plan, seed: int, name: str, rows: Artifact) -> Artifact:
    """Rows with their true rewards."""
    stage = plan.stage(
        f"dpo/{seed}/{name}_by_oracle",
        "scripts/score.py --rows {rows} --output {out}/rows.jsonl --reward notices",
        rows=rows,
    )
    return stage / "rows.jsonl"


def by_models(plan: Plan, seed: int, name: str, rows: Artifact) -> Artifact:
    """Rows with the scores of the reward model's best checkpoint and of its last."""
    models = reward_model(plan, seed)
    stage = plan.stage(
        f"dpo/{seed}/{name}_by_models",
        "scripts/score.py --rows {rows} --output {out}/rows.jsonl --reward-models {best} {last}",
        rows=rows,
        best=models.best,
        last=models.last,
    )
    return stage / "rows.jsonl"


class Many(NamedTuple):
    """Many completions of the SFT model for the first held-out posts, by the true reward and by the model."""

    by_oracle: Artifact
    by_models: Artifact


def many_of(plan: Plan, seed: int) -> Many:
    made = data(plan, seed)
    rows = written(plan, seed, "many", made.sft, made.held_out, MANY_POSTS, NUM_MANY)
    return Many(by_oracle(plan, seed, "many", rows), by_models(plan, seed, "many", rows))


class Frontier(NamedTuple):
    """Policies along their way, PPO's, and many completions of the SFT model."""

    curves: Artifact
    ppo: Artifact
    many: Artifact


def dpo_curves(plan: Plan, seed: int) -> Artifact:
    """The evaluation of DPO, Preferred-FT and unlikelihood along their way."""
    made = data(plan, seed)
    runs = {f"dpo_{beta:g}": dpo(plan, seed, beta) for beta in BETAS}
    runs |= {f"unlikelihood_{alpha:g}": unlikelihood(plan, seed, alpha) for alpha in ALPHAS}
    runs["preferred_ft"] = preferred_ft(plan, seed)
    policies: dict[str, Any] = {"sft": made.sft}
    for name, run in runs.items():
        policies |= checkpoints(plan, seed, name, run)
    return evaluation(plan, seed, "curves", policies, made.held_out, "--num-samples 2")


def frontier(plan: Plan, seed: int) -> Frontier:
    made = data(plan, seed)
    policies = {f"ppo_{by}": ppo(plan, seed, by) for by in ("oracle", "rm")}
    at_end = evaluation(plan, seed, "ppo", policies, made.held_out, "--num-samples 2")
    many = by_oracle(plan, seed, "many", written(plan, seed, "many", made.sft, made.held_out, MANY_POSTS, NUM_MANY))
    return Frontier(dpo_curves(plan, seed), at_end, many)


def main_policies(plan: Plan, seed: int) -> dict[str, Any]:
    """The policies of section 6.2."""
    return {
        "sft": data(plan, seed).sft,
        "preferred_ft": preferred_ft(plan, seed),
        "dpo": dpo(plan, seed, 0.1),
        "ppo": ppo(plan, seed, "rm"),
    }


class Heat(NamedTuple):
    """The policies at several temperatures, and the rewards of other completions of the same posts."""

    results: Artifact
    pairs: Artifact  # four completions of the SFT model
    many: Many


def heat(plan: Plan, seed: int) -> Heat:
    shown = " ".join(f"{temperature:g}" for temperature in TEMPERATURES)
    rows = data(plan, seed).held_out
    flags = f"--num-samples 1 --temperatures {shown}"
    results = evaluation(plan, seed, "temperatures", main_policies(plan, seed), rows, flags)
    return Heat(results, four(plan, seed, "held_out", rows).rewards, many_of(plan, seed))


def unseen(plan: Plan, seed: int) -> Artifact:
    """The policies on the kind of post that is in no pair, at the temperatures of Table 1."""
    rows = data(plan, seed).unseen
    return evaluation(plan, seed, "unseen", main_policies(plan, seed), rows, "--num-samples 2 --temperatures 0 0.25 1")


def other_writers(plan: Plan, seed: int) -> Artifact:
    """DPO on the pairs of other writers, from the SFT model and from Preferred-FT on their chosen completions."""
    made = data(plan, seed)
    name = f"dpo/{seed}/other_pairs"
    demonstrations = plan.stage(
        f"dpo/{seed}/other_demonstrations",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows {PAIRS * STEPS} --unseen-kind {UNSEEN_KIND} "
        f"{OMISSION} --seed {seed} --exclude {{held_out}}",
        held_out=made.held_out,
    )
    pairs = preferences(plan, name, demonstrations / "rows.jsonl", seed)
    preferred = tuned_from(plan, seed, "other_preferred_ft", "algos/sft.py", made.sft, pairs, 3 * RATE)
    command = "algos/dpo.py --beta 0.1"
    policies = {
        "sft": made.sft,
        "preferred_ft": preferred,
        "from_sft": tuned_from(plan, seed, "other_dpo", command, made.sft, pairs),
        "from_preferred_ft": tuned_from(plan, seed, "other_preferred_ft_dpo", command, preferred, pairs),
    }
    return evaluation(plan, seed, "other_writers", policies, made.held_out, "--num-samples 2")


class Four(NamedTuple):
    """Four completions of the SFT model for each held-out post: true rewards, the model's, log-probs."""

    rewards: Artifact
    scores: Artifact
    logps: Artifact


def four(plan: Plan, seed: int, name: str, posts: Artifact) -> Four:
    sft = data(plan, seed).sft
    rows = written(plan, seed, f"four_{name}", sft, posts, NUM_POSTS, 4)
    logps = plan.stage(
        f"dpo/{seed}/four_{name}_logps",
        "scripts/logps.py --policies sft={sft} dpo={dpo} --rows {rows} --output {out}/logps.json",
        sft=sft,
        dpo=dpo(plan, seed, 0.1),
        rows=rows,
    )
    return Four(
        by_oracle(plan, seed, f"four_{name}", rows),
        by_models(plan, seed, f"four_{name}", rows),
        logps / "logps.json",
    )


class Classifiers(NamedTuple):
    known: Four
    unseen: Four


def classifiers(plan: Plan, seed: int) -> Classifiers:
    made = data(plan, seed)
    return Classifiers(four(plan, seed, "held_out", made.held_out), four(plan, seed, "unseen", made.unseen))


class Costs(NamedTuple):
    """What DPO and PPO cost, and what they reach."""

    dpo: Stage
    rm: Stage
    ppo: Stage
    frontier: Frontier
    many: Many


def costs(plan: Plan, seed: int) -> Costs:
    return Costs(
        dpo(plan, seed, 0.1),
        reward_model(plan, seed).last,
        ppo(plan, seed, "rm"),
        frontier(plan, seed),
        many_of(plan, seed),
    )


# ---------------------------------------------------------------- numbers from what the stages have left


def curve_of(policies: dict[str, dict], names: Sequence[str]) -> Curve:
    """KL and reward of policies, in the order of `names`."""
    kls = [tensor_of(policies[name]["step_kls"]).mean(1) for name in names]
    values = [rewards_of(policies[name]).mean(1) for name in names]
    return Curve(torch.stack(kls), torch.stack(values))


def path_names(method: str) -> list[str]:
    """The names of the SFT model and of a method's checkpoints."""
    return ["sft", *(f"{method}_{step}" for step in steps_of())]


def curves(runs: Sequence[Artifact], method: str) -> list[Curve]:
    """For each seed the curve from the SFT model along a method's checkpoints."""
    return [curve_of(policies_in(run), path_names(method)) for run in runs]


def points(runs: Sequence[Artifact], policy: str) -> list[Curve]:
    """For each seed the curve of a single policy."""
    return [curve_of(policies_in(run), [policy]) for run in runs]


def above_point(curve: Curve, point: Curve) -> Statistic:
    """How much higher a curve is than a single policy, at the policy's KL or, if it ends before, at its end."""

    def statistic(counts: Tensor) -> Tensor:
        kls, values = mean_points(curve, counts)
        kl, value = mean_points(point, counts)
        largest = kls.max(1, keepdim=True).values
        height = interpolated(kls, values, torch.minimum(kl, largest))
        return (height - value).squeeze(1)

    return statistic


def over_curves(compare: Callable[[Curve, Curve], Statistic], ours: Sequence[Curve], theirs: Sequence[Curve]) -> dict:
    """The mean over seeds of a comparison of two curves, with its interval."""
    statistics = [compare(our, their) for our, their in zip(ours, theirs, strict=True)]
    return over_seeds(statistics, [curve.kls.shape[1] for curve in ours])


def effective_number(rewards: Tensor, beta: float) -> float:
    """How many of M samples carry the weights of π*_β: the mean over posts of 1 / Σ w². (n, M)."""
    weights = log_weights(rewards / beta).exp()
    return float((1 / weights.square().sum(1)).mean())


def optimal_curve(rewards: Tensor) -> Curve:
    """KL and reward of π*_β from samples of π_ref (n, M), from β = ∞ to where too few of them carry the weight."""
    kls = [torch.zeros(len(rewards), dtype=torch.double)]
    values = [rewards.mean(1)]
    for beta in OPTIMUM_BETAS:
        if effective_number(rewards, beta) <= ENOUGH:
            break
        kl, value = optimum_of(rewards, beta)
        kls.append(kl)
        values.append(value)
    return Curve(torch.stack(kls), torch.stack(values))


def first_posts(curve: Curve, n: int) -> Curve:
    return Curve(curve.kls[:, :n], curve.values[:, :n])


# ---------------------------------------------------------------- Section 4


@STUDY.experiment("T18", "§4", other_writers)
def preferred_ft_mitigates_the_shift(runs: list[Artifact]) -> Iterator[Finding]:
    """Preferred-FT as π_ref mitigates the distribution shift where the pairs come from another policy.

    Pairs of demonstrations of another world, whose writers leave clauses out and misread nothing. DPO at β = 0.1 with
    the SFT model as π_ref, which misreads, and with Preferred-FT on the chosen completions as π_ref. Both DPO runs have
    the same steps; Preferred-FT comes on top. DPO is also to add to what Preferred-FT alone reaches.
    """
    shown = {
        "from_preferred_ft": "DPO from Preferred-FT",
        "from_sft": "DPO from SFT",
        "preferred_ft": "Preferred-FT",
        "sft": "SFT",
    }
    means = []
    for run in runs:
        means.append({name: rewards_of(numbers).mean(1) for name, numbers in policies_in(run).items()})
    for other in ("from_sft", "preferred_ft"):
        differences = [rewards["from_preferred_ft"] - rewards[other] for rewards in means]
        yield above_by_interval(f"DPO from Preferred-FT less {shown[other]}, reward", 0, mean_over_seeds(differences))
    for name, title in shown.items():
        yield reported_with_interval(f"{title}, reward", mean_over_seeds([rewards[name] for rewards in means]))


# ---------------------------------------------------------------- Section 6.1


def where_it_ends(name: str, curves: Sequence[Curve]) -> Iterator[Finding]:
    yield reported_with_interval(f"{name}, KL at its end", mean_over_seeds([curve.kls[-1] for curve in curves]))
    yield reported_with_interval(f"{name}, reward at its end", mean_over_seeds([curve.values[-1] for curve in curves]))


@STUDY.experiment("E1", "§6.1, Fig 2", frontier)
def dpo_has_the_best_frontier(runs: list[Frontier]) -> Iterator[Finding]:
    """On IMDB sentiment DPO has the best frontier of reward against KL of all methods.

    DPO at β = 0.1 and its checkpoints, against those of Preferred-FT and unlikelihood over the KL that both reach, and
    against PPO on the reward model at PPO's KL. The optimum is that of Eq 4, from 64 completions of the SFT model for
    each of 64 posts, as far as more than four of them carry the weight. Unlikelihood with α = 0.1 moves no farther than
    DPO's first checkpoint. Below it DPO's curve is a chord, so that DPO with β = 5, which stays as near, is compared
    too.
    """
    made = [run.curves for run in runs]
    ours = curves(made, MAIN)
    for method in ("preferred_ft", *(f"unlikelihood_{alpha:g}" for alpha in ALPHAS)):
        theirs = curves(made, method)
        number = over_curves(at_equal_kl, ours, theirs)
        yield above_by_interval(f"DPO less {title_of(method)}, reward at equal KL", 0, number)
        yield from where_it_ends(title_of(method), theirs)

    cautious = over_curves(at_equal_kl, curves(made, "dpo_5"), curves(made, "unlikelihood_0.1"))
    yield reported_with_interval("DPO, β = 5, less unlikelihood, α = 0.1, reward at equal KL", cautious)

    by_model = points([run.ppo for run in runs], "ppo_rm")
    yield above_by_interval(
        "DPO less PPO on the reward model, reward at PPO's KL", 0, over_curves(above_point, ours, by_model)
    )
    yield from where_it_ends("PPO on the reward model", by_model)
    for beta in BETAS:
        yield from where_it_ends(f"DPO, β = {beta:g}", curves(made, f"dpo_{beta:g}"))
    optima = [optimal_curve(scores_of(run.many)) for run in runs]
    shown = [first_posts(curve, MANY_POSTS) for curve in ours]
    yield given(
        above_by_interval("the optimum less DPO, reward at equal KL", 0, over_curves(at_equal_kl, optima, shown))
    )


@STUDY.experiment("E2", "§6.1, Fig 2", frontier)
def dpo_is_better_than_ppo_on_the_truth(runs: list[Frontier]) -> Iterator[Finding]:
    """DPO's frontier is better than PPO's, even where PPO has the ground-truth reward.

    PPO's last policy against the curve of DPO at β = 0.1, at PPO's KL or, if DPO's ends before, at its end. By Eq 4 the
    optimum of PPO's objective is the best that is possible: what is compared is how near training comes to it. PPO has
    the reward of 2,048 completions of its own, of 512 posts. DPO has pairs of the SFT model's, of 384 posts, which tell
    less and less of the policy as it moves away. A three times larger learning rate did not help DPO: with it β = 0.3
    came to a reward of 2.5 at a KL of 7.4, β = 1 to 2.0 at 6.4, and ten times the rate to -3 (one seed).
    """
    ours = curves([run.curves for run in runs], MAIN)
    theirs = points([run.ppo for run in runs], "ppo_oracle")
    yield above_by_interval(
        "DPO less PPO on the true reward, reward at PPO's KL", 0, over_curves(above_point, ours, theirs)
    )
    yield from where_it_ends("PPO on the true reward", theirs)
    yield from where_it_ends("DPO", ours)


def title_of(policy: str) -> str:
    """Its name in the paper."""
    name, _, setting = policy.rpartition("_")
    if policy in TITLES:
        return TITLES[policy]
    return f"{TITLES[name]} {setting}"


TITLES = {
    "sft": "SFT",
    "preferred_ft": "Preferred-FT",
    "dpo": "DPO",
    "unlikelihood": "unlikelihood, α =",
    "ppo": "PPO",
}


# ---------------------------------------------------------------- Section 6.2: summaries and dialogue


class Wins:
    """Win rates of one seed's policies at each temperature, for each post (n,)."""

    def __init__(self, results: dict, opponent: Tensor | None = None):
        """`opponent`: rewards of the completions to win against, (n, K'); the posts' demonstrations by default."""
        self.by_temperature = results["by_temperature"]
        self.demonstrations = tensor_of(results["row_rewards"]).unsqueeze(1)
        self.opponent = self.demonstrations if opponent is None else opponent

    def rewards(self, policy: str, temperature: float) -> Tensor:
        return rewards_of(self.by_temperature[f"{temperature:g}"][policy])

    def of(self, policy: str, temperature: float) -> Tensor:
        return win_rates(self.rewards(policy, temperature), self.opponent)

    def best(self, policy: str) -> Tensor:
        """At the temperature with the highest mean."""
        rates = [self.of(policy, temperature) for temperature in TEMPERATURES]
        return max(rates, key=lambda values: float(values.mean()))


def wins_of(runs: Sequence[Heat]) -> list[Wins]:
    return [Wins(read(run.results)) for run in runs]


def mean_win(seeds: Sequence[Wins], policy: str, temperature: float) -> dict:
    return mean_over_seeds([wins.of(policy, temperature) for wins in seeds])


def win_difference(seeds: Sequence[Wins], ours: tuple[str, float], theirs: tuple[str, float]) -> dict:
    """The mean difference of the win rates of two policies, each at a temperature."""
    return mean_over_seeds([wins.of(*ours) - wins.of(*theirs) for wins in seeds])


@STUDY.experiment("E7", "§6.2, Fig 2", heat)
def dpo_wins_against_the_references(runs: list[Heat]) -> Iterator[Finding]:
    """On TL;DR DPO wins against the reference summaries in about 61% of cases, PPO in 57%, both at temperature 0.

    References are demonstrations, the judge is the true reward, a tie counts half. PPO learns from the reward model.
    The order is judged, not the percentages.
    """
    seeds = wins_of(runs)
    yield above_by_interval("DPO at temperature 0, win rate", 0.5, mean_win(seeds, "dpo", 0), ".3f")
    yield above_by_interval("PPO at temperature 0, win rate", 0.5, mean_win(seeds, "ppo", 0), ".3f")
    yield above_by_interval("DPO less PPO", 0, win_difference(seeds, ("dpo", 0), ("ppo", 0)), ".3f")
    yield reported_with_interval("SFT at temperature 0, win rate", mean_win(seeds, "sft", 0), ".3f")


@STUDY.experiment("E8", "§6.2, Fig 2", heat)
def dpo_is_robust_to_the_temperature(runs: list[Heat]) -> Iterator[Finding]:
    """DPO is much more robust to the sampling temperature than PPO.

    The fall of the win rate against demonstrations from temperature 0 to 1. The paper's PPO falls below its base model.
    A second design, in the world of omissions (world_a), had win rates against completions of the SFT model, for 96
    posts. There PPO on a weak reward model fell by 0.06, 0.09 and -0.02 more than DPO with the three seeds. PPO on the
    true reward fell by 0.14, 0.01 and 0.09 less. Both methods have the same kind of optimum (Eq 4), so that only the
    way there could make a difference.
    """
    seeds = wins_of(runs)
    falls = []
    for wins in seeds:
        of_ppo = wins.of("ppo", 0) - wins.of("ppo", 1)
        of_dpo = wins.of("dpo", 0) - wins.of("dpo", 1)
        falls.append(of_ppo - of_dpo)
    yield above_by_interval("fall of PPO less that of DPO, win rate", 0, mean_over_seeds(falls), ".3f")
    for policy in ("dpo", "ppo", "sft"):
        for temperature in TEMPERATURES:
            number = mean_win(seeds, policy, temperature)
            yield reported_with_interval(f"{title_of(policy)} at {temperature:g}, win rate", number, ".3f")


def best_of_wins(scores: Tensor, rewards: Tensor, opponent: Tensor, size: int) -> Tensor:
    """The win rate of the best of `size` by the scores, for each post. (n, M), (n, M), (n, 1) → (n,)."""
    signs = (rewards - opponent).sign()
    wins = (signs + 1) / 2
    return (selection_weights(scores, size) * wins).sum(1)


def best_of_curves(runs: Sequence[Heat], size: int) -> list[Tensor]:
    """For each seed the win rate of the best of N completions of the SFT model by the reward model, (n,)."""
    rates = []
    for run, wins in zip(runs, wins_of(runs), strict=True):
        scores = scores_of(run.many.by_models)[:, :, 0]
        rates.append(best_of_wins(scores, scores_of(run.many.by_oracle), wins.opponent[:MANY_POSTS], size))
    return rates


@STUDY.experiment("E9", "§6.2, Fig 2", heat)
def dpo_beats_the_best_of_n(runs: list[Heat]) -> Iterator[Finding]:
    """DPO's best win rate on TL;DR is higher than that of the best of N samples.

    N up to 64 completions of the SFT model at temperature 1, chosen by the reward model's best checkpoint, which is as
    large as the policies. DPO at its best temperature, on the 64 posts with so many completions.
    """
    ours = [wins.best("dpo")[:MANY_POSTS] for wins in wins_of(runs)]
    theirs = best_of_curves(runs, NUM_MANY)
    differences = [our - their for our, their in zip(ours, theirs, strict=True)]
    yield above_by_interval(f"DPO less the best of {NUM_MANY}, win rate", 0, mean_over_seeds(differences), ".3f")
    yield reported_with_interval("DPO at its best temperature, win rate", mean_over_seeds(ours), ".3f")
    for size in SIZES:
        number = mean_over_seeds(best_of_curves(runs, size))
        yield reported_with_interval(f"best of {size}, win rate", number, ".3f")


@STUDY.experiment("E10", "§6.2", heat)
def preferred_ft_does_not_help(runs: list[Heat]) -> Iterator[Finding]:
    """Preferred-FT does not improve significantly over the SFT model.

    The win rate against demonstrations changes by less than 0.05 at temperatures 0 and 1. Here it does improve: the
    preferred ones are by the true reward the better ones of four, without noise, and far better than the mean. So it
    does on the pairs of other writers (T18). The paper's HH responses are those of one model, and people's choices are
    noisy.
    """
    seeds = wins_of(runs)
    for temperature in (0.0, 1.0):
        number = win_difference(seeds, ("preferred_ft", temperature), ("sft", temperature))
        yield between_by_interval(
            f"Preferred-FT less SFT at temperature {temperature:g}, win rate", -0.05, 0.05, number, ".3f"
        )
    number = win_difference(seeds, ("dpo", 1.0), ("sft", 1.0))
    yield reported_with_interval("DPO less SFT at temperature 1, win rate", number, ".3f")


@STUDY.experiment("E11", "§6.2, §6.4", heat)
def dpo_is_preferred_over_ppo(runs: list[Heat]) -> Iterator[Finding]:
    """Humans prefer DPO's samples at temperature 0.25 over PPO's at temperature 0 in 58% of cases.

    The true reward compares them in the place of people. The order is judged, not the percentage.
    """
    rates = []
    for wins in wins_of(runs):
        rates.append(win_rates(wins.rewards("dpo", 0.25), wins.rewards("ppo", 0)))
    yield above_by_interval("DPO at 0.25 against PPO at 0, win rate", 0.5, mean_over_seeds(rates), ".3f")


def chosen_rewards(run: Heat) -> Tensor:
    """The reward of the better one of two completions of the SFT model, (n, 1)."""
    return scores_of(run.pairs)[:, :2].max(1, keepdim=True).values


@STUDY.experiment("E12", "§6.2, Fig 3", heat)
def dpo_wins_against_the_chosen(runs: list[Heat]) -> Iterator[Finding]:
    """On HH dialogue DPO alone, of the methods that draw one sample, wins against the preferred completions.

    The preferred one is the better one of two completions of the SFT model. SFT and Preferred-FT stay below one half at
    temperature 1, at which the completions were drawn, and DPO is above it there and at its best temperature.
    """
    seeds = [Wins(read(run.results), chosen_rewards(run)) for run in runs]
    yield above_by_interval("DPO at temperature 1, win rate", 0.5, mean_win(seeds, "dpo", 1), ".3f")
    best = mean_over_seeds([wins.best("dpo") for wins in seeds])
    yield above_by_interval("DPO at its best temperature, win rate", 0.5, best, ".3f")
    for policy in ("sft", "preferred_ft"):
        number = mean_win(seeds, policy, 1)
        yield below_by_interval(f"{title_of(policy)} at temperature 1, win rate", 0.5, number, ".3f")
        best = mean_over_seeds([wins.best(policy) for wins in seeds])
        yield below_by_interval(f"{title_of(policy)} at its best temperature, win rate", 0.5, best, ".3f")


@STUDY.experiment("E13", "§6.2, Fig 3", dpo_curves, quick=True)
def dpo_converges_quickly(runs: list[Artifact]) -> Iterator[Finding]:
    """DPO converges quickly, and its gain is stable over training and temperatures.

    β = 0.1, samples at temperature 1, true reward: the first third of the steps brings more than half of the gain, and
    no later third takes more than 0.2 of the reward away. Temperatures: E8.
    """
    rewards = [curve.values for curve in curves(runs, MAIN)]  # SFT, and three checkpoints
    gains = [values[-1] - values[0] for values in rewards]
    yield above_by_interval("gain of all steps, reward", 0, mean_over_seeds(gains))
    halves = [values[1] - (values[0] + values[-1]) / 2 for values in rewards]
    yield above_by_interval("reward after 16 steps less half of the gain", 0, mean_over_seeds(halves))
    for i, step in enumerate(steps_of()):
        gain = mean_over_seeds([values[i + 1] - values[i] for values in rewards])
        yield above_by_interval(f"gain by step {step} over the {EVERY} before", -0.2, gain)


# ---------------------------------------------------------------- Section 6.3 and the reward models


@STUDY.experiment("E16", "§6.3, Table 1", unseen)
def dpo_transfers(runs: list[Artifact]) -> Iterator[Finding]:
    """On CNN/DailyMail, new to both, DPO outperforms PPO by a significant margin.

    The kind of post that no pair and no prompt of DPO, PPO or the reward model has, and that SFT has seen, at the
    temperatures of Table 1, against demonstrations. Its two misread slots are others than those of the known kinds.
    """
    seeds = [Wins(read(run)) for run in runs]
    for temperature in (0.0, 0.25):
        number = win_difference(seeds, ("dpo", temperature), ("ppo", temperature))
        yield above_by_interval(f"DPO less PPO at temperature {temperature:g}, win rate", 0, number, ".3f")
        for policy in ("sft", "preferred_ft", "dpo", "ppo"):
            number = mean_win(seeds, policy, temperature)
            yield reported_with_interval(f"{title_of(policy)} at {temperature:g}, win rate", number, ".3f")


def accuracy(scores: Tensor, rewards: Tensor) -> Tensor:
    """For each post the share of its pairs of unequal reward that the scores order, a tie half: (n, K) → (n',).

    Posts whose completions are all equally good are left out.
    """
    right = torch.zeros(len(scores), dtype=torch.double)
    counts = torch.zeros_like(right)
    for i, j in combinations(range(scores.shape[1]), 2):
        truth = (rewards[:, i] - rewards[:, j]).sign()
        result = (scores[:, i] - scores[:, j]).sign()
        right += truth.abs() * (truth * result + 1) / 2
        counts += truth.abs()
    return right[counts > 0] / counts[counts > 0]


class Accuracies(NamedTuple):
    """Of one seed, for each post."""

    implicit: Tensor  # β log π/π_ref of DPO
    likelihood: Tensor  # log π_ref
    best: Tensor  # the reward model's best checkpoint
    last: Tensor


def accuracies(run: Four) -> Accuracies:
    rewards = scores_of(run.rewards)
    scores = scores_of(run.scores)
    logps = logps_in(run.logps)
    by_scores = (logps["dpo"] - logps["sft"], logps["sft"], scores[:, :, 0], scores[:, :, 1])
    return Accuracies(*(accuracy(values, rewards) for values in by_scores))


@STUDY.experiment("E19", "C.1", classifiers)
def the_best_checkpoint_of_the_reward_model(runs: list[Classifiers]) -> Iterator[Finding]:
    """The reward model's best checkpoint of 3 epochs is taken.

    Best after 32, 64 or 96 steps by its accuracy on 256 pairs of demonstrations. What is tried is whether that matters:
    its accuracy on the SFT model's pairs is above that of the last checkpoint. Where the accuracy still rises, the last
    is the best. More steps and other rates did not change that much: after 192 steps at 1e-4, 3e-4 and 3e-3 the
    accuracy on the demonstrations was 0.62, 0.66 and 0.55, and never above 0.66 (one seed).
    """
    of_seeds = [accuracies(run.known) for run in runs]
    differences = [result.best - result.last for result in of_seeds]
    yield above_by_interval("best less last checkpoint, accuracy", 0, mean_over_seeds(differences), ".3f")
    for name in ("best", "last"):
        number = mean_over_seeds([getattr(result, name) for result in of_seeds])
        yield reported_with_interval(f"{name} checkpoint, accuracy", number, ".3f")


def as_accurate(of_seeds: Sequence[Accuracies]) -> Iterator[Finding]:
    """State that the implicit reward is as accurate as the reward model, within 0.05, or more."""
    differences = [result.implicit - result.best for result in of_seeds]
    yield above_by_interval("implicit reward less reward model, accuracy", -0.05, mean_over_seeds(differences), ".3f")
    over = [result.implicit - result.likelihood for result in of_seeds]
    yield above_by_interval("implicit reward less log π_ref, accuracy", 0, mean_over_seeds(over), ".3f")
    implicit = mean_over_seeds([result.implicit for result in of_seeds])
    yield reported_with_interval("implicit reward, accuracy", implicit, ".3f")
    yield reported_with_interval("reward model, accuracy", mean_over_seeds([result.best for result in of_seeds]), ".3f")


@STUDY.experiment("E20", "title, §5.1", classifiers)
def the_implicit_reward_is_a_reward_model(runs: list[Classifiers]) -> Iterator[Finding]:
    """DPO's implicit reward orders held-out pairs as a reward model does.

    All pairs of four completions of the SFT model for each held-out post, in the order of their true reward. The reward
    model is as large and starts from the SFT model too. As accurate: at most 0.05 less.
    """
    yield from as_accurate([accuracies(run.known) for run in runs])


@STUDY.experiment("E25", "§7", classifiers)
def the_implicit_reward_transfers(runs: list[Classifiers]) -> Iterator[Finding]:
    """DPO policies generalise out of distribution as well as an explicit reward does.

    As E20, on posts of the kind that is in no pair.
    """
    yield from as_accurate([accuracies(run.unseen) for run in runs])


# ---------------------------------------------------------------- tuning, cost and stability


@STUDY.experiment("E21", "abstract, §7", dpo_curves)
def dpo_needs_no_tuning(runs: list[Artifact]) -> Iterator[Finding]:
    """DPO needs virtually no tuning of its hyper-parameters.

    One learning rate, and the paper's four β, which differ by a factor of 100. Each gains more than half of what the
    best of them gains over SFT.
    """
    policies = [policies_in(run) for run in runs]
    for beta in BETAS:
        statistics = [over_half_of_the_best(result, f"dpo_{beta:g}") for result in policies]
        sizes = [len(result["sft"]["rewards"]) for result in policies]
        number = over_seeds(statistics, sizes)
        yield above_by_interval(f"β = {beta:g}: gain less half of the best one", 0, number)


def over_half_of_the_best(policies: dict[str, dict], method: str) -> Statistic:
    """The reward that a method gains less half of what the best β gains, at the end of the runs."""
    means = {name: rewards_of(policies[name]).mean(1) for name in ("sft", *(f"dpo_{b:g}_{STEPS}" for b in BETAS))}
    gains = {name: values - means["sft"] for name, values in means.items() if name != "sft"}

    def statistic(counts: Tensor) -> Tensor:
        of_all = torch.stack([counts @ gain / counts.sum(1) for gain in gains.values()])
        ours = counts @ gains[f"{method}_{STEPS}"] / counts.sum(1)
        return ours - of_all.max(0).values / 2

    return statistic


def seconds(stage: Stage) -> float:
    """How long a stage took, on a single thread."""
    return stage.read_record()["seconds"]


@STUDY.experiment("E22", "abstract, §6", costs)
def dpo_is_lightweight(runs: list[Costs]) -> Iterator[Finding]:
    """DPO is computationally lightweight; the best of N costs N samples for each query.

    Stages' seconds on one thread, without the import of libraries: no more than an estimate. DPO has pairs that are
    there already. PPO samples its own completions, as many in a step as DPO reads.
    """
    rewards = []
    for run in runs:
        ours = curve_of(policies_in(run.frontier.curves), [f"{MAIN}_{STEPS}"]).values[0]
        theirs = curve_of(policies_in(run.frontier.ppo), ["ppo_rm"]).values[0]
        rewards.append(ours - theirs)
    yield above_by_interval("DPO less PPO on the reward model, reward", 0, mean_over_seeds(rewards))
    of_dpo = sum(seconds(run.dpo) for run in runs)
    of_ppo = sum(seconds(run.ppo) + seconds(run.rm) for run in runs)
    yield judged_below("seconds of DPO over those of PPO with its reward model", 1, of_dpo / of_ppo)
    matching = []
    for run in runs:
        reward = curve_of(policies_in(run.frontier.curves), [f"{MAIN}_{STEPS}"]).values[0].mean()
        matching.append(smallest_size(run.many, float(reward)))
    yield listed("smallest N whose best of N has DPO's reward, each seed", matching)


def listed(statement: str, texts: Sequence[str]) -> Finding:
    """What was found for each seed."""
    return Finding(statement, "", ", ".join(texts), None)


def judged_below(statement: str, bound: float, value: float) -> Finding:
    return Finding(statement, f"< {bound:g}", f"{value:.2f}", value < bound)


def smallest_size(many: Many, reward: float) -> str:
    """The smallest N whose best of N by the reward model has this reward, as text."""
    scores, rewards = scores_of(many.by_models)[:, :, 0], scores_of(many.by_oracle)
    for size in SIZES:
        if float((selection_weights(scores, size) * rewards).sum(1).mean()) >= reward:
            return str(size)
    return f"more than {SIZES[-1]}"


@STUDY.experiment("E23", "abstract", frontier)
def dpo_is_stable(runs: list[Frontier]) -> Iterator[Finding]:
    """DPO's training is stable.

    Reward at the end of the runs is not below that after two thirds of the steps by 0.2 or more, at each β, and the
    policies go on to end their completions.
    """
    policies = [policies_in(run.curves) for run in runs]
    for beta in BETAS:
        changes = []
        for result in policies:
            values = curve_of(result, path_names(f"dpo_{beta:g}")).values
            changes.append(values[-1] - values[-2])
        yield above_by_interval(f"β = {beta:g}: change of the reward in the last third", -0.2, mean_over_seeds(changes))
        finished = min(result[f"dpo_{beta:g}_{STEPS}"]["finished"] for result in policies)
        yield Finding(f"β = {beta:g}: share of completions that end", "> 0.95", f"{finished:.3f}", finished > 0.95)
    for alpha in ALPHAS:
        finished = min(result[f"unlikelihood_{alpha:g}_{STEPS}"]["finished"] for result in policies)
        yield reported(f"unlikelihood, α = {alpha:g}: share of completions that end", finished)
    for by in ("oracle", "rm"):
        spread = [float(rewards_of(policies_in(run.ppo)[f"ppo_{by}"]).mean()) for run in runs]
        yield listed(f"PPO on {by}: reward of each seed", [f"{value:.2f}" for value in spread])
    spread = [float(rewards_of(result[f"{MAIN}_{STEPS}"]).mean()) for result in policies]
    yield listed("DPO: reward of each seed", [f"{value:.2f}" for value in spread])


# ---------------------------------------------------------------- figures

COLORS = {"sft": GREY, "preferred_ft": GREEN, "dpo": BLUE, "ppo": ORANGE}
BETA_COLORS = dict(zip(BETAS, (SKY, BLUE, PURPLE, BLACK), strict=True))
ALPHA_COLORS = dict(zip(ALPHAS, (AMBER, "#999933"), strict=True))
PPO_MARKS = {"oracle": ("PPO on the true reward", "D"), "rm": ("PPO on the reward model", "s")}


def draw_optimum(axes: "Axes", rewards: Sequence[Tensor]) -> None:
    """The optimum as far as all seeds know it, and the best of N by the true reward at the most KL it can have."""
    optima = [optimal_curve(values) for values in rewards]
    length = min(len(curve.kls) for curve in optima)
    kls = torch.stack([curve.kls[:length].mean(1) for curve in optima]).mean(0)
    values = torch.stack([curve.values[:length].mean(1) for curve in optima]).mean(0)
    axes.plot(kls, values, "--", color=BLACK, linewidth=1.2, label="optimum, Eq 4")

    heights = []
    for size in SIZES:
        of_seeds = [(selection_weights(values, size) * values).sum(1).mean() for values in rewards]
        heights.append(torch.stack(of_seeds).mean())
    axes.plot(
        [kl_bound(size) for size in SIZES], heights, "x", color=GREY, markersize=4, label="best of N, true reward"
    )


@STUDY.figure(
    "Reward against KL to the SFT model after 16, 32 and 48 steps. Left: all methods, DPO at β = 0.1, PPO at its end. "
    "Right: DPO at four β. Dashed: the best that any policy can have, where 64 samples of the SFT model tell it. "
    "Crosses: best of N at an upper bound of its KL. Bars: 95% over seeds and posts.",
    frontier,
)
def frontiers(runs: list[Frontier]) -> "Figure":
    figure, panels = canvas([["methods", "betas"]], (11, 4.6))
    made = [run.curves for run in runs]
    for axes in panels.values():
        draw_optimum(axes, [scores_of(run.many) for run in runs])
    draw_curve(panels["methods"], curves(made, MAIN), color=BLUE, label="DPO, β = 0.1")
    draw_curve(panels["methods"], curves(made, "preferred_ft"), color=GREEN, label="Preferred-FT")
    for alpha, color in ALPHA_COLORS.items():
        draw_curve(
            panels["methods"],
            curves(made, f"unlikelihood_{alpha:g}"),
            color=color,
            label=f"unlikelihood, α = {alpha:g}",
        )
    for by, (label, mark) in PPO_MARKS.items():
        draw_curve(
            panels["methods"], points([run.ppo for run in runs], f"ppo_{by}"), color=ORANGE, label=label, fmt=mark
        )
    for beta, color in BETA_COLORS.items():
        draw_curve(panels["betas"], curves(made, f"dpo_{beta:g}"), color=color, label=f"DPO, β = {beta:g}")
    label_axes(panels["methods"], "Methods", "KL to SFT (nats)", "true reward")
    label_axes(panels["betas"], "DPO", "KL to SFT (nats)", "true reward")
    return figure


@STUDY.figure(
    "Win rates over the sampling temperature and over N. Left: against demonstrations. Middle: against the better one "
    "of two completions of the SFT model. Right: the best of N completions of the SFT model by the reward model, and "
    "DPO at its best temperature, against demonstrations. Bars: 95% over seeds and posts.",
    heat,
)
def temperatures(runs: list[Heat]) -> "Figure":
    figure, panels = canvas([["references", "chosen", "best"]], (13, 4.2))
    against_references = wins_of(runs)
    against_chosen = [Wins(read(run.results), chosen_rewards(run)) for run in runs]
    for name, seeds in (("references", against_references), ("chosen", against_chosen)):
        for policy, color in COLORS.items():
            numbers = [mean_win(seeds, policy, temperature) for temperature in TEMPERATURES]
            draw_numbers(panels[name], TEMPERATURES, numbers, color=color, label=title_of(policy))
    numbers = [mean_over_seeds(best_of_curves(runs, size)) for size in SIZES]
    draw_numbers(panels["best"], SIZES, numbers, color=GREY, label="best of N of SFT")
    best = mean_over_seeds([wins.best("dpo")[:MANY_POSTS] for wins in against_references])
    panels["best"].axhline(best["mean"], color=BLUE, linewidth=1, label="DPO at its best temperature")
    panels["best"].axhspan(*best["interval"], color=BLUE, alpha=0.15, linewidth=0)
    panels["best"].set_xscale("log", base=2)
    for axes in panels.values():
        axes.axhline(0.5, color=GREY, linewidth=0.7, linestyle=":")
    label_axes(panels["references"], "Against demonstrations", "temperature", "win rate")
    label_axes(panels["chosen"], "Against the chosen completions", "temperature", "win rate")
    label_axes(panels["best"], "Best of N", "N", "win rate")
    return figure


@STUDY.figure(
    "Learning curves by the true reward of samples at temperature 1: DPO at four β, and what it is compared with. "
    "Bars: 95% over seeds and posts.",
    dpo_curves,
    quick=True,
)
def learning_curves(runs: list[Artifact]) -> "Figure":
    figure, panels = canvas([["a"]], (6, 4.2))
    methods = {f"dpo_{beta:g}": (f"DPO, β = {beta:g}", color) for beta, color in BETA_COLORS.items()}
    methods["preferred_ft"] = ("Preferred-FT", GREEN)
    for alpha, color in ALPHA_COLORS.items():
        methods[f"unlikelihood_{alpha:g}"] = (f"unlikelihood, α = {alpha:g}", color)
    for method, (label, color) in methods.items():
        columns = zip(*(curve.values for curve in curves(runs, method)), strict=True)
        numbers = [mean_over_seeds(list(values)) for values in columns]
        draw_numbers(panels["a"], (0, *steps_of()), numbers, color=color, label=label)
    label_axes(panels["a"], "Learning curves", "steps", "true reward")
    return figure


class Transfer(NamedTuple):
    unseen: Artifact
    classifiers: Classifiers


def transfer_stages(plan: Plan, seed: int) -> Transfer:
    return Transfer(unseen(plan, seed), classifiers(plan, seed))


@STUDY.figure(
    "The kind of post that is in no pair. Left: win rates against demonstrations. Right: accuracy on pairs of the SFT "
    "model's completions, of the known kinds and of the unseen one. Bars: 95% over seeds and posts.",
    transfer_stages,
)
def transfer(runs: list[Transfer]) -> "Figure":
    figure, panels = canvas([["wins", "accuracy"]], (10, 4.2))
    seeds = [Wins(read(run.unseen)) for run in runs]
    for policy, color in COLORS.items():
        numbers = [mean_win(seeds, policy, temperature) for temperature in (0, 0.25, 1)]
        draw_numbers(panels["wins"], (0, 0.25, 1), numbers, color=color, label=title_of(policy))
    panels["wins"].axhline(0.5, color=GREY, linewidth=0.7, linestyle=":")

    shown = {
        "implicit": ("DPO's implicit reward", BLUE),
        "best": ("reward model", ORANGE),
        "likelihood": ("log π_ref", GREY),
    }
    kinds = ([run.classifiers.known for run in runs], [run.classifiers.unseen for run in runs])
    for i, (name, (label, color)) in enumerate(shown.items()):
        numbers = [mean_over_seeds([getattr(accuracies(run), name) for run in kind]) for kind in kinds]
        x = [j + 0.1 * (i - 1) for j in range(len(kinds))]
        draw_numbers(panels["accuracy"], x, numbers, color=color, label=label, fmt="o")
    panels["accuracy"].set_xticks(range(2), ("known kinds", "unseen kind"))
    panels["accuracy"].axhline(0.5, color=GREY, linewidth=0.7, linestyle=":")
    label_axes(panels["wins"], "Unseen kind", "temperature", "win rate")
    label_axes(panels["accuracy"], "Classifiers", "", "accuracy")
    return figure


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
