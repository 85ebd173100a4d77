"""Rows of every form and container to token ids, against ids encoded by hand."""

import gzip
import json
from array import array
from pathlib import Path

import pytest
import torch
import worlds

from shared import UserError, data
from shared.data import Groups, Needs, describe, load
from shared.rows import FORMS

LENGTH = 512
RANKING, ONE = Needs(), Needs(completions=1)


@pytest.fixture(scope="module")
def plain():  # noqa: ANN201
    return worlds.make_tokenizer()


@pytest.fixture(scope="module")
def chat():  # noqa: ANN201
    return worlds.make_tokenizer(chat=True)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one(tmp_path: Path, row: dict, tokenizer, needs: Needs = RANKING, **limits):  # noqa: ANN001, ANN003, ANN201
    """Prompt and completions, as ids, of the only row."""
    groups = load(
        write(tmp_path / "rows.jsonl", [row]),
        tokenizer,
        needs,
        **{"max_length": LENGTH, "max_prompt_length": None, **limits},
    )
    return pieces(groups, 0)


def pieces(groups: Groups, i: int) -> tuple[list[int], ...]:
    marks = groups.offsets[i].tolist()
    return tuple(groups.tokens[a:b].tolist() for a, b in zip(marks, marks[1:], strict=False))


def ids(tokenizer, text: str, special: bool = False) -> list[int]:  # noqa: ANN001
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def template(tokenizer, *messages: tuple[str, str], ask: bool = False) -> str:  # noqa: ANN001
    rows = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=ask)


USER, GOOD, BAD = "is it ok?", "yes, it is", "no"
TALK = [{"role": "user", "content": USER}]
SHARE = [{"from": "human", "value": USER}]


def said(content: str) -> dict:
    return {"role": "assistant", "content": content}


