"""What leaves: tokenizer files, the ids at which others stop, the pad token, and the card of a reward model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.distributed import single_process
from shared.export import export
from shared.loading import load_policy_from, load_tokenizer

slow = pytest.mark.slow
QUICK = {"batch_size": 4, "max_steps": 1, "micro_batch_tokens": 4096}
EOT = "<|eot_id|>"
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str, *special: str) -> Any:
    """A tokenizer with EOS `</s>`, whose template writes other special tokens."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def make_chat_model(folder: Path, tokenizer: Any, architecture: str = "llama", **config: Any) -> Path:
    model = tiny.make_model(folder, architecture, vocab_size=len(tokenizer), **config)
    tokenizer.save_pretrained(model)
    return model


def chats(path: Path) -> Path:
    """Pairs of chat messages."""
    rows = []
    for row in tiny.make_rows(6, seed=3, completion_words=(2, 6), prompt_words=(1, 8)):
        messages = {"prompt": [{"role": "user", "content": row["prompt"].strip()}]}
        for side in ("chosen", "rejected"):
            messages[side] = [{"role": "assistant", "content": row[side].strip()}]
        rows.append(messages)
    return tiny.write_jsonl(path, rows)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(read_json(path) | changes))


# ---------------------------------------------------------------- tokenizer files

OF_OLD = {  # as transformers 4 has written it
    "add_prefix_space": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "extra_special_tokens": ["<s>"],
    "additional_special_tokens": [],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656,
    "field_of_others": {"é": [1]},
    "chat_template": LLAMA_3,  # the file comes first
}
OTHER_FILES = {
    "tokenizer.model": b"\x00\xff",
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": b'{"eos_token": "</s>",\n\n"bos_token": "<s>", "pad_token": "<pad>"}\n',
    "added_tokens.json": b"{ }",
    "chat_template.jinja": tiny.CHATML.encode(),
    "additional_chat_templates/rag.jinja": b"{{ messages }}\r\n",
    "preprocessor_config.json": b'{"a":1}',
}


def make_model_of_old(folder: Path, **changes: Any) -> Path:
    """A model with tokenizer files that this transformers would write otherwise."""
    model = tiny.make_model(folder)
    written = {**OF_OLD, **changes}
    (model / "tokenizer_config.json").write_text(json.dumps(written, indent=4))
    for name, content in OTHER_FILES.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    return model


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    names = [*OTHER_FILES, "tokenizer.json", "tokenizer_config.json"]
    return {name: (folder / name).read_bytes() for name in names}


def test_the_files_of_the_tokenizer_stay_as_they_are(tmp_path: Path) -> None:
    model = make_model_of_old(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(4, seed=1, path=rows)
    options = {"model": model, "train_data": rows, **QUICK}
    tiny.run("algos/dpo.py", tmp_path / "out", **options)
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)

    tiny.run("algos/dpo.py", tmp_path / "out", resume=True, **options)  # exports once more
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)


