"""Time and memory of training, alone or against TRL, or against a plain loop that takes up one trick after another.

Every measured run is a process of its own, contenders in turn, each with empty caches, on the same weights, rows,
order, dtype, clipping and AdamW. The clock starts when the libraries are imported and stops at the last update: loading
rows and weights, tokenising, and the reference's log-probs are inside; the trained model is not written. Before
anything is compared, loss and gradient norm of steps one and two must agree.

    s/row      seconds of the whole run per row
    first      seconds to the end of the first update
    step       mean seconds of the steps after it; rows/s and tokens/s are of these steps, a token counted once
    memory     most resident memory of the process, the libraries (given beside it) included; on a GPU, most allocated
    MFU        necessary FLOPs of those steps, over their time, over the FLOP/s of one large matmul of the same dtype,
               device and threads. Necessary is a prompt once per row, attention to what a token may see, of the last
               layer what is read, the head on completion tokens only; forward and backward are three forward passes,
               a live reference is a fourth
    ÷ ours     seconds or memory over ours of the same round: median [least, most]

TRL and the plain loop pad; each number of `--against-batch` is tried on two steps, and the fastest one is measured.
The loop's lines add up, each with all tricks above it; the one trick left after the last, prefix sharing, makes ours.
Random weights and rows of random words serve as well as real ones: nothing depends on what they are.

    python scripts/benchmark.py --profile hh --against trl
    python scripts/benchmark.py --profile hh --against naive
    python scripts/benchmark.py --shape 0.5b --dtype bfloat16 --max-rows 1024 --batch-size 64 \\
        --micro-batch-tokens 32768 --against trl --against-batch 64 16
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice, product
from pathlib import Path
from types import ModuleType
from typing import Literal
from unittest import mock

import quickstart
import streaming
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared import UserError, writing
from shared.data import Batches, Groups, Needs, balance, load, tokenise
from shared.distributed import Place, inference
from shared.logprobs import sequence_logps, token_logps
from shared.model import Policy, load_generator, load_policy, load_tokenizer
from shared.rows import parse
from shared.run import command

# tokens of prompts and of completions, BOS and EOS included: mean and σ of a lognormal distribution, and the most
PROFILES = {
    "hh": ((128, 0.9, 1024), (64, 0.9, 512)),
    "ultrafeedback": ((170, 0.9, 2048), (270, 0.7, 1024)),
    "tldr": ((350, 0.3, 512), (35, 0.35, 128)),
}
DIMENSIONS = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
SHAPES = {  # those for GPUs are Qwen2.5's; True: the embedding is the head too
    "cpu-8k": ((8_192, 256, 4, 8, 8, 688), False),
    "cpu-152k": ((151_936, 64, 4, 4, 4, 172), True),
    "0.5b": ((151_936, 896, 24, 14, 2, 4_864), True),
    "1.5b": ((151_936, 1_536, 28, 12, 2, 8_960), True),
}
POSITIONS = 4_096
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
REWARD_MODELS = 3  # whose scores the rows carry
# of the algorithms: what they need beyond completions, and options that are not at their defaults
NEEDS = {"sft": Needs(1), "typo": Needs(2, samples=True), "ensemble_dpo": Needs(2)}
OPTIONS = {"exo": {"beta_r": 0.1}}
BETA, CLIP = 0.1, 1.0  # of all contenders, the algorithms' defaults
LEARNING_RATE = 1e-4  # high enough that step two tells whether step one's update was the same
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses and gradient norms
LADDER = ("plain loop", "+ reference once", "+ fused AdamW", "+ head on completion tokens")
LADDER += ("+ packing", "+ of the last layer what is read")
# what the contenders would import while they run
MODULES = "torch.distributed.fsdp torch.distributed.device_mesh safetensors.torch"
MODULES += "".join(f" transformers.models.{name}" for name in ("auto.modeling_auto", "auto.tokenization_auto"))
MODULES += " transformers.models.llama.modeling_llama"
# of the table: key and format of a number
COLUMNS = {
    "s/row": ("seconds_per_row", ".4f"),
    "first (s)": ("first_update", ".2f"),
    "step (s)": ("step", ".3f"),
    "rows/s": ("rows_per_second", ".2f"),
    "tokens/s": ("tokens_per_second", ".0f"),
    "memory (MB)": ("memory", ".0f"),
    "libraries (MB)": ("libraries", ".0f"),
    "MFU": ("mfu", ".1%"),
}
Training = Callable[[], list[tuple[float, float]]]  # → loss and gradient norm of every step


@dataclass(kw_only=True)
class Args:
    """Time and memory of training."""

    algorithm: Literal["dpo", "sft", "rm", "exo", "typo", "ensemble_dpo"] = "dpo"
    """file of algos/"""
    num_completions: int = 2
    """completions of a row"""
    profile: Literal["hh", "ultrafeedback", "tldr"] = "hh"
    """lengths of the rows, which are of random words"""
    rows: str | None = None
    """file, directory or hub id (`path:split`) of real pairs of plain text, instead of a profile"""
    tokenizer: str | None = None
    """directory or hub id of the tokenizer of --rows; default: byte-level BPE of 8192 tokens trained on them"""
    shape: Literal["cpu-8k", "cpu-152k", "0.5b", "1.5b"] = "cpu-8k"
    """of the model, with random weights"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the forward and backward pass; weights and optimizer are float32"""
    max_rows: int = 96
    """rows, each used once"""
    batch_size: int = 16
    """rows per optimizer step"""
    micro_batch_tokens: int = 2048
    """most tokens in one forward pass of ours"""
    against: Literal["trl", "naive"] | None = None
    """compare dpo with TRL's trainer, or with a plain loop"""
    against_batch: tuple[int, ...] = (16, 4)
    """pairs per forward pass of the other side, of which the fastest is taken"""
    repeats: int = 2
    """rounds of one run of every contender"""
    output_dir: Path = quickstart.ROOT / "results"
    """where the table (.md) and all numbers (.json) go"""


