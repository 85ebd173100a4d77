"""Chat messages → texts, by the tokenizer's chat template: a prompt, and each turn of the assistant that follows.

A completion may hold several turns, with messages of the user or of tools between them. With the ChatML template:

    <|im_start|>user⏎a?<|im_end|>⏎<|im_start|>assistant⏎    yes       <|im_end|>
    └─────────────── prompt ──────────────────────────┘    └ answer ┘ └ end ───┘
    ⏎<|im_start|>user⏎and b?<|im_end|>⏎<|im_start|>assistant⏎    yes b     <|im_end|>    ⏎
    └──────────────── context ───────────────────────────────┘   └ answer ┘ └ end ───┘   left out

A model writes answers and their ends, and nothing else. Most templates do not mark them. So the contexts are found in
the same conversation with placeholders as answers.
"""

import json
import os
import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

from shared import UserError, first_line
from shared.control_strings import ControlStrings
from shared.rows import Counts, Dropped, Messages, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "\U000f0001"
DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdeFHIjmMpSuUwWxXyY"))  # of strftime
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields of messages
LOST_THOUGHTS = "thoughts left out by the chat template"  # counts of rows in the report
LOST_CALLS = "calls left out by the chat template"
NO_TURNS = "the chat template does not show where a turn begins and ends"
NO_PREFIX = "the chat template renders the prompt differently once an answer follows"


@dataclass(frozen=True)
class Turn:
    """An answer of the assistant, and the text between it and the turn before."""

    answer: str
    end: str  # the special token that ends the turn; empty if it was cut off before it
    context: str = ""
    is_counted: bool = True  # otherwise nothing is learnt from it


class TurnEnds(NamedTuple):
    """The special tokens that end the assistant's turns; empty if the template has none."""

    earlier: str
    last: str
    is_last_written: bool  # otherwise it is the token with which the next turn begins


@dataclass(frozen=True)
class Outline:
    """What a template writes around the answers of a completion, whatever they say."""

    opening: str  # what ends the prompt, but is left out once these turns follow; for some thinking models <think>
    contexts: list[tuple[str, str]]  # the end of each turn but the last, and the context between it and the next one


def _placeholder(number: int) -> str:
    return f"{PLACEHOLDER}{number};"


