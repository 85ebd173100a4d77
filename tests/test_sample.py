"""Sampling and beam search: exact limits and probabilities, log-probs, forms, interruption, bad input."""

import gzip
import itertools
import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pyarrow.parquet
import pytest
import reference
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scripts import sample
from scripts.lab import notices, row_files
from scripts.lab.sampling import (
    Sampling,
    ids_that_end,
    load_sampler,
    make_batches,
    sample_completions,
    sample_with_logps,
    truncate_after,
)
from shared import UserError
from shared.encode import Encoder, completion_text
from shared.groups import Requires, tokenise
from shared.rows import Counts

SCRIPT = "scripts/sample.py"
PROMPTS = [
    "summary:",
    "we lost a lamp. summary:",
    "the tag says four. please call anna. it was at the market in june. summary:",
    "anna",
    "thank you all. more news will come soon. tea is free as ever. summary:",
]
Policy = tuple[Any, Any]  # model and tokenizer


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The notices' tokenizer and a tiny Llama with large weights, so that its distributions are peaked."""
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
def directory(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    for part in policy:
        part.save_pretrained(path)
    return path


def sample_texts(
    policy: Policy, prompts: list[list[int]], count: int = 1, **options: Any
) -> list[tuple[list[str], list[bool]]]:
    """The texts of each prompt's completions, and which of them ended."""
    model, tokenizer = policy
    eos_ids = ids_that_end(model, tokenizer)
    sampling = Sampling(**options)
    results = []
    samples = sample_completions(model, eos_ids, prompts, count, sampling)
    for prompt, completions in zip(prompts, samples, strict=True):
        texts = [completion_text(tokenizer, prompt, ids) for ids in completions]
        finished = [ids[-1] in eos_ids for ids in completions]
        results.append((texts, finished))
    return results


# ---------------------------------------------------------------- samples


def greedy_search(policy: Policy, ids: list[int], penalty: float) -> str:
    """transformers' own greedy search from one prompt."""
    model, tokenizer = policy
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
    output = model.generate(torch.tensor([ids]), generation_config=config)
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(output[0], skip_special_tokens=True).removeprefix(prompt)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("limits", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 8}, {"batch_tokens": 60}])
def test_greedy_limit_is_the_same_in_any_batch(policy: Policy, penalty: float, limits: dict[str, int]) -> None:
    """top_k = 1 in padded batches equals transformers' greedy search on one prompt at a time."""
    _, tokenizer = policy
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = [greedy_search(policy, ids, penalty) for ids in prompts]
    assert len(set(expected)) > 1

    options = {"top_k": 1, "max_new_tokens": 12, "repetition_penalty": penalty}
    results = sample_texts(policy, prompts, 2, **options, **limits)
    assert [texts for texts, _ in results] == [[text, text] for text in expected]


