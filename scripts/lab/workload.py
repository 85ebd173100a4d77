"""What training is measured on: a Llama of random weights, and rows of random words or of real text.

PROFILES, SHAPES    lengths of rows, and sizes of models
prepare()           a Workload → a directory with the model and the rows, and the lengths as training encodes them
forward_flops()     the FLOPs that a forward pass over such rows needs
"""

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shared import UserError
from shared.files import storage_errors
from shared.groups import Requires, tokenise
from shared.loading import load_tokenizer
from shared.rows import Counts, UserTurn, parse_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerBase

POSITIONS = 4_096  # of every model
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")
REWARD_MODELS = 3  # whose scores every row carries
BPE_VOCABULARY = 8_192  # of a tokenizer that is trained on real rows

# what an algorithm requires of rows, where that is not a ranking
REQUIREMENTS = {
    "sft": Requires("first"),
    "typo": Requires("pair", samples="required"),
    "ensemble_dpo": Requires("pair"),
}


class Lengths(NamedTuple):
    """A lognormal distribution of numbers of tokens, BOS or EOS included."""

    mean: float
    sigma: float
    longest: int


class Profile(NamedTuple):
    """How long the prompts and the completions are."""

    prompt: Lengths
    completion: Lengths


PROFILES = {
    "hh": Profile(Lengths(128, 0.9, 1024), Lengths(64, 0.9, 512)),
    "ultrafeedback": Profile(Lengths(170, 0.9, 2048), Lengths(270, 0.7, 1024)),
    "tldr": Profile(Lengths(350, 0.3, 512), Lengths(35, 0.35, 128)),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, under the names of its configuration."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool = False  # the embedding is the head too


SHAPES = {  # those for GPUs are Qwen2.5's
    "cpu-1k": Shape(1_024, 64, 2, 4, 2, 172),
    "cpu-8k": Shape(8_192, 256, 4, 8, 8, 688),
    "cpu-152k": Shape(151_936, 64, 4, 4, 4, 172, tie_word_embeddings=True),
    "0.5b": Shape(151_936, 896, 24, 14, 2, 4_864, tie_word_embeddings=True),
    "1.5b": Shape(151_936, 1_536, 28, 12, 2, 8_960, tie_word_embeddings=True),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What `prepare` makes."""

    shape: Shape
    max_rows: int
    profile: Profile = PROFILES["hh"]
    algorithm: str = "dpo"
    num_completions: int = 2
    rows: str | None = None  # a source of real pairs, instead of the profile
    tokenizer: str | None = None  # that of `rows`; None: byte-level BPE trained on them
    dtype: str = "float32"  # of the weights in the model's files


class Prepared(NamedTuple):
    """A model and its rows on disk."""

    model: Path
    rows: Path
    lengths: Tensor  # (n, 1 + C) tokens of each prompt and of its completions


def prepare(workload: Workload, directory: Path) -> Prepared:
    """Write the model and the rows to `directory`. Raises UserError if `workload.rows` has too few usable pairs."""
    tokenizer = make_tokenizer(workload)
    model = directory / "model"
    make_model(model, workload.shape, tokenizer, workload.dtype)

    if workload.rows is None:
        rows = random_rows(workload)
    else:
        rows = islice(real_rows(workload, tokenizer), workload.max_rows)
    path = directory / "rows.jsonl"
    write_rows(path, rows)

    lengths = encoded_lengths(path, tokenizer, workload.algorithm)
    if len(lengths) < workload.max_rows:
        problem = f"{len(lengths)} usable rows, fewer than --max-rows {workload.max_rows}"
        raise UserError(f"--rows {workload.rows}: {problem}")
    return Prepared(model, path, lengths)


def encoded_lengths(rows: Path, tokenizer: "PreTrainedTokenizerBase", algorithm: str) -> Tensor:
    """(n, 1 + C): the tokens of each prompt and of its completions, as training has them."""
    requires = REQUIREMENTS.get(algorithm, Requires())
    groups = tokenise(str(rows), tokenizer, requires, POSITIONS, None)
    num_rows = len(groups.row_numbers)
    if num_rows == 0:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.tensor(groups.offsets).view(num_rows, -1).diff(dim=1)


# ---------------------------------------------------------------- rows


def random_rows(workload: Workload) -> Iterator[dict]:
    """Rows of words w0, w1, ..., each of which is one token.

    A prompt leaves room for its BOS, a completion for its EOS. Typo's rows have one completion more: its sample.
    """
    num_completions = workload.num_completions
    if workload.algorithm == "typo":
        num_completions += 1
    distributions = [workload.profile.prompt] + num_completions * [workload.profile.completion]

    rng = random.Random(0)
    lengths = [draw_lengths(distribution, workload.max_rows, rng) for distribution in distributions]
    num_words = workload.shape.vocab_size - len(SPECIAL_TOKENS)
    for row_lengths in zip(*lengths, strict=True):
        texts = []
        for length in row_lengths:
            words = [f"w{rng.randrange(num_words)}" for _ in range(length - 1)]
            texts.append(" ".join(words))
        completions = [f" {text}" for text in texts[1:]]
        yield make_row(texts[0], completions, workload.num_completions, rng)


def draw_lengths(distribution: Lengths, n: int, rng: random.Random) -> list[int]:
    """n lengths at the even quantiles of the distribution, at least 3 tokens each, in random order."""
    normal = statistics.NormalDist()
    mu = math.log(distribution.mean) - distribution.sigma**2 / 2
    lengths = []
    for i in range(n):
        z = normal.inv_cdf((i + 0.5) / n)
        length = round(math.exp(mu + distribution.sigma * z))
        lengths.append(min(distribution.longest, max(3, length)))
    return rng.sample(lengths, n)


def make_row(prompt: str, completions: list[str], num_completions: int, rng: random.Random) -> dict:
    """A row with random scores. Completions beyond `num_completions` are samples of π_ref."""
    scores = []
    for _ in range(num_completions):
        scores.append([rng.gauss(0, 1) for _ in range(REWARD_MODELS)])
    row = {"prompt": prompt, "scores": scores}

    if num_completions == 2:
        row["chosen"] = completions[0]
        row["rejected"] = completions[1]
    else:
        row["completions"] = completions[:num_completions]
    samples = completions[num_completions:]
    if samples:
        row["reference_samples"] = samples
    return row


def real_rows(workload: Workload, tokenizer: "PreTrainedTokenizerBase") -> Iterator[dict]:
    """The usable pairs of `workload.rows`.

    A usable pair fits into the model, and its ids do not depend on whether prompt and completion are encoded
    together, as TRL does, or apart, as we do.
    """
    assert workload.rows is not None
    rng = random.Random(0)
    for example in parse_rows(workload.rows, Counts()):
        texts = [text for text in (text_of(example.prompt), *example.texts) if isinstance(text, str)]
        if len(texts) != 3 or len(example.completions) != 2:
            raise UserError(f"{example.location}: --rows must be pairs of plain text, with a prompt")

        prompt_ids, *apart = tokenizer(texts, add_special_tokens=False)["input_ids"]
        apart = [prompt_ids + completion_ids for completion_ids in apart]
        prompt, *completions = texts
        joined = [prompt + completion for completion in completions]
        together = tokenizer(joined, add_special_tokens=False)["input_ids"]

        fits = max(map(len, together)) < POSITIONS - 2
        if fits and all(texts) and texts[1] != texts[2] and together == apart:
            yield make_row(prompt, completions, workload.num_completions, rng)


def text_of(prompt: object) -> object:
    """A user's turn as its text; any other prompt as it is."""
    if isinstance(prompt, UserTurn):
        return prompt.text
    return prompt


def write_rows(path: Path, rows: Iterator[dict]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- tokenizers and models


def make_tokenizer(workload: Workload) -> "PreTrainedTokenizerBase":
    """One token a word for a profile's rows; for real rows the given tokenizer, or one that is trained on them."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if workload.tokenizer is not None:
        tokenizer, _ = load_tokenizer(workload.tokenizer)
        return tokenizer

    if workload.rows is None:
        backend = word_tokenizer(workload.shape.vocab_size)
    else:
        backend = trained_tokenizer(workload.rows)
    bos, eos, pad, unknown = SPECIAL_TOKENS
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown
    )


def word_tokenizer(vocab_size: int) -> "Tokenizer":
    """The words w0, w1, ... between blanks, one token each."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [f"w{i}" for i in range(vocab_size - len(SPECIAL_TOKENS))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return backend


def trained_tokenizer(source: str) -> "Tokenizer":
    """Byte-level BPE, trained on all texts of a source."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    def texts() -> Iterator[str]:
        for example in parse_rows(source, Counts()):
            for text in (text_of(example.prompt), *example.texts):
                yield str(text)

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    return backend


def make_model(path: Path, shape: Shape, tokenizer: "PreTrainedTokenizerBase", dtype: str = "float32") -> None:
    """Write a Llama of random weights with its tokenizer. Raises UserError if it has no embedding for some tokens."""
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    if len(tokenizer) > shape.vocab_size:
        raise UserError(f"--tokenizer: has {len(tokenizer)} tokens, but the model of --shape embeds {shape.vocab_size}")

    torch.manual_seed(0)
    lm = LlamaForCausalLM(llama_config(shape, tokenizer)).to(getattr(torch, dtype))
    with storage_errors(path):
        lm.save_pretrained(path)
        tokenizer.save_pretrained(path)


def llama_config(shape: Shape, tokenizer: "PreTrainedTokenizerBase") -> "LlamaConfig":
    """The configuration of a model of this shape, with the tokenizer's special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **dataclasses.asdict(shape),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=POSITIONS,
    )


# ---------------------------------------------------------------- FLOPs


def forward_flops(config: "LlamaConfig", lengths: Tensor, head: bool = True) -> int:
    """Necessary FLOPs of one forward pass of a Llama over groups of a prompt and completions.

    lengths: (n, 1 + C). A prompt is computed once, and a token attends to itself and to the tokens that it may see.
    The last layer's keys and values are needed everywhere. The rest of that layer is needed only for the states that
    are read: with a head, those that predict completion tokens, at each of which the head is applied; without one,
    for a reward model, those of last tokens. Norms, rotations and softmax are left out.
    """
    prompts = lengths[:, :1].double()  # (n, 1)
    completions = lengths[:, 1:].double()  # (n, C)
    tokens = lengths.sum()
    earlier_layers = config.num_hidden_layers - 1
    width = config.hidden_size
    kv_width = width * config.num_key_value_heads // config.num_attention_heads

    # the last layer's states that are read, and their pairs of a query and a key
    if head:
        states_read = 1 + (completions - 1).sum(1)
        pairs_read = prompts[:, 0] + ((completions - 1) * (prompts + completions / 2)).sum(1)
    else:
        states_read = torch.full((len(completions),), completions.shape[1])
        pairs_read = (prompts + completions).sum(1)

    # multiplications by weights: keys and values, then queries, output projection and MLP
    keys_and_values = config.num_hidden_layers * 2 * width * kv_width * tokens
    rest_of_layer = 2 * width**2 + 3 * width * config.intermediate_size
    weights = keys_and_values + rest_of_layer * (earlier_layers * tokens + states_read.sum())

    pairs_of_prompts = (prompts * (prompts + 1) / 2).sum()
    pairs_of_completions = (completions * prompts + completions * (completions + 1) / 2).sum()
    pairs = earlier_layers * (pairs_of_prompts + pairs_of_completions) + pairs_read.sum()
    attention = 2 * width * pairs  # query times key, weight times value

    multiplications = weights + attention
    if head:
        multiplications += width * config.vocab_size * completions.sum()
    return int(2 * multiplications)
