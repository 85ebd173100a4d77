"""Rows of any common form from any common container, as Examples.

read()    container → (where, row)    jsonl, json, parquet, each also .gz; directories; saved datasets; hub ids
parse()   row → Example               the forms are told apart by their columns (FORMS)
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared import UserError

LARGEST = 3.4e38  # float32
ENDINGS = (".jsonl", ".json", ".parquet")
SPLITTER = "\n\nAssistant:"  # the prompt of an HH transcript ends with its last one
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class Turn(str):
    """Text of one user turn: a chat message where the tokenizer has a chat template, plain text where it has none."""


Text = str | list[dict]  # a plain string, or chat messages


class Dropped(Exception):
    """This row cannot be used; the message is the reason under which it is counted."""


@dataclass
class Example:
    """One prompt with its completions, preferred first; `where` names file and line for error messages.

    Without a prompt (None) the completion is running text whose first token is context.
    """

    where: str
    number: int  # of the row in its source, from 1
    prompt: Text | None
    completions: list[Text]
    ordered: bool = True  # the completions' own order is the ranking
    ended: list[bool] = field(default_factory=list)  # which completions end with an EOS; the others were cut off
    scores: list[list[float]] | None = None  # of each completion, one number per reward model
    samples: list[Text] = field(default_factory=list)  # completions drawn from π_ref
    finished: list[bool] = field(default_factory=list)  # which of them end with an EOS
    row: dict = field(default_factory=dict)  # as it stands in the source


# ---------------------------------------------------------------- containers


def read(source: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) of a file, a directory of files, a saved dataset or a hub id, each also as `path:split`."""
    for name in files_of(source):
        if isinstance(name, Path):
            yield from _read_file(name)
        else:
            yield from ((f"{source}, row {i}", row) for i, row in enumerate(name, 1))


def files_of(source: str) -> list:
    """The files behind `source`, or the opened dataset where it is not made of plain files."""
    path, split = (source, None) if os.path.exists(source) or ":" not in source else source.rsplit(":", 1)
    where = Path(path)
    if where.is_file() and split:
        raise UserError(f"{source}: a file has no splits")
    if where.is_file():
        return [where]
    if where.is_dir() and not any((where / f).exists() for f in ("dataset_info.json", "dataset_dict.json")):
        if split:
            raise UserError(f"{source}: a directory of files has no splits; name one of its files")
        files = sorted(f for f in where.iterdir() if _ending(f))
        if not files:
            raise UserError(f"{path}: no file that ends in {', '.join(ENDINGS)} (or .gz) in this directory")
        return files
    return [_dataset(path, split)]


def _ending(path: Path) -> str | None:
    return next((e for e in ENDINGS if path.name.endswith((e, e + ".gz"))), None)