def next_token_probabilities(model: Any, ids: list[int], temperature: float, top_k: int) -> torch.Tensor:
    """softmax(logits / T), renormalised over the k likeliest tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    probabilities = logits.softmax(-1).pow(1 / temperature)
    if top_k:
        least = probabilities.topk(top_k).values[-1]
        probabilities[probabilities < least] = 0
    return (probabilities / probabilities.sum()).double()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 0), (0.7, 5)])
def test_first_token_frequencies(policy: Policy, temperature: float, top_k: int) -> None:
    """Within 4.5 binomial deviations of the probabilities; a token of probability 0 is never sampled."""
    model, tokenizer = policy
    n = 2000

    def assert_frequency(count: int, probability: float) -> None:
        slack = 4.5 * (probability * (1 - probability) / n) ** 0.5 + 1e-12
        if probability > 0:
            slack += 1 / n
        assert abs(count / n - probability) <= slack

    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[1:3]]
    options = {"max_new_tokens": 1, "temperature": temperature, "top_k": top_k, "batch_size": 1000}
    results = sample_texts(policy, prompts, n, **options)
    for ids, (texts, finished) in zip(prompts, results, strict=True):
        probabilities = next_token_probabilities(model, ids, temperature, top_k)
        counts = Counter(text.strip() for text in texts)
        for token in range(len(notices.SPECIAL), len(tokenizer)):
            assert_frequency(counts[tokenizer.decode([token])], probabilities[token].item())
        assert_frequency(sum(finished), probabilities[tokenizer.eos_token_id].item())


def test_the_seed_decides_and_the_models_own_settings_stay(policy: Policy) -> None:
    model, tokenizer = policy
    config = model.generation_config
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    first, again, other = (sample_texts(policy, prompts, 3, max_new_tokens=8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert model.generation_config is config


def test_batches_keep_the_bounds_and_hold_every_sequence_once() -> None:
    lengths = [5, 9, 2, 30, 7, 7, 1, 12] * 10
    batches = list(make_batches(lengths, batch_size=4, batch_tokens=20))
    assert sorted(index for batch in batches for index in batch) == list(range(80))
    for batch in batches:
        width = max(lengths[index] for index in batch)
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * width <= 20


def test_truncate_after() -> None:
    assert truncate_after([5, 6, 2, 7, 2], [2, 3]) == [5, 6, 2]
    assert truncate_after([5, 6], [2]) == [5, 6]


# ---------------------------------------------------------------- rows


USER = {"role": "user", "content": "bade </s> lo"}
ANSWER = {"role": "assistant", "content": "do"}
OTHER_ANSWER = {"role": "assistant", "content": "fi"}
FROM_HUMAN = {"from": "human", "value": "lo"}
FROM_GPT = {"from": "gpt", "value": "a"}
FROM_GPT_TOO = {"from": "gpt", "value": "b"}
TRANSCRIPT = "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d</s>\n\nAssistant:"
PROMPTS_ALONE = {
    "prompt alone": {"prompt": "bade lo, <s>"},
    "chat prompt alone": {"prompt": [USER]},
}
PAIRS = {
    "pair": {"prompt": "bade lo, ", "chosen": "a", "rejected": "b"},
    "messages that repeat the prompt": {
        "prompt": USER["content"],
        "chosen": [USER, ANSWER],
        "rejected": [USER, OTHER_ANSWER],
    },
    "HH": {"chosen": f"{TRANSCRIPT} a", "rejected": f"{TRANSCRIPT} b"},
    "message lists": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER_ANSWER]},
    "SHP": {"history": "lo", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
    "conversations": {"conversations": [FROM_HUMAN], "chosen": FROM_GPT, "rejected": FROM_GPT_TOO},
    "instruction pair": {"instruction": "lo", "input": "fi", "chosen": "a", "rejected": "b"},
}
RANKINGS = {
    "completions": {"prompt": "lo", "completions": ["a", "b", "c"]},
}
SINGLES = {
    "messages": {"messages": [USER, ANSWER, USER, OTHER_ANSWER]},
    "prompt, completion": {"prompt": "lo", "completion": "a"},
    "conversation": {"conversations": [FROM_HUMAN, FROM_GPT]},
    "instruction": {"instruction": "lo</s>", "output": "a"},
}
FORMS = {**PROMPTS_ALONE, **PAIRS, **RANKINGS, **SINGLES}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a chat template, and one without."""
    path = tmp_path_factory.mktemp("models")
    return {
        "plain": tiny.make_model(path / "plain", initializer_range=0.1),
        "chat": tiny.make_model(path / "chat", chat=True, initializer_range=0.1),
    }


def run(model: Path, rows: Path, output: Path, **options: Any) -> list[dict]:
    options = {"max_new_tokens": 6, "batch_size": 8, **options}
    args = sample.Args(model=str(model), rows=str(rows), output=output, **options)
    sample.main(args)
    return tiny.read_jsonl(output)


def prompt_ids(rows: Path, tokenizer: Any) -> list[list[int]]:
    """The prompts as sampling encodes them."""
    examples = row_files.read_examples(str(rows), Counts())
    encoded = row_files.encode_rows(examples, Encoder(tokenizer), 500)
    return [row.prompt for row in encoded]


