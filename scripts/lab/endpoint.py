"""Chat completions from an OpenAI-compatible endpoint. Each is asked once: responses are kept on disk.

Endpoint      sends one request, and again after an error that may pass
answer_all()  the response to each request, from the disk or from the endpoint

A response lies in a file of its own under `$XDG_CACHE_HOME/cleanpo/judge`, named by the hash of the address and the
request. It is there as soon as it has come, so that a run that stops loses none.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from shared import UserError, first_line
from shared.files import cache_directory, write_json

BLOCK = 2**16  # bytes that are read at a time
FIRST_WAIT = 1.0  # seconds before the first repetition; each later one waits twice as long
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 300.0  # seconds that an endpoint may ask us to wait
FAILURES_IN_A_ROW = 10  # after these the endpoint is taken to be down
MAY_PASS = (408, 409, 425, 429)  # statuses, beside all of 500 and above
ENDS_THE_RUN = (401, 403, 404)  # statuses that every request would have
STOPPED = "stopped"  # a request that is not sent because the run ends
SHOWN = 200  # characters of an endpoint's message


class Failed(Exception):
    """A request has no answer. `kind` is what is counted, the message says more."""

    def __init__(self, kind: str, detail: str = "", wait: float | None = None, may_pass: bool = True):
        super().__init__(": ".join(filter(None, (kind, detail))))
        self.kind = kind
        self.wait = wait  # seconds that the endpoint asks for
        self.may_pass = may_pass


class NoRedirects(HTTPRedirectHandler):
    """urllib would send the key along to wherever a redirect leads."""

    def redirect_request(self, *details: object) -> None:
        return None


# ---------------------------------------------------------------- one request


@dataclass
class Endpoint:
    """The address of `…/v1/chat/completions`, and how patiently it is asked. Threads may share it."""

    url: str  # up to /v1
    key: str | None  # a secret, which no message shows
    timeout: float  # seconds for the whole answer
    retries: int
    max_requests: int | None = None
    sent: int = 0  # requests, the repeated ones included
    not_before: float = 0.0  # on the clock of time.monotonic
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        check_address(self.url)
        self.address = self.url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.opener = build_opener(NoRedirects)

    def answer(self, body: dict) -> dict:
        """The response to a request. Raises Failed, and UserError where no request can succeed."""
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            try:
                return self._send(body)
            except Failed as failure:
                if not failure.may_pass or attempt == self.retries:
                    raise
                self._wait_after(failure, attempt)
        raise AssertionError("a request is sent at least once")

    def _wait_for_turn(self) -> None:
        """Wait as long as the endpoint has asked for, and count the request."""
        while (delay := self.not_before - time.monotonic()) > 0 and not self.stopped.is_set():
            self.stopped.wait(delay)
        if self.stopped.is_set():
            raise Failed(STOPPED, may_pass=False)
        with self.lock:
            if self.sent == self.max_requests:
                raise UserError(
                    f"--max-requests {self.max_requests}: spent; what was answered is kept for the next run"
                )
            self.sent += 1

    def _wait_after(self, failure: Failed, attempt: int) -> None:
        """Wait before a repetition. What the endpoint asks for holds for all threads."""
        if failure.wait is not None:
            with self.lock:
                self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            return
        longest = min(LONGEST_BACKOFF, FIRST_WAIT * 2**attempt)
        self.stopped.wait(random.uniform(longest / 2, longest))

    def _send(self, body: dict) -> dict:
        data = json.dumps(body).encode()
        request = Request(self.address, data, self.headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                content = read_until(response, deadline)
        except HTTPError as error:
            raise self._status_failure(error) from None
        except (OSError, HTTPException) as error:
            raise self._connection_failure(error) from None

        response = parsed(content)
        if response is None:
            raise Failed("malformed response", self._shown(content))
        return response

    def _connection_failure(self, error: Exception) -> Failed:
        reason = error
        if isinstance(error, URLError) and isinstance(error.reason, Exception):
            reason = error.reason
        if isinstance(reason, TimeoutError):
            return Failed("time-out", f"no answer within {self.timeout:g} s")
        return Failed("connection", first_line(reason))

    def _status_failure(self, error: HTTPError) -> Failed:
        """What an HTTP error means. Raises UserError for one that every request would have."""
        try:
            message = self._shown(error.read(BLOCK))
        except (OSError, HTTPException):
            message = ""
        kind = f"HTTP {error.code}"
        if error.code in ENDS_THE_RUN or 300 <= error.code < 400:
            raise UserError(f"{self.address}: {kind}, {message}")

        wait = seconds_to_wait(error.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            raise UserError(f"{self.address}: {kind}, it asks to wait {wait:.0f} s; run again then. {message}")
        may_pass = error.code in MAY_PASS or error.code >= 500
        return Failed(kind, message, wait, may_pass)

    def _shown(self, content: bytes) -> str:
        """The beginning of what the endpoint says, without the key."""
        text = " ".join(content.decode(errors="replace").split())
        if self.key:
            text = text.replace(self.key, "***")
        return text[:SHOWN]


def check_address(url: str) -> None:
    """Raises UserError unless the address is one of HTTP, without a user's name or a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint {url}: must be an address such as http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UserError("--endpoint: must not hold a password; the key is read from an environment variable")


