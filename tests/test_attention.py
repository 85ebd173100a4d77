"""Span attention against a dense mask in float64: every token sees exactly what it should."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shared import attention
from shared.attention import ATTENTION_NAME, Group, Spans, aligned, span_attention
from shared.last_layer import skip_prompt_queries, skip_unread

GROUPS: list[Group] = [(5, (3, 1, 4)), (1, (2,)), (7, (1, 6)), (2, (5, 2, 2, 3))]
TOKENS = sum(prompt + sum(completions) for prompt, completions in GROUPS)
HEADS = 4
WIDTH = 16

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def visible(groups: list[Group], window: int | None = None) -> Tensor:
    """(T queries, T keys) booleans from the rule: causal, same group, and the key in the prompt or the same piece.

    With a window, the key is less than that far from the query in a row of the prompt and the completion alone.
    """
    group_of_token = []
    piece_of_token = []
    place_of_token: list[int] = []
    for group, (prompt, completions) in enumerate(groups):
        for piece, length in enumerate((prompt, *completions)):
            start = 0 if piece == 0 else prompt
            group_of_token += [group] * length
            piece_of_token += [piece] * length
            place_of_token += range(start, start + length)

    group = torch.tensor(group_of_token)
    piece = torch.tensor(piece_of_token)
    place = torch.tensor(place_of_token)
    token = torch.arange(len(group))
    causal = token <= token[:, None]
    same_group = group == group[:, None]
    same_piece = piece == piece[:, None]
    in_prompt = piece == 0
    in_window = place[:, None] - place < (window or len(group))
    return causal & same_group & (in_prompt | same_piece) & in_window


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Attention over GROUPS as one softmax over all keys, the invisible ones masked."""
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, 1)
    value = value.repeat_interleave(queries_per_key, 1)
    invisible = ~visible(GROUPS, window)
    scores = query @ key.mT * scale
    scores = scores.masked_fill(invisible, float("-inf"))
    output = scores.softmax(-1) @ value
    return output.transpose(1, 2)


def random_inputs(kv_heads: int, width: int = WIDTH, value_width: int | None = None) -> list[Tensor]:
    """Query, key and value of GROUPS in float64."""
    query = torch.randn(1, HEADS, TOKENS, width, dtype=torch.float64)
    key = torch.randn(1, kv_heads, TOKENS, width, dtype=torch.float64)
    value = torch.randn(1, kv_heads, TOKENS, value_width or width, dtype=torch.float64)
    return [query, key, value]


def skipped_outputs(spans: Spans) -> Tensor:
    """(T,) booleans: the outputs that are not needed."""
    skipped = []
    for (prompt, completions), queries in zip(spans.groups, spans.skipped, strict=True):
        token = torch.arange(prompt + sum(completions))
        skipped.append(token < queries)
    return torch.cat(skipped)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Up to the rounding of a dtype, relative to the norm of the whole tensor."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    if actual.is_cuda and dtype == torch.float32:
        tolerance = 1e-5  # products of three parts in TF32, and a fast exponential
    error = actual.cpu().double() - expected
    assert error.norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads, window", [(4, None), (2, None), (4, 2), (2, 3), (2, 6), (2, 9), (2, 50)])
@pytest.mark.parametrize("skipping", [False, True])
def test_span_attention_and_its_gradients(
    device: str, dtype: torch.dtype, kv_heads: int, window: int | None, skipping: bool
) -> None:
    """With `skipping`, the outputs of long prompts are left out, and no gradient comes through them."""
    torch.manual_seed(0)
    spans = Spans.of(GROUPS, device, dtype)
    if skipping:
        spans = skip_prompt_queries(spans)
    skipped = skipped_outputs(spans)
    inputs = [x.to(dtype) for x in random_inputs(kv_heads)]
    output_grad = torch.randn(1, TOKENS, HEADS, WIDTH, dtype=torch.float64)
    output_grad[:, skipped] = 0

    exact_inputs = [x.double().requires_grad_() for x in inputs]
    expected = dense_attention(*exact_inputs, 0.3, window)
    expected_grads = torch.autograd.grad(expected, exact_inputs, output_grad)

    inputs = [x.to(device).requires_grad_() for x in inputs]
    query, key, value = inputs
    output, _ = span_attention(None, query, key, value, None, spans=spans, scaling=0.3, sliding_window=window)
    grads = torch.autograd.grad(output, inputs, output_grad.to(device, dtype))

    assert_close(output[:, ~skipped], expected[:, ~skipped], dtype)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype)
    if device == "cpu":
        is_zero = (output == 0).all(-1).all(-1)[0]
        assert torch.equal(is_zero, skipped)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_begin_where_a_kernel_reads(device: str) -> None:
    """Slices of a mask 16 numbers wide, one of them a single row, which passes for contiguous."""
    spans = Spans.of([(11, (5, 5)), (4, (2, 3)), (4, (2, 1))], device, torch.float32)
    whole = spans.mask(11, 5)
    for before, queries in ((11, 5), (4, 3), (4, 1), (10, 1)):
        mask = spans.mask(before, queries)
        expected = whole[:queries, 11 - before : 11 + queries]
        assert torch.equal(mask, expected)
        for copy in (aligned(mask), mask if mask.is_cuda else aligned(expected)):
            assert torch.equal(copy, expected)
            assert copy.storage_offset() == 0
            assert copy.stride() == (before + queries, 1)
            assert copy.data_ptr() % 16 == 0


