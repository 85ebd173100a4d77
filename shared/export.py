"""Write the trained model as a Hugging Face directory.

weights            in float32, with the configuration; or the adapter that was trained, in the form of peft
tokenizer          the files of the starting model, byte for byte where the tokenizer is still the one that they give
generation config  that of the starting model, with the ids that ended the completions of training
model card         README.md; that of a reward model has code that computes its rewards with transformers alone
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from shared.distributed import Ranks, unsharded
from shared.encode import Encoder, end_ids
from shared.files import storage_errors, write_json
from shared.lora import ADAPTER_CONFIG, base_of, write_adapter
from shared.model import PackedModel, RewardModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
FILE_SIZE = 5 * 10**9  # bytes of weights in a file; a layer is never split
LAST_FILE = "config.json"  # nothing can be loaded without it, so it appears when all others are there
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("*processor_config.json",)  # of a model that reads pictures too
SPECIAL_TOKENS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def export(
    model: PackedModel, tokenizer: "PreTrainedTokenizerBase", directory: Path, model_card: str, ranks: Ranks
) -> None:
    """Write the weights, gathered, with configuration, tokenizer and model card. Raises StorageError.

    Trained weights are in float32, frozen ones in the dtype of the starting model's files.
    """
    temporary = directory / ".export"
    source = source_directory(tokenizer)
    if isinstance(model, RewardModel):
        model_card += reward_recipe(tokenizer, model.adapter_config)
    try:
        with storage_errors(directory):
            if model.adapter_config is None:
                _write_weights(model, temporary, ranks)
            else:
                _write_adapter(model, temporary, ranks)
            if not ranks.is_main:
                return
            write_tokenizer(tokenizer, source, temporary)
            copy_files(source, PROCESSOR_FILES, temporary)
            if model.lm.can_generate() and model.adapter_config is None:
                generation = model.lm.generation_config
                write_generation_config(model.lm.config, generation, end_ids(tokenizer), source, temporary)
            (temporary / "README.md").write_text(model_card, encoding="utf-8")
            files = sorted(temporary.iterdir(), key=lambda file: file.name in (LAST_FILE, ADAPTER_CONFIG))
            for file in files:
                _move(file, directory / file.name)
    finally:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(file: Path, target: Path) -> None:
    if target.is_dir():  # of an earlier export of the same run
        shutil.rmtree(target)
    os.replace(file, target)


def source_directory(tokenizer: "PreTrainedTokenizerBase") -> Path | None:
    """The directory that the tokenizer was loaded from, for a hub id that of its files in the cache."""
    from huggingface_hub import snapshot_download

    name = tokenizer.name_or_path
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # it is gone, or was never there
        return None


# ---------------------------------------------------------------- model


def _write_weights(model: PackedModel, directory: Path, ranks: Ranks) -> None:
    """Write the weights and the configuration. One file at a time is gathered, in the memory of the first process."""
    parts = _parts(model.lm)
    files: dict[str, Path] = {}  # which file holds a tensor, by the tensor's name there
    for number, names in enumerate(parts, 1):
        state_dict = _gather(model, names, ranks)
        if ranks.is_main and len(parts) == 1:
            _write_model(model.lm, state_dict, directory)
        elif ranks.is_main:
            # transformers names the tensors as the files have them, and deletes what lies beside what it writes
            part = directory / f"part-{number}"
            _write_model(model.lm, state_dict, part)
            file = directory / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            os.replace(part / WEIGHTS, file)
            os.replace(part / LAST_FILE, directory / LAST_FILE)
            shutil.rmtree(part)
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
        del state_dict

    if files:
        total_size = sum(file.stat().st_size for file in set(files.values()))
        weight_map = {name: file.name for name, file in sorted(files.items())}
        write_json(
            directory / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        )


def _write_adapter(model: PackedModel, directory: Path, ranks: Ranks) -> None:
    """Write the tensors that were trained, as an adapter."""
    names = [name for name, tensor in model.lm.state_dict(keep_vars=True).items() if tensor.requires_grad]
    tensors = _gather(model, names, ranks)
    if ranks.is_main:
        write_adapter(model.adapter_config, tensors, model.lm.config, directory)


def _parts(lm: Any) -> list[list[str]]:
    """The names of the weights of each file: first those outside all layers, then layer after layer."""
    tensors = lm.state_dict(keep_vars=True)
    names_of_layers: dict[str, list[str]] = {}
    for name in tensors:
        match = re.match(r".*?\.\d+\.", name)
        prefix = match[0] if match else ""
        names_of_layers.setdefault(prefix, []).append(name)

    parts: list[list[str]] = [[]]
    size = 0
    for layer in sorted(names_of_layers, key=lambda layer: layer != ""):
        names = names_of_layers[layer]
        layer_size = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        if parts[-1] and size + layer_size > FILE_SIZE:
            parts.append([])
            size = 0
        parts[-1] += names
        size += layer_size
    return parts


def _gather(model: PackedModel, names: list[str], ranks: Ranks) -> dict[str, Tensor | None]:
    """Weights by name, in the memory of the first process; None on the others."""
    tensors = model.lm.state_dict(keep_vars=True)
    state_dict: dict[str, Tensor | None] = {}
    gathered: dict[int, Tensor | None] = {}
    for name in names:
        tensor = tensors[name]
        # tied weights are one tensor under two names
        if id(tensor) not in gathered:
            weights = unsharded(tensor)
            if ranks.is_main:
                gathered[id(tensor)] = weights.detach().cpu()
            else:
                gathered[id(tensor)] = None
        state_dict[name] = gathered[id(tensor)]
    return state_dict


def _write_model(lm: Any, state_dict: dict[str, Tensor | None], directory: Path) -> None:
    from transformers import GenerationConfig

    loaded = getattr(lm, "generation_config", None)
    if lm.can_generate():
        # transformers refuses to save some generation configurations that it has loaded, but never this one
        lm.generation_config = GenerationConfig()
    lm.save_pretrained(directory, state_dict=state_dict, max_shard_size=2**62)
    lm.generation_config = loaded

    lm.config.dtype = "float32"  # the text part's, whatever a frozen part has
    lm.config.save_pretrained(directory)


def write_generation_config(
    config: "PretrainedConfig",
    default: "GenerationConfig",
    eos_ids: list[int],
    source: Path | None,
    directory: Path,
) -> None:
    """What the starting model has, as it stands, with the ids that end a completion added to `eos_token_id`.

    Plain transformers stops at each of them. A chat model ends its turns with a token that is often not its EOS.
    default: what is written if the starting model has no such file
    """
    copies = copy_files(source, [GENERATION_CONFIG], directory)
    content = read_json(directory / GENERATION_CONFIG)
    if content is None:
        copies = []
        content = json.loads(default.to_json_string())
        content.pop("_from_model_config", None)

    known = content.get("eos_token_id")
    is_given = known is not None
    if not is_given:
        known = config.get_text_config().eos_token_id
    if not isinstance(known, list):
        known = [known]
    all_ids = [i for i in dict.fromkeys([*known, *eos_ids]) if i is not None]
    if copies and is_given and all_ids == known:
        return  # it stays byte for byte

    content["eos_token_id"] = all_ids
    if len(all_ids) == 1:
        content["eos_token_id"] = all_ids[0]
    write_json(directory / GENERATION_CONFIG, content, indent=2)


# ---------------------------------------------------------------- tokenizer


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", source: Path | None, directory: Path) -> None:
    """The files of the starting model, with the pad token and the template, if they give this tokenizer; else new ones.

    Other programs, and earlier transformers, cannot read everything that this transformers would write.
    """
    copied = copy_files(source, TOKENIZER_FILES, directory)
    loaded = _load_tokenizer(directory)
    if loaded is not None and loaded.pad_token != tokenizer.pad_token:
        _write_pad_token(tokenizer.pad_token, directory)
        loaded = _load_tokenizer(directory)
    template = tokenizer.chat_template
    if loaded is not None and isinstance(template, str) and loaded.chat_template != template:
        _write_chat_template(template, directory)
        loaded = _load_tokenizer(directory)
    if loaded is None or _content(loaded) != _content(tokenizer):
        for file in copied:
            file.unlink(missing_ok=True)
        tokenizer.save_pretrained(directory)


def _load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that transformers finds in a directory, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # it raises OSError, ValueError, KeyError, ... for the same mistakes
        return None


def _content(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """All that the token ids of rows depend on, and the special tokens."""
    model: Any = sorted(tokenizer.get_vocab().items())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # settings of the last call
            model.pop(name)
    return [model, tokenizer.chat_template, tokenizer.special_tokens_map]


def _write_pad_token(pad_token: str, directory: Path) -> None:
    """Change the name of the pad token, and nothing else, in the files that have one."""
    for name in SPECIAL_TOKENS_FILES:
        content = read_json(directory / name)
        if content is not None:
            content["pad_token"] = pad_token
            write_json(directory / name, content, indent=2)


def _write_chat_template(template: str, directory: Path) -> None:
    """Give the tokenizer this template alone, in the file that comes first, and in others that have one."""
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = read_json(directory / name)
        if content is not None and "chat_template" in content:
            content["chat_template"] = template
            write_json(directory / name, content, indent=2)


def copy_files(source: Path | None, patterns: Iterable[str], directory: Path) -> list[Path]:
    """Copy the files that match and can be read; returns the copies."""
    copies: list[Path] = []
    if source is None:
        return copies
    for file in sorted({file for pattern in patterns for file in source.glob(pattern)}):
        try:
            content = file.read_bytes()
        except OSError:  # such as of a directory
            continue
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
        copies.append(copy)
    return copies


def read_json(file: Path) -> dict | None:
    """The content of a JSON file, or None if there is no such file or no JSON object in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    return content


