"""What every algorithm must reproduce: float64, one completion at a time, stock model code, no packing.

A loss sees the whole batch at once, `loss(batch, step) -> (scalar, metrics)`, with one `Scored` per group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Group:
    """Token ids of one prompt and its K completions, each with its EOS, and of samples of π_ref."""

    prompt: list[int]
    completions: list[list[int]]
    row: dict
    scores: list[list[float]]  # of each completion, one number per reward model
    samples: list[list[int]]  # with an EOS unless cut off


@dataclass
class Scored:
    """Token log-probs of the K completions under the policy and under the reference; of a reward model, one number."""

    token_logps: list[Tensor]
    ref_token_logps: list[Tensor]
    row: dict
    scores: list[list[float]]
    sample_token_logps: list[Tensor]

    @property
    def logps(self) -> Tensor:
        """(K,) sums under the policy."""
        return torch.stack([logps.sum() for logps in self.token_logps])

    @property
    def ref_logps(self) -> Tensor:
        """(K,) sums under the reference."""
        return torch.stack([logps.sum() for logps in self.ref_token_logps])


Loss = Callable[[Sequence[Scored], int], tuple[Tensor, dict[str, float]]]


def scores_of(row: dict) -> list[list[float]]:
    """The scores of a row's completions as they stand there, one list per completion; empty without scores."""
    if "score_chosen" in row:
        return [[row["score_chosen"]], [row["score_rejected"]]]
    return [score if isinstance(score, list) else [score] for score in row.get("scores", [])]


def order_of(row: dict) -> list[int]:
    """The completions of a row by falling mean score where they are a list with scores, else as they stand."""
    if "completions" not in row:
        return [0] if "completion" in row else [0, 1]
    if "scores" not in row:
        return list(range(len(row["completions"])))
    means = [mean(score) for score in scores_of(row)]
    return sorted(range(len(means)), key=lambda k: (-means[k], k))


def completions_of(row: dict) -> list[str]:
    """The K completions of a row, best first."""
    if "completions" in row:
        return [row["completions"][k] for k in order_of(row)]
    return [row["completion"]] if "completion" in row else [row["chosen"], row["rejected"]]


def encode(tokenizer, row: dict) -> Group:  # noqa: ANN001
    """Prompt with the tokenizer's special tokens, completions without, EOS at their end unless they were cut off."""

    def ids(text: str, finished: bool = True) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * finished

    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    samples = row.get("reference_samples", [])
    finished = row.get("reference_samples_finished", [True] * len(samples))
    scores = scores_of(row)
    return Group(
        prompt,
        [ids(completion) for completion in completions_of(row)],
        row,
        [scores[k] for k in order_of(row)] if scores else [],
        [ids(sample, end) for sample, end in zip(samples, finished, strict=True)],
    )


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return self.weight * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())


def load_model(directory: Path) -> nn.Module:
    """The stock model in float64, without dropout; RMS norms, which transformers computes in float32, too."""
    return _load(AutoModelForCausalLM, directory)


def load_reward_model(directory: Path) -> nn.Module:
    """The stock sequence classifier with one label in float64; without a pad token, it looks at the last one."""
    model = _load(AutoModelForSequenceClassification, directory, num_labels=1)
    model.config.pad_token_id = None
    return model


def _load(auto: type, directory: Path, **options: object) -> nn.Module:
    options = dict(dtype=torch.float64, attn_implementation="sdpa", local_files_only=True, **options)
    model = auto.from_pretrained(directory, **options).eval()
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


