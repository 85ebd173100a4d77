"""Tiny models, tokenizers and rows made in seconds by the real code paths, and the runs of command lines."""

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt_neox", "gpt2")
HIDDEN = 32
LAYERS = 2
HEADS = 4
KV_HEADS = 2
POSITIONS = 512

BOS = "<s>"
EOS = "</s>"
PAD = "<pad>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ---------------------------------------------------------------- rows


@functools.cache
def words() -> tuple[str, ...]:
    """A fixed vocabulary of made-up words, digits, accents and signs."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfklmnprstvz" for vowel in "aeiou"]
    made_up = set()
    for _ in range(150):
        length = rng.randint(1, 3)
        made_up.add("".join(rng.choices(syllables, k=length)))
    return (*sorted(made_up), "I", "a", "é", "naïve", "42", "7", "…", "ok", "Q:", "(see)", "日本")


def text(rng: random.Random, length: int) -> str:
    """`length` words, most before a space, some before a line break, a comma or a full stop."""
    chosen = rng.choices(words(), k=length)
    gaps = rng.choices((" ", " ", " ", " ", ", ", "\n", ". "), k=length)
    pieces = [word + gap for word, gap in zip(chosen, gaps, strict=True)]
    return "".join(pieces).strip() or "a"


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    span = high / low + 1 / low
    return min(high, int(low * span ** rng.random()))


def make_rows(
    n: int,
    seed: int,
    k: int = 2,
    path: Path | None = None,
    prompt_words: tuple[int, int] = (1, 45),
    completion_words: tuple[int, int] = (1, 30),
) -> list[dict]:
    """Rows with lengths spread log-uniformly (a word is 1–3 tokens), also written to `path` as jsonl.

    k = 1 gives `prompt`, `completion`; 2 `prompt`, `chosen`, `rejected`; more `completions`, best first.
    Where prompt and completion meet there may be a space on either side, on both or on none: BPE would merge there.
    """
    rng = random.Random(seed)
    rows = []
    while len(rows) < n:
        prompt = text(rng, _log_uniform(rng, *prompt_words))
        prompt += rng.choice(("", " ", "\n\n"))
        completions = []
        for _ in range(k):
            gap = rng.choice(("", " "))
            completions.append(gap + text(rng, _log_uniform(rng, *completion_words)))
        different = {completion.strip() for completion in completions}
        if len(different) == k:
            rows.append(_make_row(prompt, completions))

    if path is not None:
        write_jsonl(path, rows)
    return rows


def _make_row(prompt: str, completions: list[str]) -> dict:
    if len(completions) == 1:
        return {"prompt": prompt, "completion": completions[0]}
    if len(completions) == 2:
        return {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}
    return {"prompt": prompt, "completions": completions}


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    """One JSON object per line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return Path(path)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a jsonl file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


# ---------------------------------------------------------------- tokenizers and models


def make_tokenizer(vocab: int = 400, bos: bool = True, chat: bool = False) -> "PreTrainedTokenizerFast":
    """Byte-level BPE trained on text of `make_rows`.

    bos=False: only an EOS, which is the pad token as well. chat=True: a ChatML template, EOS `<|im_end|>`.
    """
    from transformers import PreTrainedTokenizerFast

    special_tokens = {"eos_token": EOS, "pad_token": EOS}
    if bos:
        special_tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    all_special = list(dict.fromkeys(special_tokens.values()))
    if chat:
        all_special += [TURN_START, TURN_END]
        special_tokens["eos_token"] = TURN_END

    bpe = _train_bpe(vocab, all_special)
    if bos:
        _begin_with_bos(bpe)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, model_max_length=POSITIONS, **special_tokens
    )
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START]})
        tokenizer.chat_template = CHATML
    return tokenizer


def _train_bpe(vocab: int, special_tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = []
    for row in make_rows(300, seed=1):
        corpus += row.values()
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make_sentencepiece(kind: str = "legacy", chat: bool = False) -> "PreTrainedTokenizerFast":
    """BPE as SentencePiece has it: ▁ for a blank, bytes for what the vocabulary lacks, and a BOS.

    kind: what puts a blank before a text. "legacy" is the normalizer of Llama 2, which does it behind special tokens
    as well; "first", "always" and "never" are schemes of the Metaspace pre-tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if kind == "never" else "first")
    special_tokens = ["<unk>", BOS, EOS]
    if chat:
        special_tokens += [TURN_START, TURN_END]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special_tokens + byte_tokens, show_progress=False)
    corpus = []
    for row in make_rows(60, seed=1):
        corpus += [text.replace("\n", " ") for text in row.values()]
    bpe.train_from_iterator(corpus, trainer)

    if kind == "legacy":
        bpe.pre_tokenizer = None
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        blanks = decoders.Replace("▁", " ")
        bpe.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        blanks = decoders.Metaspace(prepend_scheme=kind)
        bpe.decoder = decoders.Sequence([decoders.ByteFallback(), blanks, decoders.Fuse()])
    _begin_with_bos(bpe)

    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special_tokens)]  # bytes are plain tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
        tokenizer.eos_token = TURN_END
        tokenizer.chat_template = CHATML
    return tokenizer


def _begin_with_bos(tokenizer: "Tokenizer") -> None:
    """Let encoding add a BOS in front of every text."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )


def make_config(architecture: str, vocab: int, **overrides: object) -> "PretrainedConfig":
    """Two layers of width 32 with every dropout left above zero and weights far from uniform predictions."""
    from transformers import AutoConfig

    settings: dict[str, object] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": 0.1,
    }
    if architecture == "llama":
        settings |= {"num_key_value_heads": HEADS, "tie_word_embeddings": False}
    elif architecture == "mistral":
        settings |= {"num_key_value_heads": KV_HEADS, "tie_word_embeddings": False}
    elif architecture == "qwen2":
        settings |= {"num_key_value_heads": KV_HEADS, "tie_word_embeddings": True}
    elif architecture == "qwen3":
        settings |= {"num_key_value_heads": KV_HEADS, "head_dim": 12, "tie_word_embeddings": False}
    elif architecture == "gpt_neox":
        settings |= {"hidden_dropout": 0.1, "rotary_pct": 0.5, "tie_word_embeddings": False}
    elif architecture == "gpt2":
        settings = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    else:
        raise ValueError(f"no sizes for {architecture}")
    settings |= {"vocab_size": vocab, "initializer_range": 0.25}
    return AutoConfig.for_model(architecture, **{**settings, **overrides})


