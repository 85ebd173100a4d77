"""EXO, arXiv 2402.00856: its statements about trained models, tried in a small world whose true reward is known.

    python scripts/experiments/exo.py
    python scripts/experiments/exo.py --experiment F2a
"""

from typing import NamedTuple

from scripts.lab.commands import checked_command
from scripts.lab.experiments import Args, Study, experiments_command
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.worlds import OMISSION, world_a

STUDY = Study("exo", "Towards Efficient Exact Optimization of Language Model Alignment (EXO)")

# the paper has β_π = 0.5 on TL;DR and HH; β_r is 1, as the rewards are in nats of preference
BETA = 0.5
BETA_R = 1.0
SIZES = (2, 4, 8)  # K
STEPS = 32  # one epoch
EVERY = 8  # steps between two checkpoints
COMPLETIONS = 128  # of a step, whatever K is
RATE = 3e-4
RATES = (1e-4, RATE, 1e-3)
LENGTH = "--max-new-tokens 48"
PREFERENCES = {"pref": "", "clean": "--noise-free"}  # as people prefer, and as the reward ranks


# ---------------------------------------------------------------- the data


def held_out(plan: Plan, seed: int) -> Artifact:
    """256 new posts, each with the better and the worse of two demonstrations."""
    world = world_a(plan, seed).notices
    pairs = plan.stage(
        f"exo/{seed}/held_out_pairs",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows 256 --seed {1000 + seed} {OMISSION} "
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
        f"--max-rows {STEPS * COMPLETIONS // size} {LENGTH} --batch-size 512 --seed {seed}",
        sft=world.sft,
        prompts=world.notices / "prompts.jsonl",
    )
    return stage / "rows.jsonl"


def pairs(plan: Plan, seed: int, kind: str) -> Artifact:
    """Pairs of the SFT model's completions."""
    return preferences(plan, f"exo/{seed}/pairs_{kind}", drawn(plan, seed, 2), seed, PREFERENCES[kind])


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
        rows=pairs(plan, seed, "pref"),
    )


def scored(plan: Plan, seed: int, rows: Artifact, name: str, by: str) -> Artifact:
    """Rows with scores of the oracle or of the weak reward model."""
    command = "scripts/score.py --rows {rows} --output {out}/rows.jsonl"
    name = f"exo/{seed}/{name}_by_{by}"
    if by == "oracle":
        stage = plan.stage(name, f"{command} --reward notices", rows=rows)
    else:
        stage = plan.stage(name, f"{command} --reward-models {{rm}}", rows=rows, rm=weak_model(plan, seed))
    return stage / "rows.jsonl"


# ---------------------------------------------------------------- the policies


def tuning(size: int, rate: float, seed: int) -> str:
    """The flags that all methods share."""
    return (
        f"--model {{sft}} --train-data {{rows}} --output-dir {{out}} --beta {BETA} --batch-size {COMPLETIONS // size} "
        f"--max-steps {STEPS} --learning-rate {rate:g} --lr-schedule constant --warmup-steps 4 "
        f"--save-every {EVERY} --keep {STEPS // EVERY} --seed {seed}"
    )


def by_pairs(plan: Plan, seed: int, method: str, kind: str) -> Stage:
    """DPO-pref or EXO-pref."""
    return plan.stage(
        f"exo/{seed}/{method}_{kind}",
        f"algos/{method}.py {tuning(2, RATE, seed)}",
        sft=world_a(plan, seed).sft,
        rows=pairs(plan, seed, kind),
    )


def by_rewards(plan: Plan, seed: int, method: str, size: int, by: str = "oracle", rate: float = RATE) -> Stage:
    """EXO-rw or DPO-rw on groups of K completions."""
    kl = {"exo": "reverse", "dpo": "forward"}[method]
    rated = "" if rate == RATE else f"_{rate:g}"
    return plan.stage(
        f"exo/{seed}/{method}_rw{size}_{by}{rated}",
        f"algos/exo.py --kl {kl} --beta-r {BETA_R} {tuning(size, rate, seed)}",
        sft=world_a(plan, seed).sft,
        rows=scored(plan, seed, drawn(plan, seed, size), f"drawn_{size}", by),
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
        f"--minibatches 2 --learning-rate {rate:g} --warmup-steps 4 --value-warmup-steps 2 {LENGTH} --seed {seed}",
        **inputs,
    )


def checkpoints(plan: Plan, run: Stage) -> list[Artifact]:
    """The models after each EVERY steps."""
    stage = plan.stage(
        f"{run.path.relative_to(plan.directory)}_models",
        f"scripts/export.py {{run}} --every {EVERY} --output-dir {{out}}",
        run=run,
    )
    return [stage / f"step-{step:06}" for step in range(EVERY, STEPS + 1, EVERY)]


# ---------------------------------------------------------------- the measurements


