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

A layer may have a window of W tokens: a token then sees only the last W of these keys, its own among them. The keys of
a segment are a prompt and one completion in their order, so the window reaches as far as in a row of these two alone.
Without the flash kernel, a segment longer than the window is computed in blocks of W queries.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.distributed import copied

ATTENTION_NAME = "spans"  # under which transformers knows `span_attention`
NOT_COMPUTED = {  # arguments of transformers that change what attention computes
    "softcap": "soft caps on its scores",
    "s_aux": "sinks",
    "position_bias": "position biases",
}

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
    key_places: Tensor  # (K, T), where in key_index each position stands, -1 where it stands less than K times
    dtype: torch.dtype  # of the attention mask
    largest_masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)  # by window, made when needed

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

        key_index = torch.cat(key_positions)
        return cls(
            groups=groups,
            skipped=[0] * len(groups),
            query_lengths=query_lengths,
            cu_queries=copied(_cumulative(query_lengths), device),
            cu_keys=copied(_cumulative(key_lengths), device),
            max_queries=max(query_lengths),
            max_keys=max(key_lengths),
            key_index=copied(key_index, device),
            key_places=copied(_places(key_index), device),
            dtype=dtype,
        )

    def mask(self, before: int, queries: int, window: int | None = None) -> Tensor:
        """(queries, before + queries), additive: each query sees `before` keys, and then up to its own key.

        Of these it sees the last `window`, if there is a window.
        """
        if window not in self.largest_masks:
            self.largest_masks[window] = self._largest_mask(window)
        largest = self.largest_masks[window]
        most_before = largest.shape[1] - largest.shape[0]
        mask = largest[:queries, most_before - before : most_before + queries]
        if mask.is_cuda:
            mask = aligned(mask)
        return mask

    def _largest_mask(self, window: int | None) -> Tensor:
        """The largest mask of this row with that window; every other one is a slice of it."""
        most_before = 0
        most_queries = 0
        if window is not None:
            most_before = min(window - 1, self.max_keys)
            most_queries = min(window, self.max_queries)
        for (prompt, completions), skipped in zip(self.groups, self.skipped, strict=True):
            for length in completions[1:]:
                most_before = max(most_before, prompt)
                most_queries = max(most_queries, length)
            if skipped:
                most_before = max(most_before, skipped)
                most_queries = max(most_queries, prompt + sum(completions[:1]) - skipped)

        shape = (most_queries, most_before + most_queries)
        nothing_visible = torch.full(shape, float("-inf"), dtype=self.dtype, device=self.key_index.device)
        mask = nothing_visible.triu(most_before + 1)
        if window is not None:
            mask += nothing_visible.tril(most_before - window)
        return mask


def aligned(mask: Tensor) -> Tensor:
    """A copy of a slice at the start of its own memory.

    A GPU's kernel reads 16 bytes at a time, and fails on a slice that does not start at a multiple of them.
    `contiguous` would return a slice of one row as it is.
    """
    return mask.clone(memory_format=torch.contiguous_format)


