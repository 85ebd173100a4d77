"""Models that do not fit, arguments that are wrong, names of nothing (faults 49-63, g)."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import hooks
import pytest
import tiny
from harness import lines, refused, run, start
from marks import OTHER_ALGORITHMS, fault, slow
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(run_options: dict, tmp_path: Path) -> Path:
    """A copy of the model, to be spoilt."""
    return shutil.copytree(run_options["model"], tmp_path / "model")


@pytest.fixture
def with_model(run_options: dict, model: Path) -> dict:
    """The options of a run that starts from the copy."""
    return {**run_options, "model": model}


def edit(file: Path, **changes: object) -> None:
    """Other values in a JSON file; None leaves a name out."""
    values = json.loads(file.read_text()) | changes
    present = {name: value for name, value in values.items() if value is not None}
    file.write_text(json.dumps(present))


def edit_weights(model: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- tokenizers


@fault(49)
def test_a_token_id_beyond_the_embedding(with_model: dict, model: Path, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(700)
    tokenizer.save_pretrained(model)
    rows = tiny.read_jsonl(with_model["train_data"])
    ids = {token for row in rows for token in tokenizer.encode(row["prompt"])}
    assert max(ids) >= 400
    refused(tmp_path / "out", "token id", "the model embeds 400", **with_model)


@fault(50)
def test_a_tokenizer_without_eos(with_model: dict, model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None)
    refused(tmp_path / "out", "no EOS token", **with_model)


@fault(50)
def test_a_tokenizer_without_pad(with_model: dict, model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)
    ended = run(tmp_path / "out", **{**with_model, "max_steps": 1})
    assert len(lines(ended.out)) == 1


@fault(50)
@slow
def test_a_reward_model_without_any_pad(with_model: dict, model: Path, tmp_path: Path) -> None:
    """It takes another token for it, since stock classifiers find a completion's end by one."""
    edit(model / "tokenizer_config.json", pad_token=None)
    run(tmp_path / "out", script="algos/rm.py", **{**with_model, "max_steps": 1})


@fault(51)
def test_a_reference_of_another_vocabulary_size(run_options: dict, tmp_path: Path) -> None:
    reference = tiny.make_model(tmp_path / "reference", seed=4, vocab_size=416)
    refused(
        tmp_path / "out",
        f"--reference {reference}",
        "vocabulary size is 416",
        "is 400",
        reference=reference,
        **run_options,
    )


@fault(52)
def test_a_reference_with_another_tokenizer(run_options: dict, model: Path, tmp_path: Path) -> None:
    """Two tokens have each other's ids."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    second_last, last = list(ids)[-2:]
    ids[second_last], ids[last] = ids[last], ids[second_last]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(tmp_path / "out", f"--reference {model}", "tokenizer", reference=model, **run_options)


# ---------------------------------------------------------------- weights and architectures


@fault(53)
def test_more_tokens_than_positions(run_options: dict, tmp_path: Path) -> None:
    refused(tmp_path / "out", "--max-length 513", "512 positions", max_length=513, **run_options)


PROJECTION = "model.layers.1.self_attn.k_proj.weight"


@fault(54)
@pytest.mark.parametrize("algorithm", ["dpo", pytest.param("sft", marks=slow), pytest.param("rm", marks=slow)])
def test_a_tensor_is_missing(with_model: dict, model: Path, tmp_path: Path, algorithm: str) -> None:
    edit_weights(model, lambda tensors: tensors.pop(PROJECTION))
    refused(tmp_path / "out", str(model), PROJECTION, script=f"algos/{algorithm}.py", **with_model)


@fault(54)
@slow
def test_a_tensor_is_misshapen(with_model: dict, model: Path, tmp_path: Path) -> None:
    def remove_a_row(tensors: dict) -> None:
        tensors[PROJECTION] = tensors[PROJECTION][:-1].contiguous()

    edit_weights(model, remove_a_row)
    refused(tmp_path / "out", str(model), PROJECTION, **with_model)


@fault(55)
@pytest.mark.parametrize("keep", [-1, pytest.param(5, marks=slow), pytest.param(0, marks=slow)])
def test_truncated_weights(with_model: dict, model: Path, tmp_path: Path, keep: int) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    refused(tmp_path / "out", str(file), **with_model)


@fault(56)
@pytest.mark.parametrize("hook", [None, hooks.answer_yes])
def test_a_model_that_needs_remote_code(
    with_model: dict, model: Path, tmp_path: Path, hook: Callable[[], None] | None
) -> None:
    """Not executed even when a user answers "y" to the question of transformers."""
    mark = tmp_path / "executed"
    (model / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    code = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(model / "config.json", model_type="own", architectures=["OwnModel"], auto_map=code)
    refused(tmp_path / "out", str(model), hook=hook, **with_model)
    assert not mark.exists()


def save_model_of(architecture: str, directory: Path) -> None:
    """A model of another architecture than the tested ones, of about the same size."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class: Any = AutoModelForCausalLM
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "intermediate_size": 64,
        "ffn_dim": 64,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "word_embed_proj_dim": 32,
    }
    if architecture == "bert":
        sizes["is_decoder"] = True
    if architecture == "t5":
        auto_class = AutoModelForSeq2SeqLM
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model(architecture, vocab_size=400, **sizes)
    auto_class.from_config(config).save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)


