"""What every algorithm must reproduce: float64, one completion at a time, stock model code, no packing.

A loss sees the whole batch at once, `loss(batch, step) -> (scalar, metrics)`, with one `ScoredGroup` per group.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

VISION_PARTS = ("vision", "visual", "projector", "connector", "embed_vision")  # of the names of parameters


@dataclass
class Group:
    """Token ids of one prompt and its K completions, each with its EOS, and of samples of π_ref."""

    prompt: list[int]
    completions: list[list[int]]
    row: dict
    scores: list[list[float]]  # of each completion, one number per reward model
    samples: list[list[int]]  # with an EOS unless truncated
    is_counted: list[list[bool]] = field(default_factory=list)  # of each completion's tokens; empty: all count

    @property
    def size(self) -> int:
        """The tokens of all its pieces."""
        pieces = [self.prompt, *self.completions, *self.samples]
        return sum(map(len, pieces))


@dataclass
class ScoredGroup:
    """Token log-probs of the K completions under the policy and under the reference; of a reward model, one number."""

    token_logps: list[Tensor]
    ref_token_logps: list[Tensor]
    scores: list[list[float]]
    sample_token_logps: list[Tensor]

    @property
    def logps(self) -> Tensor:
        """(K,) sums under the policy."""
        return _sums(self.token_logps)

    @property
    def ref_logps(self) -> Tensor:
        """(K,) sums under the reference."""
        return _sums(self.ref_token_logps)

    @property
    def sample_logps(self) -> Tensor:
        """(M,) sums over the samples under the policy."""
        return _sums(self.sample_token_logps)


Batch = Sequence[ScoredGroup]
Metrics = dict[str, float]
LossAndMetrics = tuple[Tensor, Metrics]
Encode = Callable[[PreTrainedTokenizerBase, dict], Group]
Loss = Callable[[Batch, int], LossAndMetrics]
Adapt = Callable[[nn.Module], nn.Module]
LossOfGroup = Callable[[ScoredGroup], Tensor]
Rewards = Callable[[ScoredGroup], Tensor]


def _sums(values: list[Tensor]) -> Tensor:
    return torch.stack([tokens.sum() for tokens in values])


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    values = list(values)
    return math.fsum(values) / len(values)


# ---------------------------------------------------------------- rows


def scores_of(row: dict) -> list[list[float]]:
    """The scores of a row's completions in the row's order, one list per completion; empty without scores."""
    if "score_chosen" in row:
        return [[row["score_chosen"]], [row["score_rejected"]]]
    scores = []
    for score in row.get("scores", []):
        if not isinstance(score, list):
            score = [score]
        scores.append(score)
    return scores


def completions_of(row: dict) -> list[str]:
    """The K completions of a row in the row's order."""
    if "completion" in row:
        return [row["completion"]]
    if "chosen" in row:
        return [row["chosen"], row["rejected"]]
    return row["completions"]


def order_of(row: dict) -> list[int]:
    """The completions of a row by falling mean score where they are a list with scores, else in the row's order."""
    indices = range(len(completions_of(row)))
    if "completions" not in row or "scores" not in row:
        return list(indices)
    means = [mean(scores) for scores in scores_of(row)]
    return sorted(indices, key=lambda k: (-means[k], k))


def encode(tokenizer: PreTrainedTokenizerBase, row: dict) -> Group:
    """Prompt with the tokenizer's special tokens, completions without, EOS at their end unless they were truncated."""

    def ids(text: str, has_eos: bool = True) -> list[int]:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if has_eos:
            tokens.append(tokenizer.eos_token_id)
        return tokens

    order = order_of(row)
    texts = completions_of(row)
    completions = [ids(texts[k]) for k in order]
    scores = scores_of(row)
    if scores:
        scores = [scores[k] for k in order]

    samples = row.get("reference_samples", [])
    have_eos = row.get("reference_samples_finished", [True] * len(samples))
    sample_ids = list(map(ids, samples, have_eos))

    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    return Group(prompt, completions, row, scores, sample_ids)


