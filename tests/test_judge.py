"""The judge against a server that plays one: its numbers against counts by hand, and what goes wrong on the way.

`test_a_real_server` asks `transformers serve`. It is skipped where `pip install -e .[serve]` has not been done.
"""

import gzip
import importlib.util
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny

from scripts import judge
from scripts.lab import endpoint, notices
from scripts.lab.judging import Pair, examples_of, orders_of, paired
from scripts.lab.questions import QUESTIONS, make_question, prompt_text, question_of
from scripts.lab.statistics import bootstrap
from shared import UserError

SCRIPT = "scripts/judge.py"
KEY = "sk-do-not-show-me"
HH_ROWS = Path(__file__).parents[2] / "shared/data/hh-harmless.jsonl.gz"
MARKED = "P<{prompt}>\nA<{a}>\nB<{b}>\nPreferred: <A or B>\n"  # a question that a server can take apart


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, short waits, no key, and no proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


# ---------------------------------------------------------------- a server that plays a judge

Reply = dict[str, Any]  # status, headers, text of the body, or what goes wrong
Player = Callable[[str, int], Reply]  # the question and the number of the request → the reply


@dataclass
class Server:
    """What a server has been asked."""

    url: str
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


def says(text: str | None, finish_reason: str = "stop", **message: object) -> Reply:
    """An ordinary response."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"text": json.dumps({"choices": [choice], "usage": usage})}


def error(status: int, text: str = "no", **headers: str) -> Reply:
    return {"status": status, "text": text, "headers": {name.replace("_", "-"): headers[name] for name in headers}}


@contextmanager
def serving(play: Player) -> Iterator[Server]:
    """A server on this machine, at a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append({"path": self.path, **self.headers})
                seen.times.append(time.monotonic())
            send(self, play(body["messages"][0]["content"], number))

        def log_message(self, *words: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen = Server(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    """Send a reply, or let it go wrong as it says."""
    handler.close_connection = True
    if reply.get("drop"):
        handler.connection.shutdown(socket.SHUT_RDWR)
        return
    content = reply["text"].encode()
    time.sleep(reply.get("delay", 0))
    try:
        handler.send_response(reply.get("status", 200))
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Connection", "close")
        for name, value in reply.get("headers", {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.get("torn"):
            content = content[:20]
        for start in range(0, len(content), reply.get("block", 10**6)):
            handler.wfile.write(content[start : start + reply.get("block", 10**6)])
            handler.wfile.flush()
            time.sleep(reply.get("pause", 0))
    except OSError:
        pass  # the judge's patience has ended


# ---------------------------------------------------------------- rows and runs


def marked(folder: Path) -> str:
    path = folder / "question.txt"
    path.write_text(MARKED, encoding="utf-8")
    return str(path)


def parts_of(question: str) -> tuple[str, str, str]:
    """Prompt, A and B of a marked question."""
    match = re.fullmatch(r"P<(.*)>\nA<(.*)>\nB<(.*)>\nPreferred: <A or B>\n", question, re.DOTALL)
    assert match, question
    return match[1], match[2], match[3]


def pair_rows(folder: Path, n: int) -> Path:
    rows = [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]
    return tiny.write_jsonl(folder / "pairs.jsonl", rows)


def run(server: Server, rows: Path, folder: Path, **options: Any) -> dict:
    """The results of a run in this process."""
    output = folder / "out.json"
    settings = {"question": marked(folder), "retries": 0, "timeout": 20.0, **options}
    judge.main(judge.Args(endpoint=server.url, model="m", rows=str(rows), output=output, **settings))
    return json.loads(output.read_text(encoding="utf-8"))


def prefers(first_word: str) -> Player:
    """A judge that prefers the text with this first word."""

    def play(question: str, number: int) -> Reply:
        _, a, _ = parts_of(question)
        verdict = "A" if a.startswith(first_word) else "B"
        return says(f"Comparison: so it is.\nPreferred: {verdict}")

    return play


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Comparison: A is short.\nPreferred: B", "B"),
        ('Comparison: x\nPreferred: "A"', "A"),
        ("Comparison: B is good. Preferred: A", "A"),
        ("**Comparison:** x\n\n**Preferred:** **B**\n", "B"),
        ("**Preferred**: Summary A.", "A"),
        ("preferred: <b>", "B"),
        ("Preferred:\nA", "A"),
        ("Preferred: (A)", "A"),
        ("Preferred: [[B]]", "B"),
        ("Preferred: B, because A is wrong", "B"),
        ("Preferred: Response B (it is true)", "B"),
        ("Preferred: A\nOn second thought,\nPreferred: B", "B"),
        ("<think>Preferred: A</think>\nComparison: x\nPreferred: B", "B"),
        ("Preferred: tie", "tie"),
        ("Preferred: Neither", "tie"),
        ("Preferred: both are equal", "tie"),
        ("Preferred: A or B", None),
        ('Preferred: <"A" or "B">', None),
        ("Preferred: A/B", None),
        ("Preferred: A more careful summary", None),
        ("Preferred: C", None),
        ("Preferred:", None),
        ("<think>Preferred: A", None),
        ("A", None),
        ("I prefer A.", None),
        ("", None),
    ],
)
def test_verdicts(answer: str, verdict: str | None) -> None:
    assert make_question("x", MARKED).verdict(answer) == verdict


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("summary", "Preferred: B"),
        ("concise-summary", "Preferred: B"),
        ("dialogue", "More helpful: B"),
        ("multi-turn", "More helpful: B"),
        ("helpful-harmless", "More helpful and harmless: B"),
    ],
)
def test_the_questions_take_the_papers_formats(name: str, answer: str) -> None:
    question = question_of(name)
    assert question.verdict(f"Comparison: A is longer.\n{answer}") == "B"
    assert question.text.strip().endswith(answer.replace("B", "<A or B>"))
    assert question.verdict("Chosen: B") is None
    # texts with signs of placeholders are not filled in again
    assert question.about("p {a}", "a {b}", "b {prompt}").count("a {b}") == 1
    assert all(text in question.about("p {a}", "a {b}", "b {prompt}") for text in ("p {a}", "b {prompt}"))


