"""LoRA by `peft`: an adapter to train, and adapters as models.

An adapter directory has adapter_config.json, which names its base model, and adapter_model.safetensors. The tensor
base_model.model.X.lora_A.weight there is X.lora_A.default.weight in a model that peft has adapted.
"""

import functools
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shared import UserError, first_line
from shared.files import missing_path, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REWARD_ENTRIES = "reward_config.json"  # what a reward model's configuration has beside that of its base
REWARD_TASK = "SEQ_CLS"
HEAD = "score"
PREFIX = "base_model.model."
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of `init_lora_weights`, which leave the base model as it is
# settings of peft that change nothing of what is trained, or that are read here; all others must be peft's defaults
FREE_SETTINGS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory or hub id."""

    path: str
    base: str
    settings: dict[str, Any]

    @property
    def is_reward_model(self) -> bool:
        """Whether it has the head of a sequence classifier."""
        return self.settings.get("task_type") == REWARD_TASK


@dataclass(frozen=True)
class Lora:
    """What is trained instead of the weights."""

    rank: int
    alpha: int | None
    seed: int  # of a new adapter
    base: str
    start: Adapter | None = None  # an adapter to go on with


def find_adapter(path: str) -> Adapter | None:
    """The adapter in a directory or behind a hub id. Raises UserError if its base model is not there."""
    if Path(path).is_dir():
        file = Path(path) / ADAPTER_CONFIG
    else:
        file = Path(_file_of_hub(path))
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model {path}: its {ADAPTER_CONFIG} cannot be read ({first_line(error)})") from None

    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"model {path}: is an adapter that does not name its base model")
    problem = missing_path(base)
    if problem is None and (Path(base) / ADAPTER_CONFIG).exists():
        problem = "is an adapter too; merge it into its own base model"
    if problem:
        raise UserError(f"model {path}: is an adapter of {base}: {problem}")
    return Adapter(path, base, settings)


@functools.cache
def _file_of_hub(name: str) -> str:
    """The adapter_config.json of a hub id, downloaded if need be; "" if it has none."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) or ""
    except Exception:  # what is wrong with the name is said when its configuration is loaded
        return ""


def base_of(path: str) -> str:
    """The directory or hub id that has the weights: of an adapter its base model, else the path itself."""
    adapter = find_adapter(path)
    if adapter is None:
        return path
    return adapter.base


def lora_of(args: Any) -> Lora | None:
    """What `--lora-rank` asks for. Raises UserError if `args.model` is an adapter of another rank or scale."""
    rank = args.lora_rank
    if rank is None:
        if args.lora_alpha is not None:
            raise UserError("--lora-alpha: give --lora-rank too")
        return None

    adapter = find_adapter(args.model)
    if adapter is None:
        return Lora(rank, args.lora_alpha, args.seed, args.model)
    _check_can_go_on(adapter)
    for flag, wanted, name in (("--lora-rank", rank, "r"), ("--lora-alpha", args.lora_alpha, "lora_alpha")):
        actual = adapter.settings.get(name)
        if wanted is not None and wanted != actual:
            remedy = "to train a new adapter on it, merge it first by scripts/prepare_model.py merge"
            raise UserError(f"{flag} {wanted}: the adapter {args.model} has {actual}; {remedy}")
    return Lora(rank, args.lora_alpha, args.seed, adapter.base, adapter)


def _check_can_go_on(adapter: Adapter) -> None:
    """Raises UserError unless the adapter is plain LoRA."""
    peft = _peft()
    kind = adapter.settings.get("peft_type")
    problem = None
    if kind != "LORA":
        problem = f"is no LoRA adapter but {kind}"
    else:
        for name, default in peft.LoraConfig().to_dict().items():
            actual = adapter.settings.get(name, default)
            if name not in FREE_SETTINGS and actual != default:
                problem = f"is no plain LoRA adapter ({name})"
    if adapter.settings.get("modules_to_save") not in (None, [HEAD]):
        problem = f"trains whole modules too ({', '.join(adapter.settings['modules_to_save'])})"
    if adapter.settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        problem = "has changed the weights of its base model as it started (init_lora_weights)"
    if problem:
        raise UserError(f"model {adapter.path}: {problem}; without --lora-rank it is merged and trained in full")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("adapters need peft: pip install -e '.[lora]'") from None
    return peft


# ---------------------------------------------------------------- an adapter to train


def add_adapter(lm: Any, layers: list[nn.Module], head: nn.Module | None, lora: Lora) -> Any:
    """Freeze a model and adapt the linear layers of its layers, in place. Returns the configuration, to be saved.

    head: of a reward model, trained beside the adapter. A new adapter begins with B = 0 and a random A.
    """
    peft = _peft()
    if lora.start is None:
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or 2 * lora.rank,
            target_modules=_linear_modules(lm, layers),
            fan_in_fan_out=any(_is_transposed(module) for layer in layers for module in layer.modules()),
        )
    else:
        settings = {name: lora.start.settings[name] for name in FREE_SETTINGS if name in lora.start.settings}
        settings |= {"lora_dropout": 0.0, "inference_mode": False, "modules_to_save": None}
        config = peft.LoraConfig(**settings)
    config.base_model_name_or_path = lora.base
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(lora.seed)
    peft.inject_adapter_in_model(config, lm)
    if head is not None:
        config.task_type = REWARD_TASK
        config.modules_to_save = [HEAD]
        head.requires_grad_(True)
    _check_places(lm, layers, head, lora)
    return config


