"""What policies write for held-out prompts, its rewards, and its divergence from a reference."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.lab import notices
from scripts.lab.best_of import best_of
from scripts.lab.divergence import Divergence, divergence_of_groups
from scripts.lab.row_files import EncodedRow, encode_rows
from scripts.lab.sampling import Sampling, load_sampler, prompt_room, sample_completions
from scripts.lab.scoring import load_reward_models, make_groups
from scripts.lab.statistics import RESAMPLES, interval_text, mean_and_interval, win_rates
from scripts.lab.tables import aligned
from shared import UserError
from shared.distributed import single_process
from shared.encode import EncodedCompletion, Encoder, completion_text
from shared.groups import Groups, full_attention_length
from shared.loading import load_policy_from, load_tokenizer
from shared.rows import Completion, Example, Prompt, Text, UserTurn

MICRO_BATCH_TOKENS = 8_192
REWARD_DIGITS = 4  # decimals of a reward model's reward
NO_NOTICES = "notices is the oracle of the small world; for other rows, give the directory of a reward model"
MEASURES = ("reward", "kl", "length", "win_rate")  # what every comparison has
# the columns of the table that evaluation prints, and their formats
COLUMNS = {
    "reward": ("reward", ".2f"),
    "selector_reward": ("selector's reward", ".2f"),
    "kl": ("KL (nats)", ".2f"),
    "step_kl": ("KL by steps", ".2f"),
    "kl_bound": ("KL at most", ".2f"),
    "length": ("length (tokens)", ".1f"),
    "win_rate": ("win rate", ".3f"),
    "win_rate_rows": ("win rate, rows", ".3f"),
}


@dataclass
class Samples:
    """What one policy wrote: n prompts with K completions each."""

    ids: list[list[list[int]]]  # token ids of each completion, with the EOS if it was sampled
    texts: list[list[str]]
    has_eos: list[list[bool]]
    vocabulary: str  # a hash of what the ids mean


# ---------------------------------------------------------------- the policies of a command line


def named_policies(policies: tuple[str, ...]) -> dict[str, str]:
    """Arguments of the form NAME=DIR as a dictionary. Raises UserError for another form or a repeated name."""
    directories: dict[str, str] = {}
    for argument in policies:
        name, _, directory = argument.partition("=")
        if not name or not directory or name in directories:
            raise UserError(f"--policies {argument}: must be NAME=DIR, each name once")
        directories[name] = directory
    return directories


def check_tokenizers(paths: list[str], reference: str) -> None:
    """Raises UserError if a policy's vocabulary is not that of the reference: their log-ratio would mean nothing."""
    tokenizer, _ = load_tokenizer(reference)
    vocabulary = tokenizer.get_vocab()
    for path in paths:
        tokenizer, _ = load_tokenizer(path)
        if tokenizer.get_vocab() != vocabulary:
            raise UserError(f"--policies {path}: has another tokenizer than the reference {reference}")


def evaluation_settings(args: Any, reference: str, num_prompts: int) -> dict:
    """All arguments as JSON can hold them, the number of prompts that there were, and the versions."""
    import transformers

    settings = dataclasses.asdict(args)
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = str(value)

    settings["reference"] = reference
    settings["num_prompts"] = num_prompts
    settings["resamples"] = RESAMPLES
    settings["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return settings


# ---------------------------------------------------------------- token ids


def prompt_example(prompt: Prompt, *texts: str) -> Example:
    """An example of a prompt and finished completions."""
    return Example("", 0, prompt, [Completion(text) for text in texts])


def encode_prompts(source: str, examples: Sequence[Example], tokenizer: Any, room: int) -> list[list[int]]:
    """The token ids of prompts of less than `room` tokens. Raises UserError, naming `source`, if one is unusable."""
    rows = encode_all(source, examples, Encoder(tokenizer), room, completions=False)
    return [row.prompt for row in rows]


def encode_all(
    source: str, examples: Sequence[Example], encoder: Encoder, room: int, completions: bool
) -> list[EncodedRow]:
    """The token ids of prompts and, on request, their completions, at most `room` for a prompt with each of them.

    Raises UserError, naming `source`, if an example is unusable: policies are compared on the same prompts.
    """
    rows = list(encode_rows(examples, encoder, room, completions))
    if encoder.counts.dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in encoder.counts.dropped.items())
        raise UserError(f"{source}: cannot use all prompts: {reasons}")
    return rows