def evaluation(
    plan: Plan, seed: int, name: str, policies: dict[str, Stage | Artifact], flags: str = "--num-samples 2"
) -> Artifact:
    """Rewards and KL of policies on the held-out posts."""
    named = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    stage = plan.stage(
        f"exo/{seed}/{name}",
        f"scripts/evaluate.py --policies {named} --reference {{reference}} --rows {{rows}} --output {{out}}/results.json "
        f"--num-prompts 256 {LENGTH} --batch-size 512 --seed {seed} {flags}",
        reference=world_a(plan, seed).sft,
        rows=held_out(plan, seed),
        **policies,
    )
    return stage / "results.json"


def along(plan: Plan, seed: int, name: str, runs: dict[str, Stage]) -> Artifact:
    """The evaluation of runs after each EVERY steps, and of the SFT model."""
    policies: dict[str, Stage | Artifact] = {"sft": world_a(plan, seed).sft}
    for method, run in runs.items():
        for i, model in enumerate(checkpoints(plan, run)):
            policies[f"{method}_{EVERY * (i + 1)}"] = model
    return evaluation(plan, seed, name, policies)


class Pairwise(NamedTuple):
    """What learned from pairs in the order of their rewards."""

    results: Artifact


def pairwise(plan: Plan, seed: int) -> Pairwise:
    runs = {method: by_pairs(plan, seed, method, "clean") for method in ("dpo", "exo")}
    return Pairwise(along(plan, seed, "evaluated_pairs", runs))


class Groups(NamedTuple):
    """What learned from the oracle's scores of K completions, and from pairs."""

    pairs: Artifact
    results: Artifact


def groups(plan: Plan, seed: int) -> Groups:
    runs = {}
    for size in SIZES:
        for method in ("exo", "dpo"):
            runs[f"{method}{size}"] = by_rewards(plan, seed, method, size)
    return Groups(pairwise(plan, seed).results, along(plan, seed, "evaluated_groups", runs))


class Optimum(NamedTuple):
    """128 completions of the SFT model for each of 64 posts, with both rewards, and their log-probs."""

    by_oracle: Artifact
    by_weak: Artifact
    logps: Artifact


def optimum(plan: Plan, seed: int) -> Optimum:
    many = plan.stage(
        f"exo/{seed}/many",
        f"scripts/sample.py --model {{sft}} --rows {{rows}} --output {{out}}/rows.jsonl --num-completions 128 "
        f"--max-rows 64 {LENGTH} --batch-size 512 --seed {seed}",
        sft=world_a(plan, seed).sft,
        rows=held_out(plan, seed),
    )
    rows = many / "rows.jsonl"
    policies: dict[str, Stage] = {"sft": world_a(plan, seed).sft}
    for size in SIZES:
        for method in ("exo", "dpo"):
            policies[f"{method}{size}"] = by_rewards(plan, seed, method, size)
    named = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    logps = plan.stage(
        f"exo/{seed}/logps",
        f"scripts/logps.py --policies {named} --rows {{rows}} --output {{out}}/logps.json",
        rows=rows,
        **policies,
    )
    by = [scored(plan, seed, rows, "many", source) for source in ("oracle", "weak")]
    return Optimum(*by, logps / "logps.json")


class Table(NamedTuple):
    """The policies of Table 1 or 2 by the oracle and the weak reward model."""

    results: Artifact
    chosen: Artifact  # held-out pairs with the weak model's scores
    optimum: Optimum


def table_1(plan: Plan, seed: int) -> Table:
    policies: dict[str, Stage | Artifact] = {
        "sft": world_a(plan, seed).sft,
        "dpo_pref": by_pairs(plan, seed, "dpo", "pref"),
        "exo_pref": by_pairs(plan, seed, "exo", "pref"),
        "ppo": by_ppo(plan, seed, "weak"),
        "dpo_rw": by_rewards(plan, seed, "dpo", 4, "weak"),
        "exo_rw": by_rewards(plan, seed, "exo", 4, "weak"),
        "rm": weak_model(plan, seed),
    }
    named = " ".join(f"{policy}={{{policy}}}" for policy in policies if policy != "rm")
    stage = plan.stage(
        f"exo/{seed}/table_1",
        f"scripts/evaluate.py --policies {named} --rows {{rows}} --output {{out}}/results.json --num-prompts 256 "
        f"--num-samples 4 {LENGTH} --batch-size 512 --seed {seed} --against-rows --best-of 1 --select-by {{rm}}",
        rows=held_out(plan, seed),
        **policies,
    )
    chosen = scored(plan, seed, held_out(plan, seed), "held_out", "weak")
    return Table(stage / "results.json", chosen, optimum(plan, seed))


class Sensitivity(NamedTuple):
    """PPO and EXO-rw at several learning rates."""

    results: Artifact
    groups: Groups
    ppo: Stage


def sensitivity(plan: Plan, seed: int) -> Sensitivity:
    policies: dict[str, Stage | Artifact] = {}
    for rate in RATES:
        policies[f"ppo_{rate:g}"] = by_ppo(plan, seed, "oracle", rate)
        policies[f"exo_{rate:g}"] = by_rewards(plan, seed, "exo", 4, "oracle", rate)
    results = evaluation(plan, seed, "evaluated_rates", policies)
    return Sensitivity(results, groups(plan, seed), by_ppo(plan, seed))


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
