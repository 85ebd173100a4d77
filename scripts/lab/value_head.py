"""A policy together with the value of each state, from one forward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from shared.batches import Batch
from shared.model import Policy


class ActorCritic(nn.Module):
    """π_θ(a|s) of a policy, and V(s), a linear map of its last hidden state.

    A state s is the prompt with the completion so far. V's gradient ends at the hidden state, so that the two losses
    share no weight, and need no coefficient between them. V is 0 at the start.
    """

    def __init__(self, policy: Policy, device: torch.device):
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.head.weight.shape[1], 1, device=device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._states = torch.empty(0)  # the last hidden states (T, H) of the newest forward pass
        policy.text_model.register_forward_hook(self._keep_states)

    def _keep_states(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._states = output.last_hidden_state[0].detach()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log π(a_t|s_t) and V(s_t) of each completion token, (N,) each, float32."""
        logps = self.policy(batch)
        states = self._states.index_select(0, batch.predictor_positions)
        states = states.index_select(0, batch.predictor_of_token)
        values = self.value_head(states.float())
        return logps, values[:, 0]