# ---------------------------------------------------------------- rows and models


def quantiles(mean: float, sigma: float, most: int, n: int, rng: random.Random) -> list[int]:
    """n lengths at the even quantiles of a lognormal distribution, 3 at least, in random order."""
    normal, mu = statistics.NormalDist(), math.log(mean) - sigma**2 / 2
    found = [math.exp(mu + sigma * normal.inv_cdf((i + 0.5) / n)) for i in range(n)]
    return rng.sample([min(most, max(3, round(length))) for length in found], n)


def random_rows(args: Args) -> Iterator[dict]:
    """Rows of words w0, w1, ..., each one token: a prompt that follows a BOS, completions before their EOS."""
    rng, words = random.Random(0), SHAPES[args.shape][0][0] - len(SPECIAL)
    prompt, completion = PROFILES[args.profile]
    profiles = [prompt] + [completion] * (args.num_completions + (args.algorithm == "typo"))
    lengths = [quantiles(*profile, args.max_rows, rng) for profile in profiles]
    for row in zip(*lengths, strict=True):
        texts = [" ".join(f"w{rng.randrange(words)}" for _ in range(length - 1)) for length in row]
        yield make_row(args, texts[0], [f" {text}" for text in texts[1:]], rng)


def make_row(args: Args, prompt: str, completions: list[str], rng: random.Random) -> dict:
    """A row with scores; one completion more than asked for is a sample of π_ref."""
    k = args.num_completions
    row = {"prompt": prompt, "scores": [[rng.gauss(0, 1) for _ in range(REWARD_MODELS)] for _ in range(k)]}
    row |= dict(zip(("chosen", "rejected"), completions, strict=False)) if k == 2 else {"completions": completions[:k]}
    return row | ({"reference_samples": completions[k:]} if completions[k:] else {})


def real_rows(args: Args, tokenizer) -> Iterator[dict]:
    """Usable rows whose ids do not depend on whether prompt and completion are encoded together, as TRL does."""
    rng = random.Random(0)
    for example in parse(args.rows, Counter()):
        texts = [example.prompt, *example.completions]
        if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{example.where}: --rows must be pairs of plain text, with a prompt")
        x, *ys = tokenizer(texts, add_special_tokens=False)["input_ids"]
        joined = tokenizer([texts[0] + text for text in texts[1:]], add_special_tokens=False)["input_ids"]
        short = max(map(len, joined)) < POSITIONS - 2
        if short and all(texts) and texts[1] != texts[2] and joined == [x + y for y in ys]:
            yield make_row(args, texts[0], texts[1:], rng)