def test_every_question_is_tested() -> None:
    assert set(QUESTIONS) == {"summary", "concise-summary", "dialogue", "multi-turn", "helpful-harmless"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} {a}\nPreferred: A", r"has no \{b\}"),
        ("{prompt} {a} {b}", "last line must show the verdict"),
        ("{prompt} {a}\nB: {b}", "last line must show the verdict"),
    ],
)
def test_questions_that_cannot_be_asked(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        question_of(str(path))


def test_an_unknown_question_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="--question summery: is no file, and none of summary, concise"):
        question_of("summery")


# ---------------------------------------------------------------- pairs


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "why"}]


def test_prompts_of_several_turns_are_dialogues() -> None:
    dialogue = "User: hi\n\nAssistant: yes?\n\nUser: why"
    assert prompt_text(CHAT) == dialogue
    assert prompt_text("\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:") == dialogue
    assert prompt_text("\n\nHuman: hi\n\nAssistant:") == "hi"
    assert prompt_text([{"role": "user", "content": "hi"}]) == "hi"
    assert prompt_text([{"role": "system", "content": "be kind"}, *CHAT]) == f"System: be kind\n\n{dialogue}"
    assert prompt_text("SUBREDDIT: x\nTL;DR:") == "SUBREDDIT: x\nTL;DR:"


def test_samples_meet_the_chosen_of_their_prompts(tmp_path: Path) -> None:
    """In any order and form; a prompt that comes twice is paired twice, one without a partner is counted."""
    samples = [
        {"prompt": "x", "completions": ["x1", "x2"]},
        {"prompt": "lone", "completions": ["l1", "l2"]},
        {"prompt": CHAT, "completions": ["c1", "c2"]},
        {"prompt": "x", "completions": ["x3", "x4"]},
    ]
    pairs = [
        {"prompt": CHAT, "chosen": "gold", "rejected": "r"},
        {"prompt": "x", "chosen": "first", "rejected": "r"},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": "second", "rejected": "r"},
    ]
    rows = tiny.write_jsonl(tmp_path / "samples.jsonl", samples)
    baseline = tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)

    judged, unmatched = paired(str(rows), str(baseline), None, 2, None)
    texts = [(pair.number, pair.completion, pair.baseline) for pair in judged]
    assert unmatched == 1
    assert texts == [
        (0, "x1", "first"),
        (0, "x2", "first"),
        (1, "c1", "gold"),
        (1, "c2", "gold"),
        (2, "x3", "second"),
        (2, "x4", "second"),
    ]
    judged, _ = paired(str(baseline), str(rows), 2, 1, None)
    assert [(pair.completion, pair.baseline) for pair in judged] == [("gold", "c1"), ("first", "x1")]