@fault(56)
@slow
@pytest.mark.parametrize("architecture", ["opt", "bloom", "mamba", "bert", "t5", "gemma2"])
def test_an_architecture_that_rows_cannot_be_packed_for(run_options: dict, tmp_path: Path, architecture: str) -> None:
    """Refused by name, or computed as it does itself: never a traceback."""
    save_model_of(architecture, tmp_path / "model")
    process = start(tmp_path / "out", **{**run_options, "model": tmp_path / "model", "max_steps": 1})
    assert process.end() in (0, 2), process.log[-2000:]
    assert "Traceback" not in process.log, process.log[-2000:]


# ---------------------------------------------------------------- arguments

OUT_OF_RANGE = [  # fault, option, value
    (60, "beta", 0.0),
    (60, "beta", -1.0),
    (60, "beta", math.nan),
    (60, "beta", math.inf),
    (61, "learning_rate", -1.0),
    (61, "learning_rate", math.nan),
    (61, "learning_rate", math.inf),
    (61, "batch_size", 0),
    (61, "batch_size", -1),
    (62, "label_smoothing", 2.0),
    (62, "epochs", 0.0),
    (62, "epochs", -1.0),
    (62, "epochs", math.nan),
    (62, "label_smoothing", 0.6),
    (62, "label_smoothing", -0.1),
    (62, "max_length", 0),
    (62, "max_prompt_length", 0),
    (62, "micro_batch_tokens", 0),
    (62, "max_steps", 0),
    (62, "max_grad_norm", 0.0),
    (62, "weight_decay", math.nan),
    (62, "warmup_steps", -1),
    (62, "log_every", 0),
    (62, "eval_every", -1),
    (62, "save_every", -1),
    (62, "keep", 0),
    (62, "seed", -1),
    (62, "seed", 2**62),
]
OTHER_MISTAKES = [  # fault, option, value, words of the message
    (16, "resume", "nowhere", ["nowhere"]),
    (57, "nothing", 1, ["--nothing"]),
    (58, "bet", 0.5, ["--bet"]),
    (58, "batch", 8, ["--batch"]),
    (59, "beta", "abc", ["abc"]),
    (59, "lr_schedule", "cubic", ["cubic", "constant", "linear", "cosine"]),
    (59, "max_steps", 1.5, ["1.5"]),
    (59, "dtype", "float16", ["float16", "float32", "bfloat16"]),
    (62, "max_length", 1, ["no usable row", "prompt too long"]),
    (62, "output_dir", "", ["--output-dir"]),
    (63, "model", "runs/nowhere", ["runs/nowhere"]),
    (63, "train_data", "nowhere.jsonl", ["nowhere.jsonl"]),
    (63, "model", "/nowhere/at/all", ["/nowhere/at/all: no such file or directory"]),
    (63, "model", "", ["--model"]),
    (63, "reference", "runs/nowhere", ["runs/nowhere"]),
    (63, "eval_data", "nowhere.jsonl", ["nowhere.jsonl"]),
    (63, "train_data", "", ["--train-data"]),
]
TRIED_IN_ALL = ("nothing", "bet", "lr_schedule", "learning_rate", "batch_size", "train_data")


def mistakes() -> list[tuple[int, str, object, list[str]]]:
    """(fault, option, value, words of the message)"""
    out_of_range = []
    for number, option, value in OUT_OF_RANGE:
        flag = "--" + option.replace("_", "-")
        out_of_range.append((number, option, value, [f"{flag} {value}: must be"]))
    return [*out_of_range, *OTHER_MISTAKES]


def wrong_arguments() -> list:
    """(algorithm, option, value, words): the first two of each fault for dpo; all others with the slow tests."""
    cases = []
    mistakes_of_fault: Counter[int] = Counter()
    for number, option, value, words in mistakes():
        mistakes_of_fault[number] += 1
        is_quick = mistakes_of_fault[number] <= 2
        marks = [fault(number)]
        if not is_quick:
            marks.append(slow)
        cases.append(pytest.param("dpo", option, value, words, marks=marks, id=f"dpo-{number}-{option}-{value}"))
        if is_quick and option in TRIED_IN_ALL:
            cases += _in_other_algorithms(number, option, value, words)
    return cases


