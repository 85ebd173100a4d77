"""What policies write for held-out prompts, its rewards, and its log-ratios to a reference."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.lab import notices
from scripts.lab.row_files import EncodedRow, encode_rows
from scripts.lab.sampling import Sampling, load_sampler, prompt_room, sample_completions
from scripts.lab.scoring import load_reward_models, make_groups, over_groups
from scripts.lab.statistics import RESAMPLES, interval_text, mean_and_interval, win_rates
from scripts.lab.tables import aligned
from shared import UserError
from shared.distributed import Ranks, single_process
from shared.encode import EncodedCompletion, Encoder, completion_text
from shared.groups import Groups, full_attention_length
from shared.loading import load_policy_from, load_tokenizer
from shared.rows import Completion, Example, Prompt, Text, UserTurn

MICRO_BATCH_TOKENS = 8_192
NO_NOTICES = "notices is the oracle of the small world; for other rows, give the directory of a reward model"
MEASURES = {"reward": ".2f", "kl": ".2f", "length": ".1f", "win_rate": ".3f"}  # with the format of their numbers


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


def sample_policy(
    path: str, examples: Sequence[Example], sampling: Sampling, num_samples: int
) -> tuple[list[list[int]], Samples]:
    """Sample `num_samples` completions of each prompt from the policy in `path`; returns the prompts' ids as well."""
    model, tokenizer, eos_ids = load_sampler(path, sampling.dtype)
    max_new_tokens = sampling.max_new_tokens
    # a sequence that is longer than a layer's window would not get its log-probs from packed rows
    longest_prompt = full_attention_length(model.config) - max_new_tokens
    room = min(prompt_room(model, max_new_tokens), longest_prompt + 1)
    prompt_ids = encode_prompts(path, examples, tokenizer, room)

    completions = sample_completions(model, eos_ids, prompt_ids, num_samples, sampling, progress=f"sample {path}")
    return prompt_ids, collect_samples(prompt_ids, completions, tokenizer, eos_ids)


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


def log_ratios(
    paths: list[str], reference: str, prompts: list[list[list[int]]], samples: list[Samples]
) -> list[Tensor]:
    """log π(y|x) - log π_ref(y|x), (n, K), of each policy's own samples; exactly 0 for the reference itself.

    prompts: for each policy, the token ids of the n prompts.
    """
    groups = []
    for prompt_ids, policy_samples in zip(prompts, samples, strict=True):
        groups.append(_groups_of_samples(prompt_ids, policy_samples))

    with single_process("float32") as ranks:
        logps = []
        for path, policy_groups in zip(paths, groups, strict=True):
            logps += _logps_under(path, [policy_groups], ranks)
        ref_logps = _logps_under(reference, groups, ranks)

    ratios = []
    for policy_logps, policy_ref_logps in zip(logps, ref_logps, strict=True):
        ratios.append(policy_logps - policy_ref_logps)
    return ratios


def _groups_of_samples(prompts: list[list[int]], samples: Samples) -> Groups:
    example = prompt_example("")  # only token ids are needed
    rows = []
    for prompt, completions in zip(prompts, samples.ids, strict=True):
        encoded = [EncodedCompletion(ids, [True] * len(ids)) for ids in completions]
        rows.append(EncodedRow(example, prompt, encoded))
    return make_groups(rows)


def _logps_under(path: str, groups: list[Groups], ranks: Ranks) -> list[Tensor]:
    """log π(y|x), (n, K), of several sets of samples under the policy in `path`, which leaves memory afterwards."""
    policy = load_policy_from(path, ranks)
    return [over_groups(policy, policy.logps, samples, MICRO_BATCH_TOKENS, ranks) for samples in groups]


# ---------------------------------------------------------------- rewards


def rewards_of(reward: str, examples: Sequence[Example]) -> list[float]:
    """The reward of the only completion of each example.

    reward: `notices`, the oracle, or the directory of a reward model. Raises UserError if a prompt cannot have one.
    """
    if reward != "notices":
        return model_rewards(reward, examples)

    rewards = []
    try:
        for example in examples:
            post = plain_prompt(example.prompt)
            (text,) = example.texts
            if not isinstance(post, str) or not isinstance(text, str):
                raise UserError(f"--reward {reward}: a prompt is not a string; {NO_NOTICES}")
            rewards.append(notices.oracle(post, text))
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
    answered = []
    for i, example in enumerate(examples):
        for text, ends, ids in zip(samples.texts[i], samples.has_eos[i], samples.ids[i], strict=True):
            completion = Completion(text, ends, True, ids, samples.vocabulary)
            answered.append(dataclasses.replace(example, completions=[completion]))
    rewards = rewards_of(reward, answered)
    return torch.tensor(rewards, dtype=torch.double).view(len(examples), -1)


def plain_prompt(prompt: Prompt) -> Text | None:
    """The prompt as JSON can hold it."""
    if isinstance(prompt, UserTurn) and prompt.earlier:
        return prompt.messages()
    if isinstance(prompt, UserTurn):
        return prompt.text
    return prompt


def model_rewards(path: str, examples: Sequence[Example]) -> list[float]:
    """r(x, y) of the reward model in `path`, less its mean over its own training completions."""
    with single_process("float32") as ranks:
        models = load_reward_models([path], ranks)
        rows = encode_all(path, examples, Encoder(models.tokenizer), models.room, completions=True)
        rewards = models.rewards(rows, MICRO_BATCH_TOKENS, normalise=True)
    return [row_rewards[0][0] for row_rewards in rewards]


# ---------------------------------------------------------------- comparison


def summarise(rewards: Tensor, baseline: Tensor, ratios: Tensor, samples: Samples, seed: int) -> dict:
    """The numbers of one policy: each measure's mean and its interval.

    rewards, ratios: (n, K), of the policy's samples. baseline: (n, K'), rewards of the policy to win against.
    """
    by_prompt = {
        "reward": rewards.mean(1),
        "kl": ratios.mean(1),
        "length": lengths_of(samples).mean(1),
        "win_rate": win_rates(rewards, baseline),
    }
    numbers: dict[str, Any] = {}
    for measure, values in by_prompt.items():
        numbers[measure] = mean_and_interval(values, seed)

    has_eos = torch.tensor(samples.has_eos, dtype=torch.double)
    numbers["finished"] = float(has_eos.mean())
    numbers["rewards"] = rewards.tolist()
    return numbers


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
    rows = []
    for name, numbers in policies.items():
        cells = [name]
        for measure, form in MEASURES.items():
            cells.append(interval_text(numbers[measure], form))
        rows.append(cells)
    return rows


def comparison_table(policies: dict[str, dict]) -> str:
    """Aligned columns: each measure's mean and its 95% interval."""
    heading = ["policy", "reward", "KL (nats)", "length (tokens)", "win rate"]
    return aligned([heading, *comparison_rows(policies)])