def test_the_files_of_a_hub_model_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hub" / "models--some--model"
    snapshot = cached / "snapshots" / "0123456789012345678901234567890123456789"
    make_model_of_old(snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(4, seed=1, path=rows)
    tiny.run("algos/dpo.py", tmp_path / "out", model="some/model", train_data=rows, **QUICK)
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(snapshot)


def export_with(tokenizer: Any, model: Path, out: Path) -> None:
    """Load a policy and export it untrained."""
    with single_process("float32") as ranks:
        policy = load_policy_from(str(model), ranks)
        out.mkdir(exist_ok=True)
        export(policy, tokenizer, out, "", ranks)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GPT2TokenizerFast", "TokenizersBackend", None])
def test_the_class_of_the_tokenizer_stays(tmp_path: Path, tokenizer_class: str | None) -> None:
    model = make_model_of_old(tmp_path / "model", tokenizer_class=tokenizer_class)
    tokenizer, _ = load_tokenizer(str(model))
    export_with(tokenizer, model, tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)


def test_another_chat_template_changes_no_other_file(tmp_path: Path) -> None:
    model = make_model_of_old(tmp_path / "model")
    tokenizer, _ = load_tokenizer(str(model))
    template = LLAMA_3 + "{# another #}"
    tokenizer.chat_template = template
    export_with(tokenizer, model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    config = read_json(model / "tokenizer_config.json") | {"chat_template": template}
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == config
    same = OTHER_FILES.keys() - {"chat_template.jinja", "additional_chat_templates/rag.jinja"}
    for name in {*same, "tokenizer.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_tokenizer_that_was_changed_is_written_anew(tmp_path: Path) -> None:
    model = make_model_of_old(tmp_path / "model")
    tokenizer, _ = load_tokenizer(str(model))
    tokenizer.chat_template = LLAMA_3
    tokenizer.add_tokens(["zyzzyva"])
    export_with(tokenizer, model, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == LLAMA_3
    assert loaded.get_vocab() == tokenizer.get_vocab()
    left = {name for name in OTHER_FILES if (tmp_path / "out" / name).exists()}
    assert left == {"chat_template.jinja", "preprocessor_config.json"}


def test_files_that_are_another_tokenizer_by_now_are_not_taken(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    tokenizer, _ = load_tokenizer(str(model))
    tiny.make_tokenizer(380).save_pretrained(model)
    export_with(tokenizer, model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_a_starting_model_that_is_gone(tmp_path: Path) -> None:
    model = make_model_of_old(tmp_path / "model")
    tokenizer, _ = load_tokenizer(str(model))
    kept = shutil.copytree(model, tmp_path / "kept")
    shutil.rmtree(model)
    export_with(tokenizer, kept, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_settings_of_a_call_are_no_change(tmp_path: Path, setting: str) -> None:
    model = make_model_of_old(tmp_path / "model")
    tokenizer, _ = load_tokenizer(str(model))
    tokenizer(["a", "b a"], padding=setting == "padding", truncation=setting == "truncation", max_length=3)
    export_with(tokenizer, model, tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)


# ---------------------------------------------------------------- generation config


def always_write(model: Path, token: int) -> None:
    """Let a GPT-NeoX model write one token whatever it has read."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    head = policy.get_output_embeddings()
    with torch.no_grad():
        policy.gpt_neox.final_layer_norm.weight.zero_()
        policy.gpt_neox.final_layer_norm.bias.fill_(1.0)
        head.weight.zero_()
        head.weight[token] = 1.0
    policy.save_pretrained(model)


@pytest.mark.parametrize("algorithm", ["sft", pytest.param("dpo", marks=slow)])
def test_plain_generate_stops_at_the_turn_end(tmp_path: Path, algorithm: str) -> None:
    """A base model whose EOS the template never writes."""
    tokenizer = chat_tokenizer(LLAMA_3, "<|start|>", EOT)
    turn_end = tokenizer.convert_tokens_to_ids(EOT)
    model = make_chat_model(tmp_path / "model", tokenizer, "gpt_neox", eos_token_id=tokenizer.eos_token_id)
    always_write(model, turn_end)
    rows = chats(tmp_path / "rows.jsonl")
    if algorithm == "sft":
        pairs = tiny.read_jsonl(rows)
        tiny.write_jsonl(rows, [{"messages": pair["prompt"] + pair["chosen"]} for pair in pairs])
    tiny.run(f"algos/{algorithm}.py", tmp_path / "out", model=model, train_data=rows, **QUICK)

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[0, 5, 6]])
    (sequence,) = policy.generate(prompt, do_sample=False, max_new_tokens=6)
    assert sequence.tolist() == [0, 5, 6, turn_end]


LIKE_LLAVA = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": 1}


@pytest.mark.parametrize(
    "given, of_config, expected",
    [
        ({"eos_token_id": 1}, 1, [1, "turn end"]),
        ({"eos_token_id": [7, 1], "top_k": 3}, 1, [7, 1, "turn end"]),
        ({"top_k": 3}, 9, [9, 1, "turn end"]),
        ({"top_k": 3}, [9, 1], [9, 1, "turn end"]),
        ({}, None, [1, "turn end"]),
        (LIKE_LLAVA, 1, [1, "turn end"]),
        ({"do_sample": True, "num_beams": 2, "field_of_others": {"é": None}}, 1, [1, "turn end"]),
        (None, 1, [1, "turn end"]),
        ("{torn", 1, [1, "turn end"]),
    ],
)
def test_the_turn_end_joins_the_ids_that_are_there(tmp_path: Path, given: Any, of_config: Any, expected: list) -> None:
    """All other fields stay as they are, those included that transformers would refuse to write."""
    tokenizer = chat_tokenizer(LLAMA_3, "<|start|>", EOT)
    turn_end = tokenizer.convert_tokens_to_ids(EOT)
    model = make_chat_model(tmp_path / "model", tokenizer)
    edit(model / "config.json", eos_token_id=of_config)
    file = model / "generation_config.json"
    file.unlink()
    if isinstance(given, str):
        file.write_text(given)
    elif given is not None:
        file.write_text(json.dumps(given))
    loaded, _ = load_tokenizer(str(model))
    export_with(loaded, model, tmp_path / "out")

    written = read_json(tmp_path / "out" / "generation_config.json")
    assert written.pop("eos_token_id") == [turn_end if i == "turn end" else i for i in expected]
    if isinstance(given, dict):
        assert written == {name: value for name, value in given.items() if name != "eos_token_id"}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert turn_end in policy.generation_config.eos_token_id


def test_a_generation_config_with_all_ids_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    content = b'{"eos_token_id":\n\n 1, "temperature": 0.5}'
    (model / "generation_config.json").write_bytes(content)
    tokenizer, _ = load_tokenizer(str(model))
    export_with(tokenizer, model, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == content


@pytest.mark.parametrize(
    "algorithm, file",
    [
        ("dpo", "generation_config.json"),
        pytest.param("dpo", "config.json", marks=slow),
        pytest.param("rm", "generation_config.json", marks=slow),
        ("rm", "config.json"),
    ],
)
def test_settings_that_transformers_would_not_save_lose_no_training(tmp_path: Path, algorithm: str, file: str) -> None:
    model = tiny.make_model(tmp_path / "model")
    edit(model / file, **LIKE_LLAVA)
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(4, seed=1, path=rows)
    tiny.run(f"algos/{algorithm}.py", tmp_path / "out", model=model, train_data=rows, **QUICK)
    if algorithm == "dpo":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    has_generation_config = (tmp_path / "out" / "generation_config.json").exists()
    assert has_generation_config == (algorithm == "dpo")
