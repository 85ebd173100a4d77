"""Exact attention over packed rows in which K completions share one stored prompt.

A packed row (1, T) is a chain of groups without padding. Each group is laid out [prompt, completion 1, ...,
completion K]. A token sees the prompt of its own group and its own completion up to itself, and nothing else:

                   keys:    prompt   completion 1   completion 2
    queries: prompt           ◣
             completion 1     ■           ◣
             completion 2     ■                          ◣            ■ all, ◣ causal, blank none

The row is computed in segments. Each has a range of queries and a range of keys, and is causal from the bottom-right
corner of that rectangle. A group with a prompt of P tokens and completions of C_1, ..., C_K tokens has K segments:

    prompt and completion 1    P + C_1 queries    P + C_1 keys
    completion k > 1           C_k queries        P + C_k keys (the prompt's keys again, then the completion's)

In half precision on a GPU, all segments are one call of a variable-length flash kernel. Otherwise each segment is one
call of PyTorch's scaled_dot_product_attention.
"""

import inspect
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_NAME = "spans"  # under which transformers knows `span_attention`

Group = tuple[int, tuple[int, ...]]  # the tokens of the prompt, at least 1, and of each completion


@dataclass
class Spans:
    """Which tokens of a packed row see each other, as groups and as the segments of the variable-length kernel."""

    groups: list[Group]
    skipped: list[int]  # per group, the number of its first queries whose outputs are not needed and may be anything
    query_lengths: list[int]  # per segment, in the order of the row
    cu_queries: Tensor  # (segments + 1,) int32, cumulative query lengths
    cu_keys: Tensor  # (segments + 1,) int32, cumulative key lengths
    max_queries: int
    max_keys: int
    key_index: Tensor  # (sum of key lengths,) positions in the row; a prompt's are there once per completion
    dtype: torch.dtype  # of the attention mask

    @classmethod
    def of(cls, groups: list[Group], device: torch.device | str, dtype: torch.dtype) -> "Spans":
        """Lay out the segments of a packed row, once for all layers."""
        query_lengths = []
        key_lengths = []
        key_positions = []
        start = 0
        for prompt, completions in groups:
            lengths = completions or (0,)
            query_lengths += [prompt + lengths[0], *lengths[1:]]

            prompt_positions = torch.arange(start, start + prompt)
            start += prompt
            for length in lengths:
                key_lengths.append(prompt + length)
                key_positions.append(prompt_positions)
                key_positions.append(torch.arange(start, start + length))
                start += length

        return cls(
            groups=groups,
            skipped=[0] * len(groups),
            query_lengths=query_lengths,
            cu_queries=_cumulative(query_lengths).to(device, non_blocking=True),
            cu_keys=_cumulative(key_lengths).to(device, non_blocking=True),
            max_queries=max(query_lengths),
            max_keys=max(key_lengths),
            key_index=torch.cat(key_positions).to(device, non_blocking=True),
            dtype=dtype,
        )

    def mask(self, before: int, queries: int) -> Tensor:
        """(queries, before + queries), additive: each query sees `before` keys, and then up to its own key."""
        largest = self._largest_mask
        most_before = largest.shape[1] - largest.shape[0]
        mask = largest[:queries, most_before - before : most_before + queries]
        if mask.is_cuda:
            # a kernel reads 16 bytes at a time, and fails on a slice that does not start at a multiple of them
            mask = mask.contiguous()
        return mask

    @cached_property
    def _largest_mask(self) -> Tensor:
        """The largest mask of this row; every other one is a slice of it."""
        most_before = 0
        most_queries = 0
        for (prompt, completions), skipped in zip(self.groups, self.skipped, strict=True):
            for length in completions[1:]:
                most_before = max(most_before, prompt)
                most_queries = max(most_queries, length)
            if skipped:
                most_before = max(most_before, skipped)
                most_queries = max(most_queries, prompt + sum(completions[:1]) - skipped)

        shape = (most_queries, most_before + most_queries)
        nothing_visible = torch.full(shape, float("-inf"), dtype=self.dtype, device=self.key_index.device)
        return nothing_visible.triu(most_before + 1)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def span_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Spans,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers' `AttentionInterface`, which passes more arguments than are used.

    query (1, H, T, D), key and value (1, H_kv, T, D) → (1, T, H, D).
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _variable_length(query, key, value, spans, scaling), None
    return _per_segment(query, key, value, spans, scaling), None


def _per_segment(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None) -> Tensor:
    grouped_heads = query.shape[1] != key.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=grouped_heads)

    # split() rather than slices, because the backward pass of a slice fills a zero tensor of the whole row's size
    queries = query.split(spans.query_lengths, 2)
    keys = key.split(spans.query_lengths, 2)
    values = value.split(spans.query_lengths, 2)
    segments = zip(queries, keys, values, strict=True)

    outputs = []
    for (prompt, completions), skipped in zip(spans.groups, spans.skipped, strict=True):
        q, k, v = next(segments)
        if skipped:
            batch, heads, length, width = q.shape
            outputs.append(q.new_zeros(batch, heads, skipped, width))
            mask = spans.mask(skipped, length - skipped)
            outputs.append(attend(q[:, :, skipped:], k, v, attn_mask=mask))
        else:
            outputs.append(attend(q, k, v, is_causal=True))

        prompt_k = k[:, :, :prompt]
        prompt_v = v[:, :, :prompt]
        for length in completions[1:]:
            q, k, v = next(segments)
            k = torch.cat([prompt_k, k], 2)
            v = torch.cat([prompt_v, v], 2)
            mask = spans.mask(prompt, length)
            outputs.append(attend(q, k, v, attn_mask=mask))
    return torch.cat(outputs, 2).transpose(1, 2)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q = query[0].transpose(0, 1)  # (T, H, D)
    k = key[0].transpose(0, 1)
    v = value[0].transpose(0, 1)

    width = q.shape[2]
    missing = -width % 8
    if missing:  # the kernel needs a multiple of 8, and zeros change no product
        q = F.pad(q, (0, missing))
        k = F.pad(k, (0, missing))
        v = F.pad(v, (0, missing))
        if scale is None:
            scale = width**-0.5

    options = _kernel_options()
    queries_per_key = q.shape[1] // k.shape[1]
    if queries_per_key > 1 and "enable_gqa" not in options:
        k = k.repeat_interleave(queries_per_key, 1)
        v = v.repeat_interleave(queries_per_key, 1)
    k = k[spans.key_index]
    v = v[spans.key_index]

    output = varlen_attn(
        q.contiguous(),
        k,
        v,
        spans.cu_queries,
        spans.cu_keys,
        spans.max_queries,
        spans.max_keys,
        scale=scale,
        **options,
    )
    assert isinstance(output, Tensor), "the kernel returns a tuple only when it is asked for more than the output"
    return output[None, ..., :width]


@cache
def _kernel_options() -> dict[str, Any]:
    """`varlen_attn` has another flag for causal attention since torch 2.11, and knows grouped heads since 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" in parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return options
