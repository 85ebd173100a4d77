"""Kernels and deterministic operations one by one: each against float64 or against the CPU, and twice the same bits.

A probe takes a device, raises AssertionError where a result is wrong, and returns what is worth reading. On a CPU the
probes are a rehearsal, in float32.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared import logprobs
from shared.attention import Group, Spans, span_attention
from shared.distributed import ALLOCATOR_VARIABLES, all_sum, copied, from_main, shard, single_process
from shared.logprobs import token_logps

Probe = Callable[[torch.device], str]

# prompts and completions of a packed row; one prompt has no completion, as in a batch without groups
GROUPS: list[Group] = [
    (5, (3, 1, 4)),
    (1, (2,)),
    (70, (1, 6)),
    (2, (5, 2, 2, 3)),
    (1, ()),
    (130, (140, 9)),
    (9, (1, 1)),
]
NEGATIVE_INFINITY = float("-inf")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.float32


@contextmanager
def deterministic() -> Iterator[None]:
    """The settings of a training process on a GPU, see `shared.distributed`; the former ones at the end."""
    settings: Any = torch.utils.deterministic  # its types leave out what is set here
    former_mode = torch.are_deterministic_algorithms_enabled()
    former_filling = settings.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former_mode)
        settings.fill_uninitialized_memory = former_filling


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖, in float64 on the CPU."""
    expected = expected.detach().double().cpu()
    difference = value.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm())


def require_close(name: str, value: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error. Raises AssertionError if it is above the tolerance."""
    error = relative_error(value, expected)
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance}"
    return error


def require_same_bits(name: str, first: list[Tensor], second: list[Tensor]) -> None:
    """Raises AssertionError if two runs gave different numbers."""
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"


def shown(errors: list[float]) -> str:
    """Errors in one line."""
    return " ".join(f"{error:.1e}" for error in errors)


# ---------------------------------------------------------------- speed of the device


def rates(device: torch.device) -> str:
    """What a large matrix product and a copy reach: the limits of everything else."""
    if device.type != "cuda":
        return "no GPU"
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    x = torch.empty(2**30, device=device)
    flops = 2 * 8192**3 / median_seconds(lambda: a @ a)
    bytes_per_second = 8 * 2**30 / median_seconds(lambda: x.clone())
    speed = f"bf16 {flops / 1e12:.0f} TFLOP/s, copy {bytes_per_second / 1e12:.2f} TB/s"
    return f"{torch.cuda.get_device_name()}: {speed}, torch {torch.__version__}"


def median_seconds(run: Callable[[], object]) -> float:
    """Seconds of the device, the median of eight runs."""
    times = []
    for _ in range(8):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


# ---------------------------------------------------------------- attention


def visible_keys() -> Tensor:
    """(T, T): whether a query sees a key: one that is no later, of its group, and of the prompt or its own piece."""
    groups = []
    pieces = []
    for group, (prompt, completions) in enumerate(GROUPS):
        for piece, length in enumerate((prompt, *completions)):
            groups += length * [group]
            pieces += length * [piece]
    group_of = torch.tensor(groups)
    piece_of = torch.tensor(pieces)
    position = torch.arange(len(groups))

    is_causal = position[:, None] >= position
    same_group = group_of[:, None] == group_of
    same_piece = piece_of[:, None] == piece_of
    return is_causal & same_group & ((piece_of == 0) | same_piece)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(1, T, H, D): attention with a dense mask."""
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, 1)
    value = value.repeat_interleave(queries_per_key, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible_keys(), NEGATIVE_INFINITY).softmax(-1)
    return (weights @ value).transpose(1, 2)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """What the models call."""
    output, _ = span_attention(None, query, key, value, None, spans=spans)
    return output


def expanded_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """The same with a head of keys for each head of queries, as the kernel is documented to want it."""
    queries_per_key = query.shape[1] // key.shape[1]
    return packed_attention(
        query, key.repeat_interleave(queries_per_key, 1), value.repeat_interleave(queries_per_key, 1), spans
    )


