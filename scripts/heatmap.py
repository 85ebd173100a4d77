"""Which tokens an answer owes its reward to: completions side by side, coloured token by token, as HTML and PNG.

    r(s_t, a_t) = β log π_θ(a_t|s_t) - β log π_ref(a_t|s_t)             Eq 11 of From r to Q*, arXiv 2404.12358

Blue: the policy makes the token likelier than the reference does; orange: less likely; all colours on one scale. The
number, in nats, stands behind each token in the HTML page (point at it), the sum of a completion below it. Tokens that
only together are characters share one field, with the sum of their rewards. Special tokens have a frame. Letters that
run from right to left or join need matplotlib 3.11 in the PNG.

    python scripts/heatmap.py --policy runs/dpo --reference runs/sft --rows pairs.jsonl --output runs/heatmap.html
"""

import html
import math
import os
import re
import sys
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import figures
import streaming
from figures import GREY

from algos.token_dpo_beam import token_rewards
from shared import NonFinite, UserError
from shared.model import load_policy, load_tokenizer
from shared.run import command, plain_length

MICRO_BATCH_TOKENS = 8_192
BLUE, ORANGE = (tuple(bytes.fromhex(color[1:])) for color in (figures.BLUE, figures.ORANGE))
STRONGEST = 0.7  # opacity of a colour at the end of the scale: text stays readable on it
HIDDEN = re.compile(r"[\x00-\x1f\x7f]|[^\S ]| (?=\s|$)")  # a blank between words shows as it is


@dataclass(kw_only=True)
class Args:
    """Colour completions by their token rewards."""

    policy: str
    """directory or hub id of the trained policy, π_θ"""
    reference: str
    """directory or hub id of the policy that it was trained from, π_ref"""
    rows: str
    """file, directory or hub id (`path:split`) of rows with two or more completions"""
    output: Path
    """html file to write; the same picture as .png beside it"""
    beta: float = 0.1
    """β that the policy was trained with, per nat of log-ratio"""
    max_rows: int = 4
    """rows in the picture, the first of the file"""


@dataclass
class Piece:
    """Text of one token, or of several that only together are characters."""

    text: str
    rewards: list[float]  # r(s_t, a_t) of its tokens, nats
    special: bool

    @property
    def reward(self) -> float:
        """The sum over its tokens."""
        return math.fsum(self.rewards)


@dataclass
class Panel:
    """One row of the file."""

    number: int
    prompt: str
    completions: dict[str, list[Piece]]  # by what they are called, in the order of the row


# ---------------------------------------------------------------- rewards


def read(args: Args, dropped: Counter) -> Iterator[tuple]:
    """Examples, each with its row. Raises UserError where one has nothing to compare."""
    for example, own in streaming.read(args.rows, dropped, args.max_rows):
        if len(example.completions) < 2:
            raise UserError(f"{example.where}: nothing to compare, completions: {len(example.completions)}")
        yield example, own


def encode(args: Args, dropped: Counter) -> tuple[list[streaming.Row], object]:
    """The rows with their token ids, and the tokenizer, which both models must share."""
    tokenizer, config = load_tokenizer(args.policy, args.reference)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {args.policy}: the tokenizer has no EOS token; set one so that completions can end")
    room = sys.maxsize
    for one in (config, load_tokenizer(args.reference)[1]):
        room = min(room, getattr(one, "max_position_embeddings", None) or room, plain_length(one))
    return list(streaming.encode(read(args, dropped), tokenizer, dropped, room, completions=True)), tokenizer


