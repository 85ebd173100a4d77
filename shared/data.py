"""Examples to token ids, once per content, and token ids to packed micro-batches.

load()     a source → Groups: each group one contiguous slice [prompt, completion 1, ..., completion K]
Batches    the groups of every step, in an order fixed by the seed, cut to a token budget and over processes
"""

import hashlib
import heapq
import json
import math
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from shared import UserError, sha256, sync, writing
from shared.attention import Spans
from shared.distributed import Place, from_main
from shared.rows import Dropped, Example, Text, Turn, files_of, first_line, parse

MARK = "\U000f0000"  # stands in for special-token text while templates and tokenizers work around it


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs of every row."""

    completions: int | None = None  # how many; 1: the preferred one; None: all, two or more
    scores: bool = False  # as targets: then completions with equal scores or texts are not dropped
    samples: bool | None = False  # completions drawn from π_ref; None: where the rows have them


@dataclass
class Groups:
    """n tokenised groups of one prompt and C completions, kept as one flat tensor of ids.

    Group i is tokens[offsets[i, 0] : offsets[i, -1]], laid out [prompt, completion 1, ..., completion C];
    offsets[i, 1 + k] is where completion k starts. The K completions of the row come first, preferred first, then
    the samples of π_ref where there are any.
    """

    tokens: Tensor  # (total,) int32
    offsets: Tensor  # (n, C + 2) int64
    rows: Tensor  # (n,) int64, the number of the group's row in its source, from 1
    report: dict  # what was read, kept, dropped and cut
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, K, R), one per reward model
    ref_logps: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, C), or per token (total,); set in training

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def completions(self) -> int:
        return self.offsets.shape[1] - 2

    @property
    def longest(self) -> int:
        """The most tokens of a prompt with one completion."""
        lengths = self.offsets.diff(dim=1)
        return int((lengths[:, :1] + lengths[:, 1:]).max())


# ---------------------------------------------------------------- tokens


class Encoder:
    """Texts and messages to ids. A special token's string inside a text comes out as plain-text tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        specials = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.control = specials.keys() - {tokenizer.unk_token_id}
        self.specials = [MARK, *sorted(specials.values(), key=len, reverse=True)]
        self.pattern = re.compile("|".join(map(re.escape, self.specials)))

    def protect(self, text: str) -> str:
        """The text with each special token's string replaced by a mark that no template or tokenizer interprets."""
        return self.pattern.sub(lambda found: f"{MARK}{self.specials.index(found[0])};", text)

    def is_chat(self, prompt: Text | None) -> bool:
        """Whether the prompt goes through the chat template, which writes its own special tokens."""
        return isinstance(prompt, list) or (isinstance(prompt, Turn) and bool(self.tokenizer.chat_template))

    def render(self, prompt: Text | None, completions: list[Text], ended: list[bool]) -> tuple[str, list[str]]:
        """Protected texts of the prompt and the completions, the latter without the EOS that ends them."""
        if not self.is_chat(prompt):
            end = "\n\n" if isinstance(prompt, Turn) else ""
            return self.protect(prompt or "") + end, [self.protect(c) for c in completions]
        if isinstance(prompt, Turn):
            prompt = [{"role": "user", "content": str(prompt)}]
            completions = [[{"role": "assistant", "content": c}] for c in completions]
        if not self.tokenizer.chat_template:
            raise UserError("the rows are chat messages, but the tokenizer has no chat template; use one that has")
        before = self._template(prompt, add_generation_prompt=True)
        full = [self._template(prompt + completion) for completion in completions]
        if not all(text.startswith(before) for text in full):
            raise UserError("the chat template renders a prompt differently once an answer follows; use another one")
        answers = [text[len(before) :] for text in full]
        return before, [self._generated(*answer) for answer in zip(answers, completions, ended, strict=True)]

    def _generated(self, answer: str, completion: list[dict], ended: bool) -> str:
        """What of a rendered answer is a model's own: up to the last EOS; of one that was cut off, its text."""
        text, eos, rest = answer.rpartition(self.tokenizer.eos_token)
        if ended:
            return text if eos else rest
        said = self.protect(completion[-1]["content"])
        said = said if said in answer else said.strip()  # as many templates do
        return answer[: answer.rindex(said) + len(said)] if said in answer else answer

    def _template(self, messages: list[dict], **options) -> str:
        messages = [{**m, "content": self.protect(m["content"])} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise what their authors chose (jinja2's TemplateError)
            raise Dropped(f"refused by the chat template ({first_line(error)})") from None

    def encode(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """Ids of protected texts, each with or without the special tokens that the tokenizer adds."""
        ids: list[list[int]] = [[] for _ in texts]
        for special in (False, True):  # each in one batch, parallel inside `tokenizers`
            where = [i for i, (_, with_special) in enumerate(texts) if with_special == special]
            heads = self._ids([texts[i][0].partition(MARK)[0] for i in where], special)
            for i, found in zip(where, heads, strict=True):
                # some tokenizers add an EOS too, which ends a completion, not a prompt
                ids[i] = found[:-1] if special and found[-1:] == [self.eos] else found
        for i, (text, _) in enumerate(texts):
            for piece in text.split(MARK)[1:]:
                number, _, rest = piece.partition(";")
                ids[i] += self._plain(self.specials[int(number)])
                ids[i] += self._ids([rest], False)[0]
        return ids

    def _plain(self, special: str) -> list[int]:
        """Ids of a special token's string as text: of its characters where the vocabulary holds it whole."""
        ids = self._ids([special], False, split_special_tokens=True)[0]
        if self.control.isdisjoint(ids):
            return ids
        return [i for one in self._ids(list(special), False, split_special_tokens=True) for i in one]

    def _ids(self, texts: list[str], add_special_tokens: bool, **options) -> list[list[int]]:
        options |= {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []


class _Builder:
    """Collects groups into flat arrays, and counts what happens to the rows."""

    def __init__(self, encoder: Encoder, needs: Needs, max_length: int, max_prompt_length: int | None):
        self.encoder, self.needs = encoder, needs
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.tokens, self.offsets, self.rows, self.scores = array("i"), array("q"), array("q"), array("f")
        self.dropped, self.counts, self.seen = Counter(), Counter(), {}
        self.shape: tuple[int, int, int] | None = None  # completions, reward models and samples of every row

    def select(self, example: Example) -> None:
        """Keep what the algorithm needs, preferred first. Raises UserError where it is not there."""
        if self.needs.samples is False:
            example.samples = example.finished = []
        self._check(example)
        k, scores = len(example.completions), example.scores
        if scores and not example.ordered:
            order = sorted(range(k), key=lambda i: -math.fsum(scores[i]))
            fields = (example.completions, scores, example.ended)
            example.completions, example.scores, example.ended = ([x[i] for i in order] for x in fields)
        if self.needs.completions == 1:
            example.completions, example.ended = example.completions[:1], example.ended[:1]
        elif not self.needs.scores and scores and not example.ordered and len(set(map(math.fsum, scores))) < k:
            raise Dropped("tied scores")
        if any(not (c if isinstance(c, str) else c[-1]["content"]).strip() for c in example.completions):
            raise Dropped("empty completion")

    def _check(self, example: Example) -> None:
        needs, k, where = self.needs, len(example.completions), example.where
        if k < (needs.completions or 2) or (needs.completions == 2 and k > 2):
            wanted = {1: "a completion", 2: "two completions, chosen and rejected"}
            wanted = wanted.get(needs.completions, "chosen and rejected, or ranked completions")
            raise UserError(f"{where}: this run needs {wanted}; the row has {k}")
        if needs.scores and not example.scores:
            raise UserError(f"{where}: this run needs scores; add them with scripts/score.py")
        if needs.samples and not example.samples:
            raise UserError(f"{where}: this run needs reference_samples; draw them with scripts/sample.py")
        shape = (k, len(example.scores[0]) if needs.scores else 0, len(example.samples))
        self.shape = self.shape or shape
        if shape != self.shape:
            names = ("completions", "scores for each completion", "reference_samples")
            i = next(i for i in range(3) if shape[i] != self.shape[i])
            raise UserError(f"{where}: {shape[i]} {names[i]} where earlier rows have {self.shape[i]}")

    def add(self, examples: list[Example]) -> None:
        """Select, render and tokenise rows: ids = encode(prompt) + encode(completion) + EOS."""
        kept = []
        for example in examples:
            try:
                self.select(example)
                completions, ended = example.completions + example.samples, example.ended + example.finished
                kept.append((example, *self.encoder.render(example.prompt, completions, ended)))
            except Dropped as reason:
                self.dropped[str(reason)] += 1
        # a chat template has written its own special tokens; running text gets them at its start
        prompts = self.encoder.encode([(text, not self.encoder.is_chat(e.prompt)) for e, text, _ in kept])
        texts = [(text, e.prompt is None and not i) for e, _, found in kept for i, text in enumerate(found)]
        ids = iter(self.encoder.encode(texts))
        for (example, _, texts), prompt in zip(kept, prompts, strict=True):
            try:
                self._append(example, prompt, [next(ids) for _ in texts])
            except Dropped as reason:
                self.dropped[str(reason)] += 1

    def _append(self, example: Example, prompt: list[int], completions: list[list[int]]) -> None:
        eos, bos, limit, k = self.encoder.eos, self.encoder.bos, self.max_prompt_length, len(example.completions)
        if example.prompt is None:
            prompt, completions = completions[0][:1], [completions[0][1:], *completions[1:]]
        prompt = prompt or [bos] * (bos is not None)
        if not prompt:
            raise Dropped("empty prompt")
        if not all(completions[:k]):
            raise Dropped("empty completion")
        if not self.needs.scores and len(set(map(tuple, completions[:k]))) < k:
            raise Dropped("identical completions")
        keep = int(prompt[0] == bos)
        cut = limit and len(prompt) > limit + keep
        if cut:
            prompt = prompt[:keep] + prompt[-limit:]
        room = self.max_length - len(prompt)
        if room < 1:
            raise Dropped("prompt too long")
        self.counts["prompts cut"] += bool(cut)
        self._count_repeats(prompt, completions[:k])
        whole = [c + [eos] * end for c, end in zip(completions, example.ended + example.finished, strict=True)]
        if not all(whole):
            raise Dropped("empty sample")
        self.counts["completions cut"] += sum(len(c) > room for c in whole)
        self.rows.append(example.number)
        self.scores.extend(value for each in example.scores for value in each) if self.needs.scores else None
        for piece in (prompt, *(c[:room] for c in whole)):
            self.offsets.append(len(self.tokens))
            self.tokens.extend(piece)
        self.offsets.append(len(self.tokens))

    def _count_repeats(self, prompt: list[int], completions: list[list[int]]) -> None:
        order = hash(tuple(map(tuple, completions)))
        key = hash((tuple(prompt), tuple(sorted(map(tuple, completions)))))
        if key in self.seen:
            self.counts["duplicates" if self.seen[key] == order else "contradictions"] += 1
        self.seen.setdefault(key, order)


def load(source: str, tokenizer, needs: Needs, max_length: int, max_prompt_length: int | None) -> Groups:
    """The groups of a source, tokenised once per content and settings and kept on disk.

    With several processes the first one of each machine tokenises and the others wait for its file, without a
    collective that could time out.
    Raises UserError where the source, a row's form or type is wrong, and where no row can be used.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token; set one (its `eos_token`) so that completions can end")
    hashed = from_main(source_hash(source) if int(os.environ.get("RANK", 0)) == 0 else None)
    code = [source_hash(str(Path(__file__).with_name(name))) for name in ("rows.py", "data.py")]
    settings = [astuple(needs), max_length, max_prompt_length, _tokenizer_hash(tokenizer), hashed, code]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    path = cache_directory() / f"tokens-{key}.safetensors"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not is_whole(path):
        build = tokenise(source, tokenizer, needs, max_length, max_prompt_length)
        if source_hash(source) != hashed:
            raise UserError(f"{source}: was changed while it was read; start again")
        _write_groups(path, build)
    while not is_whole(path):
        time.sleep(0.1)
    tensors, metadata = read_tensors(path)
    report = json.loads(metadata["report"])
    if not report["kept"]:
        raise UserError(f"{source}: no usable row; {describe(report)}")
    return Groups(report=report | {"sha256": key}, **tensors)


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/cleanpo`, by default `~/.cache/cleanpo`."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanpo"
    path.mkdir(parents=True, exist_ok=True)
    return path


def tokenise(source: str, tokenizer, needs: Needs, max_length: int, max_prompt_length: int | None) -> _Builder:
    """Stream a source into flat arrays: memory grows with the token ids, not with the file."""
    build = _Builder(Encoder(tokenizer), needs, max_length, max_prompt_length)
    examples = parse(source, build.dropped)
    while chunk := list(islice(examples, 1024)):
        build.add(chunk)
    return build


def _write_groups(path: Path, build: _Builder) -> None:
    dropped, kept = dict(build.dropped), len(build.rows)
    report = {"rows": kept + sum(dropped.values()), "kept": kept, "dropped": dropped, **+build.counts}
    tensors = {
        "tokens": _tensor(build.tokens, torch.int32),
        "offsets": _tensor(build.offsets, torch.int64).view(kept, -1 if kept else 2),
        "rows": _tensor(build.rows, torch.int64),
    }
    if build.needs.scores and kept:
        tensors["scores"] = _tensor(build.scores, torch.float32).view(kept, *build.shape[:2])
    write_tensors(path, tensors, {"report": json.dumps(report)})


def _tensor(values: array, dtype: torch.dtype) -> Tensor:
    """The same memory; `torch.tensor` would make an object of every number."""
    return torch.asarray(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(path):
        save_file(tensors, temporary, metadata)
        sync(temporary)
        os.replace(temporary, path)


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        safe_open(path, "pt")
    except (OSError, SafetensorError):
        return False
    return True


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def describe(report: dict) -> str:
    """One line: rows 64, kept 61, dropped: identical completions 1, ...; duplicates 2."""
    counts = {name: n for name, n in report.items() if name not in ("rows", "kept", "dropped", "sha256") and n}
    parts = [f"rows {report['rows']}, kept {report['kept']}"]
    if report["dropped"]:
        parts[0] += ", dropped: " + ", ".join(f"{reason} {n}" for reason, n in sorted(report["dropped"].items()))
    return "; ".join(parts + [f"{name} {n}" for name, n in sorted(counts.items())])


def _tokenizer_hash(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # the slow ones have none
    model = backend.to_str() if backend else f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    parts = [model, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def source_hash(source: str) -> str:
    """sha256 over the files' own, or the fingerprint that `datasets` keeps."""
    digest = hashlib.sha256()
    for name in files_of(source):
        try:
            digest.update((sha256(name) if isinstance(name, Path) else name._fingerprint).encode())
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


# ---------------------------------------------------------------- batches


@dataclass
class Batch:
    """One micro-batch of one process: B groups of K completions, packed into one row of T tokens without padding."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), restarting after the prompt at each completion
    spans: Spans  # who sees whom
    read: Tensor  # (R,) positions whose hidden states predict completion tokens, each once, ascending
    sources: Tensor  # (N,) which of those predicts each completion token
    targets: Tensor  # (N,) those tokens, completion by completion
    where: Tensor  # (N,) their places in `Groups.tokens`
    lengths: Tensor  # (B, K) tokens of each completion
    ends: Tensor  # (B, K) position of its last one
    rows: Tensor  # (B,) which groups these are
    ref_logps: Tensor  # (B, K), or per token (N,), or empty without a reference pass
    scores: Tensor  # (B, K, R) of R reward models, or empty
    global_groups: int  # in the whole step, over all micro-batches and processes
    global_tokens: int  # completion tokens of the whole step
    progress: float  # of training: 0 at the first step, 1 at the last
    last: bool = True  # of its step's micro-batches


class Batches:
    """The micro-batches of this process for every step.

    Which groups a step takes depends on the seed, the epoch and the batch size alone; how they are cut into
    micro-batches, on the token budget and the number of processes. Step s of an unshuffled epoch takes groups
    (s - 1) * batch_size and on; the last step of an epoch may be smaller; steps beyond an epoch run on into the next.
    """

    def __init__(self, groups: Groups, batch_size: int, budget: int, seed: int | None, place: Place):
        self.groups, self.batch_size, self.budget, self.seed, self.place = groups, batch_size, budget, seed, place
        self.per_epoch = math.ceil(len(groups) / batch_size)
        self.last_step = self.per_epoch
        self.sizes = groups.offsets[:, -1] - groups.offsets[:, 0]
        self.epoch, self.order = None, torch.arange(len(groups))  # the order of the epoch

    def rows(self, step: int) -> Tensor:
        """The groups of step 1, 2, ..., over all processes."""
        epoch, i = divmod(step - 1, self.per_epoch)
        if self.seed is not None and epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.groups), generator=generator)
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]

    def __call__(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step; every process has equally many, some perhaps without a group."""
        rows = self.rows(step)
        offsets = self.groups.offsets[rows]
        tokens = int((offsets[:, -1] - offsets[:, 1]).sum())
        progress = (step - 1) / max(1, self.last_step - 1)
        micro_steps = balance(self.sizes[rows].tolist(), self.budget, self.place.world)
        for bins in micro_steps:
            batch = self.pack(rows[bins[self.place.rank]], len(rows), tokens, progress)
            batch.last = bins is micro_steps[-1]
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        """This process's micro-batches of one pass over the groups that the run uses."""
        for step in range(1, self.used_steps + 1):
            yield from self(step)

    @property
    def used_steps(self) -> int:
        """The steps of the first epoch, or as many of them as there are in all."""
        return min(self.last_step, self.per_epoch)

    def pack(self, rows: Tensor, global_groups: int, global_tokens: int, progress: float) -> Batch:
        """The groups `rows` as one packed row; without any, one token that nothing is predicted from."""
        groups, device = self.groups, self.place.device
        offsets = groups.offsets[rows]
        lengths = offsets.diff(dim=1)  # (B, 1 + K): prompt, completions
        ends = lengths.flatten().cumsum(0).view_as(lengths)  # of each piece, in the row
        starts = ends - lengths
        piece = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())  # of each token
        group, is_completion = piece // lengths.shape[1], piece % lengths.shape[1] > 0
        token = torch.arange(len(piece))
        at = token + (offsets[:, 0] - starts[:, 0])[group]
        ids = groups.tokens[at].long()
        # a completion's positions go on from its prompt's end; its first token is predicted from there too
        within = token - starts.flatten()[piece]
        positions = within + is_completion * lengths[group, 0]
        sources = torch.where(within == 0, ends[group, 0] - 1, token - 1)[is_completion]
        read, sources = sources.unique(return_inverse=True)
        where = at[is_completion]
        ref_logps = groups.ref_logps
        if len(ref_logps):
            ref_logps = ref_logps[where if ref_logps.dim() == 1 else rows]
        pieces = [(p, tuple(cs)) for p, *cs in lengths.tolist()] or [(1, ())]
        batch = Batch(
            input_ids=(ids if len(rows) else groups.tokens[:1].long())[None],
            position_ids=(positions if len(rows) else torch.zeros(1, dtype=torch.long))[None],
            spans=Spans.of(pieces, device, self.place.dtype),
            read=read,
            sources=sources,
            targets=ids[is_completion],
            where=where,
            lengths=lengths[:, 1:],
            ends=ends[:, 1:] - 1,
            rows=rows,
            ref_logps=ref_logps,
            scores=groups.scores[rows] if len(groups.scores) else groups.scores,
            global_groups=global_groups,
            global_tokens=global_tokens,
            progress=progress,
        )
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                setattr(batch, name, value.to(device, non_blocking=True))
        return batch


def balance(sizes: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Cut a step into micro-steps of one bin per process, of about equally many tokens, none over the budget.

    sizes: tokens of each group → bins[micro-step][process] = indices into `sizes`, ascending. The largest groups are
    placed first, each into the emptiest bin; a group larger than the budget has a bin to itself.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    micro_steps = max(1, math.ceil(min(sum(sizes) / budget, len(sizes)) / world))
    while True:
        heap = [(0, bin, []) for bin in range(micro_steps * world)]
        for i in order:
            load, bin, members = heapq.heappop(heap)
            heapq.heappush(heap, (load + sizes[i], bin, [*members, i]))
        if all(load <= budget or len(members) == 1 for load, _, members in heap):
            break
        micro_steps += 1
    bins = [sorted(members) for _, _, members in sorted(heap, key=lambda b: (-b[0], b[1]))]
    return [bins[i : i + world] for i in range(0, len(bins), world)]
