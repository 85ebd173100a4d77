"""Rows of other shapes → rows of a known form.

renamed()         other names of columns
prefixes()        the first tokens of texts as prompts
tldr_rows()       rows of Stiennon et al. (arXiv 2009.01325): comparisons of summaries, or posts
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from scripts.lab.row_files import CHUNK_SIZE
from shared import UserError
from shared.encode import Encoder
from shared.rows import Example, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHER_PREFIX = "prefixes that alone have other tokens"
Located = Iterable[tuple[str, dict]]

# The prompts of the authors' code.
POST_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE_PROMPT = "Article:\n{article}\n\nTL;DR:"
COMPARISON = ("info", "summaries", "choice")
FIELDS_OF_POST = ("subreddit", "title", "post")


# ---------------------------------------------------------------- columns


def renamed(rows: Located, names: dict[str, str]) -> Iterator[tuple[str, dict]]:
    """Rows whose columns have new names; names: old → new. A row that lacks a column is left without it.

    Raises UserError if a new name is that of another column, or if no row has one of the old names.
    """
    missing = set(names)
    for location, row in rows:
        missing -= row.keys()
        new_row = {}
        for name, value in row.items():
            new_name = names.get(name, name)
            if new_name in new_row:
                raise UserError(f"{location}: two columns would be named {new_name!r}; rename the other one too")
            new_row[new_name] = value
        yield location, new_row
    if missing:
        raise UserError(f"--columns: no row has a column {' or '.join(sorted(missing))}")


# ---------------------------------------------------------------- prefixes


def prefixes(examples: Iterable[Example], encoder: Encoder, lengths: tuple[int, int], seed: int) -> Iterator[dict]:
    """Texts as rows of `prompt`, their first tokens, and `completion`, the rest; all other columns are kept.

    lengths: the fewest and the most tokens of a prompt, special tokens aside. Each number is equally likely. It depends
    on the seed and on the row's number in the source alone. A text without a token after its prefix is dropped and
    counted in the encoder's counts.
    """
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK_SIZE)):
        texts = [_running_text(example) for example in chunk]
        tokenised = _first_tokens(encoder.tokenizer, texts, lengths[1] + 1)
        rows = []
        prompts = []  # as token ids
        for example, text, (ids, ends) in zip(chunk, texts, tokenised, strict=True):
            length = random.Random(f"{seed} {example.number}").randint(*lengths)
            if len(ids) <= length:
                encoder.counts.dropped["too few tokens"] += 1
                continue
            rows.append(_split_text(example.row, text, ends[length - 1]))
            prompts.append(ids[:length])
        _count_other_prefixes(encoder, rows, prompts)
        yield from rows


def _running_text(example: Example) -> str:
    if example.prompt is not None:
        raise UserError(f"{example.location}: prefixes are of running text; name its column `text` with rename")
    text = example.texts[0]
    assert isinstance(text, str)
    return text


def _first_tokens(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], limit: int
) -> Iterator[tuple[list[int], list[int]]]:
    """The first `limit` token ids of each text, and for each token the place in the text where it ends."""
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer: {type(tokenizer).__name__} does not say where its tokens end; use a fast one")
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield ids[:limit], [end for _, end in offsets[:limit]]


def _split_text(row: dict, text: str, end: int) -> dict:
    new_row = {"prompt": text[:end], "completion": text[end:]}
    for name, value in row.items():
        if name in new_row:
            name = f"original_{name}"
        if name != "text":
            new_row[name] = value
    return new_row


def _count_other_prefixes(encoder: Encoder, rows: list[dict], prompts: list[list[int]]) -> None:
    """Count prompts that, encoded alone, are not the tokens that the text begins with."""
    protected = [encoder.control_strings.protect(row["prompt"]) for row in rows]
    encoded = encoder.encode_texts(protected, [False for _ in protected])
    differ = [alone != ids for alone, ids in zip(encoded, prompts, strict=True)]
    encoder.counts.noted[OTHER_PREFIX] += sum(differ)


# ---------------------------------------------------------------- TL;DR


def tldr_rows(rows: Located) -> Iterator[tuple[str, dict]]:
    """Rows of `summarize_from_feedback` and of its posts as rows of a known form; the columns of the first row decide.

    `info`, `summaries`, `choice` become `prompt`, `chosen`, `rejected`; `subreddit`, `title`, `post`, `summary` become
    `prompt`, `completion`. What the prompt does not say is kept: other columns, and the other fields of `info` and of
    each summary as `info`, `chosen_info` and `rejected_info`. Raises UserError for other columns and wrong types.
    """
    convert = None
    for location, row in rows:
        if convert is None:
            convert = _converter(row, location)
        try:
            yield location, convert(row)
        except ValueError as error:
            raise UserError(f"{location}: {error}") from None


def _converter(row: dict, location: str) -> Callable[[dict], dict]:
    if all(name in row for name in COMPARISON):
        return _comparison
    if all(name in row for name in (*FIELDS_OF_POST, "summary")):
        return _post
    known = f"{' + '.join(COMPARISON)}; {' + '.join(FIELDS_OF_POST)} + summary"
    raise UserError(f"{location}: unknown columns {', '.join(row)}. Known forms: {known}")


def _comparison(row: dict) -> dict:
    info = row["info"]
    summaries = row["summaries"]
    choice = row["choice"]
    if not isinstance(info, dict):
        raise ValueError("field 'info' must be an object")
    is_pair = isinstance(summaries, list) and [type(summary) for summary in summaries] == [dict, dict]
    if not is_pair:
        raise ValueError("field 'summaries' must be a list of two objects")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise ValueError(f"field 'choice' is {choice!r}, must be 0 or 1")

    chosen = summaries[choice]
    rejected = summaries[1 - choice]
    prompt, used = _prompt_of_info(info)
    new_row: dict = {"prompt": prompt, "chosen": _summary(chosen, "text"), "rejected": _summary(rejected, "text")}
    new_row["info"] = _others(info, used)
    new_row["chosen_info"] = _others(chosen, ("text",))
    new_row["rejected_info"] = _others(rejected, ("text",))
    return _without_empty(new_row) | _others(row, COMPARISON)


def _post(row: dict) -> dict:
    prompt, used = _prompt_of_info(row)
    new_row = {"prompt": prompt, "completion": _summary(row, "summary")}
    return new_row | _others(row, (*used, "summary"))


def _prompt_of_info(info: dict) -> tuple[str, tuple[str, ...]]:
    """The prompt of a post or of a news article, and the fields that it is made of."""
    template = POST_PROMPT
    used: tuple[str, ...] = FIELDS_OF_POST
    if info.get("post") is None and info.get("article") is not None:
        template = ARTICLE_PROMPT
        used = ("article",)
    for name in used:
        if not isinstance(info.get(name), str):
            raise ValueError(f"field {name!r} must be text, not {type(info.get(name)).__name__}")
    return template.format(**{name: info[name] for name in used}), used


def _summary(fields: dict, name: str) -> str:
    """A summary, one blank after the "TL;DR:" of the prompt."""
    if not isinstance(fields.get(name), str):
        raise ValueError(f"field {name!r} of a summary must be text, not {type(fields.get(name)).__name__}")
    return f" {fields[name].strip()}"


def _others(fields: dict, used: tuple[str, ...]) -> dict:
    return {name: value for name, value in fields.items() if name not in used}


def _without_empty(row: dict) -> dict:
    return {name: value for name, value in row.items() if not is_empty(value)}