def training_prompt_ids(rows: Path, tokenizer: Any, form: str) -> list[list[int]]:
    """The prompts as training encodes them."""
    requires = Requires("ranking")
    if form in PAIRS:
        requires = Requires("pair")
    elif form in SINGLES:
        requires = Requires("first")
    builder = tokenise(str(rows), tokenizer, requires, 500, None)
    num_offsets = len(builder.offsets) // len(builder.row_numbers)  # of a group
    prompts = []
    for i in range(0, len(builder.offsets), num_offsets):
        start, end = builder.offsets[i : i + 2]
        prompts.append(list(builder.tokens[start:end]))
    return prompts


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_prompts_of_training_and_keeps_its_columns(
    form: str, models: dict[str, Path], tmp_path: Path
) -> None:
    original = [{**FORMS[form], "id": number} for number in range(3)]
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", original)
    tokenizer = AutoTokenizer.from_pretrained(models["chat"])
    prompts = prompt_ids(rows, tokenizer)
    if form not in PROMPTS_ALONE:
        assert prompts == training_prompt_ids(rows, tokenizer, form)

    written = run(models["chat"], rows, tmp_path / "k.jsonl", num_completions=2)
    columns = {"prompt", "completions", "finished", "logps", "completion_ids", "vocabulary"}
    assert [set(row) for row in written] == [columns] * 3
    assert prompt_ids(tmp_path / "k.jsonl", tokenizer) == prompts

    written = run(models["chat"], rows, tmp_path / "m.jsonl", reference_samples=2)
    for row in written:
        assert len(row.pop("reference_samples")) == 2
        assert len(row.pop("reference_samples_finished")) == 2
        assert len(row.pop("reference_sample_ids")) == 2
        assert row.pop("reference_vocabulary") == Encoder(tokenizer).vocabulary
    assert written == original
    assert prompt_ids(tmp_path / "m.jsonl", tokenizer) == prompts


def test_instructions_without_a_template_mean_the_same_when_read_again(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [FORMS["instruction"]])
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    run(models["plain"], rows, tmp_path / "out.jsonl", num_completions=1)
    assert prompt_ids(tmp_path / "out.jsonl", tokenizer) == prompt_ids(rows, tokenizer)


