"""docs/at_scale.md: every command line is one of its command, and all of them run on tiny models and rows.

The page's shell runs as it stands. `python`, `torchrun`, `hf` and `curl` ask the test, which reads the command line, or
runs it in small: a tiny model or a few rows for each hub id, one step of training, one round of each sweep.
"""

import ast
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from shared import UserError
from shared.command import check_arguments, parse_arguments

PAGE = (tiny.ROOT / "docs" / "at_scale.md").read_text(encoding="utf-8")
SEPARATOR = "\x1f"
ASK = """
ask() {
    local IFS=$'\\x1f' code
    printf '%s\\n' "$*" >&"$QUESTIONS"
    read -r code <&"$ANSWERS"
    return "$code"
}
python() { ask python "$@"; }
torchrun() { ask torchrun "$@"; }
hf() { ask hf "$@"; }
curl() { ask curl "$@"; }
"""
Answer = Callable[[list[str]], int]  # the words of a command line → its exit code


def blocks(page: str) -> str:
    """The page's shell."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S))


def run_shell(script: str, folder: Path, answer: Answer) -> str:
    """Run a script whose commands are answered by a function. Returns what it printed to stderr."""
    questions, to_us = os.pipe()
    from_us, answers = os.pipe()
    environment = {**os.environ, "QUESTIONS": str(to_us), "ANSWERS": str(from_us)}
    with open(folder / "stderr", "w+") as stderr:
        shell = subprocess.Popen(
            ["bash", "-c", ASK + script], cwd=folder, env=environment, stderr=stderr, pass_fds=(to_us, from_us)
        )
        os.close(to_us)
        os.close(from_us)
        with open(questions) as lines, open(answers, "w", buffering=1) as codes:
            for line in lines:
                code = answer(line.rstrip("\n").split(SEPARATOR))
                codes.write(f"{code}\n")
        code = shell.wait(timeout=60)
        stderr.seek(0)
        printed = stderr.read()
    assert code == 0, printed
    return printed


# ---------------------------------------------------------------- every command line


def command_lines(script: str, folder: Path) -> list[list[str]]:
    """The words of each command of this project, from its file on; of several that differ by numbers alone, one."""
    commands: dict[str, list[str]] = {}

    def remember(words: list[str]) -> int:
        if words[0] in ("python", "torchrun"):
            (start,) = [i for i, word in enumerate(words) if word.endswith(".py")]
            shape = re.sub(r"\d+", "0", " ".join(words[start:]))
            commands.setdefault(shape, words[start:])
        return 0

    run_shell(f"set -u\n{script}\nexit 0", folder, remember)
    return list(commands.values())


def arguments_of(script: str) -> Any:
    """The dataclass, or the union of them, that a command's file reads from its command line."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    source = (tiny.ROOT / script).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("command", "checked_command"):
            return eval(ast.unparse(node.args[1]), vars(module))
    raise AssertionError(f"{script} is no command")


