"""Models that do not fit, words that are wrong, names of nothing (faults 49-63, g)."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import harness
import hooks
import pytest
import worlds
from conftest import ALGORITHMS
from harness import lines, refused, run, start
from safetensors.torch import load_file, save_file

fault, slow = pytest.mark.fault, pytest.mark.slow


@pytest.fixture
def model(world: dict, tmp_path: Path) -> Path:
    """A copy of the model, to be spoilt."""
    return shutil.copytree(world["model"], tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    """Other values in a JSON file; None leaves a name out."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_weights(model: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@fault(49)
def test_a_token_id_beyond_the_embedding(world: dict, model: Path, tmp_path: Path) -> None:
    tokenizer = worlds.make_tokenizer(700)
    tokenizer.save_pretrained(model)
    assert max(max(tokenizer.encode(row["prompt"])) for row in worlds.read_jsonl(world["train_data"])) >= 400
    refused(tmp_path / "out", "token id", "the model embeds 400", **{**world, "model": model})


@fault(50)
@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_a_tokenizer_without_eos_or_pad(world: dict, model: Path, tmp_path: Path, token: str) -> None:
    edit(model / "tokenizer_config.json", **{token: None})
    options = {**world, "model": model, "max_steps": 1}
    if token == "eos_token":
        refused(tmp_path / "out", "no EOS token", **options)
    else:
        assert len(lines(run(tmp_path / "out", **options).out)) == 1


@fault(50)
@slow
def test_a_reward_model_without_any_pad(world: dict, model: Path, tmp_path: Path) -> None:
    """It takes another token for it, since stock classifiers find a completion's end by one."""
    edit(model / "tokenizer_config.json", pad_token=None)
    run(tmp_path / "out", script="algos/rm.py", **{**world, "model": model, "max_steps": 1})


@fault(51)
def test_a_reference_of_another_vocabulary_size(world: dict, tmp_path: Path) -> None:
    reference = worlds.make_model(tmp_path / "reference", seed=4, vocab_size=416)
    refused(tmp_path / "out", f"--reference {reference}", "vocabulary", reference=reference, **world)


@fault(52)
def test_a_reference_with_another_tokenizer(world: dict, model: Path, tmp_path: Path) -> None:
    """Two words have each other's ids."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    one, other = list(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(tmp_path / "out", f"--reference {model}", "tokenizer", reference=model, **world)


@fault(53)
def test_more_tokens_than_positions(world: dict, tmp_path: Path) -> None:
    refused(tmp_path / "out", "--max-length 513", "512 positions", max_length=513, **world)


@fault(54)
@pytest.mark.parametrize(
    "algorithm, change",
    [
        ("dpo", "missing"),
        pytest.param("dpo", "misshapen", marks=slow),
        pytest.param("sft", "missing", marks=slow),
        pytest.param("rm", "missing", marks=slow),
    ],
)
def test_a_tensor_is_missing(world: dict, model: Path, tmp_path: Path, algorithm: str, change: str) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        edit_weights(model, lambda tensors: tensors.pop(name))
    else:
        edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refused(tmp_path / "out", str(model), name, script=f"algos/{algorithm}.py", **{**world, "model": model})


@fault(55)
@pytest.mark.parametrize("keep", [-1, pytest.param(5, marks=slow), pytest.param(0, marks=slow)])
def test_truncated_weights(world: dict, model: Path, tmp_path: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path / "out", str(file), **{**world, "model": model})


@fault(56)
@pytest.mark.parametrize("answers", [False, True])
def test_a_model_that_needs_remote_code(world: dict, model: Path, tmp_path: Path, answers: bool) -> None:
    """Not executed even where somebody would answer "y" to the question of transformers."""
    mark = tmp_path / "executed"
    (model / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(model / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto)
    hook = hooks.answer_yes if answers else None
    refused(tmp_path / "out", str(model), hook=hook, **{**world, "model": model})
    assert not mark.exists()


@fault(56)
@slow
@pytest.mark.parametrize("architecture", ["opt", "bloom", "mamba", "bert", "t5", "gemma2"])
def test_an_architecture_that_rows_cannot_be_packed_for(world: dict, tmp_path: Path, architecture: str) -> None:
    """Refused by name, or computed as it does itself: never a traceback."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    names |= {
        "intermediate_size": 64,
        "ffn_dim": 64,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "word_embed_proj_dim": 32,
    }
    names = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} if architecture == "t5" else names
    special = {"is_decoder": True} if architecture == "bert" else {}
    config = AutoConfig.for_model(architecture, vocab_size=400, **names, **special)
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "model")
    worlds.make_tokenizer().save_pretrained(tmp_path / "model")
    process = start(tmp_path / "out", **{**world, "model": tmp_path / "model", "max_steps": 1})
    assert process.end() in (0, 2) and "Traceback" not in process.log, process.log[-2000:]


