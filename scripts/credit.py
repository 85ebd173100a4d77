"""Credit assignment as a number: do token rewards find the wrong words of a summary? From r to Q*, section 5.1.

Rows are notices with a correct summary. Two of its five facts are chosen at random, and other words of the same slots
replace them. With `--errors misreadings` the two facts are those that demonstrations of `notices.py --misread` misread,
and the words are theirs. This gives three summaries: one with the first fact wrong, one with the second, and one with
both. For each token that states a fact, r = log π_θ(token|before) - log π_ref(token|before). This is the token reward
(Eq 11) in nats per β; β changes no order. A policy that was trained without a reference, as by algos/typo.py, gets the
same log-ratio.

    one error       AUROC: P(-r of a wrong fact > -r of a correct one), over all summaries with one error; a tie counts
                    half
    second error    AUROC of the second error after the first, against the correct word there after the same first error
    both found      share of summaries with both errors in which the two lowest r are exactly theirs (by chance 0.1);
                    with the second error this is the paper's "stitching"
    wrong, correct  mean r, in nats per β, in the summaries with one error

A baseline that needs no preferences is listed next to the policies, with log π_ref in the place of r. The 95%
intervals are percentiles of 2,000 bootstrap resamples: prompts are resampled, and the measure is computed anew from all
tokens of the resampled prompts. A figure beside the output shows the values whose AUROC "one error" is. The output has
them all: `values`, r or log π_ref of each fact of each summary, and `is_wrong`.

    python scripts/credit.py --policies dpo=runs/dpo --reference runs/sft --rows runs/world/held_out.jsonl \\
        --output runs/credit.json
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from algos.token_dpo_beam import token_rewards
from scripts.lab import notices, plots
from scripts.lab.commands import checked_command
from scripts.lab.policies import (
    check_tokenizers,
    encode_all,
    evaluation_settings,
    named_policies,
    plain_prompt,
    prompt_example,
)
from scripts.lab.row_files import EncodedRow, first_examples
from scripts.lab.scoring import make_groups, token_logps_of
from scripts.lab.statistics import auroc_and_interval, interval_text, mean_and_interval
from scripts.lab.tables import aligned
from shared import UserError
from shared.command import Above, AtLeast
from shared.distributed import single_process
from shared.encode import Encoder
from shared.files import replacing, write_json
from shared.loading import load_policy_from, load_tokenizer
from shared.rows import Example, Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE = "-log π_ref"
COLUMNS = 3  # panels of the figure side by side
BINS = 40
MICRO_BATCH_TOKENS = 8_192


@dataclass(kw_only=True)
class Args:
    """Credit assignment as a number."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy"""
    reference: str
    """directory or hub id of π_ref, the policy that training started from"""
    rows: str
    """file, directory or hub id (`path:split`) of notices, `prompt`, with a correct summary, `completion`"""
    output: Path
    """json file to write; the figure is written beside it, under the same name in .png"""
    errors: Literal["random", "misreadings"] = "random"
    """wrong words: any others in two random facts, or those of demonstrations that misread"""
    num_prompts: Annotated[int, Above(0)] = 512
    """prompts, the first of the file"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the errors and of the bootstrap"""


# ---------------------------------------------------------------- summaries with errors


@dataclass
class Summaries:
    """Summaries with errors of n notices."""

    prompts: list[Prompt]
    texts: list[list[str]]  # n times 3: the first of two facts is wrong, the second, both
    is_wrong: Tensor  # (n, 3, 5), for each fact in the order of the text


def corrupt(summary: str, errors: dict[str, str]) -> tuple[list[str], list[list[bool]]]:
    """Three texts as in `Summaries`, and which facts of each are wrong, (3, 5).

    errors: the wrong words of two slots.
    """
    facts = notices.read_facts(summary)  # in the order of the text
    first, second = (slot for slot in facts if slot in errors)
    texts = []
    is_wrong = []
    for wrong_slots in ([first], [second], [first, second]):
        text = summary
        for slot in wrong_slots:
            text = re.sub(rf"\b{facts[slot]}\b", errors[slot], text)
        texts.append(text)
        is_wrong.append([slot in wrong_slots for slot in facts])
    return texts, is_wrong


def random_errors(summary: str, rng: random.Random) -> dict[str, str]:
    """Other words for two of the slots."""
    facts = list(notices.read_facts(summary).items())
    errors = {}
    for index in sorted(rng.sample(range(len(facts)), 2)):
        slot, value = facts[index]
        others = [other for other in notices.SLOTS[slot] if other != value]
        errors[slot] = rng.choice(others)
    return errors