def make_tokenizer(args: Args):
    """One token per word for a profile's rows; for real ones the given one, or BPE trained on them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if args.tokenizer:
        return load_tokenizer(args.tokenizer)[0]
    if args.rows:
        backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        texts = (str(text) for e in parse(args.rows, Counter()) for text in (e.prompt, *e.completions))
        trainer = trainers.BpeTrainer(
            vocab_size=8_192, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
    else:
        names = [*SPECIAL, *(f"w{i}" for i in range(SHAPES[args.shape][0][0] - len(SPECIAL)))]
        backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_model(path: Path, shape: str, tokenizer) -> None:
    """A Llama of random weights with its tokenizer, written to a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    sizes, tied = SHAPES[shape]
    if len(tokenizer) > sizes[0]:
        raise UserError(f"--tokenizer: has {len(tokenizer)} tokens, but --shape {shape} embeds {sizes[0]}")
    own = dict(zip(DIMENSIONS.split(), sizes, strict=True))
    own |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**own, tie_word_embeddings=tied, max_position_embeddings=POSITIONS)
    torch.manual_seed(0)
    with writing(path):
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)


# ---------------------------------------------------------------- contenders: import, and return what is measured


def own(spec: dict) -> tuple[ModuleType, object]:
    """The algorithm's own file, which keeps the trained model to itself, and its arguments."""
    module = importlib.import_module(f"algos.{spec['algorithm']}")
    module.export = lambda *_: None
    names = "model train_data output_dir batch_size micro_batch_tokens learning_rate dtype"
    common = {name: spec[name] for name in names.split()}
    fixed = dict(lr_schedule="constant", shuffle=False, log_every=1, save_every=0)
    return module, module.Args(**(common | fixed | OPTIONS.get(spec["algorithm"], {}) | spec.get("options", {})))


