"""Sampling: the greedy limit, frequencies against the model's own probabilities, forms, interruption, bad input."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import time
from collections import Counter

import notices
import pyarrow.parquet
import pytest
import sample
import streaming
import torch
import worlds
from transformers import AutoTokenizer, GenerationConfig

from shared import UserError
from shared.data import Needs, tokenise

SCRIPT = "scripts/sample.py"
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


def draw(policy, prompts, count=1, **how):
    """The texts of each prompt's completions, and which of them ended."""
    model, tokenizer = policy
    ends = sample.end_ids(model, tokenizer)
    drawn = sample.draw(model, ends, prompts, count, sample.Sampling(**how))
    return [([sample.decode(tokenizer, y) for y in ids], [y[-1] in ends for y in ids]) for ids in drawn]


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
        drawn = draw(policy, prompts, 2, top_k=1, max_new_tokens=12, repetition_penalty=penalty, **limits)
        assert [texts for texts, _ in drawn] == [[text, text] for text in expected]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 0), (0.7, 5)])
def test_first_token_frequencies(policy, temperature, top_k):
    """Within 4.5 binomial deviations of softmax(logits / T), renormalised over the k likeliest tokens."""
    model, tokenizer = policy
    draws = 2000
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[1:3]]
    drawn = draw(policy, prompts, draws, max_new_tokens=1, temperature=temperature, top_k=top_k, batch_size=1000)
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
    runs = [draw(policy, prompts, 3, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)]
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


# ---------------------------------------------------------------- rows


USER, BOT = {"role": "user", "content": "bade </s> lo"}, {"role": "assistant", "content": "do"}
OTHER = {"role": "assistant", "content": "fi"}
HH = "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d</s>\n\nAssistant:"
FORMS = {
    "prompt alone": ({"prompt": "bade lo, <s>"}, None),
    "chat prompt alone": ({"prompt": [USER]}, None),
    "pair": ({"prompt": "bade lo, ", "chosen": "a", "rejected": "b"}, 2),
    "messages that repeat the prompt": ({"prompt": "x", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, 2),
    "HH": ({"chosen": HH + " a", "rejected": HH + " b"}, 2),
    "message lists": ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, 2),
    "completions": ({"prompt": "lo", "completions": ["a", "b", "c"]}, None),
    "SHP": ({"history": "lo", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, 2),
    "conversations": (
        {"conversations": [{"from": "human", "value": "lo"}], "chosen": {"from": "gpt", "value": "a"}}
        | {"rejected": {"from": "gpt", "value": "b"}},
        2,
    ),
    "instruction pair": ({"instruction": "lo", "input": "fi", "chosen": "a", "rejected": "b"}, 2),
    "messages": ({"messages": [USER, BOT, USER, OTHER]}, 1),
    "prompt, completion": ({"prompt": "lo", "completion": "a"}, 1),
    "conversation": ({"conversations": [{"from": "human", "value": "lo"}, {"from": "gpt", "value": "a"}]}, 1),
    "instruction": ({"instruction": "lo</s>", "output": "a"}, 1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    plain = worlds.make_model(path / "plain", initializer_range=0.1)
    return {"plain": plain, "chat": worlds.make_model(path / "chat", chat=True, initializer_range=0.1)}


def run(model, rows, output, **options):
    options = {"max_new_tokens": 6, "batch_size": 8, **options}
    sample.main(sample.Args(model=str(model), rows=str(rows), output=output, **options))
    return worlds.read_jsonl(output)


def prompt_ids(rows, tokenizer):
    """The prompts as sampling encodes them."""
    found = streaming.encode(streaming.read(str(rows), Counter()), tokenizer, Counter(), 500)
    return [row.prompt for row in found]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_prompts_of_training_and_keeps_its_columns(form, models, tmp_path):
    row, completions = FORMS[form]
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [row | {"id": i} for i in range(3)])
    tokenizer = AutoTokenizer.from_pretrained(models["chat"])
    prompts = prompt_ids(rows, tokenizer)
    if form not in ("prompt alone", "chat prompt alone"):
        build = tokenise(str(rows), tokenizer, Needs(completions=completions), 500, None)
        width = len(build.offsets) // 3
        trained = [list(build.tokens[build.offsets[i] : build.offsets[i + 1]]) for i in range(0, 3 * width, width)]
        assert prompts == trained
    written = run(models["chat"], rows, tmp_path / "k.jsonl", num_completions=2)
    assert [set(row) for row in written] == [{"prompt", "completions", "finished"}] * 3
    assert prompt_ids(tmp_path / "k.jsonl", tokenizer) == prompts
    written = run(models["chat"], rows, tmp_path / "m.jsonl", reference_samples=2)
    for i, found in enumerate(written):
        assert len(found.pop("reference_samples")) == len(found.pop("reference_samples_finished")) == 2
        assert found == row | {"id": i}
    assert prompt_ids(tmp_path / "m.jsonl", tokenizer) == prompts


def test_instructions_without_a_template_mean_the_same_when_read_again(models, tmp_path):
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [FORMS["instruction"][0]])
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    run(models["plain"], rows, tmp_path / "out.jsonl", num_completions=1)
    assert prompt_ids(tmp_path / "out.jsonl", tokenizer) == prompt_ids(rows, tokenizer)


def test_special_tokens_inside_a_prompt_are_plain_text(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a</s>b<s>"}])
    (ids,) = prompt_ids(rows, tokenizer)
    assert ids[0] == tokenizer.bos_token_id and not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:]) == "a</s>b<s>"


