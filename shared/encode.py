"""Example → token ids: the one rule, for training, sampling, scoring and evaluating.

1. Render: prompt and completions become texts, through the chat template or as they are. A completion that a policy
   drew follows its prompt as it is.
2. Tokenise: the prompt alone, with the tokenizer's special tokens unless a template has written its own. A completion
   has the ids that stand behind the prompt's when both are encoded at once. If the prompt's ids change there, the
   completion is encoded apart, and so are the others of its row. Ids that a policy drew are taken as they are.
3. End: a turn ends with the EOS, or with the token that the template writes, unless it was cut off before it.
4. Complete the prompt: the first token of running text is its prompt, and an empty prompt becomes the BOS.

The tokens of the assistant and the ends of its turns are counted. What stands between two turns is context.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, cast

from shared import UserError
from shared.chat import ChatTemplate, Outline, Turn
from shared.control_strings import ControlStrings
from shared.rows import Completion, Counts, Dropped, Example, Messages, Prompt, UserTurn, assistant_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "\n"  # stands before a text that goes on from another
# Counts of rows in the report.
CONTROL_STRINGS = "control strings as text"
PLAIN = "plain text without the chat template"
APART = "completions encoded apart from their prompt"
OTHER_IDS = "drawn ids other than those of their text"
FOREIGN_IDS = "drawn ids of another vocabulary not used"

TokenIds = list[int]
Pieces = list[tuple[str, str]]  # of a protected text, as `ControlStrings.split` gives them
Request = tuple[str, bool]  # a protected text, and whether it gets the special tokens that the tokenizer adds


@dataclass
class RenderedExample:
    """An example as protected texts."""

    example: Example
    prompt: str
    completions: list[list[Turn]]
    notes: set[str]


@dataclass
class EncodedCompletion:
    """A completion as token ids with its ends, and which of them count."""

    ids: TokenIds
    is_counted: list[bool]
    is_empty: bool = False  # whether it has ends alone

    def truncated(self, room: int) -> "EncodedCompletion":
        """Its first `room` tokens, without context that nothing counted follows."""
        length = min(room, len(self.ids))
        while length > 0 and not self.is_counted[length - 1]:
            length -= 1
        return EncodedCompletion(self.ids[:length], self.is_counted[:length], self.is_empty)


@dataclass
class EncodedExample:
    """An example as token ids: a prompt of at least one token, and whole completions."""

    example: Example
    prompt: TokenIds
    completions: list[EncodedCompletion]
    notes: set[str] = field(default_factory=set)  # what is counted if the row is used


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end a completion, ascending: the EOS, and the turn end of the chat template."""
    return Encoder(tokenizer).end_ids


