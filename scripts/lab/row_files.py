"""Rows in, a result for each row, rows out, and a run that was killed continues where it stopped.

read_examples()    a source → Examples; `example.row` is the row as it stands in the file
encode_rows()      the same with token ids, as training encodes them
write_windows()    windows of rows → OUTPUT, in the order of the source

Memory does not grow with the file. While a command runs, OUTPUT.partial holds one line with the settings and after it
the rows that are complete. Under torchrun each process writes its own OUTPUT.partial-RANK-of-WORLD.
"""

import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from shared import UserError
from shared.encode import EncodedCompletion, EncodedExample, Encoder
from shared.files import replacing
from shared.groups import describe, report_of
from shared.lora import base_of
from shared.rows import PROMPT_FORMS, Counts, Example, parse_rows
from shared.sources import source_hash

CHUNK_SIZE = 256  # rows that are tokenised together
INPUT_CONTENTS = "contents of --rows"
MODEL_FILES = "model files"


@dataclass
class EncodedRow:
    """An example that can be used, with its token ids."""

    example: Example
    prompt: list[int]
    completions: list[EncodedCompletion] = field(default_factory=list)


# ---------------------------------------------------------------- json lines


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write a jsonl file, which appears whole or not at all; its directory is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- in


def read_examples(source: str, counts: Counts, max_rows: int | None = None) -> Iterator[Example]:
    """The first `max_rows` examples of a source. Raises UserError for a row without a prompt.

    What becomes of the rows is added to `counts`.
    """
    examples = parse_rows(source, counts, PROMPT_FORMS)
    for example in islice(examples, max_rows):
        if example.prompt is None:
            raise UserError(f"{example.location}: running text has no prompt")
        yield example


def first_examples(source: str, n: int) -> list[Example]:
    """The first n examples. Raises UserError if no row is left.

    Prints the counts if rows were dropped or columns are not used.
    """
    counts = Counts()
    examples = list(read_examples(source, counts, n))
    line = summary(source, len(examples), counts)
    if counts.dropped or counts.unused:
        print(f"{source}: {line}", file=sys.stderr)
    return examples


def count_rows(source: str, max_rows: int | None = None) -> int:
    """The number of usable rows. A malformed row raises UserError here, before anything has been computed."""
    total = 0
    for _ in read_examples(source, Counts(), max_rows):
        total += 1
    return total


def encode_in_chunks(examples: Iterable[Example], encoder: Encoder) -> Iterator[EncodedExample]:
    """Examples with the token ids that training would give them before it truncates them."""
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK_SIZE)):
        yield from encoder.encode(chunk)


def encode_rows(
    examples: Iterable[Example], encoder: Encoder, room: int, completions: bool = False
) -> Iterator[EncodedRow]:
    """Examples with the token ids that training would give them; completions are encoded on request.

    A prompt and each of its completions have at most `room` tokens together. A prompt that leaves no token for a
    completion is dropped; a longer completion is truncated; one without any token becomes its EOS. What becomes of the
    rows is added to the encoder's counts.
    """
    num_completions: int | None = 0
    if completions:
        num_completions = None  # all of them
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK_SIZE)):
        for encoded in encoder.encode(chunk, num_completions):
            row = _to_row(encoded, encoder.eos_id, room)
            if len(encoded.prompt) >= room:
                encoder.counts.dropped["prompt too long"] += 1
            elif not all(completion.ids for completion in row.completions):
                encoder.counts.dropped["no counted token in a completion"] += 1
            else:
                encoder.counts.noted.update(encoded.notes)
                yield row


def _to_row(encoded: EncodedExample, eos_id: int, room: int) -> EncodedRow:
    completions = []
    for completion in encoded.completions:
        if not completion.ids:
            completion = EncodedCompletion([eos_id], [True])
        completions.append(completion.truncated(room - len(encoded.prompt)))
    return EncodedRow(encoded.example, encoded.prompt, completions)


# ---------------------------------------------------------------- out


def settings_of(args: Any, *models: str) -> dict:
    """Everything that the rows of the output depend on: the arguments, the input, the files of the models, the date.

    Arguments of type Path are outputs, on which the rows do not depend. A chat template may write the date, which is
    that of the day on which the run began. The values are as JSON gives them back, so that they can be compared with
    the first line of a partial file.
    """
    settings = dataclasses.asdict(args)
    outputs = [name for name, value in settings.items() if isinstance(value, Path)]
    paths = [settings.pop(name) for name in outputs]
    settings[INPUT_CONTENTS] = _contents(args.rows)
    settings["date"] = _date_of_run(paths)
    settings[MODEL_FILES] = []
    for model in models:
        base = base_of(model)
        files = {*Path(model).glob("*.safetensors"), *Path(base).glob("*.safetensors")}
        for path in sorted(files):
            status = path.stat()
            settings[MODEL_FILES].append((str(path), status.st_size, status.st_mtime_ns))
    return json.loads(json.dumps(settings))


def _contents(rows: str | tuple[str, ...]) -> str | list[str]:
    """The hash of a source, or of several."""
    if isinstance(rows, str):
        return source_hash(rows)
    return [source_hash(source) for source in rows]


def _date_of_run(outputs: list[Path]) -> str:
    """Today, or the date of the run that left its parts."""
    for output in outputs:
        for header in _headers_of_parts(output):
            return header["date"]
    return str(date.today())


def _headers_of_parts(output: Path) -> Iterator[dict]:
    """The settings of the run that left its parts."""
    for path in sorted(output.parent.glob(f"{output.name}.partial*")):
        with open(path, encoding="utf-8") as file:
            header = file.readline()
        if header.endswith("}\n"):
            yield json.loads(header)


