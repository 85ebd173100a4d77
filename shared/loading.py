"""Load models and tokenizers, check them, and shard the models."""

import hashlib
import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from shared import UserError, first_line
from shared.attention import ATTENTION_NAME, span_attention
from shared.batches import Batches
from shared.checkpoint import published, step_of
from shared.distributed import Ranks, from_main, shard
from shared.encode import end_ids
from shared.files import bytes_of, is_complete, missing_path
from shared.last_layer import skip_unread
from shared.lora import (
    ADAPTER_CONFIG,
    Adapter,
    Lora,
    add_adapter,
    base_of,
    find_adapter,
    load_tensors,
    lora_of,
    merge,
    set_reward_entries,
)
from shared.model import Policy, RewardModel
from shared.packing import check_packing, reason_of_refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

POLICY_CLASS = "AutoModelForCausalLM"
MULTIMODAL_CLASS = "AutoModelForImageTextToText"
REWARD_MODEL_CLASS = "AutoModelForSequenceClassification"
REWARD_HEAD = "score.weight"

AnyModel = TypeVar("AnyModel", Policy, RewardModel)


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(path: str, reference: str | None = None) -> "tuple[PreTrainedTokenizerBase, PretrainedConfig]":
    """The tokenizer and the configuration of a model directory or hub id.

    Raises UserError if they cannot be loaded, or if the reference has another vocabulary.
    """
    tokenizer, config = _load_tokenizer_and_config(path)
    if reference is not None:
        reference_tokenizer, reference_config = _load_tokenizer_and_config(reference)
        if reference_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"--reference {reference}: its tokenizer is not that of {path}")
        reference_size = reference_config.get_text_config().vocab_size
        size = config.get_text_config().vocab_size
        if reference_size != size:
            sizes = f"its vocabulary size is {reference_size}, that of {path} is {size}"
            raise UserError(f"--reference {reference}: {sizes}; resize one of them")
    return tokenizer, config


def _load_tokenizer_and_config(path: str) -> "tuple[PreTrainedTokenizerBase, PretrainedConfig]":
    from transformers import AutoTokenizer

    problem = missing_path(path)
    if problem:
        raise UserError(f"model {path}: {problem}")
    _refuse_run(path)
    adapter = find_adapter(path)
    source = path
    if adapter is not None and Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        source = adapter.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistakes
        raise _unloadable(path, error) from None
    return tokenizer, _load_config(path)


def _load_config(path: str, **options: Any) -> "PretrainedConfig":
    """The configuration of a model; of an adapter, that of its base as the adapter changes it."""
    from transformers import AutoConfig

    adapter = find_adapter(path)
    if adapter is not None:
        path = adapter.base
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        config.get_text_config()  # raises an error if there are several
    except Exception as error:
        raise _unloadable(path, error, adapter) from None
    if adapter is not None:
        set_reward_entries(config, adapter)
    return config


def _refuse_run(path: str) -> None:
    """Raises UserError for a checkpoint of a run, or for a run that has not exported its model."""
    directory = Path(path).resolve()
    if (directory / "state.json").is_file() and (directory / "manifest.json").is_file():
        checkpoints = [checkpoint for checkpoint in published(directory.parent) if checkpoint == directory]
        reason = "is a checkpoint, not a model"
    elif (directory / "run.json").is_file() and not _is_model(directory):
        checkpoints = published(directory / "checkpoints")
        reason = "is a run that has not exported its model"
    else:
        return
    remedy = ""
    if checkpoints:
        newest = checkpoints[-1]
        command = f"python scripts/export.py {newest.parent.parent} --step {step_of(newest)} --output-dir DIR"
        remedy = f"; write one by: {command}"
    raise UserError(f"model {path}: {reason}{remedy}")


def _is_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _unloadable(path: str, error: Exception, adapter: Adapter | None = None) -> UserError:
    whose = ""
    if adapter is not None:
        whose = f", the base model of {adapter.path},"
    return UserError(f"model {path}{whose}: cannot be loaded ({first_line(error)})")


# ---------------------------------------------------------------- models


def load_policy(args: Any, ranks: Ranks) -> Policy:
    """The policy to train, from `args.model`, in full or by an adapter. Raises UserError as `load_policy_from` does."""
    source = _Source(_policy_class(args.model), args.model, lora=lora_of(args))
    policy = _load(Policy, source, ranks, args.activation_checkpointing)
    if args.compile:
        compile_layers(policy)
    _say_what_is_left_out(policy, args.model, ranks)
    return policy


