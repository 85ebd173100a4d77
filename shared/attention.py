"""Exact attention over packed rows in which K completions share one stored prompt.

A packed row (1, T) is a chain of groups, each laid out [prompt, completion 1, ..., completion K] without padding.
A token sees the prompt of its own group and the earlier tokens of its own completion, and nothing else. As segments,
each with a query range and a key range, causal from the bottom-right corner:

    prompt + completion 1    queries P + C_1    keys P + C_1
    completion k > 1         queries C_k        keys P + C_k  (the prompt's keys once more, then its own)

In half precision on a GPU the whole list is one variable-length flash call; elsewhere it is one SDPA call per segment.

Nothing attends to the last layer's outputs, and few of them are read: none of a prompt but at its last token. So that
layer computes its keys and values everywhere, and the rest only where it is read.
"""

import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "spans"


@dataclass
class Spans:
    """Who sees whom in a packed row: for each group, the prompt's length P >= 1 and the completions' lengths C_k."""

    groups: list[tuple[int, tuple[int, ...]]]
    length: int  # T, of the row
    dtype: torch.dtype  # of the mask
    key_index: Tensor  # (sum of key lengths,) positions in the row, the prompt's once per completion
    cu_queries: Tensor  # (segments + 1,) int32, cumulative query lengths
    cu_keys: Tensor  # (segments + 1,) int32
    max_queries: int
    max_keys: int
    read: Tensor | None = None  # (R,) positions whose last hidden state is read, each once; set in the forward pass

    @classmethod
    def of(cls, groups: list[tuple[int, tuple[int, ...]]], device: torch.device | str, dtype: torch.dtype) -> "Spans":
        """Build what the kernel of this device and dtype needs, once per batch, for all layers."""
        starts = accumulate((p + sum(cs) for p, cs in groups), initial=0)
        queries, keys, index = [], [], []
        for start, (p, cs) in zip(starts, groups, strict=False):
            for k, c in enumerate(cs or (0,)):
                queries.append(c if k else p + c)
                keys.append(p + c)
                own = start + p + sum(cs[:k])
                index += [torch.arange(start, start + p), torch.arange(own, own + c)]
        return cls(
            groups=groups,
            length=sum(queries),
            dtype=dtype,
            key_index=torch.cat(index).to(device, non_blocking=True),
            cu_queries=_cumulative(queries).to(device, non_blocking=True),
            cu_keys=_cumulative(keys).to(device, non_blocking=True),
            max_queries=max(queries),
            max_keys=max(keys),
        )

    @cached_property
    def _mask(self) -> Tensor:
        """(C, P + C), additive, for the largest numbers of queries and of keys before them that `mask` is asked for."""
        needed = [(p, c) for p, cs in self.groups for c in cs[1:]]
        needed += [(p, 1 + cs[0]) for p, cs in self.groups if prompt_is_long(p, cs)]
        p, c = (max(column) for column in zip(*needed, strict=True))
        shape, device = (c, p + c), self.key_index.device
        return torch.full(shape, float("-inf"), dtype=self.dtype, device=device).triu(p + 1)

    def mask(self, p: int, c: int) -> Tensor:
        """(c, p + c): each of c queries sees p keys before the first of them, and up to its own."""
        widest = self._mask.shape[1] - self._mask.shape[0]
        return self._mask[:c, widest - p : widest + c]


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def prompt_is_long(p: int, completions: tuple[int, ...]) -> bool:
    """Whether the first completion's queries alone, behind a mask, cost less than a causal call with the prompt's."""
    return bool(completions) and p > completions[0]


def skip_unread(last: nn.Module) -> None:
    """Let the last layer's queries, output projection and MLP be computed at `Spans.read` only, elsewhere be 0."""
    spans = None  # a stock forward pass has none

    def enter(module, args, options):
        nonlocal spans
        spans = options.get("spans")
        return args, options | {"last": True} if spans else options

    def gather(module, args):
        return args if spans is None else (args[0].index_select(1, spans.read), *args[1:])

    def scatter(module, args, output):
        if spans is not None:
            whole = output.new_zeros(1, spans.length, output.shape[-1])
            return whole.index_copy(1, spans.read, output)

    last.register_forward_pre_hook(enter, with_kwargs=True)
    for name, part in last.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "o_proj", "mlp"):
            part.register_forward_pre_hook(gather)
            part.register_forward_hook(scatter)


def span_attention(
    module, query, key, value, attention_mask, spans: Spans, scaling=None, last=False, **_
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' `AttentionInterface` calls.

    query (1, H, T, D), key and value (1, H_kv, T, D) → (1, T, H, D). last: where a long prompt's outputs, but its last
    one, may be 0.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, spans, scaling), None
    return _per_segment(query, key, value, spans, scaling, last), None


def _per_segment(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None, last: bool) -> Tensor:
    def attend(q, k, v, **visible):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **visible)

    grouped = query.shape[1] != key.shape[1]
    # split() rather than slices: the backward of a slice fills a zero tensor of the whole row's size
    lengths = [n for p, cs in spans.groups for n in (p + sum(cs[:1]), *cs[1:])]
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = []
    for p, cs in spans.groups:
        q, k, v = next(pieces)
        if last and prompt_is_long(p, cs):
            outputs.append(q.new_zeros(*q.shape[:2], p - 1, q.shape[3]))
            outputs.append(attend(q[:, :, p - 1 :], k, v, attn_mask=spans.mask(p - 1, 1 + cs[0])))
        else:
            outputs.append(attend(q, k, v, is_causal=True))
        prompt_k, prompt_v = k[:, :, :p], v[:, :, :p]
        for c in cs[1:]:
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
            outputs.append(attend(q, k, v, attn_mask=spans.mask(p, c)))
    return torch.cat(outputs, 2).transpose(1, 2)


@cache
def _varlen_arguments() -> dict:
    """`torch.nn.attention.varlen` renamed its causal flag after torch 2.10 and learned grouped heads in 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _varlen(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    width = q.shape[2]
    if missing := -width % 8:  # the kernel takes multiples of 8; zeros change no product
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        scale = width**-0.5 if scale is None else scale
    arguments = _varlen_arguments()
    if q.shape[1] != k.shape[1] and "enable_gqa" not in arguments:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    k, v = k[spans.key_index], v[spans.key_index]
    lengths = (spans.cu_queries, spans.cu_keys, spans.max_queries, spans.max_keys)
    return varlen_attn(q.contiguous(), k, v, *lengths, scale=scale, **arguments)[None, ..., :width]
