"""Log-probabilities of completions from hidden states, holding but a bounded part of (tokens x vocabulary)."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

# tokens and words whose logits are computed at a time: 4 MiB stay in a CPU's cache, 512 MiB keep a GPU's units busy
TILE = {"cpu": (2**9, 2**11), "cuda": (2**9, 2**18)}
KEPT = 2**23  # logits that the backward pass need not compute anew, at most: 32 MiB


class _TokenLogps(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] per token; the backward pass recomputes the logits of tiles beyond KEPT."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        chosen = hidden.new_zeros(len(hidden), dtype=torch.float32)
        lse = torch.full_like(chosen, float("-inf"), dtype=torch.double)  # float32 would lose a little in every tile
        ctx.kept, left = {}, KEPT if ctx.needs_input_grad[0] else 0
        for tokens, words in _tiles(hidden, weight):
            logits = _logits(hidden[tokens], weight, bias, words)
            if left >= logits.numel():
                ctx.kept[tokens.start, words.start], left = logits, left - logits.numel()
            lse[tokens] = lse[tokens].logaddexp(logits.logsumexp(-1).double())
            index, inside = _within(targets[tokens], words)
            chosen[tokens] = torch.where(inside, logits.gather(-1, index), chosen[tokens, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, lse.float())
        return (chosen - lse).float()

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        inputs = (hidden, weight, bias)
        d_hidden, d_weight, d_bias = (x if x is None else torch.zeros_like(x, dtype=torch.float32) for x in inputs)
        for tokens, words in _tiles(hidden, weight):
            logits = ctx.kept.pop((tokens.start, words.start), None)
            logits = _logits(hidden[tokens], weight, bias, words) if logits is None else logits
            g = grad[tokens, None]
            index, inside = _within(targets[tokens], words)
            # d logp[t] / d logits = onehot(target) - softmax
            d = logits.sub_(lse[tokens, None]).exp_().mul_(-g).scatter_add_(-1, index, g * inside)
            if d_bias is not None:
                d_bias[words] += d.sum(0)
            d = d.to(weight.dtype)
            _add_product(d_hidden[tokens], d, weight[words])
            _add_product(d_weight[words], d.mT, hidden[tokens])
        found = zip((d_hidden, d_weight, d_bias), inputs, strict=True)
        return *(x if x is None else d.to(x.dtype) for d, x in found), None


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    tokens, words = TILE[hidden.device.type]
    for i, j in product(range(0, len(hidden), tokens), range(0, len(weight), words)):
        yield slice(i, i + tokens), slice(j, min(j + words, len(weight)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    return torch.nn.functional.linear(hidden, weight[words], bias if bias is None else bias[words]).float()


def _within(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """(N, 1) each: the targets' places among the words, and whether they are there."""
    index = targets[:, None] - words.start
    return index.clamp(0, words.stop - words.start - 1), (targets[:, None] < words.stop) & (index >= 0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log π(target | context) of N tokens, float32.

    hidden (N, H): the states that predict them; weight (V, H), bias (V,) or None: the output head; targets (N,) → (N,).
    """
    return _TokenLogps.apply(hidden, weight, bias, targets)


def sequence_logps(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) of each completion.

    token_logps (N,), the completions one after another; lengths (B, K), their tokens, the EOS included, summing to N
    → (B, K), float32 (summed in float64: a long sum would lose what the difference to the reference needs).
    """
    completion = torch.arange(lengths.numel(), device=lengths.device)
    completion = completion.repeat_interleave(lengths.flatten(), output_size=len(token_logps))
    sums = torch.zeros(lengths.numel(), dtype=torch.double, device=lengths.device)
    return sums.index_add(0, completion, token_logps.double()).float().view(lengths.shape)