def test_special_tokens_inside_a_prompt_are_plain_text(models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a</s>b<s>"}])
    ((bos, *ids),) = prompt_ids(rows, tokenizer)
    assert bos == tokenizer.bos_token_id
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_containers_and_order(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.make_rows(30, seed=2, k=1)
    jsonl = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    expected = run(models["plain"], jsonl, tmp_path / "a", num_completions=3)
    assert [row["prompt"] for row in expected] == [row["prompt"] for row in rows]

    zipped = tmp_path / "b.json.gz"
    zipped.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert run(models["plain"], zipped, tmp_path / "b", num_completions=3) == expected
    parquet = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert run(models["plain"], parquet, tmp_path / "c", num_completions=3) == expected

    first = run(models["plain"], jsonl, tmp_path / "first", num_completions=3, max_rows=7)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in rows[:7]]
    assert not list(tmp_path.glob("*.partial*"))
    assert not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- log-probs


def log_distributions(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log π(·|all before it) at each token of a completion, in one stock forward pass: (T, V)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def check_logps(written: list[dict], prompts: list[list[int]], models: dict[str, Path], beta: float) -> None:
    """The log-probs of rows, against float64 models: a policy, which two others steer if β is above 0 (Eq 14)."""
    base, proxy, proxy_reference = (reference.load_model(path) for path in models.values())
    for row, prompt in zip(written, prompts, strict=True):
        for ids, logp in zip(row["completion_ids"], row["logps"], strict=True):
            logps = log_distributions(base, prompt, ids)
            if beta:
                ratios = log_distributions(proxy, prompt, ids) - log_distributions(proxy_reference, prompt, ids)
                logps = (logps + beta * ratios).log_softmax(-1)
            expected = float(logps[range(len(ids)), ids].sum())
            assert logp == pytest.approx(expected, abs=2e-5 * len(ids), rel=2e-6)


@pytest.fixture(scope="module")
def steering_models(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, and a pair whose tokenizer it has."""
    path = tmp_path_factory.mktemp("steering")
    return {
        "model": models["plain"],
        "proxy": tiny.make_model(path / "proxy", seed=5, initializer_range=0.1),
        "proxy_reference": tiny.make_model(path / "reference", seed=6, initializer_range=0.1),
    }


@pytest.mark.parametrize(
    ("beta", "options"),
    [
        (0.0, {}),
        (0.0, {"temperature": 0.5, "top_k": 30, "top_p": 0.9}),
        (0.0, {"repetition_penalty": 1.5}),
        (0.0, {"beams": 5}),
        (0.0, {"beams": 5, "length_penalty": 2.0}),
        (1.5, {"temperature": 0.5, "top_k": 30, "top_p": 0.9}),
        (1.5, {"repetition_penalty": 1.5}),
    ],
)
def test_log_probs_are_those_of_the_policy_itself(
    beta: float, options: dict[str, Any], steering_models: dict[str, Path], tmp_path: Path
) -> None:
    """Prompts of many lengths; completions that end at once, or later, or that are cut off."""
    model, proxy, proxy_reference = steering_models.values()
    if beta:
        options = {**options, "proxy": str(proxy), "proxy_reference": str(proxy_reference), "beta": beta}
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(9, seed=4, k=1, path=rows)
    written = run(model, rows, tmp_path / "out", num_completions=3, max_new_tokens=12, **options)

    tokenizer = AutoTokenizer.from_pretrained(model)
    check_logps(written, prompt_ids(rows, tokenizer), steering_models, beta)
    assert len({round(logp, 3) for row in written for logp in row["logps"]}) > 20


SHARING = {  # the window of mistral and gemma3_text is shorter than the longest prompts
    **dict.fromkeys(["gpt2", "mistral", "gemma3_text"], True),
    **dict.fromkeys(["qwen2_5_vl", "qwen3_vl"], False),  # keep an offset of positions between calls
    **dict.fromkeys(["lfm2", "falcon_h1"], False),  # recurrent
}
RECURRENT = ("lfm2", "falcon_h1")


@pytest.mark.parametrize(("family", "shares"), SHARING.items())
def test_a_prompt_is_computed_once_for_its_samples(family: str, shares: bool, tmp_path: Path) -> None:
    """With the log-probs of stock forward passes, in batches of seven and five sequences."""
    lengths = (3, 30, 7, 20)
    if family in RECURRENT:
        lengths = (20, 20, 20, 20)  # their states take padding for tokens
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]
    path = families.save_model(family, tmp_path / "model", 10.0)
    model, _, eos_ids = load_sampler(str(path), "float32")
    shapes = []

    def record(module: Any, args: tuple, options: dict) -> None:
        (ids,) = args or (options["input_ids"],)
        shapes.append(tuple(ids.shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    limits = Sampling(max_new_tokens=6, batch_size=7)
    samples = list(sample_with_logps(model, eos_ids, prompts, 3, limits))

    # the first batch has three samples of each of the two longest prompts, and one of the next
    assert (shapes[:2] == [(3, max(lengths) - 1), (7, 1)]) == shares
    assert ((7, max(lengths)) not in shapes) == shares
    stock = reference.load_model(path)
    for prompt, drawn in zip(prompts, samples, strict=True):
        for ids, logp in drawn:
            expected = reference.token_logps(stock, prompt, ids).sum().item()
            assert logp == pytest.approx(expected, abs=1e-4 * len(ids))


# ---------------------------------------------------------------- beam search


TINY_VOCABULARY = ["<pad>", "<s>", "</s>", "a", "b"]
LONGEST = 4  # tokens of a completion
TINY_PROMPTS = ["a", "b a", "b b a b"]


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five tokens, whose completions can all be listed."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny_policy")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(TINY_VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = tiny.make_config("llama", len(TINY_VOCABULARY), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def all_completions(model: Any, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """log π(y|x) of every completion of at most LONGEST tokens, in float64."""
    logps = {}
    for length in range(1, LONGEST + 1):
        completions = []
        for ids in itertools.product(range(len(TINY_VOCABULARY)), repeat=length):
            is_whole = ids[-1] == 2 or length == LONGEST
            if is_whole and 2 not in ids[:-1]:
                completions.append(ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids] for ids in completions]), use_cache=False).logits
        distributions = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        token_logps = distributions.gather(2, torch.tensor(completions).unsqueeze(2))
        logps.update(zip(completions, token_logps.sum((1, 2)).tolist(), strict=True))
    return logps


@pytest.mark.parametrize("length_penalty", [None, 0.7])
def test_a_wide_search_writes_the_best_of_all_completions(
    length_penalty: float | None, tiny_policy: Path, tmp_path: Path
) -> None:
    """All 341 completions of five tokens, listed: the best by log π(y|x) / |y|^P come first, in order."""
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in TINY_PROMPTS])
    options = {"num_completions": 300, "beams": 341, "max_new_tokens": LONGEST, "length_penalty": length_penalty}
    written = run(tiny_policy, rows, tmp_path / "out", **options)

    model = reference.load_model(tiny_policy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    lengths_of_best = set()
    for row, prompt in zip(written, prompt_ids(rows, tokenizer), strict=True):
        logps = all_completions(model, prompt)
        assert len(logps) == 341
        scores = {ids: logp / len(ids) ** (length_penalty or 0) for ids, logp in logps.items()}
        ids_of_row = [tuple(ids) for ids in row["completion_ids"]]
        assert len(set(ids_of_row)) == 300
        best_first = sorted(scores.values(), reverse=True)[:300]
        assert [scores[ids] for ids in ids_of_row] == pytest.approx(best_first, abs=1e-5)
        assert row["logps"] == pytest.approx([logps[ids] for ids in ids_of_row], abs=1e-5)
        assert row["finished"] == [ids[-1] == 2 for ids in ids_of_row]
        assert row["completions"] == [completion_text(tokenizer, prompt, list(ids)) for ids in ids_of_row]
        lengths_of_best.update(map(len, ids_of_row[:3]))
    assert len(lengths_of_best) > 1


def test_a_row_has_fewer_completions_where_fewer_are_possible(tiny_policy: Path, tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (row,) = run(tiny_policy, rows, tmp_path / "out", num_completions=10, beams=10, max_new_tokens=1)
    assert sorted(row["completion_ids"]) == [[0], [1], [2], [3], [4]]
    assert sum(math.exp(logp) for logp in row["logps"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("limits", [{"batch_size": 1}, {"batch_size": 64}, {"batch_tokens": 60}])
def test_one_beam_is_greedy_in_any_batch(
    limits: dict[str, int], policy: Policy, directory: Path, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    written = run(directory, rows, tmp_path / "out", num_completions=1, beams=1, max_new_tokens=12, **limits)
    expected = [greedy_search(policy, ids, 1.0) for ids in prompt_ids(rows, policy[1])]
    assert [row["completions"] for row in written] == [[text] for text in expected]


def test_beams_answer_chat_prompts_and_drop_those_without_room(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"role": "user", "content": "lo " * 600}
    rows = [{"prompt": [USER]}, {"prompt": [long]}, {"prompt": [USER, ANSWER, USER]}]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "out.jsonl"
    written = run(models["chat"], source, output, num_completions=2, beams=3)
    assert "rows 3, kept 2, dropped: prompt too long 1" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(models["chat"])
    prompts = prompt_ids(source, tokenizer)
    assert prompt_ids(output, tokenizer) == prompts
    model = AutoModelForCausalLM.from_pretrained(models["chat"])
    eos_ids = ids_that_end(model, tokenizer)
    config = GenerationConfig(
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        length_penalty=0.0,
        early_stopping="never",
        eos_token_id=eos_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    for row, prompt in zip(written, prompts, strict=True):
        sequences = model.generate(torch.tensor([prompt]), generation_config=config)
        expected = [truncate_after(ids, eos_ids) for ids in sequences[:, len(prompt) :].tolist()]
        assert row["completion_ids"] == expected


def test_an_interrupted_search_goes_on(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its third window of two prompts: no finished window is searched again, and the bytes are the same."""
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(9, seed=8, k=1, path=rows)
    options = {"num_completions": 2, "beams": 4, "batch_size": 2}
    run(models["plain"], rows, tmp_path / "whole", **options)
    original = sample.search_completions
    searched = []

    def interrupted(*arguments: Any) -> Iterator[list]:
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(arguments)
        return original(*arguments)

    def counted(*arguments: Any) -> Iterator[list]:
        searched.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(sample, "search_completions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models["plain"], rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(sample, "search_completions", counted)
    with pytest.raises(UserError, match="was started with other settings.*length_penalty None → 1.0"):
        run(models["plain"], rows, tmp_path / "out", **options, length_penalty=1.0)
    run(models["plain"], rows, tmp_path / "out", **options)
    assert len(searched) == 5
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_beams_of_two_processes(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(9, seed=8, k=1, path=rows)
    options = {"num_completions": 2, "beams": 4, "batch_size": 2, "max_new_tokens": 6}
    run(models["plain"], rows, tmp_path / "whole", **options)
    options |= {"model": models["plain"], "rows": rows, "output": tmp_path / "out"}
    line = tiny.command(SCRIPT, 2, options)
    subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), timeout=120, check=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


# ---------------------------------------------------------------- windows and rooms


def test_windows_do_not_repeat_each_others_samples(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "lo"}] * 24)
    written = run(models["plain"], rows, tmp_path / "out", num_completions=1, batch_size=2)
    texts = [row["completions"][0] for row in written]
    windows = {tuple(texts[:8]), tuple(texts[8:16]), tuple(texts[16:])}
    assert len(windows) == 3
    assert len(set(texts)) > 20


def test_prompts_without_room_are_dropped_and_counted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long, other = ({"prompt": "lo " * n} for n in (1, 600, 2))
    rows = tiny.write_jsonl(tmp_path / "a.jsonl", [short, long, other])
    written = run(models["plain"], rows, tmp_path / "a", num_completions=1)
    assert [row["prompt"] for row in written] == [short["prompt"], other["prompt"]]
    assert "rows 3, kept 2, dropped: prompt too long 1" in capsys.readouterr().out

    rows = tiny.write_jsonl(tmp_path / "b.jsonl", [long])
    with pytest.raises(UserError, match="no usable row; rows 1, kept 0, dropped: prompt too long 1"):
        run(models["plain"], rows, tmp_path / "b", num_completions=1)
    assert not list(tmp_path.glob("b.*partial"))
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- windows


def test_rows_are_read_one_window_at_a_time(tmp_path: Path) -> None:
    num_read = 0

    def source() -> Iterator[int]:
        nonlocal num_read
        while num_read < 100:
            num_read += 1
            yield num_read

    def compute(number: int, window: list[int]) -> list[dict]:
        assert num_read == min(100, 7 * (number + 1))
        return [{"row": i} for i in window]

    assert row_files.write_windows(tmp_path / "out", {}, source(), 7, compute) == 100
    assert row_files.read_jsonl(tmp_path / "out") == [{"row": i} for i in range(1, 101)]


def test_rows_are_tokenised_one_chunk_at_a_time(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "lo"}] * (3 * row_files.CHUNK_SIZE))
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    examples = row_files.read_examples(str(rows), Counts())
    next(row_files.encode_rows(examples, Encoder(tokenizer), 500))
    assert len(list(examples)) == 2 * row_files.CHUNK_SIZE