# ---------------------------------------------------------------- models


def load_model(directory: Path) -> nn.Module:
    """The stock model in float64, without dropout; RMS norms, which transformers computes in float32, too.

    The vision part of a multimodal model is frozen.
    """
    model = _load(model_class(directory), directory)
    for name, parameter in model.named_parameters():
        if any(part in name for part in VISION_PARTS):
            parameter.requires_grad_(False)
    return model


def model_class(directory: Path) -> Any:
    """The class of transformers that a directory names, of a model with a language model's head."""
    (architecture,) = AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, architecture)


def load_reward_model(directory: Path) -> nn.Module:
    """The stock sequence classifier with one label in float64; without a pad token, it looks at the last one."""
    model = _load(AutoModelForSequenceClassification, directory, num_labels=1)
    model.config.pad_token_id = None
    return model


def _load(auto_class: Any, directory: Path, **options: object) -> Any:
    options |= {"dtype": torch.float64, "attn_implementation": "sdpa", "experts_implementation": "eager"}
    model = auto_class.from_pretrained(directory, local_files_only=True, **options)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module, _offset_of_weight(module))
    return model.eval()


def _rms_norm(module: Any, offset: int, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    mean_square = x.square().mean(-1, keepdim=True)
    normed = x / (mean_square + eps).sqrt()
    weight = getattr(module, "weight", None)
    if weight is None:
        return normed
    return (offset + weight) * normed


@torch.no_grad()
def _offset_of_weight(module: Any) -> int:
    """What a norm adds to its weight: Gemma's adds 1, so that weights of 0 change nothing."""
    if getattr(module, "weight", None) is None:
        return 0
    x = torch.linspace(-1, 1, len(module.weight), dtype=torch.float64)
    expected = module(x)
    for offset in (0, 1):
        if torch.allclose(_rms_norm(module, offset, x), expected, atol=1e-4):
            return offset
    raise AssertionError(f"{type(module).__name__} is another norm")


def token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(token | all before it) for every token of one completion."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    predicted = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return predicted[range(len(completion)), completion]


def completion_logps(model: nn.Module, group: Group) -> list[Tensor]:
    """log π of each completion's tokens that count, given all before them."""
    logps = [token_logps(model, group.prompt, ids) for ids in group.completions]
    if group.is_counted:
        masks = map(torch.tensor, group.is_counted)
        logps = [values[mask] for values, mask in zip(logps, masks, strict=True)]
    return logps


def reward(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(1,), the reward of one completion, read at its last token."""
    ids = torch.tensor([prompt + completion])
    return model(input_ids=ids, use_cache=False).logits[0]


# ---------------------------------------------------------------- losses


def sft() -> Loss:
    """−Σ log π over all completion tokens of the batch, divided by their number."""

    def loss(batch: Batch, step: int) -> LossAndMetrics:
        tokens = torch.cat([logps for group in batch for logps in group.token_logps])
        return -tokens.sum() / len(tokens), {}

    return loss


def mean_loss(loss_of_group: LossOfGroup, rewards: Rewards) -> Loss:
    """The mean of a loss of one group, and what every preference algorithm logs."""

    def loss(batch: Batch, step: int) -> LossAndMetrics:
        losses = [loss_of_group(group) for group in batch]
        return torch.stack(losses).mean(), preference_metrics(batch, rewards)

    return loss


def preference_metrics(batch: Batch, rewards: Rewards) -> Metrics:
    """What every preference algorithm logs; `rewards` gives (K,) numbers of a group."""
    chosen, rejected = _chosen_and_rejected([rewards(group) for group in batch])
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    chosen_logps, rejected_logps = _chosen_and_rejected([group.logps for group in batch])
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(margin > 0 for margin in margins),
        "logps/chosen": mean(chosen_logps),
        "logps/rejected": mean(rejected_logps),
    }


def _chosen_and_rejected(values: list[Tensor]) -> tuple[list[float], list[float]]:
    """Of each group, the number of its first completion and the mean of the others'."""
    chosen = []
    rejected = []
    for row in values:
        first, *others = row.detach().tolist()
        chosen.append(first)
        rejected.append(mean(others))
    return chosen, rejected


def log_ratios(group: ScoredGroup) -> Tensor:
    """(K,) ρ = log π_θ(y|x) − log π_ref(y|x)."""
    return group.logps - group.ref_logps


def implicit_rewards(group: ScoredGroup, scale: float) -> Tensor:
    """(K,) the reward of the papers, scale · ρ."""
    return scale * log_ratios(group)


def implicit(scale: float) -> Rewards:
    """`implicit_rewards` of a known scale."""
    return partial(implicit_rewards, scale=scale)


def plackett_luce(rewards: Tensor) -> Tensor:
    """−log of the probability, under Plackett–Luce with worths exp(r), of the order given."""
    terms = []
    for k, reward_of_best in enumerate(rewards):
        remaining = rewards[k:]
        relative_worths = (remaining - reward_of_best).exp()
        terms.append(relative_worths.sum().log())
    return torch.stack(terms).sum()


def bradley_terry(margin: Tensor) -> Tensor:
    """−log σ(margin), as log(1 + exp(−margin))."""
    return (-margin).exp().log1p()


def dpo(beta: float, label_smoothing: float = 0.0) -> Loss:
    """DPO; Plackett–Luce for K > 2."""
    loss_of_group = partial(dpo_of_group, beta=beta, label_smoothing=label_smoothing)
    return mean_loss(loss_of_group, implicit(beta))


def dpo_of_group(group: ScoredGroup, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β h), and with a wrong label −log σ(−β h)."""
    rewards = implicit_rewards(group, beta)
    if len(rewards) > 2:
        return plackett_luce(rewards)
    margin = rewards[0] - rewards[1]
    right = bradley_terry(margin)
    wrong = bradley_terry(-margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def token_dpo(beta: float) -> Loss:
    """log(1 + exp(Σ r_l − Σ r_w)) of the tokens' rewards, their means, and the share of those below 0."""
    sequence_loss = mean_loss(partial(token_dpo_of_group, beta=beta), implicit(beta))

    def loss(batch: Batch, step: int) -> LossAndMetrics:
        value, metrics = sequence_loss(batch, step)
        for k, side in enumerate(("chosen", "rejected")):
            rewards = [token_rewards(group, beta)[k].tolist() for group in batch]
            shares = [mean(reward < 0 for reward in completion) for completion in rewards]
            metrics[f"token_rewards/{side}"] = mean(map(mean, rewards))
            metrics[f"negative_tokens/{side}"] = mean(shares)
        return value, metrics

    return loss


def token_rewards(group: ScoredGroup, beta: float) -> list[Tensor]:
    """β log π_θ / π_ref of the tokens of each completion."""
    pairs = zip(group.token_logps, group.ref_token_logps, strict=True)
    return [beta * (logps - ref_logps) for logps, ref_logps in pairs]


def token_dpo_of_group(group: ScoredGroup, beta: float) -> Tensor:
    """DPO of the sums of token rewards."""
    chosen, rejected = token_rewards(group, beta)
    return bradley_terry(chosen.sum() - rejected.sum())


def ipo(tau: float) -> Loss:
    """(h − 1/(2τ))², and τ times the log-ratio as the reward."""
    return mean_loss(partial(ipo_of_group, tau=tau), implicit(tau))


def ipo_of_group(group: ScoredGroup, tau: float) -> Tensor:
    """(h − 1/(2τ))²."""
    chosen, rejected = log_ratios(group)
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def exo(beta: float, epsilon: float, beta_r: float | None = None, kl: str = "reverse") -> Loss:
    """KL(q ‖ p), or −Σ p log q, of q_k ∝ (π_θ / π_ref)^β; p from mean scores over β_r, or (1−ε, ε)."""

    def loss_of_group(group: ScoredGroup) -> Tensor:
        q = _normalised(implicit_rewards(group, beta).exp())
        if beta_r is None:
            p = q.new_tensor([1 - epsilon, epsilon])
        else:
            means = q.new_tensor([mean(scores) for scores in group.scores])
            p = _normalised((means / beta_r).exp())
        if kl == "forward":
            return -(p * q.log()).sum()
        return (q * (q / p).log()).sum()

    return mean_loss(loss_of_group, implicit(beta))


def _normalised(worths: Tensor) -> Tensor:
    return worths / worths.sum()


def typo(lam: float, length_normalise: bool = False) -> Loss:
    """log(1 + π(l) / π(w)) − λ · the mean log-prob of the samples; the log-probs per token if asked."""

    def loss_of_group(group: ScoredGroup) -> Tensor:
        logps = group.logps
        sample_logps = group.sample_logps
        if length_normalise:
            logps = torch.stack([tokens.mean() for tokens in group.token_logps])
            sample_logps = torch.stack([tokens.mean() for tokens in group.sample_token_logps])
        return bradley_terry(logps[0] - logps[1]) - lam * sample_logps.mean()

    return mean_loss(loss_of_group, log_probabilities)


def log_probabilities(group: ScoredGroup) -> Tensor:
    """(K,) log π_θ(y|x) as the reward; of a reward model, its rewards."""
    return group.logps


def distill_dpo(beta: float) -> Loss:
    """The squared error of the implicit reward difference."""
    return mean_loss(partial(distill_of_group, beta=beta), implicit(beta))


def distill_of_group(group: ScoredGroup, beta: float, reward_model: int = 0) -> Tensor:
    """(r_1 − r_2 − β log [π_θ(1) π_ref(2) / (π_θ(2) π_ref(1))])² with one reward model's scores."""
    logps = group.logps
    ref_logps = group.ref_logps
    log_odds = logps[0] + ref_logps[1] - logps[1] - ref_logps[0]
    first, second = (scores[reward_model] for scores in group.scores)
    return (first - second - beta * log_odds) ** 2


def gamma(step: int, steps: int, start: float, end: float) -> float:
    """`start` at step 1, `end` at the last, linear between."""
    return start + (end - start) * (step - 1) / (steps - 1)


def omega(batch: Batch) -> Tensor:
    """The mean of −Σ log π of the preference completions, or of −mean log π of the samples where there are any."""
    terms = []
    for group in batch:
        if group.sample_token_logps:
            terms.append(-group.sample_logps.mean())
        else:
            terms.append(-group.logps.sum())
    return torch.stack(terms).mean()


def pessimistic_dpo(beta: float, base: str, steps: int, start: float, end: float) -> Loss:
    """DPO or distillation plus γ Ω."""
    base_loss = {"dpo": dpo, "distill": distill_dpo}[base](beta)

    def loss(batch: Batch, step: int) -> LossAndMetrics:
        value, metrics = base_loss(batch, step)
        return value + gamma(step, steps, start, end) * omega(batch), metrics

    return loss


def ensemble_dpo(beta: float, steps: int, start: float, end: float, seen: list[Tensor] | None = None) -> Loss:
    """The least batch mean of the distillation loss over reward models, plus γ Ω.

    `seen` collects the (B, R) losses of every step.
    """

    def loss(batch: Batch, step: int) -> LossAndMetrics:
        losses_of_models = []
        for reward_model in range(len(batch[0].scores[0])):
            losses = [distill_of_group(group, beta, reward_model) for group in batch]
            losses_of_models.append(torch.stack(losses))
        if seen is not None:
            seen.append(torch.stack(losses_of_models, 1).detach())

        least = min(losses.mean() for losses in losses_of_models)
        value = least + gamma(step, steps, start, end) * omega(batch)
        return value, preference_metrics(batch, implicit(beta))

    return loss


def rm() -> Loss:
    """−log of the Plackett–Luce probability of the order, with the scores themselves as rewards."""
    return mean_loss(rm_of_group, log_probabilities)


def rm_of_group(group: ScoredGroup) -> Tensor:
    """−log of the Plackett–Luce probability of the order."""
    return plackett_luce(log_probabilities(group))


# ---------------------------------------------------------------- training


def as_it_is(model: nn.Module) -> nn.Module:
    """No adapter."""
    return model


def learning_rate(step: int, steps: int, peak: float, schedule: str = "constant", warmup: int = 0) -> float:
    """The rate of step 1 … `steps`: linear warm-up to `peak`, then constant or decaying to 0 after it."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak


class AdamW:
    """Adam with decoupled weight decay on every parameter (Loshchilov and Hutter); betas (0.9, 0.999), eps 1e-8."""

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float):
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.first_moments = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second_moments = [torch.zeros_like(parameter) for parameter in self.parameters]

    def update(self, gradients: Iterable[Tensor], step: int, rate: float) -> None:
        """Step 1, 2, …."""
        everything = zip(self.parameters, gradients, self.first_moments, self.second_moments, strict=True)
        for parameter, gradient, first, second in everything:
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            unbiased_first = first / (1 - 0.9**step)
            unbiased_second = second / (1 - 0.999**step)
            parameter.data.mul_(1 - rate * self.weight_decay)
            parameter.data.sub_(rate * unbiased_first / (unbiased_second.sqrt() + 1e-8))


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
    encode_row: Encode = encode,
    adapt: Adapt = as_it_is,
) -> tuple[list[dict], nn.Module]:
    """Train on rows in file order; the metrics of every step, and the model at the end.

    rewards: a reward model. adapt: what makes the model that is trained of the one that is loaded; π_ref is the same.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    groups = [encode_row(tokenizer, row) for row in rows[: steps * batch_size]]
    if rewards:
        model = adapt(load_reward_model(model_dir))
        ref_token_logps: list[list[Tensor]] = [[] for _ in groups]
    else:
        model = adapt(load_model(model_dir))
        ref_token_logps = _reference_logps(reference_dir or model_dir, groups, adapt)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, weight_decay)
    history = []
    for step in range(1, steps + 1):
        batch = []
        for i in range((step - 1) * batch_size, step * batch_size):
            batch.append(_score(model, groups[i], ref_token_logps[i], rewards))
        value, metrics = loss(batch, step)

        gradients = torch.autograd.grad(value, optimizer.parameters)
        squares = [float(gradient.square().sum()) for gradient in gradients]
        grad_norm = math.sqrt(math.fsum(squares))
        clipping = min(1.0, max_grad_norm / (grad_norm + 1e-6))
        rate = learning_rate(step, steps, peak, schedule, warmup)
        optimizer.update([gradient * clipping for gradient in gradients], step, rate)

        line = {"step": step, "loss": float(value.detach()), "grad_norm": grad_norm, "learning_rate": rate}
        history.append({**line, **metrics})
    return history, model


def evaluate(
    model_dir: Path, reference_dir: Path, model: nn.Module, rows: Sequence[dict], loss: Loss, step: int = 1
) -> Metrics:
    """The loss and its metrics over all rows at once, for a model that `train` returned, as of a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    groups = [encode(tokenizer, row) for row in rows]
    ref_token_logps = _reference_logps(reference_dir, groups)
    batch = []
    with torch.no_grad():
        for group, ref in zip(groups, ref_token_logps, strict=True):
            batch.append(_score(model, group, ref))
        value, metrics = loss(batch, step)
    return {"loss": float(value), **metrics}


@torch.no_grad()
def _reference_logps(reference_dir: Path, groups: Sequence[Group], adapt: Adapt = as_it_is) -> list[list[Tensor]]:
    reference = adapt(load_model(reference_dir))
    return [completion_logps(reference, group) for group in groups]


def _score(model: nn.Module, group: Group, ref_token_logps: list[Tensor], rewards: bool = False) -> ScoredGroup:
    if rewards:
        completions = [reward(model, group.prompt, ids) for ids in group.completions]
    else:
        completions = completion_logps(model, group)
    samples = [token_logps(model, group.prompt, ids) for ids in group.samples]
    return ScoredGroup(completions, ref_token_logps, group.scores, samples)
