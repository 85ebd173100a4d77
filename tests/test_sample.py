"""Sampling: the greedy limit, frequencies against the model's own probabilities, order, and bad input."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import notices
import pytest
import sample
import torch
from transformers import GenerationConfig

SCRIPT = Path(sample.__file__)
PROMPTS = [
    "summary:",
    "we lost a lamp. summary:",
    "the tag says four. please call anna. it was at the market in june. summary:",
    "anna",
    "thank you all. more news will come soon. tea is free as ever. summary:",
]


@pytest.fixture(scope="module")
def policy():
    """The world's tokenizer and a tiny Llama with large weights, so that its distributions are peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = notices.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    # Values of a model directory that must not reach the samples.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=3, temperature=0.3, min_new_tokens=5, eos_token_id=tokenizer.eos_token_id
    )
    return model, tokenizer


@pytest.fixture(scope="module")
def directory(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    for part in policy:
        part.save_pretrained(path)
    return path


def next_token_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_limit_is_the_same_in_any_batch(policy, penalty):
    """top_k = 1 in padded batches equals transformers' greedy search on one prompt at a time."""
    model, tokenizer = policy
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = []
    for ids in prompts:
        config = GenerationConfig(
            do_sample=False,
            top_k=0,
            temperature=1.0,
            min_new_tokens=0,
            max_new_tokens=12,
            repetition_penalty=penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert len(set(expected)) > 1
    for limits in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 8}, {"batch_tokens": 60}):
        options = {"top_k": 1, "max_new_tokens": 12, "repetition_penalty": penalty, "num_completions": 2}
        drawn = list(sample.sample(model, tokenizer, prompts, **options, **limits))
        assert [texts for texts, _ in drawn] == [[text, text] for text in expected]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 0), (0.7, 5)])
def test_first_token_frequencies(policy, temperature, top_k):
    """Within 4.5 binomial deviations of softmax(logits / T), renormalised over the k likeliest tokens."""
    model, tokenizer = policy
    draws = 2000
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[1:3]]
    options = {"num_completions": draws, "temperature": temperature, "top_k": top_k, "batch_size": 1000}
    drawn = list(sample.sample(model, tokenizer, prompts, max_new_tokens=1, **options))
    for ids, (texts, finished) in zip(prompts, drawn, strict=True):
        probs = next_token_probabilities(model, ids).pow(1 / temperature)
        if top_k:
            probs = torch.where(probs >= probs.topk(top_k).values[-1], probs, 0)
        probs = (probs / probs.sum()).double()
        counts = Counter(texts)
        for token in range(len(notices.SPECIAL), len(tokenizer)):
            p = probs[token].item()
            slack = 4.5 * (p * (1 - p) / draws) ** 0.5 + 1e-12
            assert abs(counts[tokenizer.decode([token])] / draws - p) <= slack + 1 / draws * (p > 0)
        p = probs[tokenizer.eos_token_id].item()
        assert abs(sum(finished) / draws - p) <= 4.5 * (p * (1 - p) / draws) ** 0.5 + 1 / draws


def test_seed_decides_and_the_models_own_settings_stay(policy):
    model, tokenizer = policy
    own = model.generation_config
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    runs = [
        list(sample.sample(model, tokenizer, prompts, num_completions=3, max_new_tokens=8, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert model.generation_config is own


def test_batches_keep_the_bounds_and_hold_every_sequence_once():
    lengths = [5, 9, 2, 30, 7, 7, 1, 12] * 10
    batches = list(sample.make_batches(lengths, batch_size=4, batch_tokens=20))
    assert sorted(index for batch in batches for index in batch) == list(range(80))
    for batch in batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20


def test_cut_after():
    assert sample.cut_after([5, 6, 2, 7, 2], [2, 3]) == [5, 6, 2]
    assert sample.cut_after([5, 6], [2]) == [5, 6]


def test_main_writes_rows_in_order(policy, directory, tmp_path):
    model, tokenizer = policy
    rows = [{"prompt": prompt, "other": 1} for prompt in PROMPTS]
    notices.write_rows(tmp_path / "rows.jsonl", rows)
    args = sample.Args(
        model=str(directory),
        rows=tmp_path / "rows.jsonl",
        output=tmp_path / "new" / "out.jsonl",
        num_completions=3,
        max_new_tokens=6,
        batch_size=2,
        max_rows=4,
    )
    sample.main(args)
    written = [json.loads(line) for line in args.output.read_text().splitlines()]
    assert [row["prompt"] for row in written] == PROMPTS[:4]
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[:4]]
    options = {"num_completions": 3, "max_new_tokens": 6, "batch_size": 2}
    drawn = list(sample.sample(model, tokenizer, prompts, **options))
    assert [(row["completions"], row["finished"]) for row in written] == drawn
    assert [path.name for path in args.output.parent.iterdir()] == ["out.jsonl"]


def test_chat_prompts_go_through_the_template(policy):
    tokenizer = notices.make_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for message in messages %}{{ message.content }}.{% endfor %}"
        "{% if add_generation_prompt %}summary:{% endif %}"
    )
    ids = sample.encode_prompt(tokenizer, [{"role": "user", "content": "lost lamp"}])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "lost", "lamp", ".", "summary", ":"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "No such file"),
        ("", {}, "no rows"),
        ('{"prompt": "anna"}\nnonsense\n', {}, "line 2"),
        ('{"prompt": "anna"}\n{"text": "anna"}\n', {}, "line 2: needs a `prompt`"),
        ('{"prompt": 3}\n', {}, "line 1: needs a `prompt`"),
        ('{"prompt": "anna"}\n', {"max_new_tokens": 63}, "64 positions"),
        ('{"prompt": "anna"}\n', {"temperature": 0.0}, "--temperature must be greater than 0"),
        ('{"prompt": "anna"}\n', {"model": "/no/such/directory"}, "/no/such/directory"),
    ],
)
def test_bad_input_ends_with_one_line(text, options, message, directory, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    settings = {"model": str(directory), "max_new_tokens": 4, **options}
    with pytest.raises(SystemExit) as end:
        sample.main(sample.Args(rows=rows, output=tmp_path / "out.jsonl", **settings))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert list(tmp_path.glob("out*")) == []


def test_command_line_exit_code(tmp_path):
    command = [sys.executable, SCRIPT, "--model", "none", "--rows", "missing.jsonl", "--output", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing.jsonl: No such file or directory\n"
