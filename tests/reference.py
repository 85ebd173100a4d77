"""What every algorithm must reproduce: float64, one completion at a time, stock model code, no packing.

A loss sees the whole batch at once, `loss(batch, step) -> (scalar, metrics)`, with one `Scored` per group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Group:
    """Token ids of one prompt and its K completions, each with its EOS."""

    prompt: list[int]
    completions: list[list[int]]
    row: dict


@dataclass
class Scored:
    """Token log-probs of the K completions under the policy and under the reference."""

    token_logps: list[Tensor]
    ref_token_logps: list[Tensor]
    row: dict

    @property
    def logps(self) -> Tensor:
        """(K,) sums under the policy."""
        return torch.stack([logps.sum() for logps in self.token_logps])

    @property
    def ref_logps(self) -> Tensor:
        """(K,) sums under the reference."""
        return torch.stack([logps.sum() for logps in self.ref_token_logps])


Loss = Callable[[Sequence[Scored], int], tuple[Tensor, dict[str, float]]]


def completions_of(row: dict) -> list[str]:
    """The K completions of a row, best first."""
    if "completions" in row:
        return list(row["completions"])
    return [row["completion"]] if "completion" in row else [row["chosen"], row["rejected"]]


def encode(tokenizer, row: dict) -> Group:  # noqa: ANN001
    """Prompt with the tokenizer's special tokens, completions without, EOS at their end."""
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    ends = [
        tokenizer.encode(completion, add_special_tokens=False) + [tokenizer.eos_token_id]
        for completion in completions_of(row)
    ]
    return Group(prompt, ends, row)


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return self.weight * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())


def load_model(directory: Path) -> nn.Module:
    """The stock model in float64, without dropout; RMS norms, which transformers computes in float32, too."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="sdpa", local_files_only=True
    ).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm.__get__(module)
    return model


def token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(token | all before it) for every token of one completion."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    predicted = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return predicted[range(len(completion)), completion]


def learning_rate(step: int, steps: int, peak: float, schedule: str = "constant", warmup: int = 0) -> float:
    """The rate of step 1 … `steps`: linear warm-up to `peak`, then constant or decaying to 0 after it."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    return {
        "constant": peak,
        "linear": peak * (1 - progress),
        "cosine": peak * (1 + math.cos(math.pi * progress)) / 2,
    }[schedule]


def sft() -> Loss:
    """−Σ log π over all completion tokens of the batch, divided by their number."""

    def loss(batch: Sequence[Scored], step: int) -> tuple[Tensor, dict[str, float]]:
        tokens = torch.cat([logps for scored in batch for logps in scored.token_logps])
        return -tokens.sum() / len(tokens), {}

    return loss


def preference(per_group: Callable[[Tensor, Tensor], Tensor], beta: float) -> Loss:
    """The mean over groups of a loss of (K,) log-probs and (K,) reference ones; reward β (logp − ref)."""

    def loss(batch: Sequence[Scored], step: int) -> tuple[Tensor, dict[str, float]]:
        losses = [per_group(scored.logps, scored.ref_logps) for scored in batch]
        rewards = [beta * (scored.logps - scored.ref_logps).detach() for scored in batch]
        logps = [scored.logps.detach() for scored in batch]
        margins = [float(r[0] - r[1:].mean()) for r in rewards]
        metrics = {
            "rewards/chosen": mean(float(r[0]) for r in rewards),
            "rewards/rejected": mean(float(r[1:].mean()) for r in rewards),
            "rewards/margins": mean(margins),
            "rewards/accuracies": mean(float(m > 0) for m in margins),
            "logps/chosen": mean(float(p[0]) for p in logps),
            "logps/rejected": mean(float(p[1:].mean()) for p in logps),
        }
        return sum(losses) / len(losses), metrics

    return loss


def dpo(beta: float, label_smoothing: float = 0.0) -> Loss:
    """−log of the probability, under Plackett–Luce with worths exp(β (logp − ref)), of the order given."""

    def per_group(logps: Tensor, ref_logps: Tensor) -> Tensor:
        r = beta * (logps - ref_logps)
        if len(r) == 2:
            flipped = (r[0] - r[1]).exp().log1p()
            return (1 - label_smoothing) * (r[1] - r[0]).exp().log1p() + label_smoothing * flipped
        return sum(((r[k:] - r[k]).exp().sum()).log() for k in range(len(r)))

    return preference(per_group, beta)


def mean(values) -> float:  # noqa: ANN001
    """Arithmetic mean of an iterable."""
    values = list(values)
    return math.fsum(values) / len(values)


def train(
    model_dir: Path,
    rows: Sequence[dict],
    loss: Loss,
    *,
    batch_size: int,
    steps: int,
    peak: float,
    schedule: str = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    reference_dir: Path | None = None,
) -> tuple[list[dict], nn.Module]:
    """Train on rows in file order; the metrics of every step, and the model at the end."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = load_model(model_dir)
    groups = [encode(tokenizer, row) for row in rows]
    with torch.no_grad():
        reference = load_model(reference_dir or model_dir)
        refs = [[token_logps(reference, g.prompt, c) for c in g.completions] for g in groups]
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    history = []
    for step in range(1, steps + 1):
        chosen = range((step - 1) * batch_size, step * batch_size)
        batch = [_score(model, groups[i], refs[i]) for i in chosen]
        value, metrics = loss(batch, step)
        gradients = torch.autograd.grad(value, parameters)
        norm = math.sqrt(math.fsum(float(g.square().sum()) for g in gradients))
        scale = min(1.0, max_grad_norm / (norm + 1e-6))
        rate = learning_rate(step, steps, peak, schedule, warmup)
        for parameter, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
            _adamw(parameter.data, gradient * scale, m, v, step, rate, weight_decay)
        history.append(
            {"step": step, "loss": float(value.detach()), "grad_norm": norm, "learning_rate": rate, **metrics}
        )
    return history, model


def evaluate(model_dir: Path, reference_dir: Path, model: nn.Module, rows: Sequence[dict], loss: Loss) -> dict:
    """The loss and its metrics over all rows at once, for a model that `train` returned."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    groups, reference = [encode(tokenizer, row) for row in rows], load_model(reference_dir)
    with torch.no_grad():
        refs = [[token_logps(reference, g.prompt, c) for c in g.completions] for g in groups]
        value, metrics = loss([_score(model, g, ref) for g, ref in zip(groups, refs, strict=True)], 1)
    return {"loss": float(value), **metrics}


def _score(model: nn.Module, group: Group, ref: list[Tensor]) -> Scored:
    return Scored([token_logps(model, group.prompt, c) for c in group.completions], ref, group.row)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, rate: float, decay: float) -> None:
    """Loshchilov and Hutter's decoupled weight decay on every parameter; betas (0.9, 0.999), eps 1e-8."""
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g * g)
    p.mul_(1 - rate * decay)
    p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
