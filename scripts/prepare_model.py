"""Prepare a model for training: write a copy of it with a chat template, a pad token, other tokens or another dtype.

    template      gives it a chat template, from a file or from another model, and the tokens that the template needs
    pad-token     gives it a pad token that no text holds, as a reward model needs one
    add-tokens    adds tokens to its vocabulary
    temperature   divides its logits by τ: the copy at temperature 1 is the model at temperature τ
    convert       writes its weights in float32 or bfloat16, in one file or in several
    merge         adds an adapter to the weights of its base model

Files in which nothing changes are copied byte for byte. A new token gets a row of the embedding and of the head if
there is none yet: the mean of all other rows (transformers draws it from a normal distribution around that mean). Old
tokens keep their logits. Existing rows stay as they are, those without a token too.

`temperature` divides the weights of the head by τ, or those of the final norm if the head is tied to the embedding, and
the cap of soft-capped logits. The copy is checked: if its logits are not the model's divided by τ to 1e-5, the model is
refused. The divided weights are stored in float32, whatever the others are in.

    python scripts/prepare_model.py template --model base/ --from-model Qwen/Qwen3-0.6B --output-dir with_template/
    python scripts/prepare_model.py pad-token --model openai-community/gpt2 --output-dir gpt2_pad/
    python scripts/prepare_model.py temperature --model runs/sft --temperature 0.8 --output-dir runs/sft_08
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from scripts.lab.commands import checked_command
from scripts.lab.model_files import (
    INDEX,
    Changes,
    copy_others,
    directory_of,
    files_of_tensors,
    is_reward_model,
    names_in_files,
    new_directory,
    refuse_existing,
    write_copy,
)
from shared import UserError
from shared.command import Above, PositiveFloat
from shared.distributed import single_process
from shared.encode import Encoder
from shared.export import export
from shared.files import write_json, write_tensors
from shared.loading import (
    load_generator,
    load_policy_from,
    load_scorer,
    load_tokenizer,
    pad_tokens,
    refuse_quantised,
    unfit_for_padding,
)
from shared.lora import Adapter, find_adapter
from shared.rows import Dropped

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NEW_PAD_TOKEN = "<|pad|>"
TOLERANCE = 1e-5  # of logits, relative to the largest
PROBE_LENGTH = 64  # tokens over which logits are compared
GIGABYTE = 10**9


@dataclass(kw_only=True)
class Copy:
    """A model and its copy."""

    model: str
    """directory or hub id of the model"""
    output_dir: Path
    """directory to write, which must not exist yet"""


@dataclass(kw_only=True)
class Template(Copy):
    """Give the model a chat template, instead of the one that it has."""

    from_file: Path | None = None
    """file with the template, in Jinja"""
    from_model: str | None = None
    """directory or hub id of a model with the template, and with the special tokens that it writes"""
    tokens: tuple[str, ...] = ()
    """special tokens that the template writes, such as <|im_start|>; those that are new are added"""


@dataclass(kw_only=True)
class PadToken(Copy):
    """Give the model a pad token that no text holds and that ends no completion."""

    token: str | None = None
    """a special token, which is added if it is new; default: an unused one of the tokenizer, else <|pad|>"""


@dataclass(kw_only=True)
class AddTokens(Copy):
    """Add tokens to the vocabulary of the model."""

    tokens: tuple[str, ...]
    """texts of the new tokens"""
    special: bool = True
    """make them control tokens, which the text of a row never becomes, instead of words"""


@dataclass(kw_only=True)
class Temperature(Copy):
    """Divide the logits of the model by τ."""

    temperature: PositiveFloat
    """sampling temperature τ that becomes temperature 1"""


@dataclass(kw_only=True)
class Convert(Copy):
    """Write the weights in another dtype, or in other files."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the weights; default: the one that each has"""
    max_file_size: Annotated[float | None, Above(0)] = None
    """largest size of a file in GB; default: one file"""


@dataclass(kw_only=True)
class Merge(Copy):
    """Write an adapter and its base model as one model, in float32."""


