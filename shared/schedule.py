"""The learning rate of each step."""

import math
from typing import Any


def learning_rate(step: int, last_step: int, args: Any) -> float:
    """The learning rate of step 1, 2, ..., last_step.

    It rises linearly over `args.warmup_steps`. Then it is constant, or falls towards 0, which it would reach one step
    after the last one (`args.lr_schedule`).
    """
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps

    remaining = (last_step - step + 1) / (last_step - args.warmup_steps)  # from 1 down to just above 0
    scale = {
        "constant": 1.0,
        "linear": remaining,
        "cosine": 0.5 * (1 - math.cos(math.pi * remaining)),
    }
    return args.learning_rate * scale[args.lr_schedule]
