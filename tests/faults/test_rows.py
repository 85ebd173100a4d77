"""Rows that are malformed, unusable, missing, or change while they are used (faults 34-48, e, f, h, i)."""

import functools
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import harness
import hooks
import pytest
import worlds
from conftest import ALGORITHMS
from harness import lines, refused, run, same, start

fault, slow = pytest.mark.fault, pytest.mark.slow
GOOD = {"prompt": "a ok", "chosen": "ok", "rejected": "42"}
LINE = json.dumps(GOOD).encode() + b"\n"


def row(**changes: object) -> bytes:
    """A line of the file; a value of ... leaves its field out."""
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...}).encode() + b"\n"


def gzipped(data: bytes) -> bytes:
    """With one byte of the compressed data changed."""
    packed = bytearray(gzip.compress(data))
    packed[len(packed) // 2] ^= 0xFF
    return bytes(packed)


def chat(**changes: object) -> bytes:
    return row(prompt=[{"role": "user", "content": "a", **changes}])


CASES = [  # fault, file, words of the message; the first of each fault is in the quick set
    (34, "x.jsonl", row(rejected=...) * 3, "'rejected' is missing"),
    (34, "x.jsonl", b'{"a": 1}\n', "unknown columns a"),
    (35, "x.jsonl", LINE + row(rejected=None) + LINE, "x.jsonl, line 2: field 'rejected' is null"),
    (35, "x.jsonl", LINE + row(prompt=...) + LINE, "x.jsonl, line 2: field 'prompt' is missing"),
    (36, "x.jsonl", LINE + row(chosen=["a", "b"]) + LINE, "x.jsonl, line 2: field 'chosen'"),
    (36, "x.jsonl", LINE + row(chosen=7) + LINE, "x.jsonl, line 2: field 'chosen' is of type int"),
    (36, "x.jsonl", LINE + row(prompt={"a": "b"}) + LINE, "x.jsonl, line 2: field 'prompt' is of type dict"),
    (36, "x.jsonl", LINE + b"[1]\n" + LINE, "x.jsonl, line 2: a row must be an object"),
    (37, "x.jsonl", LINE + LINE[:-9] + b"\n" + LINE, "x.jsonl, line 2: not valid JSON"),
    (37, "x.jsonl", LINE * 2 + LINE[:-9], "x.jsonl, line 3: not valid JSON"),
    (37, "x.jsonl", LINE + b"[" * 100_000 + b"\n", "x.jsonl, line 2: not valid JSON"),
    (37, "x.jsonl.gz", gzipped(LINE * 3), "x.jsonl.gz"),
    (37, "x.parquet", b"PAR1" + LINE, "x.parquet: cannot be read"),
    (38, "x.jsonl", LINE + row(prompt="é").replace(b"\\u00e9", b"\xe9") + LINE, "x.jsonl, line 2: not UTF-8"),
    (38, "x.jsonl", LINE.decode().encode("utf-16") * 2, "x.jsonl, line 1: not UTF-8"),
    (38, "x.jsonl", LINE + row(prompt="\ud800"), "x.jsonl, line 2: a text holds half a character"),
    (44, "x.jsonl", row(prompt="ok " * 600) * 3, "no usable row; rows 3, kept 0, dropped: prompt too long 3"),
    (46, "x.jsonl", b"", "x.jsonl: no rows"),
    (46, "x.jsonl", b"\n \n", "x.jsonl: no rows"),
    (46, "x.json", b"[]", "x.json: no rows"),
    (48, "x.jsonl", chat() + chat(role="robot"), "x.jsonl, line 2: field 'prompt', message 0: unknown role 'robot'"),
    (48, "x.jsonl", chat() + row(prompt=[]), "x.jsonl, line 2: field 'prompt' has no messages"),
    (48, "x.jsonl", chat() + chat(content=None), "x.jsonl, line 2: field 'prompt', message 0: content must be text"),
    (48, "x.jsonl", chat() + row(prompt=["a"]), "x.jsonl, line 2: field 'prompt', message 0: "),
    (48, "x.jsonl", chat(), "no chat template"),
]  # fmt: skip
first = {number: i for i, (number, *_) in reversed(list(enumerate(CASES)))}
OTHERS = [name for name in ALGORITHMS if name != "dpo"]


def case(i: int, algorithm: str = "dpo") -> object:
    """A case as a parameter, with its number."""
    quick = algorithm == "dpo" and first[CASES[i][0]] == i
    marks = [fault(CASES[i][0]), *[slow] * (not quick)]
    return pytest.param(algorithm, *CASES[i][1:], marks=marks, id=f"{algorithm}-{CASES[i][0]}-{i}")


FAMILY = [case(first[number], name) for number in (34, 35, 36, 37, 38, 46) for name in OTHERS]


@pytest.mark.parametrize("algorithm, name, data, words", [*map(case, range(len(CASES))), *FAMILY])
def test_malformed_rows(world: dict, tmp_path: Path, algorithm: str, name: str, data: bytes, words: str) -> None:
    path, other = tmp_path / name, tmp_path / "other.jsonl"
    path.write_bytes(data)
    refused(tmp_path / "out", words, script=f"algos/{algorithm}.py", **{**world, "train_data": path})
    if algorithm == "dpo":  # held-out rows are no different
        other.write_bytes(chat(content="a") if b"role" in data else LINE)
        options = {**world, "train_data": world["train_data"], "eval_data": path}
        refused(tmp_path / "other", words, **options)


@fault(46)
@slow
def test_no_rows_under_torchrun(world: dict, tmp_path: Path) -> None:
    """status.json says it, since torchrun's exit code does not; no rank waits for one that has ended."""
    rows, out = tmp_path / "empty.jsonl", tmp_path / "out"
    rows.write_text("")
    process = start(out, processes=2, torchrun=True, **{**world, "train_data": rows})
    assert process.end(60) and process.status["state"] == "refused" and "no rows" in process.status["reason"]
    assert process.log.count("no rows") == 1


def report(process: harness.Started, *counts: str) -> dict:
    """The line about the training rows, which holds `counts`, and the same in run.json."""
    (line,) = [line for line in process.log.splitlines() if line.startswith("train: ")]
    assert all(count in line for count in counts), line
    return json.loads((process.out / "run.json").read_text())["data"]["train"]


@fault(39, 40, 41, 42, 43, 44, 47)
def test_rows_that_are_counted(world: dict, tmp_path: Path) -> None:
    """Fewer rows than a batch are one partial step."""
    swapped = row(chosen=GOOD["rejected"], rejected=GOOD["chosen"])
    dropped = [row(chosen=""), row(rejected=" \n\t"), row(rejected=GOOD["chosen"]), row(prompt="ok " * 100)]
    kept = [LINE, LINE, swapped, row(prompt=""), row(chosen="ok " * 100), row(prompt="7")]
    (tmp_path / "x.jsonl").write_bytes(b"".join(kept + dropped))
    options = {**world, "train_data": tmp_path / "x.jsonl", "max_length": 60, "batch_size": 64}
    del options["max_steps"]
    process = run(tmp_path / "out", **options)
    found = report(
        process,
        "rows 10, kept 6, dropped: empty completion 2, identical completions 1, prompt too long 1; ",
        *("completions cut 1", "contradictions 1", "duplicates 1"),
    )
    assert found["kept"] == 6 and found["dropped"]["prompt too long"] == 1 and found["completions cut"] == 1
    assert [line["step"] for line in lines(process.out)] == [1] and process.status["step"] == 1


@fault(41)
@pytest.mark.parametrize("bos", ["added", pytest.param("not added", marks=slow), "none"])
def test_an_empty_prompt(world: dict, tmp_path: Path, bos: str) -> None:
    """Is the BOS, whether or not the tokenizer adds one by itself, or else dropped and counted."""
    import reference
    from transformers import AutoTokenizer

    model, rows = worlds.make_model(tmp_path / "model", seed=4, bos=bos != "none"), tmp_path / "x.jsonl"
    if bos == "not added":
        file = model / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    rows.write_bytes(row(prompt="") + LINE * (bos == "none"))
    process = run(tmp_path / "out", **{**world, "model": model, "train_data": rows, "max_steps": 1})
    assert report(process, "kept 1")["dropped"] == ({"empty prompt": 1} if bos == "none" else {})
    tokenizer, stock = AutoTokenizer.from_pretrained(model), reference.load_model(model)
    assert (tokenizer.encode("") == [tokenizer.bos_token_id]) == (bos == "added")
    prompt = tokenizer.encode(GOOD["prompt"]) if bos == "none" else [tokenizer.bos_token_id]
    completion = tokenizer.encode(GOOD["chosen"], add_special_tokens=False) + [tokenizer.eos_token_id]
    expected = reference.token_logps(stock, prompt, completion).sum().item()
    assert lines(process.out)[0]["logps/chosen"] == pytest.approx(expected, rel=1e-5)


@fault(44)
@slow
def test_prompts_that_are_cut(world: dict, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINE + row(prompt="ok " * 600))
    options = {**world, "train_data": tmp_path / "x.jsonl", "max_prompt_length": 20, "max_steps": 1}
    report(run(tmp_path / "out", **options), "rows 2, kept 2; prompts cut 1")


@fault(45)
@pytest.mark.parametrize("form", ["plain", pytest.param("chat", marks=slow)])
def test_control_tokens_in_a_user_s_text(world: dict, tmp_path: Path, form: str) -> None:
    """Among the ids that the run has used, control tokens are where the rows' form has them, and nowhere else."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    text, rows = "ok</s> <|im_end|>\n<s><|im_start|>system\n7", tmp_path / "x.jsonl"
    model = worlds.make_model(tmp_path / "model", seed=4, chat=True)
    prompt = [{"role": "user", "content": text}] if form == "chat" else text
    rows.write_bytes(row(prompt=prompt, chosen=text))
    run(tmp_path / "out", **{**world, "model": model, "train_data": rows, "max_steps": 1})
    (cached,) = Path(f"{tmp_path / 'out'}.cache").rglob("tokens-*.safetensors")
    ids, tokenizer = load_file(cached)["tokens"].tolist(), AutoTokenizer.from_pretrained(model)
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = [tokenizer.decode([i]) for i in ids if i in specials]
    asked = ["<|im_start|>", "<|im_end|>", "<|im_start|>"] if form == "chat" else ["<s>"]
    assert names == [*asked, "<|im_end|>", "<|im_end|>"]
    assert tokenizer.decode(ids).count(text) == 2


SCORES = [[0.5, 0.1], [0.2, 0.3]]
SAMPLES = ["a", "ok"]
LACKING = [  # fault, algorithm, fields of the second row, words; the first row has scores of two models and two samples
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


@pytest.mark.parametrize(
    "algorithm, changes, words",
    [
        pytest.param(*values, marks=[fault(letter), *[slow] * (i not in (0, 9))], id=f"{letter}-{values[0]}-{i}")
        for i, (letter, *values) in enumerate(LACKING)
    ],
)
def test_scores_and_samples_that_are_missing(
    world: dict, tmp_path: Path, algorithm: str, changes: dict, words: str
) -> None:
    whole = {"prompt": "a", "completions": ["ok", "42"], "scores": SCORES, "reference_samples": SAMPLES}
    path = worlds.write_jsonl(tmp_path / "x.jsonl", [whole, {**whole, **changes}])
    options = {**world, "train_data": path, **({"beta_r": 1.0} if algorithm == "exo" else {})}
    refused(tmp_path / "out", f"x.jsonl, {words}", script=f"algos/{algorithm}.py", **options)


def edit(path: Path, data: bytes) -> None:
    """Other content of the same size and time."""
    before = path.stat()
    assert len(data) == before.st_size and data != path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@fault("h")
@pytest.mark.parametrize("what", ["reference", pytest.param("model", marks=slow), pytest.param("rows", marks=slow)])
def test_caches_follow_what_they_are_of(world: dict, tmp_path: Path, what: str) -> None:
    """After an edit that shows neither in size nor in time, the same numbers as with no cache."""
    for name in ("model", "reference", "other"):
        worlds.make_model(tmp_path / name, seed=6 if name == "other" else 5, initializer_range=0.15)
    shutil.copy(world["train_data"], tmp_path / "rows.jsonl")
    options = {**world, "model": tmp_path / "model", "train_data": tmp_path / "rows.jsonl", "save_every": 0}
    options |= {"reference": tmp_path / "reference"} if what == "reference" else {}
    run(tmp_path / "before", beside=tmp_path / "cached", **options)
    if what == "rows":
        edit(tmp_path / "rows.jsonl", b"".join((tmp_path / "rows.jsonl").read_bytes().splitlines(True)[::-1]))
    else:
        edit(tmp_path / what / "model.safetensors", (tmp_path / "other" / "model.safetensors").read_bytes())
    run(tmp_path / "after", beside=tmp_path / "cached", **options)
    run(tmp_path / "fresh", **options)
    same(tmp_path / "after", tmp_path / "fresh")
    assert lines(tmp_path / "before")[0] != lines(tmp_path / "after")[0]


@fault("h")
def test_caches_that_are_torn(world: dict, through: Path, tmp_path: Path) -> None:
    """As a crash of the machine may leave them: token ids and log-probs of the reference are made anew."""
    out, cache = tmp_path / "out", Path(f"{tmp_path / 'out'}.cache") / "cleanpo"
    shutil.copytree(Path(f"{through}.cache"), cache.parent)
    torn = sorted(cache.iterdir())
    assert [path.name.partition("-")[0] for path in torn] == ["reference", "tokens"]
    for path in torn:
        path.write_bytes(path.read_bytes()[:-1])
    run(out, **world)
    same(out, through)
    assert [p.stat().st_size for p in torn] == [
        (Path(f"{through}.cache/cleanpo") / p.name).stat().st_size for p in torn
    ]


@fault("i")
def test_rows_edited_while_the_run_goes_on(world: dict, through: Path, tmp_path: Path) -> None:
    """It keeps the rows that it has read; its resumption, which would read others, is refused."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    shutil.copy(world["train_data"], rows)
    process = start(out, **{**world, "train_data": rows})
    process.until(lambda: lines(out))
    edit(rows, b"".join(rows.read_bytes().splitlines(keepends=True)[::-1]))
    assert process.end() == 0
    same(out, through)
    refused(out, "the train rows", resume=True, **{**world, "train_data": rows})


@fault("i")
@slow
def test_rows_edited_while_they_are_read(world: dict, through: Path, tmp_path: Path) -> None:
    """The run is refused, or has read one of both; what it leaves in the cache is not taken for the other."""
    rows, options = tmp_path / "rows.jsonl", {**world, "train_data": tmp_path / "rows.jsonl"}
    shutil.copy(world["train_data"], rows)
    hook = functools.partial(hooks.edit_while_read, str(rows))
    process = start(tmp_path / "first", beside=tmp_path / "cached", hook=hook, **options)
    assert process.end() in (0, 2) and "Traceback" not in process.log, process.log[-3000:]
    assert rows.read_bytes() != world["train_data"].read_bytes()
    shutil.copy(world["train_data"], rows)
    run(tmp_path / "second", beside=tmp_path / "cached", **options)
    same(tmp_path / "second", through)


@fault("i")
@slow
def test_rows_edited_between_two_ranks(world: dict, through_of: Callable[..., Path], tmp_path: Path) -> None:
    """Both use the same rows, or the run is refused; the second does not wait for what nobody writes."""
    rows, options = tmp_path / "rows.jsonl", {**world, "train_data": tmp_path / "rows.jsonl"}
    shutil.copy(world["train_data"], rows)
    hook = functools.partial(hooks.edit_before_second_rank_reads, str(rows))
    process = start(tmp_path / "out", processes=2, hook=hook, **options)
    process.processes[0].join(40)
    code = process.processes[0].exitcode  # after which torchrun would end the other
    assert code in (0, 2), (code, process.log[-3000:])
    if code == 0:
        assert process.end(10) == 0
        same(tmp_path / "out", through_of("dpo", 2))
