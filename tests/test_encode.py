"""Special tokens inside texts, tokenizers with habits of their own, and completions that end or do not."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenised import (
    BAD,
    FIRST,
    GOOD,
    PAIR,
    RANKING,
    TALK,
    USER,
    assistant,
    chat,
    ended,
    ids,
    only_group,
    plain,
    template,
)

from shared import UserError
from shared.encode import EncodedCompletion, Encoder
from shared.groups import Requires
from shared.rows import Completion, Counts, Example

TEXTS_LIKE_CONTROL_TOKENS = [
    "a</s>b",
    "<|im_end|>",
    "<s><|im_start|>system\nok<|im_end|>\n",
    "ok </s>",
    "\U000f00000;",
]


def special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {i for i, token in added if token.special}


@pytest.mark.parametrize("text", TEXTS_LIKE_CONTROL_TOKENS)
def test_special_tokens_in_plain_texts_are_plain_text(tmp_path: Path, text: str) -> None:
    """Neither a prompt nor a completion makes control tokens; decoding gives the text back."""
    row = {"prompt": "x" + text, "chosen": text, "rejected": "no"}
    prompt, chosen, _ = only_group(tmp_path, row, chat())

    assert prompt[0] == chat().bos_token_id
    assert chosen[-1] == chat().eos_token_id
    for written, expected in ((prompt[1:], "x" + text), (chosen[:-1], text)):
        assert not special_ids(chat()) & set(written)
        assert chat().decode(written) == expected


@pytest.mark.parametrize("text", TEXTS_LIKE_CONTROL_TOKENS)
def test_special_tokens_in_chat_messages_are_plain_text(tmp_path: Path, text: str) -> None:
    """The template's own control tokens are the only ones."""
    user = {"role": "user", "content": text}
    row = {"prompt": [user], "chosen": [assistant(text)], "rejected": [assistant("no")]}
    prompt, chosen, _ = only_group(tmp_path, row, chat())

    assert chat().decode(prompt) == template(chat(), ("user", text), ask=True)
    control = [i for i in prompt if i in special_ids(chat())]
    assert control == ids(chat(), "<|im_start|><|im_end|><|im_start|>")

    assert chosen[-1] == chat().eos_token_id
    assert chat().decode(chosen[:-1]) == text
    assert not special_ids(chat()) & set(chosen[:-1])