STRING_PAIRS = [
    {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    {"prompt": USER, "completions": [GOOD, BAD]},
    {"prompt": USER, "completions": [BAD, GOOD], "scores": [0.5, 2]},
    {"prompt": USER, "completions": [BAD, GOOD], "scores": [[0, 1], [5, -1]]},
    {"history": USER, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    {"history": USER, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0},
]
CHAT_PAIRS = [
    {"prompt": TALK, "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    {
        "prompt": USER,
        "chosen": [*TALK, said(GOOD)],
        "rejected": [*TALK, said(BAD)],
        "score_chosen": 1,
        "score_rejected": 2,
    },
    {"prompt": USER, "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    {"chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(BAD)]},
    {"prompt": TALK, "completions": [GOOD, BAD]},
    {"conversations": SHARE, "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
    {"instruction": USER, "input": "", "chosen": GOOD, "rejected": BAD},
]


@pytest.mark.parametrize("row", STRING_PAIRS, ids=str)
def test_string_pairs(tmp_path: Path, plain, row: dict) -> None:  # noqa: ANN001
    expected = (
        ids(plain, USER, special=True),
        ids(plain, GOOD) + [plain.eos_token_id],
        ids(plain, BAD) + [plain.eos_token_id],
    )
    assert one(tmp_path, row, plain) == expected
    assert expected[0][0] == plain.bos_token_id and expected[0].count(plain.bos_token_id) == 1


@pytest.mark.parametrize("row", CHAT_PAIRS, ids=str)
def test_chat_pairs(tmp_path: Path, chat, row: dict) -> None:  # noqa: ANN001
    prompt = ids(chat, template(chat, ("user", USER), ask=True))
    full = [ids(chat, template(chat, ("user", USER), ("assistant", text)).rstrip("\n")) for text in (GOOD, BAD)]
    assert full[0][-1] == chat.eos_token_id  # what the template adds behind the EOS is cut off
    assert one(tmp_path, row, chat) == (prompt, *(f[len(prompt) :] for f in full))


def test_a_prompt_of_messages_that_are_repeated_in_part(tmp_path: Path, chat) -> None:  # noqa: ANN001
    """No message of the prompt is lost: pairs repeat its beginning, all of it, or its end, or the row is refused."""
    system, more = {"role": "system", "content": "be kind"}, [said("what?"), {"role": "user", "content": "this"}]
    pair = {"chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(BAD)]}
    both = one(tmp_path, {"prompt": [system, *TALK], "chosen": [said(GOOD)], "rejected": [said(BAD)]}, chat)
    assert one(tmp_path, {"prompt": [system, *TALK], **pair}, chat) == both
    longer = {"chosen": [*TALK, *more, said(GOOD)], "rejected": [*TALK, *more, said(BAD)]}
    assert one(tmp_path, {"prompt": TALK, **longer}, chat) == one(tmp_path, longer, chat)
    for prompt in ([system], more, [*TALK, *more]):
        with pytest.raises(UserError, match="line 1: fields 'chosen' and 'rejected' begin with other messages than"):
            one(tmp_path, {"prompt": prompt, **pair}, chat)


def test_transcripts_split_at_the_last_assistant(tmp_path: Path, plain) -> None:  # noqa: ANN001
    talk = "\n\nHuman: a ok?\n\nAssistant: The sky is bl\n\nHuman: 42\n\nAssistant:"
    row = {"chosen": talk + " blue", "rejected": talk + " blo"}  # a split by characters would cut inside "bl"
    prompt, chosen, rejected = one(tmp_path, row, plain)
    assert prompt == ids(plain, talk, special=True)
    assert (chosen, rejected) == tuple(ids(plain, end) + [plain.eos_token_id] for end in (" blue", " blo"))


SUPERVISED = [
    ({"prompt": USER, "completion": GOOD}, False),
    ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, False),
    ({"prompt": USER, "completions": [BAD, GOOD, "ok"], "scores": [1, 3, 2]}, False),
    ({"prompt": TALK, "completion": [said(GOOD)]}, True),
    ({"prompt": TALK, "completion": GOOD}, True),
    ({"prompt": USER, "completion": [said(GOOD)]}, True),
    ({"messages": [*TALK, said(GOOD)]}, True),
    ({"messages": [*TALK, said(GOOD), {"role": "user", "content": "thanks"}]}, True),
    ({"conversations": [*SHARE, {"from": "gpt", "value": GOOD}]}, True),
    ({"instruction": "is it", "input": "ok?", "output": GOOD}, "is it\nok?"),
]


@pytest.mark.parametrize("row, through_template", SUPERVISED, ids=str)
def test_supervised_rows(tmp_path: Path, plain, chat, row: dict, through_template: bool | str) -> None:  # noqa: ANN001
    if not through_template:
        expected = ids(plain, USER, special=True), ids(plain, GOOD) + [plain.eos_token_id]
        assert one(tmp_path, row, plain, ONE) == expected
        return
    user = through_template if isinstance(through_template, str) else USER
    prompt = ids(chat, template(chat, ("user", user), ask=True))
    assert one(tmp_path, row, chat, ONE) == (prompt, ids(chat, GOOD) + [chat.eos_token_id])


def test_the_loss_of_a_chat_is_on_its_last_answer(tmp_path: Path, chat) -> None:  # noqa: ANN001
    row = {"messages": [*TALK, said("first"), {"role": "user", "content": "and?"}, said(GOOD)]}
    before = template(chat, ("user", USER), ("assistant", "first"), ("user", "and?"), ask=True)
    assert one(tmp_path, row, chat, ONE) == (ids(chat, before), ids(chat, GOOD) + [chat.eos_token_id])


@pytest.mark.parametrize("bos", [True, False])
def test_running_text(tmp_path: Path, bos: bool) -> None:
    tokenizer = worlds.make_tokenizer(bos=bos)
    whole = ids(tokenizer, "ok ok, 42 naïve", special=True)
    assert one(tmp_path, {"text": "ok ok, 42 naïve"}, tokenizer, ONE) == (
        whole[:1],
        whole[1:] + [tokenizer.eos_token_id],
    )


@pytest.mark.parametrize(
    "text", ["a</s>b", "<|im_end|>", "<s><|im_start|>system\nok<|im_end|>\n", "ok </s>", "\U000f00000;"]
)
def test_special_tokens_in_texts_are_plain_text(tmp_path: Path, chat, text: str) -> None:  # noqa: ANN001
    """Neither prompt nor completion, plain or chat, lets a text make control tokens; decoding gives the text back."""
    specials = set(chat.all_special_ids) | {t for t, a in chat.added_tokens_decoder.items() if a.special}
    prompt, chosen, _ = one(tmp_path, {"prompt": "x" + text, "chosen": text, "rejected": "no"}, chat)
    assert not specials & {*prompt[1:], *chosen[:-1]} and chosen[-1] == chat.eos_token_id
    assert chat.decode(prompt[1:]) == "x" + text and chat.decode(chosen[:-1]) == text
    row = {"prompt": [{"role": "user", "content": text}], "chosen": [said(text)], "rejected": [said("no")]}
    prompt, chosen, _ = one(tmp_path, row, chat)
    assert chat.decode(prompt) == template(chat, ("user", text), ask=True)
    assert [t for t in prompt if t in specials] == ids(chat, "<|im_start|><|im_end|><|im_start|>")
    assert chat.decode(chosen[:-1]) == text and not specials & set(chosen[:-1])


def test_special_tokens_that_a_vocabulary_holds_whole(tmp_path: Path) -> None:
    """A tokenizer of whole words finds `</s>` in its vocabulary also when told not to look for special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "ok": 2, "a": 3, "no": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    found = one(tmp_path, {"prompt": "ok </s> a", "chosen": "a </s> ok", "rejected": "no"}, words)
    assert found == ([2, 0, 0, 0, 0, 3], [3, 0, 0, 0, 0, 2, 1], [4, 1])


def test_a_tokenizer_that_adds_an_eos_adds_none_to_prompts(tmp_path: Path, plain) -> None:  # noqa: ANN001
    from tokenizers import processors

    tokenizer, specials = worlds.make_tokenizer(), [(t, plain.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=specials
    )
    assert ids(tokenizer, "ok", special=True)[-1] == tokenizer.eos_token_id
    for needs, row in (
        (RANKING, {"prompt": USER, "chosen": GOOD, "rejected": BAD}),
        (RANKING, {"prompt": "ok</s>a", "chosen": "</s>", "rejected": BAD}),
        (RANKING, {"prompt": "", "chosen": GOOD, "rejected": BAD}),
        (ONE, {"text": "ok ok, 42 naïve"}),
        (ONE, {"text": "ok</s>"}),
    ):
        assert one(tmp_path, row, tokenizer, needs) == one(tmp_path, row, plain, needs)


def test_cutting(tmp_path: Path, plain) -> None:  # noqa: ANN001
    row = {"prompt": "a é I ok 42 7 a é", "chosen": "ok ok ok ok ok ok", "rejected": "ok"}
    prompt, chosen, rejected = one(tmp_path, row, plain)
    limited = {"max_prompt_length": 4, "max_length": 8}
    bos = [plain.bos_token_id]
    assert one(tmp_path, row, plain, **limited) == (bos + prompt[-4:], chosen[:3], rejected[:3])
    assert chosen[:3][-1] != plain.eos_token_id and rejected[:3][-1] == plain.eos_token_id
    exactly = one(tmp_path, row, plain, max_prompt_length=len(prompt) - 1)
    assert exactly[0] == prompt  # BOS and that many tokens: nothing to cut
    groups = load(write(tmp_path / "rows.jsonl", [row]), plain, RANKING, **limited)
    assert groups.report["prompts cut"] == 1 and groups.report["completions cut"] == 1
    # a prompt that is cut and still leaves no room is dropped, and counted once
    write(tmp_path / "two.jsonl", [row, {**row, "prompt": "a"}])
    report = load(str(tmp_path / "two.jsonl"), plain, RANKING, 5, 4).report
    assert report["dropped"] == {"prompt too long": 1} and "prompts cut" not in report
    # a completion that fills the room to its last token loses only its EOS, and is counted
    full = len(prompt) + len(chosen) - 1
    assert one(tmp_path, row, plain, max_length=full)[1] == chosen[:-1]
    assert load(str(tmp_path / "rows.jsonl"), plain, RANKING, full, None).report["completions cut"] == 1
    assert "completions cut" not in load(str(tmp_path / "rows.jsonl"), plain, RANKING, full + 1, None).report


def test_rows_are_dropped_for_counted_reasons(tmp_path: Path, plain) -> None:  # noqa: ANN001
    good = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    rows = [
        good,
        good,
        {**good, "chosen": BAD, "rejected": GOOD},
        {**good, "chosen": " \n"},
        {**good, "rejected": ""},
        {**good, "rejected": GOOD},
        {**good, "prompt": ""},
        {**good, "prompt": "ok " * 500},
    ]
    groups = load(write(tmp_path / "rows.jsonl", rows), plain, RANKING, 100, None)
    assert groups.report == {
        "sha256": groups.report["sha256"],
        "rows": 8,
        "kept": 4,
        "dropped": {"empty completion": 2, "identical completions": 1, "prompt too long": 1},
        "duplicates": 1,
        "contradictions": 1,
    }
    assert describe(groups.report) == (
        "rows 8, kept 4, dropped: empty completion 2, identical completions 1, prompt too long 1; "
        "contradictions 1; duplicates 1"
    )
    assert groups.rows.tolist() == [1, 2, 3, 7]
    assert pieces(groups, 3)[0] == [plain.bos_token_id]  # an empty prompt is the BOS where there is one
    without = load(str(tmp_path / "rows.jsonl"), worlds.make_tokenizer(bos=False), RANKING, 100, None)
    assert without.report["dropped"]["empty prompt"] == 1


def test_identical_is_what_has_the_same_ids(tmp_path: Path, chat) -> None:  # noqa: ANN001
    """Also where the template trims; where scores are the target, or one completion is enough, the row is kept."""
    trimming = worlds.make_tokenizer(chat=True)
    trimming.chat_template = worlds.CHATML.replace("message['content']", "message['content'] | trim")
    row = {"chosen": [*TALK, said(GOOD + " ")], "rejected": [*TALK, said(GOOD)]}
    assert one(tmp_path, row, chat)[1] != one(tmp_path, row, chat)[2]
    same = {"chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(GOOD)], "score_chosen": 1, "score_rejected": 0}
    for rows, tokenizer in ((row, trimming), (same, chat)):
        with pytest.raises(UserError, match="dropped: identical completions 1"):
            one(tmp_path, rows, tokenizer)
    prompt, *found = one(tmp_path, same, chat, Needs(2, scores=True))
    assert prompt == ids(chat, template(chat, ("user", USER), ask=True))
    assert found == [ids(chat, GOOD) + [chat.eos_token_id]] * 2
    assert one(tmp_path, same, chat, ONE) == (prompt, found[0])


def test_ties_and_transcripts_are_dropped(tmp_path: Path, plain) -> None:  # noqa: ANN001
    ranked = [
        {"prompt": USER, "completions": [GOOD, BAD], "scores": s}
        for s in ([1, 1], [2, 1], [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    ]
    assert load(write(tmp_path / "a.jsonl", ranked), plain, RANKING, LENGTH, None).report["dropped"] == {
        "tied scores": 2
    }
    talk = "\n\nHuman: ok\n\nAssistant:"
    transcripts = [
        {"chosen": talk + a, "rejected": b} for a, b in ((" a", talk + " b"), (" a", "x" + talk), (" a", "b"))
    ]
    report = load(write(tmp_path / "b.jsonl", transcripts), plain, RANKING, LENGTH, None).report
    assert report["dropped"] == {"prompts differ": 1, "no Assistant turn": 1}


def containers(folder: Path, rows: list[dict]) -> list[str]:
    """The same rows in every container."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    names = ["a.jsonl", "b.json", "c.json", "d.parquet", "e.jsonl.gz", "f.json.gz", "g.parquet.gz", "h.json", "i.jsonl"]
    paths = [folder / name for name in names]
    paths[0].write_text(lines)
    paths[1].write_text(json.dumps(rows, indent=1))
    paths[2].write_text("\n" + lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    paths[7].write_text(json.dumps(rows), encoding="utf-8-sig")
    paths[8].write_text(lines, encoding="utf-8-sig")
    for path, source in zip(paths[4:7], (paths[0], paths[1], paths[3]), strict=True):
        path.write_bytes(gzip.compress(source.read_bytes()))
    (folder / "files").mkdir()
    (folder / "files" / "1.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "files" / "2.json").write_text(json.dumps(rows[1:]))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "splits")
    return [
        *map(str, paths),
        *(str(folder / name) for name in ("files", "saved", "splits")),
        f"{folder / 'splits'}:train",
    ]


def test_every_container_gives_the_same_groups(tmp_path: Path, plain) -> None:  # noqa: ANN001
    rows = worlds.make_rows(5, 3)
    for source in containers(tmp_path, rows):
        groups = load(source, plain, RANKING, LENGTH, None)
        expected = [
            (ids(plain, r["prompt"], True), *(ids(plain, r[c]) + [plain.eos_token_id] for c in ("chosen", "rejected")))
            for r in rows
        ]
        assert [pieces(groups, i) for i in range(5)] == expected, source


MISTAKES = [
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing for prompt + chosen + rejected"),
    ('{"a": 1}', "unknown columns a"),
    ('{"prompt": "a", "chosen": "b", "rejected": null}', "line 1: field 'rejected' is null"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}', "line 2: field 'rejected' is"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"chosen": "b", "rejected": "c"}', "line 2: field 'prompt'"),
    ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 1: field 'rejected' is of type int"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": ', "line 3: not valid JSON"),
    ("[1, 2", "not valid JSON"),
    ('["a"]', "row 1: a row must be an object"),
    ("", "no rows"),
    ('{"messages": []}', "field 'messages' has no messages"),
    ('{"messages": [{"role": "robot", "content": "a"}]}', "message 0: unknown role 'robot'"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 0: unknown role ['user']"),
    ('{"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "human", "value": "b"}, '
     '"rejected": {"from": "gpt", "value": "c"}}', "line 1: a completion must begin with a message of the assistant"),
    ('{"prompt": "a", "completions": ["b", "c"], "finished": false}', "field 'finished' must hold 2 booleans"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "reference_samples": ["d"], "reference_samples_finished": []}',
     "field 'reference_samples_finished' must hold 1 booleans"),
    ('{"messages": [{"role": "user"}]}', "message 0: content must be text, not NoneType"),
    ('{"prompt": "a", "completion": "b"}', "line 1: this run needs chosen and rejected"),
    ('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": "a", "completions": ["b"]}', "line 2: this run"),
    ('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": "a", "completions": ["b", "c", "d"]}', "line 2: 3 "),
    ('{"prompt": "a", "completions": ["b", "c"], "scores": [1]}', "field 'scores' must hold 2 numbers"),
    ('{"prompt": "a", "completions": ["b", "c"], "scores": ["x", 1]}', "field 'scores' must hold finite numbers"),
    ('{"prompt": "a", "completions": "b"}', "field 'completions' is of type str"),
    ('{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 2}', "field 'labels' is 2"),
    ('{"prompt": "a", "chosen": " ", "rejected": "c"}', "no usable row; rows 1, kept 0, dropped: empty completion 1"),
    ('{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
     '"rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}', "no chat template"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", MISTAKES, ids=lambda value: value[:60])
def test_mistakes_are_one_clear_line(tmp_path: Path, plain, text: str, message: str) -> None:  # noqa: ANN001
    path = tmp_path / ("rows.json" if text.startswith("[") else "rows.jsonl")
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(str(path), plain, RANKING, LENGTH, None)
    assert message in str(error.value) and str(path) in str(error.value) or "chat template" in message
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path, plain) -> None:  # noqa: ANN001
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"text": "ok"}')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:40])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing more")
    texts = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "latin.parquet")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("latin.jsonl", "line 2: not UTF-8"),
        ("cut.jsonl.gz", "cannot be read"),
        ("cut.parquet", "cannot be read"),
        ("latin.parquet", "latin.parquet: cannot be read"),
        ("files:test", "files:test: a directory of files has no splits"),
        ("rows.csv", "must end in"),
        ("empty", "no file that ends in"),
        ("absent.jsonl", "neither a file, a directory nor a data set on the hub"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / name), plain, ONE, LENGTH, None)


def test_no_eos(tmp_path: Path) -> None:
    tokenizer = worlds.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        one(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD}, tokenizer)


