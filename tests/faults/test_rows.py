"""Rows that are malformed, unusable, missing, or change while they are used (faults 34-48, e, f, h, i)."""

import functools
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import hooks
import pytest
import reference
import tiny
from harness import lines, refused, run, same, start
from marks import ALGORITHMS, fault, slow

GOOD = {"prompt": "a ok", "chosen": "ok", "rejected": "42"}
LINE = json.dumps(GOOD).encode() + b"\n"
ABSENT = object()


def row(**changes: object) -> bytes:
    """A line of the file; a field whose value is ABSENT is left out."""
    fields = {**GOOD, **changes}
    present = {name: value for name, value in fields.items() if value is not ABSENT}
    return json.dumps(present).encode() + b"\n"


def chat(**changes: object) -> bytes:
    """A line whose prompt is one message, with changes to the message."""
    return row(prompt=[{"role": "user", "content": "a", **changes}])


def damaged_gzip(data: bytes) -> bytes:
    """Compressed, with one byte of the compressed data changed."""
    packed = bytearray(gzip.compress(data))
    packed[len(packed) // 2] ^= 0xFF
    return bytes(packed)


def write(path: Path, *rows: bytes) -> Path:
    path.write_bytes(b"".join(rows))
    return path


# ---------------------------------------------------------------- malformed rows

CASES = [  # fault, file, its bytes, words of the message; the first case of each fault is in the quick set
    (34, "x.jsonl", row(rejected=ABSENT) * 3, "'rejected' is missing"),
    (34, "x.jsonl", b'{"a": 1}\n', "unknown columns a"),
    (35, "x.jsonl", LINE + row(rejected=None) + LINE, "x.jsonl, line 2: field 'rejected' is null"),
    (35, "x.jsonl", LINE + row(prompt=ABSENT) + LINE, "x.jsonl, line 2: field 'prompt' is missing"),
    (36, "x.jsonl", LINE + row(chosen=["a", "b"]) + LINE, "x.jsonl, line 2: field 'chosen'"),
    (36, "x.jsonl", LINE + row(chosen=7) + LINE, "x.jsonl, line 2: field 'chosen' is of type int"),
    (36, "x.jsonl", LINE + row(prompt={"a": "b"}) + LINE, "x.jsonl, line 2: field 'prompt' is of type dict"),
    (36, "x.jsonl", LINE + b"[1]\n" + LINE, "x.jsonl, line 2: a row must be an object"),
    (37, "x.jsonl", LINE + LINE[:-9] + b"\n" + LINE, "x.jsonl, line 2: not valid JSON"),
    (37, "x.jsonl", LINE * 2 + LINE[:-9], "x.jsonl, line 3: not valid JSON"),
    (37, "x.jsonl", LINE + b"[" * 100_000 + b"\n", "x.jsonl, line 2: not valid JSON"),
    (37, "x.jsonl.gz", damaged_gzip(LINE * 3), "x.jsonl.gz"),
    (37, "x.parquet", b"PAR1" + LINE, "x.parquet: cannot be read"),
    (38, "x.jsonl", LINE + row(prompt="é").replace(b"\\u00e9", b"\xe9") + LINE, "x.jsonl, line 2: not UTF-8"),
    (38, "x.jsonl", LINE.decode().encode("utf-16") * 2, "x.jsonl, line 1: not UTF-8"),
    (38, "x.jsonl", LINE + row(prompt="\ud800"), "x.jsonl, line 2: a text holds half a character"),
    (44, "x.jsonl", row(prompt="ok " * 600) * 3, "no usable row; rows 3, kept 0, dropped: prompt too long 3"),
    (46, "x.jsonl", b"", "x.jsonl: no rows"),
    (46, "x.jsonl", b"\n \n", "x.jsonl: no rows"),
    (46, "x.json", b"[]", "x.json: no rows"),
    (48, "x.jsonl", chat() + chat(role="User"), "x.jsonl, line 2: field 'prompt', message 0: unknown role 'User'"),
    (48, "x.jsonl", chat() + row(prompt=[]), "x.jsonl, line 2: field 'prompt' has no messages"),
    (48, "x.jsonl", chat() + chat(content=None), "x.jsonl, line 2: field 'prompt', message 0: content must be text"),
    (48, "x.jsonl", chat() + row(prompt=["a"]), "x.jsonl, line 2: field 'prompt', message 0: "),
    (48, "x.jsonl", chat(), "no chat template"),
]  # fmt: skip
FAULTS_OF_EVERY_ALGORITHM = (34, 35, 36, 37, 38, 46)


def case_parameters() -> list[Any]:
    """Every case with dpo, and the first case of some faults with the other algorithms."""
    first = {}
    for i, (number, *_) in enumerate(CASES):
        first.setdefault(number, i)

    parameters = []
    for i, (number, *_) in enumerate(CASES):
        parameters.append(case_parameter("dpo", i, is_slow=first[number] != i))
    for number in FAULTS_OF_EVERY_ALGORITHM:
        for algorithm in ALGORITHMS:
            if algorithm != "dpo":
                parameters.append(case_parameter(algorithm, first[number], is_slow=True))
    return parameters


def case_parameter(algorithm: str, i: int, is_slow: bool) -> Any:
    number, *case = CASES[i]
    marks = [fault(number)]
    if is_slow:
        marks.append(slow)
    return pytest.param(algorithm, *case, marks=marks, id=f"{algorithm}-{number}-{i}")


@pytest.mark.parametrize("algorithm, name, data, words", case_parameters())
def test_malformed_rows(run_options: dict, tmp_path: Path, algorithm: str, name: str, data: bytes, words: str) -> None:
    malformed = write(tmp_path / name, data)
    options = {**run_options, "train_data": malformed}
    refused(tmp_path / "out", words, script=f"algos/{algorithm}.py", **options)

    if algorithm == "dpo":  # held-out rows are no different
        options = {**run_options, "eval_data": malformed}
        refused(tmp_path / "other", words, **options)


@fault(46)
@slow
def test_no_rows_under_torchrun(run_options: dict, tmp_path: Path) -> None:
    """status.json says it, since torchrun's exit code does not; no rank waits for one that has ended."""
    empty = write(tmp_path / "empty.jsonl", b"")
    process = start(tmp_path / "out", processes=2, torchrun=True, **{**run_options, "train_data": empty})
    assert process.end(60)
    assert process.status["state"] == "refused"
    assert "no rows" in process.status["reason"]
    assert process.log.count("no rows") == 1


# ---------------------------------------------------------------- rows that are dropped or changed


def report(process: harness.Started, *counts: str) -> dict:
    """The report on the training rows in run.json; the line about them that was printed holds `counts`."""
    (line,) = [line for line in process.log.splitlines() if line.startswith("train: ")]
    for count in counts:
        assert count in line
    return json.loads((process.out / "run.json").read_text())["data"]["train"]


@fault(39, 40, 41, 42, 43, 44, 47)
def test_rows_that_are_counted(run_options: dict, tmp_path: Path) -> None:
    """Fewer rows than a batch are one partial step."""
    swapped = row(chosen=GOOD["rejected"], rejected=GOOD["chosen"])
    kept = [LINE, LINE, swapped, row(prompt=""), row(chosen="ok " * 100), row(prompt="7")]
    dropped = [row(chosen=""), row(rejected=" \n\t"), row(rejected=GOOD["chosen"]), row(prompt="ok " * 100)]
    rows = write(tmp_path / "x.jsonl", *kept, *dropped)
    options = {**run_options, "train_data": rows, "max_length": 60, "batch_size": 64}
    del options["max_steps"]

    process = run(tmp_path / "out", **options)

    data = report(
        process,
        "rows 10, kept 6, dropped: empty completion 2, identical completions 1, prompt too long 1; ",
        "completions cut 1",
        "contradictions 1",
        "duplicates 1",
    )
    assert data["kept"] == 6
    assert data["dropped"]["prompt too long"] == 1
    assert data["completions cut"] == 1
    assert [line["step"] for line in lines(process.out)] == [1]
    assert process.status["step"] == 1


@fault(41)
@pytest.mark.parametrize("bos", ["added", pytest.param("not added", marks=slow)])
def test_an_empty_prompt_is_the_bos(run_options: dict, tmp_path: Path, bos: str) -> None:
    """Whether or not the tokenizer adds one by itself."""
    model = tiny.make_model(tmp_path / "model", seed=4)
    if bos == "not added":
        file = model / "tokenizer.json"
        contents = json.loads(file.read_text())
        file.write_text(json.dumps({**contents, "post_processor": None}))
    tokenizer = load_tokenizer(model)
    adds_bos = tokenizer.encode("") == [tokenizer.bos_token_id]
    assert adds_bos == (bos == "added")

    rows = write(tmp_path / "x.jsonl", row(prompt=""))
    process = run(tmp_path / "out", **{**run_options, "model": model, "train_data": rows, "max_steps": 1})

    assert report(process, "kept 1")["dropped"] == {}
    assert_first_logps(process, model, prompt=[tokenizer.bos_token_id])


@fault(41)
def test_an_empty_prompt_without_a_bos_is_dropped(run_options: dict, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", seed=4, bos=False)
    rows = write(tmp_path / "x.jsonl", row(prompt=""), LINE)
    process = run(tmp_path / "out", **{**run_options, "model": model, "train_data": rows, "max_steps": 1})

    assert report(process, "kept 1")["dropped"] == {"empty prompt": 1}
    prompt = load_tokenizer(model).encode(GOOD["prompt"])
    assert_first_logps(process, model, prompt)


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def assert_first_logps(process: harness.Started, model: Path, prompt: list[int]) -> None:
    """The log-prob that a run of one row logs at its first step is that of a stock model."""
    tokenizer = load_tokenizer(model)
    completion = tokenizer.encode(GOOD["chosen"], add_special_tokens=False)
    logps = reference.token_logps(reference.load_model(model), prompt, [*completion, tokenizer.eos_token_id])
    assert lines(process.out)[0]["logps/chosen"] == pytest.approx(logps.sum().item(), rel=1e-5)


@fault(44)
@slow
def test_prompts_that_are_truncated(run_options: dict, tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", LINE, row(prompt="ok " * 600))
    options = {**run_options, "train_data": rows, "max_prompt_length": 20, "max_steps": 1}
    report(run(tmp_path / "out", **options), "rows 2, kept 2; prompts cut 1")


@fault(45)
@pytest.mark.parametrize("form", ["plain", pytest.param("chat", marks=slow)])
def test_control_tokens_in_a_user_s_text(run_options: dict, tmp_path: Path, form: str) -> None:
    """Among the ids that the run has used, control tokens are where the rows' form has them, and nowhere else."""
    from safetensors.torch import load_file

    text = "ok</s> <|im_end|>\n<s><|im_start|>system\n7"
    prompt: object = text
    control_of_prompt = ["<s>"]
    if form == "chat":
        prompt = [{"role": "user", "content": text}]
        control_of_prompt = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]

    model = tiny.make_model(tmp_path / "model", seed=4, chat=True)
    rows = write(tmp_path / "x.jsonl", row(prompt=prompt, chosen=text))
    run(tmp_path / "out", **{**run_options, "model": model, "train_data": rows, "max_steps": 1})

    (cached,) = cache_of(tmp_path / "out").glob("tokens-*.safetensors")
    ids = load_file(cached)["tokens"].tolist()
    tokenizer = load_tokenizer(model)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = [tokenizer.decode([i]) for i in ids if i in special]
    assert names == [*control_of_prompt, "<|im_end|>", "<|im_end|>"]
    assert tokenizer.decode(ids).count(text) == 2


# ---------------------------------------------------------------- scores and samples

COMPLETE = {
    "prompt": "a",
    "completions": ["ok", "42"],
    "scores": [[0.5, 0.1], [0.2, 0.3]],
    "reference_samples": ["a", "ok"],
}
INCOMPLETE = [  # fault, algorithm, changes to the second row, words of the message; the first row is COMPLETE
    ("e", "ensemble_dpo", {"scores": None}, "line 2: this run needs scores"),
    ("e", "ensemble_dpo", {"scores": [[0.5, 0.1, 0], [0.2, 0.3, 1]]}, "line 2: 3 scores for each completion"),
    ("e", "ensemble_dpo", {"scores": [[0.5, 0.1], [0.2]]}, "line 2: field 'scores' must hold"),
    ("e", "ensemble_dpo", {"scores": [[0.5, None], [0.2, 0.3]]}, "line 2: field 'scores' must hold finite"),
    ("e", "ensemble_dpo", {"scores": [[0.5, 10**400], [0.2, 0.3]]}, "line 2: field 'scores' must hold finite"),
    ("e", "ensemble_dpo", {"scores": [[0.5, 1e39], [0.2, 0.3]]}, "line 2: field 'scores' must hold finite"),
    ("e", "distill_dpo", {"scores": [0.5]}, "line 2: field 'scores' must hold 2"),
    ("e", "exo", {"scores": None}, "line 2: this run needs scores"),
    ("f", "exo", {"completions": ["a"], "scores": [[0.5, 0.1]]}, "line 2: this run needs"),
    ("f", "typo", {"reference_samples": None}, "line 2: this run needs reference_samples"),
    ("f", "typo", {"reference_samples": ["a"]}, "line 2: 1 reference_samples where earlier rows have 2"),
    ("f", "typo", {"reference_samples": []}, "line 2: field 'reference_samples' must be"),
    ("f", "typo", {"reference_samples_finished": [True]}, "line 2: field 'reference_samples_finished' must hold 2"),
    ("f", "pessimistic_dpo", {"reference_samples": None}, "line 2: 0 reference_samples where earlier rows have 2"),
    ("f", "dpo", {"completions": ["a"], "scores": None}, "line 2: this run needs chosen and rejected"),
    ("f", "rm", {"completions": ["a", "b", "c"], "scores": None}, "line 2: 3 completions where earlier rows have 2"),
]  # fmt: skip
QUICK = (0, 9)  # one of scores, one of samples


def incomplete_parameters() -> list[Any]:
    parameters = []
    for i, (letter, algorithm, changes, words) in enumerate(INCOMPLETE):
        marks = [fault(letter)]
        if i not in QUICK:
            marks.append(slow)
        parameters.append(pytest.param(algorithm, changes, words, marks=marks, id=f"{letter}-{algorithm}-{i}"))
    return parameters


@pytest.mark.parametrize("algorithm, changes, words", incomplete_parameters())
def test_scores_and_samples_that_are_missing(
    run_options: dict, tmp_path: Path, algorithm: str, changes: dict, words: str
) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [COMPLETE, {**COMPLETE, **changes}])
    options = {**run_options, "train_data": path}
    if algorithm == "exo":
        options["beta_r"] = 1.0
    refused(tmp_path / "out", f"x.jsonl, {words}", script=f"algos/{algorithm}.py", **options)


# ---------------------------------------------------------------- caches


def cache_of(out: Path) -> Path:
    return Path(f"{out}.cache") / "cleanpo"


def edit(path: Path, data: bytes) -> None:
    """Other content of the same size and time."""
    before = path.stat()
    assert len(data) == before.st_size
    assert data != path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def reverse_rows(path: Path) -> None:
    rows = path.read_bytes().splitlines(keepends=True)
    edit(path, b"".join(reversed(rows)))


@fault("h")
@pytest.mark.parametrize("edited", ["reference", pytest.param("model", marks=slow), pytest.param("rows", marks=slow)])
def test_caches_follow_the_content_of_files(run_options: dict, tmp_path: Path, edited: str) -> None:
    """After an edit that shows neither in size nor in time, the same numbers as with no cache."""
    for name, seed in (("model", 5), ("reference", 5), ("other", 6)):
        tiny.make_model(tmp_path / name, seed=seed, initializer_range=0.15)
    rows = tmp_path / "rows.jsonl"
    shutil.copy(run_options["train_data"], rows)
    options = {**run_options, "model": tmp_path / "model", "train_data": rows, "save_every": 0}
    if edited == "reference":
        options["reference"] = tmp_path / "reference"

    run(tmp_path / "before", beside=tmp_path / "cached", **options)
    if edited == "rows":
        reverse_rows(rows)
    else:
        other_weights = (tmp_path / "other" / "model.safetensors").read_bytes()
        edit(tmp_path / edited / "model.safetensors", other_weights)
    run(tmp_path / "after", beside=tmp_path / "cached", **options)
    run(tmp_path / "fresh", **options)

    same(tmp_path / "after", tmp_path / "fresh")
    assert lines(tmp_path / "before")[0] != lines(tmp_path / "after")[0]


@fault("h")
def test_caches_that_are_torn(run_options: dict, through: Path, tmp_path: Path) -> None:
    """As a crash of the machine may leave them: token ids and log-probs of the reference are computed again."""
    out = tmp_path / "out"
    shutil.copytree(cache_of(through), cache_of(out))
    torn = sorted(cache_of(out).iterdir())
    assert [path.name.partition("-")[0] for path in torn] == ["reference", "tokens"]
    for path in torn:
        path.write_bytes(path.read_bytes()[:-1])

    run(out, **run_options)

    same(out, through)
    for path in torn:
        whole = cache_of(through) / path.name
        assert path.stat().st_size == whole.stat().st_size


# ---------------------------------------------------------------- rows that change


@fault("i")
def test_rows_edited_while_the_run_goes_on(run_options: dict, through: Path, tmp_path: Path) -> None:
    """It keeps the rows that it has read; its resumption, which would read others, is refused."""
    rows = tmp_path / "rows.jsonl"
    out = tmp_path / "out"
    shutil.copy(run_options["train_data"], rows)
    options = {**run_options, "train_data": rows}

    process = start(out, **options)
    process.until(lambda: lines(out))
    reverse_rows(rows)
    assert process.end() == 0

    same(out, through)
    refused(out, "the train rows", resume=True, **options)


@fault("i")
@slow
def test_rows_edited_while_they_are_read(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The run is refused, or has read one of both; the cache never takes the one for the other."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(run_options["train_data"], rows)
    options = {**run_options, "train_data": rows}
    hook = functools.partial(hooks.edit_while_read, str(rows))

    process = start(tmp_path / "first", beside=tmp_path / "cached", hook=hook, **options)
    assert process.end() in (0, 2), process.log[-3000:]
    assert "Traceback" not in process.log, process.log[-3000:]
    assert rows.read_bytes() != run_options["train_data"].read_bytes()

    shutil.copy(run_options["train_data"], rows)
    run(tmp_path / "second", beside=tmp_path / "cached", **options)
    same(tmp_path / "second", through)


@fault("i")
@slow
def test_rows_edited_between_two_ranks(run_options: dict, through_of: Callable[..., Path], tmp_path: Path) -> None:
    """Both use the same rows, or the run is refused; the second does not wait for a file that nobody writes."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(run_options["train_data"], rows)
    hook = functools.partial(hooks.edit_before_second_rank_reads, str(rows))

    process = start(tmp_path / "out", processes=2, hook=hook, **{**run_options, "train_data": rows})
    first_rank = process.processes[0]
    first_rank.join(40)
    assert first_rank.exitcode in (0, 2), (first_rank.exitcode, process.log[-3000:])
    if first_rank.exitcode == 0:  # else torchrun would end the other
        assert process.end(10) == 0
        same(tmp_path / "out", through_of("dpo", 2))