def _in_other_algorithms(number: int, option: str, value: object, words: list[str]) -> list:
    cases = []
    for algorithm in OTHER_ALGORITHMS:
        name = f"{algorithm}-{number}-{option}"
        cases.append(pytest.param(algorithm, option, value, words, marks=[fault(number), slow], id=name))
    return cases


@pytest.mark.parametrize("algorithm, option, value, words", wrong_arguments())
def test_wrong_arguments(
    run_options: dict, tmp_path: Path, algorithm: str, option: str, value: object, words: list[str]
) -> None:
    """Exit code 2 and what is wrong, before anything is written but the status of the run."""
    out = tmp_path / "out"
    options = {**run_options, "script": f"algos/{algorithm}.py", option: value}
    if option == "epochs":
        del options["max_steps"]
    process = run(out, code=2, **options)
    message = " ".join(process.log.replace("│", " ").split())
    for word in words:
        assert word in message, process.log

    written = {path.name for path in out.rglob("*") if path.is_file()}
    assert written <= {"status.json", ".lock"}
    if written:
        assert process.status["state"] == "refused"


@fault(59)
@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", "abc"),
        pytest.param("beta", -1, marks=slow),
        pytest.param("seed", [1], marks=slow),
        pytest.param("lr_schedule", "cubic", marks=slow),
        pytest.param("nothing", 1, marks=slow),
    ],
)
def test_wrong_values_in_a_configuration(run_options: dict, tmp_path: Path, name: str, value: object) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"args": {name: value}}))
    process = start(tmp_path / "out", config=config, **run_options)
    assert process.end() == 2, process.log
    assert "Traceback" not in process.log, process.log
    assert name in process.log.replace("-", "_"), process.log


@fault(60)
@slow
def test_wrong_arguments_under_torchrun(run_options: dict, tmp_path: Path) -> None:
    """torchrun's own exit code says nothing: status.json does."""
    process = start(tmp_path / "out", processes=2, torchrun=True, beta=0, **run_options)
    assert process.end(60), process.log
    assert process.log.count("--beta 0.0: must be") == 1, process.log
    assert process.status["state"] == "refused"
    assert "--beta" in process.status["reason"]


@fault(63)
@pytest.mark.parametrize("kind", ["splits", pytest.param("rows", marks=slow), pytest.param("file", marks=slow)])
def test_a_split_that_does_not_exist(run_options: dict, tmp_path: Path, kind: str) -> None:
    """Of a saved data set with splits, of one without, of a file."""
    import datasets

    path = tmp_path / "data"
    rows = datasets.Dataset.from_list(tiny.make_rows(5, 3))
    if kind == "file":
        path = tiny.write_jsonl(tmp_path / "data.jsonl", rows.to_list())
    elif kind == "rows":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    refused(tmp_path / "out", str(path), "nosplit", **{**run_options, "train_data": f"{path}:nosplit"})


# ---------------------------------------------------------------- beams


@pytest.fixture
def decoding(run_options: dict) -> dict:
    """The options of a search for completions of the first prompts of the training rows."""
    return {
        "script": "scripts/sample.py",
        "flag": "output",
        "model": run_options["model"],
        "rows": run_options["train_data"],
        "max_rows": 3,
        "num_completions": 1,
        "max_new_tokens": 2,
    }


@fault("g")
def test_beams_wider_than_the_vocabulary_without_an_end(decoding: dict, tmp_path: Path) -> None:
    """Every prompt is decoded; beams that reach no EOS end at the limit, and wider beams do not end worse."""
    rows_of_widths = []
    for width in (1, 1000):
        output = tmp_path / f"{width}.jsonl"
        run(output, beams=width, **decoding)
        rows_of_widths.append(tiny.read_jsonl(output))

    unfinished = 0
    for narrow, wide in zip(*rows_of_widths, strict=True):
        assert wide["logps"][0] >= narrow["logps"][0] - 1e-4
        for row in (narrow, wide):
            if row["finished"] == [False]:
                unfinished += 1
                assert len(row["completion_ids"][0]) == 2
    assert len(rows_of_widths[1]) == 3
    assert unfinished > 0, "every beam reached an EOS"


@fault("g")
@pytest.mark.parametrize(("beams", "message"), [(0, "--beams 0: must be"), pytest.param("x", "--beams", marks=slow)])
def test_beams_that_are_none(decoding: dict, tmp_path: Path, beams: object, message: str) -> None:
    refused(tmp_path / "out.jsonl", message, state=None, beams=beams, **decoding)


@fault("g")
def test_scores_of_beams_that_are_not_numbers(decoding: dict, tmp_path: Path) -> None:
    """No file says that something was decoded."""
    output = tmp_path / "out.jsonl"
    process = run(output, code=3, hook=hooks.spoil_generator, beams=2, **decoding)
    harness.check_message(process, "not numbers")
    assert not output.exists()