def misreadings(summary: str, location: str) -> dict[str, str]:
    """The words of the slots that are misread in this kind of notice. Raises UserError for a summary of no kind."""
    facts = notices.read_facts(summary)
    clauses = set(re.split(r"[,.] *", summary))
    for kind in notices.KINDS:
        if clauses.issuperset(clause.format(**facts) for clause in kind.summary):
            return {slot: notices.next_value(slot, facts[slot]) for slot in kind.misread}
    raise UserError(f"{location}: --errors misreadings needs a summary in the notices' own words, not {summary!r}")


def corrupt_summaries(source: str, num_prompts: int, errors: str, seed: int) -> Summaries:
    """The first rows with errors in their summaries, `random` ones or `misreadings`.

    Raises UserError for a row that is not a notice with a correct summary.
    """
    rng = random.Random(seed)
    prompts = []
    summaries = []
    is_wrong = []
    for example in first_examples(source, num_prompts):
        summary = correct_summary(example)
        if errors == "misreadings":
            wrong_words = misreadings(summary, example.location)
        else:
            wrong_words = random_errors(summary, rng)
        texts, marks = corrupt(summary, wrong_words)
        prompts.append(example.prompt)
        summaries.append(texts)
        is_wrong.append(marks)
    return Summaries(prompts, summaries, torch.tensor(is_wrong))


def correct_summary(example: Example) -> str:
    """The summary of a row. Raises UserError unless the row is a notice with a correct summary."""
    prompt = plain_prompt(example.prompt)
    texts = [text for text in (prompt, *example.texts) if isinstance(text, str)]
    if len(texts) != 2 or len(example.completions) != 1:
        needed = "needs a notice as `prompt` and its summary as `completion`, plain texts"
        raise UserError(f"{example.location}: {needed}")

    notice, summary = texts
    try:
        is_correct = notices.read_facts(notice) == notices.read_facts(summary)
    except ValueError as error:
        raise UserError(f"{example.location}: {error}") from None
    if not is_correct:
        raise UserError(f"{example.location}: a summary to put errors into must be correct: {summary!r}")
    return summary


# ---------------------------------------------------------------- rewards


