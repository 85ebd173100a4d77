"""Proximal Policy Optimization (PPO), Schulman et al. 2017, arXiv 1707.06347, with a KL penalty on every token as in
Ziegler et al. 2019, arXiv 1909.08593: what the papers compare with.

    maximise  E_{x, y ~ π_θ}[r(x, y) - β log π_θ(y|x) / π_ref(y|x)]                        (DPO paper, Eq 3)

    r_t = -β (log π_old(y_t|s_t) - log π_ref(y_t|s_t)), at the last token + r(x, y)
    A_t = δ_t + λ A_{t+1},  δ_t = r_t + V_old(s_{t+1}) - V_old(s_t),  R_t = A_t + V_old(s_t)      (GAE with γ = 1)
    L_t(θ) = -min(u Â_t, clip(u, 1 - ε, 1 + ε) Â_t),  u = π_θ(y_t|s_t) / π_old(y_t|s_t)
    L_t(φ) = (V_φ(s_t) - R_t)² / 2

One step samples `--num-completions` completions of `--batch-size` prompts from π_old = π_θ, and passes over them
`--epochs` times, with `--minibatches` updates each time.

Details the equations leave open:
1. s_t is the prompt with the completion before token t. A completion that `--max-new-tokens` cuts off ends there, with
   the reward of what it says. There is no penalty for a missing EOS, as no paper names one.
2. V is a linear map of the policy's last hidden state, of which no gradient reaches the transformer. The EXO paper
   trains its critic first while the policy stands still; here that is `--value-warmup-steps`.
3. Â are the advantages of all tokens of a step, shifted and scaled to mean 0 and variance 1. A loss is the mean over
   the tokens of a minibatch.
4. π_ref is the starting model, or `--reference`.
5. `--normalise-rewards` (DPO paper, section 6: its own PPO) subtracts the mean of all rewards so far and divides by
   their standard deviation. β is then a price in standard deviations.
6. `--target-kl` (DPO paper, section 6: 3, 6, 9, 12) changes β after each step, with e = clip(KL / target - 1, -0.2,
   0.2), by β ← β (1 + gain e), where KL is that of the step's samples (Ziegler et al., Eq 4). Without it, β stays.
7. The DPO paper's own PPO samples 1,024 completions a step (C.1). The EXO paper has β = 0.1 and γ = 1 (appendix C).

`--reward` is `notices`, the oracle of the small world, or the directory of a reward model (algos/rm.py).
Rows: of any form that training reads, or with a `prompt` alone. Memory: three models (the policy, a copy that samples,
the reference), and the reward model. One process.

    python scripts/baselines/ppo.py --model sft/ --train-data prompts.jsonl --reward rm/ --output-dir ppo/
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from scripts.lab.on_policy import Record, Sampler, load_prompts, load_reward
from scripts.lab.row_files import EncodedRow
from scripts.lab.scoring import make_groups
from scripts.lab.value_head import ActorCritic
from shared.batches import Batch, Batches
from shared.command import AtLeast, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, command
from shared.distributed import Ranks, inference
from shared.export import export
from shared.groups import Groups
from shared.loading import load_policy_from, load_tokenizer
from shared.logprobs import sum_over_completions
from shared.metrics import Meter, means
from shared.model import Policy
from shared.schedule import learning_rate


@dataclass(kw_only=True)
class Args:
    beta: NonNegativeFloat = 0.1
    """price of a nat of KL to the reference, in units of reward; with `--target-kl`, the first one"""
    target_kl: PositiveFloat | None = None
    """KL per completion, in nats, that β is adapted to; default: β stays as it is"""
    kl_gain: PositiveFloat = 0.1
    """relative change of β per step for each unit of the clipped relative error of the KL"""
    normalise_rewards: bool = False
    """give the rewards of all completions so far mean 0 and standard deviation 1"""
    clip: PositiveFloat = 0.2
    """ε, the largest relative change of a token's probability that is rewarded"""
    gae_lambda: Annotated[float, AtLeast(0, at_most=1)] = 0.95
    """λ of the advantages: 1 takes the rewards that came, 0 takes what V expects after the next token"""
    value_clip: PositiveFloat | None = None
    """largest change of V within a step that is rewarded; default: the loss of V is not clipped"""
    reward: str
    """source of the rewards: `notices`, the oracle of the small world, or the directory of a reward model"""
    reference: str | None = None
    """directory or hub id of π_ref; default: the starting model"""
    model: str
    """directory or hub id of the model to start from"""
    train_data: str
    """file, directory or hub id (`path:split`) of the rows whose prompts are answered"""
    max_new_tokens: PositiveInt = 256
    """largest number of tokens of a completion, with its EOS"""

    steps: PositiveInt = 60
    """steps, each of which samples anew"""
    batch_size: PositiveInt = 64
    """prompts of a step"""
    num_completions: PositiveInt = 4
    """completions of each prompt"""
    epochs: PositiveInt = 4
    """passes over the completions of a step"""
    minibatches: PositiveInt = 4
    """updates in each pass"""
    micro_batch_tokens: PositiveInt = 8192
    """largest number of tokens in one forward pass"""
    learning_rate: Annotated[NonNegativeFloat, tyro.conf.arg(aliases=["--lr"])] = 1e-6
    """peak learning rate of AdamW"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after the warm-up: constant, or falling to 0 at the end"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate rises linearly"""
    value_learning_rate: PositiveFloat = 1e-2
    """learning rate of V, which has no schedule"""
    value_warmup_steps: NonNegativeInt = 0
    """first steps, in which V learns and the policy stands still"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are clipped to this global norm"""
    seed: Seed = 0
    """seed for the order of the prompts, for the samples and for the minibatches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward and backward pass; weights and optimizer state stay float32"""

    output_dir: str
    """directory for the log and the trained model"""