def attention(
    device: torch.device,
    heads: int,
    kv_heads: int,
    width: int,
    attend: Callable[[Tensor, Tensor, Tensor, Spans], Tensor] = packed_attention,
) -> str:
    """Outputs and gradients of attention over a packed row, against a dense mask in float64."""
    dtype = compute_dtype(device)
    torch.manual_seed(0)
    total = sum(prompt + sum(completions) for prompt, completions in GROUPS)
    inputs = []
    for num_heads in (heads, kv_heads, kv_heads):
        exact = torch.randn(1, num_heads, total, width).to(dtype).double()
        inputs.append(exact.requires_grad_())
    output_weights = torch.randn(1, total, heads, width).to(dtype).double()

    output = dense_attention(*inputs)
    expected = [output, *torch.autograd.grad((output * output_weights).sum(), inputs)]

    def run() -> list[Tensor]:
        spans = Spans.of(GROUPS, device, dtype)
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        query, key, value = leaves
        output = attend(query, key, value, spans)
        loss = (output * output_weights.to(device, dtype)).sum()
        return [output.detach(), *torch.autograd.grad(loss, leaves)]

    results = run()
    require_same_bits("attention", results, run())
    tolerance = 1e-5
    if dtype == torch.bfloat16:
        tolerance = 1.5e-2
    errors = []
    for name, value, exact in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        errors.append(require_close(name, value, exact, tolerance))
    return shown(errors)


def misaligned_mask(device: torch.device) -> str:
    """float32 attention where a mask is a slice whose first number does not lie at a multiple of 16 bytes.

    It runs in a process of its own, because a misaligned address would end every later call of this one.
    """
    code = (
        "import torch\n"
        "from shared.attention import Spans, span_attention\n"
        f"device = {device.type!r}\n"
        "spans = Spans.of([(11, (5, 5)), (4, (2, 3)), (4, (2, 1))], device, torch.float32)\n"
        "q, k, v = (torch.randn(1, 4, 37, 64, device=device, requires_grad=True) for _ in range(3))\n"
        "output, _ = span_attention(None, q, k, v, None, spans)\n"
        "output.sum().backward()\n"
        "if device == 'cuda': torch.cuda.synchronize()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr.strip().splitlines()[-1]
    return "ok"


# ---------------------------------------------------------------- operations


def operations(device: torch.device) -> str:
    """What the project uses and deterministic mode computes in another way: as on the CPU, and twice the same."""
    torch.manual_seed(0)
    index = torch.randint(50, (300,))
    places = torch.randperm(300)[:120]  # each at most once
    x = torch.randn(300, 64)
    y = torch.randn(300, 64)
    table = x[:50]
    check = partial(check_operation, device)

    check("index", lambda t, i: t[i], table, index)
    check("index_select", lambda t, i: t[None].index_select(1, i), table, index)
    check("index_copy", lambda t, i: t.new_zeros(1, 300, 64).index_copy(1, i, t[None]), x[:120], places)
    check("index_add", lambda t, i: t.new_zeros(50).double().index_add(0, i, t[:, 0].double()), x, index)
    check("gather", lambda t, i: t.gather(-1, i[:, None]), x, index)
    check("scatter_add", lambda t, i: t.clone().scatter_add_(-1, i[:, None], t[:, :1]), x, index)
    check("embedding", lambda t, i: F.embedding(i[None], t), table, index)
    check("logcumsumexp", lambda t: t[:, :4].flip(1).logcumsumexp(1).flip(1), x, tolerance=1e-5)
    check("repeat_interleave", lambda t: t.repeat_interleave(3, 1), x)
    check("where", lambda t, u: torch.where(t > 0, u, t.mul(2)), x, y)
    return "ok"


def check_operation(
    device: torch.device, name: str, operation: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-6
) -> None:
    """Compare the result of an operation and its gradients on the CPU and, twice, on a device."""

    def run(place: torch.device) -> list[Tensor]:
        leaves = []
        for tensor in inputs:
            leaf = tensor.clone().to(place)
            leaves.append(leaf.requires_grad_(leaf.is_floating_point()))
        output = operation(*leaves)
        loss = output.double().square().sum()
        grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return [output.detach().cpu(), *(grad.cpu() for grad in grads)]

    results = run(device)
    for value, expected in zip(results, run(torch.device("cpu")), strict=True):
        require_close(name, value, expected, tolerance)
    require_same_bits(name, results, run(device))


def head(device: torch.device, tile: tuple[int, int] | None = None, rounded: bool = False) -> str:
    """Log-probs of tokens and their gradients, against a log-softmax in float64.

    tile: another shape of the tiles; rounded: products round their results to bfloat16, as on a device without others.
    """
    former_tiles = logprobs.TILE
    former_test = logprobs._has_float32_results
    if tile is not None:
        logprobs.TILE = {**former_tiles, device.type: tile}
    if rounded:
        logprobs._has_float32_results = lambda factor: False
    try:
        return check_head(device)
    finally:
        logprobs.TILE = former_tiles
        logprobs._has_float32_results = former_test


def check_head(device: torch.device) -> str:
    """`head`, with the settings that are in force."""
    dtype = compute_dtype(device)
    tokens, vocab_size, width = 300, 2_000, 64
    if device.type == "cuda":
        tokens, vocab_size, width = 8_700, 151_936, 896
    generator = torch.Generator().manual_seed(1)
    hidden = 0.5 * torch.randn(tokens, width, generator=generator)
    weight = 0.05 * torch.randn(vocab_size, width, generator=generator)
    hidden = hidden.to(dtype).to(device).requires_grad_()
    weight = weight.to(dtype).to(device).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
    logp_weights = torch.randn(tokens, generator=generator).to(device)

    def run() -> list[Tensor]:
        logps = token_logps(hidden, weight, None, targets)
        grads = torch.autograd.grad((logps * logp_weights).sum(), (hidden, weight))
        return [logps.detach(), *grads]

    results = run()
    require_same_bits("head", results, run())

    expected = exact_head(hidden, weight, targets, logp_weights)
    errors = []
    for name, value, exact in zip(("logps", "dh", "dw"), results, expected, strict=True):
        errors.append(require_close(name, value, exact, 2e-2))
    worst = float((results[0].double() - expected[0]).abs().max())
    text = f"errors {shown(errors)}, largest of a log-prob {worst:.3f}"
    if device.type != "cuda":
        return text

    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return f"{text}; {1e6 * min(seconds) / tokens:.2f} µs a token"


def exact_head(hidden: Tensor, weight: Tensor, targets: Tensor, logp_weights: Tensor) -> list[Tensor]:
    """Log-probs and the gradients of hidden states and weight in float64, some tokens at a time."""
    exact_weight = weight.detach().double().requires_grad_()
    logps = []
    hidden_grads = []
    weight_grad = torch.zeros_like(exact_weight)
    for tokens in torch.arange(len(hidden), device=hidden.device).split(1024):
        exact_hidden = hidden.detach()[tokens].double().requires_grad_()
        logits = exact_hidden @ exact_weight.T
        values = logits.gather(1, targets[tokens, None])[:, 0] - logits.logsumexp(1)
        weighted = (values * logp_weights[tokens]).sum()
        hidden_grad, grad = torch.autograd.grad(weighted, (exact_hidden, exact_weight))
        logps.append(values.detach())
        hidden_grads.append(hidden_grad)
        weight_grad += grad
    return [torch.cat(logps), torch.cat(hidden_grads), weight_grad]


def float32_products(device: torch.device) -> str:
    """float32 results of bfloat16 products: logits would not be rounded, nor cast by a pass of their own."""
    if device.type != "cuda":
        return "no GPU"
    a = torch.randn(512, 896, device=device, dtype=torch.bfloat16)
    b = torch.randn(896, 4096, device=device, dtype=torch.bfloat16)
    total = torch.zeros(512, 4096, device=device)
    expected = a.double() @ b.double()
    product = torch.mm(a, b, out_dtype=torch.float32)
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    errors = [require_close("mm", product, expected, 1e-5), require_close("addmm", total, expected, 1e-5)]
    return shown(errors)


# ---------------------------------------------------------------- the host beside the device


def keep_busy(device: torch.device) -> None:
    """Give the GPU a second of work, for which the host does not wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9)  # clock cycles


def pinned_copies(device: torch.device) -> str:
    """Micro-batches reach a busy device unchanged, and the host does not wait for it, as it would without pinning."""
    tensors = [torch.arange(2**20), torch.randn(2**18), torch.empty(0), torch.tensor([True, False])]
    keep_busy(device)
    started = time.perf_counter()
    copies = [copied(tensor, device) for tensor in tensors]
    seconds = time.perf_counter() - started
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy.cpu(), tensor), "a copy differs"
    assert seconds < 0.5, f"the host waited {seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms"


def threads_go_on(device: torch.device) -> str:
    """While a process waits for its device, other threads run: one of them names the ranks that are silent."""
    if device.type != "cuda":
        return "no GPU"
    x = torch.ones(1, device=device)
    ended = threading.Event()
    moments = []

    def note_time() -> None:
        while not ended.wait(0.01):
            moments.append(time.perf_counter())

    thread = threading.Thread(target=note_time)
    thread.start()
    keep_busy(device)
    started = time.perf_counter()
    x.add(1).tolist()
    seconds = time.perf_counter() - started
    ended.set()
    thread.join()
    meanwhile = sum(moment > started for moment in moments)
    assert meanwhile >= 10 * seconds, f"{meanwhile} times in {seconds:.2f} s"
    return f"{meanwhile} times in {seconds:.2f} s"


def extended_segments(device: torch.device) -> str:
    """A process group sets the allocator before the first tensor, unless the user has."""
    code = (
        "import torch\n"
        "from shared.distributed import join_processes\n"
        "device = join_processes('bfloat16', None).device\n"
        "x = torch.ones(2**22, device=device)\n"
        "segments = torch.cuda.memory_snapshot() if x.is_cuda else []\n"
        "assert all(segment['is_expandable'] for segment in segments), segments\n"
        "import os; os._exit(0)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr.strip().splitlines()[-1]
    return "ok"


# ---------------------------------------------------------------- a process group


def group_of_one(device: torch.device) -> str:
    """Collectives, FSDP2 and the optimizer with a process group of this process alone, as training sets them up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        tie_word_embeddings=True,
    )
    with single_process("bfloat16") as ranks:
        assert from_main({"a": 1}) == {"a": 1}
        assert float(all_sum(torch.ones(2, device=device, dtype=torch.double)).sum()) == 2
        assert float(all_sum(torch.ones(2)).sum()) == 2
        dist.barrier()

        lm = LlamaForCausalLM(config)
        sync = shard(lm, list(lm.model.layers), ranks, set(lm.modules()))
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(512, (2, 64), device=device)
        losses = []
        for _ in range(4):
            for is_last in (False, True):
                sync(is_last)
                loss = lm(input_ids=ids, labels=ids).loss / 2
                loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], losses
        assert torch.isfinite(grad_norm), grad_norm
        step = next(iter(optimizer.state.values()))["step"]
    return f"losses {losses}, step on {step.device}"


# ---------------------------------------------------------------- all of them

PROBES: dict[str, Probe] = {
    "attention 14 2 64": partial(attention, heads=14, kv_heads=2, width=64),
    "attention 12 2 128": partial(attention, heads=12, kv_heads=2, width=128),
    "attention 8 8 80": partial(attention, heads=8, kv_heads=8, width=80),
    "attention 4 4 12": partial(attention, heads=4, kv_heads=4, width=12),
    "attention 14 2 64, expanded": partial(attention, heads=14, kv_heads=2, width=64, attend=expanded_attention),
    "operations": operations,
    "head": head,
    "head, former tiles": partial(head, tile=(2**9, 2**18)),
    "head, rounded products": partial(head, rounded=True),
    "float32 products": float32_products,
    "pinned copies": pinned_copies,
    "threads": threads_go_on,
    "allocator": extended_segments,
    "group of one": group_of_one,
    "misaligned mask": misaligned_mask,
}
