"""What the two pictures of a heatmap, HTML and PNG, have in common: pieces of text, their colours and their numbers."""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from scripts.lab import plots

# Characters that a reader would not see or could not count. A single blank between two words needs no mark.
HIDDEN = re.compile(r"[\x00-\x1f\x7f]|[^\S ]| (?=\s|$)")
MARKS = {"\n": "↵", "\t": "⇥"}
STRONGEST_OPACITY = 0.7  # at the end of the scale: text stays readable on it


@dataclass
class Piece:
    """The text of one token, or of several tokens that form characters only together."""

    text: str
    rewards: list[float]  # r(s_t, a_t) of its tokens, nats; none for context
    special: bool

    @property
    def reward(self) -> float:
        """The sum over its tokens, nats."""
        return math.fsum(self.rewards)


@dataclass
class Panel:
    """One row of the file."""

    number: int
    prompt: str
    completions: dict[str, list[Piece]]  # by their titles, in the order of the row


class Color(NamedTuple):
    """Red, green and blue from 0 to 255, and the opacity from 0 to 1."""

    red: int
    green: int
    blue: int
    opacity: float


def reward_color(reward: float, scale: float) -> Color:
    """Blue for a positive reward, orange for a negative one. `scale` is the reward of the strongest colour."""
    hexadecimal = plots.ORANGE
    if reward > 0:
        hexadecimal = plots.BLUE
    red, green, blue = bytes.fromhex(hexadecimal.removeprefix("#"))

    opacity = STRONGEST_OPACITY * abs(reward) / scale
    return Color(red, green, blue, round(opacity, 3))


def mark(char: str) -> str:
    """What stands for a hidden character: an arrow, ^ and a letter for a control character, a dot for a blank."""
    if char in MARKS:
        return MARKS[char]
    if unicodedata.category(char) == "Cc":
        letter = chr(ord(char) ^ 64)
        return f"^{letter}"
    return "·"


def nats_text(value: float) -> str:
    """Four digits with a sign."""
    return f"{value:+.4g}".replace("-", "−")


def return_text(pieces: list[Piece]) -> str:
    """The sum of a completion's rewards, and its number of tokens."""
    total = math.fsum(piece.reward for piece in pieces)
    num_tokens = sum(len(piece.rewards) for piece in pieces)
    return f"Σ r = {nats_text(total)} nats, {num_tokens} tokens"