def make_model(
    directory: Path,
    architecture: str = "llama",
    vocab: int = 400,
    seed: int = 0,
    bos: bool = True,
    chat: bool = False,
    **overrides: object,
) -> Path:
    """A randomly initialised model and its tokenizer, saved to `directory`; `overrides` go to its config."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(vocab, bos, chat)
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }
    config = make_config(architecture, max(vocab, len(tokenizer)), **settings)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # zero biases and unit norms would hide mistakes
            if name.endswith("bias") or parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def make_reward_model(directory: Path, architecture: str = "llama", **options: Any) -> Path:
    """A language model's body with a known head, saved as a sequence classifier; `options` go to `make_model`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    make_model(directory, architecture, seed=3, **options)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    weight = model.score.weight
    generator = torch.Generator().manual_seed(0)
    weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


# ---------------------------------------------------------------- runs


def arguments(**options: object) -> list[str]:
    """Keyword arguments as those of a command line: True and False become `--name` and `--no-name`."""
    line: list[str] = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if value is True:
            line.append(f"--{name}")
        elif value is False:
            line.append(f"--no-{name}")
        else:
            line += [f"--{name}", str(value)]
    return line


def command(script: str, processes: int, options: dict[str, Any]) -> list[str]:
    """The command line of one run, under torchrun where there is more than one process."""
    line = [sys.executable]
    if processes > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*line, script, *arguments(**options)]


def environment(cache: Path, gpu: bool = False) -> dict[str, str]:
    """One thread per process, a cache folder of its own, no hub, and no GPU unless asked for."""
    variables = {}
    for name, value in os.environ.items():
        if not name.startswith("TORCHELASTIC"):
            variables[name] = value
    import_path = [str(ROOT)]
    if variables.get("PYTHONPATH"):
        import_path.append(variables["PYTHONPATH"])

    variables["PYTHONPATH"] = os.pathsep.join(import_path)
    variables["OMP_NUM_THREADS"] = "1"
    variables["XDG_CACHE_HOME"] = str(cache)
    variables["HF_HUB_OFFLINE"] = "1"
    variables["TOKENIZERS_PARALLELISM"] = "false"
    if not gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def start(
    script: str, output_dir: Path, processes: int = 1, gpu: bool = False, **options: object
) -> subprocess.Popen[str]:
    """Start a run; the cache lies beside its output directory, so that runs share nothing."""
    line = command(script, processes, {"output_dir": output_dir, **options})
    variables = environment(Path(f"{output_dir}.cache"), gpu)
    with open(f"{output_dir}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(line, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, text=True)


def run(script: str, output_dir: Path, processes: int = 1, gpu: bool = False, **options: object) -> list[dict]:
    """Run to the end, and return the lines of metrics.jsonl that report training steps."""
    process = start(script, output_dir, processes, gpu, **options)
    try:
        code = process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        code = process.wait(timeout=60)

    if code != 0:
        line = " ".join(map(str, process.args))
        raise AssertionError(f"{line}\nexit code {code}\n{first_error(read_log(output_dir))}")
    return training_lines(Path(output_dir) / "metrics.jsonl")


def read_log(output_dir: Path) -> str:
    """What a run that `start` began has printed."""
    return Path(f"{output_dir}.log").read_text(encoding="utf-8")


def first_error(log: str) -> str:
    """The start of the first traceback of a log, else its end."""
    start_of_traceback = log.find("Traceback")
    if start_of_traceback < 0:
        return log[-3000:]
    return log[start_of_traceback : start_of_traceback + 3000]


def training_lines(path: Path) -> list[dict]:
    """The lines of training steps, evaluation left out."""
    return [line for line in read_jsonl(path) if "loss" in line]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Relative differences, element by element."""
    relative = []
    for a, b in zip(ours, theirs, strict=True):
        size = max(abs(a), abs(b), 1e-12)
        relative.append(abs(a - b) / size)
    return relative