def rewards(args: Args, rows: list[streaming.Row]) -> list[list[list[float]]]:
    """Eq 11 of each token of each completion of each row, nats."""
    logps = []
    with streaming.alone("float32") as place:
        for path in (args.policy, args.reference):
            policy = load_policy(path, place)
            groups = [streaming.make_groups([row]) for row in rows]
            logps.append([streaming.token_logps(policy, one, MICRO_BATCH_TOKENS, place)[0] for one in groups])
    found = []
    for row, own, ref in zip(rows, *logps, strict=True):
        values = [token_rewards(*pair, args.beta).tolist() for pair in zip(own, ref, strict=True)]
        if not all(math.isfinite(value) for one in values for value in one):
            raise NonFinite(f"{row.example.where}: a token's reward is not a finite number")
        found.append(values)
    return found


def joined(text: str, at: int) -> bool:
    """Whether text[at] is drawn as one with what stands before it: accents, joiners, skin tones, flags."""
    before, after = text[at - 1], text[at]
    flag = "\U0001f1e6" <= min(before, after) and max(before, after) <= "\U0001f1ff"
    tone = "\U0001f3fb" <= after <= "\U0001f3ff"
    return flag or tone or before == "\u200d" or unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf")


def cut(tokenizer, ids: list[int], values: list[float]) -> list[Piece]:
    """A completion in pieces that hold whole characters; their texts make up the decoded completion.

    A piece may end behind a token where the text so far is a beginning of the whole text: within a character of
    several tokens it ends in a replacement character instead. The work grows with the square of the length.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def decode(length: int) -> str:
        return tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)

    text = decode(len(ids))
    ends = [(len(ids), len(text))]
    for length in range(len(ids) - 1, 0, -1):
        part = decode(length)
        if 0 < len(part) < ends[-1][1] and text.startswith(part) and not joined(text, len(part)):
            ends.append((length, len(part)))
    spans = pairwise([(0, 0), *reversed(ends)])
    return [Piece(text[a:b], values[i:j], j - i == 1 and ids[i] in special) for (i, a), (j, b) in spans]


def make_panel(row: streaming.Row, values: list[list[float]], tokenizer) -> Panel:
    """A row with its completions in pieces."""
    count = len(row.completions)
    names = ["chosen", "rejected"] if row.example.ordered else [f"completion {k}" for k in range(1, count + 1)]
    pieces = [cut(tokenizer, *pair) for pair in zip(row.completions, values, strict=True)]
    prompt = row.prompt[row.prompt[0] == tokenizer.bos_token_id :]
    prompt = tokenizer.decode(prompt, clean_up_tokenization_spaces=False).strip()
    return Panel(row.example.number, prompt, dict(zip(names, pieces, strict=True)))


# ---------------------------------------------------------------- what both pictures show


def mark(char: str) -> str:
    """What is shown for a character that would not be seen."""
    caret = f"^{chr(ord(char) ^ 64)}" if unicodedata.category(char) == "Cc" else "·"
    return {"\n": "↵", "\t": "⇥"}.get(char, caret)


def color(reward: float, scale: float) -> tuple[int, int, int, float]:
    """Red, green and blue of 255, and the opacity; `scale` is the reward of the strongest colour."""
    return *(BLUE if reward > 0 else ORANGE), round(STRONGEST * abs(reward) / scale, 3)


def nats(value: float) -> str:
    """Four digits with a sign."""
    return f"{value:+.4g}".replace("-", "−")


def total(pieces: list[Piece]) -> str:
    """The return of a completion."""
    count = sum(len(piece.rewards) for piece in pieces)
    return f"Σ r = {nats(math.fsum(piece.reward for piece in pieces))} nats, {count} tokens"


def compared(args: Args) -> str:
    """What was compared."""
    return f"β = {args.beta:g}, policy {Path(args.policy).name}, reference {Path(args.reference).name}"


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
    """The text itself, with marks where one would see nothing; control characters, which HTML cannot hold, left out."""

    def shown(found: re.Match) -> str:
        held = found[0] if found[0] in "\n\t" or unicodedata.category(found[0]) != "Cc" else ""
        return f'<i data-mark="{mark(found[0])}">{held}</i>'

    return HIDDEN.sub(shown, html.escape(text))


def piece_html(piece: Piece, scale: float) -> str:
    """The text on its colour, the reward behind it."""
    several = f", {len(piece.rewards)} tokens that only together are characters: {' '.join(map(nats, piece.rewards))}"
    title = f"{nats(piece.reward)} nats{several if len(piece.rewards) > 1 else ''}"
    kind = ' class="special"' if piece.special else ""
    background = f"background:rgba{color(piece.reward, scale)}"
    return f'<span{kind} style="{background}" title="{title}">{visible_html(piece.text)}</span>'


def panel_html(panel: Panel, scale: float) -> str:
    """The prompt, and below it the completions side by side."""
    figures = []
    for name, pieces in panel.completions.items():
        text = "".join(piece_html(piece, scale) for piece in pieces)
        below = f'<p class="total">{total(pieces)}</p>'
        figures.append(f'<figure><figcaption>{name}</figcaption><p class="text" dir="auto">{text}</p>{below}</figure>')
    prompt = f'<div class="prompt" tabindex="0"><p class="text" dir="auto">{visible_html(panel.prompt)}</p></div>'
    return f'<h2>Row {panel.number}</h2>{prompt}<div class="completions">{"".join(figures)}</div>'


def page(args: Args, panels: list[Panel], scale: float) -> str:
    """The whole picture as HTML that needs nothing outside it."""
    low, high = (f"rgba{color(end, scale)}" for end in (-scale, scale))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token rewards</title><style>{STYLE}</style></head><body>
<h1>Token rewards</h1>
<p class="note">r(s<sub>t</sub>, a<sub>t</sub>) = β log π<sub>θ</sub>(a<sub>t</sub>|s<sub>t</sub>) −
β log π<sub>ref</sub>(a<sub>t</sub>|s<sub>t</sub>), {html.escape(compared(args))}. Point at a token for its reward.</p>
<div class="legend">{nats(-scale)}<div class="bar" style="background:linear-gradient(90deg,{low},transparent,{high})">
</div>{nats(scale)} nats</div>
{"".join(panel_html(panel, scale) for panel in panels)}
</body></html>
"""