# ---------------------------------------------------------------- samples


@dataclass
class Sampler:
    """A policy that writes completions of the same prompts as often as it is asked."""

    path: str
    model: Any
    tokenizer: Any
    eos_ids: list[int]
    prompts: list[list[int]]  # token ids

    def draw(self, sampling: Sampling, num_samples: int) -> Samples:
        """`num_samples` completions of each prompt."""
        label = f"sample {self.path}"
        completions = sample_completions(self.model, self.eos_ids, self.prompts, num_samples, sampling, progress=label)
        return collect_samples(self.prompts, completions, self.tokenizer, self.eos_ids)


def open_sampler(path: str, examples: Sequence[Example], sampling: Sampling) -> Sampler:
    """The policy in `path`, with the examples' prompts. Raises UserError if it cannot answer one of them."""
    model, tokenizer, eos_ids = load_sampler(path, sampling.dtype)
    max_new_tokens = sampling.max_new_tokens
    # a sequence that is longer than a layer's window would not get its log-probs from packed rows
    longest_prompt = full_attention_length(model.config) - max_new_tokens
    room = min(prompt_room(model, max_new_tokens), longest_prompt + 1)
    prompts = encode_prompts(path, examples, tokenizer, room)
    return Sampler(path, model, tokenizer, eos_ids, prompts)


def sample_policy(
    path: str, examples: Sequence[Example], sampling: Sampling, num_samples: int
) -> tuple[list[list[int]], Samples]:
    """Sample `num_samples` completions of each prompt from the policy in `path`; returns the prompts' ids as well."""
    sampler = open_sampler(path, examples, sampling)
    return sampler.prompts, sampler.draw(sampling, num_samples)


def collect_samples(
    prompts: list[list[int]], completions: Iterable[list[list[int]]], tokenizer: Any, eos_ids: list[int]
) -> Samples:
    """The token ids of each prompt's completions, with their texts and whether they have an EOS."""
    samples = Samples([], [], [], Encoder(tokenizer).vocabulary)
    for prompt, prompt_completions in zip(prompts, completions, strict=True):
        texts = []
        has_eos = []
        for ids in prompt_completions:
            texts.append(completion_text(tokenizer, prompt, ids))
            has_eos.append(ids[-1] in eos_ids)

        samples.ids.append(prompt_completions)
        samples.texts.append(texts)
        samples.has_eos.append(has_eos)
    return samples


def divergences(
    paths: list[str],
    reference: str,
    prompts: list[list[list[int]]],
    samples: list[list[Samples]],
    temperatures: Sequence[float] = (1.0,),
) -> list[list[Divergence]]:
    """The divergence of each policy's own samples at each temperature; exactly 0 for the reference itself at 1.

    prompts: for each policy, the token ids of the n prompts. samples: for each policy, those at each temperature. The
    reference and one policy are in memory together.
    """
    of_policies = []
    with single_process("float32") as ranks:
        reference_model = load_policy_from(reference, ranks)
        for path, prompt_ids, policy_samples in zip(paths, prompts, samples, strict=True):
            policy = reference_model
            if path != reference:
                policy = load_policy_from(path, ranks)
            models = (policy, reference_model)

            at_temperatures = []
            for temperature, drawn in zip(temperatures, policy_samples, strict=True):
                groups = _groups_of_samples(prompt_ids, drawn)
                divergence = divergence_of_groups(*models, groups, temperature, MICRO_BATCH_TOKENS, ranks)
                at_temperatures.append(divergence)
            of_policies.append(at_temperatures)
    return of_policies


def _groups_of_samples(prompts: list[list[int]], samples: Samples) -> Groups:
    example = prompt_example("")  # only token ids are needed
    rows = []
    for prompt, completions in zip(prompts, samples.ids, strict=True):
        encoded = [EncodedCompletion(ids, [True] * len(ids)) for ids in completions]
        rows.append(EncodedRow(example, prompt, encoded))
    return make_groups(rows)


# ---------------------------------------------------------------- rewards


def rewards_of(reward: str, examples: Sequence[Example]) -> list[float]:
    """The reward of the only completion of each example, as `completion_rewards` gives it."""
    return [value for (value,) in completion_rewards(reward, examples)]


