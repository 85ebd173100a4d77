"""Log-probabilities of completions from hidden states, holding but a bounded part of (tokens x vocabulary)."""

import torch
from torch import Tensor

# logits computed at a time: 4 MiB stay in a CPU's cache; 512 MiB keep a GPU's matrix units busy
CHUNK = {"cpu": 2**20, "cuda": 2**27}
TOKENS = 64  # of a chunk at least, however large the vocabulary: each reads the head's weights anew
KEPT = 2**23  # logits that the backward pass need not compute anew, at most: 32 MiB


class _TokenLogps(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] per token; the backward recomputes the logits of chunks beyond KEPT."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logps)
        ctx.kept, left = {}, KEPT if ctx.needs_input_grad[0] else 0
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, bias)
            if left >= logits.numel():
                ctx.kept[part.start], left = logits, left - logits.numel()
            lse[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, targets[part, None])[:, 0] - lse[part]
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part in _chunks(hidden, weight):
            g = grad[part, None]
            logits = ctx.kept.pop(part.start) if part.start in ctx.kept else _logits(hidden[part], weight, bias)
            # d logp[t] / d logits = onehot(target) - softmax
            d = logits.sub_(lse[part, None]).exp_().mul_(-g)
            d.scatter_add_(-1, targets[part, None], g)
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(weight.dtype)
            d_hidden[part] = d @ weight
            d_weight.addmm_(d.mT, hidden[part]) if d.dtype == d_weight.dtype else d_weight.add_(d.mT @ hidden[part])
        return d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(TOKENS, CHUNK[hidden.device.type] // len(weight))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


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
