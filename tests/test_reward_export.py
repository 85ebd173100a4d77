"""A reward model in the hands of others: its pad token, and the code of its card run against scripts/score.py."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_export import EOT, GEMMA, LLAMA_3, chat_tokenizer, chats, make_chat_model, make_model_of_old, read_json
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scripts import score
from shared import UserError
from shared.batches import Batches
from shared.distributed import single_process
from shared.groups import Requires, load_groups
from shared.loading import load_reward_model, load_tokenizer

slow = pytest.mark.slow
QUICK = {"batch_size": 4, "max_steps": 1, "micro_batch_tokens": 4096}


def pad_token_of(model: Path, rows: Path, held_out: Path | None = None) -> str:
    """The pad token with which a reward model is trained on rows."""
    tokenizer, _ = load_tokenizer(str(model))
    args = SimpleNamespace(
        model=str(model), seed=0, activation_checkpointing=False, compile=False, lora_rank=None, lora_alpha=None
    )
    with single_process("float32") as ranks:
        sets = []
        for path in (rows, held_out):
            if path is not None:
                groups = load_groups(str(path), tokenizer, Requires("ranking"), tiny.POSITIONS, None)
                sets.append(Batches(groups, 4, 4096, None, ranks))
        reward_model = load_reward_model(args, ranks, tokenizer, *sets)
    assert reward_model.lm.config.pad_token_id == tokenizer.pad_token_id
    return tokenizer.pad_token


# ---------------------------------------------------------------- pad token


def save_tokenizer(model: Path, tokenizer: Any, pad_token: str | None) -> None:
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    "own, expected, reason",
    [
        ("<free>", "<free>", None),
        ("</s>", "<pad>", "</s> ends a completion"),
        (EOT, "<pad>", f"{EOT} ends a completion"),
        ("<s>", "<pad>", "<s> begins a text"),
        ("<|start|>", "<pad>", "<|start|> stands in the chat template"),
        (None, "<pad>", ""),
    ],
)
def test_the_pad_token_of_a_chat_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str | None, expected: str, reason: str | None
) -> None:
    """The first special tokens of a tokenizer are often those that its template writes."""
    tokenizer = chat_tokenizer(LLAMA_3, "<|start|>", EOT, "<free>")
    model = make_chat_model(tmp_path / "model", tokenizer)
    save_tokenizer(model, tokenizer, own)
    assert pad_token_of(model, chats(tmp_path / "rows.jsonl")) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if "pad token" in line]
    if reason is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.endswith(f"the pad token becomes {expected}" + (reason and f"; {reason}"))


def make_model_of_words(folder: Path, *special: str, pad_token: str | None = None, vocab_size: int = 9) -> Path:
    """A model whose tokenizer knows a few words; others become its unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "ok", "a", "no", *special]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token=pad_token,
        additional_special_tokens=list(special),
    )
    model = tiny.make_model(folder, vocab_size=vocab_size)
    tokenizer.save_pretrained(model)
    return model


KNOWN = {"prompt": "a", "chosen": "ok a", "rejected": "no"}
UNKNOWN = {"prompt": "a", "chosen": "ok b", "rejected": "no"}


@pytest.mark.parametrize(
    "train, held_out, special, expected",
    [
        (KNOWN, None, [], "<unk>"),
        (KNOWN, KNOWN, ["<free>"], "<unk>"),
        (UNKNOWN, None, ["<free>"], "<free>"),
        (KNOWN, UNKNOWN, ["<free>", "<more>"], "<free>"),
    ],
)
def test_the_pad_token_occurs_in_no_row(
    tmp_path: Path, train: dict, held_out: dict | None, special: list[str], expected: str
) -> None:
    model = make_model_of_words(tmp_path / "model", *special, pad_token="<unk>")
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", [train])
    held_out_rows = None
    if held_out is not None:
        held_out_rows = tiny.write_jsonl(tmp_path / "eval.jsonl", [held_out])
    assert pad_token_of(model, rows, held_out_rows) == expected


def test_the_unknown_token_is_the_last_choice(tmp_path: Path) -> None:
    """Rows that are scored later may hold it."""
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [KNOWN])
    assert pad_token_of(make_model_of_words(tmp_path / "1", "<free>"), rows) == "<free>"
    assert pad_token_of(make_model_of_words(tmp_path / "2"), rows) == "<unk>"