# ---------------------------------------------------------------- rewards and advantages


def token_rewards(logps: Tensor, ref_logps: Tensor, rewards: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """r_t. logps, ref_logps (N,) of π_old and π_ref, completion by completion; rewards, lengths (S,) → (N,)."""
    penalised = -beta * (logps - ref_logps)
    last = lengths.cumsum(0) - 1
    return penalised.index_add(0, last, rewards.to(penalised))


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, lam: float) -> Tensor:
    """A_t. rewards, values (N,), completion by completion; lengths (S,) → (N,). V is 0 behind a completion's end."""
    parts = lengths.tolist()
    reward_rows = pad_sequence(rewards.split(parts), batch_first=True)  # (S, T)
    value_rows = pad_sequence(values.split(parts), batch_first=True)
    next_values = F.pad(value_rows[:, 1:], (0, 1))
    deltas = reward_rows + next_values - value_rows

    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + lam * following
        advantages[:, t] = following
    is_token = torch.arange(deltas.shape[1], device=lengths.device) < lengths[:, None]
    return advantages[is_token]


def whiten(values: Tensor) -> Tensor:
    """The values (N,), shifted to mean 0 and scaled to variance 1; equal values become 0."""
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


@dataclass
class Moments:
    """Number, mean and variance of all rewards so far."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take more values into account."""
        share = values.numel() / (self.count + values.numel())
        shift = float(values.mean()) - self.mean
        within = (1 - share) * self.variance + share * float(values.var(correction=0))
        self.count += values.numel()
        self.mean += share * shift
        self.variance = within + share * (1 - share) * shift**2

    def normalise(self, values: Tensor) -> Tensor:
        """The values, with the mean 0 and the variance 1 if they are like all so far."""
        return (values - self.mean) / (math.sqrt(self.variance) or 1.0)


def adapted(beta: float, kl: float, target: float, gain: float) -> float:
    """The next β of Ziegler et al., Eq 4."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + gain * error)


# ---------------------------------------------------------------- losses


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """L_t(θ) of tokens: all (N,) → (N,)."""
    ratios = (logps - old_logps).exp()
    clipped = ratios.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """L_t(φ) of tokens: all (N,) → (N,). With a clip, the larger one of V's and of V's kept close to V_old."""
    errors = (values - returns).square()
    if clip is not None:
        close = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (close - returns).square())
    return errors / 2


class Rollout(NamedTuple):
    """The samples of a step: S completions with N tokens together. All (N,) are completion by completion."""

    groups: Groups
    lengths: Tensor  # (S,)
    token_of: Tensor  # of each token of `groups`, its number among the N
    logps: Tensor  # (N,) log π_old
    ref_logps: Tensor  # (N,) log π_ref
    values: Tensor  # (N,) V_old
    advantages: Tensor  # (N,) Â_t
    returns: Tensor  # (N,) R_t

    @property
    def kl(self) -> float:
        """The mean over the completions of log π_old(y|x) - log π_ref(y|x), which estimates KL(π_old ‖ π_ref)."""
        log_ratios = sum_over_completions(self.logps - self.ref_logps, self.lengths)
        return float(log_ratios.mean())


def objective(actor: ActorCritic, batch: Batch, rollout: Rollout, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch's tokens, and what is logged of them."""
    tokens = rollout.token_of[batch.target_index]
    old_logps = rollout.logps[tokens]
    logps, values = actor(batch)
    advantages = rollout.advantages[tokens]
    old_values = rollout.values[tokens]
    returns = rollout.returns[tokens]
    policy_losses = policy_loss(logps, old_logps, advantages, args.clip)
    value_losses = value_loss(values, old_values, returns, args.value_clip)

    changes = (logps - old_logps).exp() - 1
    metrics = {
        "policy_loss": policy_losses,
        "value_loss": value_losses,
        "clip_fraction": (changes.abs() > args.clip).float(),
    }
    return policy_losses + value_losses, metrics