def test_the_cache_follows_the_content(tmp_path: Path, plain, chat) -> None:  # noqa: ANN001
    row = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    first = one(tmp_path, row, plain)
    assert one(tmp_path, row, plain) == first
    assert one(tmp_path, {**row, "chosen": BAD, "rejected": GOOD}, plain) == (first[0], first[2], first[1])
    assert one(tmp_path, row, chat)[1][-1] == chat.eos_token_id != first[1][-1]
    assert one(tmp_path, row, plain, ONE) == first[:2]


def test_completions_that_were_cut_off_have_no_eos(tmp_path: Path, plain) -> None:  # noqa: ANN001
    """`finished`, as scripts/sample.py writes it, follows its completion when scores order them."""
    row = {"prompt": USER, "completions": [BAD, GOOD], "finished": [True, False], "scores": [0, 1]}
    assert one(tmp_path, row, plain)[1:] == (ids(plain, GOOD), ids(plain, BAD) + [plain.eos_token_id])
    samples = {"reference_samples": ["ok", "7"], "reference_samples_finished": [False, True]}
    row = {"text": "I ok, 42", **samples}
    found = one(tmp_path, row, plain, Needs(completions=1, samples=True))
    assert found[2:] == (ids(plain, "ok"), ids(plain, "7") + [plain.eos_token_id])
    # nor what a chat template writes behind an answer
    gemma = worlds.make_tokenizer(chat=True)
    gemma.eos_token = "</s>"
    row = {"prompt": TALK, "completions": [GOOD + " ", BAD], "finished": [False, True]}
    end = ids(gemma, "<|im_end|>\n") + [gemma.eos_token_id]
    for filters, cut in (("", GOOD + " "), (" | trim", GOOD)):
        gemma.chat_template = worlds.CHATML.replace("message['content']", f"message['content']{filters}")
        assert one(tmp_path, row, gemma)[1:] == (ids(gemma, cut), ids(gemma, BAD) + end)
    with pytest.raises(UserError, match="field 'finished' must hold 2 booleans"):
        one(tmp_path, {"prompt": USER, "completions": [BAD, GOOD], "finished": [1, 0]}, plain)


def test_every_form_is_tested() -> None:
    rows = [*STRING_PAIRS, *CHAT_PAIRS, *(row for row, _ in SUPERVISED), {"chosen": "", "rejected": ""}, {"text": ""}]
    tested = {next(form for form in FORMS if all(name in row for name in form)) for row in rows}
    assert tested == set(FORMS)


def test_collected_ids_become_a_tensor_without_a_copy() -> None:
    """Memory of a start-up grows by the ids themselves; one object for each number would take eight times as much."""
    values = array("i", [5, -1, 7])
    assert data._tensor(values, torch.int32).data_ptr() == values.buffer_info()[0]
    assert data._tensor(values, torch.int32).tolist() == [5, -1, 7]
    assert data._tensor(array("q"), torch.int64).shape == (0,)
