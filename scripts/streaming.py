"""What sample.py and score.py share: rows in, something computed for each of them, rows out.

read()     a source → Examples, each with its own row as it stands in the file
encode()   the same with token ids, as training encodes them
write()    windows of rows → OUTPUT, in order, continued where a killed run stopped, dealt out under torchrun
alone()    this process as a process group of its own: ranks share out windows, not models

Memory does not grow with the file. While a program runs, its complete rows stand in OUTPUT.partial (under torchrun
OUTPUT.partial-RANK-of-WORLD), behind one line with the settings that they were made with.
"""

import dataclasses
import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, islice, takewhile
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from shared import UserError
from shared.data import Batches, Encoder, Groups, describe, source_hash
from shared.distributed import Place, inference
from shared.rows import PROMPT_FORMS, Dropped, Example, parse
from shared.run import check_fit

CHUNK = 256  # rows that are tokenised together


@dataclass
class Row:
    """A row that can be used."""

    example: Example
    own: dict  # as it stands in the file
    prompt: list[int]
    completions: list[list[int]] = field(default_factory=list)  # each with its EOS, unless it was cut off


# ---------------------------------------------------------------- in


def read(source: str, dropped: Counter, max_rows: int | None = None) -> Iterator[tuple[Example, dict]]:
    """Examples, each with the row that it was made of; those without a prompt end the run."""
    for example in islice(parse(source, dropped, PROMPT_FORMS), max_rows):
        if example.prompt is None:
            raise UserError(f"{example.where}: running text has no prompt")
        yield example, example.row


def first(source: str, n: int) -> list[Example]:
    """The first n examples; where rows are dropped, prints how many. Raises UserError where none is left."""
    dropped = Counter()
    found = [example for example, _ in read(source, dropped, n)]
    counts = summary(source, len(found), dropped)
    if dropped:
        print(f"{source}: {counts}", file=sys.stderr)
    return found


def check(source: str, max_rows: int | None = None) -> int:
    """The number of rows; a malformed one should end the run before anything has been computed."""
    return sum(1 for _ in read(source, Counter(), max_rows))


def encode(
    examples: Iterable[tuple[Example, dict]], tokenizer, dropped: Counter, room: int, completions: bool = False
) -> Iterator[Row]:
    """Rows with the ids that training would give them, at most `room` for a prompt and each of its completions.

    A prompt that leaves none for a completion is dropped; a completion keeps what fits, and one without any tokens is
    its EOS.
    """
    encoder, examples = Encoder(tokenizer), iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        kept = []
        for example, own in chunk:
            try:
                n = len(example.completions) if completions else 0
                texts = encoder.render(example.prompt, example.completions[:n], example.ended[:n])
                kept.append((example, own, *texts))
            except Dropped as reason:
                dropped[str(reason)] += 1
        prompts = encoder.encode([(text, not encoder.is_chat(example.prompt)) for example, _, text, _ in kept])
        ids = iter(encoder.encode([(text, False) for *_, texts in kept for text in texts]))
        for (example, own, _, texts), prompt in zip(kept, prompts, strict=True):
            found = [next(ids) for _ in texts]
            prompt = prompt or [encoder.bos] * (encoder.bos is not None)
            if not prompt or len(prompt) >= room:
                dropped["prompt too long" if prompt else "empty prompt"] += 1
                continue
            ends = zip(found, example.ended[: len(found)], strict=True)
            yield Row(
                example, own, prompt, [(y + [encoder.eos] * (end or not y))[: room - len(prompt)] for y, end in ends]
            )


def make_groups(rows: list[Row]) -> Groups:
    """Rows of equally many completions as Groups of the ids themselves."""
    pieces = [[row.prompt, *row.completions] for row in rows]
    lengths = torch.tensor([[len(piece) for piece in row] for row in pieces])  # (n, 1 + K)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.flatten().cumsum(0)])
    offsets = torch.cat([starts[:-1].view_as(lengths), starts[lengths.shape[1] :: lengths.shape[1], None]], 1)
    tokens = torch.tensor([token for row in pieces for piece in row for token in piece], dtype=torch.int32)
    return Groups(tokens, offsets, torch.arange(1, len(pieces) + 1), {})


def over_groups(model, compute: Callable, groups: Groups, budget: int, place: Place) -> Tensor:
    """(n, K), what `compute`, the model or a method of it, gives each completion of a batch (B, K)."""
    check_fit(groups, model.lm.config, "rows")
    batches = Batches(groups, 256, budget, None, place)
    values = torch.zeros(len(groups), groups.completions, device=place.device)
    with inference(model):
        for batch in batches:
            values[batch.rows] = compute(batch)
    return values.cpu().double()


