"""What is measured: an algorithm's own file, TRL's trainer, a plain loop, a matrix product, and saving a checkpoint.

Each is a function of a Spec that imports what it needs, and returns the job whose time counts.
"""

import importlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from algos.dpo import dpo_loss
from scripts.lab.machine import resident_bytes
from shared import checkpoint
from shared.batches import Batches, balance
from shared.distributed import Ranks, inference, join_processes, single_process
from shared.groups import Groups, Requires, load_groups
from shared.loading import load_generator, load_policy_from, load_tokenizer
from shared.logprobs import sum_over_completions, token_logps
from shared.model import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# of all contenders: the algorithms' defaults
BETA = 0.1
MAX_GRAD_NORM = 1.0

# options of the algorithms that are not at their defaults
OPTIONS: dict[str, dict] = {"exo": {"beta_r": 0.1}}

# the plain loop, and what it takes up one after another
LADDER = (
    "plain loop",
    "+ reference once",
    "+ fused AdamW",
    "+ head on completion tokens",
    "+ packing",
    "+ last layer only where it is read",
)

Losses = list[tuple[float, float]]  # loss and gradient norm of every step
Chunks = list[Tensor]  # a step's forward passes: the groups (B,) of each


@dataclass(kw_only=True)
class Spec:
    """What one measured process does. It crosses the process boundary as JSON."""

    job: Literal["ours", "trl", "naive", "peak", "saving"] = "ours"
    model: str
    train_data: str
    output_dir: str = ""
    algorithm: str = "dpo"
    options: dict = field(default_factory=dict)  # more arguments of the algorithm
    batch_size: int
    micro_batch_tokens: int
    learning_rate: float
    dtype: str = "float32"
    live_reference: bool = False  # the reference runs in every step, not once
    pairs_per_pass: int | None = None  # of contenders that pad
    liger: bool = False  # TRL with Liger's kernels
    tricks: int = 0  # how many of LADDER the plain loop has taken up


Job = Callable[[], Any]


# ---------------------------------------------------------------- ours


def load_algorithm(spec: Spec) -> tuple[ModuleType, Any]:
    """An algorithm's module and its Args, with rows in the file's order and a line of log for every step."""
    module = importlib.import_module(f"algos.{spec.algorithm}")
    options = {**OPTIONS.get(spec.algorithm, {}), **spec.options}
    args = module.Args(
        model=spec.model,
        train_data=spec.train_data,
        output_dir=spec.output_dir,
        batch_size=spec.batch_size,
        micro_batch_tokens=spec.micro_batch_tokens,
        learning_rate=spec.learning_rate,
        dtype=spec.dtype,
        lr_schedule="constant",
        shuffle=False,
        log_every=1,
        save_every=0,
        **options,
    )
    return module, args


def ours(spec: Spec) -> Job:
    """The algorithm's own file."""
    module, args = load_algorithm(spec)

    def train() -> Losses:
        module.main(args)
        log = Path(args.output_dir) / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    return train


# ---------------------------------------------------------------- TRL