def completion_rewards(reward: str, examples: Sequence[Example]) -> list[list[float]]:
    """The reward of each completion of each example.

    reward: `notices`, the oracle, or the directory of a reward model. Raises UserError if a prompt cannot have one.
    """
    if reward != "notices":
        return model_rewards(reward, examples)

    rewards = []
    try:
        for example in examples:
            post = plain_prompt(example.prompt)
            texts = [text for text in example.texts if isinstance(text, str)]
            if not isinstance(post, str) or len(texts) < len(example.texts):
                raise UserError(f"--reward {reward}: a prompt is not a string; {NO_NOTICES}")
            rewards.append([notices.oracle(post, text) for text in texts])
    except ValueError as error:
        raise UserError(f"--reward {reward}: {error}; {NO_NOTICES}") from None
    return rewards


def check_rewards(reward: str, examples: Sequence[Example]) -> None:
    """Raises UserError if there are no rewards, before minutes are spent on sampling."""
    if reward != "notices":
        examples = examples[:1]  # enough to load a reward model; the oracle must be able to read every prompt
    rewards_of(reward, [dataclasses.replace(example, completions=[Completion("")]) for example in examples])


def rewards_of_samples(reward: str, examples: Sequence[Example], samples: Samples) -> Tensor:
    """The reward of each sample of the examples' prompts, (n, K), float64."""
    (rewards,) = rewards_of_sets(reward, examples, [samples])
    return rewards


def rewards_of_sets(reward: str, examples: Sequence[Example], sets: Sequence[Samples]) -> list[Tensor]:
    """The rewards of several sets of samples of the same prompts, (n, K) each; a reward model is loaded once."""
    answered = []
    for samples in sets:
        for i, example in enumerate(examples):
            completions = []
            for text, ends, ids in zip(samples.texts[i], samples.has_eos[i], samples.ids[i], strict=True):
                completions.append(Completion(text, ends, True, ids, samples.vocabulary))
            answered.append(dataclasses.replace(example, completions=completions))

    rewards = completion_rewards(reward, answered)
    tensors = []
    for start in range(0, len(rewards), len(examples)):
        rewards_of_set = rewards[start : start + len(examples)]
        tensors.append(torch.tensor(rewards_of_set, dtype=torch.double))
    return tensors


def rewards_of_rows(reward: str, examples: Sequence[Example]) -> Tensor:
    """The reward of each row's chosen completion, (n, 1), float64. Raises UserError if a row has none."""
    answered = []
    for example in examples:
        chosen = chosen_of(example)
        answered.append(dataclasses.replace(example, completions=[chosen]))
    rewards = rewards_of(reward, answered)
    return torch.tensor(rewards, dtype=torch.double).unsqueeze(1)


def chosen_of(example: Example) -> Completion:
    """The preferred completion: the first one, or that with the highest sum of scores if only scores rank them."""
    completions = example.completions
    if not completions:
        raise UserError(f"{example.location}: --against-rows needs a completion; the row has a prompt alone")
    if example.ranked and example.scores == [[0.0]]:
        raise UserError(f"{example.location}: --against-rows needs a chosen completion; the label of this one is false")
    if example.ranked or not example.scores:
        return completions[0]
    sums = [math.fsum(scores) for scores in example.scores]
    best = sums.index(max(sums))
    return completions[best]


def plain_prompt(prompt: Prompt) -> Text | None:
    """The prompt as JSON can hold it."""
    if isinstance(prompt, UserTurn) and prompt.earlier:
        return prompt.messages()
    if isinstance(prompt, UserTurn):
        return prompt.text
    return prompt


def model_rewards(path: str, examples: Sequence[Example]) -> list[list[float]]:
    """r(x, y) of each completion of each example by the reward model in `path`, less its training completions' mean.

    Rounded to REWARD_DIGITS, so that equal completions tie: their float32 values depend on what they are packed with.
    """
    with single_process("float32") as ranks:
        models = load_reward_models([path], ranks)
        rows = encode_all(path, examples, Encoder(models.tokenizer), models.room, completions=True)
        rewards = models.rewards(rows, MICRO_BATCH_TOKENS, normalise=True)
    return [[round(value, REWARD_DIGITS) for (value,) in row_rewards] for row_rewards in rewards]


# ---------------------------------------------------------------- comparison


@dataclass
class Outcome:
    """What is known of the samples of one policy."""

    samples: Samples
    rewards: Tensor  # (n, K)
    divergence: Divergence | None = None  # None if the distribution that was sampled is not known
    selector_rewards: Tensor | None = None  # (n, K), by which the best of N are selected, if not by the rewards


