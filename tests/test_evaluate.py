"""Evaluation against independent expectations: hand-made numbers and stock transformers."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from torch import Tensor

from scripts import evaluate
from scripts.lab.policies import Samples, log_ratios, prompt_example, rewards_of, sample_policy, summarise
from scripts.lab.statistics import bootstrap
from shared import UserError
from shared.command import check_arguments
from shared.rows import Completion, Example

EOS = 1  # its id in the tokenizer of `tiny`
PROMPT = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"


def make_args(**values: object) -> evaluate.Args:
    defaults = {
        "policies": (),
        "rows": Path(),
        "output": Path(),
        "num_samples": 3,
        "max_new_tokens": 60,
        "batch_size": 8,
    }
    return evaluate.Args(**{**defaults, **values})


def test_intervals_resample_prompts_not_completions() -> None:
    """Completions that agree within a prompt carry no more information than one of them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 1, generator=generator, dtype=torch.double)
    repeated = values.expand(40, 5)
    samples = Samples(
        ids=[[[1]] * 5] * 40,
        texts=[[""] * 5] * 40,
        has_eos=[[True] * 5] * 40,
        vocabulary="",
    )

    numbers = summarise(repeated, values, repeated, samples, seed=0)

    assert numbers["reward"]["interval"] == pytest.approx(bootstrap(values[:, 0], 0))
    assert numbers["length"] == {"mean": 1.0, "interval": (1.0, 1.0)}
    assert numbers["finished"] == 1.0


# ---------------------------------------------------------------- KL


class Sampled(NamedTuple):
    """For each of two policies: the prompts' ids, the samples, and the log-ratios to the first policy."""

    prompts: list[list[list[int]]]
    samples: list[Samples]
    ratios: list[Tensor]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("policies")
    paths = []
    for seed in (0, 1):
        path = tiny.make_model(folder / str(seed), seed=seed, initializer_range=0.1)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def sampled(policies: list[str]) -> Sampled:
    args = make_args()
    examples = [prompt_example(row["prompt"]) for row in tiny.make_rows(7, seed=5, k=1)]
    prompts = []
    samples = []
    for path in policies:
        prompt_ids, policy_samples = sample_policy(path, examples, args, args.num_samples)
        policy_samples.ids[0][0] = [9, EOS]  # one completion that certainly has an EOS
        policy_samples.has_eos[0][0] = True
        prompts.append(prompt_ids)
        samples.append(policy_samples)
    ratios = log_ratios(policies, policies[0], prompts, samples)
    return Sampled(prompts, samples, ratios)


def stock_logps(path: str, prompts: list[list[int]], completions: list[list[list[int]]]) -> Tensor:
    """log π(y|x), (n, K), by transformers' own forward pass, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    rows = []
    for prompt, prompt_completions in zip(prompts, completions, strict=True):
        row = []
        for ids in prompt_completions:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            actions = torch.tensor(ids)[:, None]
            row.append(logps.gather(1, actions).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_kl_of_a_policy_to_itself_is_exactly_zero(sampled: Sampled) -> None:
    assert sampled.ratios[0].tolist() == [[0.0] * 3] * 7


def test_log_ratios_equal_those_of_stock_transformers(policies: list[str], sampled: Sampled) -> None:
    prompts = sampled.prompts[1]
    completions = sampled.samples[1].ids
    logps = stock_logps(policies[1], prompts, completions)
    ref_logps = stock_logps(policies[0], prompts, completions)
    torch.testing.assert_close(sampled.ratios[1], logps - ref_logps, atol=2e-5, rtol=1e-5)


def test_samples_keep_the_eos_only_where_there_is_one(sampled: Sampled) -> None:
    for samples in sampled.samples:
        for completions, has_eos in zip(samples.ids, samples.has_eos, strict=True):
            assert has_eos == [ids[-1] == EOS for ids in completions]
            for ids in completions:
                assert EOS not in ids[:-1]
                assert 1 <= len(ids) <= 60


# ---------------------------------------------------------------- rewards


def test_a_reward_model_scores_what_stock_transformers_scores(policies: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    path = str(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(policies[0])
    model = AutoModelForSequenceClassification.from_pretrained(policies[0], num_labels=1).eval()
    model.config.reward_mean = 0.25
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

    cut_off = Example("", 0, "bade lo,", [Completion("fi sapa", is_finished=False)])
    finished, unfinished = rewards_of(path, [prompt_example("bade", "do"), cut_off])

    def stock_reward(prompt: str, completion: str, end: list[int]) -> float:
        ids = tokenizer(prompt).input_ids
        ids += tokenizer(completion, add_special_tokens=False).input_ids
        with torch.no_grad():
            return model(torch.tensor([ids + end])).logits.item()

    assert finished == pytest.approx(stock_reward("bade", "do", [EOS]) - 0.25, abs=1e-4)
    assert unfinished == pytest.approx(stock_reward("bade lo,", "fi sapa", []) - 0.25, abs=1e-4)


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one row each."""
    folder = tmp_path_factory.mktemp("rows")
    rows = {
        "bad": {"prompt": "not a notice"},
        "good": {"prompt": PROMPT},
        "question": {"messages": [{"role": "user", "content": "why?"}]},
        "running text": {"text": PROMPT},
    }
    paths = {}
    for name, row in rows.items():
        paths[name] = tiny.write_jsonl(folder / f"{name}.jsonl", [row])
    paths["missing"] = folder / "none.jsonl"
    return paths


def refused(message: str, args: evaluate.Args) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_arguments(args)
        evaluate.main(args)


@pytest.mark.parametrize(
    ("policies_given", "source", "message"),
    [
        (("sft",), "bad", "NAME=DIR"),
        (("a=x", "a=y"), "bad", "NAME=DIR"),
        (("a=x",), "bad", "not a notice"),
        (("a=x",), "missing", "none.jsonl"),
        (("a=x",), "question", "no usable row; rows 1, kept 0, dropped: no assistant turn 1"),
        (("a=x",), "running text", "line 1: running text has no prompt"),
    ],
)
def test_mistakes_end_the_run(
    policies_given: tuple[str, ...], source: str, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    refused(message, make_args(policies=policies_given, rows=sources[source], output=output))
    assert not output.exists()


def test_policies_and_numbers_are_checked(policies: list[str], sources: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", vocab=380)
    first = f"a={policies[0]}"
    refused("another tokenizer", make_args(policies=(first, f"b={other}"), rows=sources["good"]))
    refused("x: cannot be loaded", make_args(policies=(first, "b=x"), rows=sources["good"]))
    refused("--num-samples", make_args(policies=("a=x",), rows=sources["good"], num_samples=0))


def test_a_mistake_is_one_line_and_exit_code_2(sources: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    options = {"policies": "a=x", "rows": sources["bad"], "output": output}
    line = tiny.command("scripts/evaluate.py", 1, options)
    environment = tiny.environment(tmp_path)
    done = subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)

    assert done.returncode == 2
    assert "not a notice" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not output.exists()
