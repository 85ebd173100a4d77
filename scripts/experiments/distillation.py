"""Reward-model distillation, arXiv 2405.19316: its statements about trained models, tried in a small world.

The world leaves clauses out and adds superfluous ones, so that length says something of the true reward, and not all. A
pair is two demonstrations, labelled by Bradley-Terry on the oracle. A selection by length makes D_ρ of the pairs, and
D_ρ,b of D_ρ. The reward models are too small to look facts up.

Each method has two strengths. A held-out prompt is judged with the strength that is better on the other half of the
prompts, so that no policy is selected by what judges it. The paper has a validation set for that.

    python scripts/experiments/distillation.py
    python scripts/experiments/distillation.py --experiment X6
"""

from typing import NamedTuple

from scripts.lab.commands import checked_command
from scripts.lab.experiments import Args, Study, experiments_command
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.worlds import OMISSION, world_a

STUDY = Study("distillation", "Robust Preference Optimization through Reward Model Distillation")

SHARES = (0.1, 0.5, 0.9)  # ρ; the longer demonstration is preferred in .53 of all pairs
BIASES = (0.2, 0.5, 0.8)  # b
STRENGTHS = (0.1, 1.0)  # β
NUM_PAIRS = 9_000
NUM_BIASED = 4_000  # pairs of D_ρ
BATCH_SIZE = 16
STEPS = 30
RM_STEPS = 90
EVERY = 30  # steps between two checkpoints of a reward model


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


def biased(plan: Plan, seed: int, share: float) -> Artifact:
    """D_ρ."""
    pairs = demonstrations(plan, seed, "pairs", NUM_PAIRS, 2000 + seed)
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
        f"scripts/notices.py world --output-dir {{out}} --tiny --sft-rows 1 --prompt-rows 1 --held-out-rows 1 --seed {seed}",
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


def members(plan: Plan, seed: int, share: float) -> dict[str, Stage | Artifact]:
    """r_ρ,b for each b."""
    return {
        f"rm_{share}_{bias}": reward_model(plan, seed, subset(plan, seed, share, bias), f"{share}_{bias}")
        for bias in BIASES
    }


def checkpoints(plan: Plan, seed: int, share: float) -> dict[str, Stage | Artifact]:
    """r_ρ after a third of its steps, two thirds, and all."""
    stage = plan.stage(
        f"distillation/{seed}/rm_{share}_models",
        f"scripts/export.py {{run}} --every {EVERY} --output-dir {{out}}",
        run=single(plan, seed, share),
    )
    steps = range(EVERY, RM_STEPS + 1, EVERY)
    return {f"rm_{step}": stage / f"step-{step:06}" for step in steps}


def scored(
    plan: Plan, seed: int, name: str, rows: Artifact, models: dict[str, Stage | Artifact], flags: str = ""
) -> Artifact:
    """Rows with the scores of reward models."""
    named = " ".join(f"{{{model}}}" for model in models)
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/score.py --rows {{rows}} --output {{out}}/rows.jsonl --reward-models {named} {flags}",
        rows=rows,
        **models,
    )
    return stage / "rows.jsonl"


# ---------------------------------------------------------------- the policies


def training_rows(plan: Plan, seed: int, share: float, ensemble: str) -> Artifact:
    """The pairs of D_ρ that all policies learn from, with scores of r_ρ, of the r_ρ,b, or of checkpoints of r_ρ."""
    models: dict[str, Stage | Artifact] = {"rm": single(plan, seed, share)}
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


def evaluation(plan: Plan, seed: int, name: str, policies: dict[str, Stage | Artifact]) -> Artifact:
    """Rewards of the SFT model and of policies on held-out posts."""
    world = world_a(plan, seed)
    policies = {"sft": world.sft, **policies}
    named = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    stage = plan.stage(
        f"distillation/{seed}/{name}",
        f"scripts/evaluate.py --policies {named} --rows {{rows}} --output {{out}}/results.json --num-prompts 256 "
        f"--num-samples 2 --max-new-tokens 48 --batch-size 512 --seed {seed}",
        rows=world.notices / "held_out.jsonl",
        **policies,
    )
    return stage / "results.json"


def grid(plan: Plan, seed: int) -> dict[float, Artifact]:
    """For each ρ the evaluation of all methods with each strength."""
    results = {}
    for share in SHARES:
        policies: dict[str, Stage | Artifact] = {}
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
    share = SHARES[0]
    policies: dict[str, Stage | Artifact] = {}
    for beta in STRENGTHS:
        policies[f"e_{beta:g}"] = policy(plan, seed, share, "e", beta, "checkpoints")
    return Controlled(grid(plan, seed)[share], evaluation(plan, seed, "evaluated_checkpoints", policies))


def likelihoods(plan: Plan, seed: int) -> dict[str, Artifact]:
    """The logs of the methods without a bias, at the smaller β."""
    return {name: policy(plan, seed, SHARES[1], name, STRENGTHS[0]) / "metrics.jsonl" for name in METHODS}


class Members(NamedTuple):
    """What tells which reward model e-DPO distils at one ρ."""

    rows: Artifact  # with the scores of the r_ρ,b
    logps: Artifact  # of their completions, under the SFT model and e-DPO's policies
    logs: dict[float, Artifact]  # by β
    results: Artifact  # of the grid, by which β is selected


def picked_members(plan: Plan, seed: int) -> dict[float, Members]:
    picked = {}
    for share in SHARES:
        rows = training_rows(plan, seed, share, "subsets")
        runs: dict[str, Stage | Artifact] = {"sft": world_a(plan, seed).sft}
        logs = {}
        for beta in STRENGTHS:
            run = policy(plan, seed, share, "e", beta)
            runs[f"e_{beta:g}"] = run
            logs[beta] = run / "metrics.jsonl"
        named = " ".join(f"{name}={{{name}}}" for name in runs)
        logps = plan.stage(
            f"distillation/{seed}/logps_{share}",
            f"scripts/logps.py --policies {named} --rows {{rows}} --output {{out}}/logps.json",
            rows=rows,
            **runs,
        )
        picked[share] = Members(rows, logps / "logps.json", logs, grid(plan, seed)[share])
    return picked


def probed(plan: Plan, seed: int) -> Artifact:
    """The scores of all reward models on held-out pairs in the order of the oracle: r_ρ and r_ρ,b for each ρ."""
    pairs = demonstrations(plan, seed, "probe", 1_000, 3000 + seed, "--noise-free")
    models: dict[str, Stage | Artifact] = {}
    for share in SHARES:
        models[f"rm_{share}"] = single(plan, seed, share)
        models |= members(plan, seed, share)
    return scored(plan, seed, "probe_scored", pairs, models)


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