def reward(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(1,), what a reward model says of one completion, at its last token."""
    return model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]


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


def preference(value: Callable[[Sequence[Scored], int], Tensor], rewards: Callable[[Scored], Tensor]) -> Loss:
    """A loss of the batch with what every preference algorithm logs; `rewards` gives (K,) numbers of a group."""

    def loss(batch: Sequence[Scored], step: int) -> tuple[Tensor, dict[str, float]]:
        logged = [rewards(scored).detach() for scored in batch]
        logps = [scored.logps.detach() for scored in batch]
        margins = [float(r[0] - r[1:].mean()) for r in logged]
        metrics = {
            "rewards/chosen": mean(float(r[0]) for r in logged),
            "rewards/rejected": mean(float(r[1:].mean()) for r in logged),
            "rewards/margins": mean(margins),
            "rewards/accuracies": mean(float(m > 0) for m in margins),
            "logps/chosen": mean(float(p[0]) for p in logps),
            "logps/rejected": mean(float(p[1:].mean()) for p in logps),
        }
        return value(batch, step), metrics

    return loss


def each(per_group: Callable[[Scored], Tensor]) -> Callable[[Sequence[Scored], int], Tensor]:
    """The mean of a loss of one group."""
    return lambda batch, step: sum(per_group(scored) for scored in batch) / len(batch)


def implicit(scale: float) -> Callable[[Scored], Tensor]:
    """The reward of the papers: scale · (logp − ref)."""
    return lambda scored: scale * (scored.logps - scored.ref_logps)


def _ranking(r: Tensor) -> Tensor:
    """−log of the probability, under Plackett–Luce with worths exp(r), of the order given."""
    return sum((r[k:] - r[k]).exp().sum().log() for k in range(len(r)))


def _dpo(scored: Scored, beta: float, label_smoothing: float = 0.0) -> Tensor:
    r = implicit(beta)(scored)
    if len(r) > 2:
        return _ranking(r)
    flipped = (r[0] - r[1]).exp().log1p()
    return (1 - label_smoothing) * (r[1] - r[0]).exp().log1p() + label_smoothing * flipped


def _distill(scored: Scored, beta: float, model: int = 0) -> Tensor:
    """(r_1 − r_2 − β log [π_θ(1) π_ref(2) / (π_θ(2) π_ref(1))])² with one reward model's scores."""
    logp, ref = scored.logps, scored.ref_logps
    first, second = (score[model] for score in scored.scores)
    return (first - second - beta * (logp[0] + ref[1] - logp[1] - ref[0])) ** 2


def dpo(beta: float, label_smoothing: float = 0.0) -> Loss:
    """DPO; Plackett–Luce for K > 2."""
    return preference(each(lambda scored: _dpo(scored, beta, label_smoothing)), implicit(beta))


def token_dpo(beta: float) -> Loss:
    """log(1 + exp(Σ r_l − Σ r_w)) of the tokens' rewards, their means, and the share of those below 0."""

    def rewards(scored: Scored) -> list[Tensor]:
        return [beta * (o - r) for o, r in zip(scored.token_logps, scored.ref_token_logps, strict=True)]

    def per_group(scored: Scored) -> Tensor:
        chosen, rejected = rewards(scored)
        return (rejected.sum() - chosen.sum()).exp().log1p()

    plain = preference(each(per_group), implicit(beta))

    def loss(batch: Sequence[Scored], step: int) -> tuple[Tensor, dict[str, float]]:
        value, metrics = plain(batch, step)
        for k, name in enumerate(("chosen", "rejected")):
            tokens = [rewards(scored)[k].tolist() for scored in batch]
            metrics[f"token_rewards/{name}"] = mean(mean(r) for r in tokens)
            metrics[f"negative_tokens/{name}"] = mean(mean(x < 0 for x in r) for r in tokens)
        return value, metrics

    return loss


def ipo(tau: float) -> Loss:
    """(h − 1/(2τ))², and τ times the log-ratio as the reward."""

    def per_group(scored: Scored) -> Tensor:
        chosen, rejected = scored.logps - scored.ref_logps
        return (chosen - rejected - 1 / (2 * tau)) ** 2

    return preference(each(per_group), implicit(tau))


def exo(beta: float, epsilon: float, beta_r: float | None = None, kl: str = "reverse") -> Loss:
    """KL(q ‖ p), or −Σ p log q, of q_k ∝ (π_θ / π_ref)^β; p from mean scores over β_r, or (1−ε, ε)."""

    def per_group(scored: Scored) -> Tensor:
        worths = ((scored.logps - scored.ref_logps) * beta).exp()
        q = worths / worths.sum()
        if beta_r is None:
            p = q.new_tensor([1 - epsilon, epsilon])
        else:
            worths = q.new_tensor([mean(score) for score in scored.scores]).div(beta_r).exp()
            p = worths / worths.sum()
        return -(p * q.log()).sum() if kl == "forward" else (q * (q / p).log()).sum()

    return preference(each(per_group), implicit(beta))


def typo(lam: float, length_normalise: bool = False) -> Loss:
    """log(1 + π(l) / π(w)) − λ · the mean log-prob of the samples; the log-probs per token if asked."""

    def logps(tokens: list[Tensor]) -> Tensor:
        return torch.stack([t.sum() / (len(t) if length_normalise else 1) for t in tokens])

    def per_group(scored: Scored) -> Tensor:
        chosen, rejected = logps(scored.token_logps)
        return (rejected - chosen).exp().log1p() - lam * logps(scored.sample_token_logps).mean()

    return preference(each(per_group), lambda scored: scored.logps)


def distill_dpo(beta: float) -> Loss:
    """The squared error of the implicit reward difference."""
    return preference(each(lambda scored: _distill(scored, beta)), implicit(beta))


def gamma(step: int, steps: int, start: float, end: float) -> float:
    """`start` at step 1, `end` at the last, linear between."""
    return start + (end - start) * (step - 1) / (steps - 1)


def omega(scored: Scored) -> Tensor:
    """−Σ log π of the preference completions, or −mean log π of samples of π_ref where there are any."""
    if scored.sample_token_logps:
        return -torch.stack([logps.sum() for logps in scored.sample_token_logps]).mean()
    return -scored.logps.sum()


def pessimistic_dpo(beta: float, base: str, steps: int, start: float, end: float) -> Loss:
    """DPO or distillation plus γ Ω."""
    per_group = {"dpo": _dpo, "distill": _distill}[base]

    def value(batch: Sequence[Scored], step: int) -> Tensor:
        g = gamma(step, steps, start, end)
        return sum(per_group(scored, beta) + g * omega(scored) for scored in batch) / len(batch)

    return preference(value, implicit(beta))


def ensemble_dpo(beta: float, steps: int, start: float, end: float, seen: list[Tensor] | None = None) -> Loss:
    """The least batch mean of the distillation loss over reward models, plus γ Ω.

    `seen` collects the (B, R) losses of every step.
    """

    def value(batch: Sequence[Scored], step: int) -> Tensor:
        models = range(len(batch[0].scores[0]))
        losses = torch.stack([torch.stack([_distill(scored, beta, i) for i in models]) for scored in batch])
        if seen is not None:
            seen.append(losses.detach())
        penalty = sum(omega(scored) for scored in batch) / len(batch)
        return min(losses[:, i].mean() for i in models) + gamma(step, steps, start, end) * penalty

    return preference(value, implicit(beta))


def rm() -> Loss:
    """−log of the Plackett–Luce probability of the order, with the scores themselves as rewards."""
    return preference(each(lambda scored: _ranking(scored.logps)), lambda scored: scored.logps)


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
    rewards: bool = False,
) -> tuple[list[dict], nn.Module]:
    """Train on rows in file order; the metrics of every step, and the model at the end. `rewards`: a reward model."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = load_reward_model(model_dir) if rewards else load_model(model_dir)
    groups = [encode(tokenizer, row) for row in rows[: steps * batch_size]]
    refs = [[] for _ in groups]
    if not rewards:
        with torch.no_grad():
            reference = load_model(reference_dir or model_dir)
            refs = [[token_logps(reference, g.prompt, c) for c in g.completions] for g in groups]
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    history = []
    for step in range(1, steps + 1):
        chosen = range((step - 1) * batch_size, step * batch_size)
        batch = [_score(model, groups[i], refs[i], reward if rewards else token_logps) for i in chosen]
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


def evaluate(
    model_dir: Path, reference_dir: Path, model: nn.Module, rows: Sequence[dict], loss: Loss, step: int = 1
) -> dict:
    """The loss and its metrics over all rows at once, for a model that `train` returned, as of a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    groups, reference = [encode(tokenizer, row) for row in rows], load_model(reference_dir)
    with torch.no_grad():
        refs = [[token_logps(reference, g.prompt, c) for c in g.completions] for g in groups]
        value, metrics = loss([_score(model, g, ref) for g, ref in zip(groups, refs, strict=True)], step)
    return {"loss": float(value), **metrics}


def _score(model: nn.Module, group: Group, ref: list[Tensor], score: Callable = token_logps) -> Scored:
    ours, samples = (
        [score(model, group.prompt, ids) for ids in pieces] for pieces in (group.completions, group.samples)
    )
    return Scored(ours, ref, group.row, group.scores, samples)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, rate: float, decay: float) -> None:
    """Loshchilov and Hutter's decoupled weight decay on every parameter; betas (0.9, 0.999), eps 1e-8."""
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g * g)
    p.mul_(1 - rate * decay)
    p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