def _dataset(path: str, split: str | None):
    try:
        import datasets

        saved = os.path.isdir(path)
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # the hub's errors share no base class
        raise UserError(
            f"{path}: neither a file, a directory nor a data set on the hub ({first_line(error)})"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            raise UserError(f"{path}: no split {split or 'train'!r}; there are {', '.join(found)}")
        found = found[split or "train"]
    elif saved and split:
        raise UserError(f"{path}: a data set without splits, but {split!r} was asked for")
    return found


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    ending = _ending(path)
    if ending is None:
        raise UserError(f"{path}: the file's name must end in {', '.join(ENDINGS)}, each also with .gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            rows = _parquet(file) if ending == ".parquet" else _json(path, file)
            for number, row in rows:
                where = f"{path}, line {number}" if ending == ".jsonl" else f"{path}, row {number}"
                if not isinstance(row, dict):
                    raise UserError(f"{where}: a row must be an object with named columns, not {type(row).__name__}")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _parquet(file) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError, OverflowError) as error:  # the latter for dates beyond Python's
        raise OSError(error) from None


def _json(path: Path, file) -> Iterator[tuple[int, dict]]:
    first = file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        try:
            rows = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({first_line(error)})") from None
        yield from enumerate(rows, 1)
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({first_line(error)})") from None
        yield number, row


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- forms


def _field(row: dict, name: str, kind: type | tuple = str):
    value = row.get(name)
    if not isinstance(value, kind):
        found = "missing" if name not in row else "null" if value is None else f"of type {type(value).__name__}"
        wanted = "text" if kind is str else "a list" if kind is list else "text or a list of messages"
        raise ValueError(f"field {name!r} is {found}, must be {wanted}")
    return value


def _messages(value: list, name: str) -> list[dict]:
    """Messages as {role, content}; `from`/`value` and the role names of ShareGPT are accepted too."""
    if not value:
        raise ValueError(f"field {name!r} has no messages")
    found = []
    for i, message in enumerate(value):
        message = message if isinstance(message, dict) else {}
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"field {name!r}, message {i}: unknown role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"field {name!r}, message {i}: content must be text, not {type(content).__name__}")
        found.append({"role": ROLES[role], "content": content})
    return found


def _text(row: dict, name: str) -> Text:
    value = _field(row, name, (str, list))
    return value if isinstance(value, str) else _messages(value, name)


def _pair(row: dict) -> tuple[Text, list[Text]]:
    """prompt, chosen and rejected; messages may repeat the prompt."""
    prompt, pair = _text(row, "prompt"), _chosen_rejected(row)
    if isinstance(pair[0], list) and pair[0][0]["role"] != "assistant":
        repeated, pair = _split_messages(*pair)
        if isinstance(prompt, str) or prompt == repeated[: len(prompt)]:
            return repeated, pair
        if repeated != prompt[-len(repeated) :]:
            raise ValueError("fields 'chosen' and 'rejected' begin with other messages than 'prompt'")
    return prompt, pair


def _chosen_rejected(row: dict) -> list[Text]:
    pair = [_text(row, "chosen"), _text(row, "rejected")]
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise ValueError("fields 'chosen' and 'rejected' must both be text or both be messages")
    return pair


def _transcripts(row: dict) -> tuple[Text, list[Text]]:
    """chosen and rejected with the prompt inside."""
    pair = _chosen_rejected(row)
    return _split_transcripts(*pair) if isinstance(pair[0], str) else _split_messages(*pair)


def _split_transcripts(chosen: str, rejected: str) -> tuple[Text, list[Text]]:
    if SPLITTER not in chosen or SPLITTER not in rejected:
        raise Dropped("no Assistant turn")
    cuts = [text.rindex(SPLITTER) + len(SPLITTER) for text in (chosen, rejected)]
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        raise Dropped("prompts differ")
    return chosen[: cuts[0]], [chosen[cuts[0] :], rejected[cuts[1] :]]


def _split_messages(chosen: list[dict], rejected: list[dict]) -> tuple[Text, list[Text]]:
    if chosen == rejected:
        prompt, completion = _last_turn(chosen)
        return prompt, completion * 2
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if n is None or any(m[n]["role"] != "assistant" for m in (chosen, rejected)):
        raise Dropped("prompts differ")
    return chosen[:n], [chosen[n:], rejected[n:]]


def _completions(row: dict) -> tuple[Text, list[Text]]:
    prompt, completions = _text(row, "prompt"), _field(row, "completions", list)
    if not all(isinstance(c, str) for c in completions):
        raise ValueError("field 'completions' must be a list of texts")
    return prompt, completions


def _shp(row: dict) -> tuple[Text, list[Text]]:
    pair = [_field(row, "human_ref_A"), _field(row, "human_ref_B")]
    if row.get("labels") not in (0, 1):
        raise ValueError(f"field 'labels' is {row.get('labels')!r}, must be 1 (A is preferred) or 0")
    return _field(row, "history"), pair if row["labels"] == 1 else pair[::-1]


def _conversation_pair(row: dict) -> tuple[Text, list[Text]]:
    prompt = _messages(_field(row, "conversations", list), "conversations")
    return prompt, [_messages([row.get(name)], name) for name in ("chosen", "rejected")]


def _instruction(row: dict) -> Turn:
    return Turn(_field(row, "instruction") + (f"\n{_field(row, 'input')}" if row.get("input") else ""))


def _last_turn(messages: list[dict]) -> tuple[Text, list[Text]]:
    """The prompt is all that comes before the last assistant turn."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise Dropped("no assistant turn")
    return messages[: turns[-1]], [messages[turns[-1] : turns[-1] + 1]]


# columns that a form needs → (prompt, completions); the first form whose columns are all there is taken
FORMS: dict[tuple[str, ...], Callable[[dict], tuple[Text, list[Text]]]] = {
    ("conversations", "chosen", "rejected"): _conversation_pair,
    ("instruction", "chosen", "rejected"): lambda row: (
        _instruction(row),
        [_field(row, "chosen"), _field(row, "rejected")],
    ),
    ("prompt", "chosen", "rejected"): _pair,
    ("chosen", "rejected"): _transcripts,
    ("prompt", "completions"): _completions,
    ("history", "human_ref_A", "human_ref_B", "labels"): _shp,
    ("messages",): lambda row: _last_turn(_messages(_field(row, "messages", list), "messages")),
    ("prompt", "completion"): lambda row: (_text(row, "prompt"), [_text(row, "completion")]),
    ("conversations",): lambda row: _last_turn(_messages(_field(row, "conversations", list), "conversations")),
    ("instruction", "output"): lambda row: (_instruction(row), [_field(row, "output")]),
    ("text",): lambda row: (None, [_field(row, "text")]),
}
# what can be sampled from needs no completion
PROMPT_FORMS = FORMS | {("prompt",): lambda row: (_text(row, "prompt"), [])}


def form_of(row: dict, source: str, forms: dict) -> tuple[str, ...]:
    """The form of a file's rows, told by the columns of its first one."""
    for columns in forms:
        if all(name in row for name in columns):
            return columns
    nearest = max(forms, key=lambda columns: (sum(name in row for name in columns) / len(columns), len(columns)))
    missing = [name for name in nearest if name not in row]
    hint = f"; {missing[0]!r} is missing for {' + '.join(nearest)}" if len(missing) < len(nearest) else ""
    known = "; ".join(" + ".join(columns) for columns in forms)
    raise UserError(f"{source}: unknown columns {', '.join(map(str, row))}{hint}. Known forms: {known}")


def parse(source: str, dropped: Counter, forms: dict = FORMS) -> Iterator[Example]:
    """Rows as Examples; a row that cannot be used adds its reason to `dropped`, a malformed one ends the run."""
    form = None
    for number, (where, row) in enumerate(read(source), 1):
        form = form or form_of(row, source, forms)
        try:
            prompt, completions = forms[form](row)
            if isinstance(prompt, str) and any(isinstance(c, list) for c in completions):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, list):
                completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
            if any(isinstance(c, list) and c[0]["role"] != "assistant" for c in completions):
                raise ValueError("a completion must begin with a message of the assistant")
            ended = _booleans(row if "completions" in form else {}, "finished", len(completions))
            example = Example(where, number, prompt, completions, "completions" not in form, ended, row=row)
            _add_scores(example, row)
            _add_samples(example, row)
            json.dumps([prompt, completions, example.samples], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: a text holds half a character (a lone surrogate); remove it") from None
        except ValueError as error:
            raise UserError(f"{where}: {error} (form {' + '.join(form)})") from None
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        yield example
    if form is None:
        raise UserError(f"{source}: no rows")


def _add_scores(example: Example, row: dict) -> None:
    """`scores`: K numbers, or K lists of one number per reward model; or `score_chosen` and `score_rejected`."""
    if row.get("scores") is not None and len(example.completions) > 1:
        scores = [s if isinstance(s, list) else [s] for s in _field(row, "scores", list)]
    elif row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        scores = [[row["score_chosen"]], [row["score_rejected"]]]
    else:
        return
    numbers = [value for each in scores for value in each]
    if len(scores) != len(example.completions) or len({len(each) for each in scores}) != 1 or not numbers:
        raise ValueError(
            f"field 'scores' must hold {len(example.completions)} numbers, or as many lists of equal length"
        )
    if not all(isinstance(value, int | float) and abs(value) < LARGEST for value in numbers):
        raise ValueError("field 'scores' must hold finite numbers of float32")
    example.scores = scores


def _add_samples(example: Example, row: dict) -> None:
    """`reference_samples`: texts; `reference_samples_finished`: which of them were not cut off, by default all."""
    if row.get("reference_samples") is None:
        return
    samples = _field(row, "reference_samples", list)
    if not samples or not all(isinstance(sample, str) for sample in samples):
        raise ValueError("field 'reference_samples' must be a list of texts")
    chat = isinstance(example.prompt, list)
    example.samples = [[{"role": "assistant", "content": s}] if chat else s for s in samples]
    example.finished = _booleans(row, "reference_samples_finished", len(samples))


def _booleans(row: dict, name: str, n: int) -> list[bool]:
    """The n booleans of a field, all true where it is absent."""
    found = [True] * n if row.get(name) is None else row[name]
    if not isinstance(found, list) or [type(value) for value in found] != [bool] * n:
        raise ValueError(f"field {name!r} must hold {n} booleans")
    return found
