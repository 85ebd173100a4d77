"""Example → token ids: the one rule, for training, sampling, scoring and evaluating.

1. Render: prompt and completions become texts, through the chat template or as they are. A sample that was cut off
   follows its prompt as it is.
2. Tokenise: the prompt with the tokenizer's special tokens, unless a template has written its own; completions without.
3. Complete the prompt: the first token of running text is its prompt, and an empty prompt becomes the BOS.
4. End and truncate: a completion gets its EOS, unless it was cut off before it, and keeps the tokens that fit.

`Encoder.encode` does 1 to 3. Its callers know how much room there is, and do 4 with `end_and_truncate`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

from shared import UserError, first_line
from shared.rows import Dropped, Example, Messages, Prompt, Text, UserTurn, assistant_messages, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\U000f0000"  # stands for a special token's string while templates and tokenizers handle the text around it

TokenIds = list[int]


@dataclass
class RenderedExample:
    """An example as protected texts, which `Encoder.protect` explains; completions are without the EOS."""

    example: Example
    prompt: str
    completions: list[str]


@dataclass
class EncodedExample:
    """An example as token ids: a prompt of at least one token, and whole completions without the EOS."""

    example: Example
    prompt: TokenIds
    completions: list[TokenIds]
    has_control_strings: bool = False  # whether a text holds a special token's string, which has become plain text


def end_and_truncate(ids: TokenIds, has_eos: bool, eos_id: int, room: int) -> TokenIds:
    """A completion's ids, followed by the EOS if it has one; of these the first `room`."""
    if has_eos:
        ids = [*ids, eos_id]
    return ids[:room]


