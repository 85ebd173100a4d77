"""Copies of models with a template, a pad token, new tokens, a temperature or another dtype."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_export import chats
from test_reward_export import pad_token_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scripts import prepare_model
from scripts.prepare_model import AddTokens, Convert, PadToken, Temperature, Template
from shared import UserError
from shared.loading import load_tokenizer

TAU = 0.8
ENDING = "</s>"


def prepare(kind: Any, model: Path, out: Path, **options: Any) -> Path:
    prepare_model.main(kind(model=str(model), output_dir=out, **options))
    assert not list(out.parent.glob(".*.tmp"))
    return out


def logits(model: Path, vocab: int = 400) -> Tensor:
    """The logits of plain transformers at arbitrary tokens."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return lm(torch.randint(vocab, (3, 20), generator=generator)).logits


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(model: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def unchanged_files(before: Path, after: Path) -> set[str]:
    """The files that both directories have, byte for byte."""
    names = {path.name for path in before.iterdir() if path.is_file()}
    return {name for name in names if (after / name).exists() and same_bytes(before / name, after / name)}


def same_bytes(before: Path, after: Path) -> bool:
    return before.read_bytes() == after.read_bytes()


def make_gpt2(folder: Path) -> Path:
    """A model with one special token, which begins and ends texts."""
    return tiny.make_model(folder, "gpt2", bos=False)


# ---------------------------------------------------------------- temperature

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "qwen2 tied": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2 tied": ("gpt2", {}),
    "gemma tied": ("gemma", {"tie_word_embeddings": True}),
    "gemma4_text capped": ("gemma4_text", {"tie_word_embeddings": True}),
    "gemma3 with pictures": ("gemma3", {}),
    "cohere scaled": ("cohere", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_copy_has_the_logits_divided_by_tau(tmp_path: Path, name: str) -> None:
    architecture, options = ARCHITECTURES[name]
    model = make_model(tmp_path / "model", architecture, **options)
    out = prepare(Temperature, model, tmp_path / "out", temperature=TAU)

    expected = logits(model) / TAU
    difference = (logits(out) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    before = weights(model)
    after = weights(out)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert 1 <= len(changed) <= 2, "a weight, and perhaps its bias"
    assert unchanged_files(model, out) >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert f"divided by {TAU}" in (out / "README.md").read_text()


def make_model(folder: Path, architecture: str, **options: Any) -> Path:
    if architecture in tiny.ARCHITECTURES:
        return tiny.make_model(folder, architecture, **options)
    return families.save_model(architecture, folder, 5.0, **options)


def test_a_model_in_bfloat16_loses_nothing(tmp_path: Path) -> None:
    """The divided weights are stored in float32; the others stay as they are."""
    model = tiny.make_model(tmp_path / "model")
    low = prepare(Convert, model, tmp_path / "low", dtype="bfloat16")
    out = prepare(Temperature, low, tmp_path / "out", temperature=TAU)
    expected = logits(low) / TAU
    assert (logits(out) - expected).abs().max() <= 1e-5 * expected.abs().max()
    dtypes = {name: tensor.dtype for name, tensor in weights(out).items()}
    assert dtypes.pop("lm_head.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_no_weights_to_divide(tmp_path: Path) -> None:
    """OLMo's norms have no weights."""
    model = make_model(tmp_path / "model", "olmo", tie_word_embeddings=True)
    with pytest.raises(UserError, match="no weights of its architecture can be divided"):
        prepare(Temperature, model, tmp_path / "out", temperature=TAU)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_old_logits_stay_when_tokens_are_added(tmp_path: Path, architecture: str) -> None:
    model = tiny.make_model(tmp_path / "model", architecture)
    out = prepare(AddTokens, model, tmp_path / "out", tokens=("<think>", "</think>"))
    assert torch.equal(logits(out)[..., :400], logits(model))

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [400, 401]
    lm = AutoModelForCausalLM.from_pretrained(out)
    rows = lm.get_input_embeddings().weight
    assert rows.shape[0] == lm.config.vocab_size == 402
    assert torch.allclose(rows[400], rows[:400].mean(0), atol=1e-6)
    assert torch.equal(rows[400], rows[401])
    text = AutoTokenizer.from_pretrained(model)("bad <s> ok 42").input_ids
    assert tokenizer("bad <s> ok 42").input_ids == text
    assert tokenizer("ok<think>").input_ids[-1] == 400


def test_words_are_added_too(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    out = prepare(AddTokens, model, tmp_path / "out", tokens=("zyzzyva",), special=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("zyzzyva") == ["zyzzyva"]
    assert not tokenizer.added_tokens_decoder[400].special


def test_rows_that_are_there_are_used(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", vocab_size=448)
    out = prepare(AddTokens, model, tmp_path / "out", tokens=("<think>",))
    assert same_bytes(model / "model.safetensors", out / "model.safetensors")
    assert same_bytes(model / "config.json", out / "config.json")


def test_files_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """As the hub has GPT-2, in bfloat16."""
    model = make_gpt2(tmp_path / "model")
    file = model / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    out = prepare(AddTokens, model, tmp_path / "out", tokens=("<think>",))
    assert weights(out).keys() == tensors.keys()
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert torch.equal(logits(out)[..., :400], logits(model))


# ---------------------------------------------------------------- pad token


def test_a_reward_model_of_gpt2(tmp_path: Path) -> None:
    """The error of algos/rm.py names the command that helps; the rewards are those of plain transformers."""
    model = make_gpt2(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    pairs = tiny.make_rows(8, seed=1, path=rows)
    options = {"train_data": rows, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
    command = f"python scripts/prepare_model.py pad-token --model {model} --output-dir DIR"
    with pytest.raises(UserError, match=f"needs a pad token that no row holds; give it one by: {command}"):
        pad_token_of(model, rows)

    padded = prepare(PadToken, model, tmp_path / "padded")
    assert "config.json" not in unchanged_files(model, padded)
    tiny.run("algos/rm.py", tmp_path / "rm", model=padded, **options)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert tokenizer.pad_token == "<|pad|>"
    assert classifier.config.pad_token_id == tokenizer.pad_token_id == 400
    texts = [pair["prompt"] + pair["chosen"] + ENDING for pair in pairs]
    with torch.no_grad():
        together = classifier(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [classifier(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_an_unused_special_token_becomes_the_pad_token(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<free>"]})
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.resize_token_embeddings(401)
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)

    out = prepare(PadToken, model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).pad_token == "<free>"
    assert read_json(out / "config.json") == read_json(model / "config.json") | {"pad_token_id": 400}
    assert unchanged_files(model, out) >= {"model.safetensors", "tokenizer.json"}
    with pytest.raises(UserError, match="has a pad token, <free>"):
        prepare(PadToken, out, tmp_path / "again")


# ---------------------------------------------------------------- template


def test_a_template_from_a_file(tmp_path: Path) -> None:
    """Rows of messages train, and plain transformers ends its turns where the template does."""
    model = tiny.make_model(tmp_path / "model")
    file = tmp_path / "chatml.jinja"
    file.write_text(tiny.CHATML)
    turns = (tiny.TURN_START, tiny.TURN_END)
    out = prepare(Template, model, tmp_path / "out", from_file=file, tokens=turns)
    assert torch.equal(logits(out)[..., :400], logits(model))
    tokenizer, _ = load_tokenizer(str(out))
    assert tokenizer.chat_template == tiny.CHATML
    assert read_json(out / "generation_config.json")["eos_token_id"] == [1, 401]

    rows = chats(tmp_path / "rows.jsonl")
    options = {"train_data": rows, "batch_size": 4, "max_steps": 1}
    tiny.run("algos/dpo.py", tmp_path / "dpo", model=out, **options)
    assert "dropped" not in tiny.read_log(tmp_path / "dpo")
    assert AutoTokenizer.from_pretrained(tmp_path / "dpo").chat_template == tiny.CHATML


def test_a_template_from_another_model(tmp_path: Path) -> None:
    """Its tokens come along; the words of the template alone change nothing else."""
    chat = tiny.make_model(tmp_path / "chat", chat=True, vocab_size=402)
    model = tiny.make_model(tmp_path / "model")
    out = prepare(Template, model, tmp_path / "out", from_model=str(chat))
    tokenizer, config = load_tokenizer(str(out))
    assert tokenizer.convert_tokens_to_ids(tiny.TURN_END) in (400, 401)
    assert config.vocab_size == 402

    other = prepare(
        Template, chat, tmp_path / "other", from_file=write(tmp_path / "t", tiny.CHATML.replace("im_", "i"))
    )
    kept = {"tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"}
    assert unchanged_files(chat, other) >= kept
    assert "ends a turn with no special token" in (other / "README.md").read_text()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---------------------------------------------------------------- convert


def test_there_and_back(tmp_path: Path) -> None:
    """Values of bfloat16 are values of float32; the files hold the same tensors, whatever their number."""
    model = tiny.make_model(tmp_path / "model", "qwen2")
    low = prepare(Convert, model, tmp_path / "low", dtype="bfloat16", max_file_size=3e-5)
    files = sorted(low.glob("*.safetensors"))
    assert len(files) > 2
    assert read_json(low / "config.json")["dtype"] == "bfloat16"
    index = read_json(low / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(low).values())
    expected = {name: tensor.bfloat16() for name, tensor in weights(model).items()}
    assert_same(weights(low), expected)
    assert AutoModelForCausalLM.from_pretrained(low).dtype == torch.bfloat16

    back = prepare(Convert, low, tmp_path / "back", dtype="float32")
    assert_same(weights(back), {name: tensor.float() for name, tensor in expected.items()})
    assert read_json(back / "config.json")["dtype"] == "float32"
    assert torch.equal(logits(back), logits(low))
    again = prepare(Convert, back, tmp_path / "again", dtype="bfloat16", max_file_size=3e-5)
    assert unchanged_files(low, again) >= {file.name for file in files}


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_one_of_several_files_changes(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", "qwen2")
    parts = prepare(Convert, model, tmp_path / "parts", max_file_size=3e-5)
    out = prepare(Temperature, parts, tmp_path / "out", temperature=2.0)
    names = {file.name for file in parts.glob("*.safetensors")}
    assert len(unchanged_files(parts, out) & names) == len(names) - 1
    assert torch.allclose(logits(out), logits(model) / 2, atol=1e-5)


# ---------------------------------------------------------------- mistakes


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """The other files of a run are not a part of its model."""
    model = tiny.make_model(tmp_path / "model")
    (model / "checkpoints").mkdir()
    (model / "metrics.jsonl").write_text("")
    out = prepare(Convert, model, tmp_path / "out", dtype="bfloat16")
    assert not (out / "checkpoints").exists()
    assert not (out / "metrics.jsonl").exists()
    for taken in (out, model, model / "config.json"):
        with pytest.raises(UserError, match="exists; give another directory"):
            prepare(Convert, model, taken, dtype="bfloat16")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (Template, {}, "give either --from-file or --from-model"),
        (Template, {"from_file": Path("nowhere.jinja")}, "--from-file nowhere.jinja: cannot be read"),
        (Template, {"from_model": "MODEL"}, "has no chat template"),
        (AddTokens, {"tokens": ("</s>",)}, "--tokens </s>: is a token already"),
        (PadToken, {}, "has a pad token, <pad>, that no text holds"),
        (PadToken, {"token": "</s>"}, "--token </s>: ends a completion"),
        (PadToken, {"token": "a"}, "--token a: is a word of texts"),
    ],
)
def test_mistakes(tmp_path: Path, kind: Any, options: dict, message: str) -> None:
    model = tiny.make_model(tmp_path / "model")
    options = {name: str(model) if value == "MODEL" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        prepare(kind, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_template_that_shows_nothing(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    for template, message in (("{{ 1 // 0 }}", "renders no chat"), ("nothing", "shows none of the text")):
        with pytest.raises(UserError, match=message):
            prepare(Template, model, tmp_path / "out", from_file=write(tmp_path / "template", template))


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    line = tiny.command("scripts/prepare_model.py", 1, {})
    line += ["temperature", "--model", str(model), "--temperature", "0", "--output-dir", str(tmp_path / "out")]
    environment = tiny.environment(tmp_path / "cache")
    ended = subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "prepare_model.py: --temperature 0.0: must be a finite number above 0\n"


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is missing or not complete"):
        prepare(Convert, broken, tmp_path / "out", dtype="bfloat16")
    file.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        prepare(Convert, broken, tmp_path / "out", dtype="bfloat16")