def check_key(name: str, key: str | None) -> str | None:
    """The key without blanks around it. Raises UserError, which does not show it, if no header can hold it."""
    if key is None:
        return None
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"environment variable {name}: holds signs that no key has")
    return key or None


def read_until(response: HTTPResponse, deadline: float) -> bytes:
    """The whole body. Raises TimeoutError at the deadline, also if the body comes byte by byte."""
    blocks = []
    while block := response.read1(BLOCK):
        blocks.append(block)
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise HTTPException(f"the answer ends {response.length} bytes too early")
    return b"".join(blocks)


def parsed(content: bytes) -> dict | None:
    """The response, if it has a message."""
    try:
        response = json.loads(content)
        text = response["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    return response


def seconds_to_wait(header: str | None) -> float | None:
    """The seconds in a Retry-After header, which holds a number or a date; None if it holds neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


# ---------------------------------------------------------------- many requests


def key_of(url: str, body: dict) -> str:
    """The hash of an address and a request."""
    text = json.dumps([url.rstrip("/"), body], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def path_of(key: str) -> Path:
    """Where the response to a request is kept."""
    return cache_directory() / "judge" / key[:2] / f"{key}.json"


def kept_response(key: str) -> dict | None:
    """The response on disk, if there is a whole one."""
    try:
        return json.loads(path_of(key).read_text(encoding="utf-8"))["response"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep(key: str, body: dict, response: dict) -> None:
    """Write a response, and what it answers. Raises StorageError."""
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"request": body, "response": response})


def answer_all(endpoint: Endpoint, bodies: Iterable[dict], concurrency: int) -> dict[str, dict | Failed]:
    """The response to each request, or why there is none, by `key_of` the request.

    Raises UserError if the budget cannot suffice, if no request can succeed, and after FAILURES_IN_A_ROW.
    """
    answers: dict[str, dict | Failed] = {}
    missing: dict[str, dict] = {}
    for body in bodies:
        key = key_of(endpoint.url, body)
        response = kept_response(key)
        if response is None:
            missing[key] = body
        else:
            answers[key] = response
    if endpoint.max_requests is not None and len(missing) > endpoint.max_requests:
        raise UserError(f"--max-requests {endpoint.max_requests}: {len(missing)} are needed; take fewer --num-prompts")

    def ask(key: str) -> dict | Failed:
        try:
            response = endpoint.answer(missing[key])
        except Failed as failure:
            return failure
        except UserError:
            endpoint.stopped.set()  # before this thread begins with another request
            raise
        keep(key, missing[key], response)
        return response

    executor = ThreadPoolExecutor(concurrency)
    try:
        futures = {executor.submit(ask, key): key for key in missing}
        answers |= _collect(endpoint, futures)
    except Exception:
        endpoint.stopped.set()
        executor.shutdown(wait=True, cancel_futures=True)  # answers under way were paid for, and are kept
        raise
    except BaseException:
        endpoint.stopped.set()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
    return answers


def _collect(endpoint: Endpoint, futures: dict[Future, str]) -> dict[str, dict | Failed]:
    answers: dict[str, dict | Failed] = {}
    in_a_row = 0
    for future in tqdm(as_completed(futures), "ask", len(futures), unit="answer", disable=not futures):
        answer = future.result()
        answers[futures[future]] = answer
        if not isinstance(answer, Failed):
            in_a_row = 0
        elif answer.kind != STOPPED:
            in_a_row += 1
        if in_a_row == FAILURES_IN_A_ROW:
            raise UserError(f"{endpoint.address}: {in_a_row} requests failed in a row, the last by {answer}")
    return answers


def failure_counts(answers: dict[str, dict | Failed]) -> Counter[str]:
    """How many requests failed, by the kind of failure."""
    return Counter(answer.kind for answer in answers.values() if isinstance(answer, Failed))