def test_interrupted_at_every_row_and_within_rows(tmp_path: Path) -> None:
    """Whatever a killed run had written, the continuation completes it, computing no finished window again."""
    settings = {"a": 1}
    computed: list[int] = []

    def compute(number: int, window: list[int]) -> list[dict]:
        computed.append(number)
        return [{"row": i, "text": "é" * 5} for i in window]

    def write() -> bytes:
        assert row_files.write_windows(tmp_path / "out", settings, range(10), 3, compute) == 10
        return (tmp_path / "out").read_bytes()

    complete = write()
    part = json.dumps(settings).encode() + b"\n" + complete
    for size in range(len(part) + 1):
        (tmp_path / "out.partial").write_bytes(part[:size])
        rows_done = max(0, part[:size].count(b"\n") - 1)
        computed.clear()
        assert write() == complete
        last_rows = enumerate((3, 6, 9, 10))  # of each window
        assert computed == [number for number, row in last_rows if rows_done < row]


def command_line(folder: Path, output: Path, processes: int = 1) -> list[str]:
    options = {
        "model": folder / "model",
        "rows": folder / "rows.jsonl",
        "reference_samples": 2,
        "max_new_tokens": 24,
        "batch_size": 4,
        "output": output,
    }
    return tiny.command(SCRIPT, processes, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 60 rows, and the output of a run that was not interrupted."""
    path = tmp_path_factory.mktemp("interrupted")
    tiny.make_model(path / "model", initializer_range=0.1)
    tiny.make_rows(60, seed=8, k=2, path=path / "rows.jsonl")
    line = command_line(path, path / "complete.jsonl")
    subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(path), check=True)
    return path


def kill_after_rows(line: list[str], part: Path, environment: dict[str, str]) -> None:
    """Start a command and kill it when a few rows stand in its partial file."""
    process = subprocess.Popen(line, cwd=tiny.ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if part.exists() and part.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_and_continue_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.partial"
    line = command_line(folder, output)
    environment = tiny.environment(tmp_path)
    kill_after_rows(line, part, environment)
    assert not output.exists()
    assert 4 <= part.read_bytes().count(b"\n") < 61
    with open(part, "ab") as file:
        file.write(b'{"prompt": "torn')

    before = part.read_bytes()
    options = {
        "model": folder / "model",
        "rows": folder / "rows.jsonl",
        "max_new_tokens": 24,
        "batch_size": 4,
        "reference_samples": 2,
    }
    tiny.make_rows(60, seed=9, k=2, path=tmp_path / "rows.jsonl")
    for name, value in {"temperature": 0.5, "rows": tmp_path / "rows.jsonl", "seed": 3}.items():
        changed = {**options, name: value}
        with pytest.raises(UserError, match=f"was started with other settings.*{name}"):
            run(output=output, **changed)
        assert part.read_bytes() == before

    subprocess.run(line, cwd=tiny.ROOT, env=environment, check=True)
    assert output.read_bytes() == (folder / "complete.jsonl").read_bytes()
    assert not part.exists()


def test_two_processes_write_the_same_rows(folder: Path, tmp_path: Path) -> None:
    line = command_line(folder, tmp_path / "out.jsonl", processes=2)
    subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), timeout=120, check=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (folder / "complete.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_parts_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial-0-of-2").touch()
    with pytest.raises(UserError, match="another number of processes"):
        row_files.write_windows(tmp_path / "out.jsonl", {}, [1], 1, lambda number, window: [])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "rows.jsonl: no such file"),
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
        ('{"prompt": "anna"}\n', {"beams": 2, "num_completions": 3}, "--num-completions 3: 2 beams find at most 2"),
        ('{"prompt": "anna"}\n', {"beams": 2, "num_completions": None, "reference_samples": 1}, "are drawn"),
        ('{"prompt": "anna"}\n', {"length_penalty": 1.0}, "--length-penalty is of beam search"),
        ('{"prompt": "anna"}\n', {"beams": 2, "temperature": 0.7}, "--temperature 0.7 changes what is sampled"),
        ('{"prompt": "anna"}\n', {"beams": 2, "top_k": 5}, "--top-k 5 changes what is sampled"),
        ('{"prompt": "anna"}\n', {"beams": 2, "top_p": 0.5}, "--top-p 0.5 changes what is sampled"),
        ('{"prompt": "anna"}\n', {"beams": 2, "repetition_penalty": 1.1}, "--repetition-penalty 1.1 changes"),
        ('{"prompt": "anna"}\n', {"beams": 2, "proxy": "a", "proxy_reference": "b", "beta": 1.0}, "--proxy steers"),
    ],
)
def test_bad_input(text: str | None, options: dict[str, Any], message: str, directory: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text, encoding="utf-8")
    options = {"model": directory, "max_new_tokens": 4, "num_completions": 1, **options}
    with pytest.raises(UserError, match=message):
        run(rows=rows, output=tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing.jsonl: no such file"),
        (["--temperature", "0"], "--temperature 0.0: must be a finite number above 0"),
        (["--top-p", "1.5"], "--top-p 1.5: must be a finite number above 0 and at most 1"),
        (["--beams", "0"], "--beams 0: must be a finite number above 0"),
        (["--top-k", "-1"], "--top-k -1: must be a finite number of at least 0"),
    ],
)
def test_command_line_ends_with_one_line_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    options = {"model": "none", "rows": tmp_path / "missing.jsonl", "output": tmp_path / "o", "num_completions": 1}
    line = [*tiny.command(SCRIPT, 1, options), *words]
    done = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
