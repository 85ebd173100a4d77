"""The units of logged metrics, and which algorithms may share axes by them. docs/metrics.md explains the metrics."""

from typing import Any

from scripts.lab.runs import HELD_OUT

# the first ones that a picture shows
MOST_TELLING = (
    "loss",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "rewards/margins",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
)
# the machine's and the schedule's, shown on request
OF_THE_RUN = {
    "epoch": "passes over the rows",
    "learning_rate": "",
    "seconds": "seconds per step",
    "tokens_per_second": "tokens per second",
}
COMPARABLE_UNITS = {
    **OF_THE_RUN,
    "rewards/accuracies": "share of groups",
    "logps/chosen": "nats per completion",
    "logps/rejected": "nats per completion",
    "kl": "nats",
}
REWARDS = ("rewards/", "token_rewards/")
LOG_RATIO = "β (log π − log π_ref)"
REWARD_UNITS = {
    "dpo": LOG_RATIO,
    "exo": LOG_RATIO,
    "distill_dpo": LOG_RATIO,
    "pessimistic_dpo": LOG_RATIO,
    "ensemble_dpo": LOG_RATIO,
    "token_dpo_beam": LOG_RATIO,
    "ipo": "τ (log π − log π_ref)",
    "typo": "log π",
    "rm": "score",
}
REWARD_SCALES = ("beta", "tau")  # arguments that are factors of the reward


def bare(metric: str) -> str:
    """The name without what marks it as one over held-out rows."""
    return metric.removeprefix(HELD_OUT)


def is_reward(metric: str) -> bool:
    """Whether a metric is in the algorithm's unit of reward."""
    return bare(metric).startswith(REWARDS) and bare(metric) not in COMPARABLE_UNITS


def unit(metric: str, algorithm: str) -> str:
    """The unit of a metric, as the label of an axis."""
    name = bare(metric)
    if name in COMPARABLE_UNITS:
        return COMPARABLE_UNITS[name]
    if is_reward(name):
        return REWARD_UNITS.get(algorithm, "")
    if name == "loss" and algorithm == "sft":
        return "nats per token"
    if name.startswith(("negative_tokens/", "rm/")):
        return "share"
    return ""


def axes_of(metric: str, algorithm: str) -> str:
    """Algorithms with the same answer may be compared by this metric: "" for all of them."""
    if bare(metric) in COMPARABLE_UNITS:
        return ""
    if is_reward(metric):
        return REWARD_UNITS.get(algorithm, algorithm)
    return algorithm


def reward_scale(args: dict[str, Any]) -> list[Any]:
    """The factors of the reward among the arguments of a run."""
    return [args[name] for name in REWARD_SCALES if name in args]
