"""The PNG of a heatmap: paragraphs of coloured text, laid out in lines, also from right to left.

All lengths are in points; x grows to the right and y downwards, from the upper left corner of the page.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scripts.lab.heatmap_panels import HIDDEN, Color, Panel, Piece, mark, nats_text, return_text, reward_color
from scripts.lab.plots import GREY

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

PAGE_WIDTH = 612
MARGIN = 18
CONTENT_WIDTH = PAGE_WIDTH - 2 * MARGIN
FONT_SIZE = 9
LINE_HEIGHT = 15
BASELINE = 0.68  # of a line's height, from its top
FIELD_GAP = 2  # between the coloured fields of two lines
COLUMNS = 3  # completions side by side
COLUMN_GAP = 20
LEGEND_WIDTH = 120
PROMPT_CHARACTERS = 400  # at most; the end of a longer prompt is shown
PIXELS_PER_INCH = 200
POINTS_PER_INCH = 72
MAX_PIXELS = 2**16 - 1  # the highest PNG that matplotlib writes

MAIN_FONT = "DejaVu Sans"
BOX = "□"  # in place of a character that no font has

# Bidirectional classes of the characters that have a direction. Digits are always written from left to right.
IS_RIGHT_TO_LEFT = {"R": True, "AL": True, "L": False, "EN": False, "AN": False}


# ---------------------------------------------------------------- text


class Span(NamedTuple):
    """The characters start, ..., end - 1 of a paragraph belong to the piece."""

    start: int
    end: int
    piece: Piece


class Run(NamedTuple):
    """The characters start, ..., end - 1 of a paragraph are written in one direction."""

    start: int
    end: int
    right_to_left: bool


class Paragraph:
    """The text of some pieces as it is shown, and its directions.

    boxes: a table for `str.translate` that replaces the characters that no font has.
    """

    text: str
    spans: list[Span]
    right_to_left: bool  # the direction of the whole
    is_right_to_left: list[bool]  # of each character

    def __init__(self, pieces: list[Piece], boxes: dict[int, str]):
        texts = []
        for piece in pieces:
            text = mark_hidden(piece.text)
            texts.append(text.translate(boxes))
        self.text = "".join(texts)

        boundaries = accumulate(map(len, texts), initial=0)
        self.spans = []
        for (start, end), piece in zip(pairwise(boundaries), pieces, strict=True):
            self.spans.append(Span(start, end, piece))

        # A special token is written from left to right whatever its characters are.
        directed = []
        for span in self.spans:
            text = self.text[span.start : span.end]
            if span.piece.special:
                text = "x" * len(text)
            directed.append(text)
        self.right_to_left, self.is_right_to_left = directions("".join(directed))

    def word_starts(self) -> set[int]:
        """Positions at which a line should rather break."""
        starts = set()
        for span in self.spans:
            if span.piece.special:
                starts.add(span.start)

        for position in range(1, len(self.text)):
            char = self.text[position]
            after_blank = self.text[position - 1] == "·"
            if char == " " or after_blank or is_wide(char):
                starts.add(position)
        return starts

    def piece_starts(self) -> set[int]:
        """Positions between two pieces, and the end."""
        starts = {span.start for span in self.spans}
        starts.add(len(self.text))
        return starts

    def runs(self, start: int, end: int) -> list[Run]:
        """The runs of a line from left to right on the page."""
        runs = []
        for right_to_left, group in groupby(range(start, end), key=self.is_right_to_left.__getitem__):
            positions = list(group)
            runs.append(Run(positions[0], positions[-1] + 1, right_to_left))
        if self.right_to_left:
            runs.reverse()
        return runs


def mark_hidden(text: str) -> str:
    """The text with marks in place of its hidden characters. A line break stays, behind its mark."""

    def with_mark(match: re.Match[str]) -> str:
        char = match[0]
        if char == "\n":
            return mark(char) + char
        return mark(char)

    return HIDDEN.sub(with_mark, text)


def is_wide(char: str) -> bool:
    """Whether the character belongs to a script without blanks, whose lines may break anywhere."""
    return unicodedata.east_asian_width(char) in "WF"


def directions(text: str) -> tuple[bool, list[bool]]:
    """Whether a paragraph, and whether each of its characters, is written from right to left.

    The paragraph takes the direction of its first letter. Blanks and signs take the direction of the letters on both
    sides if these agree, else the paragraph's. This is Unicode's bidirectional algorithm without nesting.
    """
    known = []
    for char in text:
        bidirectional_class = unicodedata.bidirectional(char)
        known.append(IS_RIGHT_TO_LEFT.get(bidirectional_class))

    left = last_known(known)
    right = last_known(reversed(known))
    right.reverse()

    paragraph = next((direction for direction in known if direction is not None), False)
    characters = []
    for before, after in zip(left, right, strict=True):
        if before is not None and before == after:
            characters.append(before)
        else:
            characters.append(paragraph)
    return paragraph, characters


def last_known(values: Iterable[bool | None]) -> list[bool | None]:
    """For each value, the last one up to there that is not None."""
    known = []
    last = None
    for value in values:
        if value is not None:
            last = value
        known.append(last)
    return known


def font_families(text: str) -> tuple[list[str], set[str]]:
    """The fonts that the text needs, DejaVu Sans first, and the characters that no installed font has."""
    from matplotlib.font_manager import fontManager, get_font

    families = [MAIN_FONT]
    missing = set(HIDDEN.sub("", text))
    # stable: after the main font, the order in which matplotlib lists them
    fonts = sorted(fontManager.ttflist, key=lambda font: font.name != MAIN_FONT)
    for font in fonts:
        if not missing:
            break
        if font.name.startswith("Last Resort"):  # its glyphs are boxes
            continue

        glyphs = get_font(font.fname)
        available = {char for char in missing if glyphs.get_char_index(ord(char))}
        if available and font.name not in families:
            families.append(font.name)
        missing -= available
    return families, missing


# ---------------------------------------------------------------- page


class PlacedText(NamedTuple):
    """Text whose first line starts at (x, y), the upper left corner."""

    x: float
    y: float
    text: str
    ink: str


class Field(NamedTuple):
    """A coloured rectangle as high as a line."""

    x: float
    y: float
    width: float
    color: Color
    edge: str


class Page:
    """Text on coloured fields. It is drawn when everything is laid out, because only then its height is known.

    text: everything that will be shown, to choose the fonts. scale: the reward of the strongest colour.
    """

    scale: float
    texts: list[PlacedText]
    fields: list[Field]
    height: float
    boxes: dict[int, str]  # in place of the characters that no font has
    font: "FontProperties"
    figure: "Figure"
    renderer: "RendererAgg"

    def __init__(self, text: str, scale: float):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        families, missing = font_families(text)
        if missing:
            characters = "".join(sorted(missing))
            print(f"no installed font has {characters[:50]}: boxes in the PNG, text in the HTML")

        self.boxes = {ord(char): BOX for char in missing}
        self.font = FontProperties(family=families, size=FONT_SIZE)
        self.figure = Figure(dpi=PIXELS_PER_INCH)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

        self.scale = scale
        self.texts = []
        self.fields = []
        self.height = 0.0

    @property
    def height_in_pixels(self) -> int:
        """How high the PNG becomes."""
        return round(self.height * PIXELS_PER_INCH / POINTS_PER_INCH)

    def text_width(self, text: str) -> float:
        """The distance from the start of the text to where the next text would start."""
        line = text.rstrip("\n")
        pixels, _, _ = self.renderer.get_text_width_height_descent(line, self.font, False)
        return pixels * POINTS_PER_INCH / PIXELS_PER_INCH

    def add_text(self, text: str, x: float, y: float, width: float, ink: str = GREY) -> float:
        """Add a paragraph without colours; returns the y of the next paragraph."""
        piece = Piece(text, rewards=[], special=False)
        return self.add_paragraph([piece], x, y, width, ink)

    def add_paragraph(self, pieces: list[Piece], x: float, y: float, width: float, ink: str = "black") -> float:
        """Add pieces on their colours, in lines of at most `width`; returns the y of the next paragraph."""
        paragraph = Paragraph(pieces, self.boxes)
        for start, end in self._lines(paragraph, width):
            self._add_line(paragraph, start, end, x, y, width, ink)
            y += LINE_HEIGHT
        return y

    def _lines(self, paragraph: Paragraph, width: float) -> Iterator[tuple[int, int]]:
        """Start and end of each line."""
        text = paragraph.text
        breaks = [paragraph.word_starts(), paragraph.piece_starts()]
        start = 0
        while start < len(text):
            end = text.find("\n", start) + 1
            if end == 0:
                end = len(text)
            if self.text_width(text[start:end]) > width:
                end = self._line_end(text[:end], start, breaks, width)
            yield start, end
            start = end

    def _line_end(self, text: str, start: int, breaks: list[set[int]], width: float) -> int:
        """The end of a line that does not hold the rest of the text.

        The line ends at the last position of the first set of `breaks` that has one in the line. If no set has, it
        ends where it is full.
        """

        def width_of(length: int) -> float:
            return self.text_width(text[start : start + length])

        lengths = range(1, len(text) - start)
        fitting = bisect_right(lengths, width, key=width_of)
        full = start + max(1, fitting)
        for positions in breaks:
            for position in range(full, start, -1):
                if position in positions:
                    return position
        return full

    def _add_line(self, paragraph: Paragraph, start: int, end: int, x: float, y: float, width: float, ink: str) -> None:
        """Place the texts and the fields of one line."""
        text = paragraph.text
        if start > 0 and text[start] == " " and text[start - 1] != "\n":
            start += 1  # the line break takes the place of the blank
        if paragraph.right_to_left:
            x += width - self.text_width(text[start:end])

        for run in paragraph.runs(start, end):
            run_text = text[run.start : run.end]
            placed = PlacedText(x, y, run_text.rstrip("\n"), ink)
            self.texts.append(placed)
            self._add_fields(paragraph, run, x, y)
            x += self.text_width(run_text)

    def _add_fields(self, paragraph: Paragraph, run: Run, x: float, y: float) -> None:
        """Place the fields behind a run that starts at x on the page."""
        text = paragraph.text[run.start : run.end]
        for span in paragraph.spans:
            if span.start >= run.end or span.end <= run.start:
                continue

            start = max(run.start, span.start)
            end = min(run.end, span.end)
            before = self.text_width(text[: start - run.start])
            after = self.text_width(text[: end - run.start])
            offset = before
            if run.right_to_left:
                offset = self.text_width(text) - after

            edge = "white"
            if span.piece.special:
                edge = GREY
            color = reward_color(span.piece.reward, self.scale)
            self.fields.append(Field(x + offset, y, after - before, color, edge))

    def save(self, path: Path) -> None:
        """Draw everything that has been laid out."""
        self.figure.set_size_inches(PAGE_WIDTH / POINTS_PER_INCH, self.height / POINTS_PER_INCH)
        axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, PAGE_WIDTH), ylim=(self.height, 0))
        axes.set_axis_off()

        for field in self.fields:
            axes.add_patch(rectangle(field))
        for placed in self.texts:
            y = placed.y + BASELINE * LINE_HEIGHT
            axes.text(placed.x, y, placed.text, font=self.font, color=placed.ink, parse_math=False)
        self.figure.savefig(path, format="png")


def rectangle(field: Field) -> "Rectangle":
    """The field as matplotlib draws it."""
    from matplotlib.patches import Rectangle

    color = field.color
    fill = (color.red / 255, color.green / 255, color.blue / 255, color.opacity)
    corner = (field.x, field.y)
    return Rectangle(corner, field.width, LINE_HEIGHT - FIELD_GAP, facecolor=fill, edgecolor=field.edge, linewidth=0.5)


# ---------------------------------------------------------------- heatmap


def lay_out(title: str, panels: list[Panel], scale: float) -> Page:
    """The whole picture: title, legend, and one panel below the other."""
    page = Page(text_of(panels), scale)
    y = page.add_text(title, MARGIN, MARGIN, CONTENT_WIDTH, "black")
    y = add_legend(page, y + 3)
    for panel in panels:
        y = add_panel(page, panel, y + LINE_HEIGHT)
    page.height = y + MARGIN
    return page


def text_of(panels: list[Panel]) -> str:
    """All prompts and completions."""
    texts = []
    for panel in panels:
        texts.append(panel.prompt)
        for pieces in panel.completions.values():
            texts.extend(piece.text for piece in pieces)
    return "".join(texts)


def add_legend(page: Page, y: float) -> float:
    """Add the bar of colours between the ends of the scale; returns the y of the next paragraph."""
    low = nats_text(-page.scale)
    high = nats_text(page.scale)
    x = MARGIN + page.text_width(low) + 4
    for i in range(LEGEND_WIDTH + 1):
        reward = (i - LEGEND_WIDTH / 2) / LEGEND_WIDTH * 2 * page.scale
        color = reward_color(reward, page.scale)
        page.fields.append(Field(x + i, y, 1, color, "none"))

    page.add_text(low, MARGIN, y, PAGE_WIDTH)
    return page.add_text(f"{high} nats", x + LEGEND_WIDTH + 5, y, PAGE_WIDTH)


def add_panel(page: Page, panel: Panel, y: float) -> float:
    """Add the end of the prompt, and below it the completions side by side; returns the y of the next paragraph."""
    prompt = " ".join(panel.prompt.split())
    if len(prompt) > PROMPT_CHARACTERS:
        prompt = "…" + prompt[-PROMPT_CHARACTERS:]
    y = page.add_text(f"Row {panel.number}", MARGIN, y, CONTENT_WIDTH, "black")
    y = page.add_text(prompt, MARGIN, y, CONTENT_WIDTH)

    completions = list(panel.completions.items())
    num_columns = min(COLUMNS, len(completions))
    width = (CONTENT_WIDTH - COLUMN_GAP * (num_columns - 1)) / num_columns
    for start in range(0, len(completions), num_columns):
        bottoms = []
        for column, (title, pieces) in enumerate(completions[start : start + num_columns]):
            x = MARGIN + column * (width + COLUMN_GAP)
            bottom = page.add_text(title, x, y + LINE_HEIGHT / 2, width)
            bottom = page.add_paragraph(pieces, x, bottom, width)
            bottom = page.add_text(return_text(pieces), x, bottom + LINE_HEIGHT / 4, width)
            bottoms.append(bottom)
        y = max(bottoms)
    return y
