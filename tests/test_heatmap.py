"""Token rewards shown against float64 stock transformers, texts whole and escaped, one scale, layout, mistakes."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scripts import heatmap
from scripts.lab import heatmap_png, notices, plots
from scripts.lab.heatmap_panels import HIDDEN, Color, Piece, mark
from scripts.lab.row_files import EncodedRow
from scripts.lab.scoring import make_groups, token_logps_of
from shared import NonFinite, UserError
from shared.distributed import single_process
from shared.encode import EncodedCompletion
from shared.loading import load_policy_from
from shared.rows import Example

SCRIPT = "scripts/heatmap.py"
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2"),
    *("p", "sub", "div", "figure", "figcaption", "span", "i"),
}
ATTRIBUTES = {"lang", "charset", "name", "content", "class", "style", "title", "dir", "tabindex", "data-mark"}
ODD_TEXTS = [
    '<script>alert("1")</script> & \'q\' &lt;b&gt; </p></style><!-- ]]> <img src=x onerror="y">',
    "  two  blanks\n\n\ta tab, nothing\u00a0else \n ",
    "日本語の文章は、空白なしで書かれる。한국어도",
    "השעה היא 12:30 (בערך), Hello world לך.",
    "مرحبا بالعالم، هذا نص",
    "👩‍👩‍👧 👍🏽 🇩🇪🇫🇷 😀, nai\u0308ve e\u0301 1️⃣",
    "a real \ufffd, not a broken one: \ufffd\ufffd",
    "$x^2$ and \\frac{1}{2}, 100 % & {braces}",
]
MakeTokenizer = Callable[[], PreTrainedTokenizerFast]
PAIR = {"prompt": "I", "chosen": "ok", "rejected": "42"}


# ---------------------------------------------------------------- the page, read back


@dataclass
class Field:
    """One coloured span of the page."""

    title: str
    style: str
    kind: str | None  # special, context, or neither
    text: str = ""

    @property
    def special(self) -> bool:
        return self.kind == "special"

    @property
    def total(self) -> float:
        total, _, _ = self.title.partition(" nats")
        return number(total)

    @property
    def rewards(self) -> list[float]:
        """The rewards of its tokens, as the title tells them."""
        if self.kind == "context":
            assert (self.title, self.style) == ("context, not scored", "")
            return []
        _, _, list_of_rewards = self.title.partition(": ")
        if not list_of_rewards:
            return [self.total]
        return [number(word) for word in list_of_rewards.split()]

    @property
    def color(self) -> Color:
        rgba = re.fullmatch(r"background:rgba\((.*)\)", self.style)[1]
        red, green, blue, opacity = rgba.split(",")
        return Color(int(red), int(green), int(blue), float(opacity))


@dataclass
class Completion:
    """One figure of the page."""

    title: str = ""
    fields: list[Field] = field(default_factory=list)
    below: str = ""

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.fields)

    @property
    def rewards(self) -> list[float]:
        rewards = []
        for span in self.fields:
            rewards += span.rewards
        return rewards


def number(text: str) -> float:
    return float(text.replace("−", "-"))


class Page(HTMLParser):
    """A page as a browser would take it apart."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[tuple[str, str | None]] = []  # names and classes of the open elements
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.completions: list[Completion] = []
        self.prompts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    @property
    def fields(self) -> list[Field]:
        fields = []
        for completion in self.completions:
            fields += completion.fields
        return fields

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        self.elements[tag] += 1
        self.attributes.update(attributes)
        if tag != "meta":
            self.open.append((tag, attributes.get("class")))

        if tag == "figure":
            self.completions.append(Completion())
        elif tag == "span":
            span = Field(attributes["title"], attributes.get("style", ""), attributes.get("class"))
            self.completions[-1].fields.append(span)
        elif attributes.get("class") == "prompt":
            self.prompts.append("")

    def handle_endtag(self, tag: str) -> None:
        open_tag, _ = self.open.pop()
        assert open_tag == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        classes = [name for _, name in self.open]
        if "span" in tags:
            self.completions[-1].fields[-1].text += data
        elif "figcaption" in tags:
            self.completions[-1].title += data
        elif "figure" in tags:
            self.completions[-1].below += data
        elif "prompt" in classes:
            self.prompts[-1] += data