# ---------------------------------------------------------------- model card


def model_card(algorithm: str, args: dict[str, Any], remark: str = "") -> str:
    """The README.md of a trained model: what it is, and how to train it again."""
    base = args["model"]
    library = "transformers"
    if args.get("lora_rank") is not None:
        library = "peft"
        base = base_of(base)
    front_matter = f"---\nlibrary_name: {library}\nbase_model: {base}\ntags: [{algorithm}]\n---\n"
    title = f"\n# {args['model']}, trained by {algorithm} with cleanpo\n\n"
    settings = [f"- {name}: {value}\n" for name, value in args.items()]
    return front_matter + title + remark + "".join(settings)


RECIPE = """
## Rewards

A reward is read at the last token of a completion: its EOS, or the end of the assistant's last turn. A chat template
may write more behind that, such as a line break, where the model was never trained. With transformers alone, this code
gives the rewards that `scripts/score.py` of cleanpo gives. Both subtract `reward_mean`, the mean over the completions
of training. The texts must not hold the strings of special tokens.

```python
from os.path import commonprefix

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = "."  # where this file lies
model = AutoModelForSequenceClassification.from_pretrained(FOLDER).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)


def reward(ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item() - model.config.reward_mean


def encode(prompt, text, add_special_tokens):  # in two parts if the tokens of the prompt are not the first of the text
    first = tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids
    ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    if ids[: len(first)] != first:
        ids = first + tokenizer(text[len(prompt) :], add_special_tokens=False).input_ids
    return ids


def reward_of_text(prompt, completion):
    ids = encode(prompt, prompt + completion, add_special_tokens=True)
    return reward([*ids, tokenizer.eos_token_id])
"""
LOADING = """model = AutoModelForSequenceClassification.from_pretrained(FOLDER).eval()
"""
LOADING_OF_ADAPTER = """model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
model = PeftModel.from_pretrained(model, FOLDER).eval()
with open(f"{FOLDER}/reward_config.json") as file:
    model.config.update(json.load(file))
"""
CHAT_RECIPE = """

def reward_of_chat(messages):  # the last message is the assistant's
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = (text.rpartition(TURN_END)[0] or text) + TURN_END
    return reward(encode(commonprefix([prompt, text]), text, add_special_tokens=False))
"""


def reward_recipe(tokenizer: "PreTrainedTokenizerBase", adapter_config: Any = None) -> str:
    """The part of a reward model's card that says how to compute its rewards without this project."""
    recipe = RECIPE
    if adapter_config is not None:
        loading = LOADING_OF_ADAPTER.replace("BASE", repr(adapter_config.base_model_name_or_path))
        recipe = recipe.replace(LOADING, loading)
        recipe = recipe.replace("transformers alone", "transformers and peft")
        recipe = recipe.replace("from os", "import json\nfrom os")
        recipe = recipe.replace("import torch\n", "import torch\nfrom peft import PeftModel\n")
    if tokenizer.chat_template:
        turn_end = Encoder(tokenizer).template.turn_ends.last
        recipe += CHAT_RECIPE.replace("TURN_END", repr(turn_end or tokenizer.eos_token))
    return recipe + "```\n"