@dataclass
class Opponents:
    """The rewards that a policy is to win against."""

    baseline: Tensor  # (n, K'), of the first policy's samples
    chosen: Tensor | None = None  # (n, 1), of the rows' chosen completions


def summarise(outcome: Outcome, opponents: Opponents, seed: int) -> dict:
    """The numbers of one policy: each measure's mean and its interval, and the values of each sample."""
    samples = outcome.samples
    by_sample = {"reward": outcome.rewards, "length": lengths_of(samples)}
    if outcome.divergence is not None:
        by_sample["kl"] = outcome.divergence.log_ratios
        by_sample["step_kl"] = outcome.divergence.step_kls
    numbers: dict[str, Any] = {}
    measured = by_sample | wins_of_samples(outcome.rewards, opponents)
    for measure, values in measured.items():
        by_prompt = values.mean(1)
        numbers[measure] = mean_and_interval(by_prompt, seed)

    has_eos = torch.tensor(samples.has_eos, dtype=torch.double)
    numbers["finished"] = float(has_eos.mean())
    if outcome.selector_rewards is not None:
        by_sample["selector_reward"] = outcome.selector_rewards
    for measure, values in by_sample.items():
        numbers[f"{measure}s"] = values.tolist()
    return numbers


def wins_of_samples(rewards: Tensor, opponents: Opponents) -> dict[str, Tensor]:
    """For each sample, its win rate against the first policy's samples and, if there are any, the rows' completions.

    rewards: (n, K). Values: (n, K).
    """
    wins = {"win_rate": _wins(rewards, opponents.baseline)}
    if opponents.chosen is not None:
        wins["win_rate_rows"] = _wins(rewards, opponents.chosen)
    return wins


def _wins(rewards: Tensor, others: Tensor) -> Tensor:
    """(n, K), (n, K') → (n, K)."""
    num_samples = rewards.shape[1]
    single = rewards.reshape(-1, 1)
    repeated = others.repeat_interleave(num_samples, 0)
    return win_rates(single, repeated).view_as(rewards)


def summarise_best_of(outcome: Outcome, opponents: Opponents, sizes: Sequence[int], seed: int) -> dict[str, dict]:
    """The numbers of the best of N samples, for each N of `sizes`.

    They have no win rate against the policy's own samples, among which the N are.
    """
    scores = outcome.rewards
    values = {"reward": outcome.rewards, "length": lengths_of(outcome.samples)}
    if outcome.selector_rewards is not None:
        scores = outcome.selector_rewards
        values["selector_reward"] = scores

    values |= wins_of_samples(outcome.rewards, opponents)
    if opponents.baseline is outcome.rewards:
        del values["win_rate"]
    return {str(size): best_of(scores, size, values, seed) for size in sizes}


def lengths_of(samples: Samples) -> Tensor:
    """The number of tokens of each sample, the EOS included: (n, K), float64."""
    lengths = []
    for completions in samples.ids:
        lengths.append([len(ids) for ids in completions])
    return torch.tensor(lengths, dtype=torch.double)


def comparison_rows(policies: dict[str, dict]) -> list[list[str]]:
    """A line of cells for each policy: its name, and each of MEASURES with its interval.

    policies: for each name, the numbers that `summarise` gives.
    """
    return [_cells(name, numbers, MEASURES) for name, numbers in policies.items()]


def comparison_table(policies: dict[str, dict]) -> str:
    """Aligned columns: each measure's mean and its 95% interval.

    policies: for each name, numbers of `summarise` or of `summarise_best_of`. A measure that only some of them have is
    left blank for the others.
    """
    shown = []
    heading = ["policy"]
    for measure, (title, _) in COLUMNS.items():
        if any(measure in numbers for numbers in policies.values()):
            shown.append(measure)
            heading.append(title)

    lines = [heading]
    for name, numbers in policies.items():
        line = _cells(name, numbers, shown)
        lines.append(line)
    return aligned(lines)


def _cells(name: str, numbers: dict, measures: Sequence[str]) -> list[str]:
    cells = [name]
    for measure in measures:
        _, form = COLUMNS[measure]
        number = numbers.get(measure, "")
        if isinstance(number, dict):
            number = interval_text(number, form)
        elif isinstance(number, float):
            number = format(number, form)
        cells.append(number)
    return cells