def test_prompts_longer_than_their_first_completion_are_left_out() -> None:
    """All of their tokens but the last, which predicts the completions."""
    spans = Spans.of(GROUPS, "cpu", torch.float32)
    assert spans.skipped == [0, 0, 0, 0]
    assert skip_prompt_queries(spans).skipped == [4, 0, 6, 0]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_values_of_another_width(window: int | None) -> None:
    """As those of latent attention."""
    spans = skip_prompt_queries(Spans.of(GROUPS, "cpu", torch.float64))
    inputs = random_inputs(kv_heads=4, width=16, value_width=12)
    output, _ = span_attention(None, *inputs, None, spans=spans, scaling=0.3, sliding_window=window)
    expected = dense_attention(*inputs, 0.3, window)
    skipped = skipped_outputs(spans)
    torch.testing.assert_close(output[:, ~skipped], expected[:, ~skipped])


@pytest.mark.parametrize(
    "argument, meaning",
    [("softcap", "soft caps on its scores"), ("s_aux", "sinks"), ("position_bias", "position biases")],
)
def test_what_attention_does_not_compute_is_refused(argument: str, meaning: str) -> None:
    x = torch.randn(1, 2, TOKENS, 8)
    spans = Spans.of(GROUPS, "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"its attention has {meaning}"):
        span_attention(None, x, x, x, None, spans=spans, **{argument: torch.tensor(1.0)})
    with pytest.raises(ValueError, match="its layers do not tell"):
        span_attention(None, x, x, x, None)


def test_groups_without_a_second_completion() -> None:
    spans = Spans.of([(3, (2,)), (1, ())], "cpu", torch.float32)
    x = torch.randn(1, 2, 6, 8)
    output, _ = span_attention(None, x, x, x, None, spans=spans)
    sees_only_itself = x[0, :, -1]
    assert torch.equal(output[0, -1], sees_only_itself)


# ---------------------------------------------------------------- the last layer


def tiny_model() -> torch.nn.Module:
    """A Llama of two layers without a head, which attends in spans."""
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    AttentionInterface.register(ATTENTION_NAME, span_attention)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation=ATTENTION_NAME,
    )
    return LlamaModel(config)


def test_the_last_layer_computes_what_is_read() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    read_positions = torch.tensor([4, 5, 6, 9, 11, 22])
    arguments = {
        "input_ids": torch.randint(50, (1, TOKENS)),
        "position_ids": torch.arange(TOKENS)[None],
        "spans": Spans.of(GROUPS, "cpu", torch.float32),
        "use_cache": False,
    }
    everything = model(**arguments).last_hidden_state

    skip_unread(model.layers[-1])
    computed = []

    def note_length(module: torch.nn.Module, args: tuple) -> None:
        computed.append(args[0].shape[1])

    for layer in model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(note_length)

    states = model(**arguments, read_positions=read_positions).last_hidden_state
    assert computed == [TOKENS, len(read_positions)]
    torch.testing.assert_close(states[:, read_positions], everything[:, read_positions])

    computed.clear()
    states = model(**arguments).last_hidden_state
    assert computed == [TOKENS, TOKENS]
    assert torch.equal(states, everything)


# ---------------------------------------------------------------- the variable-length kernel, without a GPU


def segment_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size) -> Tensor:
    """As the kernel is documented: each query range against its key range, causal from the bottom-right corner.

    `window_size` holds how many keys before and after a query's own one it sees, -1 for all.
    """
    before, after = window_size
    width = q.shape[-1]
    assert width % 8 == 0, "the kernel takes no other width"
    assert v.shape[-1] == width, "the kernel takes one width"
    assert after == 0
    if scale is None:
        scale = width**-0.5
    queries_per_key = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(queries_per_key, 1)
    v = v.repeat_interleave(queries_per_key, 1)

    outputs = []
    for segment in range(len(cu_q) - 1):
        q_start, q_end = cu_q[segment : segment + 2].tolist()
        k_start, k_end = cu_k[segment : segment + 2].tolist()
        query_count = q_end - q_start
        key_count = k_end - k_start
        assert query_count <= max_q
        assert key_count <= max_k

        keys = k[k_start:k_end]
        values = v[k_start:k_end]
        seen = torch.ones(query_count, key_count).tril(key_count - query_count)
        if before >= 0:
            seen = seen.triu(key_count - query_count - before)
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], keys) * scale
        weights = scores.masked_fill(seen == 0, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def torch_2_11(*segments, scale=None, window_size=(-1, -1)) -> Tensor:
    return segment_attention(*segments, scale, window_size)


def torch_2_12(*segments, scale=None, window_size=(-1, -1), enable_gqa=False) -> Tensor:
    assert enable_gqa
    return segment_attention(*segments, scale, window_size)


@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_12])
@pytest.mark.parametrize("width, value_width", [(16, 16), (12, 12), (16, 8), (16, 12), (8, 16)])
@pytest.mark.parametrize("scale, window", [(0.3, None), (None, None), (0.3, 1), (0.3, 4), (None, 7)])
def test_the_gpu_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Callable,
    width: int,
    value_width: int,
    scale: float | None,
    window: int | None,
) -> None:
    """The arguments of the one variable-length call describe the same attention, in each version of PyTorch."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    inputs = random_inputs(2, width, value_width)
    spans = Spans.of(GROUPS, "cpu", torch.float64)

    attention._parameters_of_kernel.cache_clear()
    output = attention._variable_length(*inputs, spans, scale, window)
    attention._parameters_of_kernel.cache_clear()

    expected_scale = scale
    if scale is None:
        expected_scale = width**-0.5
    torch.testing.assert_close(output, dense_attention(*inputs, expected_scale, window))