def main(args: Template | PadToken | AddTokens | Temperature | Convert | Merge) -> None:
    """Run a sub-command."""
    refuse_existing(args.output_dir)
    tokenizer, config = load_tokenizer(args.model)
    adapter = find_adapter(args.model)
    if isinstance(args, Merge):
        write_merged(args, adapter, tokenizer, config)
        return
    if adapter is not None:
        command = f"python scripts/prepare_model.py merge --model {args.model} --output-dir DIR"
        raise UserError(f"model {args.model}: is an adapter of {adapter.base}; merge it first by: {command}")
    refuse_quantised(config, args.model)
    if isinstance(args, Template):
        changes = give_template(args, tokenizer)
    elif isinstance(args, PadToken):
        changes = give_pad_token(args, tokenizer)
    elif isinstance(args, AddTokens):
        changes = add_tokens(args, tokenizer)
    elif isinstance(args, Temperature):
        changes = bake_temperature(args, config)
    else:
        convert(args)
        return
    write_copy(directory_of(args.model), changes, args.output_dir)
    print(f"{args.output_dir}: {changes.remark}")


# ---------------------------------------------------------------- adapters


def write_merged(
    args: Merge, adapter: Adapter | None, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig"
) -> None:
    """Write the model that an adapter and its base model are."""
    if adapter is None:
        raise UserError(f"model {args.model}: is no adapter, it has no adapter_config.json")
    remark = f"The adapter {args.model} is merged into {adapter.base}."
    card = f"---\nbase_model: {adapter.base}\n---\n\n## Prepared with cleanpo\n\n{remark}\n"
    with single_process("float32") as ranks, new_directory(args.output_dir) as directory:
        load = load_policy_from
        if is_reward_model(config):
            load = load_scorer
        export(load(args.model, ranks), tokenizer, directory, card, ranks)
    print(f"{args.output_dir}: {remark}")


# ---------------------------------------------------------------- tokenizer


def give_template(args: Template, tokenizer: "PreTrainedTokenizerBase") -> Changes:
    """The tokenizer with the template and its tokens. Raises UserError if the template renders no chat."""
    template, tokens = read_template(args)
    tokenizer.chat_template = template
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    add_special(tokenizer, new)

    encoder = Encoder(tokenizer)
    check_template(encoder)
    turn_end = encoder.template.turn_ends.last
    remark = f"The chat template is that of {args.from_model or args.from_file}."
    if turn_end:
        remark += f" It ends a turn with {turn_end}."
    else:
        remark += " It ends a turn with no special token, so completions end with the EOS."
    changes = Changes(remark=remark, tokenizer=tokenizer, end_ids=encoder.end_ids)
    with_rows(changes, new, args.model)
    return changes


def read_template(args: Template) -> tuple[str, list[str]]:
    """The template, and the special tokens that it writes as far as they are known."""
    if (args.from_file is None) == (args.from_model is None):
        raise UserError("give either --from-file or --from-model")
    tokens = list(args.tokens)
    if args.from_file is not None:
        try:
            template = args.from_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--from-file {args.from_file}: cannot be read ({error})") from None
    else:
        assert args.from_model is not None
        other, _ = load_tokenizer(args.from_model)
        template = default_template(other)
        special = [token.content for token in other.added_tokens_decoder.values() if token.special]
        tokens += [token for token in special if token in template]

    if not template.strip():
        raise UserError(f"{args.from_file or args.from_model}: has no chat template")
    return template, list(dict.fromkeys(tokens))


def default_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template that a tokenizer uses for a chat without tools, or an empty text."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("default", "")
    return template


def check_template(encoder: Encoder) -> None:
    """Raises UserError if the template fails, or shows no text of a chat."""
    try:
        encoder.template.prompt([{"role": "user", "content": "a"}], None)
    except Dropped as error:
        raise UserError(f"the chat template renders no chat: {error}") from None


def give_pad_token(args: PadToken, tokenizer: "PreTrainedTokenizerBase") -> Changes:
    """The tokenizer with a pad token. Raises UserError if the one that is asked for is not fit, or none is needed."""
    unfit = unfit_for_padding(tokenizer, args.model)
    if tokenizer.unk_token_id is not None:
        unfit.setdefault(tokenizer.unk_token_id, "may stand for a word of a text")
    if args.token is None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in unfit:
        raise UserError(f"model {args.model}: has a pad token, {tokenizer.pad_token}, that no text holds")

    unused = pad_tokens(tokenizer, unfit)
    name = args.token
    if name is None:
        name = tokenizer.convert_ids_to_tokens(unused[0]) if unused else NEW_PAD_TOKEN
    token_id = tokenizer.get_vocab().get(name)
    if token_id is not None and token_id not in unused:
        reason = unfit.get(token_id, "is a word of texts")
        raise UserError(f"--token {name}: {reason}; give one that is not in the vocabulary")

    new = []
    if token_id is None:
        new = [name]
        add_special(tokenizer, new)
    tokenizer.pad_token = name
    changes = Changes(remark=f"The pad token is {name}.", tokenizer=tokenizer)
    with_rows(changes, new, args.model)
    changes.config["pad_token_id"] = tokenizer.pad_token_id
    return changes


