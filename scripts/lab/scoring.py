"""Values of completions under models and under the notices' oracle.

make_groups()      encoded rows → Groups, which the packed forward pass takes
over_groups()      one value for each completion
token_logps_of()   one log-prob for each token
RewardModels       r(x, y) of several reward models
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scripts.lab import notices
from scripts.lab.row_files import EncodedRow
from shared import UserError
from shared.batches import Batch, Batches
from shared.distributed import Ranks, inference
from shared.encode import EncodedCompletion
from shared.groups import Groups, check_fit, full_attention_length
from shared.model import PackedModel, Policy, RewardModel
from shared.rows import Example

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BATCH_SIZE = 256  # groups that are divided into micro-batches together


def make_groups(rows: list[EncodedRow]) -> Groups:
    """Rows with equally many completions as Groups of their token ids."""
    tokens: list[int] = []
    is_counted: list[bool] = []
    offsets = []
    for row in rows:
        starts = [len(tokens)]
        for piece in (EncodedCompletion(row.prompt, [False] * len(row.prompt)), *row.completions):
            tokens += piece.ids
            is_counted += piece.is_counted
            starts.append(len(tokens))
        offsets.append(starts)
    row_numbers = torch.arange(1, len(rows) + 1)
    token_ids = torch.tensor(tokens, dtype=torch.int32)
    return Groups(token_ids, torch.tensor(offsets), row_numbers, {}, torch.tensor(is_counted))


def over_groups(
    model: PackedModel, compute: Callable[[Batch], Tensor], groups: Groups, budget: int, ranks: Ranks
) -> Tensor:
    """(n, K) float64: what `compute` gives for the completions of each group.

    compute: the model or a method of it, Batch → (B, K); budget: most tokens in one forward pass.
    """
    check_fit(groups, model.lm.config, "rows")
    batches = Batches(groups, BATCH_SIZE, budget, None, ranks)
    values = torch.zeros(len(groups), groups.num_completions, device=ranks.device)
    with inference(model):
        for batch in batches.all_batches():
            values[batch.group_index] = compute(batch)
    return values.cpu().double()


def token_logps_of(policy: Policy, groups: Groups, budget: int, ranks: Ranks) -> list[list[Tensor]]:
    """log π of each token of each completion: for each group K tensors (T,), float64; NaN for context.

    budget: most tokens in one forward pass.
    """
    check_fit(groups, policy.lm.config, "rows")
    batches = Batches(groups, BATCH_SIZE, budget, None, ranks)
    logps = torch.full(groups.tokens.shape, torch.nan, device=ranks.device)
    with inference(policy):
        for batch in batches.all_batches():
            logps[batch.target_index] = policy(batch)
    logps = logps.cpu().double()

    completions = []
    for offsets in groups.offsets.tolist():
        starts = offsets[1:-1]
        ends = offsets[2:]
        completions.append([logps[start:end] for start, end in zip(starts, ends, strict=True)])
    return completions


@dataclass
class RewardModels:
    """Reward models that share one tokenizer."""

    models: list[RewardModel]
    tokenizer: "PreTrainedTokenizerBase"
    room: int  # most tokens of prompt and completion together
    ranks: Ranks

    def rewards(self, rows: list[EncodedRow], budget: int, normalise: bool) -> list[list[list[float]]]:
        """r(x, y) of each row's completions: K lists of one number per model.

        budget: most tokens in one forward pass; normalise: subtract each model's mean over its training completions.
        """
        # Groups have equally many completions, rows need not.
        indices_of_count: dict[int, list[int]] = {}  # number of completions → indices of its rows
        for index, row in enumerate(rows):
            indices_of_count.setdefault(len(row.completions), []).append(index)

        rewards: list[list[list[float]]] = [[] for _ in rows]
        for indices in indices_of_count.values():
            groups = make_groups([rows[index] for index in indices])
            values = self._rewards_of_groups(groups, budget, normalise)
            for index, scores in zip(indices, values.tolist(), strict=True):
                rewards[index] = scores
        return rewards

    def _rewards_of_groups(self, groups: Groups, budget: int, normalise: bool) -> Tensor:
        """(n, K, M) float64 of M models."""
        columns = []
        for model in self.models:
            values = over_groups(model, model, groups, budget, self.ranks)
            if normalise:
                values = values - getattr(model.lm.config, "reward_mean", 0.0)
            columns.append(values)
        return torch.stack(columns, 2)


def load_reward_models(paths: list[str], ranks: Ranks) -> RewardModels:
    """Load reward models.

    Raises UserError if one has no trained head with one label, if its tokenizer is not that of the first model, or if
    the tokenizer has no EOS.
    """
    from shared.loading import load_scorer, load_tokenizer

    models = []
    tokenizers: list[PreTrainedTokenizerBase] = []
    room = sys.maxsize
    for path in paths:
        tokenizer, config = load_tokenizer(path)
        _check_head(path, config)
        tokenizers.append(tokenizer)
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise UserError(f"model {path}: has another tokenizer than {paths[0]}; score with each by itself")
        models.append(load_scorer(path, ranks))
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or room
        room = min(room, positions, full_attention_length(config))
    if tokenizers[0].eos_token_id is None:
        raise UserError(f"model {paths[0]}: the tokenizer has no EOS token; set one so that completions can end")
    return RewardModels(models, tokenizers[0], room, ranks)


def _check_head(path: str, config: "PretrainedConfig") -> None:
    architectures = config.architectures or ()
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(f"model {path}: not a reward model, it has no trained head; train one with algos/rm.py")
    if config.num_labels != 1:
        raise UserError(f"model {path}: its head has {config.num_labels} labels; a reward model's has one")


def score_with_oracle(example: Example) -> list[float]:
    """The oracle's reward of each completion. Raises UserError if the prompt is not a notice or a text is a chat."""
    texts = [text for text in (example.prompt, *example.texts) if isinstance(text, str)]
    if len(texts) < 1 + len(example.completions):
        raise UserError(f"{example.location}: --reward notices scores plain texts, not chat messages")
    prompt, *completions = texts
    try:
        return [notices.oracle(prompt, completion) for completion in completions]
    except ValueError as error:
        raise UserError(f"{example.location}: --reward notices: {error}") from None
