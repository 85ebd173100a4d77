"""What an algorithm requires of rows, and the rows as tokenised groups, cached on disk."""

import hashlib
import json
import math
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from shared import UserError
from shared.distributed import from_main
from shared.encode import EncodedCompletion, EncodedExample, Encoder, TokenIds
from shared.files import bytes_of, cache_directory, is_complete, read_tensors, sha256_of, write_tensors
from shared.rows import Counts, Dropped, Example, Text, UserTurn, assistant_messages, is_blank, parse_rows
from shared.sources import source_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHUNK = 1024  # examples that are tokenised together
SHOWN = 300  # characters of a prompt and of a completion that are printed
# what the content of a cached file depends on
CODE = ("sources.py", "rows.py", "control_strings.py", "chat.py", "encode.py", "groups.py")


@dataclass(frozen=True)
class Requires:
    """What an algorithm requires of every row.

    completions: "first", the preferred one; "pair", exactly two; "ranking", two or more.
    scores: the scores are targets, so that completions with equal scores or texts are not dropped.
    samples: completions sampled from π_ref; "optional" takes them where the rows have them.
    turns: "all" takes what the assistant says in the prompt, and all after it, as part of the completion.
    """

    completions: Literal["first", "pair", "ranking"] = "ranking"
    scores: bool = False
    samples: Literal["unused", "optional", "required"] = "unused"
    turns: Literal["last", "all"] = "last"