@pytest.mark.parametrize(
    "row, special, vocab_size", [(UNKNOWN, [], 9), (UNKNOWN, ["<beyond>"], 5)], ids=["in the rows", "not embedded"]
)
def test_a_tokenizer_without_a_token_to_pad_with(
    tmp_path: Path, row: dict, special: list[str], vocab_size: int
) -> None:
    model = make_model_of_words(tmp_path / "model", *special, pad_token="<unk>", vocab_size=vocab_size)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match="needs a pad token that no row holds; give it one by: python scripts/prep"):
        pad_token_of(model, rows)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_only_the_pad_token_of_the_tokenizer_files_changes(tmp_path: Path, processes: int) -> None:
    model = make_model_of_old(tmp_path / "model", pad_token="</s>")
    special_tokens = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>"}
    (model / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(8, seed=1, path=rows)
    out = tmp_path / "out"
    tiny.run("algos/rm.py", out, processes, model=model, train_data=rows, **QUICK)

    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read_json(out / name) == read_json(model / name) | {"pad_token": "<pad>"}
    assert AutoTokenizer.from_pretrained(out).pad_token_id == read_json(out / "config.json")["pad_token_id"] == 2
    assert tiny.read_log(out).count("the pad token becomes <pad>; </s> ends a completion") == 1


# ---------------------------------------------------------------- the code of the card


def functions_of_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of a model card defines, run where the card lies."""
    card = (model / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(model)
    defined: dict[str, Any] = {}
    exec(code, defined)
    return defined


def scored(model: Path, rows: Path) -> list[dict]:
    """Rows with the scores of scripts/score.py."""
    output = rows.with_suffix(".scored")
    score.main(score.Args(rows=str(rows), output=output, reward_models=(str(model),)))
    return tiny.read_jsonl(output)


def trained(folder: Path, model: Path, rows: Path) -> Path:
    options = {**QUICK, "learning_rate": 1e-2}
    tiny.run("algos/rm.py", folder / "rm", model=model, train_data=rows, **options)
    return folder / "rm"


def chat_model(folder: Path, kind: str) -> Path:
    if kind == "ChatML":
        return tiny.make_model(folder, chat=True, vocab_size=402)
    if kind == "Llama 3":
        return make_chat_model(folder, chat_tokenizer(LLAMA_3, "<|start|>", EOT))
    if kind == "Gemma":
        return make_chat_model(folder, chat_tokenizer(GEMMA, "<start_of_turn>", "<end_of_turn>"))
    return make_chat_model(folder, chat_tokenizer("{% for message in messages %}{{ message['content'] }} {% endfor %}"))


@pytest.mark.parametrize("kind", ["ChatML", "Gemma", pytest.param("Llama 3", marks=slow), "no turn end"])
def test_the_card_scores_chats(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chats(tmp_path / "rows.jsonl")
    model = trained(tmp_path, chat_model(tmp_path / "model", kind), rows)
    card = functions_of_card(model, monkeypatch)
    for row in scored(model, rows):
        for side in ("chosen", "rejected"):
            reward = card["reward_of_chat"](row["prompt"] + row[side])
            assert reward == pytest.approx(row[f"score_{side}"], abs=1e-4)


def test_the_turn_end_of_a_chat_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward behind the line break that a template writes is another."""
    rows = chats(tmp_path / "rows.jsonl")
    model = trained(tmp_path, chat_model(tmp_path / "model", "ChatML"), rows)
    card = functions_of_card(model, monkeypatch)
    differences = []
    for row in scored(model, rows):
        conversation = row["prompt"] + row["chosen"]
        text = card["tokenizer"].apply_chat_template(conversation, tokenize=False)
        reward = card["reward"](card["tokenizer"](text, add_special_tokens=False).input_ids)
        differences.append(abs(reward - row["score_chosen"]))
    assert max(differences) > 1e-2


@pytest.mark.parametrize("bos", [True, pytest.param(False, marks=slow)])
def test_the_card_scores_texts(tmp_path: Path, bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and completion may meet inside of a token."""
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(12, seed=8, path=rows)
    base = tiny.make_model(tmp_path / "model", bos=bos)
    if not bos:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<free>"]})
        make_chat_model(base, tokenizer)
    model = trained(tmp_path, base, rows)
    card = functions_of_card(model, monkeypatch)
    assert "reward_of_chat" not in card
    for row in scored(model, rows):
        for side in ("chosen", "rejected"):
            reward = card["reward_of_text"](row["prompt"], row[side])
            assert reward == pytest.approx(row[f"score_{side}"], abs=1e-4)


def test_a_padded_batch_gives_the_same_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier of transformers finds the last token by the pad token."""
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(6, seed=9, path=rows)
    model = trained(tmp_path, tiny.make_model(tmp_path / "model"), rows)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = []
    expected = []
    for row in scored(model, rows):
        ids = tokenizer(row["prompt"]).input_ids + tokenizer(row["chosen"], add_special_tokens=False).input_ids
        sequences.append([*ids, tokenizer.eos_token_id])
        expected.append(row["score_chosen"] + classifier.config.reward_mean)
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        rewards = classifier(**batch).logits[:, 0].tolist()
    assert rewards == pytest.approx(expected, abs=1e-4)