def encode(path: str, summaries: Summaries) -> tuple[list[EncodedRow], Tensor]:
    """Token ids, and the positions of the five facts in each prompt's completions, (n, 5).

    Raises UserError unless each word of a summary is one token.
    """
    tokenizer, config = load_tokenizer(path)
    room = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    examples = []
    for prompt, texts in zip(summaries.prompts, summaries.texts, strict=True):
        examples.append(prompt_example(prompt, *texts))
    rows = encode_all(path, examples, Encoder(tokenizer), room, completions=True)

    positions = []
    for row, texts in zip(rows, summaries.texts, strict=True):
        for completion, text in zip(row.completions, texts, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(completion.ids)
            expected = [*notices.words(text), tokenizer.eos_token]
            if tokens != expected:
                raise UserError(f"{path}: the tokens of {text!r} are not its words and an EOS, but {tokens}")
        positions.append(fact_positions(texts[0]))
    return rows, torch.tensor(positions)


def fact_positions(summary: str) -> list[int]:
    """Which words of a summary state facts; the same for all summaries of a prompt."""
    positions = []
    for position, word in enumerate(notices.words(summary)):
        if word in notices.SLOT_OF:
            positions.append(position)
    return positions


def fact_logps(paths: list[str], rows: list[EncodedRow], positions: Tensor) -> list[Tensor]:
    """log π of the tokens that state facts, (n, 3, 5) for each policy."""
    groups = make_groups(rows)
    logps = []
    with single_process("float32") as ranks:
        for path in paths:
            policy = load_policy_from(path, ranks)
            token_logps = token_logps_of(policy, groups, MICRO_BATCH_TOKENS, ranks)

            prompt_logps = []
            for completions, prompt_positions in zip(token_logps, positions, strict=True):
                facts = [completion[prompt_positions] for completion in completions]
                prompt_logps.append(torch.stack(facts))
            logps.append(torch.stack(prompt_logps))
    return logps


# ---------------------------------------------------------------- statistics


def measure(rewards: Tensor, is_wrong: Tensor, seed: int) -> dict:
    """The measures of one policy. rewards, is_wrong: (n, 3, 5), for each fact of each summary."""
    first_error_summary = rewards[:, 0]
    both_errors_summary = rewards[:, 2]

    single_error_rewards = rewards[:, :2]
    single_error_wrong = is_wrong[:, :2]
    one_error = auroc_and_interval(-single_error_rewards.flatten(1), single_error_wrong.flatten(1), seed)

    # The same position after the same first error: the word is correct in the first summary and wrong in the third.
    second_error = is_wrong[:, 1]
    correct_word = first_error_summary[second_error]
    wrong_word = both_errors_summary[second_error]
    second_rewards = torch.stack([correct_word, wrong_word], 1)
    second_wrong = torch.tensor([False, True]).expand_as(second_rewards)

    both_wrong = is_wrong[:, 2]
    highest_wrong = both_errors_summary.masked_fill(~both_wrong, -torch.inf).amax(1)
    lowest_correct = both_errors_summary.masked_fill(both_wrong, torch.inf).amin(1)
    both_found = (highest_wrong < lowest_correct).double()

    return {
        "one_error": one_error,
        "second_error": auroc_and_interval(-second_rewards, second_wrong, seed),
        "both_found": mean_and_interval(both_found, seed),
        "wrong": float(single_error_rewards[single_error_wrong].mean()),
        "correct": float(single_error_rewards[~single_error_wrong].mean()),
    }


# ---------------------------------------------------------------- output


def table(measures: dict[str, dict]) -> str:
    """Aligned columns, 95% intervals in brackets."""
    lines = [["", "AUROC, one error", "AUROC, second error", "both found", "wrong (nats)", "correct (nats)"]]
    for name, numbers in measures.items():
        cells = [name]
        for measure in ("one_error", "second_error", "both_found"):
            cells.append(interval_text(numbers[measure], ".3f"))
        for kind in ("wrong", "correct"):
            cells.append(f"{numbers[kind]:+.2f}")
        lines.append(cells)
    return aligned(lines)


def plot(path: Path, rewards: dict[str, Tensor], is_wrong: Tensor, measures: dict[str, dict]) -> None:
    """A panel for each policy and the baseline: the values of correct and wrong facts in summaries with one error."""
    names = list(rewards)
    num_columns = min(COLUMNS, len(names))
    panels: list[int | str] = list(range(len(names)))
    while len(panels) % num_columns != 0:
        panels.append(".")  # stays empty
    mosaic = [panels[start : start + num_columns] for start in range(0, len(panels), num_columns)]
    size = (4.2 * num_columns, 3.2 * len(mosaic))
    figure, axes = plots.canvas(mosaic, size)

    for panel, name in enumerate(names):
        plot_histograms(axes[panel], rewards[name][:, :2], is_wrong[:, :2])
        unit = "log π_θ - log π_ref of a token (nats)"
        if name == BASELINE:
            unit = "log π_ref of a token (nats)"
        number = interval_text(measures[name]["one_error"], ".3f")
        plots.label_axes(axes[panel], f"{name}: AUROC {number}", unit, "share of the kind's tokens")
    figure.savefig(path, format="png", dpi=150)


def plot_histograms(axes: "Axes", values: Tensor, is_wrong: Tensor) -> None:
    """The shares of correct and of wrong tokens over their values, (n, 2, 5)."""
    limits = (float(values.min()), float(values.max()))
    groups = {"correct": values[~is_wrong], "wrong": values[is_wrong]}
    colors = {"correct": plots.BLUE, "wrong": plots.ORANGE}
    for kind, kind_values in groups.items():
        shares = torch.full_like(kind_values, 1 / len(kind_values))
        look: dict[str, Any] = {"color": colors[kind], "alpha": 0.6, "label": f"{kind} facts"}
        axes.hist(kind_values, BINS, range=limits, weights=shares, **look)


def main(args: Args) -> None:
    """Put errors into summaries, compare, write both files, and print the table."""
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: must end in .json; the figure goes beside it in .png")
    plots.require_matplotlib()

    policies = named_policies(args.policies)
    paths = list(policies.values())
    summaries = corrupt_summaries(args.rows, args.num_prompts, args.errors, args.seed)
    check_tokenizers(paths, args.reference)
    rows, positions = encode(args.reference, summaries)
    ref_logps, *logps = fact_logps([args.reference, *paths], rows, positions)

    rewards = {}
    for name, policy_logps in zip(policies, logps, strict=True):
        rewards[name] = token_rewards(policy_logps, ref_logps, beta=1.0)
    rewards[BASELINE] = ref_logps
    measures = {}
    for name, values in rewards.items():
        measures[name] = measure(values, summaries.is_wrong, args.seed)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "settings": evaluation_settings(args, args.reference, len(summaries.prompts)),
        "measures": measures,
        "is_wrong": summaries.is_wrong.tolist(),
        "values": {name: values.tolist() for name, values in rewards.items()},
    }
    with replacing(args.output.with_suffix(".png")) as temporary:
        plot(temporary, rewards, summaries.is_wrong, measures)
        write_json(args.output, contents)
    print(table(measures))


if __name__ == "__main__":
    checked_command(main, Args)