COMPLETIONS_IN_WORDS = {
    "first": "a completion",
    "pair": "two completions, chosen and rejected",
    "ranking": "chosen and rejected, or ranked completions",
}


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass
class Groups:
    """n tokenised groups of one prompt and C completions, kept as one flat tensor of ids.

    Group i is tokens[offsets[i, 0] : offsets[i, -1]], laid out [prompt, completion 1, ..., completion C];
    offsets[i, 1 + k] is where completion k starts. The K completions of the row come first, preferred first. The
    samples of π_ref follow, if there are any.
    """

    tokens: Tensor  # (total,) int32
    offsets: Tensor  # (n, C + 2) int64
    row_numbers: Tensor  # (n,) int64, the number of each group's row in its source, from 1
    report: dict  # how many rows were read, kept, dropped and truncated
    is_counted: Tensor = field(default_factory=_empty)  # (total,) bool, or empty if all tokens of completions are
    scores: Tensor = field(default_factory=_empty)  # (n, K, R), one per reward model, or empty
    ref_logps: Tensor = field(default_factory=_empty)  # (n, C) log π_ref of each completion, or empty
    ref_token_logps: Tensor = field(default_factory=_empty)  # (total,) log π_ref of each token, or empty

    def __post_init__(self) -> None:
        if len(self.is_counted) < len(self.tokens):
            self.is_counted = torch.ones(self.tokens.shape, dtype=torch.bool)
            for start, end in self.offsets[:, :2].tolist():
                self.is_counted[start:end] = False

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def num_completions(self) -> int:
        """C, the samples of π_ref included."""
        return self.offsets.shape[1] - 2

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt together with one of its completions."""
        lengths = self.offsets.diff(dim=1)
        return int((lengths[:, :1] + lengths[:, 1:]).max())


# ---------------------------------------------------------------- from rows to groups


@dataclass(frozen=True)
class Shape:
    """The counts that must be equal in all rows of a source."""

    completions: int
    reward_models: int
    samples: int


SHAPE_IN_WORDS = {
    "completions": "completions",
    "reward_models": "scores for each completion",
    "samples": "reference_samples",
}


class GroupBuilder:
    """Collects groups into flat arrays, and counts what happens to the rows."""

    def __init__(self, encoder: Encoder, requires: Requires, max_length: int, max_prompt_length: int | None):
        self.encoder = encoder
        self.requires = requires
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.shape: Shape | None = None  # of the first row
        self.has_scores: bool | None = None  # whether the first ranking has

        self.tokens = array("i")
        self.is_counted = array("b")
        self.offsets = array("q")
        self.row_numbers = array("q")
        self.scores = array("f")
        self.order_of_content: dict[int, int] = {}

    @property
    def counts(self) -> Counts:
        """What became of the rows."""
        return self.encoder.counts

    def add(self, examples: Iterable[Example]) -> None:
        """Select, tokenise and append a chunk of examples."""
        selected = self._select_all(examples)
        for encoded in self.encoder.encode(selected):
            try:
                self._append(encoded)
            except Dropped as reason:
                self.counts.dropped[str(reason)] += 1

    # ------------------------------------------------------------ select

    def _select_all(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            try:
                selected = self._select(example)
            except Dropped as reason:
                self.counts.dropped[str(reason)] += 1
                continue
            yield selected

    def _select(self, example: Example) -> Example:
        """The example with the completions that the algorithm takes, preferred first, its samples behind them.

        Raises UserError if it lacks what the algorithm requires.
        """
        if self.requires.samples == "unused":
            example = replace(example, samples=[])
        self._check(example)
        if len(example.completions) == 1 and example.scores == [[0.0]] and not self.requires.scores:
            raise Dropped("label is false")

        is_ranked_by_scores = bool(example.scores) and not example.ranked
        if is_ranked_by_scores:
            example = _sorted_by_score(example)

        if self.requires.completions == "first":
            example = replace(example, completions=example.completions[:1])
        elif is_ranked_by_scores and not self.requires.scores and _has_ties(example.scores):
            raise Dropped("tied scores")

        if any(map(is_blank, example.texts)):
            raise Dropped("empty completion")
        if self.requires.turns == "all":
            example = _with_all_turns(example)
        if any(map(_has_weight_zero, example.texts)):
            raise Dropped("weight 0")
        return replace(example, completions=example.completions + example.samples)

    def _check(self, example: Example) -> None:
        num_completions = len(example.completions)
        is_enough = {
            "first": num_completions >= 1,
            "pair": num_completions == 2,
            "ranking": num_completions >= 2,
        }
        wanted = self.requires.completions
        if not is_enough[wanted]:
            lacking = f"this run needs {COMPLETIONS_IN_WORDS[wanted]}; the row has {num_completions}"
            raise UserError(f"{example.location}: {lacking}")
        if self.requires.scores and not example.scores:
            raise UserError(f"{example.location}: this run needs scores; add them with scripts/score.py")
        if self.requires.samples == "required" and not example.samples:
            raise UserError(f"{example.location}: this run needs reference_samples; sample them with scripts/sample.py")
        self._check_shape(example)

    def _check_shape(self, example: Example) -> None:
        """Every row must have as many completions, scores and samples as the first one."""
        reward_models = 0
        if self.requires.scores:
            reward_models = len(example.scores[0])
        shape = Shape(len(example.completions), reward_models, len(example.samples))

        if self.shape is None:
            self.shape = shape
        for name, words in SHAPE_IN_WORDS.items():
            number = getattr(shape, name)
            expected = getattr(self.shape, name)
            if number != expected:
                raise UserError(f"{example.location}: {number} {words} where earlier rows have {expected}")
        if not example.ranked and len(example.completions) > 1:
            self._check_scores(example)

    def _check_scores(self, example: Example) -> None:
        """Scores rank the completions of every row, or of none: without them the order is the ranking."""
        has_scores = bool(example.scores)
        if self.has_scores is None:
            self.has_scores = has_scores
        if self.has_scores and not has_scores:
            raise UserError(f"{example.location}: no scores, but earlier rows have them")
        if has_scores and not self.has_scores:
            raise UserError(f"{example.location}: scores, but earlier rows have none")

    # ------------------------------------------------------------ append

    def _append(self, encoded: EncodedExample) -> None:
        """Truncate an example to its room and append its ids. Raises Dropped if they cannot be used."""
        example = encoded.example
        num_ranked = len(example.completions) - len(example.samples)
        ranked = encoded.completions[:num_ranked]
        if any(completion.is_empty for completion in ranked):
            raise Dropped("empty completion")
        self._check_different(ranked, "identical completions")

        prompt = self._truncate_prompt(encoded.prompt)
        room = self.max_length - len(prompt)
        if room < 1:
            raise Dropped("prompt too long")
        completions = [completion.truncated(room) for completion in encoded.completions]
        if not all(completion.ids for completion in completions[:num_ranked]):
            raise Dropped("empty completion after truncation")
        if not all(completion.ids for completion in completions):
            raise Dropped("empty sample")
        self._check_different(completions[:num_ranked], "identical completions after truncation")

        noted = self.counts.noted
        noted.update(encoded.notes)
        noted["prompts cut"] += int(len(prompt) < len(encoded.prompt))
        noted["completions cut"] += sum(len(completion.ids) > room for completion in encoded.completions)
        self._count_repeats(prompt, ranked)
        if example.ranked and len(example.scores) == 2:
            self._count_disagreement(example.scores)

        self.row_numbers.append(example.number)
        if self.requires.scores:
            for scores_of_completion in example.scores:
                self.scores.extend(scores_of_completion)
        self._append_piece(EncodedCompletion(prompt, [False] * len(prompt)))
        for completion in completions:
            self._append_piece(completion)
        self.offsets.append(len(self.tokens))

    def _append_piece(self, piece: EncodedCompletion) -> None:
        self.offsets.append(len(self.tokens))
        self.tokens.extend(piece.ids)
        self.is_counted.extend(piece.is_counted)

    def _check_different(self, completions: list[EncodedCompletion], reason: str) -> None:
        different = {tuple(completion.ids) for completion in completions}
        if len(different) < len(completions) and not self.requires.scores:
            raise Dropped(reason)

    def _truncate_prompt(self, prompt: TokenIds) -> TokenIds:
        """The BOS, if the prompt begins with it, and the last `max_prompt_length` of the other tokens."""
        limit = self.max_prompt_length
        if limit is None:
            return prompt

        bos = []
        if prompt[0] == self.encoder.bos_id:
            bos = prompt[:1]
        if len(prompt) <= len(bos) + limit:
            return prompt
        return bos + prompt[-limit:]

    def _count_disagreement(self, scores: list[list[float]]) -> None:
        """Count pairs whose scores do not prefer the first one."""
        first, second = map(math.fsum, scores)
        self.counts.noted["tied scores"] += int(first == second)
        self.counts.noted["scores against the order"] += int(first < second)

    def _count_repeats(self, prompt: TokenIds, completions: list[EncodedCompletion]) -> None:
        """Count rows that repeat an earlier one, and those that rank the completions of an earlier one otherwise."""
        ranking = tuple(tuple(completion.ids) for completion in completions)
        order = hash(ranking)
        content = hash((tuple(prompt), tuple(sorted(ranking))))
        if content not in self.order_of_content:
            self.order_of_content[content] = order
        elif self.order_of_content[content] == order:
            self.counts.noted["duplicates"] += 1
        else:
            self.counts.noted["contradictions"] += 1


def _sorted_by_score(example: Example) -> Example:
    """The completions from the highest sum of scores to the lowest, those with equal sums in their own order."""
    scores = example.scores
    order = sorted(range(len(scores)), key=lambda i: -math.fsum(scores[i]))
    return replace(
        example,
        completions=[example.completions[i] for i in order],
        scores=[scores[i] for i in order],
    )


def _has_ties(scores: list[list[float]]) -> bool:
    sums = {math.fsum(values) for values in scores}
    return len(sums) < len(scores)


def _has_weight_zero(completion: Text) -> bool:
    """Whether the `weight` of each answer says that nothing is learnt from it."""
    if isinstance(completion, str):
        return False
    return all(message.get("weight") == 0 for message in completion if message["role"] == "assistant")


def _with_all_turns(example: Example) -> Example:
    """The prompt up to its first answer; the rest of it comes before each completion's own messages.

    What a policy drew stays behind the whole prompt.
    """
    prompt = example.prompt
    if isinstance(prompt, UserTurn) and prompt.earlier:
        prompt = prompt.messages()
    is_drawn = any(completion.is_drawn for completion in example.completions)
    if not isinstance(prompt, list) or is_drawn:
        return example

    first = 0
    while first < len(prompt) and prompt[first]["role"] != "assistant":
        first += 1
    completions = []
    for completion in example.completions:
        text = prompt[first:] + assistant_messages(completion.text)
        completions.append(replace(completion, text=text))
    return replace(example, prompt=prompt[:first], completions=completions)


# ---------------------------------------------------------------- load


def load_groups(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    requires: Requires,
    max_length: int,
    max_prompt_length: int | None,
    today: date | None = None,
) -> Groups:
    """The groups of a source, tokenised once per content and settings and kept on disk.

    With several processes the first one of each machine tokenises. The others wait for its file, without a collective
    that could time out. today: the date for chat templates that write it; the report then has it.
    Raises UserError if the source, a row's form or type is wrong, and if no row can be used.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token; set one (its `eos_token`) so that completions can end")

    hash_of_source = None
    if int(os.environ.get("RANK", 0)) == 0:
        hash_of_source = source_hash(source)
    hash_of_source = from_main(hash_of_source)

    date_in_template = None
    if "strftime_now" in str(tokenizer.chat_template):
        date_in_template = str(today or date.today())
    limits = [max_length, max_prompt_length, date_in_template]
    path = cache_directory() / f"tokens-{_cache_key(hash_of_source, tokenizer, requires, limits)}.safetensors"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not is_complete(path):
        builder = tokenise(source, tokenizer, requires, max_length, max_prompt_length, today)
        if source_hash(source) != hash_of_source:
            raise UserError(f"{source}: was changed while it was read; start again")
        _write_groups(path, builder)
    while not is_complete(path):
        time.sleep(0.1)

    tensors, metadata = read_tensors(path)
    report = {"source": source, **json.loads(metadata["report"])}
    if not report["kept"]:
        raise UserError(f"{source}: no usable row; {describe(report)}")
    if date_in_template is not None:
        report["date"] = date_in_template
    return Groups(report=report, **tensors)


