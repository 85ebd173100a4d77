"""Which tokens an answer owes its reward to: completions side by side, coloured token by token, as HTML and PNG.

    r(s_t, a_t) = β log π_θ(a_t|s_t) - β log π_ref(a_t|s_t)             Eq 11 of From r to Q*, arXiv 2404.12358

Blue means that the policy makes the token likelier than the reference does, orange that it makes it less likely. All
colours have one scale. The HTML page shows a token's reward, in nats, when the mouse points at it. The sum of a
completion's rewards stands below it. Tokens that form characters only together share one field, which shows the sum of
their rewards. Special tokens have a frame. What stands between two turns of the assistant is context without a reward.
In the PNG, letters that join or run from right to left need matplotlib
3.11.

    python scripts/heatmap.py --policy runs/dpo --reference runs/sft --rows pairs.jsonl --output runs/heatmap.html
"""

import html
import math
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from algos.token_dpo_beam import token_rewards
from scripts.lab import heatmap_png, plots
from scripts.lab.commands import checked_command
from scripts.lab.heatmap_panels import HIDDEN, Panel, Piece, mark, nats_text, return_text, reward_color
from scripts.lab.row_files import EncodedRow, encode_rows, read_examples, summary
from scripts.lab.scoring import make_groups, token_logps_of
from shared import NonFinite, UserError
from shared.command import Above
from shared.distributed import single_process
from shared.encode import Encoder
from shared.files import replacing
from shared.groups import full_attention_length
from shared.loading import load_policy_from, load_tokenizer
from shared.rows import Counts, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MICRO_BATCH_TOKENS = 8_192


@dataclass(kw_only=True)
class Args:
    """Colour completions by their token rewards."""

    policy: str
    """directory or hub id of the trained policy, π_θ"""
    reference: str
    """directory or hub id of the policy that training started from, π_ref"""
    rows: str
    """file, directory or hub id (`path:split`) of rows with two or more completions"""
    output: Path
    """html file to write; the same picture is written beside it as .png"""
    beta: Annotated[float, Above(0)] = 0.1
    """β that the policy was trained with, per nat of log-ratio"""
    max_rows: Annotated[int, Above(0)] = 4
    """rows in the picture, the first of the file"""


# ---------------------------------------------------------------- rewards


def read_comparisons(args: Args, counts: Counts) -> Iterator[Example]:
    """The examples. Raises UserError if one has fewer than two completions."""
    for example in read_examples(args.rows, counts, args.max_rows):
        num_completions = len(example.completions)
        if num_completions < 2:
            raise UserError(f"{example.location}: nothing to compare, completions: {num_completions}")
        yield example


def encode(args: Args, counts: Counts) -> tuple[list[EncodedRow], "PreTrainedTokenizerBase"]:
    """The rows with their token ids, and the tokenizer, which both models must share."""
    tokenizer, config = load_tokenizer(args.policy, args.reference)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {args.policy}: the tokenizer has no EOS token; set one so that completions can end")

    room = sys.maxsize
    _, reference_config = load_tokenizer(args.reference)
    for model_config in (config, reference_config):
        positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or room
        room = min(room, positions, full_attention_length(model_config))

    examples = read_comparisons(args, counts)
    rows = list(encode_rows(examples, Encoder(tokenizer, counts), room, completions=True))
    return rows, tokenizer


def rewards_of_tokens(args: Args, rows: list[EncodedRow]) -> list[list[list[float]]]:
    """Eq 11 for each token of each completion of each row, nats; NaN for context, which the policy does not write."""
    groups = [make_groups([row]) for row in rows]
    logps = []
    with single_process("float32") as ranks:
        for path in (args.policy, args.reference):
            policy = load_policy_from(path, ranks)
            rows_logps = []
            for row_groups in groups:
                (completions_logps,) = token_logps_of(policy, row_groups, MICRO_BATCH_TOKENS, ranks)
                rows_logps.append(completions_logps)
            logps.append(rows_logps)

    rewards = []
    policy_logps, ref_logps = logps
    for row, row_logps, row_ref_logps in zip(rows, policy_logps, ref_logps, strict=True):
        row_rewards = []
        of_completions = zip(row.completions, row_logps, row_ref_logps, strict=True)
        for completion, completion_logps, completion_ref_logps in of_completions:
            values = token_rewards(completion_logps, completion_ref_logps, args.beta)
            if not values[completion.is_counted].isfinite().all():
                raise NonFinite(f"{row.example.location}: a token's reward is not a finite number")
            row_rewards.append(values.tolist())
        rewards.append(row_rewards)
    return rewards


# ---------------------------------------------------------------- pieces


