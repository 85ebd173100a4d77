"""Completions of a policy, each with its log π(y|x): sampled, alone or steered by a pair of proxies, or searched.

sample_with_logps()     by the `generate` of transformers
sample_completions()    the same without the log-probs
search_completions()    by beam search, Eq 13 of arXiv 2404.12358
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from algos.token_dpo_beam import beam_searches, proxy_logps
from shared import UserError
from shared.command import Above, AtLeast
from shared.encode import Encoder, end_ids
from shared.rows import Text, UserTurn

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

Drawn = tuple[list[int], float]  # the token ids of a completion, with the EOS that ended it, and log π(y|x) in nats


@dataclass(kw_only=True)
class Sampling:
    """How completions are sampled."""

    temperature: Annotated[float, Above(0)] = 1.0
    """divides the logits"""
    top_k: Annotated[int, AtLeast(0)] = 0
    """sample among the k likeliest tokens only; 0 for all, 1 is greedy"""
    top_p: Annotated[float, Above(0, at_most=1)] = 1.0
    """sample among the likeliest tokens that hold this probability together; 1 for all"""
    repetition_penalty: Annotated[float, Above(0)] = 1.0
    """divides positive and multiplies negative logits of tokens seen before; 1 for none"""
    max_new_tokens: Annotated[int, Above(0)] = 256
    """tokens of a completion, EOS included"""
    batch_size: Annotated[int, Above(0)] = 128
    """sequences that are generated together, at most"""
    batch_tokens: Annotated[int, Above(0)] = 65_536
    """tokens of those sequences, prompt, completion and padding, at most (but one sequence always fits)"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the samples"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """the model's number format"""


# ---------------------------------------------------------------- models


def load_sampler(path: str, dtype: str) -> "tuple[Any, PreTrainedTokenizerBase, list[int]]":
    """Model, tokenizer and the ids that end a completion. The model is on this process's GPU if there is one.

    Raises UserError if nothing ends a completion.
    """
    from shared.loading import load_generator, load_tokenizer

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    tokenizer, _ = load_tokenizer(path)
    model = load_generator(path, getattr(torch, dtype), device)
    eos_ids = ids_that_end(model, tokenizer)
    if not eos_ids:
        raise UserError(f"model {path}: the tokenizer has no EOS token; set one so that completions can end")
    return model, tokenizer, eos_ids


def load_proxies(proxy: str, reference: str, dtype: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list, set[int]]:
    """[proxy, its reference], and the ids that end a completion of either.

    Raises UserError if their token ids mean other tokens than those of `tokenizer`, the policy's.
    """
    models = []
    eos_ids: set[int] = set()
    for flag, path in (("--proxy", proxy), ("--proxy-reference", reference)):
        model, other_tokenizer, other_ids = load_sampler(path, dtype)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{flag} {path}: has another tokenizer than the policy that it would steer")
        models.append(model)
        eos_ids.update(other_ids)
    return models, eos_ids