USER = {"role": "user", "content": _placeholder(0)}
ANSWERS = [{"role": "assistant", "content": _placeholder(1)}, USER, {"role": "assistant", "content": _placeholder(2)}]


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

    # ------------------------------------------------------------ what the template writes

    @cached_property
    def turn_ends(self) -> TurnEnds:
        """What ends an earlier turn of the assistant, and the last one."""
        try:
            text = self.apply([USER, *ANSWERS])
        except Dropped:
            return TurnEnds("", "", False)
        _, _, after_first = text.partition(_placeholder(1))
        _, _, after_last = text.partition(_placeholder(2))
        in_between = self._first_run(after_first)
        at_the_end = self._first_run(after_last)

        in_both = [name for name in at_the_end if name in in_between]  # without an EOS of the whole conversation
        last = (in_both or at_the_end or in_between[:1] or [""])[-1]
        earlier = last
        if last not in in_between:
            earlier = (in_between or [""])[0]
        return TurnEnds(earlier, last, bool(at_the_end))

    def _first_run(self, text: str) -> list[str]:
        """The first special tokens of a rendered text that follow each other; a BOS begins something else."""
        run = []
        for name in self.control_strings.first_run_in(text):
            if name == self.tokenizer.bos_token:
                break
            run.append(name)
        return run

    @cached_property
    def generation_prompt(self) -> str:
        """The text that asks for an answer."""
        asking = self.apply([USER], add_generation_prompt=True)
        return asking.removeprefix(self.apply([USER]))

    @cached_property
    def _outline_of_one_turn(self) -> Outline:
        try:
            return Outline(self._left_out([USER], ANSWERS[:1], None), [])
        except Dropped:  # by a template that needs more than one message of the user, say
            return Outline("", [])

    def outline(self, prompt: Messages, completion: Messages, tools: list[dict] | None) -> Outline:
        """The outline of a conversation, found by placeholders in the place of the assistant's texts.

        Raises Dropped if the template changes more of a prompt than its end, or does not show where a turn ends.
        """
        indices = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
        if len(indices) == 1:
            return self._outline_of_one_turn

        self._check_order(prompt, completion, tools)
        skeleton = list(completion)
        for i in indices:
            skeleton[i] = {**completion[i], "content": _placeholder(i)}
        contexts = []
        for i, next_i in pairwise(indices):
            before = prompt + skeleton[:next_i]
            until_next = self.apply(before, tools, add_generation_prompt=True)
            until_next = until_next.removesuffix(self._left_out(before, skeleton[next_i:], tools))
            _, _, after = until_next.partition(_placeholder(i))
            _, _, at_the_end = self.apply(prompt + skeleton[: i + 1], tools).partition(_placeholder(i))
            end = self._turn_end(at_the_end, after)
            contexts.append((end, after.partition(end)[2]))
        return Outline(self._left_out(prompt, skeleton, tools), contexts)

    def _left_out(self, prompt: Messages, completion: Messages, tools: list[dict] | None) -> str:
        """The end of a prompt that a completion does not follow."""
        asking = self.apply(prompt, tools, add_generation_prompt=True)
        whole = self.apply(prompt + completion, tools)
        common = os.path.commonprefix([asking, whole])
        left_out = asking.removeprefix(common)
        if left_out == asking or not self.generation_prompt.endswith(left_out):
            raise Dropped(NO_PREFIX)
        return left_out

    def _turn_end(self, at_the_end: str, after: str) -> str:
        """The end of a turn, from what a template writes behind its answer if nothing follows, and if something does.

        Raises Dropped if there is none.
        """
        ends = [self.turn_ends.last, self.turn_ends.earlier]
        behind = at_the_end
        if self.turn_ends.is_last_written:
            behind, _, _ = at_the_end.rpartition(self.turn_ends.last)
        else:  # the token with which the next message begins
            ends = self._first_run(after)[:1]
        for end in ends:
            if end and after.startswith(behind + end):
                return end
        raise Dropped(NO_TURNS)

    def _check_order(self, prompt: Messages, completion: Messages, tools: list[dict] | None) -> None:
        """Raises Dropped if the template writes a message before the end of an earlier one."""
        marked = [{**message, "content": _placeholder(i)} for i, message in enumerate(completion)]
        text = self.apply(prompt + marked, tools)
        places = [text.index(_placeholder(i)) for i in range(len(marked)) if _placeholder(i) in text]
        if places != sorted(places):
            raise Dropped(NO_TURNS)

    # ------------------------------------------------------------ conversations

    def prompt(self, messages: Messages, tools: list[dict] | None) -> str:
        """The text that a model goes on from."""
        text = self.apply(messages, tools, add_generation_prompt=True)
        self._check_shown(messages, "user")
        return text

    def turns(
        self, before: str, conversation: Messages, tools: list[dict] | None, outline: Outline, num_turns: int
    ) -> list[Turn]:
        """The last turns of a conversation, which follow the text `before`.

        Raises Dropped if the answers themselves make the template change the prompt or the contexts.
        """
        whole = self.apply(conversation, tools)
        self._check_shown(conversation, "assistant")
        if not whole.startswith(before):
            raise Dropped(NO_PREFIX)

        rest = whole.removeprefix(before)
        turns = []
        context = ""
        answers = [message for message in conversation if message["role"] == "assistant"]
        *earlier, last = answers[-num_turns:]
        for message, (end, next_context) in zip(earlier, outline.contexts, strict=True):
            answer, separator, rest = rest.partition(end + next_context)
            if not separator:
                raise Dropped(NO_TURNS)
            turns.append(Turn(answer, end, context, _is_counted(message)))
            context = next_context

        answer, end = self._split_last(rest)
        turns.append(Turn(answer, end, context, _is_counted(last)))
        return turns

    def _split_last(self, text: str) -> tuple[str, str]:
        """The last answer and its end. The template, not the model, writes what follows."""
        end = self.turn_ends.last
        if not self.turn_ends.is_last_written:  # if there is none, a completion ends as that of a plain prompt
            return text, end or cast(str, self.tokenizer.eos_token)
        answer, separator, _ = text.rpartition(end)
        if not separator:
            raise Dropped(NO_TURNS)
        return answer, end

    def losses(self, conversation: Messages, tools: list[dict] | None) -> set[str]:
        """What the template leaves out of answers: calls, and thoughts before `</think>` or in a field of their own."""
        reasons = set()
        for reason, mark in ((LOST_THOUGHTS, _mark_thoughts), (LOST_CALLS, _mark_call)):
            marked = list(conversation)
            for i, message in enumerate(conversation):
                if message["role"] == "assistant":
                    marked[i] = mark(message, _placeholder(i))
            indices = [i for i, message in enumerate(marked) if message is not conversation[i]]
            text = ""
            if indices:
                text = self.apply(marked, tools)
            if not all(_placeholder(i) in text for i in indices):
                reasons.add(reason)
        return reasons

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
                chat_template=self._dated(self.tokenizer.get_chat_template(tools=tools)),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # templates raise what their authors chose (jinja2's TemplateError)
            raise Dropped(f"refused by the chat template ({first_line(error)})") from None
        for message in protected:
            is_known = message["role"] in ("system", "user", "assistant")
            if not is_known and message["content"].strip() not in text:
                raise Dropped(f"the chat template leaves out the role {message['role']!r}")
        return cast(str, text)

    def _dated(self, template: str) -> str:
        """The template with a macro of its own in the place of the function that asks for the time."""
        if "strftime_now" not in template:
            return template
        filters = [f" | replace('{code}', {json.dumps(self.today.strftime(code))})" for code in DATE_CODES]
        return f"{{% macro strftime_now(format) %}}{{{{ format{''.join(filters)} }}}}{{% endmacro %}}{template}"

    def _protect(self, message: dict) -> dict:
        """A message whose texts are protected; templates compare roles, which are names."""
        for name, value in message.items():
            is_weight = name == "weight" and value in (0, 1)
            is_known = name in self.names or name in ("role", "content") or is_weight
            if name in THOUGHTS:  # transformers gives templates each under the names of the others
                is_known = not self.names.isdisjoint(THOUGHTS)
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


def _mark_thoughts(message: dict, placeholder: str) -> dict:
    """A message with a placeholder for its thoughts, if it has any."""
    thoughts, closed, answer = message["content"].partition("</think>")
    _, opening, inside = thoughts.rpartition("<think>")
    if closed and inside.strip():
        return {**message, "content": f"{opening}{placeholder}{closed}{answer}"}
    for name in THOUGHTS:
        if not is_empty(message.get(name)):
            return {**message, name: placeholder}
    return message


def _mark_call(message: dict, placeholder: str) -> dict:
    """A message with a placeholder for the name of the first function that it calls, if it calls any."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls or not isinstance(calls[0], dict):
        return message
    call = calls[0]
    if isinstance(call.get("function"), dict):
        call = {**call, "function": {**call["function"], "name": placeholder}}
    else:
        call = {**call, "name": placeholder}
    return {**message, "tool_calls": [call, *calls[1:]]}


def _is_counted(message: dict) -> bool:
    return message.get("weight") != 0