def test_containers_and_order(models, tmp_path):
    rows = worlds.make_rows(30, seed=2, k=1)
    expected = run(models["plain"], worlds.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a", num_completions=3)
    assert [row["prompt"] for row in expected] == [row["prompt"] for row in rows]
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("b.json.gz", "c.parquet"):
        assert run(models["plain"], tmp_path / name, tmp_path / f"{name}.out", num_completions=3) == expected
    first = run(models["plain"], tmp_path / "a.jsonl", tmp_path / "first", num_completions=3, max_rows=7)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in rows[:7]]
    assert not list(tmp_path.glob("*.partial*")) and not list(tmp_path.glob("*.tmp"))


def test_windows_do_not_repeat_each_others_draws(models, tmp_path):
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "lo"}] * 24)
    written = run(models["plain"], rows, tmp_path / "out", num_completions=1, batch_size=2)
    texts = [row["completions"][0] for row in written]
    assert texts[:8] != texts[8:16] != texts[16:] != texts[:8] and len(set(texts)) > 20


def test_prompts_without_room_are_dropped_and_counted(models, tmp_path, capsys):
    rows = [{"prompt": "lo " * n} for n in (1, 600, 2)]
    written = run(models["plain"], worlds.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a", num_completions=1)
    assert [row["prompt"] for row in written] == [rows[0]["prompt"], rows[2]["prompt"]]
    assert "rows 3, kept 2, dropped: prompt too long 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable row; rows 1, kept 0, dropped: prompt too long 1"):
        run(models["plain"], worlds.write_jsonl(tmp_path / "b.jsonl", rows[1:2]), tmp_path / "b", num_completions=1)
    assert not list(tmp_path.glob("b.*partial")) and not (tmp_path / "b").exists()


# ---------------------------------------------------------------- windows


def test_rows_are_taken_one_window_at_a_time(tmp_path):
    taken = 0

    def source():
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    def compute(number, window):
        assert taken == min(100, 7 * (number + 1))
        return ({"row": i} for i in window)

    assert streaming.write(tmp_path / "out", {}, source(), 7, compute) == 100
    assert worlds.read_jsonl(tmp_path / "out") == [{"row": i} for i in range(1, 101)]


def test_rows_are_tokenised_one_chunk_at_a_time(models, tmp_path):
    rows = worlds.write_jsonl(tmp_path / "rows.jsonl", ({"prompt": "lo"} for _ in range(3 * streaming.CHUNK)))
    tokenizer, taken = AutoTokenizer.from_pretrained(models["plain"]), itertools.count()
    examples = (pair for pair in streaming.read(str(rows), Counter()) if next(taken) is not None)
    next(streaming.encode(examples, tokenizer, Counter(), 500))
    assert next(taken) == streaming.CHUNK


def test_interrupted_at_every_row_and_within_rows(tmp_path):
    """Whatever a killed run had written, the continuation completes it, computing no finished window again."""
    rows, made_with = list(range(10)), {"a": 1}

    def compute(number, window):
        computed.append(number)
        return ({"row": i, "text": "é" * 5} for i in window)

    computed: list[int] = []
    streaming.write(tmp_path / "out", made_with, rows, 3, compute)
    whole = (tmp_path / "out").read_bytes()
    part = json.dumps(made_with).encode() + b"\n" + whole
    for cut in range(len(part) + 1):
        computed.clear()
        (tmp_path / "out.partial").write_bytes(part[:cut])
        done = max(0, part[:cut].count(b"\n") - 1)
        assert streaming.write(tmp_path / "out", made_with, rows, 3, compute) == 10
        assert (tmp_path / "out").read_bytes() == whole
        assert computed == [n for n in range(4) if done < min(10, 3 * (n + 1))]