def add_tokens(args: AddTokens, tokenizer: "PreTrainedTokenizerBase") -> Changes:
    """The tokenizer with new tokens. Raises UserError if one is known already."""
    known = tokenizer.get_vocab()
    for token in args.tokens:
        if token in known:
            raise UserError(f"--tokens {token}: is a token already")
    if args.special:
        add_special(tokenizer, list(args.tokens))
    else:
        tokenizer.add_tokens(list(args.tokens))
    changes = Changes(remark="The vocabulary has been extended.", tokenizer=tokenizer)
    with_rows(changes, list(args.tokens), args.model)
    return changes


def add_special(tokenizer: "PreTrainedTokenizerBase", tokens: list[str]) -> None:
    """Add special tokens that have no role."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)


# ---------------------------------------------------------------- rows of the embedding


def with_rows(changes: Changes, new_tokens: list[str], model: str) -> None:
    """Add to the changes what the tokenizer's new tokens need: rows of the embedding and the head."""
    assert changes.tokenizer is not None
    if not new_tokens:
        return
    size = max(changes.tokenizer.get_vocab().values()) + 1
    lm = load_lm(model)
    old_size = lm.config.get_text_config().vocab_size
    changes.remark += f" New tokens: {', '.join(new_tokens)}."
    if size <= old_size:
        changes.remark += " The embedding had rows for them."
        return

    ids = probe(lm)
    before = logits_of(lm, ids)
    tensors = resized(lm, size)
    after = logits_of(lm, ids)
    if not is_close(after[:, :old_size], before):
        raise UserError(f"model {model}: its embedding cannot be resized, because the logits of other tokens change")
    changes.tensors |= in_files(lm, tensors, model)
    changes.config["vocab_size"] = size
    changes.remark += f" The embedding has {size} instead of {old_size} rows; the new ones are the mean of the others."


def resized(lm: Any, size: int) -> dict[str, Tensor]:
    """Resize a model to `size` tokens. Returns all tensors whose shape that changes, by name, in float32."""
    old_shapes = {name: tensor.shape for name, tensor in lm.state_dict().items()}
    lm.resize_token_embeddings(size, mean_resizing=False)
    tensors = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        old_shape = old_shapes[name]
        if tensor.shape != old_shape:
            old_rows = old_shape[0]
            tensor.data[old_rows:] = tensor.data[:old_rows].mean(0)
            tensors[name] = tensor
    return tensors


# ---------------------------------------------------------------- temperature


def bake_temperature(args: Temperature, config: "PretrainedConfig") -> Changes:
    """The weights that give logits / τ. Raises UserError if the architecture has none."""
    lm = load_lm(args.model)
    ids = probe(lm)
    expected = logits_of(lm, ids) / args.temperature
    changes = Changes(remark=f"The logits are divided by {args.temperature}.")
    text_config = lm.config.get_text_config()
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap:
        text_config.final_logit_softcapping = cap / args.temperature  # c tanh(z / c) / τ = (c/τ) tanh((z/τ) / (c/τ))
        changes.config["final_logit_softcapping"] = cap / args.temperature

    for tensors in scaled_weights(lm, ids, args.temperature):
        if is_close(logits_of(lm, ids), expected):
            changes.tensors = in_files(lm, tensors, args.model, keep_dtype=False)
            return changes
    raise UserError(f"model {args.model}: no weights of its architecture can be divided to divide its logits")


def scaled_weights(lm: Any, ids: Tensor, temperature: float) -> Iterator[dict[str, Tensor]]:
    """Scale the weights that may divide the logits by τ, in one way after the other; those that were scaled, by name.

    At each yield the model is as it would be. The weights of a head that is not tied to the embedding are its own.
    """
    head = lm.get_output_embeddings()
    if head.weight is not lm.get_input_embeddings().weight:
        with scaled(head, lambda weight: weight / temperature, temperature) as tensors:
            yield by_name(lm, tensors)
        return

    for norm in modules_before(lm, head, ids):
        # most norms multiply with their weight w, some with 1 + w
        for scale in (lambda weight: weight / temperature, lambda weight: (1 + weight) / temperature - 1):
            with scaled(norm, scale, temperature) as tensors:
                yield by_name(lm, tensors)