# ---------------------------------------------------------------- PNG

PAGE, MARGIN, GAP = 612, 18, 20  # points: the page's width, what is left free around it and between columns
SIZE, LINE, DPI = 9, 15, 200  # the text's size and the distance of lines in points, pixels per inch
COLUMNS, BAR = 3, 120  # completions side by side; points of the legend's bar
TAIL = 400  # characters of the prompt
RTL = {"R": True, "AL": True, "L": False, "EN": False, "AN": False}  # classes of characters with a direction


def directions(text: str) -> tuple[bool, list[bool]]:
    """Whether a paragraph, and whether each character of it, is written from right to left.

    As the first letter; blanks and signs as the characters around them (Unicode's algorithm, without nesting).
    """
    own = [RTL.get(unicodedata.bidirectional(char)) for char in text]
    whole = next((one for one in own if one is not None), False)
    before = accumulate(own, lambda last, one: last if one is None else one)
    after = accumulate(reversed(own), lambda last, one: last if one is None else one)
    return whole, [whole if a is None or a != b else a for a, b in zip(before, reversed([*after]), strict=True)]


def families(text: str) -> tuple[list[str], set[str]]:
    """DejaVu Sans, of the installed fonts those that have what it lacks, and the characters that none of them has."""
    from matplotlib.font_manager import fontManager, get_font

    found, missing = ["DejaVu Sans"], set(HIDDEN.sub("", text))
    for font in sorted(fontManager.ttflist, key=lambda font: font.name != found[0]):
        has = {char for char in missing if get_font(font.fname).get_char_index(ord(char))}
        if has and not font.name.startswith("Last Resort"):  # its glyphs are boxes
            found += [font.name] * (font.name not in found)
            missing -= has
        if not missing:
            break
    return found, missing