def _cache_key(hash_of_source: str | None, tokenizer: Any, requires: Requires, limits: list) -> str:
    """SHA-256 of everything that the groups depend on, this code included."""
    code = [sha256_of(Path(__file__).with_name(name)) for name in CODE]
    settings = [hash_of_source, _tokenizer_hash(tokenizer), astuple(requires), limits, code]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:
        model = backend.to_str()
    else:  # a tokenizer in pure Python
        model = f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    parts = [model, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tokenise(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    requires: Requires,
    max_length: int,
    max_prompt_length: int | None,
    today: date | None = None,
) -> GroupBuilder:
    """Stream a source into flat arrays; memory grows with the token ids, not with the file."""
    builder = GroupBuilder(Encoder(tokenizer, today=today), requires, max_length, max_prompt_length)
    examples = parse_rows(source, builder.counts)
    while chunk := list(islice(examples, CHUNK)):
        builder.add(chunk)
    return builder


def _write_groups(path: Path, builder: GroupBuilder) -> None:
    kept = len(builder.row_numbers)
    tensors = {
        "tokens": as_tensor(builder.tokens, torch.int32),
        "is_counted": as_tensor(builder.is_counted, torch.bool),
        "offsets": as_tensor(builder.offsets, torch.int64),
        "row_numbers": as_tensor(builder.row_numbers, torch.int64),
    }
    if kept:
        tensors["offsets"] = tensors["offsets"].view(kept, -1)
    if kept and builder.requires.scores:
        assert builder.shape is not None  # the first row has set it
        scores = as_tensor(builder.scores, torch.float32)
        tensors["scores"] = scores.view(kept, builder.shape.completions, builder.shape.reward_models)

    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(bytes_of(tensor))
    report = report_of(builder.counts, kept) | {"sha256": digest.hexdigest()[:32]}
    write_tensors(path, tensors, {"report": json.dumps(report)})


def report_of(counts: Counts, kept: int) -> dict:
    """What became of the rows of a source, as JSON can hold it."""
    dropped = dict(counts.dropped)
    noted = +counts.noted  # without the zeros
    report = {"rows": kept + sum(dropped.values()), "kept": kept, "dropped": dropped, **noted}
    if counts.unused:
        report["not used"] = sorted(counts.unused)
    return report


def as_tensor(values: array, dtype: torch.dtype) -> Tensor:
    """An array as a tensor in the same memory; `torch.tensor` would make an object of every number."""
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.asarray(values, dtype=dtype)


def describe(report: dict) -> str:
    """One line: rows 64, kept 61, dropped: prompt too long 3; duplicates 2; not used: id, source."""
    line = f"rows {report['rows']}, kept {report['kept']}"
    if report["dropped"]:
        reasons = [f"{reason} {number}" for reason, number in sorted(report["dropped"].items())]
        line += f", dropped: {', '.join(reasons)}"

    others = report.keys() - {"source", "rows", "kept", "dropped", "not used", "sha256", "date"}
    for name in sorted(others):
        if report[name]:
            line += f"; {name} {report[name]}"
    if report.get("not used"):
        line += f"; not used: {', '.join(report['not used'])}"
    return line


# ---------------------------------------------------------------- groups and a model


def full_attention_length(config: "PretrainedConfig") -> int:
    """The length up to which rotary frequencies are unchanged and attention is not cut into chunks.

    Packed rows assume both.
    """
    config = config.get_text_config()
    limits = [getattr(config, "attention_chunk_size", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limits += [rope.get("original_max_position_embeddings"), config.max_position_embeddings]
    return min([limit for limit in limits if limit], default=sys.maxsize)


def check_fit(groups: Groups, config: "PretrainedConfig", source: str) -> None:
    """Raises UserError for a token without an embedding, and for a row that is too long for packed rows."""
    largest_id = int(groups.tokens.max())
    vocab_size = config.get_text_config().vocab_size
    if largest_id >= vocab_size:
        raise UserError(f"{source}: token id {largest_id}, but the model embeds {vocab_size}")

    limit = full_attention_length(config)
    if groups.longest > limit:
        problem = f"beyond {limit} tokens the model's attention or rotary embedding changes; give --max-length"
        raise UserError(f"{source}: {groups.longest} tokens, but {problem}")


def shown_example(groups: Groups, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The first group as the model sees it, with the boundary between prompt and first completion visible."""
    start, middle, end = groups.offsets[0, :3].tolist()
    prompt = tokenizer.decode(groups.tokens[start:middle])
    completion = tokenizer.decode(groups.tokens[middle:end])
    if len(prompt) > SHOWN:
        prompt = "…" + prompt[-SHOWN:]
    if len(completion) > SHOWN:
        completion = completion[:SHOWN] + "…"
    return f"first row: {prompt!r} | {completion!r}"
