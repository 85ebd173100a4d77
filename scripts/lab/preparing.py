"""Rows in, other rows out: what the commands that prepare rows share.

write_prepared()   several outputs of one pass, checked before the first row is written
rewritten()        a row with other columns in place of those of its form
of_completions()   a row of completions with some of them, in another order, and all that belongs to them
swapped()          a pair with chosen and rejected exchanged

A command gives `make`, which yields, for each row that it uses, the output and the rows that go there. It is called
twice, first to count and to meet every malformed row, then to write. So it must yield the same rows again.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from scripts.lab.row_files import refuse_existing, reserve, summary, write_windows
from shared import UserError
from shared.rows import DEMONSTRATIONS, Counts, Dropped, Example, Form, UserTurn

WINDOW_SIZE = 256  # rows that are written together
# Columns of a row of completions that hold something for each of them.
OF_COMPLETIONS = ("completions", "scores", "finished", "logps", "completion_ids")

Made = Iterator[tuple[Path, list[dict]]]
Make = Callable[[Counts], Made]
Change = Callable[[Example, Counts], list[dict]]


# ---------------------------------------------------------------- out


def write_prepared(source: str, outputs: list[Path], settings: dict, make: Make) -> str:
    """Write what `make` yields to its outputs; returns one line of counts.

    make: called with Counts, to which it adds what becomes of the rows. A run that was killed goes on. Raises UserError
    if an output exists that is not this run's own, or if one would have no rows.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("rows are prepared by one process; start this without torchrun")
    refuse_existing(outputs, settings)
    counts = Counts()
    kept = 0
    numbers: Counter[Path] = Counter()
    for output, rows in make(counts):
        kept += 1
        numbers[output] += len(rows)

    line = summary(source, kept, counts)
    for output in outputs:
        if not numbers[output]:
            raise UserError(f"{output}: no row would be left for it; {line}")
        line += f"; {numbers[output]} rows in {output}"

    # From here on there is always a part that says whose the outputs are.
    for output in outputs:
        reserve(output, settings)
    for output in outputs:
        rows_of_output = _rows_for(output, make(Counts()))
        write_windows(output, settings, rows_of_output, WINDOW_SIZE, _as_they_are, numbers[output])
    return line


def _rows_for(output: Path, made: Made) -> Iterator[dict]:
    for path, rows in made:
        if path == output:
            yield from rows


def _as_they_are(number: int, window: list[dict]) -> list[dict]:
    return window


def changed(examples: Iterable[Example], change: Change, output: Path, counts: Counts) -> Made:
    """What `change` makes of each example. If it raises Dropped, the reason is counted."""
    for example in examples:
        try:
            rows = change(example, counts)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
            continue
        counts.noted.update(example.notes)
        yield output, rows


# ---------------------------------------------------------------- rows


def rewritten(example: Example, columns: dict) -> dict:
    """New columns instead of those that the example's prompt and completions were made of.

    All other columns of the row are kept. A column that has the name of a new one is kept as `original_NAME`.
    """
    replaced = {*example.form, "system", "history"}
    row = dict(columns)
    for name, value in example.row.items():
        if name in replaced:
            continue
        if name in columns:
            name = f"original_{name}"
        row[name] = value
    return row


def prompt_of(example: Example) -> str | list[dict]:
    """The prompt as the column `prompt` holds it; an instruction becomes a message of the user.

    Raises UserError for running text, which has no prompt.
    """
    if example.prompt is None:
        raise UserError(f"{example.location}: running text has no prompt")
    if isinstance(example.prompt, UserTurn):
        return example.prompt.messages()
    return example.prompt


def as_pair(example: Example) -> dict:
    """The row as `prompt`, `chosen`, `rejected`."""
    chosen, rejected = example.texts
    return rewritten(example, {"prompt": prompt_of(example), "chosen": chosen, "rejected": rejected})


def as_demonstration(example: Example) -> dict:
    """The row as `prompt`, `completion`."""
    (completion,) = example.texts
    return rewritten(example, {"prompt": prompt_of(example), "completion": completion})


def is_demonstration(form: Form) -> bool:
    """Whether rows of a form have one completion, without another to compare it with."""
    return form in DEMONSTRATIONS or form == ("instruction", "output")


def of_completions(row: dict, order: list[int]) -> dict:
    """A row of completions with those of these indices, in their order, each with its score, its end and its ids."""
    changed_row = dict(row)
    for name in OF_COMPLETIONS:
        values = row.get(name)
        if isinstance(values, list) and len(values) == len(row["completions"]):
            changed_row[name] = [values[i] for i in order]
    return changed_row


def swapped(example: Example) -> dict:
    """The row of a pair with chosen and rejected exchanged, in its own form.

    So are all columns whose names differ in these two words alone, such as `score_chosen` and `score_rejected`.
    """
    row = example.row
    exchanged = dict(row)
    for name in row:
        partner = _partner(name)
        if partner in row:
            exchanged[name] = row[partner]
    if "labels" in example.form:
        exchanged["labels"] = 1 - row["labels"]
    if isinstance(row.get("scores"), list):
        exchanged["scores"] = row["scores"][::-1]
    return exchanged


def _partner(name: str) -> str:
    """The name with "rejected" for "chosen", or the other way round."""
    if "chosen" in name:
        return name.replace("chosen", "rejected")
    return name.replace("rejected", "chosen")


def reordered(example: Example, order: list[int]) -> dict:
    """The example's row with its completions in another order. Of a row of completions, some may be left out."""
    if "completions" in example.form:
        return of_completions(example.row, order)
    if order == [0, 1]:
        return example.row
    return swapped(example)


# ---------------------------------------------------------------- scores


def rewards_of(example: Example) -> list[float]:
    """The score of each completion, the mean over reward models. Raises UserError if there is none."""
    if not example.scores:
        raise UserError(f"{example.location}: no scores; add them with scripts/score.py")
    return [math.fsum(scores) / len(scores) for scores in example.scores]


def is_drawn(example: Example) -> bool:
    """Whether a policy drew the completions, so that their order says nothing."""
    return any(completion.is_drawn for completion in example.completions)
