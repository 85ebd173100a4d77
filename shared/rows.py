"""Rows of any common form → Examples.

The form of a file is told by the columns of its first row (FORMS). A row that cannot be used is dropped and counted;
a malformed one ends the run.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from shared import UserError
from shared.sources import read_rows

LARGEST = 3.4e38  # of float32
LARGEST_ID = 2**31 - 1  # of a token, in int32
TRANSCRIPT_SPLITTER = "\n\nAssistant:"  # its last occurrence in an HH transcript ends the prompt
TRANSCRIPT_USER = "\n\nHuman:"  # begins a turn of the user in an HH transcript
MIXED_PAIR = "fields 'chosen' and 'rejected' must both be text or both be messages"
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}

RENAME = "scripts/prepare_rows.py rename changes names"
LATER_TURNS = "turns after the last answer left out"  # counts of rows in the report

# Columns and parts of messages that no algorithm here reads.
PICTURES = ("image", "images", "image_url", "video", "videos", "audio", "audios")

Messages = list[dict]  # of a chat, each {"role": …, "content": …} and perhaps more that its template renders
Text = str | Messages


@dataclass(frozen=True)
class UserTurn:
    """A prompt that is one user turn: a chat message if the tokenizer has a chat template, else plain text."""

    text: str
    earlier: tuple[dict, ...] = ()  # messages before it, for which plain text has no place

    def messages(self) -> Messages:
        """The turn as chat messages, after those before it."""
        return [*self.earlier, {"role": "user", "content": self.text}]


Prompt = Text | UserTurn | None
Parsed = tuple[Prompt, list[Text]]  # the prompt and its completions
Form = tuple[str, ...]  # the columns that tell it


class Dropped(Exception):
    """This row cannot be used; the message is the reason under which it is counted."""


@dataclass
class Counts:
    """What became of the rows of a source, and what in them was not used."""

    dropped: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by the reason
    noted: Counter[str] = field(default_factory=Counter)  # rows that are used, by what is to be said of them
    unused: set[str] = field(default_factory=set)  # columns, and fields of messages, that hold something


@dataclass(frozen=True)
class Completion:
    """An answer to a prompt."""

    text: Text
    is_finished: bool = True  # otherwise it was cut off before its end
    is_drawn: bool = False  # from a policy: it follows its prompt as it is, without the chat template
    ids: list[int] | None = None  # the token ids that were drawn, with the end
    ids_of: str | None = None  # the hash of the vocabulary that they belong to


@dataclass
class Example:
    """One prompt with its completions, preferred first.

    Without a prompt (None) the completion is running text, whose first token is context.
    """

    location: str  # "FILE, line N", for error messages
    number: int  # of the row in its source, from 1
    prompt: Prompt
    completions: list[Completion]
    ranked: bool = True  # the completions' order is the ranking; otherwise only scores can rank them
    scores: list[list[float]] = field(default_factory=list)  # per completion, one number of each reward model; or empty
    samples: list[Completion] = field(default_factory=list)  # drawn from π_ref
    tools: list[dict] | None = None  # for the chat template
    notes: set[str] = field(default_factory=set)  # what is counted if the row is used
    row: dict = field(default_factory=dict)  # as it stands in the source
    form: Form = ()  # the columns that told how to read it

    @property
    def texts(self) -> list[Text]:
        """The completions' texts."""
        return [completion.text for completion in self.completions]


# ---------------------------------------------------------------- fields


def _wrong_type(row: dict, name: str, wanted: str) -> ValueError:
    value = row.get(name)
    if name not in row:
        actual = "missing"
    elif value is None:
        actual = "null"
    else:
        actual = f"of type {type(value).__name__}"
    return ValueError(f"field {name!r} is {actual}, must be {wanted}")


