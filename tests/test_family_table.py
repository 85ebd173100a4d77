"""The families of transformers that are trained: the values of their packed rows, and three steps of training.

The models are tiny and random, with large weights. What becomes of each family stands in a table of docs/families.md.
To write that table anew: CLEANPO_WRITE_TABLE=1 pytest tests/test_family_table.py
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import reference
import tiny
import torch
import transformers
from exactness import compare_metrics, train_reference
from families import FAMILIES, MULTIMODAL
from settings import BETA, LEARNING_RATE, MAX_GRAD_NORM, STEPS, WEIGHT_DECAY
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoTokenizer

from algos import dpo, ipo
from shared import UserError
from shared.batches import Batch, Batches
from shared.distributed import Ranks, inference, single_process
from shared.groups import Requires, load_groups
from shared.loading import load_policy_from
from shared.model import Policy

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
BEFORE_TABLE = "<!-- made by tests/test_family_table.py -->\n"
SCALE = 10.0  # of transformers' initial weights; predictions are then far from uniform
SMALLER_SCALE = 5.0
STEEP = ("gemma4", "gemma4_text", "minicpm3")  # they do not divide attention scores or logits, and round more
HUGE = 1 << 20  # a budget that holds every batch
BATCH = 2
EXACT = 1e-4
ALL = [*FAMILIES, *MULTIMODAL]
REFUSED = {
    *("bamba", "falcon_h1", "jamba", "lfm2", "mamba", "mamba2", "minimax", "nemotron_h", "qwen3_5", "qwen3_5_text"),
    *("qwen3_next", "recurrent_gemma", "rwkv", "bloom", "mpt", "codegen", "falcon", "gpt_neo", "gptj", "stablelm"),
    *("nemotron", "gemma2", "vaultgemma", "gpt_oss", "paligemma", "phimoe"),
}
REFUSED_EARLIER = ("biogpt", "opt")  # with transformers 5.17
ACCEPTED = [family for family in ALL if family not in REFUSED]

PINNED = re.search(r"^transformers==(.+)$", (tiny.ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
assert PINNED is not None
OF_TABLE = PINNED[1]  # the version that the table is made with
IS_OF_TABLE = transformers.__version__ == OF_TABLE

LossesOf = Callable[[Tensor, Batch], Tensor]  # of log π (B, K) → (B,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two and four completions; several are longer than three windows."""
    path = tmp_path_factory.mktemp("families")
    for k in (2, 4):
        rows = tiny.make_rows(STEPS * BATCH, seed=10 + k, k=k, path=path / f"rows{k}.jsonl", prompt_words=(8, 45))
        groups = [reference.encode(tiny.make_tokenizer(), row) for row in rows]
        long_groups = [group for group in groups if len(group.prompt + group.completions[0]) > 3 * families.WINDOW]
        assert len(long_groups) >= 3
    return path


def saved(family: str, folder: Path) -> Path:
    """The model of a family, made once."""
    directory = folder / family
    if not directory.exists():
        families.save_model(family, directory, SMALLER_SCALE if family in STEEP else SCALE)
    return directory


def load_batches(model: Path, rows: Path, ranks: Ranks) -> Batches:
    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = load_groups(str(rows), tokenizer, Requires(), 512, None)
    return Batches(groups, BATCH, HUGE, None, ranks)


# ---------------------------------------------------------------- the table


def outcome(family: str, folder: Path) -> str:
    """What packed rows make of a family: "exact", or why it is refused. Raises AssertionError for wrong values."""
    model = saved(family, folder)
    rows = folder / "rows2.jsonl"
    try:
        with single_process("float32") as ranks:
            policy = load_policy_from(str(model), ranks)
            batches = load_batches(model, rows, ranks)
            with inference(policy):
                ours = torch.cat([policy.logps(batch) for batch in batches.all_batches()])
    except UserError as error:
        beginning = f"model {model}: its architecture is not supported: "
        assert str(error).startswith(beginning)
        return str(error).removeprefix(beginning)

    theirs = stock_logps(model, tiny.read_jsonl(rows))
    error = (ours - theirs).abs() / theirs.abs().clamp(min=1)
    assert error.max() < EXACT, family
    return "exact"


