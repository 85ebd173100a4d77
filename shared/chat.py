"""Chat messages → texts, by the tokenizer's chat template: a prompt, and each turn of the assistant that follows.

A completion may hold several turns, with messages of the user or of tools between them. With the ChatML template:

    <|im_start|>user⏎a?<|im_end|>⏎<|im_start|>assistant⏎    yes       <|im_end|>
    └─────────────── prompt ──────────────────────────┘    └ answer ┘ └ end ───┘
    ⏎<|im_start|>user⏎and b?<|im_end|>⏎<|im_start|>assistant⏎    yes b     <|im_end|>    ⏎
    └──────────────── context ───────────────────────────────┘   └ answer ┘ └ end ───┘   left out

A model writes answers and their ends, and nothing else. Most templates do not mark them. So the contexts are found in
the same conversation with placeholders as answers.
"""

import os
import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from shared import UserError, first_line
from shared.control_strings import ControlStrings
from shared.rows import Counts, Dropped, Messages, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "\U000f0001"
LOST_THOUGHTS = "thoughts left out by the chat template"  # counts of rows in the report
NO_TURNS = "the chat template does not show where a turn begins and ends"
NO_PREFIX = "the chat template renders the prompt differently once an answer follows"


@dataclass(frozen=True)
class Turn:
    """An answer of the assistant, and the text between it and the turn before."""

    answer: str
    end: str  # the special token that ends the turn; empty if it was cut off before it
    context: str = ""
    is_counted: bool = True  # otherwise nothing is learnt from it


def _placeholder(number: int) -> str:
    return f"{PLACEHOLDER}{number};"