def problem_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says against its command line; empty if nothing."""
    script = words[0]
    if not (tiny.ROOT / script).is_file():
        return "there is no such file"
    monkeypatch.setattr(sys, "argv", words)
    try:
        check_arguments(parse_arguments(arguments_of(script), ""))
    except UserError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err
    return ""


def test_every_command_line_is_one_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = command_lines(blocks(PAGE), tmp_path)
    assert len(commands) > 60
    scripts = {words[0] for words in commands}
    algorithms = {f"algos/{path.name}" for path in (tiny.ROOT / "algos").glob("[a-z]*.py")}
    assert algorithms - scripts == {"algos/token_dpo_beam.py"}  # the gradient is that of dpo

    problems = []
    for words in commands:
        problem = problem_of(words, monkeypatch, capsys)
        if problem:
            problems.append(f"{' '.join(words)}\n    {problem}")
    shown = "\n".join(problems)
    assert not problems, f"\n{shown}"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("python algos/dpq.py --model m", "no such file"),
        ("$train algos/dpo.py --model m --train-data d --output-dir o --gamma 1", "--gamma"),
        ("$train algos/dpo.py --model m --train-data d", "--output-dir"),
        ("python scripts/prepare_rows.py halve --rows r --output o", "halve"),
        ("$train algos/dpo.py --model m --train-data d --output-dir o --lr 1 --learning-rate 2", "given twice"),
        ("for b in -1; do python algos/dpo.py --model m --train-data d --output-dir o --beta $b; done", "--beta"),
    ],
)
def test_a_wrong_command_line_is_seen(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = command_lines(f'train="torchrun --nproc-per-node 8"\n{line}', tmp_path)
    assert problem in problem_of(words, monkeypatch, capsys)


def test_a_variable_without_a_value_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unbound"):
        command_lines("python algos/dpo.py --beta $betta", tmp_path)


# ---------------------------------------------------------------- stand-ins for what is on the hub


def sentence(number: int) -> str:
    """A text of 4 to 23 words, with quotes, a backslash and a tag in it."""
    words = tiny.words()
    chosen = [words[(7 * number + 3 * i) % len(words)] for i in range(4 + number % 20)]
    return f'{" ".join(chosen)} "so \\ {number}"<br />ok'


def transcripts(number: int, turns: int) -> dict:
    """A row of HH."""
    history = ""
    for turn in range(turns):
        history += f"\n\nHuman: {sentence(number + turn)}\n\nAssistant:"
        if turn < turns - 1:
            history += f" {sentence(number + turn + 50)}"
    return {"chosen": f"{history} {sentence(number + 1)}", "rejected": f"{history} {sentence(number + 2)}"}


def hh_rows(count: int) -> list[dict]:
    return [transcripts(number, 1 + number % 2) for number in range(count)]


def comparison(number: int, is_article: bool = False) -> dict:
    """A row of summarize_from_feedback."""
    info: dict[str, Any] = {"id": f"t3_{number}", "post": sentence(number), "title": sentence(number + 7)}
    info |= {"subreddit": "AskReddit", "site": None, "article": None}
    if is_article:
        info |= {"post": None, "title": None, "subreddit": None, "site": "cnn", "article": sentence(number)}
    summaries = []
    for i in range(2):
        summaries.append({"text": f" {sentence(11 * number + 17 * i)}", "policy": f"sup{i}", "note": None})
    return {"info": info, "summaries": summaries, "choice": number % 2, "worker": "w", "split": "train"}


def review(number: int) -> dict:
    """A row of IMDB."""
    return {"text": f"{sentence(number)} {sentence(number + 13)}", "label": number % 2}


def post(number: int) -> dict:
    """A row of the posts of Stiennon et al."""
    fields = {"id": f"t3_{number}", "subreddit": "AskReddit", "title": sentence(number + 7), "post": sentence(number)}
    return {**fields, "summary": sentence(number + 31)}


def rows_of_hub(folder: Path) -> dict[str, str]:
    """A file of rows for each data set that the page names by its hub id."""
    rows = {
        "Anthropic/hh-rlhf:train": hh_rows(12),
        "Anthropic/hh-rlhf:test": hh_rows(7),
        "stanfordnlp/imdb:train": [review(number) for number in range(16)],
        "stanfordnlp/imdb:test": [review(number) for number in range(20, 28)],
    }
    files = {}
    for name, rows_of_set in rows.items():
        path = folder / f"{name.replace('/', '_').replace(':', '_')}.jsonl"
        files[name] = str(tiny.write_jsonl(path, rows_of_set))
    return files


def models_of_hub(folder: Path) -> dict[str, str]:
    """A tiny model for each model that the page names by its hub id."""
    pythia = tiny.make_model(folder / "pythia", "gpt_neox", seed=3, max_position_embeddings=1024)
    gpt2 = tiny.make_model(folder / "gpt2", "gpt2", seed=4, bos=False, n_positions=1024)
    return {
        "EleutherAI/pythia-1b": str(pythia),
        "EleutherAI/pythia-2.8b": str(pythia),
        "EleutherAI/pythia-6.9b": str(pythia),
        "openai-community/gpt2-large": str(gpt2),
    }


# ---------------------------------------------------------------- the page in small


class Rehearsal:
    """The commands of the page in small."""

    # what the words behind these flags are in small
    VALUES = {
        "--max-steps": "1",
        "--steps": "1",
        "--warmup-steps": "0",
        "--save-every": "1",
        "--every": "1",
        "--batch-size": "4",
        "--total": "10",
        "--held-out-share": "0.4",
        "--max-new-tokens": "6",
        "--num-prompts": "3",
        "--max-rows": "12",
    }

    def __init__(self, folder: Path, names: dict[str, str]):
        self.folder = folder
        self.names = names  # hub id → its stand-in

    def run(self, script: str) -> None:
        """The page's shell, with one round of each loop over more than three numbers; an error ends it."""
        script = re.sub(r"(for \w+ in [\d.]+)( [\d.]+){3,}; do", r"\1; do", script)
        run_shell(f"set -eu\n{script}", self.folder, self.answer)

    def answer(self, words: list[str]) -> int:
        if "scripts/judge.py" in words:  # a judge needs an endpoint
            return 0
        if words[0] == "hf":
            return self.download(words)
        if words[0] == "curl":
            path = self.folder / words[words.index("--output") + 1]
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny.write_jsonl(path, [post(number) for number in range(12)])
            return 0
        (start,) = [i for i, word in enumerate(words) if word.endswith(".py")]
        return self.execute(self.in_small(words[start:]))

    def download(self, words: list[str]) -> int:
        """What `hf download` would leave in --local-dir."""
        folder = self.folder / words[words.index("--local-dir") + 1]
        if words[2] == "Anthropic/hh-rlhf":
            (folder / "helpful-base").mkdir(parents=True)
            for split in ("train", "test"):
                lines = "".join(json.dumps(row) + "\n" for row in hh_rows(8))
                with gzip.open(folder / "helpful-base" / f"{split}.jsonl.gz", "wt") as file:
                    file.write(lines)
            return 0
        assert words[2] == "openai/summarize_from_feedback"
        rows = {
            "train": [comparison(number) for number in range(60)],
            "validation": [comparison(number, is_article=number % 3 == 0) for number in range(9)],
        }
        for split, rows_of_split in rows.items():
            path = folder / "comparisons" / split / "0000.parquet"
            path.parent.mkdir(parents=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of_split), path)
        return 0

    def in_small(self, words: list[str]) -> list[str]:
        """A command line with stand-ins, and with small numbers."""
        small = []
        for before, word in zip(["", *words], words, strict=False):
            small.append(self.VALUES.get(before, self.names.get(word, word)))
        trains = words[0].startswith("algos/") or words[0] == "scripts/baselines/unlikelihood.py"
        if trains and "--max-steps" not in words:
            small += ["--max-steps", "1"]
        return small

    def execute(self, words: list[str]) -> int:
        """Run a command in a process of its own, in the rehearsal's folder."""
        log = self.folder / "log"
        environment = tiny.environment(self.folder / "cache")
        line = [str(tiny.ROOT / words[0]), *words[1:]]
        harness.context.set_forkserver_preload(harness.PRELOAD)
        process = harness.context.Process(target=harness._run, args=(line, log, environment, None))
        process.start()
        process.join(120)
        process.kill()
        assert process.exitcode == 0, f"{' '.join(words)}\n{log.read_text(errors='replace')[-3000:]}"
        log.unlink(missing_ok=True)
        return 0

    def rows(self, path: str) -> list[dict]:
        return tiny.read_jsonl(self.folder / path)