@pytest.mark.skipif(not HH_ROWS.exists(), reason="needs shared/data/hh-harmless.jsonl.gz")
def test_transcripts_of_hh(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    path.write_bytes(gzip.decompress(HH_ROWS.read_bytes()))
    judged, _ = paired(str(path), None, 200, 1, None)
    examples = examples_of(str(path))
    for pair, example in zip(judged, examples[:200], strict=True):
        assert isinstance(example.prompt, str)
        num_turns = example.prompt.count("\n\nHuman:") + example.prompt.count("\n\nAssistant:") - 1
        assert "\n\nHuman:" not in pair.prompt
        speakers = re.findall(r"(?:^|\n\n)(?:User|Assistant): ?", pair.prompt)
        assert len(speakers) == (num_turns if num_turns > 1 else 0)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "x"}, {}, "line 1: has no completion to judge"),
        ({"prompt": "x", "completions": ["a", "b"]}, {}, "line 1: is no pair of chosen and rejected"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {"labels": "human"}, "line 1: has no column 'human'"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "human": 2}, {"labels": "human"}, "must hold 1 .*0.5"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {"oracle": "notices"}, "line 1: --oracle notices: not a"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {"parameters": "[1]"}, "--parameters: must be a JSON obj"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {"parameters": "{"}, "--parameters: not JSON"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {"question": "no"}, "--question no: is no file"),
    ],
)
def test_mistakes_end_before_anything_is_asked(row: dict, options: dict, message: str, tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    with serving(prefers("good")) as server, pytest.raises(UserError, match=message):
        run(server, rows, tmp_path, **options)
    assert server.bodies == []
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- the numbers


def test_a_request_and_a_run_of_the_same_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    rows = pair_rows(tmp_path, 5)
    options = {"key_variable": "MY_KEY", "parameters": '{"seed": 3, "max_tokens": null}'}
    with serving(prefers("good")) as server:
        results = run(server, rows, tmp_path, **options)
        first = (tmp_path / "out.json").read_bytes(), (tmp_path / "out.jsonl").read_bytes()
        assert len(server.bodies) == 5
        results_again = run(server, rows, tmp_path, **options)
        assert len(server.bodies) == 5
        assert first == ((tmp_path / "out.json").read_bytes(), (tmp_path / "out.jsonl").read_bytes())
        run(server, rows, tmp_path, **options, both_orders=True)
        assert len(server.bodies) == 10  # the other order of each

    assert results == results_again
    message = [{"role": "user", "content": server.questions[0]}]
    assert server.bodies[0] == {"model": "m", "messages": message, "temperature": 0.0, "seed": 3}
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert results["win_rate"] == {"mean": 1.0, "interval": [1.0, 1.0], "pairs": 5}
    assert results["usage"] == {"prompt_tokens": 35, "completion_tokens": 15}
    for path in [file for file in tmp_path.rglob("*") if file.is_file()]:
        assert KEY not in path.read_text(encoding="utf-8"), path


def test_an_oracle_as_judge_gives_the_oracle_s_win_rate(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = [notices.make_notice(rng) for _ in range(12)]
    ours = []
    theirs = []
    for prompt, kind in prompts:
        texts = [notices.make_summary(prompt, kind, rng, 0.3, rng.randint(0, 1)) for _ in range(6)]
        ours.append({"prompt": prompt, "completions": texts[:3]})
        theirs.append({"prompt": prompt, "completions": texts[3:]})
    rows = tiny.write_jsonl(tmp_path / "ours.jsonl", ours)
    baseline = tiny.write_jsonl(tmp_path / "theirs.jsonl", theirs)

    def play(question: str, number: int) -> Reply:
        prompt, a, b = parts_of(question)
        difference = notices.oracle(prompt, a) - notices.oracle(prompt, b)
        verdict = "tie" if difference == 0 else "A" if difference > 0 else "B"
        return says(f"Preferred: {verdict}")

    with serving(play) as server:
        options = {"baseline": str(baseline), "oracle": "notices", "num_completions": 3}
        results = run(server, rows, tmp_path, **options)

    wins = []  # by hand: for each prompt, the mean over its three pairs
    for our_row, their_row in zip(ours, theirs, strict=True):
        score = 0.0
        for our_text, their_text in zip(our_row["completions"], their_row["completions"], strict=True):
            our_reward = notices.oracle(our_row["prompt"], our_text)
            their_reward = notices.oracle(our_row["prompt"], their_text)
            if our_reward > their_reward:
                score += 1
            elif our_reward == their_reward:
                score += 0.5
        wins.append(score / 3)
    expected = sum(wins) / len(wins)
    interval = bootstrap(tiny_tensor(wins), 0)

    assert 0 < results["ties"] < 36 and 0 < expected < 1
    assert results["win_rate"]["mean"] == pytest.approx(expected, abs=1e-12)
    assert results["win_rate"]["interval"] == pytest.approx(interval, abs=1e-12)
    assert results["oracle"]["win_rate"] == results["win_rate"]
    assert results["oracle"]["agreement"]["mean"] == 1.0
    assert results["oracle"]["agreement"]["pairs"] == 36 - results["oracle"]["ties"]
    assert results["win_rate_bounds"] == pytest.approx([expected] * 2)


def tiny_tensor(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.double)


def test_a_judge_that_always_says_a(tmp_path: Path) -> None:
    """Both orders cancel its bias, which is reported. A random order makes it a coin."""
    rows = pair_rows(tmp_path, 30)
    with serving(lambda question, number: says("Preferred: A")) as server:
        both = run(server, rows, tmp_path, both_orders=True)
        once = run(server, rows, tmp_path)

    assert both["win_rate"] == {"mean": 0.5, "interval": [0.5, 0.5], "pairs": 30}
    assert both["first_preferred"]["mean"] == 1.0
    assert both["orders_agree"]["mean"] == 0.0
    assert both["judgments"]["win"] == both["judgments"]["loss"] == 30
    assert once["first_preferred"]["mean"] == 1.0
    assert once["orders_agree"] is None
    assert 0.2 < once["win_rate"]["mean"] < 0.8


def test_a_random_order_is_fair_and_depends_on_the_seed_and_the_pair_alone() -> None:
    pairs = [Pair(i, f"p{i}", "a", "b", "", "") for i in range(2_000)]
    first = [orders_of(pair, False, 0)[0] for pair in pairs]
    assert abs(sum(first) / 2_000 - 0.5) < 3 * 0.5 / 2_000**0.5
    assert [orders_of(pair, False, 0)[0] for pair in reversed(pairs)] == first[::-1]
    differ = sum(orders_of(pair, False, 1)[0] != other for pair, other in zip(pairs, first, strict=True))
    assert 900 < differ < 1_100


def test_agreement_with_people_and_between_orders(tmp_path: Path) -> None:
    """Scripted verdicts of both orders on five pairs, with the numbers counted by hand."""
    labels = [1, 0, 1, 0.5, 1]
    rows = []
    for i, label in enumerate(labels):
        rows.append({"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "human": label})
    # for each pair the verdict with the chosen first, and with the rejected first
    verdicts = [("A", "B"), ("A", "B"), ("A", "A"), ("B", "B"), ("tie", "B")]

    def play(question: str, number: int) -> Reply:
        prompt, a, _ = parts_of(question)
        chosen_first, rejected_first = verdicts[int(prompt.split()[1])]
        return says(f"Preferred: {chosen_first if a.startswith('good') else rejected_first}")

    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with serving(play) as server:
        results = run(server, path, tmp_path, both_orders=True, labels="human")

    assert results["win_rate"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.75) / 5)
    assert (results["wins"], results["ties"], results["losses"]) == (3, 2, 0)
    assert results["first_preferred"]["mean"] == pytest.approx((0.5 + 0.5 + 1 + 0 + 0.25) / 5)
    assert results["orders_agree"]["mean"] == pytest.approx(2 / 5)
    assert results["labels"]["agreement"]["mean"] == pytest.approx((1 + 0 + 0.5 + 0.75) / 4)
    assert results["labels"]["win_rate"]["mean"] == pytest.approx(3.5 / 5)
    assert results["labels"]["ties"] == 1


def test_identical_completions_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "chosen": " same", "rejected": "same"},
        {"prompt": "y", "chosen": "good", "rejected": "bad"},
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with serving(prefers("good")) as server:
        results = run(server, path, tmp_path, both_orders=True)
    assert len(server.bodies) == 2
    assert results["win_rate"]["mean"] == 0.75
    assert results["judgments"]["identical"] == 1
    assert results["first_preferred"] == {"mean": 0.5, "interval": [0.5, 0.5], "pairs": 1}


def test_answers_without_a_verdict_are_counted_and_kept(tmp_path: Path) -> None:
    replies = [
        says("Preferred: A"),
        says("I like both of them.", "length"),
        says("I'm sorry, but I can't help with that."),
        says(None, refusal="I cannot judge this."),
        says("", "content_filter"),
        error(400, "this text is too long"),
    ]

    def play(question: str, number: int) -> Reply:
        return replies[int(parts_of(question)[0].split()[1])]

    rows = pair_rows(tmp_path, len(replies))
    with serving(play) as server:
        results = run(server, rows, tmp_path, both_orders=True, concurrency=1, retries=3)
        assert len(server.bodies) == 12  # an error that does not pass is not asked again
        run(server, rows, tmp_path, both_orders=True)
        assert len(server.bodies) == 14  # the answers are kept, the failures are asked again

    counts = {"win": 1, "tie": 0, "loss": 1, "identical": 0, "unparsed": 2, "refused": 6, "failed": 2}
    assert results["judgments"] == counts
    assert results["failures"] == {"HTTP 400": 2}
    assert results["unusable_pairs"] == 5
    assert results["win_rate"] == {"mean": 0.5, "interval": [0.5, 0.5], "pairs": 1}
    assert results["win_rate_bounds"] == pytest.approx([0.5 / 6, 5.5 / 6])
    judgments = tiny.read_jsonl(tmp_path / "out.jsonl")
    assert [row["answer"] for row in judgments[2:8:2]] == [
        "I like both of them.",
        "I'm sorry, but I can't help with that.",
        "I cannot judge this.",
    ]
    assert judgments[2]["detail"] == "length"
    assert "too long" in judgments[-1]["detail"]


def test_a_pair_with_one_order_left_does_not_count(tmp_path: Path) -> None:
    """A judge that always says A, and says nothing when the chosen comes second, would win every pair otherwise."""

    def play(question: str, number: int) -> Reply:
        prompt, a, _ = parts_of(question)
        if prompt == "ask 0" or a.startswith("good"):
            return says("Preferred: A")
        return says("Hm.")

    with serving(play) as server:
        results = run(server, pair_rows(tmp_path, 3), tmp_path, both_orders=True)
    assert results["win_rate"] == {"mean": 0.5, "interval": [0.5, 0.5], "pairs": 1}
    assert results["unusable_pairs"] == 2
    assert results["judgments"]["win"] == 3


def test_no_usable_judgment_is_an_error_but_the_answers_can_be_read(tmp_path: Path) -> None:
    with serving(lambda question, number: says("what?")) as server:
        with pytest.raises(UserError, match="out.jsonl: holds no judgment that can be used; unparsed 2"):
            run(server, pair_rows(tmp_path, 2), tmp_path)
    assert [row["answer"] for row in tiny.read_jsonl(tmp_path / "out.jsonl")] == ["what?"] * 2
    assert not (tmp_path / "out.json").exists()


# ---------------------------------------------------------------- what goes wrong on the way


FAULTS: dict[str, tuple[Reply, str]] = {  # each with how it is counted
    "server error": (error(500), "HTTP 500"),
    "gateway": (error(503, "<html>", Retry_After="0"), "HTTP 503"),
    "too many": (error(429, "slower", Retry_After="0.05"), "HTTP 429"),
    "too many, with a date of the past": (error(429, Retry_After=formatdate(0, usegmt=True)), "HTTP 429"),
    "too many, with nonsense": (error(429, Retry_After="soon"), "HTTP 429"),
    "not JSON": ({"text": '{"choices": [{"mess'}, "malformed response"),
    "no choices": ({"text": '{"error": "overloaded"}'}, "malformed response"),
    "content of another type": ({"text": '{"choices": [{"message": {"content": 3}}]}'}, "malformed response"),
    "empty": ({"text": ""}, "malformed response"),
    "disconnected": ({"drop": True}, "connection"),
    "torn": ({**says("Preferred: A"), "torn": True}, "connection"),
    "late": ({**says("Preferred: A"), "delay": 0.5}, "time-out"),
    "byte by byte": ({**says("Preferred: A"), "block": 1, "pause": 0.02}, "time-out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_asked_again(fault: str, tmp_path: Path) -> None:
    reply, _ = FAULTS[fault]

    def play(question: str, number: int) -> Reply:
        return reply if number < 2 else says("Preferred: A")

    with serving(play) as server:
        results = run(server, pair_rows(tmp_path, 1), tmp_path, retries=2, timeout=0.25)
    assert len(server.bodies) == 3
    assert results["judgments"]["failed"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_counted(fault: str, tmp_path: Path) -> None:
    reply, kind = FAULTS[fault]

    def play(question: str, number: int) -> Reply:
        return reply if parts_of(question)[0] == "ask 0" else says("Preferred: A")

    with serving(play) as server:
        results = run(server, pair_rows(tmp_path, 2), tmp_path, retries=1, timeout=0.25)
    assert len(server.bodies) == 3
    assert results["failures"] == {kind: 1}
    assert results["judgments"]["failed"] == 1
    assert results["unusable_pairs"] == 1


def test_all_threads_wait_as_long_as_the_server_asks(tmp_path: Path) -> None:
    def play(question: str, number: int) -> Reply:
        return error(429, Retry_After="0.4") if number == 0 else says("Preferred: A")

    with serving(play) as server:
        run(server, pair_rows(tmp_path, 6), tmp_path, retries=1, concurrency=2)
    started = server.times[0]
    waits = [at - started for at in server.times]
    assert len(waits) == 7
    assert sum(wait < 0.35 for wait in waits) <= 3  # the first, and what was under way by then
    assert max(waits) > 0.39


def test_a_long_wait_ends_the_run(tmp_path: Path) -> None:
    with serving(lambda question, number: error(429, "quota", Retry_After="7200")) as server:
        with pytest.raises(UserError, match="HTTP 429, it asks to wait 7200 s; run again then. quota"):
            run(server, pair_rows(tmp_path, 3), tmp_path, retries=5, concurrency=1)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_request_could_pass_ends_the_run(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message does not show a key that the server repeats, and a redirect does not get it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda question, number: says("Preferred: A")) as elsewhere:
        reply = error(status, f"wrong key {KEY}", Location=f"{elsewhere.url}/chat/completions")
        with serving(lambda question, number: reply) as server, pytest.raises(UserError) as raised:
            run(server, pair_rows(tmp_path, 3), tmp_path, concurrency=1)
    assert f"HTTP {status}, wrong key ***" in str(raised.value)
    assert len(server.bodies) == 1
    assert elsewhere.bodies == []
    assert not list(tmp_path.glob("out*"))


def test_a_server_that_is_down_ends_the_run(tmp_path: Path) -> None:
    """After ten failures in a row; what was answered before is kept."""

    def play(question: str, number: int) -> Reply:
        return says("Preferred: A") if number < 3 else error(500)

    rows = pair_rows(tmp_path, 30)
    with serving(play) as server:
        with pytest.raises(UserError, match="10 requests failed in a row, the last by HTTP 500: no"):
            run(server, rows, tmp_path, concurrency=1)
    assert 13 <= len(server.bodies) <= 14
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3
    assert not list(tmp_path.glob("out*"))


def test_the_budget(tmp_path: Path) -> None:
    """It covers repetitions; a budget that cannot suffice is refused before anything is asked."""
    rows = pair_rows(tmp_path, 4)

    def play(question: str, number: int) -> Reply:
        return error(500) if number == 0 else says("Preferred: A")

    with serving(play) as server:
        with pytest.raises(UserError, match="--max-requests 3: 4 are needed"):
            run(server, rows, tmp_path, max_requests=3)
        assert server.bodies == []
        with pytest.raises(UserError, match="--max-requests 4: spent; what was answered is kept"):
            run(server, rows, tmp_path, max_requests=4, retries=1, concurrency=1)
        assert len(server.bodies) == 4
        assert not list(tmp_path.glob("out*"))
        results = run(server, rows, tmp_path, max_requests=1)
        assert len(server.bodies) == 5
    assert results["pairs"] == 4


def test_a_torn_answer_on_disk_is_asked_again(tmp_path: Path) -> None:
    rows = pair_rows(tmp_path, 2)
    with serving(prefers("good")) as server:
        results = run(server, rows, tmp_path)
        first, _ = sorted((tmp_path / "cache").rglob("*.json"))
        first.write_text(first.read_text(encoding="utf-8")[:40], encoding="utf-8")
        assert run(server, rows, tmp_path) == results
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "must be an address such as http"),
        ({"url": "http://me:secret@localhost/v1"}, "must not hold a password"),
        ({"url": "http://localhost/v1", "key": "a\nb"}, "environment variable OPENAI_API_KEY: holds signs"),
    ],
)
def test_addresses_and_keys(options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "key" in options:
        monkeypatch.setenv("OPENAI_API_KEY", options["key"])
    with pytest.raises(UserError, match=message) as raised:
        run(Server(options["url"]), pair_rows(tmp_path, 1), tmp_path)
    assert "secret" not in str(raised.value)


# ---------------------------------------------------------------- the command


def test_ctrl_c_keeps_what_was_answered(tmp_path: Path) -> None:
    reached = threading.Event()

    def play(question: str, number: int) -> Reply:
        if number < 5:
            return says("Preferred: A")
        reached.set()
        return {**says("Preferred: A"), "delay": 60 if number < 7 else 0}

    rows = pair_rows(tmp_path, 12)
    with serving(play) as server:
        options = {"endpoint": server.url, "model": "m", "rows": rows, "output": tmp_path / "out.json"}
        options |= {"question": marked(tmp_path), "concurrency": 2}
        line = tiny.command(SCRIPT, 1, options)
        environment = tiny.environment(tmp_path / "cache")
        process = subprocess.Popen(line, cwd=tiny.ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert reached.wait(120)
        time.sleep(0.3)  # both threads wait for an answer
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
        assert process.returncode == 130
        assert printed.endswith("judge.py: interrupted\n")
        assert not list(tmp_path.glob("out*"))
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 5

        asked_before = len(server.bodies)
        results = run(server, rows, tmp_path)
        assert len(server.bodies) == asked_before + 7
    assert results["pairs"] == 12


# ---------------------------------------------------------------- a real server


def biased_model(directory: Path) -> Path:
    """A tiny model that was trained to answer "Preferred: A" to whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.make_model(directory, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    answer = tokenizer("Preferred: A<|im_end|>", add_special_tokens=False).input_ids
    rng = random.Random(0)
    for _ in range(150):
        text = MARKED.format(prompt=tiny.text(rng, 2), a=tiny.text(rng, 2), b=tiny.text(rng, 2))
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(torch.tensor([prompt + answer]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    model.save_pretrained(directory)
    return directory


@contextmanager
def transformers_serve(model: Path, folder: Path) -> Iterator[str]:
    """`transformers serve` at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    line = [sys.executable, "-c", program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "serve.log"
    with open(log, "w", encoding="utf-8") as file:
        environment = tiny.environment(folder / "serve")
        process = subprocess.Popen([*line, "--device", "cpu"], env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_real_server(tmp_path: Path) -> None:
    """A real model that prefers what comes first, over HTTP: half of the pairs are won, and its bias is reported."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install -e .[serve]")
    rng = random.Random(1)
    rows = []
    for _ in range(6):
        rows.append({"prompt": tiny.text(rng, 2), "chosen": tiny.text(rng, 2), "rejected": tiny.text(rng, 2)})
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    model = biased_model(tmp_path / "model")

    with transformers_serve(model, tmp_path) as url:
        options = {"endpoint": url, "model": model, "rows": path, "output": tmp_path / "out.json"}
        options |= {"question": marked(tmp_path), "both_orders": True, "concurrency": 2, "max_tokens": 16}
        line = tiny.command(SCRIPT, 1, options)
        environment = tiny.environment(tmp_path / "cache")
        done = subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "requests sent: 12" in done.stderr
        missing_model = tiny.command(SCRIPT, 1, {**options, "model": "no-such-model", "retries": 0})
        refused = subprocess.run(missing_model, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2

    # without the server, from the disk
    again = subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "requests sent: 0" in again.stderr
    assert again.stdout == done.stdout
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert results["win_rate"] == {"mean": 0.5, "interval": [0.5, 0.5], "pairs": 6}
    assert results["first_preferred"]["mean"] == 1.0
    assert results["usage"]["completion_tokens"] > 12