def ours(spec: dict) -> Training:
    """The algorithm's own file → a function that trains and returns loss and gradient norm of each step."""
    module, args = own(spec)

    def train() -> list[tuple[float, float]]:
        module.main(args)
        lines = (Path(args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]

    return train


def trl(spec: dict) -> Training:
    """TRL's DPOTrainer, the reference a second model, or its log-probs computed first."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_flash_attn_2_available
    from trl import DPOConfig, DPOTrainer

    cuda, size = torch.cuda.is_available(), spec["pass_size"]
    kernel = "flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa"
    same = dict(beta=BETA, learning_rate=spec["learning_rate"], max_grad_norm=CLIP, optim="adamw_torch_fused")
    same |= dict(lr_scheduler_type="constant", num_train_epochs=1, train_sampling_strategy="sequential")
    same |= dict(per_device_train_batch_size=size, gradient_accumulation_steps=spec["batch_size"] // size)
    best = dict(gradient_checkpointing=False, max_length=None, precompute_ref_log_probs=not spec["live"])
    best |= dict(bf16=spec["dtype"] == "bfloat16", use_cpu=not cuda, dataloader_pin_memory=cuda)
    quiet = dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    config = DPOConfig(spec["output_dir"], **same, **best, **quiet)

    def model() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation=kernel)

    def train() -> list[tuple[float, float]]:
        with open(spec["train_data"], encoding="utf-8") as file:
            rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in map(json.loads, file)]
        tokenizer, reference = AutoTokenizer.from_pretrained(spec["model"]), model() if spec["live"] else None
        rows = Dataset.from_list(rows)
        trainer = DPOTrainer(model(), reference, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]

    return train


def naive(spec: dict) -> Training:
    """A plain DPO loop with the first `tricks` of LADDER, over the project's own loss."""
    from algos.dpo import dpo_loss

    once, fused, sparse, packed, skipping = (spec["tricks"] >= i for i in range(1, len(LADDER)))

    def load_one(place: Place) -> nn.Module:
        if not packed:
            return load_generator(spec["model"], torch.float32, place.device)
        with nullcontext() if skipping else mock.patch("shared.model.skip_unread"):
            return load_policy(spec["model"], place)

    def refer(model: nn.Module, logps: Callable, chunks: Iterable[Tensor], known: Tensor) -> None:
        with inference(model):
            for rows in chunks:
                known[rows] = logps(model, rows)

    def train() -> list[tuple[float, float]]:
        tokenizer, config = load_tokenizer(spec["model"])
        groups, found = load(spec["train_data"], tokenizer, Needs(2), config.max_position_embeddings, None), []
        with streaming.alone(spec["dtype"]) as place:
            policy = load_one(place)
            reference = policy if once else load_one(place)
            logps, steps = packed_pairs(groups, spec, place) if packed else padded_pairs(groups, spec, place, sparse)
            known = torch.empty(len(groups), 2, device=place.device)  # log π_ref
            refer(reference, logps, chain(*steps) if once else (), known)
            optimizer = torch.optim.AdamW(
                policy.parameters(), spec["learning_rate"], weight_decay=0.0, fused=fused or None
            )
            for chunks in steps:
                refer(reference, logps, () if once else chunks, known)
                losses = []
                for rows in chunks:
                    losses.append(dpo_loss(logps(policy, rows), known[rows], BETA).sum() / sum(map(len, chunks)))
                    losses[-1].backward()
                norm = clip_grad_norm_(policy.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                found.append((sum(losses).item(), float(norm)))
        return found

    return train


def padded_pairs(groups: Groups, spec: dict, place: Place, sparse: bool) -> tuple[Callable, list[tuple[Tensor, ...]]]:
    """A function of model and rows (B,) → (B, 2), log π of chosen and rejected as padded rows; every step's passes.

    sparse: the head on completion tokens only, in chunks, instead of a log-softmax at all positions.
    """

    def logps(lm: nn.Module, rows: Tensor) -> Tensor:
        spans = [(o[0], o[1], o[k], o[k + 1]) for k in (1, 2) for o in groups.offsets[rows].tolist()]
        ids = pad_sequence([torch.cat([groups.tokens[a:b], groups.tokens[c:d]]).long() for a, b, c, d in spans], True)
        starts, ends = torch.tensor([(b - a, b - a + d - c) for a, b, c, d in spans], device=place.device).T
        ids, at = ids.to(place.device), torch.arange(ids.shape[1], device=place.device)
        mask = at < ends[:, None]
        targets, completion = ids[:, 1:], (mask & (at >= starts[:, None]))[:, 1:]
        with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
            if sparse:
                head = lm.get_output_embeddings()
                states = lm.base_model(ids, mask.long(), use_cache=False).last_hidden_state[:, :-1][completion].float()
                found = token_logps(states, head.weight, head.bias, targets[completion])
                return sequence_logps(found, (ends - starts).view(2, -1)).T
            logits = lm(ids, mask.long(), use_cache=False).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (found * completion).sum(1).view(2, -1).T

    return logps, [rows.split(spec["pass_size"]) for rows in torch.arange(len(groups)).split(spec["batch_size"])]


def packed_pairs(groups: Groups, spec: dict, place: Place) -> tuple[Callable, list[list[Tensor]]]:
    """The same without padding: every completion behind a copy of its prompt, within the token budget."""
    ends = groups.offsets.tolist()
    ids = [[groups.tokens[a:b].tolist() for a, b in zip(row, row[1:], strict=False)] for row in ends]
    single = streaming.make_groups([streaming.Row(None, {}, x, [y]) for x, *ys in ids for y in ys])
    batches = Batches(single, spec["batch_size"], 0, None, place)
    sizes = batches.sizes.view(-1, 2).sum(1)

    def logps(policy: Policy, rows: Tensor) -> Tensor:
        both = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()
        return policy.logps(batches.pack(both, len(rows), 0, 0.0)).view(-1, 2)

    def cut(rows: Tensor) -> list[Tensor]:
        return [rows[some] for (some,) in balance(sizes[rows].tolist(), spec["micro_batch_tokens"], 1)]

    return logps, [cut(rows) for rows in torch.arange(len(groups)).split(spec["batch_size"])]


def peak(spec: dict) -> Callable[[], float]:
    """The FLOP/s of a large matrix product, the best of ten."""
    device, n = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a = torch.randn(n, n, device=device, dtype=getattr(torch, spec["dtype"]))

    def once() -> float:
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        return time.perf_counter() - started

    return lambda: 2 * n**3 / min(once() for _ in range(10))


CONTENDERS = {"ours": ours, "trl": trl, "naive": naive, "peak": peak}


# ---------------------------------------------------------------- one process


def worker(spec: dict) -> None:
    """One run of a contender; its last line of output is what was measured, as JSON."""
    for name in MODULES.split():
        importlib.import_module(name)
    run, ends, cuda = CONTENDERS[spec["contender"]](spec), [], torch.cuda.is_available()
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    libraries = resident("VmRSS")
    started = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    measured = {
        "result": result,
        "seconds": time.perf_counter() - started,
        "updates": [end - started for end in ends],
        "memory": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM"),
        "libraries": 0 if cuda else libraries,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else cpu(),
    }
    print(json.dumps(measured), flush=True)
    os._exit(0)  # gloo's threads can abort an ordinary interpreter exit


def resident(name: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def cpu() -> str:
    """The model of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def measure(name: str, spec: dict, scratch: Path) -> dict:
    """Run a worker with empty caches. Raises UserError where it fails, with the last line that it wrote."""
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
        environment |= {"XDG_CACHE_HOME": own, "HF_DATASETS_CACHE": own, "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, __file__, "worker", json.dumps(spec | {"output_dir": f"{own}/out"})]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise UserError(f"{name}: failed with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- numbers


def forward_flops(config, lengths: Tensor, head: bool = True) -> int:
    """Necessary FLOPs of one forward pass of a Llama over groups of a prompt and completions.

    lengths (n, 1 + C). A prompt is computed once, and a token attends to itself and the tokens it may see. The last
    layer's keys and values are needed everywhere, the rest of it only for states that are read: those that predict
    completion tokens, at each of which the head is applied, or without a head, for a reward model, those of last
    tokens. Norms, rotations and softmax are left out.
    """
    p, c = lengths[:, :1].double(), lengths[:, 1:].double()
    width, kv = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    layers, rest = config.num_hidden_layers, 2 * width**2 + 3 * width * config.intermediate_size
    # of the last layer: states that are read, and their pairs of a query and a key
    read = 1 + (c - 1).sum(1) if head else torch.full((len(c),), c.shape[1])
    pairs = p[:, 0] + ((c - 1) * (p + c / 2)).sum(1) if head else (p + c).sum(1)
    weights = layers * 2 * width * kv * lengths.sum() + rest * ((layers - 1) * lengths.sum() + read.sum())
    seen = (layers - 1) * ((p * (p + 1) / 2).sum() + (c * p + c * (c + 1) / 2).sum()) + pairs.sum()
    scores = 2 * width * seen  # query times key, weight times value
    return int(2 * (weights + scores + head * width * config.vocab_size * c.sum()))


def agree(name: str, found: dict, wanted: dict, tolerance: float) -> None:
    """Raises UserError where loss or gradient norm of steps one or two differ by more than `tolerance`, relative."""
    for step in (0, 1):
        for what, a, b in zip(("loss", "gradient norm"), found["result"][step], wanted["result"][step], strict=True):
            if not abs(a - b) <= tolerance * abs(b):
                raise UserError(f"{name}: {what} of step {step + 1} is {a:.8g}, ours {b:.8g}: not the same training")


def summarise(runs: list[dict], base: list[dict], batch_size: int, lengths: Tensor, work: float) -> dict:
    """The medians of one contender's rounds, and its ratios to ours (`base`) of the same round.

    lengths (n, 1 + C); work: seconds that the necessary FLOPs of the steps after the first take at the peak rate.
    """
    median = {name: statistics.median(run[name] for run in runs) for name in ("seconds", "memory", "libraries")}
    later = statistics.median(run["updates"][-1] - run["updates"][0] for run in runs)
    found = {
        "seconds_per_row": median["seconds"] / len(lengths),
        "first_update": statistics.median(run["updates"][0] for run in runs),
        "step": later / (len(runs[0]["updates"]) - 1),
        "rows_per_second": (len(lengths) - batch_size) / later,
        "tokens_per_second": int(lengths[batch_size:].sum()) / later,
        "memory": median["memory"] / 1e6,
        "libraries": median["libraries"] / 1e6,
        "mfu": work / later,
    }
    for what in ("seconds", "memory"):
        ratios = [a[what] / b[what] for a, b in zip(runs, base, strict=True)]
        found[f"{what}_ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


def markdown(name: str, results: dict) -> str:
    """The machine, the settings, and a table with one line per contender."""
    lines = [f"# {name}", ""]
    for part in ("machine", "rows", "settings"):
        shown = ", ".join(f"{key} {value}" for key, value in results[part].items() if value is not None)
        lines += [f"{part.capitalize()}: {shown}.", ""]
    lines += [f"| contender | {' | '.join(COLUMNS)} | time ÷ ours | memory ÷ ours |", "|---" * (3 + len(COLUMNS)) + "|"]
    for contender, numbers in results["contenders"].items():
        cells = [contender, *(f"{numbers[key]:{form}}" for key, form in COLUMNS.values())]
        for ratio in (numbers["seconds_ratio"], numbers["memory_ratio"]):
            cells.append(f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    tried = (f"{name} {t['seconds']:.2f} s, {t['memory'] / 1e6:.0f} MB" for name, t in results["tried"].items())
    return "\n".join([*lines, *(["", f"Two steps of each: {'; '.join(tried)}."] if results["tried"] else [])])


# ---------------------------------------------------------------- command line


def check(args: Args) -> None:
    """Raises UserError for what cannot be measured."""
    if args.max_rows <= args.batch_size:
        raise UserError(f"--max-rows {args.max_rows}: must be more than one batch, {args.batch_size}")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    if args.tokenizer and not args.rows:
        raise UserError(f"--tokenizer {args.tokenizer}: is that of --rows; a profile has its own")
    if args.rows and (args.algorithm == "typo" or args.num_completions != 2):
        raise UserError("--rows: gives pairs without samples of the reference; take a profile")
    if args.against and (args.algorithm, args.num_completions) != ("dpo", 2):
        raise UserError(f"--against {args.against}: compares dpo on pairs only")
    if args.against == "trl" and importlib.util.find_spec("trl") is None:
        raise UserError("--against trl: TRL is not installed; pip install trl")
    if args.against and (wrong := [size for size in args.against_batch if size < 1 or args.batch_size % size]):
        raise UserError(f"--against-batch {wrong[0]}: must divide --batch-size {args.batch_size}")


def prepare(args: Args, scratch: Path) -> tuple[Path, Path, Tensor]:
    """The model's directory, the file of rows, and their lengths (n, 1 + C) as training encodes them."""
    tokenizer, model, path = make_tokenizer(args), scratch / "model", scratch / "rows.jsonl"
    make_model(model, args.shape, tokenizer)
    rows = islice(real_rows(args, tokenizer), args.max_rows) if args.rows else random_rows(args)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build = tokenise(str(path), tokenizer, NEEDS.get(args.algorithm, Needs()), POSITIONS, None)
    if len(build.rows) < args.max_rows:
        raise UserError(f"--rows {args.rows}: {len(build.rows)} usable rows, fewer than --max-rows {args.max_rows}")
    return model, path, torch.tensor(build.offsets).view(args.max_rows, -1).diff(dim=1)


def specs(against: str | None) -> dict[str, dict]:
    """Every contender's own part of its spec; `live`: each step runs the reference too."""
    found = {"ours": {"contender": "ours", "live": False}}
    if against == "trl":
        found |= {
            f"TRL, reference {how}": {"contender": "trl", "live": how == "live"} for how in ("live", "precomputed")
        }
    if against == "naive":
        found |= {name: {"contender": "naive", "live": i == 0, "tricks": i} for i, name in enumerate(LADDER)}
    return found


def tune(contenders: dict[str, dict], args: Args, scratch: Path) -> dict[str, dict]:
    """On the first two steps: all must agree with ours, and each takes the pairs per pass that need least time.

    → what was tried, with seconds and bytes.
    """
    two, tried = scratch / "two_steps.jsonl", {}
    with open(contenders["ours"]["train_data"], encoding="utf-8") as file:
        two.write_text("".join(islice(file, 2 * args.batch_size)), encoding="utf-8")
    wanted = measure("ours", contenders["ours"] | {"train_data": str(two)}, scratch)
    tried["ours"] = {key: wanted[key] for key in ("seconds", "memory")}
    for name, spec in list(contenders.items())[1:]:
        fastest = math.inf
        for size in args.against_batch if spec.get("tricks", 0) < LADDER.index("+ packing") else [None]:
            found = measure(name, spec | {"train_data": str(two), "pass_size": size}, scratch)
            agree(name, found, wanted, TOLERANCE[args.dtype])
            print(f"agrees with ours on two steps: {label(name, size)}, {found['seconds']:.2f} s", flush=True)
            tried[label(name, size)] = {key: found[key] for key in ("seconds", "memory")}
            if found["seconds"] < fastest:
                fastest, spec["pass_size"] = found["seconds"], size
    return tried


def label(name: str, size: int | None) -> str:
    """A contender's name with its pairs per pass, if it has any."""
    return f"{name}, {size} pairs a pass" if size else name


def run_all(args: Args, scratch: Path) -> dict:
    """Agreement, then rounds of runs; the contents of the results file."""
    load_before = os.getloadavg()[0]
    model, path, lengths = prepare(args, scratch)
    common = {name: getattr(args, name) for name in ("algorithm", "batch_size", "micro_batch_tokens", "dtype")}
    common |= {"learning_rate": LEARNING_RATE, "model": str(model), "train_data": str(path)}
    contenders = {name: common | spec for name, spec in specs(args.against).items()}
    tried = tune(contenders, args, scratch) if args.against else {}
    rate = measure("peak", common | {"contender": "peak"}, scratch)["result"]
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for i, (name, spec) in product(range(args.repeats), contenders.items()):
        runs[name].append(measure(name, spec, scratch))
        print(f"round {i + 1} of {args.repeats}: {name}: {runs[name][-1]['seconds']:.2f} s", flush=True)
    forward = forward_flops(load_tokenizer(str(model))[1], lengths[args.batch_size :], args.algorithm != "rm") / rate
    settings = dataclasses.asdict(args) | ({"rows": Path(args.rows).name, "profile": None} if args.rows else {})
    libraries = ["torch", "transformers"] + ["trl"] * (args.against == "trl")
    return {
        "machine": {
            "device": runs["ours"][0]["device"],
            "cores": os.cpu_count(),
            "threads": runs["ours"][0]["threads"],
            "load before": round(load_before, 2),
            "GFLOP/s of a matmul": round(rate / 1e9, 1),
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
        "rows": {
            "mean tokens of a prompt": round(float(lengths[:, 0].double().mean()), 1),
            "of a completion": round(float(lengths[:, 1:].double().mean()), 1),
        },
        "settings": {name: value for name, value in settings.items() if not isinstance(value, Path)},
        "tried": tried,
        "contenders": {
            label(name, spec.get("pass_size")): summarise(
                runs[name], runs["ours"], args.batch_size, lengths, forward * (3 + spec["live"])
            )
            for name, spec in contenders.items()
        },
        "runs": runs,
    }


def main(args: Args) -> None:
    """Measure, write the results, print the table."""
    check(args)
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(args, Path(scratch))
    rows = Path(args.rows).name.partition(".")[0] if args.rows else args.profile
    k = f"-{args.num_completions}" if args.num_completions > 2 else ""
    name = f"{args.algorithm}{k}-{rows}-{args.shape}" + (f"-{args.against}" if args.against else "")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for ending, text in {"json": json.dumps(results, indent=1), "md": markdown(name, results)}.items():
        temporary = args.output_dir / f".{name}.{ending}.tmp"
        with writing(args.output_dir / f"{name}.{ending}"):
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, args.output_dir / f"{name}.{ending}")
    print(markdown(name, results))


if __name__ == "__main__":
    worker(json.loads(sys.argv[2])) if sys.argv[1:2] == ["worker"] else command(main, Args)