def refuse_existing(outputs: list[Path], settings: dict) -> None:
    """Raise UserError if an output exists, unless a run with these settings was interrupted and goes on."""
    for output in outputs:
        if settings in _headers_of_parts(output):
            return
    for output in outputs:
        if output.exists():
            raise UserError(f"{output}: exists already; give another output, or remove it")


def reserve(output: Path, settings: dict) -> None:
    """Begin an output that is written after others, so that the run goes on if it is killed between them."""
    (part,) = _part_paths(output, 1)
    with _open_part(part, settings):
        pass


def write_windows(
    output: Path,
    settings: dict,
    rows: Iterable,
    window_size: int,
    compute: Callable[[int, list], Iterable[dict]],
    total: int | None = None,
) -> int:
    """Write `compute(number, window)` for windows of `window_size` rows: one JSON object per row.

    Windows are dealt out to the processes in turn, and rank 0 joins the parts in the order of the rows. `compute` must
    give the same result for the same window again: only the missing rows of an interrupted window are written.
    total: the number of rows, for the progress bar. Returns the number of rows read from `rows`.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    parts = _part_paths(output, world_size)
    _refuse_other_parts(output, parts)

    num_rows = 0
    rows = iter(rows)
    with _open_part(parts[rank], settings) as part, tqdm(total=total, unit="row", disable=rank > 0) as bar:
        for number in count():
            window = list(islice(rows, window_size))
            if not window:
                break
            num_rows += len(window)
            if number % world_size == rank:
                part.write_missing(number, window, compute)
            bar.update(len(window))

    _wait_for_parts(rank, world_size)
    if rank == 0:
        _join_parts(parts, output, window_size, num_rows)
    return num_rows


def _part_paths(output: Path, world_size: int) -> list[Path]:
    if world_size == 1:
        return [output.with_name(f"{output.name}.partial")]
    return [output.with_name(f"{output.name}.partial-{rank}-of-{world_size}") for rank in range(world_size)]


def _refuse_other_parts(output: Path, parts: list[Path]) -> None:
    for path in output.parent.glob(f"{output.name}.partial*"):
        if path not in parts:
            raise UserError(f"{path}: left by a run with another number of processes; continue with that, or remove it")


@dataclass
class _Part:
    """The rows of one process, which may hold some already."""

    file: BinaryIO
    num_done: int  # rows that an interrupted run has left and that this run has not come past yet

    def write_missing(self, number: int, window: list, compute: Callable[[int, list], Iterable[dict]]) -> None:
        """Write the rows of a window that are not there yet. A window that is complete is not computed again."""
        if self.num_done >= len(window):
            self.num_done -= len(window)
            return

        for row in islice(compute(number, window), self.num_done, None):
            text = json.dumps(row, ensure_ascii=False, default=str)
            self.file.write(text.encode() + b"\n")
        self.file.flush()
        self.num_done = 0


@contextmanager
def _open_part(path: Path, settings: dict) -> Iterator[_Part]:
    """Open a part for writing after its complete rows.

    Raises UserError if another run is writing there, or if the rows were made with other settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing there") from None

        file.seek(0)
        header = file.readline()
        num_done = 0
        size = len(header)
        for line in takewhile(lambda line: line.endswith(b"}\n"), file):
            num_done += 1
            size += len(line)

        if num_done:
            _check_settings(path, json.loads(header), settings)
            file.truncate(size)
        else:
            file.truncate(0)
            file.write(json.dumps(settings).encode() + b"\n")
            file.flush()
        yield _Part(file, num_done)


def _check_settings(path: Path, saved: dict, current: dict) -> None:
    changes = []
    for name in sorted(saved.keys() | current.keys()):
        before = saved.get(name)
        now = current.get(name)
        if before == now:
            continue
        if name in (INPUT_CONTENTS, MODEL_FILES):  # too long to be shown
            changes.append(name)
        else:
            changes.append(f"{name} {before!r} → {now!r}")

    if changes:
        raise UserError(f"{path}: was started with other settings ({', '.join(changes)}); give the same, or remove it")


def _wait_for_parts(rank: int, world_size: int) -> None:
    """Rank 0 waits until every part is complete. If another process fails, torchrun ends this one."""
    if world_size == 1:
        return
    store = next(rendezvous("env://"))[0]
    store.set(f"part {rank}", "complete")
    if rank == 0:
        store.wait([f"part {other}" for other in range(world_size)], timedelta(days=365))


def _join_parts(parts: list[Path], output: Path, window_size: int, num_rows: int) -> None:
    """Write the parts' windows in order to `output`, if there are any rows, and remove the parts."""
    with ExitStack() as stack:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        headers = {file.readline() for file in files}
        if len(headers) > 1:
            raise UserError(f"{parts[0]}: the other processes' parts were started with other settings; remove them")
        if num_rows:
            temporary = stack.enter_context(replacing(output))
            joined = stack.enter_context(open(temporary, "wb"))
            for number, start in enumerate(range(0, num_rows, window_size)):
                window_length = min(window_size, num_rows - start)
                joined.writelines(islice(files[number % len(files)], window_length))

    for part in parts:
        part.unlink()


def summary(source: str, kept: int, counts: Counts) -> str:
    """One line that says what became of the rows and columns. Raises UserError if no row could be used."""
    line = describe(report_of(counts, kept))
    if not kept:
        raise UserError(f"{source}: no usable row; {line}")
    return line
