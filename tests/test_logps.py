"""Log-probs of rows against stock transformers in float64, one completion at a time."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from scripts import logps
from shared import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.make_model(folder / name, seed=seed) for name, seed in (("a", 0), ("b", 1))}


def stock_logp(path: Path, prompt: str, completion: str, end: bool) -> float:
    """log π(y|x) of the stock model: all tokens behind the prompt's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    prompt_ids = tokenizer(prompt).input_ids
    ids = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end
    with torch.no_grad():
        token_logps = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    total = 0.0
    for place, token in enumerate(ids, len(prompt_ids) - 1):
        total += float(token_logps[place, token])
    return total


def run(models: dict[str, Path], rows: Path, output: Path) -> dict[str, list[list[float]]]:
    policies = tuple(f"{name}={path}" for name, path in models.items())
    logps.main(logps.Args(policies=policies, rows=str(rows), output=output))
    return json.loads(output.read_text(encoding="utf-8"))["logps"]


@pytest.mark.parametrize("num_completions", [1, 2, 3])
def test_the_sums_equal_stock_transformers(models: dict[str, Path], tmp_path: Path, num_completions: int) -> None:
    texts = [" me no", " ba be bi bo", " du"][:num_completions]
    finished = [True, False, True][:num_completions]
    row = {"prompt": "ka lu", "completions": texts, "finished": finished}
    other = {"prompt": "ta", "completions": [*reversed(texts)], "finished": [True] * num_completions}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row, other])

    written = run(models, rows, tmp_path / "new" / "logps.json")
    assert set(written) == set(models)
    for name, path in models.items():
        first = [stock_logp(path, "ka lu", *pair) for pair in zip(texts, finished, strict=True)]
        second = [stock_logp(path, "ta", text, True) for text in reversed(texts)]
        assert written[name][0] == pytest.approx(first, abs=1e-4)
        assert written[name][1] == pytest.approx(second, abs=1e-4)


def test_rows_that_cannot_be_used(models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "logps.json"
    three = {"prompt": "ka", "completions": [" a", " b", " c"]}
    two = {"prompt": "ka", "completions": [" a", " b"]}
    with pytest.raises(UserError, match="equally many in each; these have 2 and 3"):
        run(models, tiny.write_jsonl(tmp_path / "mixed.jsonl", [two, three]), output)
    with pytest.raises(UserError, match="these have 0"):
        run(models, tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "ka"}]), output)
    assert not output.exists()