# ---------------------------------------------------------------- models, rows, runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A policy and its reference."""
    folder = tmp_path_factory.mktemp("models")
    return [tiny.make_model(folder / "policy", seed=0), tiny.make_model(folder / "reference", seed=1)]


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of all kinds of text."""
    rows = []
    for chosen, rejected in zip(ODD_TEXTS[::2], ODD_TEXTS[1::2], strict=True):
        rows.append({"prompt": f"Q: {chosen}", "chosen": chosen, "rejected": rejected})
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "odd.jsonl", rows)


@pytest.fixture(scope="module")
def odd_page(models: list[Path], odd_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of those pairs; the PNG lies beside it."""
    folder = tmp_path_factory.mktemp("pages")
    return run(models, odd_rows, folder / "new" / "odd.html", beta=0.25)


def run(models: list[Path], rows: Path, output: Path, **options: Any) -> Path:
    policy, reference_policy = models
    args = heatmap.Args(policy=str(policy), reference=str(reference_policy), rows=str(rows), output=output, **options)
    heatmap.main(args)
    return output


def expected_rewards(models: list[Path], row: dict, beta: float) -> list[list[float]]:
    """Eq 11 of each token of each completion, in float64, one completion at a time."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    policy, reference_policy = (reference.load_model(path) for path in models)
    group = reference.encode(tokenizer, row)
    rewards = []
    with torch.no_grad():
        for completion in group.completions:
            logps = reference.token_logps(policy, group.prompt, completion)
            ref_logps = reference.token_logps(reference_policy, group.prompt, completion)
            rewards.append((beta * (logps - ref_logps)).tolist())
    return rewards


# ---------------------------------------------------------------- values


def test_values_are_those_of_the_stock_models(models: list[Path], odd_rows: Path, odd_page: Path) -> None:
    expected = []
    for row in tiny.read_jsonl(odd_rows):
        expected += expected_rewards(models, row, 0.25)

    completions = Page(odd_page).completions
    assert len(completions) == len(expected) == 8
    for completion, rewards in zip(completions, expected, strict=True):
        assert completion.rewards == pytest.approx(rewards, rel=1e-3, abs=1e-4)
        for span in completion.fields:
            assert span.total == pytest.approx(sum(span.rewards), rel=1e-3, abs=1e-3)

        total, num_tokens = re.fullmatch(r"Σ r = (\S+) nats, (\d+) tokens", completion.below).groups()
        assert number(total) == pytest.approx(sum(rewards), rel=1e-3)
        assert int(num_tokens) == len(rewards)


def test_ranked_completions_keep_the_order_of_the_row(models: list[Path], tmp_path: Path) -> None:
    texts = ["ok", " naïve 42, (see) Q:", "a b\n7"]
    row = {"prompt": "I", "completions": texts}
    ranked_row = {**row, "scores": [0.0, 2.0, 1.0], "finished": [True, False, True]}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [ranked_row])
    completions = Page(run(models, rows, tmp_path / "out.html")).completions
    assert [completion.title for completion in completions] == ["completion 1", "completion 2", "completion 3"]
    assert [completion.text for completion in completions] == ["ok</s>", texts[1], "a b\n7</s>"]

    expected = expected_rewards(models, row, 0.1)
    expected[1].pop()  # the EOS that `reference.encode` puts behind every completion
    for completion, rewards in zip(completions, expected, strict=True):
        assert completion.rewards == pytest.approx(rewards, rel=1e-3, abs=1e-4)


def test_many_groups_in_small_batches(models: list[Path]) -> None:
    """`token_logps_of` puts every token back where it came from."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    stock_model = reference.load_model(models[0])
    groups = [reference.encode(tokenizer, row) for row in tiny.make_rows(9, seed=3, k=3)]

    example = Example("", 0, "", [])
    rows = []
    for group in groups:
        completions = [EncodedCompletion(ids, [True] * len(ids)) for ids in group.completions]
        rows.append(EncodedRow(example, group.prompt, completions))
    with single_process("float32") as ranks:
        policy = load_policy_from(str(models[0]), ranks)
        logps = token_logps_of(policy, make_groups(rows), 100, ranks)

    with torch.no_grad():
        for group_logps, group in zip(logps, groups, strict=True):
            for ours, completion in zip(group_logps, group.completions, strict=True):
                theirs = reference.token_logps(stock_model, group.prompt, completion)
                assert ours.dtype == torch.float64
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chat_rows(tmp_path: Path) -> None:
    models = [tiny.make_model(tmp_path / str(seed), seed=seed, chat=True) for seed in (0, 1)]
    row = {"prompt": [{"role": "user", "content": "ok?"}], "chosen": "naïve\n", "rejected": "<|im_end|> no"}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    page = Page(run(models, rows, tmp_path / "out.html"))

    assert page.prompts == ["<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant"]
    chosen, rejected = page.completions
    assert chosen.text == "naïve\n<|im_end|>"
    assert rejected.text == "<|im_end|> no<|im_end|>"
    for completion in (chosen, rejected):
        assert special_texts(completion) == ["<|im_end|>"]


