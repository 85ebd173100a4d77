"""What several test files share: the settings of runs that are compared with a float64 loop, and what they log."""

from typing import Any

# ---------------------------------------------------------------- runs

STEPS = 3
BATCH = 4
BETA = 0.1
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
OPTIONS: dict[str, Any] = {
    "batch_size": BATCH,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": WEIGHT_DECAY,
    "max_grad_norm": MAX_GRAD_NORM,
    "max_length": 512,
    "max_prompt_length": 256,
    "dtype": "float32",
    "shuffle": False,
    "log_every": 1,
}

# ---------------------------------------------------------------- metrics

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGP_METRICS = ("logps/chosen", "logps/rejected")
PREFERENCE_METRICS = (*REWARD_METRICS, *LOGP_METRICS)
TOKEN_METRICS = (
    "token_rewards/chosen",
    "token_rewards/rejected",
    "negative_tokens/chosen",
    "negative_tokens/rejected",
)