def load_policy_from(path: str, ranks: Ranks, activation_checkpointing: bool = False) -> Policy:
    """Load a causal language model in float32, check it, and shard it. Raises UserError if one of these fails.

    An adapter is merged into its base model.
    """
    source = _Source(_policy_class(path), path)
    return _load(Policy, source, ranks, activation_checkpointing)


def load_reward_model(
    args: Any, ranks: Ranks, tokenizer: "PreTrainedTokenizerBase", *sets: Batches | None
) -> RewardModel:
    """The reward model to train, from `args.model`. A language model gets a new head, drawn by `args.seed`.

    The classifier of transformers finds the end of a completion by the pad token, which no completion may end with. The
    tokenizer gets another one if need be, which occurs in none of the sets. Raises UserError if there is none, and as
    `load_policy` does.
    """
    _set_pad_token(tokenizer, args.model, sets, ranks)
    torch.manual_seed(args.seed)
    source = _Source(REWARD_MODEL_CLASS, args.model, {"num_labels": 1}, REWARD_HEAD, lora_of(args))
    model = _load(RewardModel, source, ranks, args.activation_checkpointing)
    if args.compile:
        compile_layers(model)
    for config in (model.lm.config, model.lm.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    _say_what_is_left_out(model, args.model, ranks)
    return model


def compile_layers(model: Policy | RewardModel) -> None:
    """Compile all layers but the last one, of which only a part is computed by hooks, and the head of a policy.

    All sizes of rows share the compiled code. It is made by the first forward pass, which takes up to a minute.
    """
    for layer in _layers(model)[:-1]:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    model.is_compiled = True


def load_scorer(path: str, ranks: Ranks) -> RewardModel:
    """A trained reward model. Raises UserError if it has no head, and as `load_policy` does."""
    return _load(RewardModel, _Source(REWARD_MODEL_CLASS, path, {"num_labels": 1}), ranks)


def load_generator(path: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A causal language model as transformers has it, to generate with. Raises UserError if it cannot be loaded."""
    adapter = find_adapter(path)
    if adapter is None:
        lm = _from_pretrained(_policy_class(path), path, dtype=dtype)
    else:
        lm = merge(_from_pretrained(_policy_class(path), adapter.base, dtype=torch.float32), adapter)
    return lm.to(device, dtype).eval()


def _policy_class(path: str) -> str:
    """The auto class of transformers that loads a language model whole, with the parts that read no text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = _load_config(path)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise UserError(f"model {path}: is a reward model (a sequence classifier), not a language model")
    if config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return MULTIMODAL_CLASS
    return POLICY_CLASS


def _say_what_is_left_out(model: Policy | RewardModel, path: str, ranks: Ranks) -> None:
    """Print that a mixture of experts is trained without its load-balancing loss, and what is not trained."""
    if not ranks.is_main:
        return
    coefficient = getattr(model.lm.config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient:
        left_out = f"its load-balancing loss (router_aux_loss_coef {coefficient}) is left out"
        tqdm.write(f"model {path}: a mixture of experts; {left_out}")

    if model.adapter_config is not None:
        trained = sum(parameter.numel() for parameter in model.parameters())
        whole = sum(parameter.numel() for parameter in model.lm.parameters())
        rank = model.adapter_config.r
        tqdm.write(f"model {path}: a LoRA adapter of rank {rank} is trained, {trained:,} of {whole:,} parameters")
        return
    frozen = set()
    for name, parameter in model.lm.named_parameters():
        if not parameter.requires_grad:
            frozen.add(name.removeprefix("model.").split(".")[0])
    if frozen:
        tqdm.write(f"model {path}: its text part is trained; frozen are its {', '.join(sorted(frozen))}")


def _set_pad_token(
    tokenizer: "PreTrainedTokenizerBase", path: str, sets: Iterable[Batches | None], ranks: Ranks
) -> None:
    """Let the pad token be one that rows do not hold. The tokenizer's own is kept if it is such a token."""
    unfit: dict[int, str] = {}
    for batches in sets:
        if batches is not None:
            unfit |= dict.fromkeys(batches.groups.tokens.unique().tolist(), "occurs in the rows")
    unfit |= unfit_for_padding(tokenizer, path)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in unfit:
        return

    special = pad_tokens(tokenizer, unfit)
    if not special:
        command = f"python scripts/prepare_model.py pad-token --model {path} --output-dir DIR"
        raise UserError(f"model {path}: a reward model needs a pad token that no row holds; give it one by: {command}")
    new_id = special[0]
    new = tokenizer.added_tokens_decoder[new_id].content
    line = f"model {path}: the pad token becomes {new}"
    if tokenizer.pad_token_id is not None:
        line += f"; {tokenizer.pad_token} {unfit[tokenizer.pad_token_id]}"
    tokenizer.pad_token = new
    if ranks.is_main:
        tqdm.write(line)


def pad_tokens(tokenizer: "PreTrainedTokenizerBase", unfit: Container[int]) -> list[int]:
    """The ids of special tokens that can pad, the best first."""
    # texts that are scored later may hold the unknown token, so it comes last
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in unfit]
    return sorted(special, key=lambda i: (i == tokenizer.unk_token_id, i))


def unfit_for_padding(tokenizer: "PreTrainedTokenizerBase", path: str) -> dict[int, str]:
    """The special tokens that rows hold, or may hold when others are scored, and why. {id: reason}"""
    vocab_size = _load_config(path).get_text_config().vocab_size
    template = str(tokenizer.chat_template)
    unfit = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.content in template:
            unfit[i] = "stands in the chat template"
        if i >= vocab_size:
            unfit[i] = "has no embedding"
    if tokenizer.bos_token_id is not None:
        unfit[tokenizer.bos_token_id] = "begins a text"
    return unfit | dict.fromkeys(end_ids(tokenizer), "ends a completion")


class _Source(NamedTuple):
    """Which class of transformers reads a model, from where, and how."""

    auto_class: str
    path: str
    options: dict[str, Any] = {}
    new_tensor: str = ""  # the only one that may be missing from the weights
    lora: Lora | None = None  # what is trained instead of the weights


def _load(kind: type[AnyModel], source: _Source, ranks: Ranks, activation_checkpointing: bool = False) -> AnyModel:
    """The first process reads and checks the model. The others make it without weights, which they get when it is cut.

    Raises UserError, the same on every process, if it cannot be loaded, or if its architecture computes something that
    packed rows do not reproduce.
    """
    model = None
    problem = None
    fingerprint = ""
    if ranks.is_main:
        try:
            model = _read_and_check(kind, source, activation_checkpointing)
            fingerprint = _weights_hash(model.lm)
            _cast_frozen(model, ranks.dtype)
        except UserError as error:
            problem = str(error)
    problem, fingerprint = from_main((problem, fingerprint))
    if problem:
        raise UserError(problem)

    if model is None:
        model = kind(_without_weights(source))
        _prepare(model, source, activation_checkpointing)
    model.fingerprints["model"] = fingerprint
    model.sync = shard(model, _layers(model), ranks, _read_modules(model))
    return model


def _read_and_check(kind: type[AnyModel], source: _Source, activation_checkpointing: bool) -> AnyModel:
    model = kind(_load_lm(source))
    try:
        _prepare(model, source, activation_checkpointing)
        if source.lora is not None and source.lora.start is not None:
            load_tensors(model.lm, source.lora.start)
        check_packing(model)
    except UserError:
        raise
    except Exception as error:  # an architecture that does not fit fails in many ways
        raise _unsupported(source.path, reason_of_refusal(model, error)) from None
    if model.lm.config.get_text_config() is not model.lm.config:
        _freeze_other_parts(model, base_of(source.path))
    return model


def _prepare(model: Policy | RewardModel, source: _Source, activation_checkpointing: bool) -> None:
    """Set what a forward pass over packed rows does, which the weights do not say."""
    lm = model.lm
    layers = _layers(model)
    if source.lora is not None:
        head = None
        if isinstance(model, RewardModel):
            head = model.head
        model.adapter_config = add_adapter(lm, layers, head, source.lora)
    _remove_randomness(lm)
    lm.train()  # activation checkpointing works in training mode only
    if activation_checkpointing:
        # newer transformers have it under the first name, and warn of the second
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    skip_unread(layers[-1])


def _cast_frozen(model: Policy | RewardModel, dtype: torch.dtype) -> None:
    """Keep the frozen weights that a forward pass reads in its dtype, beside an adapter in float32."""
    if model.adapter_config is None:
        return
    for module in _read_modules(model):
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def _load_lm(source: _Source) -> Any:
    """A model of transformers in float32, with attention over packed rows.

    Raises UserError if it cannot be loaded or is quantised, or if a tensor is missing or not finite.
    """
    _register_attention()
    refuse_quantised(_load_config(source.path), source.path)
    options = {**source.options, "dtype": torch.float32, "attn_implementation": ATTENTION_NAME}
    adapter = find_adapter(source.path)
    new_tensor = source.new_tensor
    if adapter is not None and adapter.is_reward_model:
        new_tensor = REWARD_HEAD  # its base model has none
    lm = _from_pretrained(source.auto_class, base_of(source.path), new_tensor, **options)
    if adapter is not None:
        set_reward_entries(lm.config, adapter)
        if source.lora is None:
            lm = merge(lm, adapter)
    for name, parameter in lm.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model {source.path}: {name} holds values that are not finite")
    return lm


def _without_weights(source: _Source) -> Any:
    """The modules of `_load_lm`'s model, whose tensors have shapes but no values."""
    import transformers

    _register_attention()
    config = _load_config(source.path, **source.options)
    auto_class = getattr(transformers, source.auto_class)
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME)


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, span_attention)