def make_panel(row: EncodedRow, rewards: list[list[float]], tokenizer: "PreTrainedTokenizerBase") -> Panel:
    """A row with its completions in pieces. rewards: of each token of each completion, nats."""
    titles = ["chosen", "rejected"]
    if not row.example.ranked:
        titles = [f"completion {number}" for number in range(1, len(row.completions) + 1)]

    completions = {}
    for title, completion, values in zip(titles, row.completions, rewards, strict=True):
        completions[title] = split_into_pieces(tokenizer, completion.ids, values)

    prompt_ids = row.prompt
    if prompt_ids[0] == tokenizer.bos_token_id:
        prompt_ids = prompt_ids[1:]
    prompt = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    return Panel(row.example.number, prompt.strip(), completions)


def split_into_pieces(tokenizer: "PreTrainedTokenizerBase", ids: list[int], rewards: list[float]) -> list[Piece]:
    """A completion in pieces that hold whole characters. Their texts make up the decoded completion."""
    special_ids = set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special_ids.add(token_id)

    pieces = []
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for (start, text_start), (end, text_end) in pairwise(piece_boundaries(tokenizer, ids, text)):
        special = end - start == 1 and ids[start] in special_ids
        scored = [reward for reward in rewards[start:end] if not math.isnan(reward)]
        pieces.append(Piece(text[text_start:text_end], scored, special))
    return pieces


def piece_boundaries(tokenizer: "PreTrainedTokenizerBase", ids: list[int], text: str) -> list[tuple[int, int]]:
    """Where pieces start and end: (tokens before, characters before), from (0, 0) to the end of `text`.

    A piece can end behind a token if the text up to there is a beginning of the whole text. Within a character of
    several tokens it is not, because it ends in a replacement character. The work grows with the square of the length.
    """
    boundaries = [(len(ids), len(text))]
    text_end = len(text)
    for num_tokens in range(len(ids) - 1, 0, -1):
        beginning = tokenizer.decode(ids[:num_tokens], clean_up_tokenization_spaces=False)
        position = len(beginning)
        if not 0 < position < text_end:
            continue
        if text.startswith(beginning) and not joins_previous(text, position):
            boundaries.append((num_tokens, position))
            text_end = position
    boundaries.append((0, 0))
    boundaries.reverse()
    return boundaries


def joins_previous(text: str, position: int) -> bool:
    """Whether the character at `position` is drawn as one with its predecessor: accents, joiners, skin tones, flags."""
    previous = text[position - 1]
    char = text[position]
    is_flag = is_flag_letter(previous) and is_flag_letter(char)
    is_skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    follows_joiner = previous == "\u200d"
    is_mark = unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf")
    return is_flag or is_skin_tone or follows_joiner or is_mark


def is_flag_letter(char: str) -> bool:
    """Whether the character is one of the letters two of which are drawn as a country's flag."""
    return "\U0001f1e6" <= char <= "\U0001f1ff"


# ---------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1c1c; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #eee; --soft: #a4a8ae; --line: #3a3d42; } }
* { box-sizing: border-box; }
body { max-width: 1160px; margin: 0 auto; padding: 28px 18px 56px; color: var(--ink); background: var(--page);
  font: 16px/1.7 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 15px; margin: 36px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 0; }