def check_data_of_tldr_and_hh(rehearsal: Rehearsal) -> None:
    """What the first commands make of the stand-ins, by the stand-ins' own functions."""
    assert rehearsal.rows("data/hh/single_turn.jsonl") == [
        row for row in hh_rows(7) if row["chosen"].count("Human") == 1
    ]
    pairs = rehearsal.rows("data/tldr/pairs.jsonl")
    assert len(pairs) == 60
    for number, row in enumerate(pairs):
        source = comparison(number)
        assert row["prompt"].endswith(f"POST: {source['info']['post']}\n\nTL;DR:")
        assert row["chosen"] == source["summaries"][number % 2]["text"]
    assert [row["prompt"].split(":")[0] for row in rehearsal.rows("data/tldr/articles.jsonl")] == 3 * ["Article"]
    assert [row["prompt"].split(":")[0] for row in rehearsal.rows("data/tldr/validation.jsonl")] == 6 * ["SUBREDDIT"]
    for number, row in enumerate(rehearsal.rows("data/tldr/posts_train.jsonl")):
        assert row["completion"] == f" {sentence(number + 31)}"


@pytest.mark.slow
def test_the_whole_page_in_small(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, rows_of_hub(tmp_path) | models_of_hub(tmp_path))
    rehearsal.run(blocks(PAGE))
    check_data_of_tldr_and_hh(rehearsal)

    reviews = [review(number) for number in range(16)]
    sentiment = rehearsal.rows("data/imdb/sentiment.jsonl")
    assert len(sentiment) == 8
    for label, name in ((1, "chosen"), (0, "rejected")):
        expected = {" " + row["text"] for row in reviews if row["label"] == label}
        assert {row[name] for row in sentiment} == expected

    for row, source in zip(rehearsal.rows("data/imdb/ten_tokens_train.jsonl"), reviews, strict=True):
        assert row["prompt"] + row["completion"] == source["text"]
    pairs = rehearsal.rows("data/imdb/pairs.jsonl") + rehearsal.rows("data/imdb/held_out_pairs.jsonl")
    assert 0 < len(pairs) <= 6 * 12
    assert all(row["scores"][0] > row["scores"][1] for row in pairs)

    for path in tmp_path.rglob("status.json"):
        assert json.loads(path.read_text())["state"] == "done", path