def _places(index: Tensor) -> Tensor:
    """(K, T): the places where an index (N,) has each of T values, one after another; -1 for values with fewer."""
    order = index.argsort(stable=True)
    counts = index.bincount()
    starts = counts.cumsum(0) - counts
    places = torch.full((int(counts.max()), len(counts)), -1)
    for k in range(len(places)):
        has_place = counts > k
        places[k, has_place] = order[starts[has_place] + k]
    return places


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def span_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Spans | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers' `AttentionInterface`, which passes more arguments than are used.

    query (1, H, T, D), key (1, H_kv, T, D) and value (1, H_kv, T, D') → (1, T, H, D'). A token sees the last
    `sliding_window` tokens, itself among them, of those that it would see without a window. Raises ValueError if the
    layer wants something else of its attention.
    """
    for name, meaning in NOT_COMPUTED.items():
        if others.get(name) is not None:
            raise ValueError(f"its attention has {meaning}")
    if spans is None:
        raise ValueError("its layers do not tell its attention which tokens see each other")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _variable_length(query, key, value, spans, scaling, sliding_window), None
    return _per_segment(query, key, value, spans, scaling, sliding_window), None


def _per_segment(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None, window: int | None
) -> Tensor:
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
            batch, heads, _, _ = q.shape
            outputs.append(q.new_zeros(batch, heads, skipped, v.shape[-1]))
            q = q[:, :, skipped:]
        outputs += _in_blocks(attend, q, k, v, spans, window)

        prompt_k = k[:, :, :prompt]
        prompt_v = v[:, :, :prompt]
        for _ in completions[1:]:
            q, k, v = next(segments)
            k = torch.cat([prompt_k, k], 2)
            v = torch.cat([prompt_v, v], 2)
            outputs += _in_blocks(attend, q, k, v, spans, window)
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _in_blocks(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None
) -> Iterator[Tensor]:
    """The outputs of one segment, whose queries are those of its last keys: all at once, or in blocks of a window."""
    queries = q.shape[2]
    before = k.shape[2] - queries
    if window is None or k.shape[2] <= window:
        if before:
            yield attend(q, k, v, attn_mask=spans.mask(before, queries))
        else:
            yield attend(q, k, v, is_causal=True)
        return

    for start in range(0, queries, window):
        end = min(start + window, queries)
        first_key = max(0, before + start - window + 1)
        visible = slice(first_key, before + end)
        mask = spans.mask(before + start - first_key, end - start, window)
        yield attend(q[:, :, start:end], k[:, :, visible], v[:, :, visible], attn_mask=mask)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q = query[0].transpose(0, 1)  # (T, H, D)
    k = key[0].transpose(0, 1)
    v = value[0].transpose(0, 1)

    width = q.shape[2]
    value_width = v.shape[2]
    kernel_width = max(width, value_width)
    kernel_width += -kernel_width % 8  # the kernel needs one width, a multiple of 8, and zeros change no product
    if kernel_width > min(width, value_width):
        q = F.pad(q, (0, kernel_width - width))
        k = F.pad(k, (0, kernel_width - width))
        v = F.pad(v, (0, kernel_width - value_width))
        if scale is None:
            scale = width**-0.5

    if window is None:
        window_size = (-1, 0)
    else:
        window_size = (window - 1, 0)  # the tokens before a query's own, and those after it

    options: dict[str, Any] = {}
    if _has_flag_for_grouped_heads():
        options["enable_gqa"] = True
    k = _Gathered.apply(k, spans.key_index, spans.key_places)
    v = _Gathered.apply(v, spans.key_index, spans.key_places)

    output = varlen_attn(
        q.contiguous(),
        k,
        v,
        spans.cu_queries,
        spans.cu_keys,
        spans.max_queries,
        spans.max_keys,
        scale=scale,
        window_size=window_size,
        **options,
    )
    assert isinstance(output, Tensor), "the kernel returns a tuple only when it is asked for more than the output"
    return output[None, ..., :value_width]


class _Gathered(torch.autograd.Function):
    """x[index]. The backward pass of indexing would sort the index in every layer. This one gathers from its places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        x_grad = grad[places[0]]
        for others in places[1:]:
            has_place = (others >= 0)[:, None, None]
            x_grad = x_grad + torch.where(has_place, grad[others.clamp(0)], 0)
        return x_grad, None, None


@torch.compiler.assume_constant_result
def _has_flag_for_grouped_heads() -> bool:
    """Whether `varlen_attn` must be told of fewer heads of keys than of queries. That of torch 2.11 takes them so."""
    return "enable_gqa" in _parameters_of_kernel()


@cache
def _parameters_of_kernel() -> list[str]:
    from torch.nn.attention.varlen import varlen_attn

    return list(inspect.signature(varlen_attn).parameters)
