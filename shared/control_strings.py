"""Strings of special tokens inside texts. They become plain text, and never the tokens.

A text is protected before a chat template or a tokenizer sees it: a mark, which neither of them interprets, stands in
place of each such string.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\U000f0000"


class ControlStrings:
    """The strings of a tokenizer's special tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        added = tokenizer.added_tokens_decoder
        names = {i: token.content for i, token in added.items() if token.special}
        self.ids = names.keys() - {tokenizer.unk_token_id}
        # longest first, so that no name is matched inside a longer one
        self.names = [MARK, *sorted(names.values(), key=len, reverse=True)]
        self.pattern = re.compile("|".join(map(re.escape, self.names)))

    def protect(self, text: str) -> str:
        """The text with marks. If </s> is `names[2]`, then "a</s>b" becomes "a" + MARK + "2;" + "b"."""
        return self.pattern.sub(self._mark, text)

    def _mark(self, match: re.Match) -> str:
        number = self.names.index(match[0])
        return f"{MARK}{number};"

    def protect_all(self, value: Any) -> Any:
        """A value of JSON with marks in all its texts but the names of fields."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, list):
            return [self.protect_all(part) for part in value]
        if isinstance(value, dict):
            return {name: self.protect_all(part) for name, part in value.items()}
        return value

    def split(self, protected: str) -> tuple[str, list[tuple[str, str]]]:
        """The text up to the first mark, and for each mark what it stands for and the text up to the next one."""
        head, *marked = protected.split(MARK)
        pieces = []
        for piece in marked:
            number, _, rest = piece.partition(";")
            pieces.append((self.names[int(number)], rest))
        return head, pieces

    def occur_in(self, protected: str) -> bool:
        """Whether a protected text had the string of a special token."""
        _, pieces = self.split(protected)
        return any(name != MARK for name, _ in pieces)

    def first_in(self, rendered: str) -> str:
        """The first special token that a chat template has written, or an empty text."""
        match = self.pattern.search(rendered.replace(MARK, ""))
        return match[0] if match else ""