class Canvas:
    """Texts on coloured fields, in points from the upper left corner, until it is known how high the page is."""

    def __init__(self, text: str, scale: float):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        found, missing = families(text)
        if missing:
            print(f"no installed font has {''.join(sorted(missing))[:50]}: boxes in the PNG, text in the HTML")
        self.font, self.boxed = FontProperties(family=found, size=SIZE), dict.fromkeys(map(ord, missing), "□")
        self.figure, self.scale = Figure(dpi=DPI), scale
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.texts, self.fields = [], []

    def width(self, text: str) -> float:
        """Points from its start to where the next text would start."""
        return self.renderer.get_text_width_height_descent(text.rstrip("\n"), self.font, False)[0] * 72 / DPI

    def note(self, text: str, x: float, y: float, column: float, ink: str = GREY) -> float:
        """A paragraph without rewards."""
        return self.paragraph([Piece(text, [], False)], x, y, column, ink)

    def paragraph(self, pieces: list[Piece], x: float, y: float, column: float, ink: str = "black") -> float:
        """Pieces on their colours, in lines of at most `column` points; returns where the next paragraph starts."""
        shown = [HIDDEN.sub(lambda f: mark(f[0]) + "\n" * (f[0] == "\n"), piece.text) for piece in pieces]
        shown = [text.translate(self.boxed) for text in shown]
        text, starts = "".join(shown), [0, *accumulate(map(len, shown))]
        spans = [(a, b, piece) for (a, b), piece in zip(pairwise(starts), pieces, strict=True)]
        whole, flags = directions("".join("x" * (b - a) if piece.special else text[a:b] for a, b, piece in spans))
        words = {a for a, _, piece in spans if piece.special}
        words |= {i for i in range(1, len(text)) if text[i] == " " or text[i - 1] == "·" or is_wide(text[i])}
        for start, end in self.lines(text, [words, set(starts)], column):
            start += start > 0 and text[start] == " " and text[start - 1] != "\n"
            at = x + column - self.width(text[start:end]) if whole else x
            runs = [(rtl, [*run]) for rtl, run in groupby(range(start, end), key=flags.__getitem__)]
            for rtl, run in reversed(runs) if whole else runs:
                a, b = run[0], run[-1] + 1
                self.texts.append((at, y, text[a:b].rstrip("\n"), ink))
                self.fill(text, a, b, at, y, rtl, spans)
                at += self.width(text[a:b])
            y += LINE
        return y

    def lines(self, text: str, breaks: list[set[int]], column: float) -> Iterator[tuple[int, int]]:
        """Where each line starts and ends: at the last of `breaks`, the better ones first, or where it is full."""
        start = 0
        while start < len(text):
            end = text.find("\n", start) + 1 or len(text)
            if self.width(text[start:end]) > column:
                fits = bisect_right(range(1, end - start), column, key=lambda n: self.width(text[start : start + n]))
                last = start + max(1, fits)
                end = next((at for good in breaks for at in range(last, start, -1) if at in good), last)
            yield start, end
            start = end

    def fill(self, text: str, a: int, b: int, x: float, y: float, rtl: bool, spans: list[tuple]) -> None:
        """The fields behind text[a:b], all of it in one direction, which starts at x."""
        for start, end, piece in spans:
            if start < b and end > a:
                left, right = (self.width(text[a:at]) for at in (max(a, start), min(b, end)))
                place = x + (self.width(text[a:b]) - right if rtl else left)
                edge = GREY if piece.special else "white"
                self.fields.append((place, y, right - left, color(piece.reward, self.scale), edge))

    def save(self, path: Path, height: float) -> None:
        """Draw what has been laid out. Raises UserError where a PNG cannot be that high."""
        from matplotlib.patches import Rectangle

        pixels = round(height * DPI / 72)
        if pixels >= 2**16:
            raise UserError(f"{path.stem}: {pixels} pixels high, a PNG has at most 65535; give a smaller --max-rows")
        self.figure.set_size_inches(PAGE / 72, height / 72)
        axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, PAGE), ylim=(height, 0))
        axes.set_axis_off()
        for x, y, width, (*rgb, alpha), edge in self.fields:
            fill = (*(part / 255 for part in rgb), alpha)
            axes.add_patch(Rectangle((x, y), width, LINE - 2, facecolor=fill, edgecolor=edge, linewidth=0.5))
        for x, y, text, ink in self.texts:
            axes.text(x, y + 0.68 * LINE, text, font=self.font, color=ink, parse_math=False)
        self.figure.savefig(path, format="png")


