"""KL(π(y|x) ‖ π_ref(y|x)) from completions that were sampled from π, in two ways.

With s_t the prompt x and the tokens of the completion before y_t,

    KL(π(y|x) ‖ π_ref(y|x)) = E_{y~π}[Σ_t log π(y_t|s_t) - log π_ref(y_t|s_t)]
                            = E_{y~π}[Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t))]

The first sum is the log-ratio of what was sampled. The second takes the expectation over each next token exactly, as
DPO does (footnote 3 of arXiv 2305.18290), and usually varies much less. For a completion that was cut off, both are
about its first tokens.

At a temperature T, π is the distribution that was sampled: at every step softmax(z/T) of the policy's logits z, and for
T = 0 the likeliest token alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.lab.scoring import BATCH_SIZE
from shared.batches import Batch, Batches
from shared.distributed import Ranks, inference
from shared.groups import Groups, check_fit
from shared.logprobs import sum_over_completions
from shared.model import Policy

CHUNK_SIZE = 256  # tokens whose log-probs over the vocabulary are in memory together


@dataclass
class Divergence:
    """Both sums of n prompts with K completions each, in nats, float64."""

    log_ratios: Tensor  # (n, K)
    step_kls: Tensor  # (n, K)


def kl_of_steps(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(π(·|s) ‖ π_ref(·|s)) at T states: log π and log π_ref of every next token, (T, V) each → (T,)."""
    probabilities = logps.exp()
    terms = probabilities * (logps - ref_logps)
    is_possible = logps > -torch.inf  # what π never takes adds nothing
    return terms.where(is_possible, 0.0).sum(1)


def at_temperature(logps: Tensor, temperature: float, actions: Tensor) -> Tensor:
    """The log-probs of the distribution that was sampled, (T, V) → (T, V). actions: (T,), the tokens taken from it."""
    if temperature == 0:
        alone = torch.full_like(logps, -torch.inf)
        return alone.scatter(1, actions.unsqueeze(1), 0.0)
    if temperature == 1:
        return logps
    return (logps / temperature).log_softmax(1)


def divergence_of_steps(logps: Tensor, ref_logps: Tensor, actions: Tensor, temperature: float) -> Tensor:
    """The log-ratio of the action, and the KL, at T states: (T, 2).

    logps (T, V), ref_logps (T, V'): of π at temperature 1, and of π_ref. Models of one family pad their embeddings to
    different sizes; no token stands there, so that the larger one is cut. actions: (T,).
    """
    size = min(logps.shape[1], ref_logps.shape[1])
    ref_logps = ref_logps[:, :size]
    sampled_logps = at_temperature(logps[:, :size], temperature, actions)

    index = actions.unsqueeze(1)
    action_logps = sampled_logps.gather(1, index)
    ref_action_logps = ref_logps.gather(1, index)
    log_ratios = action_logps - ref_action_logps

    step_kls = kl_of_steps(sampled_logps, ref_logps)
    return torch.stack([log_ratios.squeeze(1), step_kls], 1)


def divergence_of_groups(
    policy: Policy, reference: Policy, groups: Groups, temperature: float, budget: int, ranks: Ranks
) -> Divergence:
    """Both sums of each completion of the groups, which was sampled from the policy at the temperature.

    budget: most tokens in one forward pass. Raises UserError if a completion does not fit a model.
    """
    for model in (policy, reference):
        check_fit(groups, model.lm.config, "rows")
    batches = Batches(groups, BATCH_SIZE, budget, None, ranks)
    shape = (len(groups), groups.num_completions)
    log_ratios = torch.zeros(shape, device=ranks.device)
    step_kls = torch.zeros_like(log_ratios)
    with inference(policy), inference(reference):
        for batch in batches.all_batches():
            of_tokens = _divergence_of_tokens(policy, reference, batch, temperature)
            token_ratios, token_kls = of_tokens.unbind(1)
            log_ratios[batch.group_index] = sum_over_completions(token_ratios, batch.lengths)
            step_kls[batch.group_index] = sum_over_completions(token_kls, batch.lengths)
    return Divergence(log_ratios.cpu().double(), step_kls.cpu().double())


def _divergence_of_tokens(policy: Policy, reference: Policy, batch: Batch, temperature: float) -> Tensor:
    """`divergence_of_steps` at each of the N tokens of a packed row, (N, 2), in chunks."""
    states = policy.states_at(batch.predictor_positions, batch)
    ref_states = states
    if policy is not reference:
        ref_states = reference.states_at(batch.predictor_positions, batch)
    chunks = []
    num_tokens = len(batch.targets)
    for start in range(0, num_tokens, CHUNK_SIZE):
        end = start + CHUNK_SIZE
        tokens = slice(start, end)
        predictors = batch.predictor_of_token[tokens]
        logps = _next_token_logps(policy, states[predictors])
        ref_logps = _next_token_logps(reference, ref_states[predictors])
        actions = batch.targets[tokens]
        chunk = divergence_of_steps(logps, ref_logps, actions, temperature)
        chunks.append(chunk)
    return torch.cat(chunks)


def _next_token_logps(policy: Policy, states: Tensor) -> Tensor:
    """log π(·|s) from the last hidden states, (T, H) → (T, V), float64."""
    scaled = states * policy.logit_scale
    logits = F.linear(scaled, policy.head.weight, policy.head.bias)
    cap = policy.logit_cap
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.double()
    return logits.log_softmax(1)