def completion_text(tokenizer: "PreTrainedTokenizerBase", prompt: TokenIds, ids: TokenIds) -> str:
    """The text of a completion without special tokens, as it stands behind its prompt.

    Alone, some tokenizers leave out its first blank.
    """
    before, together, alone = tokenizer.batch_decode(
        [prompt, prompt + ids, ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if together.startswith(before):
        return together.removeprefix(before)
    return alone


class Encoder:
    """Texts and messages → token ids. A special token's string inside a text becomes plain-text tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", counts: Counts | None = None, today: date | None = None):
        self.tokenizer = tokenizer
        self.counts = counts or Counts()
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.control_strings = ControlStrings(tokenizer)
        self.template = ChatTemplate(tokenizer, self.control_strings, self.counts, today or date.today())

    @cached_property
    def end_ids(self) -> list[int]:
        """As the function of that name."""
        ends = {self.tokenizer.eos_token}
        if self.tokenizer.chat_template:
            ends.add(self.template.turn_ends.last)
        return sorted(self.tokenizer.convert_tokens_to_ids(end) for end in ends if end)

    @cached_property
    def vocabulary(self) -> str:
        """A hash of what each id means."""
        entries = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]

    def encode(self, examples: Iterable[Example], num_completions: int | None = None) -> Iterator[EncodedExample]:
        """Encode a batch of examples, each with its first `num_completions` completions, by default all.

        An example that cannot be used adds its reason to `counts.dropped`. Raises UserError if the chat template does
        not fit the examples.
        """
        batch = self._render_batch(examples, num_completions)
        ids_of = self._tokenise_batch(batch)
        apart = [rendered for rendered in batch if not self._continues_prompts(rendered, ids_of)]
        ids_apart = self._tokenise_apart(apart)

        for rendered in batch:
            encoded = self._assemble(rendered, ids_of, ids_apart)
            if encoded.prompt:
                yield encoded
            else:
                self.counts.dropped["empty prompt"] += 1

    # ------------------------------------------------------------ render

    def _render_batch(self, examples: Iterable[Example], num_completions: int | None) -> list[RenderedExample]:
        batch = []
        for example in examples:
            try:
                rendered = self.render(example, num_completions)
            except Dropped as reason:
                self.counts.dropped[str(reason)] += 1
                continue
            batch.append(rendered)
        return batch

    def render(self, example: Example, num_completions: int | None = None) -> RenderedExample:
        """The protected texts of an example's prompt and its first `num_completions` completions.

        Raises Dropped if the chat template refuses the example, or changes its prompt once an answer follows.
        """
        completions = example.completions[:num_completions]
        if self.is_chat(example.prompt):
            rendered = self._render_chat(example, completions)
        else:
            rendered = self._render_plain(example, completions)

        texts = [rendered.prompt]
        for turns in rendered.completions:
            texts += [turn.context + turn.answer for turn in turns]
        if any(map(self.control_strings.occur_in, texts)):
            rendered.notes.add(CONTROL_STRINGS)
        return rendered

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether the prompt goes through the chat template, which writes its own special tokens."""
        if isinstance(prompt, UserTurn):
            return bool(self.tokenizer.chat_template)
        return isinstance(prompt, list)

    def _render_plain(self, example: Example, completions: list[Completion]) -> RenderedExample:
        _check_has_no_context(example)
        if example.tools:
            self.counts.unused.add("tools")
        notes = set(example.notes)
        if self.tokenizer.chat_template:
            notes.add(PLAIN)

        prompt = example.prompt or ""
        if isinstance(prompt, UserTurn):
            prompt = prompt.text + "\n\n"
        turns = []
        for completion in completions:
            text = cast(str, completion.text)
            turns.append([self._drawn_turn(text, completion.is_finished, self.tokenizer.eos_token)])
        return RenderedExample(example, self.control_strings.protect(cast(str, prompt)), turns, notes)

    def _render_chat(self, example: Example, completions: list[Completion]) -> RenderedExample:
        if not self.tokenizer.chat_template:
            raise UserError("the rows are chat messages, but the tokenizer has no chat template; use one that has")
        prompt = _messages(example.prompt)
        before = self.template.prompt(prompt, example.tools)
        rendered = RenderedExample(example, before, [], set(example.notes))

        outlines = {}
        for i, completion in enumerate(completions):
            if not completion.is_drawn:
                outlines[i] = self.template.outline(prompt, assistant_messages(completion.text), example.tools)
        opening = max((outline.opening for outline in outlines.values()), key=len, default="")
        if opening:
            rendered.prompt = before.removesuffix(opening)
            rendered.notes.add(f"prompts without the {opening!r} of the chat template")
            if len(outlines) < len(completions):
                raise Dropped(f"drawn completions follow the {opening!r} of the chat template, the others do not")

        for i, completion in enumerate(completions):
            if i in outlines:
                rendered.completions.append(self._turns(rendered, completion, outlines[i]))
            else:
                rendered.completions.append(self._drawn_turns(completion))
        return rendered

    def _turns(self, rendered: RenderedExample, completion: Completion, outline: Outline) -> list[Turn]:
        example = rendered.example
        conversation = _messages(example.prompt) + assistant_messages(completion.text)
        rendered.notes |= self.template.losses(conversation, example.tools)
        num_turns = len(outline.contexts) + 1
        return self.template.turns(rendered.prompt, conversation, example.tools, outline, num_turns)

    def _drawn_turns(self, completion: Completion) -> list[Turn]:
        """What a policy wrote after the prompt. A template may rewrite a text, and put thoughts before it."""
        (message,) = assistant_messages(completion.text)
        end = self.template.turn_ends.last or self.tokenizer.eos_token
        return [self._drawn_turn(message["content"], completion.is_finished, end)]

    def _drawn_turn(self, text: str, is_finished: bool, end: str) -> Turn:
        return Turn(self.control_strings.protect(text), end if is_finished else "")

    # ------------------------------------------------------------ tokenise

    def _tokenise_batch(self, batch: list[RenderedExample]) -> dict[Request, TokenIds]:
        """The ids of all texts of a batch, each encoded once."""
        requests: dict[Request, None] = {}  # a dictionary keeps their order
        for rendered in batch:
            requests[self._prompt_request(rendered)] = None
            for before, together in self._pairs(rendered):
                requests[before] = None
                requests[together] = None

        texts = [text for text, _ in requests]
        with_specials = [special for _, special in requests]
        return dict(zip(requests, self.encode_texts(texts, with_specials), strict=True))

    def _prompt_request(self, rendered: RenderedExample) -> Request:
        # a chat template has written its own special tokens
        return rendered.prompt, not self.is_chat(rendered.example.prompt)

    def _pairs(self, rendered: RenderedExample) -> Iterator[tuple[Request, Request]]:
        """For each turn, the text before its answer, and the same with the answer.

        A turn's end, which is one token, begins the text before the next answer.
        """
        prompt, with_specials = self._prompt_request(rendered)
        for turns in rendered.completions:
            before = (prompt, with_specials)
            for i, turn in enumerate(turns):
                if i > 0:
                    before = (turns[i - 1].end + turn.context, False)
                yield before, (before[0] + turn.answer, before[1])

    def _continues_prompts(self, rendered: RenderedExample, ids_of: dict[Request, TokenIds]) -> bool:
        """Whether the ids before each answer are the same when the answer follows."""
        if rendered.example.prompt is None:
            return True
        for before, together in self._pairs(rendered):
            length = len(ids_of[before])
            if ids_of[together][:length] != ids_of[before]:
                return False
        return True

    def _tokenise_apart(self, batch: list[RenderedExample]) -> dict[int, list[TokenIds]]:
        """For each example, by its identity: the ids of its answers, turn by turn, encoded without what is before."""
        answers = []
        for rendered in batch:
            answers += [turn.answer for turns in rendered.completions for turn in turns]
        ids = iter(self._encode_inside(answers))

        ids_apart = {}
        for rendered in batch:
            ids_apart[id(rendered)] = [next(ids) for turns in rendered.completions for _ in turns]
        return ids_apart

    # ------------------------------------------------------------ assemble

    def _assemble(
        self, rendered: RenderedExample, ids_of: dict[Request, TokenIds], ids_apart: dict[int, list[TokenIds]]
    ) -> EncodedExample:
        example = rendered.example
        prompt = ids_of[self._prompt_request(rendered)]
        answers = ids_apart.get(id(rendered))
        if answers is not None:
            rendered.notes.add(APART)
        else:
            answers = [ids_of[together][len(ids_of[before]) :] for before, together in self._pairs(rendered)]
        if example.prompt is None:
            prompt, answers = self._split_running_text(rendered, ids_of)
        if not prompt and self.bos_id is not None:
            prompt = [self.bos_id]

        completions = []
        remaining = iter(answers)
        for completion, turns in zip(example.completions, rendered.completions, strict=False):
            encoded = self._join_turns(turns, [next(remaining) for _ in turns], ids_of)
            completions.append(self._as_drawn(completion, encoded, rendered.notes))
        return EncodedExample(example, prompt, completions, rendered.notes)

    def _split_running_text(
        self, rendered: RenderedExample, ids_of: dict[Request, TokenIds]
    ) -> tuple[TokenIds, list[TokenIds]]:
        """The first token of the text is context, from which the second is predicted."""
        prompt: TokenIds = []
        answers = []
        for i, (_, together) in enumerate(self._pairs(rendered)):
            ids = ids_of[together]
            if i == 0:
                prompt = ids[:1]
                ids = ids[1:]
            else:  # samples beside a running text
                (ids,) = self._encode_inside([together[0]])
            answers.append(ids)
        return prompt, answers

    def _join_turns(
        self, turns: list[Turn], answers: list[TokenIds], ids_of: dict[Request, TokenIds]
    ) -> EncodedCompletion:
        ids: TokenIds = []
        is_counted: list[bool] = []
        for i, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
            if i > 0:
                _, *context = ids_of[turns[i - 1].end + turn.context, False]
                ids += context
                is_counted += [False] * len(context)
            if turn.end:
                answer = [*answer, self.tokenizer.convert_tokens_to_ids(turn.end)]
            ids += answer
            is_counted += [turn.is_counted] * len(answer)
        return EncodedCompletion(ids, is_counted, is_empty=not any(answers))

    def _as_drawn(self, completion: Completion, encoded: EncodedCompletion, notes: set[str]) -> EncodedCompletion:
        """The ids that a policy drew, where the row has them and they mean the same tokens; else those of the text."""
        if completion.ids is None:
            return encoded
        if completion.ids_of != self.vocabulary:
            notes.add(FOREIGN_IDS)
            return encoded
        if completion.ids != encoded.ids:
            notes.add(OTHER_IDS)
        return EncodedCompletion(completion.ids, [True] * len(completion.ids), encoded.is_empty)

    # ------------------------------------------------------------ texts

    def encode_texts(self, texts: list[str], with_specials: list[bool]) -> list[TokenIds]:
        """Token ids of protected texts, each with or without the special tokens that the tokenizer adds."""
        heads, pieces = self._split_all(texts)
        return self._with_pieces(self._encode_heads(heads, with_specials), pieces)

    def _encode_inside(self, texts: list[str]) -> list[TokenIds]:
        """Token ids of protected texts that go on from others."""
        heads, pieces = self._split_all(texts)
        return self._with_pieces(self._tokenise_inside(heads), pieces)

    def _split_all(self, texts: list[str]) -> tuple[list[str], list[Pieces]]:
        heads = []
        pieces_of_texts = []
        for text in texts:
            head, pieces = self.control_strings.split(text)
            heads.append(head)
            pieces_of_texts.append(pieces)
        return heads, pieces_of_texts

    def _with_pieces(self, heads: list[TokenIds], pieces_of_texts: list[Pieces]) -> list[TokenIds]:
        for ids, pieces in zip(heads, pieces_of_texts, strict=True):
            for name, rest in pieces:
                ids += self._encode_as_plain_text(name)
                ids += self._tokenise_inside([rest])[0]
        return heads

    def _encode_heads(self, texts: list[str], with_specials: list[bool]) -> list[TokenIds]:
        encoded: list[TokenIds] = [[] for _ in texts]
        for special in (False, True):  # each in one call, which is parallel inside `tokenizers`
            indices = [i for i, value in enumerate(with_specials) if value == special]
            ids_of_texts = self._tokenise([texts[i] for i in indices], add_special_tokens=special)

            for i, ids in zip(indices, ids_of_texts, strict=True):
                # some tokenizers add an EOS too, which ends a completion, not a prompt
                if special and ids[-1:] == [self.eos_id]:
                    ids = ids[:-1]
                encoded[i] = ids
        return encoded

    def _encode_as_plain_text(self, special: str) -> TokenIds:
        """Ids of a special token's string as text: of its single characters if the vocabulary holds it whole."""
        (ids,) = self._tokenise_inside([special], split_special_tokens=True)
        if self.control_strings.ids.isdisjoint(ids):
            return ids
        characters = self._tokenise_inside(list(special), split_special_tokens=True)
        return list(chain.from_iterable(characters))

    def _tokenise_inside(self, texts: list[str], **options: bool) -> list[TokenIds]:
        """Token ids of texts that go on from others: without the blank that some tokenizers put before every text."""
        if not self._puts_a_blank_before:
            return self._tokenise(texts, **options)

        (anchor,) = self._tokenise([ANCHOR])
        anchored = self._tokenise([ANCHOR + text for text in texts], **options)
        encoded = []
        for ids, text in zip(anchored, texts, strict=True):
            if ids[: len(anchor)] == anchor:
                encoded.append(ids[len(anchor) :])
            else:  # the text goes on with the anchor's own token
                encoded += self._tokenise([text], **options)
        return encoded

    @cached_property
    def _puts_a_blank_before(self) -> bool:
        """Whether the tokenizer puts a blank before a text, as those made with SentencePiece do."""
        anchor, alone, inside = self._tokenise([ANCHOR, "a", ANCHOR + "a"])
        return inside != anchor + alone and inside[: len(anchor)] == anchor

    def _tokenise(self, texts: list[str], add_special_tokens: bool = False, **options: bool) -> list[TokenIds]:
        if not texts:
            return []
        encoding = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
            **options,
        )
        return encoding["input_ids"]


def _check_has_no_context(example: Example) -> None:
    """Raises UserError for messages before a user turn, which plain text has no place for."""
    prompt = example.prompt
    if isinstance(prompt, UserTurn) and prompt.earlier:
        name = "system" if prompt.earlier[0]["role"] == "system" else "history"
        raise UserError(f"{example.location}: field {name!r} has no place in plain text; use a chat template")


def _messages(prompt: Prompt) -> Messages:
    if isinstance(prompt, UserTurn):
        return prompt.messages()
    return cast(Messages, prompt)