def _linear_modules(lm: nn.Module, layers: list[nn.Module]) -> list[str]:
    """The linear modules of the layers: by the last part of their names, or in full where others have that too."""
    inside = {module for layer in layers for module in layer.modules()}
    names = []
    for name, module in lm.named_modules():
        if module in inside and (isinstance(module, nn.Linear) or _is_transposed(module)):
            names.append(name)

    last_parts = {name.rpartition(".")[2] for name in names}
    for name, _ in lm.named_modules():
        if name.rpartition(".")[2] in last_parts and name not in names:
            return sorted(names)
    return sorted(last_parts)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _check_places(lm: nn.Module, layers: list[nn.Module], head: nn.Module | None, lora: Lora) -> None:
    """Raises UserError if an adapter has tensors outside the layers, where packed rows do not read them."""
    allowed = {parameter for layer in layers for parameter in layer.parameters()}
    if head is not None:
        allowed |= set(head.parameters())
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and parameter not in allowed:
            module = re.split(r"\.lora_", name)[0]
            problem = f"adapts {module}, outside the layers"
            raise UserError(f"model {lora.base}: its adapter {problem}; without --lora-rank it is merged")


def load_tensors(lm: nn.Module, adapter: Adapter) -> None:
    """Give an adapted model the tensors of an adapter. Raises UserError if they do not fit, or are not finite."""
    tensors = _stored_tensors(adapter)
    parameters = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            parameters[_stored_name(name)] = parameter
    if not adapter.is_reward_model:
        parameters.pop(f"{PREFIX}{HEAD}.weight", None)  # a new head
    _check_names(adapter, tensors, parameters)
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"model {adapter.path}: {name} is of another size than its base model needs")
        parameter.data.copy_(tensors[name])


def _stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Raises UserError if they cannot be read, or are not finite."""
    _peft()
    from peft.utils import load_peft_weights

    try:
        tensors = load_peft_weights(adapter.path, "cpu")
    except Exception as error:  # safetensors and torch raise errors of many classes
        raise UserError(f"model {adapter.path}: its adapter cannot be read ({first_line(error)})") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"model {adapter.path}: {name} holds values that are not finite")
    return tensors


def _stored_name(name: str) -> str:
    """The name in an adapter's file of a parameter of an adapted model."""
    return PREFIX + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)


def _check_names(adapter: Adapter, tensors: Iterable[str], expected: Iterable[str]) -> None:
    different = sorted(set(tensors) ^ set(expected))
    if different:
        problem = f"its tensors do not fit its base model {adapter.base}"
        raise UserError(f"model {adapter.path}: {problem}: {different[0]}, {len(different)} in all")


# ---------------------------------------------------------------- an adapter as a model


def merge(lm: Any, adapter: Adapter) -> Any:
    """A model with its adapter added to its weights. Raises UserError if peft cannot do that."""
    peft = _peft()
    tensors = _stored_tensors(adapter)
    _refuse_ties(lm, tensors, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the names are compared here
            adapted = peft.PeftModel.from_pretrained(lm, adapter.path, torch_device="cpu")
        expected = peft.get_peft_model_state_dict(adapted)
        _check_names(adapter, tensors, expected)
        return adapted.merge_and_unload().requires_grad_(True)
    except UserError:
        raise
    except Exception as error:  # peft raises errors of many classes
        kind = adapter.settings.get("peft_type")
        raise UserError(f"model {adapter.path}: its adapter ({kind}) cannot be merged ({first_line(error)})") from None


def _refuse_ties(lm: Any, tensors: Iterable[str], adapter: Adapter) -> None:
    """Raises UserError for an adapter of one of two tied weights, which would change the other as well."""
    head = lm.get_output_embeddings()
    embedding = lm.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = [name for name, module in lm.named_modules() if module in (head, embedding)]
    for tensor in tensors:
        if any(tensor.startswith(f"{PREFIX}{name}.") for name in names):
            raise UserError(f"model {adapter.path}: adapts {tensor}, which is tied to another weight; cannot be merged")


def set_reward_entries(config: "PretrainedConfig", adapter: Adapter) -> None:
    """Let the configuration of the base of a reward model be that of the reward model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    if not adapter.is_reward_model:
        return
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    config.architectures = [classifier or "ForSequenceClassification"]
    config.num_labels = 1
    file = Path(adapter.path) / REWARD_ENTRIES
    if file.is_file():
        entries = json.loads(file.read_text(encoding="utf-8"))
        config.reward_mean = entries["reward_mean"]
        for part in (config, config.get_text_config()):
            part.pad_token_id = entries["pad_token_id"]


# ---------------------------------------------------------------- saving


def write_adapter(config: Any, tensors: dict[str, Any], lm_config: "PretrainedConfig", directory: Path) -> None:
    """An adapter directory, as peft writes it. tensors: those that were trained, by their names in the model."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in tensors.items():
        stored[_stored_name(name)] = tensor.contiguous()
    save_file(stored, directory / ADAPTER_WEIGHTS, {"format": "pt"})

    config.save_pretrained(str(directory))
    settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings["inference_mode"] = True
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # peft has a set
    write_json(directory / ADAPTER_CONFIG, settings, indent=2)

    if config.task_type == REWARD_TASK:
        text_config = lm_config.get_text_config()
        entries = {"reward_mean": lm_config.reward_mean, "pad_token_id": text_config.pad_token_id}
        write_json(directory / REWARD_ENTRIES, entries, indent=2)