@contextmanager
def scaled(module: nn.Module, scale: Callable[[Tensor], Tensor], temperature: float) -> Iterator[list[Tensor]]:
    """Inside, the weight of the module is scaled, and its bias divided by τ; yields both."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    old_weight = weight.data
    tensors = [weight]
    weight.data = scale(old_weight)
    if bias is not None:
        tensors.append(bias)
        old_bias = bias.data
        bias.data = old_bias / temperature
    yield tensors
    weight.data = old_weight
    if bias is not None:
        bias.data = old_bias


def modules_before(lm: Any, head: nn.Module, ids: Tensor) -> list[nn.Module]:
    """The norms whose output the head reads as it is."""
    outputs: dict[nn.Module, Any] = {}
    inputs: list[Tensor] = []

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        outputs[module] = output

    def keep_input(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0])

    hooks = [head.register_forward_pre_hook(keep_input)]
    for module in lm.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(keep_output))
    logits_of(lm, ids)
    for hook in hooks:
        hook.remove()
    return [module for module, output in outputs.items() if torch.equal(output, inputs[0])]


def by_name(lm: Any, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Parameters by all their names in the model."""
    ids = {id(tensor) for tensor in tensors}
    return {name: tensor for name, tensor in lm.state_dict(keep_vars=True).items() if id(tensor) in ids}


# ---------------------------------------------------------------- models


def load_lm(model: str) -> Any:
    """A language model in float32. Raises UserError for a reward model."""
    return load_generator(model, torch.float32, "cpu")


def probe(lm: Any) -> Tensor:
    """Arbitrary token ids (1, L)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.config.get_text_config().vocab_size, (1, PROBE_LENGTH), generator=generator)


def logits_of(lm: Any, ids: Tensor) -> Tensor:
    """The logits (L, V) of a model."""
    with torch.no_grad():
        return lm(input_ids=ids, use_cache=False).logits[0]


def is_close(logits: Tensor, expected: Tensor) -> bool:
    error = (logits - expected).abs().max()
    return bool(error <= TOLERANCE * expected.abs().max())


def in_files(lm: Any, tensors: dict[str, Tensor], model: str, keep_dtype: bool = True) -> dict[str, Tensor]:
    """Changed parameters as the files have them: under their names, and unless they need float32, in their dtype."""
    from safetensors import safe_open

    file_of = files_of_tensors(directory_of(model))
    changed = {}
    for name, tensor in names_in_files(lm, tensors, file_of, model).items():
        changed[name] = tensor.detach().clone()  # safetensors refuses tensors that share memory
        if keep_dtype:
            with safe_open(file_of[name], "pt") as stored:
                changed[name] = changed[name].to(stored.get_slice(name)[:1].dtype)
    return changed


# ---------------------------------------------------------------- files of weights


def convert(args: Convert) -> None:
    """Write all weights in one dtype, to one file or to several."""
    source = directory_of(args.model)
    file_of = files_of_tensors(source)
    changes = Changes(remark="The weights are in other files.")
    if args.dtype is not None:
        changes.remark = f"The weights are in {args.dtype}."
        changes.config["dtype"] = args.dtype
    with new_directory(args.output_dir) as directory:
        copy_others(source, changes, directory)
        write_in_files(file_of, args, directory)
    print(f"{args.output_dir}: {changes.remark}")


def write_in_files(file_of: dict[str, Path], args: Convert, directory: Path) -> None:
    """Read tensors in the order of their names, and write a file whenever the next one would be too large."""
    from safetensors import safe_open

    parts: list[list[str]] = [[]]
    sizes = [0]
    limit = float("inf")
    if args.max_file_size is not None:
        limit = args.max_file_size * GIGABYTE

    def read(name: str) -> Tensor:
        with safe_open(file_of[name], "pt") as stored:
            tensor = stored.get_tensor(name)
        if args.dtype is not None and tensor.is_floating_point():
            return tensor.to(getattr(torch, args.dtype))
        return tensor

    for name in sorted(file_of):
        size = read(name).nbytes
        if parts[-1] and sizes[-1] + size > limit:
            parts.append([])
            sizes.append(0)
        parts[-1].append(name)
        sizes[-1] += size

    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        write_tensors(directory / file, {name: read(name) for name in names}, {"format": "pt"})
    if len(parts) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=2)


if __name__ == "__main__":
    checked_command(main, Template | PadToken | AddTokens | Temperature | Convert | Merge)
