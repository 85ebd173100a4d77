"""Eq 16 of From r to Q*, arXiv 2404.12358, at every state of completions that were sampled from π_ref.

    E_{a~π_ref}[β log π(a|s) - β log π_ref(a|s)] = -β KL(π_ref(·|s) ‖ π(·|s))

A state s is a prompt with the tokens of a completion so far, an action a the next token.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from algos.token_dpo_beam import token_rewards
from scripts.lab.divergence import kl_of_steps
from scripts.lab.policies import prompt_example, sample_policy
from scripts.lab.sampling import Sampling
from scripts.lab.statistics import mean_and_interval
from shared.encode import TokenIds
from shared.loading import load_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 64  # sequences whose logits over the vocabulary are in memory together


def eq_16(logps: Tensor, ref_logps: Tensor, actions: Tensor, beta: float) -> Tensor:
    """Both sides of Eq 16 at T states, and the token reward of the action that was sampled there.

    logps, ref_logps: (T, V), log π(·|s) and log π_ref(·|s). actions: (T,). Returns (T, 3):
    E_{a~π_ref}[r(s, a)], from the token rewards of all actions; -β KL(π_ref ‖ π), without them; r(s, a).
    """
    rewards = token_rewards(logps, ref_logps, beta)  # (T, V)
    expected_rewards = (ref_logps.exp() * rewards).sum(1)

    divergences = kl_of_steps(ref_logps, logps)
    sampled_rewards = rewards.gather(1, actions.unsqueeze(1)).squeeze(1)
    return torch.stack([expected_rewards, -beta * divergences, sampled_rewards], 1)


@torch.inference_mode()
def eq_16_of_completions(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel",
    prompts: list[TokenIds],
    completions: list[TokenIds],
    beta: float,
) -> list[Tensor]:
    """`eq_16` at every state of n completions y of prompts x, all token ids: n times (|y|, 3), float64."""
    sides = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch_prompts = prompts[start : start + BATCH_SIZE]
        batch_completions = completions[start : start + BATCH_SIZE]

        sequences = []
        for prompt, completion in zip(batch_prompts, batch_completions, strict=True):
            sequences.append(torch.tensor(prompt + completion))
        # No state sees the padding that follows it, so that no mask is needed.
        input_ids = pad_sequence(sequences, batch_first=True)
        logps = next_token_logps(policy, input_ids)
        ref_logps = next_token_logps(reference, input_ids)

        for i, (prompt, completion) in enumerate(zip(batch_prompts, batch_completions, strict=True)):
            first = len(prompt) - 1  # the prompt's last token predicts the completion's first one
            states = slice(first, first + len(completion))
            actions = torch.tensor(completion)
            sides.append(eq_16(logps[i, states], ref_logps[i, states], actions, beta))
    return sides


def next_token_logps(model: "PreTrainedModel", input_ids: Tensor) -> Tensor:
    """log π(·|s) at every position, (B, T, V), float64."""
    logits = model(input_ids).logits
    return logits.double().log_softmax(-1)


def check_eq_16(
    policies: list[Path], reference: Path, prompts: list[str], sampling: Sampling, num_samples: int, beta: float
) -> dict:
    """Eq 16 at the states of `num_samples` completions per prompt, sampled from π_ref, and summed over each completion.

    By the chain rule, the mean of the sums is -β KL(π_ref(y|x) ‖ π(y|x)) of whole completions.
    """
    examples = [prompt_example(prompt) for prompt in prompts]
    prompt_ids, samples = sample_policy(str(reference), examples, sampling, num_samples)
    repeated_prompts = []
    completions = []
    for prompt, prompt_completions in zip(prompt_ids, samples.ids, strict=True):
        repeated_prompts += [prompt] * num_samples
        completions += prompt_completions

    states = []
    sums = []
    reference_model = load_generator(str(reference), torch.double, "cpu")
    for path in policies:
        policy = load_generator(str(path), torch.double, "cpu")
        sides = eq_16_of_completions(policy, reference_model, repeated_prompts, completions, beta)
        states.append(torch.cat(sides))
        sums.append(torch.stack([completion_sides.sum(0) for completion_sides in sides]))
    return numbers_of(torch.stack(states), torch.stack(sums), num_samples, sampling.seed)


def numbers_of(states: Tensor, sums: Tensor, num_samples: int, seed: int) -> dict:
    """What the tables say of P policies.

    states: (P, N, 3), what `eq_16` gives at all N states. sums: (P, n · num_samples, 3), its sums over completions.
    """
    left, right, sampled = states.unbind(-1)
    left_sums, _, sampled_sums = sums.unbind(-1)
    gaps = (sampled_sums - left_sums).view(len(sums), -1, num_samples)
    prompt_gaps = gaps.mean((0, 2))
    return {
        "states": left.shape[1],
        "deviation": float((left - right).abs().max()),
        "largest": float(left.max()),
        "state": float(left.mean()),
        "drawn_state": float(sampled.mean()),
        "expected": left_sums.mean(1).tolist(),
        "drawn": sampled_sums.mean(1).tolist(),
        "gap": mean_and_interval(prompt_gaps, seed),
    }
