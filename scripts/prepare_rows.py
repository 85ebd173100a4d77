"""Rows of any form → the rows that training, sampling or scoring needs. Each sub-command does one thing.

    rename        other names of columns
    mix           several sources as one, by weights or by counts
    split         train and held-out rows, by a hash of the prompt
    single-turn   rows whose prompt has one turn of the human
    prefixes      the first tokens of texts as prompts
    pairs         pairs of scored completions: all of them, or the best against the worst
    relabel       chosen and rejected by scores, or by a sample of the Bradley-Terry model
    length-bias   pairs of which a given share prefers the longer completion: D_ρ and D_ρ,b of arXiv 2405.19316
    best-of       the best of N completions
    tldr          the comparisons and posts of Stiennon et al. (summarize_from_feedback)

Columns that a sub-command does not read are kept. One line of counts says what became of the rows. A row takes a byte
of memory at most, and a run that was killed continues from OUTPUT.partial with the same rows. An output that exists is
refused. A random choice depends on the seed and on the rows alone.

    python scripts/prepare_rows.py rename --rows mine.jsonl --output pairs.jsonl \\
        --columns question=prompt good=chosen bad=rejected
    python scripts/prepare_rows.py split --rows pairs.jsonl --output train.jsonl --held-out-output held_out.jsonl
    python scripts/prepare_rows.py pairs --rows scored.jsonl --output pairs.jsonl --margin 0.5
    python scripts/prepare_rows.py length-bias --rows relabelled.jsonl --output D_0.3.jsonl --model runs/sft \\
        --share 0.3 --total 30000
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from scripts.lab.choosing import best_of, pairs_of, relabelled
from scripts.lab.commands import checked_command
from scripts.lab.preparing import Made, Make, changed, write_prepared
from scripts.lab.reshaping import prefixes, renamed, tldr_rows
from scripts.lab.row_files import read_examples, settings_of
from scripts.lab.selecting import (
    LengthPreferences,
    Supply,
    by_length,
    human_turns,
    length_biased,
    mixture,
    mixture_counts,
    side_of,
    supply_of,
)
from shared import UserError
from shared.command import Above, AtLeast, NonNegativeFloat, PositiveInt, Seed
from shared.encode import Encoder
from shared.loading import load_tokenizer
from shared.rows import PROMPT_FORMS, Counts, Dropped, Example, parse_located, parse_rows
from shared.sources import read_rows

EncoderFor = Callable[..., Encoder]  # Counts → an encoder that adds to them


@dataclass(kw_only=True)
class OneSource:
    """Rows of one source, written to one file."""

    rows: str
    """file, directory or hub id (`path:split`) of the rows"""
    output: Path
    """jsonl file to write; it must not exist"""


@dataclass(kw_only=True)
class Rename(OneSource):
    """Give columns other names. All others stay, and the rows must then have a known form."""

    columns: tuple[str, ...]
    """names to change, each OLD=NEW"""


@dataclass(kw_only=True)
class Mix:
    """Mix sources. Rows are chosen without replacement and interleaved at random; without weights or counts, all are.

    Rows of one form stay as they are. Of different forms, pairs become `prompt`, `chosen`, `rejected`, and
    demonstrations become `prompt`, `completion`.
    """

    rows: tuple[str, ...]
    """files, directories or hub ids (`path:split`) of the rows"""
    output: Path
    """jsonl file to write; it must not exist"""
    weights: tuple[float, ...] = ()
    """share of each source in the mixture, up to a common factor"""
    counts: tuple[int, ...] = ()
    """number of rows of each source, instead of weights"""
    total: PositiveInt | None = None
    """number of rows for the weights; default: the most that need no row twice"""
    seed: Seed = 0
    """seed of the choice and of the order"""


@dataclass(kw_only=True)
class Split(OneSource):
    """Split rows into train and held-out by a hash of the prompt. Rows of one prompt are on one side, in every file."""

    held_out_output: Path
    """jsonl file to write the held-out rows to; it must not exist"""
    held_out_share: Annotated[float, Above(0, at_most=1)] = 0.05
    """share of the prompts that are held out"""
    seed: Seed = 0
    """seed of the hash; another one gives another split"""


@dataclass(kw_only=True)
class SingleTurn(OneSource):
    """Keep rows whose prompt has one turn of the human, as the DPO paper does with the test rows of HH."""


@dataclass(kw_only=True)
class Prefixes(OneSource):
    """Make prompts of the first tokens of texts: `text` becomes `prompt` and `completion`, its rest.

    The number of tokens is uniform between the two limits. Shorter texts are dropped.
    """

    model: str
    """directory or hub id of the model whose tokens are meant"""
    min_tokens: PositiveInt = 2
    """fewest tokens of a prompt, special tokens aside"""
    max_tokens: PositiveInt = 8
    """most tokens of a prompt"""
    seed: Seed = 0
    """seed of the numbers of tokens"""


@dataclass(kw_only=True)
class Pairs(OneSource):
    """Make pairs of K scored completions, the better one first. Of several scores the mean counts.

    Rows of `completions` stay such rows, with two each, so that drawn ids are kept. Equal scores are never a pair.
    """

    select: Literal["all", "best-worst"] = "all"
    """all K (K - 1) / 2 pairs, or one: the best against the worst"""
    margin: NonNegativeFloat = 0.0
    """least difference of the two scores"""


@dataclass(kw_only=True)
class Relabel(OneSource):
    """Order the completions of every row by their scores, or by a sample of the Bradley-Terry model of them.

    `chosen` and `rejected` may change places, with the columns named after them. Equal scores are dropped, unless they
    are sampled. A sampled order of `completions` has its scores in `label_scores`, because training would order them by
    `scores`.
    """

    by: Literal["scores", "bradley-terry"] = "scores"
    """highest score first, or P(first before second) = sigmoid(difference of the scores)"""
    seed: Seed = 0
    """seed of the samples"""


@dataclass(kw_only=True)
class LengthBias(OneSource):
    """Choose pairs such that the longer completion is preferred in a given share of them (arXiv 2405.19316, 4.1).

    From relabelled pairs this makes D_ρ, and from D_ρ, with a seed of its own, D_ρ,b. Pairs of which neither completion
    is longer are dropped.
    """

    model: str
    """directory or hub id of the model whose tokens are counted"""
    share: Annotated[float, AtLeast(0, at_most=1)]
    """share of pairs that prefer the longer completion, ρ or b"""
    total: PositiveInt | None = None
    """number of pairs; default: the most that the rows have for this share"""
    more: NonNegativeFloat = 0.1
    """how many more tokens the longer completion has at least, as a share of the shorter one's"""
    seed: Seed = 0
    """seed of the choice"""


