"""Policies and reward models: a Hugging Face model whose forward pass reads a packed micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shared.batches import Batch, Batches
from shared.distributed import all_sum, inference
from shared.logprobs import sum_over_completions, token_logps


def _no_sync(is_last: bool) -> None:
    """The `sync` of a model that is not sharded."""


class PackedModel(nn.Module):
    """A Hugging Face model over packed micro-batches.

    The whole forward pass happens inside one call of this module, because FSDP2 gathers the embedding and the head
    there.
    """

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm  # the model of transformers
        # called before each training forward pass, with whether its micro-batch is the last of the step
        self.sync: Callable[[bool], None] = _no_sync
        # SHA-256 of the weights under "model", and of the reference's under "reference" once it is known
        self.fingerprints: dict[str, str] = {}

    def states_at(self, positions: Tensor, batch: Batch) -> Tensor:
        """The last hidden states (R, H) at some positions (R,) of the packed row, each given once."""
        if torch.is_grad_enabled():
            self.sync(batch.is_last)
        output = self.lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            spans=batch.spans,
            read_positions=positions,
            use_cache=False,
        )
        return output.last_hidden_state[0].index_select(0, positions)


class Policy(PackedModel):
    """π_θ(y|x) of a causal language model."""

    def forward(self, batch: Batch) -> Tensor:
        """log π of each completion token (N,), given all tokens before it. Float32."""
        head = self.lm.get_output_embeddings()
        states = self.states_at(batch.predictor_positions, batch)
        states = states.index_select(0, batch.predictor_of_token)
        return token_logps(states, head.weight, head.bias, batch.targets)

    def logps(self, batch: Batch) -> Tensor:
        """log π(y|x) of each completion (B, K): the sum over its tokens."""
        return sum_over_completions(self(batch), batch.lengths)

    values = logps

    def stock_value(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """log π(y|x) by the stock forward pass."""
        ids = torch.cat([prompt, completion])
        logits = self.lm(input_ids=ids[None], use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(-1, completion[:, None]).sum()


class RewardModel(PackedModel):
    """r(x, y) of a sequence classifier with one label: its head's value at the last token of the completion."""

    def forward(self, batch: Batch) -> Tensor:
        """r(x, y) of each completion (B, K). Float32."""
        states = self.states_at(batch.last_positions.flatten(), batch)
        rewards = nn.functional.linear(states.float(), self.lm.score.weight.float())
        return rewards.view(batch.last_positions.shape).clone()  # FSDP2's hooks need a tensor that is not a view

    def values(self, batch: Batch) -> Tensor:
        """r(x, y) of each completion (B, K), under the name that the check of packed rows calls."""
        return self(batch)

    def stock_value(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """r(x, y) by the stock forward pass."""
        ids = torch.cat([prompt, completion])
        return self.lm(input_ids=ids[None]).logits[0, 0]


def mean_reward(model: RewardModel, batches: Batches) -> float:
    """The mean of r(x, y) over all completions of the rows."""
    rewards = []
    with inference(model):
        for step in range(1, batches.steps_per_epoch + 1):
            for batch in batches.of_step(step):
                rewards.append(model(batch).flatten())

    local = torch.cat(rewards)
    sum_and_count = local.new_tensor([local.sum(), len(local)], dtype=torch.double)
    total, count = all_sum(sum_and_count).tolist()
    return total / count