def test_context_between_turns_has_no_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [tiny.make_model(tmp_path / str(seed), seed=seed, chat=True) for seed in (0, 1)]
    turns = [("assistant", "naïve"), ("user", "and?"), ("assistant", "no")]
    chosen = [{"role": role, "content": text} for role, text in turns]
    row = {"prompt": [{"role": "user", "content": "ok?"}], "chosen": chosen, "rejected": chosen[2:], "id": 7}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    page = Page(run(models, rows, tmp_path / "out.html"))
    assert capsys.readouterr().out.endswith("out.png: rows 1, kept 1; not used: id\n")

    context = "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    first, second = page.completions
    assert first.text == f"naïve<|im_end|>{context}no<|im_end|>"
    assert "".join(span.text for span in first.fields if span.kind == "context") == context
    assert special_texts(first) == ["<|im_end|>"] * 2
    assert all(span.kind != "context" for span in second.fields)

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    prompt = tokenizer("<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
    pieces = [
        tokenizer(text, add_special_tokens=False).input_ids for text in ("naïve<|im_end|>", context, "no<|im_end|>")
    ]
    policy, reference_policy = (reference.load_model(path) for path in models)
    with torch.no_grad():
        logps = reference.token_logps(policy, prompt, sum(pieces, []))
        ref_logps = reference.token_logps(reference_policy, prompt, sum(pieces, []))
    rewards = (0.1 * (logps - ref_logps)).tolist()
    expected = rewards[: len(pieces[0])] + rewards[-len(pieces[2]) :]
    assert first.rewards == pytest.approx(expected, rel=1e-3, abs=1e-4)

    total, num_tokens = re.fullmatch(r"Σ r = (\S+) nats, (\d+) tokens", first.below).groups()
    assert number(total) == pytest.approx(sum(expected), rel=1e-3)
    assert int(num_tokens) == len(expected)


def special_texts(completion: Completion) -> list[str]:
    return [span.text for span in completion.fields if span.special]


# ---------------------------------------------------------------- colours


def test_one_scale_for_the_whole_picture(odd_page: Path) -> None:
    fields = Page(odd_page).fields
    scale = max(abs(span.total) for span in fields)
    for span in fields:
        red_green_blue = span.color[:3]
        assert span.color.opacity == pytest.approx(0.7 * abs(span.total) / scale, abs=1e-3)
        if span.total > 0:
            assert red_green_blue == (0, 114, 178)
        else:
            assert red_green_blue == (213, 94, 0)

    text = odd_page.read_text(encoding="utf-8")
    low, high = re.search(r'class="legend">(\S+?)<div.*?</div>(\S+) nats</div>', text, re.DOTALL).groups()
    assert number(low) == -scale
    assert number(high) == scale


def test_png_has_the_strongest_color_on_white(odd_page: Path) -> None:
    from matplotlib import image

    strongest = max(Page(odd_page).fields, key=lambda span: abs(span.total))
    red, green, blue, opacity = strongest.color
    blended = opacity * torch.tensor([red, green, blue]) + (1 - opacity) * 255

    pixels = torch.tensor(image.imread(odd_page.with_suffix(".png")))[..., :3]
    pixels = (255 * pixels).round()
    legend = pixels[:130]  # its bar ends in that colour too
    panels = pixels[130:]
    for part in (legend, panels):
        distance = (part - blended).abs().amax(-1)
        assert (distance <= 1.5).sum() > 50

    white = 255
    assert (pixels[:, :40] == white).all()  # nothing sticks out
    assert (pixels[:, -40:] == white).all()


def test_a_policy_against_itself_has_no_color(models: list[Path], odd_rows: Path, tmp_path: Path) -> None:
    policy = shutil.copytree(models[0], tmp_path / "<img>&lt;")  # the page shows the names of the directories
    page = Page(run([policy, policy], odd_rows, tmp_path / "same.html", max_rows=1))
    assert len(page.completions) == 2
    assert set(page.elements) <= ELEMENTS
    for span in page.fields:
        assert set(span.rewards) == {0.0}
        assert span.color.opacity == 0


# ---------------------------------------------------------------- text


def test_text_comes_out_as_it_went_in(odd_rows: Path, odd_page: Path) -> None:
    page = Page(odd_page)
    rows = tiny.read_jsonl(odd_rows)
    assert page.prompts == [row["prompt"] for row in rows]
    assert [completion.title for completion in page.completions] == ["chosen", "rejected"] * 4

    texts = []
    for row in rows:
        texts += [row["chosen"], row["rejected"]]
    for completion, text in zip(page.completions, texts, strict=True):
        assert completion.text == text + "</s>"
        assert special_texts(completion) == ["</s>"]


def test_no_element_comes_from_a_text(odd_page: Path) -> None:
    page = Page(odd_page)
    assert set(page.elements) == ELEMENTS
    assert page.attributes == ATTRIBUTES
    assert page.elements["style"] == 1
    assert page.elements["figure"] == 8
    assert page.elements["p"] == 1 + 4 + 2 * 8

    text = odd_page.read_text(encoding="utf-8")
    unescaped = re.sub(r"&lt;.*?&gt;", "", text)
    assert not re.search(r"url\(|@import|src=|href=|<script", unescaped)


def test_whitespace_and_control_characters_have_marks(models: list[Path], tmp_path: Path) -> None:
    row = {"prompt": "a\x00b\x1b", "chosen": "x\n\ty\u00a0 ", "rejected": "n\x00 \x07\r\x7f z"}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    text = run(models, rows, tmp_path / "out.html").read_text(encoding="utf-8")
    _, chosen, rejected = text.split("<figure>")

    assert marks_in(chosen) == ["↵", "⇥", "·", "·"]
    assert [char for char in marks_in(rejected) if char != "·"] == ["^@", "^G", "^M", "^?"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def marks_in(text: str) -> list[str]:
    return re.findall(r'data-mark="(.*?)"', text)


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("make_tokenizer", [tiny.make_tokenizer, notices.make_tokenizer, tiny.make_sentencepiece])
def test_pieces_of_every_kind_of_tokenizer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    for text in [*ODD_TEXTS, "found camera, at market.", "a", "日", " naïve", "日x", "x日"]:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        numbers = [float(i) for i in range(len(ids))]
        pieces = heatmap.split_into_pieces(tokenizer, ids, numbers)
        assert joined_text(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert rewards_of(pieces) == numbers
        assert all(piece.text and piece.rewards for piece in pieces)

        *words, end = pieces
        assert end.special
        assert end.text.strip() == "</s>"
        if make_tokenizer is not notices.make_tokenizer:  # which has <unk>, a special token, for all but its words
            assert joined_text(words) == text
            assert not any(piece.special for piece in words)


def rewards_of(pieces: list[Piece]) -> list[float]:
    rewards = []
    for piece in pieces:
        rewards += piece.rewards
    return rewards


def joined_text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_bytes_are_grouped_as_the_tokenizer_places_them() -> None:
    """Against the tokenizer's own offsets: the tokens of a character all point at it."""
    tokenizer = tiny.make_tokenizer()
    text = "".join(ODD_TEXTS[2:4]) + " x\ufffdy 日 naïve…ok"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    groups: list[list[int]] = []
    group_end = 0
    for token, (start, end) in enumerate(encoded.offset_mapping):
        if start >= group_end:
            groups.append([])
        groups[-1].append(token)
        group_end = max(group_end, end)

    numbers = [float(token) for token in range(len(encoded.input_ids))]
    pieces = heatmap.split_into_pieces(tokenizer, encoded.input_ids, numbers)
    assert [piece.rewards for piece in pieces] == groups
    assert {len(group) for group in groups} == {1, 2, 3}


def test_what_is_drawn_as_one_is_one_piece() -> None:
    tokenizer = tiny.make_tokenizer()
    text = "👩‍👩‍👧 👍🏽 🇩🇪 e\u0301 1\ufe0f\u20e3 a\u200bb"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = heatmap.split_into_pieces(tokenizer, ids, [0.0] * len(ids))
    words = [piece.text.strip() for piece in pieces]
    assert list(filter(None, words)) == ["👩‍👩‍👧", "👍🏽", "🇩🇪", "e\u0301", "1\ufe0f\u20e3", "a\u200b", "b"]


@pytest.mark.parametrize(
    ("make_tokenizer", "replacements"),
    [
        (tiny.make_tokenizer, 1),  # for all bytes of the character together
        (tiny.make_sentencepiece, 4),  # for each byte
    ],
)
def test_an_unfinished_character_at_the_end(make_tokenizer: MakeTokenizer, replacements: int) -> None:
    """Bytes that are no character are shown as such, if a completion was truncated within a character."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("ab한한", add_special_tokens=False)[:-2]
    pieces = heatmap.split_into_pieces(tokenizer, ids, [1.0] * len(ids))
    assert joined_text(pieces).replace("한", "") == "ab" + replacements * "\ufffd"
    assert sum(piece.reward for piece in pieces) == len(ids)
    for piece in pieces:
        if "\ufffd" in piece.text:
            assert len(piece.rewards) == len(piece.text)


# ---------------------------------------------------------------- the PNG's lines


@pytest.fixture(scope="module")
def fonts() -> heatmap_png.Page:
    """A page with the fonts for all texts; to find them takes a while."""
    return heatmap_png.Page("".join(ODD_TEXTS), 1.0)


@pytest.fixture
def png(fonts: heatmap_png.Page) -> heatmap_png.Page:
    """An empty page."""
    fonts.texts = []
    fonts.fields = []
    return fonts


@pytest.mark.parametrize("text", [*ODD_TEXTS, "=" * 400, "a " * 300, "https://" + "abc/" * 90, "x\n\n\ny", "\n"])
def test_lines_hold_the_text_and_fit(png: heatmap_png.Page, text: str) -> None:
    pieces = [Piece(word, [0.1], False) for word in re.findall(r"\s*\S{1,3}|\s+", text)]
    bottom = png.add_paragraph(pieces, x=100, y=20, width=150)

    lines = {placed.y for placed in png.texts}
    assert len(lines) == (bottom - 20) / heatmap_png.LINE_HEIGHT
    for placed in png.texts:
        right = placed.x + png.text_width(placed.text)
        assert 99.99 <= placed.x <= right <= 250.01
    for colored in png.fields:
        right = colored.x + colored.width
        assert 99.99 <= colored.x <= right <= 250.5

    drawn = "".join(placed.text for placed in png.texts)
    visible = HIDDEN.sub(lambda match: mark(match[0]), text).translate(png.boxes)
    assert Counter(drawn.replace(" ", "")) == Counter(visible.replace(" ", ""))


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (["one", " two", " three"], [0, 1, 2]),
        (["שלום", " עולם", " טוב"], [2, 1, 0]),
        (["one", " שלום", " עולם", " two"], [0, 1, 2, 1, 3]),  # the first blank goes with the paragraph
        (["שלום", " one", " two", " עולם"], [3, 1, 2, 1, 0]),
        (["שלום", " 12", ":30", " עולם"], [3, 1, 2, 1, 0]),
    ],
)
def test_fields_stand_in_reading_order(png: heatmap_png.Page, words: list[str], order: list[int]) -> None:
    """From left to right as in Unicode's algorithm, one behind the other, as wide as the words."""
    pieces = [Piece(word, [i / 10], False) for i, word in enumerate(words)]
    png.add_paragraph(pieces, x=0, y=0, width=500)
    fields = sorted(png.fields)
    # at scale 1, a reward of i/10 has the opacity 0.07 i
    assert [round(colored.color.opacity / 0.07) for colored in fields] == order

    for left, right in zip(fields[:-1], fields[1:], strict=True):
        assert left.x + left.width == pytest.approx(right.x, abs=0.5)

    widths = [0.0] * len(words)
    for colored, word in zip(fields, order, strict=True):
        widths[word] += colored.width
    assert widths == pytest.approx([png.text_width(word) for word in words], abs=1.5)


def test_fonts_for_what_the_first_one_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    unassigned = "\U000e0fff"
    families, missing = heatmap_png.font_families(f"a の \n\x00{unassigned}")
    assert families[0] == "DejaVu Sans"
    assert len(families) > 1
    assert missing == {unassigned}

    page = heatmap_png.Page(f"a{unassigned}", 1.0)
    assert "no installed font" in capsys.readouterr().out
    page.add_text(f"a{unassigned}", x=0, y=0, width=100)
    assert [placed.text for placed in page.texts] == ["a□"]


# ---------------------------------------------------------------- mistakes


def fails(rows: list[dict], models: list[Path], tmp_path: Path, match: str, name: str = "out.html") -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=match):
        run(models, tmp_path / "rows.jsonl", tmp_path / name)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"out.html", "out.png"}
    assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "I", "completion": "a"}, "line 1: nothing to compare, completions: 1"),
        ({"prompt": "I"}, "line 1: nothing to compare, completions: 0"),
        ({**PAIR, "chosen": 1}, "field 'chosen'"),
        ({**PAIR, "prompt": "ok " * 600}, "no usable row; .*prompt too long 1"),
    ],
)
def test_unusable_rows(row: dict, match: str, models: list[Path], tmp_path: Path) -> None:
    fails([row], models, tmp_path, match)