def token_logps(policy, groups: Groups, budget: int, place: Place) -> list[list[Tensor]]:
    """log π of each token of each completion: n groups of K tensors (T,), float64."""
    check_fit(groups, policy.lm.config, "rows")
    logps = torch.zeros(groups.tokens.shape, device=place.device)
    with inference(policy):
        for batch in Batches(groups, 256, budget, None, place):
            logps[batch.where] = policy(batch)
    logps = logps.cpu().double()
    return [[logps[a:b] for a, b in zip(ends, ends[1:], strict=False)] for ends in groups.offsets[:, 1:].tolist()]


@contextmanager
def alone(dtype: str) -> Iterator[Place]:
    """A process group of this process only, on its own device, also under torchrun."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield Place(0, 1, device, getattr(torch, dtype))
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- out


def settings(args, *models: str) -> dict:
    """Everything that the rows of the output depend on: arguments, input, and the models' files."""
    plain = {name: value for name, value in dataclasses.asdict(args).items() if name != "output"}
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for model in models
        for path in sorted(Path(model).glob("*.safetensors"))
    ]
    found = {**plain, "contents of --rows": source_hash(args.rows), "model files": files}
    return json.loads(json.dumps(found))


def write(
    output: Path,
    made_with: dict,
    rows: Iterable,
    size: int,
    compute: Callable[[int, list], Iterable[dict]],
    total: int | None = None,
) -> int:
    """Windows of `size` rows → `compute(number, window)`, one JSON object per row → OUTPUT; returns how many.

    Windows are dealt out to the processes; the first one joins their parts. `compute` must give the same for the
    same window again: of an interrupted one, only the missing rows are written.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ending = [".partial"] if world == 1 else [f".partial-{i}-of-{world}" for i in range(world)]
    parts = [output.with_name(output.name + end) for end in ending]
    for other in set(output.parent.glob(f"{output.name}.partial*")) - set(parts):
        raise UserError(f"{other}: left by a run with another number of processes; continue with that, or remove it")
    rows, kept = iter(rows), 0
    with _part(parts[rank], made_with) as (file, done), tqdm(total=total, unit="row", disable=rank > 0) as bar:
        for number in count():
            if not (window := list(islice(rows, size))):
                break
            kept += len(window)
            if number % world == rank:
                missing = islice(compute(number, window), done, None) if done < len(window) else ()
                file.writelines(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n" for row in missing)
                file.flush()
                done = max(0, done - len(window))
            bar.update(len(window))
    _wait(rank, world)
    if rank == 0:
        _join(parts, output, size, kept)
    return kept


def _wait(rank: int, world: int) -> None:
    """Until all processes have come here; torchrun ends this one if another one fails."""
    if world > 1:
        store = next(rendezvous("env://"))[0]
        store.set(f"part {rank}", "complete")
        store.wait([f"part {i}" for i in range(world if rank == 0 else 0)], timedelta(days=365))


@contextmanager
def _part(path: Path, made_with: dict) -> Iterator[tuple[BinaryIO, int]]:
    """A part, opened behind its complete rows, and their number. Raises UserError where it was made with others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing there") from None
        file.seek(0)
        header = file.readline()
        rows, size = 0, len(header)
        for line in takewhile(lambda line: line.endswith(b"}\n"), file):
            rows, size = rows + 1, size + len(line)
        if rows:
            _compare(path, json.loads(header), made_with)
        file.truncate(size if rows else 0)
        if not rows:
            file.write(json.dumps(made_with).encode() + b"\n")
            file.flush()
        yield file, rows


def _compare(path: Path, before: dict, now: dict) -> None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        long = ("contents of --rows", "model files")
        shown = [n if n in long else f"{n} {before.get(n)!r} → {now.get(n)!r}" for n in changed]
        raise UserError(f"{path}: was started with other settings ({', '.join(shown)}); give the same, or remove it")


def _join(parts: list[Path], output: Path, size: int, kept: int) -> None:
    """The parts' windows in order; the output appears under its name only when it is complete."""
    temporary = output.with_name(output.name + ".tmp")
    with ExitStack() as stack, open(temporary, "wb") as file:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        if len({part.readline() for part in files}) > 1:
            raise UserError(f"{parts[0]}: the other processes' parts were started with other settings; remove them")
        for start in range(0, kept, size):
            file.writelines(islice(files[start // size % len(files)], min(size, kept - start)))
    if kept:
        os.replace(temporary, output)
    for path in [*parts, *([] if kept else [temporary])]:
        path.unlink()


def summary(source: str, kept: int, dropped: Counter) -> str:
    """What became of the rows, in one line. Raises UserError where none could be used."""
    counts = describe({"rows": kept + sum(dropped.values()), "kept": kept, "dropped": dropped})
    if not kept:
        raise UserError(f"{source}: no usable row; {counts}")
    return counts