def ids_that_end(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end a completion, ascending: the tokenizer's and its template's, and those of the model."""
    eos_ids = set(end_ids(tokenizer))
    of_model = model.generation_config.eos_token_id
    if isinstance(of_model, list):
        eos_ids.update(of_model)
    else:
        eos_ids.add(of_model)
    eos_ids.discard(None)
    return sorted(eos_ids)


def prompt_room(model: Any, max_new_tokens: int) -> int:
    """One more than the longest prompt that leaves positions for all new tokens. Raises UserError if none does."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if max_new_tokens >= positions:
        raise UserError(f"--max-new-tokens {max_new_tokens}: the model has {positions} positions, with the prompt's")
    return positions - max_new_tokens + 1


# ---------------------------------------------------------------- generation


class Steering:
    """Replaces the distribution that `generate` samples from: Eq 14 of arXiv 2404.12358.

    pair: the proxy and its reference; mask (B, T): 1 for the prompts' tokens, 0 for the padding to their left.
    """

    def __init__(self, pair: list, beta: float, mask: Tensor):
        self.pair = pair
        self.beta = beta
        self.mask = mask
        self.num_seen = 0  # tokens of each sequence that are in the caches
        self.caches: list[Any] = [None, None]
        self.pair_logits: list[Tensor] = []  # of the next token, (B, V) each

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """All tokens so far (B, T), the policy's logits of the next one (B, V) → log π (B, V)."""
        length = input_ids.shape[1]
        mask = F.pad(self.mask, (0, length - self.mask.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1).clamp(0)
        new_ids = input_ids[:, self.num_seen :]
        new_positions = positions[:, self.num_seen :]
        self.num_seen = length

        self.pair_logits = []
        for i, model in enumerate(self.pair):
            output = model(
                new_ids,
                attention_mask=mask,
                position_ids=new_positions,
                past_key_values=self.caches[i],
                use_cache=True,
                logits_to_keep=1,
            )
            self.caches[i] = output.past_key_values
            self.pair_logits.append(output.logits[:, -1].float())
        return self.steered(logits)

    def steered(self, logits: Tensor) -> Tensor:
        """The policy's logits of the next token (B, V) → log π (B, V)."""
        # Models of one family pad their embeddings to different sizes.
        all_logits = [logits, *self.pair_logits]
        vocab_size = min(values.shape[1] for values in all_logits)
        base, proxy, reference = (values[:, :vocab_size].log_softmax(-1) for values in all_logits)
        logps = proxy_logps(base, proxy, reference, self.beta)
        return F.pad(logps, (0, logits.shape[1] - vocab_size), value=-torch.inf)


class Recorder:
    """Takes down log π of every token that `generate` draws, and leaves the logits as they are.

    It reads the logits before anything else does: π is the policy at temperature 1, steered by `steering` if given,
    but without the repetition penalty, top-k and top-p.
    """

    def __init__(self, steering: Steering | None):
        self.steering = steering
        self.logits: Tensor | None = None  # of the token that is drawn next
        self.logps: list[Tensor] = []  # (B, 1) of each token that was drawn

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """All tokens so far (B, T), the policy's logits of the next one (B, V) → the same logits."""
        self.record(input_ids)
        self.logits = logits
        return logits

    def record(self, input_ids: Tensor) -> None:
        """Take down the last token of each sequence (B, T), if it was drawn."""
        if self.logits is None:
            return
        if self.steering is None:
            logps = self.logits.log_softmax(-1)
        else:
            logps = self.steering.steered(self.logits)
        self.logps.append(logps.gather(1, input_ids[:, -1:]))


def generate(
    model: Any,
    prompts: list[list[int]],
    config: "GenerationConfig",
    repetition_penalty: float = 1.0,
    steer: Callable[[Tensor], Steering] | None = None,
) -> list[Drawn]:
    """A completion of each prompt, by the `GenerationConfig` alone, which leaves the repetition penalty out.

    steer: makes a `Steering` from the mask.
    """
    from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

    width = max(len(ids) for ids in prompts)
    padded = []
    mask_rows = []
    for ids in prompts:
        padding = width - len(ids)
        # The mask hides the padding from the model, but not from the repetition penalty: a token that the prompt
        # holds anyway changes nothing there.
        padded.append([ids[0]] * padding + ids)
        mask_rows.append([0] * padding + [1] * len(ids))
    input_ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor(mask_rows, device=model.device)

    steering = None
    if steer is not None:
        steering = steer(mask)
    recorder = Recorder(steering)
    processors: list[Any] = [recorder]
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if steering is not None:
        processors.append(steering)

    cache = shared_prompts(model, prompts, input_ids, mask)
    # `generate` takes what a given config leaves open from the model's own config, so that one is put aside.
    config_of_model = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        output = model.generate(
            input_ids, attention_mask=mask, past_key_values=cache, generation_config=config, logits_processor=processors
        )
    finally:
        model.generation_config = config_of_model

    recorder.record(output)
    token_logps = torch.cat(recorder.logps, 1).double().cpu()
    drawn = []
    for ids, logps in zip(output[:, width:].tolist(), token_logps, strict=True):
        completion = truncate_after(ids, config.eos_token_id)
        drawn.append((completion, float(logps[: len(completion)].sum())))
    return drawn


@torch.no_grad()
def shared_prompts(model: Any, prompts: list[list[int]], input_ids: Tensor, mask: Tensor) -> "Cache | None":
    """The cache of all tokens of each sequence but the last, where equal prompts are computed once.

    input_ids, mask (B, T): the padded prompts. None if no prompt occurs twice, if all have one token, or if the model
    takes other inputs in `generate`, or keeps other states, than keys and values by positions that count from 0.
    """
    row_of: dict[tuple[int, ...], int] = {}
    rows = [row_of.setdefault(tuple(ids), len(row_of)) for ids in prompts]
    if len(row_of) == len(prompts) or input_ids.shape[1] == 1 or not has_plain_inputs(model):
        return None

    firsts = [rows.index(row) for row in range(len(row_of))]
    known_mask = mask[firsts, :-1]
    output = model(
        input_ids[firsts, :-1],
        attention_mask=known_mask,
        position_ids=(known_mask.cumsum(1) - 1).clamp(0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache: Any = getattr(output, "past_key_values", None)
    if not has_keys_and_values(cache):
        return None
    cache.batch_select_indices(torch.tensor(rows, device=model.device))
    return cache


def has_plain_inputs(model: Any) -> bool:
    """Whether `generate` makes a model's inputs as it does for most: some count positions otherwise, or carry them."""
    from transformers import GenerationMixin

    names = ("prepare_inputs_for_generation", "_prepare_position_ids_for_generation")
    return all(getattr(type(model), name, None) is getattr(GenerationMixin, name, None) for name in names)


def has_keys_and_values(cache: Any) -> bool:
    """Whether a cache holds nothing else: not the states of recurrent layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(cache, DynamicCache):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def truncate_after(ids: list[int], eos_ids: list[int]) -> list[int]:
    """`ids` up to and including the first of `eos_ids`, or all of them."""
    for index, token in enumerate(ids):
        if token in eos_ids:
            return ids[: index + 1]
    return ids


def make_batches(lengths: list[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences that are generated together; `lengths` count prompt and new tokens of each sequence."""
    # Longest first: the first sequence of a batch is its width, and memory runs out early if at all.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    width = 0
    for index in order:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * width > batch_tokens):
            yield batch
            batch = []
        if not batch:
            width = lengths[index]
        batch.append(index)
    yield batch


def sample_with_logps(
    model: Any,
    eos_ids: list[int],
    prompts: list[list[int]],
    count: int,
    sampling: Sampling,
    window: int = 0,
    progress: str | None = None,
    steer: Callable[[Tensor], Steering] | None = None,
) -> Iterator[list[Drawn]]:
    """Yield `count` completions of each prompt, in order.

    Sets torch's global seed before every batch, from the seed, the window's number and the batch's.
    progress: the label of a progress bar.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        eos_token_id=eos_ids,
        pad_token_id=eos_ids[0],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
    )
    # Sequence i * count + k is completion k of prompt i.
    sequences = [ids for ids in prompts for _ in range(count)]
    lengths = [len(ids) + sampling.max_new_tokens for ids in sequences]
    completions: dict[int, Drawn] = {}
    batches = list(make_batches(lengths, sampling.batch_size, sampling.batch_tokens))
    for number, batch in enumerate(tqdm(batches, progress, unit="batch", disable=progress is None)):
        seed = random.Random(f"{sampling.seed} {window} {number}").getrandbits(63)
        torch.manual_seed(seed)
        some_prompts = [sequences[index] for index in batch]
        generated = generate(model, some_prompts, config, sampling.repetition_penalty, steer)
        completions.update(zip(batch, generated, strict=True))

    for start in range(0, len(sequences), count):
        yield [completions[index] for index in range(start, start + count)]


def sample_completions(
    model: Any,
    eos_ids: list[int],
    prompts: list[list[int]],
    count: int,
    sampling: Sampling,
    progress: str | None = None,
    steer: Callable[[Tensor], Steering] | None = None,
) -> Iterator[list[list[int]]]:
    """The token ids that `sample_with_logps` yields."""
    for drawn in sample_with_logps(model, eos_ids, prompts, count, sampling, progress=progress, steer=steer):
        yield [ids for ids, _ in drawn]


def search_completions(
    model: Any,
    eos_ids: list[int],
    prompts: list[list[int]],
    count: int,
    beams: int,
    length_penalty: float,
    limits: Sampling,
) -> Iterator[list[Drawn]]:
    """Yield the `count` best completions that `beams` beams find for each prompt, best first, in the prompts' order.

    They may be fewer where few are possible. limits: how many tokens a completion has at most, and how many sequences
    and tokens are searched together.
    """
    lengths = [len(ids) + limits.max_new_tokens for ids in prompts]
    batch_size = max(1, limits.batch_size // beams)
    batch_tokens = limits.batch_tokens // beams
    drawn: dict[int, list[Drawn]] = {}
    for batch in make_batches(lengths, batch_size, batch_tokens):
        some_prompts = [prompts[index] for index in batch]
        results = beam_searches(model, some_prompts, beams, limits.max_new_tokens, eos_ids, length_penalty)
        drawn.update(zip(batch, results, strict=True))

    for index in range(len(prompts)):
        yield drawn[index][:count]


# ---------------------------------------------------------------- prompts


def as_written(prompt: Text | UserTurn, encoder: Encoder) -> Text:
    """A prompt in the form in which rows of `prompt`, `completions` mean the same tokens."""
    if not isinstance(prompt, UserTurn):
        return prompt
    if encoder.is_chat(prompt):
        return prompt.messages()
    return f"{prompt.text}\n\n"