def _string(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _wrong_type(row, name, "text")
    return value


def _list(row: dict, name: str) -> list:
    value = row.get(name)
    if not isinstance(value, list):
        raise _wrong_type(row, name, "a list")
    return value


def _text(row: dict, name: str) -> Text:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(value, name)
    raise _wrong_type(row, name, "text or a list of messages")


def _answer(row: dict, name: str) -> Text:
    """As `_text`, or one message alone."""
    value = row.get(name)
    if isinstance(value, dict):
        return _messages([value], name)
    return _text(row, name)


def _messages(values: list, name: str) -> Messages:
    """Messages with role and content; `from`/`value` and the role names of ShareGPT are accepted too."""
    if not values:
        raise ValueError(f"field {name!r} has no messages")
    return [_message(value, f"field {name!r}, message {i}") for i, value in enumerate(values)]


def _message(value: object, location: str) -> dict:
    message = {}
    if isinstance(value, dict):
        message = value

    role_name = "role"
    if message.get("role") is None:
        role_name = "from"
    content_name = "content"
    if message.get("content") is None and message.get("value") is not None:
        content_name = "value"

    role = _role(message.get(role_name), location)
    content = _content(message.get(content_name), message, location)
    # the other fields are for the chat template
    for name, value in message.items():
        if name in PICTURES and not is_empty(value):
            raise ValueError(f"{location}: field {name!r} is not empty, but only text is read")
    others = {name: value for name, value in message.items() if value is not None}
    others.pop(role_name, None)
    others.pop(content_name, None)
    return {"role": role, "content": content, **others}


def _role(role: object, location: str) -> str:
    """A role as templates know it. One that is not in ROLES is left to the template."""
    if not isinstance(role, str) or not role:
        raise ValueError(f"{location}: unknown role {role!r}; known are {', '.join(ROLES)} and those of the template")
    if role in ROLES:
        return ROLES[role]
    if role.strip().lower() in ROLES:
        raise ValueError(f"{location}: unknown role {role!r}; write {role.strip().lower()!r}")
    return role


def _content(content: object, message: dict, location: str) -> str:
    """The text of a message: a string, or the joined parts of a list."""
    if not content and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content:
        return "".join(_text_part(part, location) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{location}: content must be text, not {type(content).__name__}")
    return content


def _text_part(part: object, location: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"{location}: a part of content must be text, not {type(part).__name__}")

    text = part.get("text")
    others = [name for name, value in part.items() if name not in ("type", "text") and not is_empty(value)]
    if part.get("type") != "text" or not isinstance(text, str) or others:
        problem = f"a part of content has type {part.get('type')!r} and fields {', '.join(map(str, part))}"
        raise ValueError(f"{location}: {problem}; only parts of text are read")
    return text


def _booleans(row: dict, name: str, length: int) -> list[bool]:
    """The booleans of a field, all true if the field is absent."""
    values = row.get(name)
    if values is None:
        return [True] * length
    if not isinstance(values, list) or [type(value) for value in values] != [bool] * length:
        raise ValueError(f"field {name!r} must hold {length} booleans")
    return values


def _id_lists(row: dict, name: str, length: int) -> list[list[int]] | list[None]:
    """The token ids of a field, a list for each completion; None for each if the field is absent."""
    if row.get(name) is None:
        return [None] * length
    values = _list(row, name)
    if len(values) != length or not all(_is_ids(ids) for ids in values):
        raise ValueError(f"field {name!r} must hold {length} lists of token ids")
    return values


def _is_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(token) is int and 0 <= token <= LARGEST_ID for token in value)


# ---------------------------------------------------------------- forms


def _conversation_pair(row: dict) -> Parsed:
    return _messages_pair(row, "conversations")


def _chat_pair(row: dict) -> Parsed:
    return _messages_pair(row, "messages")


def _messages_pair(row: dict, name: str) -> Parsed:
    """chosen and rejected beside messages, which are the prompt, or one of the two conversations again."""
    messages = _messages(_list(row, name), name)
    chosen = _answer(row, "chosen")
    rejected = _answer(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and messages in (chosen, rejected):
        return _split_messages(chosen, rejected)
    if all(isinstance(text, str) and TRANSCRIPT_SPLITTER in text for text in (chosen, rejected)):
        return _transcripts(row)
    return _pair_after(messages, name, row)


def _instruction_pair(row: dict) -> Parsed:
    prompt = _instruction(row)
    return prompt, [_string(row, "chosen"), _string(row, "rejected")]


def _instruction_output(row: dict) -> Parsed:
    prompt = _instruction(row)
    return prompt, [_string(row, "output")]


def _instruction(row: dict) -> UserTurn:
    instruction = _string(row, "instruction")
    if not row.get("input"):
        return UserTurn(instruction)
    return UserTurn(f"{instruction}\n{_string(row, 'input')}")


def _prompt_pair(row: dict) -> Parsed:
    """prompt, chosen and rejected, where messages of the pair may repeat those of the prompt."""
    return _pair_after(_text(row, "prompt"), "prompt", row)


def _pair_after(prompt: Text, name: str, row: dict) -> Parsed:
    """chosen and rejected after the prompt, which stands in the column `name`."""
    chosen = _answer(row, "chosen")
    rejected = _answer(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, [chosen, rejected]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(MIXED_PAIR)
    if chosen[0]["role"] == "assistant" or isinstance(row["chosen"], dict):
        return prompt, [chosen, rejected]

    repeated, pair = _split_messages(chosen, rejected)
    if isinstance(prompt, str):
        questions = [message["content"].strip() for message in repeated if message["role"] == "user"]
        if prompt.strip() and prompt.strip() not in questions:
            raise ValueError(f"fields 'chosen' and 'rejected' have no turn of the user like {name!r}")
        return repeated, pair

    if prompt == repeated[: len(prompt)]:
        return repeated, pair
    if repeated != prompt[-len(repeated) :]:
        raise ValueError(f"fields 'chosen' and 'rejected' begin with other messages than {name!r}")
    return prompt, pair


def _transcripts(row: dict) -> Parsed:
    """chosen and rejected with the prompt inside."""
    chosen = _answer(row, "chosen")
    rejected = _answer(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if TRANSCRIPT_SPLITTER not in chosen + rejected:
            _look_for_prompt(row)
        return _split_transcripts(chosen, rejected)

    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(MIXED_PAIR)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        _look_for_prompt(row)
        raise ValueError("chosen has no prompt")
    return _split_messages(chosen, rejected)


def _look_for_prompt(row: dict) -> None:
    """Raises ValueError if other columns of text or messages may hold the prompt."""
    names = []
    for name in _unused_columns(row, ("chosen", "rejected")):
        if isinstance(row.get(name), str | list):
            names.append(f"`{name}`")
    if names:
        raise ValueError(f"chosen has no prompt; is it in {' or '.join(names)}? {RENAME}")


def _split_transcripts(chosen: str, rejected: str) -> Parsed:
    if TRANSCRIPT_SPLITTER not in chosen or TRANSCRIPT_SPLITTER not in rejected:
        raise Dropped("no Assistant turn")
    prompt, answer = _split_transcript(chosen)
    other_prompt, other_answer = _split_transcript(rejected)
    if prompt != other_prompt:
        raise Dropped("prompts differ")
    return prompt, [answer, other_answer]


def _split_transcript(text: str) -> tuple[str, str]:
    before, splitter, answer = text.rpartition(TRANSCRIPT_SPLITTER)
    return before + splitter, answer


def _split_messages(chosen: Messages, rejected: Messages) -> tuple[Messages, list[Text]]:
    """The prompt is what both have in common; the first message that differs must be the assistant's."""
    if chosen == rejected:
        prompt, completions = _last_turn(chosen)
        return prompt, completions * 2

    length = 0  # of what they have in common
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        length += 1

    for messages in (chosen, rejected):
        if length == len(messages) or messages[length]["role"] != "assistant":
            raise Dropped("prompts differ")
    return chosen[:length], [chosen[length:], rejected[length:]]


def _last_turn(messages: Messages) -> tuple[Messages, list[Text]]:
    """The last assistant message begins the completion, and everything before it is the prompt."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise Dropped("no assistant turn")
    last = turns[-1]
    return messages[:last], [messages[last:]]


def _prompt_completions(row: dict) -> Parsed:
    prompt = _text(row, "prompt")
    completions: list[Text] = []
    for completion in _list(row, "completions"):
        if isinstance(completion, list):
            completions.append(_messages(completion, "completions"))
        elif isinstance(completion, str):
            completions.append(completion)
        else:
            raise ValueError("field 'completions' must be a list of texts, or of lists of messages")
    return prompt, completions


def _stanford_human_preferences(row: dict) -> Parsed:
    answer_a = _string(row, "human_ref_A")
    answer_b = _string(row, "human_ref_B")
    label = row.get("labels")
    if label not in (0, 1):
        raise ValueError(f"field 'labels' is {label!r}, must be 1 (A is preferred) or 0")

    history = _string(row, "history")
    if label == 1:
        return history, [answer_a, answer_b]
    return history, [answer_b, answer_a]


def _prompt_completion(row: dict) -> Parsed:
    prompt = _text(row, "prompt")
    return prompt, [_answer(row, "completion")]


def _chat(row: dict) -> Parsed:
    return _last_turn(_messages(_list(row, "messages"), "messages"))


def _conversation(row: dict) -> Parsed:
    return _last_turn(_messages(_list(row, "conversations"), "conversations"))


def _running_text(row: dict) -> Parsed:
    return None, [_string(row, "text")]


def _prompt_alone(row: dict) -> Parsed:
    return _text(row, "prompt"), []


# A file has the first of these forms whose columns its first row has.
FORMS: dict[Form, Callable[[dict], Parsed]] = {
    ("conversations", "chosen", "rejected"): _conversation_pair,
    ("instruction", "chosen", "rejected"): _instruction_pair,
    ("prompt", "chosen", "rejected"): _prompt_pair,
    ("messages", "chosen", "rejected"): _chat_pair,
    ("chosen", "rejected"): _transcripts,
    ("prompt", "completions"): _prompt_completions,
    ("history", "human_ref_A", "human_ref_B", "labels"): _stanford_human_preferences,
    ("messages",): _chat,
    ("prompt", "completion"): _prompt_completion,
    ("conversations",): _conversation,
    ("instruction", "output"): _instruction_output,
    ("text",): _running_text,
}
# Sampling needs no completion.
PROMPT_FORMS = FORMS | {("prompt",): _prompt_alone}

# Columns that an example is made of, beside those of its form.
USED_BESIDE_ALL = (
    "system",
    "history",
    "tools",
    "reference_samples",
    "reference_samples_finished",
    "reference_sample_ids",
    "reference_vocabulary",
)
USED_BESIDE = {
    "instruction": ("input",),
    "completions": ("scores", "finished", "completion_ids", "vocabulary"),
    "rejected": ("scores", "score_chosen", "score_rejected"),
    "human_ref_B": ("scores", "score_chosen", "score_rejected"),
}
# Forms of one completion, which a `label` of false says not to train on.
DEMONSTRATIONS = (
    ("messages",),
    ("prompt", "completion"),
    ("conversations",),
    ("instruction", "output"),
    ("text",),
)


def form_of(row: dict, location: str, forms: dict[Form, Callable[[dict], Parsed]]) -> Form:
    """The form that a source's first row has. Raises UserError, which names the nearest form, if it has none."""
    for columns in forms:
        if all(name in row for name in columns):
            return columns

    def nearness(columns: Form) -> tuple[float, int]:
        present = sum(name in row for name in columns)
        return present / len(columns), len(columns)

    nearest = max(forms, key=nearness)
    missing = [name for name in nearest if name not in row]
    hint = ""
    if len(missing) < len(nearest):
        hint = f"; {missing[0]!r} is missing for {' + '.join(nearest)}"

    columns_of_row = ", ".join(str(name) for name in row)
    known = "; ".join(" + ".join(columns) for columns in forms)
    raise UserError(f"{location}: unknown columns {columns_of_row}{hint}. {RENAME}. Known forms: {known}")


# ---------------------------------------------------------------- examples


def parse_rows(source: str, counts: Counts, forms: dict[Form, Callable[[dict], Parsed]] = FORMS) -> Iterator[Example]:
    """Yield the rows of a source as Examples, as `parse_located` does."""
    return parse_located(source, read_rows(source), counts, forms)


def parse_located(
    source: str,
    rows: Iterable[tuple[str, dict]],
    counts: Counts,
    forms: dict[Form, Callable[[dict], Parsed]] = FORMS,
) -> Iterator[Example]:
    """Yield rows, each with its location, as Examples.

    A row that cannot be used adds its reason to `counts.dropped`. Columns that hold something, but that no example is
    made of, are added to `counts.unused`. Raises UserError, which names file and line, for a malformed row and for a
    source without rows.
    """
    form = None
    for number, (location, row) in enumerate(rows, 1):
        if form is None:
            form = form_of(row, location, forms)
        counts.unused.update(_unused_columns(row, form))
        try:
            example = _parse_row(location, number, row, form, forms[form])
            _check_encodable(example)
        except UnicodeEncodeError:
            raise UserError(f"{location}: a text holds half a character (a lone surrogate); remove it") from None
        except ValueError as error:
            raise UserError(f"{location}: {error} (form {' + '.join(form)})") from None
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
            continue
        yield example
    if form is None:
        raise UserError(f"{source}: no rows")


def _parse_row(location: str, number: int, row: dict, form: Form, parse: Callable[[dict], Parsed]) -> Example:
    """The example of one row. Raises ValueError if the row is malformed, Dropped if it cannot be used."""
    _check_pictures(row)
    prompt, texts = _as_messages(*parse(row))
    _check_end(prompt, form)
    prompt = _with_context(prompt, row, form)

    example = Example(location, number, prompt, [], ranked="completions" not in form, tools=_tools(row))
    example.row = row
    example.form = form
    is_transcript = isinstance(prompt, str) and prompt.endswith(TRANSCRIPT_SPLITTER) and "prompt" not in form
    answers = [_until_last_answer(text, is_transcript) for text in texts]
    if answers != texts:
        example.notes.add(LATER_TURNS)
    example.completions = _completions(row, form, answers)
    example.samples = _samples(row, prompt)
    _add_scores(example, row, form)
    return example


def _unused_columns(row: dict, form: Form) -> list[str]:
    """The columns of a row that hold something, but of which its example has nothing."""
    used = {*form, *USED_BESIDE_ALL}
    is_labelled = isinstance(row.get("label"), bool)
    if is_labelled and form in DEMONSTRATIONS:
        used.add("label")
    for name, beside in USED_BESIDE.items():
        if name in form:
            used.update(beside)
    return [str(name) for name, value in row.items() if name not in used and not is_empty(value)]


def is_empty(value: object) -> bool:
    """Whether a field holds nothing: null, an empty text, or a list or an object of nothing."""
    if isinstance(value, dict):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, list):
        return all(is_empty(part) for part in value)
    return value is None or value == ""


def is_blank(completion: Text) -> bool:
    """Whether a completion, or its last message, says and calls nothing."""
    if isinstance(completion, str):
        return not completion.strip()
    last = completion[-1]
    return not last["content"].strip() and not last.get("tool_calls")


def _as_messages(prompt: Prompt, completions: list[Text]) -> Parsed:
    """If either the prompt or a completion is chat messages, both become messages."""
    has_messages = any(isinstance(completion, list) for completion in completions)
    if isinstance(prompt, str) and has_messages:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        completions = [assistant_messages(completion) for completion in completions]

    for completion in completions:
        if isinstance(completion, list) and completion[0]["role"] != "assistant":
            raise ValueError("a completion must begin with a message of the assistant")
    return prompt, completions


def _check_pictures(row: dict) -> None:
    for name in PICTURES:
        if not is_empty(row.get(name)):
            raise ValueError(f"field {name!r} is not empty, but only text is read")


def _check_end(prompt: Prompt, form: Form) -> None:
    """The prompt of a column of its own must ask for an answer, not begin it."""
    has_column = "prompt" in form or ("rejected" in form and len(form) > 2)
    if has_column and isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with a message of the assistant; an answer that has begun is not continued")


def _with_context(prompt: Prompt, row: dict, form: Form) -> Prompt:
    """The prompt after the system message and the earlier turns of the columns `system` and `history`."""
    system = _system(row)
    history = []
    if "history" not in form:
        history = _history(row)
    if not system and not history:
        return prompt

    if isinstance(prompt, UserTurn):
        return UserTurn(prompt.text, (*system, *history))
    if not isinstance(prompt, list):
        name = "system" if system else "history"
        raise ValueError(f"field {name!r} has no place before plain text; give the prompt as messages")

    if prompt and prompt[0]["role"] == "system":
        if system and system != prompt[:1]:
            raise ValueError("field 'system' differs from the system message of the prompt")
        system = prompt[:1]
        prompt = prompt[1:]
    return system + history + prompt


def _system(row: dict) -> Messages:
    if is_empty(row.get("system")):
        return []
    return [{"role": "system", "content": _string(row, "system")}]


def _history(row: dict) -> Messages:
    """The turns of `history`, a list of [user, assistant] pairs."""
    if is_empty(row.get("history")):
        return []

    history = []
    for pair in _list(row, "history"):
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        if not is_pair:
            raise ValueError("field 'history' must hold pairs of texts, [user, assistant]")
        user, assistant = pair
        history += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return history


def assistant_messages(text: Text) -> Messages:
    """A completion as chat messages."""
    if isinstance(text, str):
        return [{"role": "assistant", "content": text}]
    return text


def _tools(row: dict) -> list[dict] | None:
    """The schemas of `tools`, a list or its JSON, for the chat template."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("field 'tools' is text, but not JSON") from None
    if is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("field 'tools' must be a list of schemas")
    return tools


def _until_last_answer(text: Text, is_transcript: bool) -> Text:
    """A completion up to its last answer; in a transcript or a chat, turns of the user may follow."""
    if isinstance(text, list):
        last = max(i for i, message in enumerate(text) if message["role"] == "assistant")
        return text[: last + 1]
    if is_transcript:
        return text.partition(TRANSCRIPT_USER)[0]
    return text


def _completions(row: dict, form: Form, texts: list[Text]) -> list[Completion]:
    """Completions with the columns that say how they were drawn. Those of a row without them were not."""
    if "completions" not in form:
        return [Completion(text) for text in texts]

    finished = _booleans(row, "finished", len(texts))
    ids = _id_lists(row, "completion_ids", len(texts))
    is_drawn = row.get("finished") is not None or row.get("completion_ids") is not None
    vocabulary = row.get("vocabulary")
    completions = []
    for text, ends, ids_of_text in zip(texts, finished, ids, strict=True):
        if is_drawn and isinstance(text, list) and len(text) > 1:
            raise ValueError("field 'completions': what a policy drew is one text or message, not several")
        completions.append(Completion(text, ends, is_drawn, ids_of_text, vocabulary))
    return completions


def _samples(row: dict, prompt: Prompt) -> list[Completion]:
    """`reference_samples`: texts that π_ref wrote; beside them, which of them are finished, and their token ids."""
    if row.get("reference_samples") is None:
        return []
    texts = _list(row, "reference_samples")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("field 'reference_samples' must be a list of texts")

    finished = _booleans(row, "reference_samples_finished", len(texts))
    ids = _id_lists(row, "reference_sample_ids", len(texts))
    samples = []
    for text, ends, ids_of_text in zip(texts, finished, ids, strict=True):
        if isinstance(prompt, list):
            text = assistant_messages(text)
        samples.append(Completion(text, ends, True, ids_of_text, row.get("reference_vocabulary")))
    return samples


def _add_scores(example: Example, row: dict, form: Form) -> None:
    """`scores`: K numbers, or K lists of one number per reward model; or `score_chosen` and `score_rejected`.

    The score of a demonstration is its `label`, 1 or 0.
    """
    num_completions = len(example.completions)
    if form in DEMONSTRATIONS and isinstance(row.get("label"), bool):
        example.scores = [[float(row["label"])]]
        return
    if row.get("scores") is not None and num_completions > 1:
        scores = [_as_list(value) for value in _list(row, "scores")]
    elif example.ranked and num_completions == 2:
        example.scores = _pair_scores(row)
        return
    else:
        return

    numbers = [number for values in scores for number in values]
    lengths = {len(values) for values in scores}
    if len(scores) != num_completions or len(lengths) != 1 or not numbers:
        raise ValueError(f"field 'scores' must hold {num_completions} numbers, or as many lists of equal length")
    if not all(_is_float32(number) for number in numbers):
        raise ValueError("field 'scores' must hold finite numbers of float32")
    example.scores = scores


def _pair_scores(row: dict) -> list[list[float]]:
    """The scores of chosen and rejected, or none if either is missing."""
    names = ("score_chosen", "score_rejected")
    if any(row.get(name) is None for name in names):
        return []
    for name in names:
        if not _is_float32(row[name]):
            raise ValueError(f"field {name!r} must be a finite number of float32")
    return [[row[name]] for name in names]


def _as_list(value: object) -> list:
    if isinstance(value, list):
        return value
    return [value]


def _is_float32(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST


def _check_encodable(example: Example) -> None:
    """Raises UnicodeEncodeError for a lone surrogate, which no UTF-8 text and no tokenizer can hold."""
    prompt = example.prompt
    if isinstance(prompt, UserTurn):
        prompt = prompt.messages()
    completions = [completion.text for completion in example.completions + example.samples]
    json.dumps([prompt, completions, example.tools], ensure_ascii=False, default=str).encode()