def trl(spec: Spec) -> Job:
    """TRL's DPOTrainer. Its reference is a second model, or its log-probs are computed first."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_flash_attn_2_available
    from trl import DPOConfig, DPOTrainer

    assert spec.pairs_per_pass is not None
    on_gpu = torch.cuda.is_available()
    attention = "sdpa"
    if on_gpu and is_flash_attn_2_available():
        attention = "flash_attention_2"
    config = DPOConfig(
        spec.output_dir,
        # the same training as ours
        beta=BETA,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=spec.pairs_per_pass,
        gradient_accumulation_steps=spec.batch_size // spec.pairs_per_pass,
        max_length=None,
        bf16=spec.dtype == "bfloat16",
        # what makes it fast
        gradient_checkpointing=False,
        precompute_ref_log_probs=not spec.live_reference,
        use_liger_kernel=spec.liger,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        # no work that ours does not do
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def load_model() -> "PreTrainedModel":
        return AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32, attn_implementation=attention)

    def train() -> Losses:
        rows = []
        for line in Path(spec.train_data).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
        dataset = Dataset.from_list(rows)

        tokenizer = AutoTokenizer.from_pretrained(spec.model)
        reference = None
        if spec.live_reference:
            reference = load_model()
        trainer = DPOTrainer(load_model(), reference, config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]

    return train


# ---------------------------------------------------------------- the plain loop


class Pairs(Protocol):
    """Pairs of token ids, in forward passes, as a plain loop feeds them to a model."""

    steps: list[Chunks]

    def logps(self, model: nn.Module, rows: Tensor) -> Tensor:
        """(B, 2): log π(y|x) of the chosen and rejected completions of groups `rows` (B,)."""
        ...


class PaddedPairs:
    """Every completion is a padded row, behind a copy of its prompt, and each forward pass has equally many pairs."""

    groups: Groups
    ranks: Ranks
    head_on_completions: bool
    steps: list[Chunks]

    def __init__(self, groups: Groups, spec: Spec, ranks: Ranks, head_on_completions: bool):
        assert spec.pairs_per_pass is not None
        self.groups = groups
        self.ranks = ranks
        self.head_on_completions = head_on_completions
        self.steps = []
        for rows in torch.arange(len(groups)).split(spec.batch_size):
            self.steps.append(list(rows.split(spec.pairs_per_pass)))

    def logps(self, model: Any, rows: Tensor) -> Tensor:
        """(B, 2): the log-probs of all chosen completions and then of all rejected ones, in one forward pass."""
        ids, completion_starts, ends = self.pad(rows)
        position = torch.arange(ids.shape[1], device=self.ranks.device)
        mask = position < ends[:, None]
        is_completion = (mask & (position >= completion_starts[:, None]))[:, 1:]
        targets = ids[:, 1:]

        mixed_precision = self.ranks.dtype != torch.float32
        with torch.autocast(self.ranks.device.type, self.ranks.dtype, enabled=mixed_precision):
            if self.head_on_completions:
                head = model.get_output_embeddings()
                states = model.base_model(ids, mask.long(), use_cache=False).last_hidden_state
                predictors = states[:, :-1][is_completion].float()
                values = token_logps(predictors, head.weight, head.bias, targets[is_completion])
                return sum_over_completions(values, (ends - completion_starts).view(2, -1)).T
            logits = model(ids, mask.long(), use_cache=False).logits[:, :-1].float()

        values = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (values * is_completion).sum(1).view(2, -1).T

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (2 B, L) of all chosen and then all rejected rows, where their completions start, and where they end."""
        tokens = self.groups.tokens
        padded, completion_starts, ends = [], [], []
        for k in (1, 2):
            for offsets in self.groups.offsets[rows].tolist():
                prompt = tokens[offsets[0] : offsets[1]]
                completion = tokens[offsets[k] : offsets[k + 1]]
                padded.append(torch.cat([prompt, completion]).long())
                completion_starts.append(len(prompt))
                ends.append(len(prompt) + len(completion))

        device = self.ranks.device
        ids = pad_sequence(padded, batch_first=True).to(device)
        return ids, torch.tensor(completion_starts, device=device), torch.tensor(ends, device=device)


class PackedPairs:
    """Every completion stands behind a copy of its prompt, and a forward pass packs pairs up to the token budget."""

    batches: Batches  # of groups with one completion: chosen and rejected of the first pair, of the second, ...
    steps: list[Chunks]

    def __init__(self, groups: Groups, spec: Spec, ranks: Ranks):
        self.batches = Batches(single_completions(groups), spec.batch_size, 0, None, ranks)
        sizes = self.batches.group_sizes.view(-1, 2).sum(1)
        self.steps = []
        for rows in torch.arange(len(groups)).split(spec.batch_size):
            bins = balance(sizes[rows].tolist(), spec.micro_batch_tokens, 1)
            self.steps.append([rows[members] for (members,) in bins])

    def logps(self, model: nn.Module, rows: Tensor) -> Tensor:
        """(B, 2): as `Pairs.logps`."""
        assert isinstance(model, Policy)
        chosen_and_rejected = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()
        batch = self.batches.pack(chosen_and_rejected, len(rows), 0, 0.0)
        return model.logps(batch).view(-1, 2)


def single_completions(groups: Groups) -> Groups:
    """Each completion of each group as a group of its own, behind a copy of the prompt."""
    pieces = []
    offsets = []
    start = 0
    for prompt_start, *bounds in groups.offsets.tolist():
        prompt = groups.tokens[prompt_start : bounds[0]]
        for completion_start, completion_end in zip(bounds, bounds[1:], strict=False):
            completion = groups.tokens[completion_start:completion_end]
            pieces += [prompt, completion]
            middle = start + len(prompt)
            end = middle + len(completion)
            offsets.append([start, middle, end])
            start = end
    return Groups(torch.cat(pieces), torch.tensor(offsets), torch.arange(1, len(offsets) + 1), {})


