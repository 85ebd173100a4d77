"""Span attention against a dense mask in float64: every architecture's layer sees exactly what it should."""

from collections.abc import Callable

import pytest
import torch

from shared import attention
from shared.attention import Spans, span_attention

GROUPS = [(5, (3, 1, 4)), (1, (2,)), (7, (1, 6)), (2, (5, 2, 2, 3))]  # prompt length, completion lengths
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def visible(groups: list[tuple[int, tuple[int, ...]]]) -> torch.Tensor:
    """(T, T) booleans, written from the rule: causal, own group, and the key in the prompt or the own completion."""
    group, piece = [], []
    for g, (p, cs) in enumerate(groups):
        for k, n in enumerate((p, *cs)):
            group += [g] * n
            piece += [k] * n
    t = range(len(group))
    rule = [[j <= i and group[i] == group[j] and piece[j] in (0, piece[i]) for j in t] for i in t]
    return torch.tensor(rule)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~visible(GROUPS), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("last", [False, True])
def test_span_attention_and_its_gradients(device: str, dtype: torch.dtype, kv_heads: int, last: bool) -> None:
    """In the last layer, where the outputs of all but a prompt's last token are of no account."""
    torch.manual_seed(0)
    total = sum(p + sum(cs) for p, cs in GROUPS)
    inputs = [torch.randn(1, h, total, 16).to(dtype).double().requires_grad_() for h in (4, kv_heads, kv_heads)]
    weights = torch.randn(1, total, 4, 16, dtype=torch.float64)
    of_account = torch.cat([torch.arange(p + sum(cs)) >= last * (p - 1) for p, cs in GROUPS])
    weights[:, ~of_account] = 0
    expected = dense(*inputs, scale=0.3)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)

    ours = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    output, _ = span_attention(None, *ours, None, spans=Spans.of(GROUPS, device, dtype), scaling=0.3, last=last)
    grads = torch.autograd.grad((output * weights.to(device, dtype)).sum(), ours)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for got, want in zip((output[:, of_account], *grads), (expected[:, of_account], *expected_grads), strict=True):
        assert (got.cpu().double() - want).norm() <= tolerance * want.norm()
    if device == "cpu":  # a prompt longer than its first completion is left out
        skipped = torch.cat([torch.arange(p + sum(cs)) < last * (p > cs[0]) * (p - 1) for p, cs in GROUPS])
        assert torch.equal((output == 0).all((0, 2, 3)), skipped)


def segments(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # noqa: ANN001, ANN201
    """What the variable-length kernel documents: each query range against its key range, causal from the end."""
    assert q.shape[-1] % 8 == 0  # all widths of heads that it takes
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert b - a <= max_q and d - c <= max_k
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        allowed = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        values = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), values))
    return torch.cat(outputs)


def torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, *, is_causal=False, scale=None):  # noqa: ANN001, ANN201
    assert is_causal and q.shape[1] == k.shape[1]
    return segments(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # noqa: ANN001, ANN201
    assert window_size == (-1, 0) and q.shape[1] == k.shape[1]
    return segments(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def torch_2_12(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # noqa: ANN001, ANN201
    assert window_size == (-1, 0) and enable_gqa
    return segments(q, k, v, cu_q, cu_k, max_q, max_k, scale)


@pytest.mark.parametrize("kernel", [torch_2_10, torch_2_11, torch_2_12])
@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("scale", [0.3, None])
def test_the_gpu_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable, width: int, scale: float | None
) -> None:
    """Without a GPU: the arguments of the one variable-length call describe the same attention, in each version."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    attention._varlen_arguments.cache_clear()
    total = sum(p + sum(cs) for p, cs in GROUPS)
    q, k, v = (torch.randn(1, h, total, width, dtype=torch.float64) for h in (4, 2, 2))
    output = attention._varlen(q, k, v, Spans.of(GROUPS, "cpu", torch.float64), scale)
    attention._varlen_arguments.cache_clear()
    torch.testing.assert_close(output, dense(q, k, v, scale=width**-0.5 if scale is None else scale))


def test_groups_without_a_second_completion() -> None:
    spans = Spans.of([(3, (2,)), (1, ())], "cpu", torch.float32)
    x = torch.randn(1, 2, 6, 8)
    output, _ = span_attention(None, x, x, x, None, spans=spans)
    assert torch.equal(output[0, -1], x[0, :, -1])  # the lone token sees itself alone