def command_line(folder, output, processes=1, **options):
    defaults = {"model": folder / "model", "rows": folder / "rows.jsonl", "reference_samples": 2}
    options = {**defaults, "max_new_tokens": 24, "batch_size": 4, "output": output, **options}
    return worlds.command(SCRIPT, processes, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, 60 rows, and what an uninterrupted run makes of them."""
    path = tmp_path_factory.mktemp("interrupted")
    worlds.make_model(path / "model", initializer_range=0.1)
    worlds.make_rows(60, seed=8, k=2, path=path / "rows.jsonl")
    done = subprocess.run(command_line(path, path / "whole.jsonl"), cwd=worlds.ROOT, env=worlds.environment(path))
    assert done.returncode == 0
    return path


def test_kill_and_continue_gives_the_same_bytes(folder, tmp_path):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    line, options = command_line(folder, output), {"cwd": worlds.ROOT, "env": worlds.environment(tmp_path)}
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, **options)
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 4):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists() and 4 <= part.read_bytes().count(b"\n") < 61
    with open(part, "ab") as file:
        file.write(b'{"prompt": "torn')
    before = part.read_bytes()
    worlds.make_rows(60, seed=9, k=2, path=tmp_path / "rows.jsonl")
    settings = {"max_new_tokens": 24, "batch_size": 4, "reference_samples": 2}
    for changed in ({"temperature": 0.5}, {"rows": tmp_path / "rows.jsonl"}, {"seed": 3}):
        arguments = {"model": folder / "model", "rows": folder / "rows.jsonl", "output": output, **settings, **changed}
        with pytest.raises(UserError, match=f"was started with other settings.*{next(iter(changed))}"):
            run(**arguments)
        assert part.read_bytes() == before
    assert subprocess.run(line, **options).returncode == 0
    assert output.read_bytes() == (folder / "whole.jsonl").read_bytes() and not part.exists()


def test_two_processes_write_the_same_rows(folder, tmp_path):
    line = command_line(folder, tmp_path / "out.jsonl", processes=2)
    assert subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), timeout=120).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    (tmp_path / "new.jsonl.partial-0-of-2").touch()
    with pytest.raises(UserError, match="another number of processes"):
        streaming.write(tmp_path / "new.jsonl", {}, [1], 1, lambda number, window: [])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "rows.jsonl: neither a file"),
        ("", {}, "no rows"),
        ('{"prompt": "anna"}\nnonsense\n', {}, "line 2: not valid JSON"),
        ('{"prompt": "anna"}\n{"text": "anna"}\n', {}, "line 2: field 'prompt' is missing"),
        ('{"prompt": 3}\n', {}, "line 1: field 'prompt' is of type int"),
        ('{"text": "anna"}\n', {}, "line 1: running text has no prompt"),
        ('{"prompt": [{"role": "user", "content": "anna"}]}\n', {}, "no chat template"),
        ('{"prompt": "anna"}\n', {"max_new_tokens": 64}, "64 positions"),
        ('{"prompt": "anna"}\n', {"reference_samples": 1}, "either --num-completions or --reference-samples"),
        ('{"prompt": "anna"}\n', {"num_completions": None}, "either --num-completions or --reference-samples"),
        ('{"prompt": "anna"}\n', {"model": "/no/such/directory"}, "/no/such/directory"),
    ],
)
def test_bad_input(text, options, message, directory, tmp_path):
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    settings = {"model": str(directory), "max_new_tokens": 4, "num_completions": 1, **options}
    with pytest.raises(UserError, match=message):
        sample.main(sample.Args(rows=str(rows), output=tmp_path / "out.jsonl", **settings))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing.jsonl: neither a file"),
        (["--temperature", "0"], "--temperature 0.0: must be a finite number above 0"),
        (["--top-p", "1.5"], "--top-p 1.5: must be at most 1"),
        (["--top-k", "-1"], "--top-k -1: must be a finite number of at least 0"),
    ],
)
def test_command_line_ends_with_one_line_and_exit_code_2(words, message, tmp_path):
    options = {"model": "none", "rows": tmp_path / "missing.jsonl", "output": tmp_path / "o", "num_completions": 1}
    line = [*worlds.command(SCRIPT, 1, options), *words]
    done = subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr
