"""Check, when a model is loaded, that packed rows give its own values.

A packed row has causal attention over each prompt and one completion at a time, and nothing else. An architecture may
compute something beside that: a recurrent state or a convolution that goes on from one completion into the next, biases
on the distance of two tokens, soft-capped logits. With small weights this hardly changes a value. So the check looks at
gradients too, whose relative error does not depend on the size of the weights:

- the value of a completion does not depend on the tokens of other groups or completions: those gradients are zero;
- its gradients by all tokens that it depends on are those of the stock forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared import first_line
from shared.attention import ATTENTION_NAME
from shared.batches import Batches
from shared.distributed import Ranks
from shared.groups import Groups, full_attention_length
from shared.model import Policy, RewardModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LENGTHS = ((10, 30, 20), (4, 16, 8), (24, 9, 7))  # of each group: the tokens of its prompt and its two completions
WINDOW = 12  # the largest attention window in the check, so that its rows are longer than every window
COMPARED = ((0, 0), (2, 1))  # group and completion; other tokens stand before, between and behind what these two read
VALUE_TOLERANCE = 1e-4  # of a value
VALUE_FLOOR = 1e-3  # a value is a sum over up to 30 tokens
GRADIENT_TOLERANCE = 1e-2  # of a token's own gradient; rounding gives about 1e-5, another attention about 1
GRADIENT_FLOOR = 1e-5  # of the largest gradient of any token

# parts of the names of modules that go on from one token to the next without attention
RECURRENT = ("conv1d", "delta", "lightning", "linearattention", "lru", "mamba", "mixer2", "rwkv", "shortconv", "xlstm")
ALIBI = ("build_alibi_tensor", "build_mpt_alibi_tensor")  # methods of models with biases on the distance of two tokens


@torch.enable_grad()
def check_packing(model: Policy | RewardModel) -> None:
    """Raises ValueError if a packed row gives other values or gradients than stock forward passes.

    It leaves weights, gradients and hooks as they are.
    """
    groups = _arbitrary_groups(model.lm.config.get_text_config())
    with _short_windows(model.lm):
        _compare(model, groups)


def reason_of_refusal(model: Policy | RewardModel, error: Exception) -> str:
    """What the model has that packed rows cannot give, as far as its modules tell; else the error's first line."""
    for module in model.text_model.modules():
        name = type(module).__name__.lower()
        is_gpt2_projection = name == "conv1d" and not isinstance(module, nn.Conv1d)
        if any(part in name for part in RECURRENT) and not is_gpt2_projection:
            return "it has recurrent or convolution layers, which go on from one completion into the next"
    if getattr(model.text_model.config, "alibi", False) or any(hasattr(model.text_model, name) for name in ALIBI):
        return "its attention has position biases"
    if not model.lm._supports_attention_backend:
        return "its attention cannot be told which tokens see each other"
    return first_line(error)


def _compare(model: Policy | RewardModel, groups: Groups) -> None:
    random_state = torch.get_rng_state()
    values, gradient = _of_packed_row(model, groups)
    if not torch.equal(torch.get_rng_state(), random_state):
        raise ValueError("it draws random numbers in training, beside dropout")
    stock_values = torch.zeros_like(values)
    stock_gradient = torch.zeros_like(gradient)
    is_read = torch.zeros(len(gradient), dtype=torch.bool)
    with _stock_attention(model.lm):
        for i, (group, k) in enumerate(COMPARED):
            bounds = groups.offsets[group].tolist()
            prompt = torch.arange(bounds[0], bounds[1])
            completion = torch.arange(bounds[1 + k], bounds[2 + k])
            positions = torch.cat([prompt, completion])
            is_read[positions] = True
            stock_values[i], stock_gradient[positions] = _of_stock_pass(model, groups, prompt, completion)

    if gradient[~is_read].any():
        raise ValueError("in a packed row, a completion depends on the tokens of another one")
    if not torch.allclose(values, stock_values, VALUE_TOLERANCE, VALUE_FLOOR):
        raise ValueError("packed rows give other values than it does")
    sizes = stock_gradient.norm(dim=1)
    errors = (gradient - stock_gradient).norm(dim=1)
    allowed = GRADIENT_TOLERANCE * sizes + GRADIENT_FLOOR * sizes.max()
    if not (errors <= allowed).all():
        raise ValueError("packed rows give other gradients than it does")


def _arbitrary_groups(config: "PretrainedConfig") -> Groups:
    """Groups of arbitrary tokens, shorter than LENGTHS if only short rows can be packed."""
    lengths = torch.tensor(LENGTHS)
    longest = int((lengths[:, :1] + lengths[:, 1:]).max())
    limit = full_attention_length(config)
    if limit < longest:
        shortened = lengths * limit // longest
        lengths = shortened.clamp(min=1)

    ends = lengths.flatten().cumsum(0).view_as(lengths)
    starts = ends[:, :1] - lengths[:, :1]
    offsets = torch.cat([starts, ends], 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (int(lengths.sum()),), generator=generator)
    if config.pad_token_id is not None:  # classifiers look for the last token that is no padding
        tokens[tokens == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    return Groups(tokens.int(), offsets, torch.arange(len(lengths)), {})


@contextmanager
def _short_windows(lm: Any) -> Iterator[None]:
    """Inside, no attention window of the model is larger than WINDOW."""
    windows = []
    for holder in (lm.config.get_text_config(), *lm.modules()):
        window = getattr(holder, "sliding_window", None)
        if window:
            windows.append((holder, window))
            holder.sliding_window = min(window, WINDOW)
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


@contextmanager
def _stock_attention(lm: Any) -> Iterator[None]:
    """Inside, the model runs as transformers has it."""
    lm.eval().set_attn_implementation("sdpa")
    try:
        yield
    finally:
        lm.train().set_attn_implementation(ATTENTION_NAME)


def _of_packed_row(model: Policy | RewardModel, groups: Groups) -> tuple[Tensor, Tensor]:
    """(2,), the compared values, and (T, H), the gradient of their sum by the embeddings."""
    ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
    batches = Batches(groups, len(groups), len(groups.tokens), None, ranks)
    (batch,) = batches.of_step(1)
    with _embeddings(model) as embeddings:
        values = model.values(batch)
    compared = torch.stack([values[index] for index in COMPARED])
    return compared.detach(), _gradient(compared.sum(), embeddings)


def _of_stock_pass(
    model: Policy | RewardModel, groups: Groups, prompt: Tensor, completion: Tensor
) -> tuple[Tensor, Tensor]:
    """The value of the completion at some positions, and its gradient by the embeddings (P + C, H)."""
    tokens = groups.tokens.long()
    with _embeddings(model) as embeddings:
        value = model.stock_value(tokens[prompt], tokens[completion])
    return value.detach(), _gradient(value, embeddings)


@contextmanager
def _embeddings(model: Policy | RewardModel) -> Iterator[list[Tensor]]:
    """A list to which the forward pass inside adds the embeddings of its tokens (1, T, H)."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:  # the embedding is frozen
            output.requires_grad_()
        outputs.append(output)

    hook = model.lm.get_input_embeddings().register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


def _gradient(value: Tensor, embeddings: list[Tensor]) -> Tensor:
    """(T, H), the gradient of a value by the embeddings."""
    (gradient,) = torch.autograd.grad(value, embeddings)
    return gradient[0]