def is_wide(char: str) -> bool:
    """Whether it is of a script that has no blanks and breaks lines anywhere."""
    return unicodedata.east_asian_width(char) in "WF"


def draw_panel(canvas: Canvas, panel: Panel, y: float) -> float:
    """The end of the prompt, and below it the completions side by side; returns where they end."""
    prompt, width = " ".join(panel.prompt.split()), PAGE - 2 * MARGIN
    y = canvas.note(f"Row {panel.number}", MARGIN, y, width, "black")
    y = canvas.note("…" * (len(prompt) > TAIL) + prompt[-TAIL:], MARGIN, y, width)
    columns = min(COLUMNS, len(panel.completions))
    column = (width - GAP * (columns - 1)) / columns
    for start in range(0, len(panel.completions), columns):
        ends = []
        for i, (name, pieces) in enumerate([*panel.completions.items()][start : start + columns]):
            x = MARGIN + i * (column + GAP)
            end = canvas.paragraph(pieces, x, canvas.note(name, x, y + LINE / 2, column), column)
            ends.append(canvas.note(total(pieces), x, end + LINE / 4, column))
        y = max(ends)
    return y


def draw(args: Args, panels: list[Panel], scale: float, path: Path) -> None:
    """The whole picture as PNG."""
    texts = [panel.prompt for panel in panels]
    texts += [piece.text for panel in panels for pieces in panel.completions.values() for piece in pieces]
    canvas = Canvas("".join(texts), scale)
    y = canvas.note(f"Token rewards β log(π/π_ref), {compared(args)}", MARGIN, MARGIN, PAGE - 2 * MARGIN, "black") + 3
    x = MARGIN + canvas.width(nats(-scale)) + 4
    canvas.fields += [(x + i, y, 1, color((i - BAR / 2) / BAR * 2 * scale, scale), "none") for i in range(BAR + 1)]
    canvas.note(nats(-scale), MARGIN, y, PAGE)
    y = canvas.note(f"{nats(scale)} nats", x + BAR + 5, y, PAGE)
    for panel in panels:
        y = draw_panel(canvas, panel, y + LINE)
    canvas.save(path, y + MARGIN)


# ---------------------------------------------------------------- command line


def main(args: Args) -> None:
    """Compute the rewards, write both pictures."""
    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output}: must end in .html")
    figures.check()
    dropped: Counter = Counter()
    rows, tokenizer = encode(args, dropped)
    counts = streaming.summary(args.rows, len(rows), dropped)
    panels = [make_panel(*pair, tokenizer) for pair in zip(rows, rewards(args, rows), strict=True)]
    pieces = [piece for panel in panels for one in panel.completions.values() for piece in one]
    scale = max(abs(piece.reward) for piece in pieces) or 1.0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture = args.output.with_suffix(".png")
    temporary = [path.with_name(path.name + ".tmp") for path in (args.output, picture)]
    temporary[0].write_text(page(args, panels, scale), encoding="utf-8")
    draw(args, panels, scale, temporary[1])
    for path, final in zip(temporary, (args.output, picture), strict=True):
        os.replace(path, final)
    print(f"{args.output}, {picture}: {counts}")


if __name__ == "__main__":
    command(main, Args)