def compute_everywhere(module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: without `read_positions`, the last layer leaves out nothing."""
    options = {name: value for name, value in options.items() if name != "read_positions"}
    return args, options


class PlainLoop:
    """DPO as one writes it first, which takes up the tricks of LADDER one after another, over the project's loss."""

    spec: Spec
    reference_once: bool
    fused_adamw: bool
    head_on_completions: bool
    packs: bool
    skips_unread: bool

    def __init__(self, spec: Spec):
        self.spec = spec
        self.reference_once = spec.tricks >= 1
        self.fused_adamw = spec.tricks >= 2
        self.head_on_completions = spec.tricks >= 3
        self.packs = spec.tricks >= 4
        self.skips_unread = spec.tricks >= 5

    def train(self) -> Losses:
        """Train for one epoch, with a group of one process."""
        with single_process(self.spec.dtype) as ranks:
            return self.train_on(ranks)

    def train_on(self, ranks: Ranks) -> Losses:
        """Train for one epoch."""
        tokenizer, config = load_tokenizer(self.spec.model)
        max_length = config.get_text_config().max_position_embeddings
        groups = load_groups(self.spec.train_data, tokenizer, Requires("pair"), max_length, None)
        policy = self.load_model(ranks)
        reference = policy
        if not self.reference_once:
            reference = self.load_model(ranks)
        pairs = self.make_pairs(groups, ranks)
        ref_logps = torch.empty(len(groups), 2, device=ranks.device)
        if self.reference_once:
            self.add_reference_logps(reference, pairs, chain(*pairs.steps), ref_logps)
        optimizer = self.make_optimizer(policy)

        losses = []
        for chunks in pairs.steps:
            if not self.reference_once:
                self.add_reference_logps(reference, pairs, chunks, ref_logps)
            losses.append(self.step(policy, optimizer, pairs, chunks, ref_logps))
        return losses

    def load_model(self, ranks: Ranks) -> nn.Module:
        """A policy for packed rows, or a stock model for padded ones."""
        if not self.packs:
            return load_generator(self.spec.model, torch.float32, ranks.device)
        policy = load_policy_from(self.spec.model, ranks)
        if not self.skips_unread:
            policy.lm.base_model.register_forward_pre_hook(compute_everywhere, with_kwargs=True)
        return policy

    def make_pairs(self, groups: Groups, ranks: Ranks) -> Pairs:
        """The rows of all steps, packed or padded."""
        if self.packs:
            return PackedPairs(groups, self.spec, ranks)
        return PaddedPairs(groups, self.spec, ranks, self.head_on_completions)

    def make_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """AdamW as ours, fused or as torch chooses."""
        fused = self.fused_adamw or None
        return torch.optim.AdamW(policy.parameters(), lr=self.spec.learning_rate, weight_decay=0.0, fused=fused)

    def add_reference_logps(
        self, reference: nn.Module, pairs: Pairs, chunks: Iterable[Tensor], ref_logps: Tensor
    ) -> None:
        """Fill the rows of `chunks` in ref_logps (n, 2) with log π_ref."""
        with inference(reference):
            for rows in chunks:
                ref_logps[rows] = pairs.logps(reference, rows)

    def step(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, pairs: Pairs, chunks: Chunks, ref_logps: Tensor
    ) -> tuple[float, float]:
        """One update; returns its loss and gradient norm."""
        num_pairs = sum(len(rows) for rows in chunks)
        losses = []
        for rows in chunks:
            loss = dpo_loss(pairs.logps(policy, rows), ref_logps[rows], BETA).sum() / num_pairs
            loss.backward()
            losses.append(loss.detach())

        grad_norm = clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(grad_norm, "full_tensor"):
            grad_norm = grad_norm.full_tensor()
        return float(sum(losses)), float(grad_norm)


def naive(spec: Spec) -> Job:
    """The plain loop."""
    return PlainLoop(spec).train


# ---------------------------------------------------------------- what training is compared with


def peak(spec: Spec) -> Job:
    """FLOP/s of a large matrix product, the best of ten."""
    device = "cpu"
    n = 2048
    if torch.cuda.is_available():
        device = "cuda"
        n = 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, spec.dtype))

    def multiply() -> float:
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        return time.perf_counter() - started

    def flops_per_second() -> float:
        return 2 * n**3 / min(multiply() for _ in range(10))

    return flops_per_second


def saving(spec: Spec) -> Job:
    """Training with a plain loss that saves a checkpoint after every step."""
    return partial(train_and_save, spec)


def train_and_save(spec: Spec) -> dict[str, float]:
    """Seconds and MB of a checkpoint, and by how many MB saving one lifts the peak memory of this process."""
    ranks = join_processes(spec.dtype, None)
    tokenizer, config = load_tokenizer(spec.model)
    max_length = config.get_text_config().max_position_embeddings
    groups = load_groups(spec.train_data, tokenizer, Requires(), max_length, None)
    batches = Batches(groups, spec.batch_size, spec.micro_batch_tokens, None, ranks)
    model = load_policy_from(spec.model, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, fused=True)

    seconds, lifts = [], []
    for step in range(1, batches.steps_per_epoch + 1):
        for batch in batches.of_step(step):
            loss = -model(batch).sum() * ranks.world_size / batch.global_tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        peak_before = resident_bytes("VmHWM")
        started = time.perf_counter()
        checkpoint.save(Path(spec.output_dir), step, model, optimizer, {}, batches.steps_per_epoch, ranks)
        dist.barrier()  # the main process has still to rename it
        seconds.append(time.perf_counter() - started)
        lifts.append(resident_bytes("VmHWM") - peak_before)

    files = (Path(spec.output_dir) / "checkpoints" / "step-000001").iterdir()
    return {
        "saving": min(seconds),
        "extra": max(lifts) / 1e6,  # of the first one, after which the allocator holds the memory
        "checkpoint": sum(file.stat().st_size for file in files) / 1e6,
    }


JOBS: dict[str, Callable[[Spec], Job]] = {"ours": ours, "trl": trl, "naive": naive, "peak": peak, "saving": saving}
