"""Log-probabilities of tokens from hidden states, in tiles of (tokens, vocabulary entries), and sums over completions.

The logits of all tokens over the whole vocabulary would be the largest tensor of a training step. They are never held
at once: both passes go through the tiles, and the backward pass computes again what the forward pass did not keep.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Tokens and vocabulary entries of one tile: 4 MiB of logits stay in a CPU's cache, 512 MiB keep a GPU's units busy.
# A GPU's tiles have many tokens, because each tile adds to the whole gradient of its vocabulary entries.
TILE = {"cpu": (2**9, 2**11), "cuda": (2**13, 2**14)}
KEPT = 2**23  # keep at most that many logits (32 MiB) for the backward pass; recompute the rest


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float | None = None,
    is_compiled: bool = False,
) -> Tensor:
    """log π(target | context) of N tokens, float32.

    hidden (N, H): the states that predict them; weight (V, H), bias (V,) or None: the output head; targets (N,) → (N,).
    A cap c bounds the logits z softly: c tanh(z / c). Compiled code passes over the logits fewer times.
    """
    return _TokenLogps.apply(hidden, weight, bias, targets, cap, is_compiled)


class _TokenLogps(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] = logit[target] − logsumexp(logits), per token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cap: float | None,
        is_compiled: bool,
    ) -> Tensor:
        target_logits = hidden.new_zeros(len(hidden), dtype=torch.float32)
        # in float32, every tile would lose a little
        logsumexp = torch.full_like(target_logits, float("-inf"), dtype=torch.double)

        ctx.cap = cap
        ctx.is_compiled = is_compiled
        ctx.kept_logits = {}
        room = 0
        if ctx.needs_input_grad[0]:
            room = KEPT

        for tokens, vocabulary in _tiles(hidden, weight):
            logits = _logits(hidden[tokens], weight, bias, vocabulary, cap)
            size = logits.numel()
            if size <= room:
                room -= size
                key = (tokens.start, vocabulary.start)
                ctx.kept_logits[key] = logits

            add_tile = _add_tile
            if is_compiled:
                add_tile = _compiled(_add_tile)
            index, inside = _index_in(vocabulary, targets[tokens])
            logsumexp[tokens], target_logits[tokens] = add_tile(
                logits, index, inside, logsumexp[tokens], target_logits[tokens]
            )

        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp.float())
        logps = target_logits - logsumexp
        return logps.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        weight_grad = None
        if ctx.needs_input_grad[1]:  # the head is not frozen
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None
        if ctx.needs_input_grad[2]:
            assert bias is not None
            bias_grad = torch.zeros_like(bias, dtype=torch.float32)

        for tokens, vocabulary in _tiles(hidden, weight):
            key = (tokens.start, vocabulary.start)
            logits = ctx.kept_logits.pop(key, None)
            if logits is None:
                logits = _logits(hidden[tokens], weight, bias, vocabulary, ctx.cap)

            slope = None
            if ctx.cap is not None:
                slope = 1 - (logits / ctx.cap).square()  # of the cap: tanh' = 1 − tanh²

            dtype = weight.dtype
            if slope is not None or bias_grad is not None:
                dtype = torch.float32  # what is read below must not be rounded yet
            index, inside = _index_in(vocabulary, targets[tokens])
            gradient = _gradient_in_place
            if ctx.is_compiled:
                gradient = _compiled(_gradient_in_one_pass)
            logits_grad = gradient(logits, index, inside, logsumexp[tokens, None], grad[tokens, None], dtype)
            if slope is not None:
                logits_grad *= slope

            if bias_grad is not None:
                bias_grad[vocabulary] += logits_grad.sum(0)
            logits_grad = logits_grad.to(weight.dtype)
            tile_weight = weight[vocabulary]
            tile_hidden = hidden[tokens]
            _add_product(hidden_grad[tokens], logits_grad, tile_weight)
            if weight_grad is not None:
                _add_product(weight_grad[vocabulary], logits_grad.mT, tile_hidden)

        hidden_grad = hidden_grad.to(hidden.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        if bias_grad is not None:
            bias_grad = bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """The slice of the tokens and the slice of the vocabulary of each tile."""
    # an unknown device gets the small tiles, which fit everywhere
    device = hidden.device.type
    tile_tokens, tile_entries = TILE.get(device, TILE["cpu"])
    for first_token in range(0, len(hidden), tile_tokens):
        tokens = slice(first_token, first_token + tile_tokens)
        for first_entry in range(0, len(weight), tile_entries):
            end = min(first_entry + tile_entries, len(weight))
            yield tokens, slice(first_entry, end)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: slice, cap: float | None) -> Tensor:
    """The logits of hidden states over a slice of the vocabulary, capped, float32."""
    tile_weight = weight[vocabulary]
    tile_bias = None
    if bias is not None:
        tile_bias = bias[vocabulary]
    if _has_float32_results(hidden):
        logits = torch.mm(hidden, tile_weight.mT, out_dtype=torch.float32)
        if tile_bias is not None:
            logits += tile_bias
    else:
        logits = torch.nn.functional.linear(hidden, tile_weight, tile_bias).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def _add_tile(
    logits: Tensor, index: Tensor, inside: Tensor, logsumexp: Tensor, target_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The logsumexp (N,) over a tile and all before it, and the targets' logits (N,), as far as they were met."""
    tile_logsumexp = logits.logsumexp(-1).double()
    logits_at_index = logits.gather(-1, index)
    met = torch.where(inside, logits_at_index, target_logits[:, None])
    return logsumexp.logaddexp(tile_logsumexp), met[:, 0]