WORDS = [  # fault, option, value, words; the first two of each fault are in the quick set
    (16, "resume", "nowhere", ["nowhere"]),
    (57, "nothing", 1, ["--nothing"]),
    (58, "bet", 0.5, ["--bet"]),
    (58, "batch", 8, ["--batch"]),
    (59, "beta", "abc", ["abc"]),
    (59, "lr_schedule", "cubic", ["cubic", "constant", "linear", "cosine"]),
    (59, "max_steps", 1.5, ["1.5"]),
    (59, "dtype", "float16", ["float16", "float32", "bfloat16"]),
    *((60, "beta", value, [f"--beta {value}: must be"]) for value in (0.0, -1.0, math.nan, math.inf)),
    *((61, "learning_rate", value, [f"--learning-rate {value}: must be"]) for value in (-1.0, math.nan, math.inf)),
    *((61, "batch_size", value, [f"--batch-size {value}: must be"]) for value in (0, -1)),
    (62, "label_smoothing", 2.0, ["--label-smoothing 2.0: must be"]),
    *((62, "epochs", value, [f"--epochs {value}: must be"]) for value in (0.0, -1.0, math.nan)),
    (62, "label_smoothing", 0.6, ["--label-smoothing 0.6: must be"]),
    (62, "label_smoothing", -0.1, ["--label-smoothing -0.1: must be"]),
    (62, "max_length", 0, ["--max-length 0: must be"]),
    (62, "max_length", 1, ["no usable row", "prompt too long"]),
    (62, "max_prompt_length", 0, ["--max-prompt-length 0: must be"]),
    (62, "micro_batch_tokens", 0, ["--micro-batch-tokens 0: must be"]),
    (62, "max_steps", 0, ["--max-steps 0: must be"]),
    (62, "max_grad_norm", 0.0, ["--max-grad-norm 0.0: must be"]),
    (62, "weight_decay", math.nan, ["--weight-decay nan: must be"]),
    (62, "warmup_steps", -1, ["--warmup-steps -1: must be"]),
    (62, "log_every", 0, ["--log-every 0: must be"]),
    (62, "eval_every", -1, ["--eval-every -1: must be"]),
    (62, "save_every", -1, ["--save-every -1: must be"]),
    (62, "keep", 0, ["--keep 0: must be"]),
    (62, "seed", -1, ["--seed -1: must be"]),
    (62, "seed", 2**62, [f"--seed {2**62}"]),
    (62, "output_dir", "", ["--output-dir"]),
    (63, "model", "runs/nowhere", ["runs/nowhere"]),
    (63, "train_data", "nowhere.jsonl", ["nowhere.jsonl"]),
    (63, "model", "/nowhere/at/all", ["/nowhere/at/all: no such directory"]),
    (63, "model", "", ["--model"]),
    (63, "reference", "runs/nowhere", ["runs/nowhere"]),
    (63, "eval_data", "nowhere.jsonl", ["nowhere.jsonl"]),
    (63, "train_data", "", ["--train-data"]),
]
seen: list[int] = []
CASES = []
for number, option, value, words in WORDS:
    quick, name = seen.count(number) < 2, f"dpo-{number}-{option}-{value}"
    CASES.append(pytest.param("dpo", option, value, words, marks=[fault(number), *[slow] * (not quick)], id=name))
    if option in ("nothing", "bet", "lr_schedule", "learning_rate", "batch_size", "train_data") and quick:
        for other in (name for name in ALGORITHMS if name != "dpo"):
            marks = [fault(number), slow]
            CASES.append(pytest.param(other, option, value, words, marks=marks, id=f"{other}-{number}-{option}"))
    seen.append(number)


