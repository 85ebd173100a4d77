"""Token rewards shown against float64 stock transformers, texts whole and escaped, one scale, layout, mistakes."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import figures
import heatmap
import notices
import pytest
import reference
import streaming
import torch
import worlds
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared import NonFinite, UserError
from shared.model import load_policy

SCRIPT = "scripts/heatmap.py"
ELEMENTS = "html head meta title style body h1 h2 p sub div figure figcaption span i".split()
ODD = [
    '<script>alert("1")</script> & \'q\' &lt;b&gt; </p></style><!-- ]]> <img src=x onerror="y">',
    "  two  blanks\n\n\ta tab, nothing\u00a0else \n ",
    "日本語の文章は、空白なしで書かれる。한국어도",
    "השעה היא 12:30 (בערך), Hello world לך.",
    "مرحبا بالعالم، هذا نص",
    "👩‍👩‍👧 👍🏽 🇩🇪🇫🇷 😀, nai\u0308ve e\u0301 1️⃣",
    "a real \ufffd, not a broken one: \ufffd\ufffd",
    "$x^2$ and \\frac{1}{2}, 100 % & {braces}",
]


@dataclass
class Field:
    """One coloured span of the page."""

    title: str
    style: str
    special: bool
    text: str = ""

    @property
    def values(self) -> list[float]:
        """The rewards of its tokens, as the title tells them."""
        total, _, each = self.title.partition(" nats")
        return numbers(each.partition(": ")[2] or total)

    @property
    def total(self) -> float:
        return numbers(self.title.partition(" nats")[0])[0]

    @property
    def color(self) -> tuple[float, ...]:
        return tuple(map(float, re.fullmatch(r"background:rgba\((.*)\)", self.style)[1].split(",")))


@dataclass
class Figure:
    """One completion of the page."""

    name: str = ""
    fields: list[Field] = field(default_factory=list)
    below: str = ""

    @property
    def text(self) -> str:
        return "".join(one.text for one in self.fields)

    @property
    def values(self) -> list[float]:
        return [value for one in self.fields for value in one.values]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace("−", "-").split()]


class Page(HTMLParser):
    """A page as a browser would take it apart."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.elements, self.attributes = [], Counter(), set()
        self.figures, self.prompts = [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        found = dict(attrs)
        if tag != "meta":
            self.open.append((tag, found))
        if tag == "figure":
            self.figures.append(Figure())
        elif tag == "span":
            self.figures[-1].fields.append(Field(found["title"], found["style"], found.get("class") == "special"))
        elif found.get("class") == "prompt":
            self.prompts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if "span" in tags:
            self.figures[-1].fields[-1].text += data
        elif "figcaption" in tags:
            self.figures[-1].name += data
        elif "figure" in tags:
            self.figures[-1].below += data
        elif any(found.get("class") == "prompt" for _, found in self.open):
            self.prompts[-1] += data


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A policy and its reference."""
    folder = tmp_path_factory.mktemp("models")
    return [worlds.make_model(folder / name, seed=seed) for seed, name in enumerate(("policy", "reference"))]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of all kinds of text."""
    rows = [{"prompt": f"Q: {a}", "chosen": a, "rejected": b} for a, b in zip(ODD[::2], ODD[1::2], strict=True)]
    return worlds.write_jsonl(tmp_path_factory.mktemp("rows") / "odd.jsonl", rows)


@pytest.fixture(scope="module")
def shown(models: list[Path], odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of those pairs."""
    return run(models, odd, tmp_path_factory.mktemp("shown") / "new" / "odd.html", beta=0.25)


def run(models: list[Path], rows: Path, output: Path, **options: object) -> Path:
    policy, ref = map(str, models)
    heatmap.main(heatmap.Args(policy=policy, reference=ref, rows=str(rows), output=output, **options))
    return output


def expected(models: list[Path], row: dict, beta: float) -> list[list[float]]:
    """Eq 11 of each token of each completion, in float64, one completion at a time."""
    group = reference.encode(AutoTokenizer.from_pretrained(models[0]), row)
    with torch.no_grad():
        own, ref = (
            [reference.token_logps(reference.load_model(path), group.prompt, y) for y in group.completions]
            for path in models
        )
    return [(beta * (a - b)).tolist() for a, b in zip(own, ref, strict=True)]


# ---------------------------------------------------------------- values


def test_values_are_those_of_the_stock_models(models: list[Path], odd: Path, shown: Path) -> None:
    page = Page(shown)
    wanted = [values for row in worlds.read_jsonl(odd) for values in expected(models, row, 0.25)]
    assert len(page.figures) == len(wanted) == 8
    for figure, values in zip(page.figures, wanted, strict=True):
        assert figure.values == pytest.approx(values, rel=1e-3, abs=1e-4)
        for one in figure.fields:
            assert one.total == pytest.approx(sum(one.values), rel=1e-3, abs=1e-3)
        sums, tokens = re.fullmatch(r"Σ r = (\S+) nats, (\d+) tokens", figure.below).groups()
        assert numbers(sums)[0] == pytest.approx(sum(values), rel=1e-3) and int(tokens) == len(values)


def test_ranked_completions_keep_the_order_of_the_row(models: list[Path], tmp_path: Path) -> None:
    texts = ["ok", " naïve 42, (see) Q:", "a b\n7"]
    row = {"prompt": "I", "completions": texts, "scores": [0.0, 2.0, 1.0], "finished": [True, False, True]}
    page = Page(run(models, worlds.write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "out.html"))
    assert [figure.name for figure in page.figures] == ["completion 1", "completion 2", "completion 3"]
    assert [figure.text for figure in page.figures] == ["ok</s>", texts[1], "a b\n7</s>"]
    del row["scores"]
    wanted = expected(models, row, 0.1)
    wanted[1].pop()  # the EOS that `reference.encode` puts behind every completion
    assert [f.values for f in page.figures] == [pytest.approx(v, rel=1e-3, abs=1e-4) for v in wanted]


def test_many_groups_in_small_batches(models: list[Path]) -> None:
    """`streaming.token_logps` puts every token back where it came from."""
    rows, model = worlds.make_rows(9, seed=3, k=3), reference.load_model(models[0])
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    groups = [reference.encode(tokenizer, row) for row in rows]
    packed = streaming.make_groups([streaming.Row(None, {}, g.prompt, g.completions) for g in groups])
    with streaming.alone("float32") as place:
        found = streaming.token_logps(load_policy(str(models[0]), place), packed, 100, place)
    with torch.no_grad():
        for logps, group in zip(found, groups, strict=True):
            for ours, completion in zip(logps, group.completions, strict=True):
                assert ours.dtype == torch.float64
                torch.testing.assert_close(
                    ours, reference.token_logps(model, group.prompt, completion), rtol=1e-4, atol=1e-4
                )


def test_chat_rows(tmp_path: Path) -> None:
    models = [worlds.make_model(tmp_path / str(seed), seed=seed, chat=True) for seed in (0, 1)]
    row = {"prompt": [{"role": "user", "content": "ok?"}], "chosen": "naïve\n", "rejected": "<|im_end|> no"}
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [row])
    page = Page(run(models, rows, tmp_path / "out.html"))
    assert [figure.text for figure in page.figures] == ["naïve\n<|im_end|>", "<|im_end|> no<|im_end|>"]
    assert [[f.text for f in figure.fields if f.special] for figure in page.figures] == [["<|im_end|>"]] * 2
    assert page.prompts == ["<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant"]


# ---------------------------------------------------------------- colours


def test_one_scale_for_the_whole_picture(shown: Path) -> None:
    fields = [one for figure in Page(shown).figures for one in figure.fields]
    scale = max(abs(one.total) for one in fields)
    for one in fields:
        *rgb, alpha = one.color
        assert alpha == pytest.approx(0.7 * abs(one.total) / scale, abs=1e-3)
        assert tuple(rgb) == ((0, 114, 178) if one.total > 0 else (213, 94, 0))
    text = shown.read_text(encoding="utf-8")
    low, high = re.search(r'class="legend">(\S+?)<div.*?</div>(\S+) nats</div>', text, re.DOTALL).groups()
    assert numbers(f"{low} {high}") == [-scale, scale]


def test_png_has_the_strongest_color_on_white(shown: Path) -> None:
    from matplotlib import image

    pixels = torch.tensor(image.imread(shown.with_suffix(".png")))[..., :3].mul(255).round()
    strongest = max((one for figure in Page(shown).figures for one in figure.fields), key=lambda one: abs(one.total))
    *rgb, alpha = strongest.color
    blended = torch.tensor(rgb) * alpha + 255 * (1 - alpha)
    legend = pixels[:130]  # its own bar ends in that colour too
    for part in (legend, pixels[130:]):
        assert ((part - blended).abs().amax(-1) <= 1.5).sum() > 50
    assert (pixels[:, :40] == 255).all() and (pixels[:, -40:] == 255).all()  # nothing sticks out


def test_a_policy_against_itself_has_no_color(models: list[Path], odd: Path, tmp_path: Path) -> None:
    named = shutil.copytree(models[0], tmp_path / "<img>&lt;")  # the page tells the directories' names
    page = Page(run([named] * 2, odd, tmp_path / "same.html", max_rows=1))
    assert len(page.figures) == 2 and set(page.elements) <= set(ELEMENTS)
    assert all(
        one.values == [0.0] and one.color[3] == 0 for f in page.figures for one in f.fields if not one.values[1:]
    )


# ---------------------------------------------------------------- text


def test_text_comes_out_as_it_went_in(odd: Path, shown: Path) -> None:
    page, rows = Page(shown), worlds.read_jsonl(odd)
    wanted = [row[name] for row in rows for name in ("chosen", "rejected")]
    assert [figure.text for figure in page.figures] == [text + "</s>" for text in wanted]
    assert [figure.name for figure in page.figures] == ["chosen", "rejected"] * 4
    assert page.prompts == [row["prompt"] for row in rows]
    for figure, text in zip(page.figures, wanted, strict=True):
        assert [one.text for one in figure.fields if one.special] == ["</s>"]
        assert figure.text.count("\ufffd") == text.count("\ufffd")


def test_no_element_comes_from_a_text(shown: Path) -> None:
    page = Page(shown)
    assert set(page.elements) == set(ELEMENTS)
    assert page.elements["style"] == 1 and page.elements["figure"] == 8 and page.elements["p"] == 1 + 4 + 2 * 8
    known = {"lang", "charset", "name", "content", "class", "style", "title", "dir", "tabindex", "data-mark"}
    assert page.attributes == known
    text = shown.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|src=|href=|<script", re.sub(r"&lt;.*?&gt;", "", text))


def test_whitespace_and_control_characters_have_marks(models: list[Path], tmp_path: Path) -> None:
    row = {"prompt": "a\x00b\x1b", "chosen": "x\n\ty\u00a0 ", "rejected": "n\x00 \x07\r\x7f z"}
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [row])
    text = run(models, rows, tmp_path / "out.html").read_text(encoding="utf-8")
    marks = [[m for m in re.findall(r'data-mark="(.*?)"', figure)] for figure in text.split("<figure>")[1:]]
    assert marks[0] == ["↵", "⇥", "·", "·"] and [m for m in marks[1] if m != "·"] == ["^@", "^G", "^M", "^?"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def byte_level() -> PreTrainedTokenizerFast:
    return worlds.make_tokenizer()


def word_level() -> PreTrainedTokenizerFast:
    return notices.make_tokenizer()


def sentence_piece() -> PreTrainedTokenizerFast:
    """Blanks as ▁, one put before the first word, and bytes for what the vocabulary lacks, as Llama 2 has it."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers import models as tokenizer_models

    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator((part for row in worlds.make_rows(60, seed=1) for part in row.values()), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]  # bytes are plain tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [byte_level, word_level, sentence_piece])
def test_pieces_of_every_kind_of_tokenizer(make) -> None:  # noqa: ANN001
    tokenizer = make()
    for text in [*ODD, "found camera, at market.", "a", "日", " naïve", "日x", "x日"]:
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        pieces = heatmap.cut(tokenizer, ids, [float(i) for i in range(len(ids))])
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert [value for piece in pieces for value in piece.rewards] == list(range(len(ids)))
        assert all(piece.text and piece.rewards for piece in pieces)
        assert pieces[-1].special and pieces[-1].text.strip() == "</s>"
        if make is not word_level:
            assert "".join(piece.text for piece in pieces[:-1]) == text
            assert not any(piece.special for piece in pieces[:-1])


def test_bytes_are_grouped_as_the_tokenizer_places_them() -> None:
    """Against the tokenizer's own offsets: the tokens of a character all point at it."""
    tokenizer = worlds.make_tokenizer()
    text = "".join(ODD[2:4]) + " x\ufffdy 日 naïve…ok"
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    groups: list[list[int]] = []
    end = 0
    for i, (a, b) in enumerate(found.offset_mapping):
        if a >= end:
            groups.append([])
        groups[-1].append(i)
        end = max(end, b)
    pieces = heatmap.cut(tokenizer, found.input_ids, [float(i) for i in range(len(found.input_ids))])
    assert [piece.rewards for piece in pieces] == groups
    assert max(map(len, groups)) == 3 and min(map(len, groups)) == 1


def test_what_is_drawn_as_one_is_one_piece() -> None:
    tokenizer = worlds.make_tokenizer()
    text = "👩‍👩‍👧 👍🏽 🇩🇪 e\u0301 1\ufe0f\u20e3 a\u200bb"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [piece.text for piece in heatmap.cut(tokenizer, ids, [0.0] * len(ids))]
    assert [piece.strip() for piece in pieces if piece.strip()] == text.replace("a\u200bb", "a\u200b b").split()


def test_an_unfinished_character_at_the_end() -> None:
    """A completion that was cut off within a character: its bytes are none, and shown as that."""
    for make, text in ((byte_level, "ab\ufffd"), (sentence_piece, "ab" + 4 * "\ufffd")):  # all of them, or the last
        tokenizer = make()
        ids = tokenizer.encode("ab한한", add_special_tokens=False)[:-2]
        pieces = heatmap.cut(tokenizer, ids, [1.0] * len(ids))
        assert "".join(piece.text for piece in pieces).replace("한", "") == text
        assert sum(piece.reward for piece in pieces) == len(ids)
        assert all(len(piece.rewards) == len(piece.text) for piece in pieces if "\ufffd" in piece.text)


# ---------------------------------------------------------------- the PNG's lines


@pytest.fixture(scope="module")
def canvas() -> heatmap.Canvas:
    return heatmap.Canvas("".join(ODD), 1.0)


@pytest.mark.parametrize("text", [*ODD, "=" * 400, "a " * 300, "https://" + "abc/" * 90, "x\n\n\ny", "\n"])
def test_lines_hold_the_text_and_fit(canvas: heatmap.Canvas, text: str) -> None:
    pieces = [heatmap.Piece(word, [0.1], False) for word in re.findall(r"\s*\S{1,3}|\s+", text)]
    canvas.texts, canvas.fields = [], []
    y = canvas.paragraph(pieces, 100, 20, 150)
    assert len({y for _, y, *_ in canvas.texts}) == (y - 20) / heatmap.LINE
    assert all(100 - 0.01 <= x and x + canvas.width(line) <= 250 + 0.01 for x, _, line, _ in canvas.texts)
    assert all(100 - 0.01 <= x and x + width <= 250.5 for x, _, width, *_ in canvas.fields)
    drawn = Counter("".join(line for _, _, line, _ in canvas.texts).replace(" ", ""))
    visible = heatmap.HIDDEN.sub(lambda found: heatmap.mark(found[0]), text).translate(canvas.boxed)
    assert drawn == Counter(visible.replace(" ", ""))


@pytest.mark.parametrize(
    "words, order",
    [
        (["one", " two", " three"], [0, 1, 2]),
        (["שלום", " עולם", " טוב"], [2, 1, 0]),
        (["one", " שלום", " עולם", " two"], [0, 1, 2, 1, 3]),  # the first blank goes with the paragraph
        (["שלום", " one", " two", " עולם"], [3, 1, 2, 1, 0]),
        (["שלום", " 12", ":30", " עולם"], [3, 1, 2, 1, 0]),
    ],
)
def test_fields_stand_in_reading_order(canvas: heatmap.Canvas, words: list[str], order: list[int]) -> None:
    """From left to right, as Unicode's algorithm has them, one behind the other, as wide as the words."""
    canvas.texts, canvas.fields = [], []
    canvas.paragraph([heatmap.Piece(word, [i / 10], False) for i, word in enumerate(words)], 0, 0, 500)
    fields = sorted(canvas.fields)
    assert [round(alpha / 0.07) for *_, (*_, alpha), _ in fields] == order
    for (x, _, width, *_), (following, *_) in zip(fields, fields[1:], strict=False):
        assert x + width == pytest.approx(following, abs=0.5)
    for i, word in enumerate(words):
        width = sum(width for (_, _, width, *_), j in zip(fields, order, strict=True) if i == j)
        assert width == pytest.approx(canvas.width(word), abs=1.5)


def test_fonts_for_what_the_first_one_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    names, missing = heatmap.families("a の \n\x00\U000e0fff")
    assert names[0] == "DejaVu Sans" and len(names) > 1 and missing == {"\U000e0fff"}
    found = heatmap.Canvas("a\U000e0fff", 1.0)
    assert "no installed font" in capsys.readouterr().out
    found.note("a\U000e0fff", 0, 0, 100)
    assert [line for _, _, line, _ in found.texts] == ["a□"]


# ---------------------------------------------------------------- mistakes


def fails(
    rows: list[dict], models: list, tmp_path: Path, match: str, name: str = "out.html", **options: object
) -> None:
    worlds.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=match):
        run(models, tmp_path / "rows.jsonl", tmp_path / name, **options)
    assert not {"out.html", "out.png"} & {path.name for path in tmp_path.iterdir()}


def test_mistakes_have_a_line_each(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"prompt": "I", "chosen": "ok", "rejected": "42"}
    fails([pair], models, tmp_path, r"out\.png: must end in \.html", "out.png")
    fails([{"prompt": "I", "completion": "a"}], models, tmp_path, "line 1: nothing to compare, completions: 1")
    fails([{"prompt": "I"}], models, tmp_path, "line 1: nothing to compare, completions: 0")
    fails([{"prompt": "I", "chosen": 1, "rejected": "42"}], models, tmp_path, "field 'chosen'")
    fails([{**pair, "prompt": "ok " * 600}], models, tmp_path, "no usable row; .*prompt too long 1")
    fails([pair], [models[0], tmp_path / "none"], tmp_path, "none: no such directory")
    other = worlds.make_model(tmp_path / "other", vocab=380)
    fails([pair], [models[0], other], tmp_path, "--reference .*other: its tokenizer")
    short = worlds.make_model(tmp_path / "short", "gpt2", n_positions=16)
    fails([{**pair, "prompt": "ok " * 20}], [models[0], short], tmp_path, "no usable row; .*prompt too long 1")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(other)
    fails([pair], [other, other], tmp_path, "other: the tokenizer has no EOS token")
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    fails([pair], models, tmp_path, r"matplotlib: pip install \"cleanpo\[plot\]\"")


def test_too_high_for_a_png(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "LINE", 3000)
    fails([{"prompt": "I", "chosen": "ok", "rejected": "42"}], models, tmp_path, r"out\.png: \d{5,} pixels high")


def test_values_that_are_no_numbers(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "token_logps", lambda *_: [[torch.tensor([float("nan")])] * 2])
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "I", "chosen": "ok", "rejected": "42"}])
    with pytest.raises(NonFinite, match="line 1: a token's reward"):
        run(models, rows, tmp_path / "out.html")


def test_command_line(models: list[Path], tmp_path: Path) -> None:
    rows = [{"prompt": "I", "chosen": "ok", "rejected": "42"}, {"prompt": "ok " * 600, "chosen": "a", "rejected": "b"}]
    worlds.write_jsonl(tmp_path / "rows.jsonl", rows)
    options = dict(policy=models[0], reference=models[1], rows=tmp_path / "rows.jsonl", output=tmp_path / "out.html")

    def call(**more: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, SCRIPT, *worlds.arguments(**{**options, **more})]
        environment = worlds.environment(tmp_path / "cache")
        return subprocess.run(line, cwd=worlds.ROOT, env=environment, capture_output=True, text=True)

    done = call()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("out.png: rows 2, kept 1, dropped: prompt too long 1\n")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["out.html", "out.png", "rows.jsonl"]
    wrong = call(max_rows=0)
    assert wrong.returncode == 2
    assert wrong.stderr == "heatmap.py: --max-rows 0: must be a finite number above 0\n"