def refuse_quantised(config: "PretrainedConfig", path: str) -> None:
    """Raises UserError for the configuration of a quantised model."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None):
            raise UserError(f"model {path}: is quantised; give the full-precision checkpoint")


def _remove_randomness(lm: nn.Module) -> None:
    """Set every dropout and every noise on the routing of experts to 0."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "noise" in name):
                setattr(module, name, 0.0)


def _from_pretrained(auto_class: str, path: str, new_tensor: str = "", **options: Any) -> Any:
    """A model of transformers, all of whose weights but perhaps `new_tensor` are in its files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is checked here
    options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        lm, info = getattr(transformers, auto_class).from_pretrained(path, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistakes
        if str(error) == repr(ATTENTION_NAME):  # a KeyError: the family has a fixed list of attentions
            raise _unsupported(path, "its attention cannot be told which tokens see each other") from None
        raise _unloadable(_damaged_file(path) or path, error) from None

    mismatched = {name for name, *_ in info["mismatched_keys"]}
    wrong = sorted({*info["missing_keys"], *mismatched} - {new_tensor})
    if wrong:
        raise UserError(f"model {path}: missing or misshapen in its weights: {', '.join(wrong)}")
    return lm


def _damaged_file(path: str) -> str | None:
    for file in sorted(Path(path).glob("*.safetensors")):
        if not is_complete(file):
            return str(file)
    return None


def _unsupported(path: str, reason: str) -> UserError:
    return UserError(f"model {path}: its architecture is not supported: {reason}")


def _read_modules(model: Policy | RewardModel) -> set[nn.Module]:
    """What a forward pass over tokens uses: the text part and the head."""
    return {*model.text_model.modules(), *model.head.modules()}


def _layers(model: Policy | RewardModel) -> list[nn.Module]:
    """The layers of a transformer, from the first to the last."""
    if model.text_model.get_output_embeddings() is not None:
        raise ValueError("its text part is not a module of its own")
    num_layers = model.lm.config.get_text_config().num_hidden_layers
    for module in model.text_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError("it has no list of layers")


def _freeze_other_parts(model: Policy | RewardModel, path: str) -> None:
    """Freeze all that is neither the text part nor the head, and give it back the dtype that its file has."""
    from transformers.core_model_loading import revert_weight_conversion

    trained = {*model.text_model.state_dict(keep_vars=True).values(), *model.head.state_dict(keep_vars=True).values()}
    others = {}
    for name, tensor in model.lm.state_dict(keep_vars=True).items():
        if tensor not in trained:
            others[name] = tensor.requires_grad_(False)

    tensors_of_files = revert_weight_conversion(model.lm, others)
    for file in _weight_files(path):
        with safe_open(file, "pt") as stored:
            for name in tensors_of_files.keys() & stored.keys():
                _take_dtype(tensors_of_files[name], stored.get_tensor(name))


def _take_dtype(tensor: torch.Tensor, stored: torch.Tensor) -> None:
    """Let a tensor be as its file has it, unless an adapter was merged into it."""
    if torch.equal(tensor.float(), stored.float()):
        tensor.data = stored.clone()


def _weight_files(path: str) -> list[Path]:
    """The safetensors of a model directory, or of a hub id that has been loaded."""
    from huggingface_hub import snapshot_download

    if not Path(path).is_dir():
        path = snapshot_download(path, allow_patterns="*.safetensors", local_files_only=True)
    return sorted(Path(path).glob("*.safetensors"))


def _weights_hash(lm: Any) -> str:
    """The SHA-256 of a model's weights and configuration."""
    digest = hashlib.sha256()
    for name, tensor in lm.state_dict().items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    config = {}
    for name, value in lm.config.to_dict().items():
        if not name.startswith("_"):  # as `_name_or_path` does, which says where the model lies
            config[name] = value
    digest.update(json.dumps(config, default=str).encode())
    return digest.hexdigest()