def _gradient_in_place(
    logits: Tensor, index: Tensor, inside: Tensor, logsumexp: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """d logp / d logits = onehot(target) − softmax, times the gradient (N, 1) of logp, in the memory of the logits."""
    softmax = logits.sub_(logsumexp).exp_()
    logits_grad = softmax.mul_(-grad)
    logits_grad.scatter_add_(-1, index, grad * inside)
    return logits_grad.to(dtype)


def _gradient_in_one_pass(
    logits: Tensor, index: Tensor, inside: Tensor, logsumexp: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same in a form of which a compiler makes one pass."""
    entries = torch.arange(logits.shape[1], device=logits.device)
    onehot = inside & (entries == index)
    softmax = (logits - logsumexp).exp()
    return ((onehot.float() - softmax) * grad).to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _index_in(vocabulary: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1) each: the targets' indices in a slice of the vocabulary, and whether they lie in it.

    The index of a target outside of it is some valid index.
    """
    size = vocabulary.stop - vocabulary.start
    index = targets[:, None] - vocabulary.start
    inside = (index >= 0) & (index < size)
    return index.clamp(0, size - 1), inside


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 sum in place, also when a and b are in half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _has_float32_results(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)


def _has_float32_results(factor: Tensor) -> bool:
    """Whether a product with this factor in half precision can give its sums in float32, without rounding them."""
    return factor.is_cuda and torch.version.hip is None and factor.dtype in (torch.bfloat16, torch.float16)


def sum_over_completions(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum a value per token over each completion, such as log π(y|x) = Σ_t log π(y_t | x, y_<t).

    values (N,), the completions one after another; lengths (B, K), their tokens with the EOS, which sum to N → (B, K),
    float32. The sum is in float64, because a long sum would lose digits that the difference to the reference needs.
    """
    completions = torch.arange(lengths.numel(), device=lengths.device)
    completion_of_token = completions.repeat_interleave(lengths.flatten(), output_size=len(values))
    sums = torch.zeros(lengths.numel(), dtype=torch.double, device=lengths.device)
    sums = sums.index_add(0, completion_of_token, values.double())
    return sums.float().view(lengths.shape)