@dataclass(kw_only=True)
class BestOf(OneSource):
    """Keep the completion with the highest score; of several scores the mean counts.

    Rows of `completions` stay such rows, with one each, so that drawn ids are kept.
    """

    first: PositiveInt | None = None
    """choose among the first N completions; default: among all"""


@dataclass(kw_only=True)
class Tldr(OneSource):
    """Read `info`, `summaries`, `choice` as pairs, or `subreddit`, `title`, `post`, `summary` as demonstrations.

    The prompt is that of the authors: SUBREDDIT, TITLE, POST, and "TL;DR:"; for news articles the article.
    """


Args = Rename | Mix | Split | SingleTurn | Prefixes | Pairs | Relabel | LengthBias | BestOf | Tldr


def main(args: Args) -> None:
    """Read the rows, prepare them, write rows."""
    check_combinations(args)
    settings = {"command": type(args).__name__, **settings_of(args)}
    encoder_for = None
    if isinstance(args, Prefixes | LengthBias):
        tokenizer, _ = load_tokenizer(args.model)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"--model {args.model}: the tokenizer has no EOS token; set one so that completions can end"
            )
        encoder_for = partial(Encoder, tokenizer, today=date.fromisoformat(settings["date"]))
        settings["vocabulary"] = encoder_for().vocabulary

    outputs = [args.output]
    if isinstance(args, Split):
        outputs.append(args.held_out_output)
    source = str(args.rows)
    if isinstance(args, Mix):
        source = " + ".join(args.rows)
    make = make_of(args, encoder_for)
    print(write_prepared(source, outputs, settings, make))


def check_combinations(args: Args) -> None:
    """Raise UserError for arguments that do not go together."""
    if isinstance(args, Split) and args.output.resolve() == args.held_out_output.resolve():
        raise UserError("--output and --held-out-output are the same file")
    if isinstance(args, Prefixes) and args.min_tokens > args.max_tokens:
        raise UserError(f"--min-tokens {args.min_tokens} is more than --max-tokens {args.max_tokens}")
    if isinstance(args, Rename):
        new_names(args.columns)
    if isinstance(args, Mix):
        check_mixture(args)


def check_mixture(args: Mix) -> None:
    """Raise UserError unless there is one positive weight, or one count, for each source."""
    if args.weights and args.counts:
        raise UserError("give either --weights or --counts")
    if args.total and not args.weights:
        raise UserError("--total goes with --weights")
    for name, numbers in (("--weights", args.weights), ("--counts", args.counts)):
        if numbers and len(numbers) != len(args.rows):
            raise UserError(f"{name}: {len(numbers)} numbers for {len(args.rows)} sources")
        if not all(0 < number < math.inf for number in numbers):
            raise UserError(f"{name}: must be finite numbers above 0")