class ChatTemplate:
    """A tokenizer's chat template. Texts go in as they are and come out protected."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", control_strings: ControlStrings, counts: Counts, today: date
    ):
        self.tokenizer = tokenizer
        self.control_strings = control_strings
        self.counts = counts
        self.today = today  # some templates write it
        self.names = set(re.findall(r"\w+", str(tokenizer.chat_template)))
        self.shown_roles: set[str] = set()  # of messages whose text the template is known to show

    # ------------------------------------------------------------ what is known of the template

    @cached_property
    def turn_ends(self) -> tuple[str, str]:
        """The special tokens that end an earlier turn of the assistant, and the last one; empty if there is none."""
        user = {"role": "user", "content": "a"}
        answers = [{"role": "assistant", "content": _placeholder(number)} for number in (1, 2)]
        try:
            text = self.apply([user, answers[0], user, answers[1]])
        except Dropped:
            return "", ""
        _, _, after_first = text.partition(_placeholder(1))
        _, _, after_last = text.partition(_placeholder(2))
        return self.control_strings.first_in(after_first), self.control_strings.first_in(after_last)

    @cached_property
    def opening(self) -> str:
        """What ends a prompt, but is left out once an answer follows; a model of thoughts begins with <think>, say."""
        user = {"role": "user", "content": _placeholder(1)}
        try:
            prompt = self.apply([user], add_generation_prompt=True)
            whole = self.apply([user, {"role": "assistant", "content": _placeholder(2)}])
        except Dropped:
            return ""
        common = os.path.commonprefix([prompt, whole])
        if _placeholder(1) not in common:
            return ""
        return prompt.removeprefix(common)

    # ------------------------------------------------------------ conversations

    def prompt(self, messages: Messages, tools: list[dict] | None) -> str:
        """The text that a model goes on from."""
        text = self.apply(messages, tools, add_generation_prompt=True)
        self._check_shown(messages, "user")
        return text

    def turns(
        self, before: str, prompt: Messages, completion: Messages, tools: list[dict] | None, notes: set[str]
    ) -> list[Turn]:
        """The turns of a completion, which follow the text `before`, that of its prompt without the opening.

        What is to be said of the row is added to `notes`. Raises Dropped if the template changes the prompt, or does
        not show where a turn ends.
        """
        conversation = prompt + completion
        whole = self.apply(conversation, tools)
        self._check_shown(conversation, "assistant")
        if not whole.startswith(before):
            raise Dropped(NO_PREFIX)
        if any(self._loses_thoughts(message, whole) for message in conversation):
            notes.add(LOST_THOUGHTS)

        rest = whole.removeprefix(before)
        turns = []
        context = ""
        *earlier, last = [message for message in completion if message["role"] == "assistant"]
        contexts = self._contexts(prompt, completion, tools)
        for message, (end, next_context) in zip(earlier, contexts, strict=True):
            answer, found, rest = rest.partition(end + next_context)
            if not found:
                raise Dropped(NO_TURNS)
            turns.append(Turn(answer, end, context, _is_counted(message)))
            context = next_context

        answer, end = self._split_last(rest)
        turns.append(Turn(answer, end, context, _is_counted(last)))
        return turns

    def _contexts(self, prompt: Messages, completion: Messages, tools: list[dict] | None) -> list[tuple[str, str]]:
        """The end of each turn but the last, and the context between it and the next one."""
        indices = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
        if len(indices) == 1:
            return []

        skeleton = list(completion)
        for i in indices:
            skeleton[i] = {**completion[i], "content": _placeholder(i)}
        whole = self.apply(prompt + skeleton, tools)

        contexts = []
        for i, next_i in pairwise(indices):
            until_next = self.apply(prompt + skeleton[:next_i], tools, add_generation_prompt=True)
            until_next = until_next.removesuffix(self.opening)
            _, found, after = until_next.partition(_placeholder(i))
            end = self._first_end(after)
            if not whole.startswith(until_next) or not found or not end:
                raise Dropped(NO_TURNS)
            _, _, context = after.partition(end)
            contexts.append((end, context))
        return contexts

    def _first_end(self, text: str) -> str:
        """The turn end that comes first in a text, or an empty text."""
        ends = [end for end in self.turn_ends if end and end in text]
        return min(ends, key=text.index, default="")

    def _split_last(self, text: str) -> tuple[str, str]:
        """The last answer and its end. The template, not the model, writes what follows."""
        _, end = self.turn_ends
        if not end:  # then a completion ends as that of a plain prompt
            return text, cast(str, self.tokenizer.eos_token)
        answer, found, _ = text.rpartition(end)
        if not found:
            raise Dropped(NO_TURNS)
        return answer, end

    def _loses_thoughts(self, message: dict, whole: str) -> bool:
        if message["role"] != "assistant":
            return False
        thoughts, closed, _ = message["content"].partition("</think>")
        if not closed:
            thoughts = message.get("reasoning_content") or ""
        thoughts = thoughts.removeprefix("<think>").strip()
        return self.control_strings.protect(thoughts) not in whole

    # ------------------------------------------------------------ the template

    def apply(self, messages: Messages, tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """Render messages. Raises Dropped if the template refuses them, or leaves out one of a role of its own."""
        protected = [self._protect(message) for message in messages]
        if tools and "tools" not in self.names:
            self.counts.unused.add("tools")
        try:
            text = self.tokenizer.apply_chat_template(
                protected,
                tools=self.control_strings.protect_all(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.today.strftime,
            )
        except Exception as error:  # templates raise what their authors chose (jinja2's TemplateError)
            raise Dropped(f"refused by the chat template ({first_line(error)})") from None
        for message in protected:
            is_known = message["role"] in ("system", "user", "assistant")
            if not is_known and message["content"].strip() not in text:
                raise Dropped(f"the chat template leaves out the role {message['role']!r}")
        return cast(str, text)

    def _protect(self, message: dict) -> dict:
        """A message whose texts are protected; templates compare roles, which are names."""
        for name, value in message.items():
            is_weight = name == "weight" and value in (0, 1)
            is_known = name in self.names or name in ("role", "content") or is_weight
            if not is_known and not is_empty(value):
                self.counts.unused.add(f"{name} of messages")
        return self.control_strings.protect_all(message)

    def _check_shown(self, messages: Messages, role: str) -> None:
        """Raises UserError if the template renders the same whatever the last message of a role says.

        Some templates expect a list of parts, and leave out a text. It is enough to see this once.
        """
        indices = [i for i, message in enumerate(messages) if message["role"] == role]
        if role in self.shown_roles or not indices:
            return

        changed = [dict(message) for message in messages]
        changed[indices[-1]]["content"] += "x"
        if self.apply(changed) == self.apply(messages):
            raise UserError(f"the chat template shows none of the text of role {role!r}; use one made for texts")
        self.shown_roles.add(role)


def _is_counted(message: dict) -> bool:
    return message.get("weight") != 0