def measure(
    actor: ActorCritic, reference: Policy, groups: Groups, rewards: Tensor, beta: float, args: Args, ranks: Ranks
) -> Rollout:
    """What the updates need of the samples: log-probs, values, advantages and returns. rewards: (S,)."""
    lengths = groups.offsets.diff(dim=1)[:, 1:].flatten().to(ranks.device)
    token_of = (groups.is_counted.cumsum(0) - 1).to(ranks.device)
    logps = torch.zeros(int(lengths.sum()), device=ranks.device)
    ref_logps = torch.zeros_like(logps)
    values = torch.zeros_like(logps)
    batches = Batches(groups, len(groups), args.micro_batch_tokens, None, ranks)
    with inference(actor), inference(reference):
        for batch in batches.all_batches():
            tokens = token_of[batch.target_index]
            logps[tokens], values[tokens] = actor(batch)
            ref_logps[tokens] = reference(batch)

    of_tokens = token_rewards(logps, ref_logps, rewards.to(ranks.device), lengths, beta)
    advantages = gae(of_tokens, values, lengths, args.gae_lambda)
    returns = advantages + values
    return Rollout(groups, lengths, token_of, logps, ref_logps, values, whiten(advantages), returns)


def policy_learning_rate(step: int, args: Args) -> float:
    """The policy's learning rate, which is 0 while V warms up."""
    if step <= args.value_warmup_steps:
        return 0.0
    return learning_rate(step, args.steps, args)


def line_of(rollout: Rollout, rewards: Tensor, samples: list[EncodedRow], eos_ids: list[int]) -> dict[str, float]:
    """What is logged of the samples. rewards: (S,), as they came."""
    ends = []
    for row in samples:
        ends += [completion.ids[-1] in eos_ids for completion in row.completions]
    return {
        "reward": float(rewards.mean()),
        "kl": rollout.kl,
        "entropy": -float(rollout.logps.mean()),  # an estimate, nats per token
        "length": float(rollout.lengths.double().mean()),
        "finished": sum(ends) / len(ends),
    }


def main(args: Args) -> None:
    # set-up
    record = Record(args, "ppo")
    ranks = record.ranks
    torch.manual_seed(args.seed)
    tokenizer, _ = load_tokenizer(args.model, args.reference)
    sampler = Sampler(args.model, tokenizer, args.max_new_tokens, ranks)
    rows = load_prompts(args.train_data, tokenizer, sampler.room)
    reward = load_reward(args.reward, tokenizer, rows, args.max_new_tokens, ranks)
    prompts = Batches(make_groups(rows), args.batch_size, args.micro_batch_tokens, args.seed, ranks)
    actor = ActorCritic(load_policy_from(args.model, ranks), ranks.device)
    reference = load_policy_from(args.reference or args.model, ranks)
    optimizer = torch.optim.AdamW(
        [{"params": actor.policy.parameters()}, {"params": actor.value_head.parameters()}],
        lr=args.value_learning_rate,  # the policy's own is set in each step
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        fused=True,
    )
    moments = Moments()
    beta = args.beta

    record.start()
    for step in range(1, args.steps + 1):
        # samples of the policy as it is, and their rewards
        sampler.copy_weights(actor.policy)
        asked = [rows[i] for i in prompts.groups_of(step).tolist()]
        samples = sampler.sample(asked, args.num_completions)
        rewards = reward(samples).flatten()
        scaled_rewards = rewards
        if args.normalise_rewards:
            moments.add(rewards)
            scaled_rewards = moments.normalise(rewards)
        rollout = measure(actor, reference, make_groups(samples), scaled_rewards, beta, args, ranks)

        # updates
        optimizer.param_groups[0]["lr"] = policy_learning_rate(step, args)
        minibatch_size = math.ceil(len(samples) / args.minibatches)
        minibatches = Batches(rollout.groups, minibatch_size, args.micro_batch_tokens, args.seed + step, ranks)
        meter = Meter(ranks)
        for update in range(1, args.epochs * minibatches.steps_per_epoch + 1):
            for batch in minibatches.of_step(update):
                losses, metrics = objective(actor, batch, rollout, args)
                (losses.sum() / batch.global_tokens).backward()
                meter.add(losses, metrics)
            grad_norm = clip_grad_norm_(actor.policy.parameters(), args.max_grad_norm)
            clip_grad_norm_(actor.value_head.parameters(), args.max_grad_norm)
            record.stop_if_not_finite(step, losses, grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        # after the step
        line = line_of(rollout, rewards, samples, sampler.eos_ids)
        totals, _ = meter.reduce(False)
        record.log(step, line | {"beta": beta} | means(totals))
        if args.target_kl is not None:
            beta = adapted(beta, rollout.kl, args.target_kl, args.kl_gain)

    export(actor.policy, tokenizer, record.directory, record.model_card(), ranks)


if __name__ == "__main__":
    command(main, Args)