def make_of(args: Args, encoder_for: EncoderFor | None) -> Make:
    """What reads the rows of a sub-command and gives what it writes."""
    if isinstance(args, Mix):
        return make_mixture(args)
    if isinstance(args, Split):
        return partial(split, args)
    if encoder_for is None:
        return partial(change_each, args)
    if isinstance(args, Prefixes):
        return partial(make_prefixes, args, encoder_for)
    assert isinstance(args, LengthBias)
    return make_length_bias(args, encoder_for)


# ---------------------------------------------------------------- one row after the other


def change_each(args: Any, counts: Counts) -> Made:
    """The rows of the sub-commands that read one row and write what becomes of it."""
    if isinstance(args, Rename):
        rows = renamed(read_rows(args.rows), new_names(args.columns))
        examples = parse_located(args.rows, rows, counts, PROMPT_FORMS)
    elif isinstance(args, Tldr):
        examples = parse_located(args.rows, tldr_rows(read_rows(args.rows)), counts)
    else:
        examples = parse_rows(args.rows, counts, PROMPT_FORMS)
    return changed(examples, partial(change, args), args.output, counts)


def change(args: Any, example: Example, counts: Counts) -> list[dict]:
    """The rows that one row becomes. Raises Dropped."""
    if isinstance(args, SingleTurn):
        check_single_turn(example)
    elif isinstance(args, Pairs):
        return pairs_of(example, counts, args.select == "best-worst", args.margin)
    elif isinstance(args, Relabel):
        return [relabelled(example, counts, args.seed if args.by == "bradley-terry" else None)]
    elif isinstance(args, BestOf):
        return [best_of(example, args.first)]
    return [example.row]


def new_names(columns: tuple[str, ...]) -> dict[str, str]:
    """Old name → new name. Raises UserError for a text that is not OLD=NEW, and for a name that is given twice."""
    names: dict[str, str] = {}
    for text in columns:
        old, sign, new = text.partition("=")
        if not (old and sign and new):
            raise UserError(f"--columns {text}: must be OLD=NEW")
        if old in names:
            raise UserError(f"--columns {text}: {old} gets two names")
        names[old] = new
    return names


def check_single_turn(example: Example) -> None:
    """Raise Dropped unless the prompt has one turn of the human."""
    turns = human_turns(example)
    if turns == 0:
        raise Dropped("no turn of the human")
    if turns > 1:
        raise Dropped("several turns of the human")


# ---------------------------------------------------------------- the others


def split(args: Split, counts: Counts) -> Made:
    """Every row with the output of its side."""
    for example in parse_rows(args.rows, counts, PROMPT_FORMS):
        output = args.output
        if side_of(example, args.seed) < args.held_out_share:
            output = args.held_out_output
        yield output, [example.row]


def make_mixture(args: Mix) -> Make:
    """A mixture of the sources, each of which is read once to count its rows."""

    @cache
    def plan() -> tuple[list[Supply], list[int]]:
        supplies = [supply_of(source) for source in args.rows]
        if args.weights:
            return supplies, mixture_counts(supplies, list(args.weights), args.total)
        return supplies, list(args.counts or [supply.number for supply in supplies])

    def make(counts: Counts) -> Made:
        supplies, numbers = plan()
        for row in mixture(supplies, numbers, args.seed, counts):
            yield args.output, [row]

    return make


def make_prefixes(args: Prefixes, encoder_for: EncoderFor, counts: Counts) -> Made:
    """Texts as prompts and their rest."""
    examples = parse_rows(args.rows, counts)
    lengths = (args.min_tokens, args.max_tokens)
    for row in prefixes(examples, encoder_for(counts), lengths, args.seed):
        yield args.output, [row]


def make_length_bias(args: LengthBias, encoder_for: EncoderFor) -> Make:
    """A subset of the pairs, which are encoded once to count those that prefer the longer completion."""

    @cache
    def plan() -> tuple[LengthPreferences, Counts]:
        counts = Counts()
        examples = read_examples(args.rows, Counts())
        return LengthPreferences(by_length(examples, encoder_for(counts), args.more)), counts

    def make(counts: Counts) -> Made:
        preferences, counts_of_pairs = plan()
        counts.dropped.update(counts_of_pairs.dropped)
        counts.noted.update(counts_of_pairs.noted)
        counts.unused.update(counts_of_pairs.unused)
        available = preferences.counts()
        wanted = available.subset(args.share, args.total)
        # Before the choice: the neutral share, from which a bias of known size follows.
        counts.noted["longer preferred before the choice"] = available.longer
        counts.noted["shorter preferred before the choice"] = available.shorter
        pairs = preferences.of(read_examples(args.rows, counts))
        for example in length_biased(pairs, available, wanted, args.seed, counts):
            yield args.output, [example.row]

    return make


if __name__ == "__main__":
    checked_command(main, Args)
