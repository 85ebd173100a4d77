"""Leave out of the last layer what nothing reads.

Nothing attends to the outputs of the last layer, and few of them are read. A policy reads those at the positions that
predict a completion token. Here the last layer needs what is marked x:

                                        prompt      completion 1   completion 2
    keys, values                        x x x x x   x x x          x x
    queries, output projection, MLP     . . . . x   x x .          x .

So the last layer computes keys and values everywhere, and the rest only at the positions that a forward pass is given
as its argument `read_positions`. Its outputs at other positions mean nothing. This helps most with long prompts and few
layers. A forward pass without that argument computes everything.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from shared.attention import Group, Spans

POSITIONWISE_MODULES = ("q_proj", "o_proj", "mlp")  # the parts of a layer whose output at one position needs no other


def skip_unread(layer: nn.Module) -> None:
    """Let the last layer of a model compute only what its outputs at `read_positions` need.

    `read_positions` (R,) is an argument of the model's forward pass. It holds each position once, and none inside a
    prompt but its last.
    """
    hooks = _Hooks()
    layer.register_forward_pre_hook(hooks.enter_layer, with_kwargs=True)
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in POSITIONWISE_MODULES:
            module.register_forward_pre_hook(hooks.gather)
            module.register_forward_hook(hooks.scatter)


@dataclass
class _Hooks:
    """The hooks of one layer, and what they share during a forward pass."""

    read_positions: Tensor | None = None  # (R,); None in a forward pass that computes everything
    row_length: int = 0  # T

    def enter_layer(self, layer: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note the positions, and tell the attention which outputs are not needed."""
        self.read_positions = options.get("read_positions")
        if self.read_positions is not None:
            spans = options["spans"]
            options = {**options, "spans": skip_prompt_queries(spans)}
        return args, options

    def gather(self, module: nn.Module, args: tuple) -> tuple | None:
        """(1, T, H) → (1, R, H): give the module only the inputs at the positions that are read."""
        if self.read_positions is None:
            return None
        inputs, *others = args
        self.row_length = inputs.shape[1]
        return inputs.index_select(1, self.read_positions), *others

    def scatter(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """(1, R, H) → (1, T, H): put the module's outputs at their positions, and zeros at all others."""
        if self.read_positions is None:
            return None
        row = output.new_zeros(1, self.row_length, output.shape[-1])
        return row.index_copy(1, self.read_positions, output)


def skip_prompt_queries(spans: Spans) -> Spans:
    """The same row, where attention leaves out a prompt's queries but the last one if that is faster."""
    skipped = [_unread_queries(group) for group in spans.groups]
    return replace(spans, skipped=skipped)


def _unread_queries(group: Group) -> int:
    """The number of a prompt's queries to leave out. What remains needs a mask, so a short prompt is not worth it."""
    prompt, completions = group
    if completions and prompt > completions[0]:
        return prompt - 1
    return 0
