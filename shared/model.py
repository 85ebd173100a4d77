"""Policies and reward models: a Hugging Face model whose forward pass reads a packed micro-batch.

The model may be multimodal, such as one that also reads pictures. Then its text part is trained and the rest is frozen.
"""

from collections.abc import Callable, Iterator
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
        self.is_compiled = False
        # of peft, if an adapter is trained instead of the weights
        self.adapter_config: Any = None

    @property
    def text_model(self) -> Any:
        """The transformer that reads the tokens, without the head."""
        if self.lm.config.get_text_config() is self.lm.config:
            return self.lm.base_model
        return self.lm.get_decoder()

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained, which are all that an optimizer and a checkpoint see."""
        for name, parameter in super().named_parameters(*args, **options):
            if parameter.requires_grad:
                yield name, parameter

    def states_at(self, positions: Tensor, batch: Batch) -> Tensor:
        """The last hidden states (R, H) at some positions (R,) of the packed row, each given once."""
        if torch.is_grad_enabled():
            self.sync(batch.is_last)
        elif self.is_compiled:
            # The compiler would round a forward pass without gradients in other places than one with them. π_θ = π_ref
            # must give log-ratios of exactly 0.
            with torch.enable_grad():
                return self._states_at(positions, batch).detach()
        return self._states_at(positions, batch)

    def _states_at(self, positions: Tensor, batch: Batch) -> Tensor:
        output = self.text_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            spans=batch.spans,
            read_positions=positions,
            use_cache=False,
        )
        return output.last_hidden_state[0].index_select(0, positions)


class Policy(PackedModel):
    """π_θ(y|x) of a causal language model."""

    def __init__(self, lm: Any):
        super().__init__(lm)
        config = lm.config.get_text_config()
        # the names under which families give what their logits are multiplied with, divided by, and capped at
        self.logit_scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        self.logit_cap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> Any:
        """The map from hidden states to logits."""
        return self.lm.get_output_embeddings()

    def forward(self, batch: Batch) -> Tensor:
        """log π of each completion token (N,), given all tokens before it. Float32."""
        states = self.states_at(batch.predictor_positions, batch)
        states = states.index_select(0, batch.predictor_of_token)
        if self.logit_scale != 1:
            states = states * self.logit_scale
        head = self.head
        return token_logps(states, head.weight, head.bias, batch.targets, self.logit_cap, self.is_compiled)

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

    @property
    def head(self) -> Any:
        """The map from a hidden state to a reward."""
        return self.lm.score

    def forward(self, batch: Batch) -> Tensor:
        """r(x, y) of each completion (B, K). Float32."""
        states = self.states_at(batch.last_positions.flatten(), batch)
        rewards = nn.functional.linear(states.float(), self.head.weight.float())
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