.context { color: var(--soft); }
.note, .total, .legend { color: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
.legend { display: flex; gap: 10px; align-items: center; max-width: 480px; margin-top: 14px; }
.bar { flex: 1; height: 14px; border: 1px solid var(--line); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.prompt { color: var(--soft); font-size: 14.5px; line-height: 1.5; max-height: 12.5em; overflow-y: auto;
  display: flex; flex-direction: column-reverse; /* shows the end */ }
.prompt i::before { display: none; }
.completions { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 18px 32px; }
.completions { margin-top: 14px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; }
.total { margin-top: 6px; }
span { border-radius: 3px; box-shadow: inset 0 0 0 0.5px var(--page); padding: 2px 0; }
.special { display: inline-block; direction: ltr; padding: 0; line-height: 1.45; outline: 1px solid var(--soft);
  outline-offset: -1px; }
i { font-style: normal; }
[data-mark]::before { content: attr(data-mark); opacity: 0.6; }
[data-mark="·"]::before { position: absolute; }
"""


def visible_html(text: str) -> str:
    """The escaped text with marks for hidden characters. Control characters, which HTML cannot hold, are left out."""

    def with_mark(match: re.Match[str]) -> str:
        char = match[0]
        content = char
        if unicodedata.category(char) == "Cc" and char not in "\n\t":
            content = ""
        return f'<i data-mark="{mark(char)}">{content}</i>'

    return HIDDEN.sub(with_mark, html.escape(text))


def css_color(reward: float, scale: float) -> str:
    """The colour of a reward in CSS. scale: the reward of the strongest colour."""
    color = reward_color(reward, scale)
    return f"rgba({color.red}, {color.green}, {color.blue}, {color.opacity})"


def piece_html(piece: Piece, scale: float) -> str:
    """The text on its colour. The reward is the title, which a browser shows when the mouse points at the text."""
    title = f"{nats_text(piece.reward)} nats"
    if not piece.rewards:
        return f'<span class="context" title="context, not scored">{visible_html(piece.text)}</span>'
    if len(piece.rewards) > 1:
        rewards = " ".join(map(nats_text, piece.rewards))
        title += f", {len(piece.rewards)} tokens that only together are characters: {rewards}"

    attributes = f'style="background:{css_color(piece.reward, scale)}" title="{title}"'
    if piece.special:
        attributes = f'class="special" {attributes}'
    return f"<span {attributes}>{visible_html(piece.text)}</span>"


def completion_html(title: str, pieces: list[Piece], scale: float) -> str:
    """The title, the pieces, and the sum of their rewards."""
    caption = f"<figcaption>{title}</figcaption>"
    spans = "".join(piece_html(piece, scale) for piece in pieces)
    text = f'<p class="text" dir="auto">{spans}</p>'
    total = f'<p class="total">{return_text(pieces)}</p>'
    return f"<figure>{caption}{text}{total}</figure>"


def panel_html(panel: Panel, scale: float) -> str:
    """The prompt, and below it the completions side by side."""
    prompt = f'<div class="prompt" tabindex="0"><p class="text" dir="auto">{visible_html(panel.prompt)}</p></div>'
    figures = ""
    for title, pieces in panel.completions.items():
        figures += completion_html(title, pieces, scale)
    return f'<h2>Row {panel.number}</h2>{prompt}<div class="completions">{figures}</div>'


def page_html(comparison: str, panels: list[Panel], scale: float) -> str:
    """The whole picture as HTML that refers to nothing outside it. comparison: β and the names of the models."""
    low = css_color(-scale, scale)
    high = css_color(scale, scale)
    gradient = f"linear-gradient(90deg,{low},transparent,{high})"
    body = "".join(panel_html(panel, scale) for panel in panels)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token rewards</title><style>{STYLE}</style></head><body>
<h1>Token rewards</h1>
<p class="note">r(s<sub>t</sub>, a<sub>t</sub>) = β log π<sub>θ</sub>(a<sub>t</sub>|s<sub>t</sub>) −
β log π<sub>ref</sub>(a<sub>t</sub>|s<sub>t</sub>), {html.escape(comparison)}. Point at a token for its reward.</p>
<div class="legend">{nats_text(-scale)}<div class="bar" style="background:{gradient}">
</div>{nats_text(scale)} nats</div>
{body}
</body></html>
"""


# ---------------------------------------------------------------- command line


def largest_reward(panels: list[Panel]) -> float:
    """The largest absolute reward of a piece, the end of the colours' scale; 1 if all rewards are 0."""
    largest = 0.0
    for panel in panels:
        for pieces in panel.completions.values():
            for piece in pieces:
                largest = max(largest, abs(piece.reward))
    return largest or 1.0


def main(args: Args) -> None:
    """Compute the rewards and write both pictures."""
    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output}: must end in .html")
    plots.require_matplotlib()

    counts = Counts()
    rows, tokenizer = encode(args, counts)
    line = summary(args.rows, len(rows), counts)

    panels = []
    for row, rewards in zip(rows, rewards_of_tokens(args, rows), strict=True):
        panels.append(make_panel(row, rewards, tokenizer))

    comparison = f"β = {args.beta:g}, policy {Path(args.policy).name}, reference {Path(args.reference).name}"
    scale = largest_reward(panels)
    page = page_html(comparison, panels, scale)
    picture = heatmap_png.lay_out(f"Token rewards β log(π/π_ref), {comparison}", panels, scale)

    png = args.output.with_suffix(".png")
    pixels = picture.height_in_pixels
    if pixels > heatmap_png.MAX_PIXELS:
        limit = f"a PNG has at most {heatmap_png.MAX_PIXELS}"
        raise UserError(f"{png.name}: {pixels} pixels high, {limit}; give a smaller --max-rows")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary_page, replacing(png) as temporary_png:
        temporary_page.write_text(page, encoding="utf-8")
        picture.save(temporary_png)
    print(f"{args.output}, {png}: {line}")


if __name__ == "__main__":
    checked_command(main, Args)
