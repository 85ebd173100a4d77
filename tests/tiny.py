"""Tiny models, tokenizers and rows made in seconds by the real code paths, and the runs of command lines."""

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt_neox", "gpt2")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 2, 4, 2, 512


@functools.cache
def words() -> tuple[str, ...]:
    """A fixed vocabulary of made-up words, digits, accents and signs."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfklmnprstvz" for b in "aeiou"]
    made = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(150)]
    return tuple(sorted(set(made))) + ("I", "a", "é", "naïve", "42", "7", "…", "ok", "Q:", "(see)", "日本")


def text(rng: random.Random, length: int) -> str:
    """`length` words, most after a space, some after a line break or a full stop."""
    picked = rng.choices(words(), k=length)
    gaps = rng.choices((" ", " ", " ", " ", ", ", "\n", ". "), k=length)
    return "".join(word + gap for word, gap in zip(picked, gaps, strict=True)).strip() or "a"


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(low * (high / low + 1 / low) ** rng.random()))


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
    Where prompt and completion meet there may be a space on either side, both or none: BPE would merge there.
    """
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        prompt = text(rng, _log_uniform(rng, *prompt_words)) + rng.choice(("", " ", "\n\n"))
        completions = [rng.choice(("", " ")) + text(rng, _log_uniform(rng, *completion_words)) for _ in range(k)]
        if len({completion.strip() for completion in completions}) < k:
            continue
        if k == 1:
            rows.append({"prompt": prompt, "completion": completions[0]})
        elif k == 2:
            rows.append({"prompt": prompt, "chosen": completions[0], "rejected": completions[1]})
        else:
            rows.append({"prompt": prompt, "completions": completions})
    if path is not None:
        write_jsonl(path, rows)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    """One JSON object per line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text("".join(lines), encoding="utf-8")
    return Path(path)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def make_tokenizer(vocab: int = 400, bos: bool = True, chat: bool = False):  # noqa: ANN201
    """Byte-level BPE trained on text of `make_rows`.

    bos=False: only an EOS, which is the pad token as well. chat=True: a ChatML template, EOS `<|im_end|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ([BOS, EOS, PAD] if bos else [EOS]) + (["<|im_start|>", "<|im_end|>"] if chat else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    corpus = (part for row in make_rows(300, seed=1) for part in row.values())
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        template = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
        tokenizer.post_processor = template
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    names = names if bos else {"eos_token": EOS, "pad_token": EOS}
    if chat:
        names["eos_token"] = "<|im_end|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=POSITIONS, **names
    )
    if chat:
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        fast.chat_template = CHATML
    return fast


def make_config(architecture: str, vocab: int, **overrides):  # noqa: ANN201
    """Two layers of width 32 with every dropout left above zero and weights far from uniform predictions."""
    from transformers import AutoConfig

    common = dict(vocab_size=vocab, initializer_range=0.25)
    sizes = dict(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        attention_dropout=0.1,
    )
    own = {
        "llama": dict(sizes, num_key_value_heads=HEADS, tie_word_embeddings=False),
        "mistral": dict(sizes, num_key_value_heads=KV_HEADS, tie_word_embeddings=False),
        "qwen2": dict(sizes, num_key_value_heads=KV_HEADS, tie_word_embeddings=True),
        "qwen3": dict(sizes, num_key_value_heads=KV_HEADS, head_dim=12, tie_word_embeddings=False),
        "gpt_neox": dict(sizes, hidden_dropout=0.1, rotary_pct=0.5, tie_word_embeddings=False),
        "gpt2": dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS),
    }[architecture]
    return AutoConfig.for_model(architecture, **{**common, **own, **overrides})


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
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = make_config(architecture, max(vocab, len(tokenizer)), **{**ids, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # zero biases and unit norms would hide mistakes
            if name.endswith("bias") or parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def arguments(**options: object) -> list[str]:
    """Keyword arguments as command-line words: True and False become `--name` and `--no-name`."""
    line: list[str] = []
    for name, value in options.items():
        name = name.replace("_", "-")
        line += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return line


def command(script: str, processes: int, options: dict) -> list[str]:
    """The command line of one run, under torchrun where there is more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), script, *arguments(**options)]


def environment(cache: Path) -> dict[str, str]:
    """One thread per process, an own cache folder, no accelerator, no hub."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(cache)}
    path = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    return {**clean, **own, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(script: str, output_dir: Path, processes: int = 1, **options: object) -> subprocess.Popen[str]:
    """Start a run; the cache lies beside its output directory, so that runs share nothing."""
    line = command(script, processes, {"output_dir": output_dir, **options})
    log = open(f"{output_dir}.log", "a", encoding="utf-8")
    cache = Path(f"{output_dir}.cache")
    with log:
        return subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=log, stderr=subprocess.STDOUT, text=True)


def run(script: str, output_dir: Path, processes: int = 1, **options: object) -> list[dict]:
    """Run to the end, and return the lines of metrics.jsonl that report training steps."""
    process = start(script, output_dir, processes, **options)
    try:
        code = process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        code = process.wait(timeout=60)
    log = Path(f"{output_dir}.log").read_text(encoding="utf-8")
    assert code == 0, f"{' '.join(map(str, process.args))}\nexit code {code}\n{first_error(log)}"
    return training_lines(Path(output_dir) / "metrics.jsonl")


def first_error(log: str) -> str:
    """The start of the first traceback of a log, else its end."""
    at = log.find("Traceback")
    return log[at : at + 3000] if at >= 0 else log[-3000:]


def training_lines(path: Path) -> list[dict]:
    """The lines of training steps, evaluation left out."""
    return [line for line in read_jsonl(path) if "loss" in line]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Relative differences, element by element."""
    pairs = zip(ours, theirs, strict=True)
    return [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]