@pytest.mark.parametrize("algorithm, option, value, words", CASES)
def test_wrong_words(world: dict, tmp_path: Path, algorithm: str, option: str, value: object, words: list[str]) -> None:
    """Exit code 2 and what is wrong, before anything is written but the status of the run."""
    out, options = tmp_path / "out", {**world, "script": f"algos/{algorithm}.py", option: value}
    if option == "epochs":
        del options["max_steps"]
    process = run(out, code=2, **options)
    text = " ".join(process.log.replace("│", " ").split())
    assert all(word in text for word in words), process.log
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left <= {"status.json", ".lock"} and (not left or process.status["state"] == "refused")


@fault(59)
@pytest.mark.parametrize(
    "values",
    [
        {"beta": "abc"},
        pytest.param({"beta": -1}, marks=slow),
        pytest.param({"seed": [1]}, marks=slow),
        pytest.param({"lr_schedule": "cubic"}, marks=slow),
        pytest.param({"nothing": 1}, marks=slow),
    ],
    ids=str,
)
def test_wrong_values_in_a_configuration(world: dict, tmp_path: Path, values: dict) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"args": values}))
    process = start(tmp_path / "out", config=tmp_path / "run.json", **world)
    (name,) = values
    assert process.end() == 2 and "Traceback" not in process.log and name in process.log.replace("-", "_"), process.log


@fault(60)
@slow
def test_wrong_words_under_torchrun(world: dict, tmp_path: Path) -> None:
    """torchrun's own exit code says nothing: status.json does."""
    process = start(tmp_path / "out", processes=2, torchrun=True, beta=0, **world)
    assert process.end(60) and process.log.count("--beta 0.0: must be") == 1, process.log
    assert process.status is not None and process.status["state"] == "refused" and "--beta" in process.status["reason"]


@fault(63)
@pytest.mark.parametrize("kind", ["splits", pytest.param("rows", marks=slow), pytest.param("file", marks=slow)])
def test_a_split_that_is_not_there(world: dict, tmp_path: Path, kind: str) -> None:
    """Of a saved data set with splits, of one without, of a file."""
    import datasets

    path = tmp_path / "data"
    rows = datasets.Dataset.from_list(worlds.make_rows(5, 3))
    if kind == "file":
        path = worlds.write_jsonl(tmp_path / "data.jsonl", rows.to_list())
    else:
        (datasets.DatasetDict({"train": rows}) if kind == "splits" else rows).save_to_disk(path)
    refused(tmp_path / "out", str(path), "nosplit", **{**world, "train_data": f"{path}:nosplit"})


@fault("g")
def test_beams_wider_than_the_vocabulary_without_an_end(world: dict, tmp_path: Path) -> None:
    """Every prompt is decoded; what reaches no EOS ends at the limit, and wider beams find nothing worse."""
    options = {**world, "eval_data": world["train_data"], "eval_every": 0, "save_every": 0, "max_steps": 1}
    options |= {"beam_widths": "1,399,1000", "num_prompts": 3, "max_new_tokens": 2}
    run(tmp_path / "out", script="algos/token_dpo_beam.py", **options)
    rows = worlds.read_jsonl(tmp_path / "out" / "beams.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["logps"][1] >= row["logps"][0] - 1e-4 and row["logps"][1] == pytest.approx(row["logps"][2], abs=1e-4)
        assert all(length == 2 for length, end in zip(row["lengths"], row["finished"], strict=True) if not end)
    assert not all(end for row in rows for end in row["finished"]), "every beam reached an EOS"


@fault("g")
@pytest.mark.parametrize("widths", ["0", pytest.param("2,x", marks=slow)])
def test_beam_widths_that_are_none(world: dict, tmp_path: Path, widths: str) -> None:
    options = {"script": "algos/token_dpo_beam.py", "beam_widths": widths, **world}
    refused(tmp_path / "out", f"--beam-widths {widths}: must be", **options)


@fault("g")
def test_scores_of_beams_that_are_not_numbers(world: dict, tmp_path: Path) -> None:
    """The trained model stays; no file says that something was decoded."""
    out, options = tmp_path / "out", {**world, "eval_data": world["train_data"], "eval_every": 0, "max_steps": 1}
    process = run(out, code=3, script="algos/token_dpo_beam.py", hook=hooks.spoil_generator, **options)
    harness.check_message(process, "not numbers")
    assert process.status["state"] == "not finite" and not (out / "beams.jsonl").exists()
    assert (out / "config.json").exists()