class Encoder:
    """Texts and messages → token ids. A special token's string inside a text becomes plain-text tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.names_in_template = set(re.findall(r"\w+", str(tokenizer.chat_template)))
        self.unused: set[str] = set()  # fields of messages that the template does not name

        added = tokenizer.added_tokens_decoder
        names = {i: token.content for i, token in added.items() if token.special}
        self.control_ids = names.keys() - {tokenizer.unk_token_id}
        # longest first, so that no name is matched inside a longer one
        self.specials = [MARK, *sorted(names.values(), key=len, reverse=True)]
        self.pattern = re.compile("|".join(map(re.escape, self.specials)))
        self.shown_roles: set[str] = set()  # of messages whose text the chat template is known to show

    def encode(
        self, examples: Iterable[Example], dropped: Counter[str], num_completions: int | None = None
    ) -> Iterator[EncodedExample]:
        """Encode a batch of examples, each with its first `num_completions` completions, by default all.

        An example that cannot be used adds its reason to `dropped`. Raises UserError if the chat template does not
        fit the examples.
        """
        batch = self._render_batch(examples, dropped, num_completions)
        prompts = self._encode_prompts(batch)
        completions_of_batch = self._encode_completions(batch)

        for rendered, prompt, completions in zip(batch, prompts, completions_of_batch, strict=True):
            example = rendered.example
            if example.prompt is None:
                prompt, completions = _split_running_text(completions)
            if not prompt and self.bos_id is not None:
                prompt = [self.bos_id]
            if not prompt:
                dropped["empty prompt"] += 1
                continue
            yield EncodedExample(example, prompt, completions, self._has_control_strings(rendered))

    # ------------------------------------------------------------ render

    def _render_batch(
        self, examples: Iterable[Example], dropped: Counter[str], num_completions: int | None
    ) -> list[RenderedExample]:
        batch = []
        for example in examples:
            try:
                rendered = self.render(example, num_completions)
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            batch.append(rendered)
        return batch

    def render(self, example: Example, num_completions: int | None = None) -> RenderedExample:
        """The protected texts of an example's prompt and its first `num_completions` completions.

        Raises Dropped if the chat template refuses the example, or changes its prompt once an answer follows.
        """
        prompt = example.prompt
        completions = example.completions[:num_completions]
        has_eos = example.has_eos[:num_completions]

        if self.is_chat(prompt):
            conversations = [assistant_messages(completion) for completion in completions]
            before, texts = self._render_chat(_user_messages(prompt), conversations, has_eos)
        else:
            _check_has_no_context(example)
            before, texts = self._render_plain(prompt, completions)
        return RenderedExample(example, before, texts)

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether the prompt goes through the chat template, which writes its own special tokens."""
        if isinstance(prompt, UserTurn):
            return bool(self.tokenizer.chat_template)
        return isinstance(prompt, list)

    def protect(self, text: str) -> str:
        """The text with a mark in place of each special token's string, which no template or tokenizer interprets.

        If </s> is `specials[2]`, then "a</s>b" becomes "a" + MARK + "2;" + "b".
        """
        return self.pattern.sub(self._mark, text)

    def _has_control_strings(self, rendered: RenderedExample) -> bool:
        mark_itself = self.protect(MARK)
        texts = [rendered.prompt, *rendered.completions]
        return any(MARK in text.replace(mark_itself, "") for text in texts)

    def _mark(self, match: re.Match) -> str:
        number = self.specials.index(match[0])
        return f"{MARK}{number};"

    def _render_plain(self, prompt: Prompt, completions: list[Text]) -> tuple[str, list[str]]:
        texts = [self.protect(text) for text in cast("list[str]", completions)]
        if prompt is None:
            return "", texts
        if isinstance(prompt, UserTurn):
            return self.protect(prompt.text) + "\n\n", texts
        return self.protect(cast(str, prompt)), texts

    def _render_chat(self, prompt: Messages, completions: list[Messages], has_eos: list[bool]) -> tuple[str, list[str]]:
        if not self.tokenizer.chat_template:
            raise UserError("the rows are chat messages, but the tokenizer has no chat template; use one that has")

        before = self._apply_template(prompt, add_generation_prompt=True)
        self._check_shown(prompt, "user")
        answers = []
        for completion, ends_with_eos in zip(completions, has_eos, strict=True):
            if ends_with_eos:
                conversation = self._apply_template(prompt + completion)
                self._check_shown(prompt + completion, "assistant")
            else:
                conversation = self._until_sample(prompt, completion)
            if not conversation.startswith(before):
                raise Dropped("the chat template renders the prompt differently once an answer follows")

            answer = conversation.removeprefix(before)
            if ends_with_eos:
                answer = self._until_eos(answer)
            answers.append(answer)
        return before, answers

    def _apply_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        protected = [self._protect_message(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                protected, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what their authors chose (jinja2's TemplateError)
            raise Dropped(f"refused by the chat template ({first_line(error)})") from None
        for message in protected:
            is_known = message["role"] in ("system", "user", "assistant")
            if not is_known and message["content"].strip() not in text:
                raise Dropped(f"the chat template leaves out the role {message['role']!r}")
        return cast(str, text)

    def _protect_message(self, message: dict) -> dict:
        """A message whose texts are protected; templates compare roles, which are names."""
        protected = {}
        for name, value in message.items():
            protected[name] = self._protect_all(value)
            is_weight = name == "weight" and value in (0, 1)  # which says whether a completion is trained on
            if name not in self.names_in_template | {"role", "content"} and not is_weight and not is_empty(value):
                self.unused.add(f"{name} of messages")
        return protected

    def _protect_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, list):
            return [self._protect_all(part) for part in value]
        if isinstance(value, dict):
            return {name: self._protect_all(part) for name, part in value.items()}
        return value

    def _check_shown(self, messages: Messages, role: str) -> None:
        """Raises UserError if the template renders the same whatever the last message of a role says.

        Some templates expect a list of parts, and leave out a text. It is enough to see this once.
        """
        indices = [i for i, message in enumerate(messages) if message["role"] == role]
        if role in self.shown_roles or not indices:
            return

        changed = [dict(message) for message in messages]
        changed[indices[-1]]["content"] += "x"
        if self._apply_template(changed) == self._apply_template(messages):
            raise UserError(f"the chat template shows none of the text of role {role!r}; use one made for texts")
        self.shown_roles.add(role)

    def _until_eos(self, answer: str) -> str:
        """A rendered answer up to its last EOS; the template, not the model, writes what follows."""
        text, eos, _ = answer.rpartition(self.tokenizer.eos_token)
        if not eos:
            return answer
        return text

    def _until_sample(self, prompt: Messages, completion: Messages) -> str:
        """A rendered conversation whose last answer is a sample that was cut off before its EOS.

        The sample stands there as the model wrote it. A template may rewrite a text, put thoughts before it, or end
        the turn after it.
        """
        *earlier, sample = completion
        before = self._apply_template(prompt + earlier, add_generation_prompt=True)
        return before + self.protect(sample["content"])

    # ------------------------------------------------------------ tokenise

    def _encode_prompts(self, batch: list[RenderedExample]) -> list[TokenIds]:
        texts = [rendered.prompt for rendered in batch]
        # a chat template has written its own special tokens
        with_specials = [not self.is_chat(rendered.example.prompt) for rendered in batch]
        return self.encode_texts(texts, with_specials)

    def _encode_completions(self, batch: list[RenderedExample]) -> list[list[TokenIds]]:
        texts = []
        with_specials = []
        for rendered in batch:
            is_running_text = rendered.example.prompt is None
            for i, text in enumerate(rendered.completions):
                texts.append(text)
                with_specials.append(is_running_text and i == 0)

        # one call for the whole batch, whose ids are then dealt out again
        ids = iter(self.encode_texts(texts, with_specials))
        return [list(islice(ids, len(rendered.completions))) for rendered in batch]

    def encode_texts(self, texts: list[str], with_specials: list[bool]) -> list[TokenIds]:
        """Token ids of protected texts, each with or without the special tokens that the tokenizer adds."""
        heads = [text.partition(MARK)[0] for text in texts]
        encoded = self._encode_heads(heads, with_specials)

        for ids, text in zip(encoded, texts, strict=True):
            for piece in text.split(MARK)[1:]:
                number, _, rest = piece.partition(";")
                ids += self._encode_as_plain_text(self.specials[int(number)])
                ids += self._tokenise([rest])[0]
        return encoded

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
        (ids,) = self._tokenise([special], split_special_tokens=True)
        if self.control_ids.isdisjoint(ids):
            return ids
        characters = self._tokenise(list(special), split_special_tokens=True)
        return list(chain.from_iterable(characters))

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


def _user_messages(prompt: Prompt) -> Messages:
    if isinstance(prompt, UserTurn):
        return prompt.messages()
    return cast(Messages, prompt)


def _split_running_text(completions: list[TokenIds]) -> tuple[TokenIds, list[TokenIds]]:
    """The first token is context, from which the second is predicted."""
    text, *others = completions
    return text[:1], [text[1:], *others]


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of the tokens that end a completion: the EOS, and the chat template's end of a turn. Ascending."""
    ids = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    ids.discard(None)
    return sorted(ids)


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The first special token that a chat template writes behind an assistant's text."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template for other messages
        return None

    names = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    match = re.search(pattern, text.rpartition(MARK)[2])
    if not match or not match[0]:
        return None
    return names[match[0]]