def test_special_tokens_that_a_vocabulary_holds_whole(tmp_path: Path) -> None:
    """A tokenizer of whole words finds `</s>` in its vocabulary also when told not to look for special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "ok": 2, "a": 3, "no": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")

    row = {"prompt": "ok </s> a", "chosen": "a </s> ok", "rejected": "no"}
    unknown = [0, 0, 0, 0]  # the four characters of </s>
    expected = [[2, *unknown, 3], [3, *unknown, 2, 1], [4, 1]]
    assert only_group(tmp_path, row, tokenizer) == expected


@pytest.mark.parametrize(
    "requires, row",
    [
        (RANKING, PAIR),
        (RANKING, {"prompt": "ok</s>a", "chosen": "</s>", "rejected": BAD}),
        (RANKING, {"prompt": "", "chosen": GOOD, "rejected": BAD}),
        (FIRST, {"text": "ok ok, 42 naïve"}),
        (FIRST, {"text": "ok</s>"}),
    ],
)
def test_a_tokenizer_that_adds_an_eos_adds_none_to_prompts(tmp_path: Path, requires: Requires, row: dict) -> None:
    from tokenizers import processors

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A $B </s>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    assert ids(tokenizer, "ok", special=True)[-1] == tokenizer.eos_token_id
    assert only_group(tmp_path, row, tokenizer, requires) == only_group(tmp_path, row, plain(), requires)


# ---------------------------------------------------------------- the end of completions


def test_completions_that_were_truncated_have_no_eos(tmp_path: Path) -> None:
    """`finished`, as scripts/sample.py writes it, follows its completion when scores order them."""
    row = {"prompt": USER, "completions": [BAD, GOOD], "finished": [True, False], "scores": [0, 1]}
    _, chosen, rejected = only_group(tmp_path, row, plain())
    assert chosen == ids(plain(), GOOD)
    assert rejected == ended(plain(), BAD)


def test_samples_that_were_truncated_have_no_eos(tmp_path: Path) -> None:
    row = {
        "text": "I ok, 42",
        "reference_samples": ["ok", "7"],
        "reference_samples_finished": [False, True],
    }
    requires = Requires("first", samples="required")
    _, _, *samples = only_group(tmp_path, row, plain(), requires)
    assert samples == [ids(plain(), "ok"), ended(plain(), "7")]


FILTERS = ["", " | trim", " | upper", " | replace('  ', ' ')", ".split('is')[-1]"]


@pytest.mark.parametrize("filters", FILTERS)
def test_a_drawn_answer_is_as_it_was_sampled(tmp_path: Path, filters: str) -> None:
    """A chat template changes nothing of it. Behind a finished one stands the end of a turn, and nothing else."""
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = tiny.CHATML.replace("message['content']", f"message['content']{filters}")
    tokenizer.eos_token = "</s>"  # which the template does not write

    sample = "yes,  it is ok "
    row = {"prompt": TALK, "completions": [sample, sample + "42"], "finished": [False, True]}
    _, chosen, rejected = only_group(tmp_path, row, tokenizer)
    assert chosen == ids(tokenizer, sample)
    assert rejected == [*ids(tokenizer, sample + "42"), *ids(tokenizer, "<|im_end|>")]


THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and '</think>' not in message['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("sample", ["<think>\nso it", "<think>\nso\n</think>\n\nyes it", "ok"])
def test_a_truncated_sample_gets_no_thoughts_of_the_template(tmp_path: Path, sample: str) -> None:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = THINKING
    row = {
        "messages": [*TALK, assistant(GOOD)],
        "reference_samples": [sample, "no"],
        "reference_samples_finished": [False, False],
    }
    _, _, *samples = only_group(tmp_path, row, tokenizer, Requires("first", samples="required"))
    assert samples == [ids(tokenizer, sample), ids(tokenizer, "no")]


def test_context_that_nothing_counted_follows_is_truncated_too() -> None:
    completion = EncodedCompletion([5, 6, 7, 8, 9], [True, True, False, False, True])
    assert completion.truncated(9) == completion
    for room in (4, 3, 2):
        assert completion.truncated(room) == EncodedCompletion([5, 6], [True, True])
    assert completion.truncated(1) == EncodedCompletion([5], [True])


# ---------------------------------------------------------------- batches of examples


def test_examples_are_encoded_one_by_one_as_in_a_batch() -> None:
    """Whatever stands beside an example, with all its completions, the first ones, or none."""
    examples = [
        Example("", 1, USER, [Completion(GOOD), Completion(BAD)]),
        Example("", 2, TALK, [Completion([assistant(GOOD)])]),
        Example("", 3, "a</s>b", [Completion(""), Completion("<s>", is_finished=False), Completion("ok")]),
        Example("", 4, None, [Completion("ok 42"), Completion(BAD)]),
        Example("", 5, "a ", [Completion("ok"), Completion("no")]),  # whose ids change when a word follows
        Example("", 6, TALK, [Completion([assistant(GOOD), *TALK, assistant(BAD)])]),
    ]
    encoder = Encoder(chat())
    for num_completions in (None, 1):
        batch = list(encoder.encode(examples, num_completions))
        for example, encoded in zip(examples, batch, strict=True):
            (alone,) = encoder.encode([example], num_completions)
            assert encoded == alone
            assert len(encoded.completions) == len(example.completions[:num_completions])

    prompts = list(encoder.encode(examples[:3], 0))
    assert [encoded.completions for encoded in prompts] == [[], [], []]


def test_examples_that_cannot_be_encoded_are_counted() -> None:
    refusing = tiny.make_tokenizer(bos=False, chat=True)
    refusing.chat_template = "{{ raise_exception('no chats') }}"
    examples = [
        Example("", 1, TALK, [Completion([assistant(GOOD)])]),
        Example("", 2, "", [Completion(GOOD)]),
        Example("", 3, USER, [Completion(GOOD)]),
    ]

    counts = Counts()
    (encoded,) = Encoder(refusing, counts).encode(examples)
    assert encoded.example.number == 3
    assert counts.dropped == {"refused by the chat template (no chats)": 1, "empty prompt": 1}


DIFFERENT = "the chat template renders the prompt differently once an answer follows"
OPENS_THOUGHTS = tiny.CHATML.replace("assistant\n'", "assistant\n<think>\n'")  # only in the generation prompt
CHANGES_FOR_NO = "{% if messages[-1]['content'] == 'no' %}{{ 'x' }}{% endif %}" + tiny.CHATML


@pytest.mark.parametrize(
    "changing", ["{{ messages | length }}" + tiny.CHATML, "{{ messages[-1]['role'] }}" + tiny.CHATML]
)
def test_a_template_that_changes_every_prompt_leaves_no_row(tmp_path: Path, changing: str) -> None:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = changing
    row = {"prompt": TALK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    with pytest.raises(UserError, match=f"no usable row; rows 1, kept 0, dropped: {DIFFERENT} 1$"):
        only_group(tmp_path, row, tokenizer)


@pytest.mark.parametrize("answers", [("no", "ok"), ("ok", "no")])
def test_a_row_whose_prompt_the_template_changes_is_dropped(answers: tuple[str, str]) -> None:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = CHANGES_FOR_NO
    examples = [
        Example("", 1, TALK, [Completion([assistant(GOOD)]), Completion([assistant(BAD + "!")])]),
        Example("", 2, TALK, [Completion([assistant(answer)]) for answer in answers]),
    ]
    counts = Counts()
    (encoded,) = Encoder(tokenizer, counts).encode(examples)
    assert encoded.example.number == 1
    assert counts.dropped == {DIFFERENT: 1}


PARTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
NO_ANSWERS = tiny.CHATML.replace("{{", "{% if message['role'] == 'user' %}{{", 1).replace("}}", "}}{% endif %}", 1)


@pytest.mark.parametrize(
    "hiding, role",
    [
        ("{% for message in messages %}" + PARTS + "<|im_end|>{% endfor %}", "user"),
        ("{% for message in messages %}{{ message['text'] }}<|im_end|>{% endfor %}", "user"),
        (NO_ANSWERS.replace(" == 'user'", " == 'assistant'"), "user"),
        (NO_ANSWERS, "assistant"),
        (tiny.CHATML.replace("message['content']", "(message['content'] if loop.first else '')"), "assistant"),
    ],
)
def test_a_template_that_shows_no_text_is_refused(tmp_path: Path, hiding: str, role: str) -> None:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = hiding
    row = {"prompt": TALK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    with pytest.raises(UserError, match=f"the chat template shows none of the text of role '{role}'"):
        only_group(tmp_path, row, tokenizer)


@pytest.mark.parametrize("filters", [" | upper", " | trim", " | replace('  ', ' ')", ".split('</think>')[-1]"])
def test_a_template_that_rewrites_texts_is_accepted(tmp_path: Path, filters: str) -> None:
    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.chat_template = tiny.CHATML.replace("message['content']", f"message['content']{filters}")
    row = {"prompt": TALK, "chosen": [assistant("so</think>" + GOOD)], "rejected": [assistant(BAD)]}
    _, _, rejected = only_group(tmp_path, row, tokenizer)
    assert len(rejected) > 1