def test_mistakes_have_a_line_each(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = models
    fails([PAIR], models, tmp_path, r"out\.png: must end in \.html", "out.png")
    fails([PAIR], [policy, tmp_path / "none"], tmp_path, "none: no such file or directory")

    other = tiny.make_model(tmp_path / "other", vocab=380)
    fails([PAIR], [policy, other], tmp_path, "--reference .*other: its tokenizer")

    short = tiny.make_model(tmp_path / "short", "gpt2", n_positions=16)
    long_prompt = {**PAIR, "prompt": "ok " * 20}
    fails([long_prompt], [policy, short], tmp_path, "no usable row; .*prompt too long 1")

    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(other)
    fails([PAIR], [other, other], tmp_path, "other: the tokenizer has no EOS token")

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    fails([PAIR], models, tmp_path, r"matplotlib: pip install -e \"\.\[plot\]\"")


def test_too_high_for_a_png(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap_png, "LINE_HEIGHT", 3000)
    fails([PAIR], models, tmp_path, r"out\.png: \d{5,} pixels high, a PNG has at most 65535")


def test_values_that_are_no_numbers(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_logps_of = heatmap.token_logps_of

    def no_numbers(*args: Any) -> list[list[torch.Tensor]]:
        (logps,) = token_logps_of(*args)
        return [[torch.full_like(of_completion, torch.nan) for of_completion in logps]]

    monkeypatch.setattr(heatmap, "token_logps_of", no_numbers)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(NonFinite, match="line 1: a token's reward"):
        run(models, rows, tmp_path / "out.html")


def test_command_line(models: list[Path], tmp_path: Path) -> None:
    policy, reference_policy = models
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": "ok " * 600}])
    options = {"policy": policy, "reference": reference_policy, "rows": rows, "output": tmp_path / "out.html"}

    def call(**more: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, SCRIPT, *tiny.arguments(**options, **more)]
        environment = tiny.environment(tmp_path / "cache")
        return subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)

    succeeded = call()
    assert succeeded.returncode == 0, succeeded.stderr
    assert succeeded.stdout.endswith("out.png: rows 2, kept 1, dropped: prompt too long 1\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"cache"} == {"out.html", "out.png", "rows.jsonl"}

    refused = call(max_rows=0)
    assert refused.returncode == 2
    assert refused.stderr == "heatmap.py: --max-rows 0: must be a finite number above 0\n"