@torch.no_grad()
def stock_logps(directory: Path, rows: list[dict]) -> Tensor:
    """log π(y|x) of each row's completions (B, K), one forward pass for each."""
    model = reference.load_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    values = []
    for row in rows:
        group = reference.encode(tokenizer, row)
        for completion in group.completions:
            values.append(reference.token_logps(model, group.prompt, completion).sum())
    return torch.stack(values).view(len(rows), -1)


def table(outcomes: dict[str, str]) -> str:
    """The accepted families first."""
    lines = ["| family | packed rows |", "|---|---|"]
    for is_exact in (True, False):
        for family, result in outcomes.items():
            if (result == "exact") == is_exact:
                lines.append(f"| {family} | {describe(family, result)} |")
    return "\n".join(lines) + "\n"


def describe(family: str, result: str) -> str:
    if result != "exact":
        return f"refused: {result}"
    config = families.config_of(family)
    notes = []
    if family in MULTIMODAL:
        notes.append("its text part")
    if getattr(config.get_text_config(), "sliding_window", None):
        notes.append("with windows")
    return ", ".join(["exact", *notes])


@pytest.mark.skipif(not IS_OF_TABLE, reason=f"the table is of transformers {OF_TABLE}")
def test_the_table_of_families(folder: Path) -> None:
    outcomes = {family: outcome(family, folder) for family in ALL}
    assert [family for family in ALL if outcomes[family] == "exact"] == ACCEPTED
    text = DOCS.read_text(encoding="utf-8")
    introduction, mark, _ = text.partition(BEFORE_TABLE)
    expected = introduction + mark + "\n" + table(outcomes)
    if os.environ.get("CLEANPO_WRITE_TABLE"):
        DOCS.write_text(expected, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == expected


# ---------------------------------------------------------------- three steps


def dpo_losses(logps: Tensor, batch: Batch) -> Tensor:
    return dpo.dpo_loss(logps, batch.ref_logps, BETA)


def ipo_losses(logps: Tensor, batch: Batch) -> Tensor:
    return ipo.ipo_loss(logps, batch.ref_logps, 0.1)


def train(model: Path, rows: Path, losses_of: LossesOf) -> list[dict]:
    """Three steps in this process; the reference is the policy before the first."""
    with single_process("float32") as ranks:
        policy = load_policy_from(str(model), ranks)
        batches = load_batches(model, rows, ranks)
        with inference(policy):
            ref_logps = [policy.logps(batch) for batch in batches.all_batches()]
        batches.groups.ref_logps = torch.cat(ref_logps)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        return [step_of(policy, batches, optimizer, step, losses_of) for step in range(1, STEPS + 1)]


def step_of(policy: Policy, batches: Batches, optimizer: torch.optim.Optimizer, step: int, losses_of: LossesOf) -> dict:
    (batch,) = batches.of_step(step)
    loss = losses_of(policy.logps(batch), batch).mean()
    loss.backward()
    grad_norm = clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return {"step": step, "loss": float(loss.detach()), "grad_norm": float(grad_norm), "learning_rate": LEARNING_RATE}


def compare_training(family: str, folder: Path, losses_of: LossesOf, loss: reference.Loss, k: int) -> None:
    """The losses and gradient norms of three steps against those of the float64 loop."""
    model = saved(family, folder)
    rows = folder / f"rows{k}.jsonl"
    lines = train(model, rows, losses_of)
    expected, _ = train_reference(model, tiny.read_jsonl(rows), loss, batch_size=BATCH)
    compare_metrics(lines, expected, rounding=10 if family in STEEP else 1)
    assert lines[0]["loss"] != lines[1]["loss"]


@pytest.mark.parametrize("family", ACCEPTED)
def test_three_steps(family: str, folder: Path) -> None:
    if family in REFUSED_EARLIER and not IS_OF_TABLE and outcome(family, folder) != "exact":
        pytest.skip(f"{family} is refused with transformers {transformers.__version__}")
    compare_training(family, folder, dpo_losses, reference.dpo(BETA), 2)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen3_moe", "mixtral", "gemma3"])
def test_three_steps_of_four_completions(family: str, folder: Path) -> None:
    compare_training(family, folder, dpo_losses, reference.dpo(BETA), 4)


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "mistral3"])
def test_three_steps_of_another_loss(family: str, folder: Path) -> None:
    compare_training(family, folder, ipo_losses, reference.ipo(0.1), 2)
