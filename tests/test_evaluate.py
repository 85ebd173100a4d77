"""Evaluation against independent expectations: hand-made numbers and stock transformers."""

import itertools
import json
import math
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from torch import Tensor

from scripts import evaluate
from scripts.lab.best_of import kl_bound, selection_weights
from scripts.lab.divergence import Divergence, divergence_of_steps, kl_of_steps
from scripts.lab.policies import (
    Opponents,
    Outcome,
    Samples,
    chosen_of,
    comparison_table,
    completion_rewards,
    divergences,
    prompt_example,
    rewards_of,
    rewards_of_rows,
    rewards_of_sets,
    sample_policy,
    summarise,
    summarise_best_of,
)
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


def made_up_samples(n: int, k: int) -> Samples:
    """Completions of one token, the EOS."""
    ids = [[[EOS]] * k] * n
    texts = [[""] * k] * n
    has_eos = [[True] * k] * n
    return Samples(ids, texts, has_eos, vocabulary="")


def normal_values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def test_intervals_resample_prompts_not_completions() -> None:
    """Completions that agree within a prompt carry no more information than one of them."""
    values = normal_values(40, 1, seed=0)
    repeated = values.expand(40, 5)
    outcome = Outcome(made_up_samples(40, 5), repeated, Divergence(repeated, repeated / 2))

    numbers = summarise(outcome, Opponents(values), seed=0)

    low, high = bootstrap(values[:, 0], 0)
    assert numbers["reward"]["interval"] == pytest.approx((low, high))
    assert numbers["kl"]["interval"] == pytest.approx((low, high))
    assert numbers["step_kl"]["interval"] == pytest.approx((low / 2, high / 2))
    assert numbers["length"] == {"mean": 1.0, "interval": (1.0, 1.0)}
    assert numbers["finished"] == 1.0
    assert numbers["rewards"] == numbers["kls"] == repeated.tolist()
    assert numbers["step_kls"] == (repeated / 2).tolist()
    assert numbers["lengths"] == [[1.0] * 5] * 40


def test_wins_are_counted_pair_by_pair() -> None:
    """Against a plain loop, with rewards that often tie."""
    rewards = normal_values(9, 4, seed=1).round()
    baseline = normal_values(9, 3, seed=2).round()
    chosen = normal_values(9, 1, seed=3).round()
    outcome = Outcome(made_up_samples(9, 4), rewards)

    numbers = summarise(outcome, Opponents(baseline, chosen), seed=0)

    def share_won(others: Tensor) -> float:
        points = []
        for ours, theirs in zip(rewards.tolist(), others.tolist(), strict=True):
            for a, b in itertools.product(ours, theirs):
                points.append(1.0 if a > b else 0.5 if a == b else 0.0)
        return sum(points) / len(points)

    assert numbers["win_rate"]["mean"] == pytest.approx(share_won(baseline))
    assert numbers["win_rate_rows"]["mean"] == pytest.approx(share_won(chosen))
    assert "kl" not in numbers


# ---------------------------------------------------------------- KL


class Sampled(NamedTuple):
    """For each of two policies: the prompts' ids, the samples, and their divergence from the first policy."""

    prompts: list[list[list[int]]]
    samples: list[Samples]
    found: list[Divergence]


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
    found = divergences(policies, policies[0], prompts, [[drawn] for drawn in samples])
    return Sampled(prompts, samples, [divergence for (divergence,) in found])


def stock_step_logps(path: str, prompts: list[list[int]], temperature: float = 1.0) -> Tensor:
    """log π of every next token behind prompts of one length, (n, V), by transformers' own forward pass, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor(prompts)).logits[:, -1]
    return (logits / temperature).log_softmax(-1)


def stock_steps(path: str, prompts: list[list[int]], completions: list[list[list[int]]], temperature: float) -> list:
    """log π at each step of each completion, K tensors (T, V) for each prompt, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    steps = []
    for prompt, prompt_completions in zip(prompts, completions, strict=True):
        prompt_steps = []
        for ids in prompt_completions:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0]
            prompt_steps.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
        steps.append(prompt_steps)
    return steps


def test_kl_of_a_policy_to_itself_is_exactly_zero(sampled: Sampled) -> None:
    assert sampled.found[0].log_ratios.tolist() == [[0.0] * 3] * 7
    assert sampled.found[0].step_kls.tolist() == [[0.0] * 3] * 7


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergences_equal_those_of_stock_transformers(
    policies: list[str], sampled: Sampled, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy at its temperature, the reference at 1; in chunks that end within completions."""
    monkeypatch.setattr("scripts.lab.divergence.CHUNK_SIZE", 13)
    prompts = sampled.prompts[1]
    drawn = sampled.samples[1]
    ((found,),) = divergences(policies[1:], policies[0], [prompts], [[drawn]], [temperature])

    steps = stock_steps(policies[1], prompts, drawn.ids, temperature)
    ref_steps = stock_steps(policies[0], prompts, drawn.ids, 1.0)
    for i, completions in enumerate(drawn.ids):
        for k, ids in enumerate(completions):
            logps = steps[i][k]
            log_ratios = logps - ref_steps[i][k]
            taken = log_ratios.gather(1, torch.tensor(ids)[:, None]).sum()
            expected = (logps.exp() * log_ratios).sum()
            assert float(found.log_ratios[i, k]) == pytest.approx(float(taken), abs=3e-5)
            assert float(found.step_kls[i, k]) == pytest.approx(float(expected), abs=3e-5)


def test_greedy_completions_diverge_by_their_likelihood_under_the_reference(
    policies: list[str], sampled: Sampled
) -> None:
    prompts = sampled.prompts[1]
    drawn = sampled.samples[1]
    ((found,),) = divergences(policies[1:], policies[0], [prompts], [[drawn]], [0.0])

    ref_steps = stock_steps(policies[0], prompts, drawn.ids, 1.0)
    for i, completions in enumerate(drawn.ids):
        for k, ids in enumerate(completions):
            ref_logp = ref_steps[i][k].gather(1, torch.tensor(ids)[:, None]).sum()
            assert float(found.log_ratios[i, k]) == pytest.approx(-float(ref_logp), abs=3e-5)
            assert float(found.step_kls[i, k]) == pytest.approx(-float(ref_logp), abs=3e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_both_sums_have_the_kl_as_their_expectation(policies: list[str], temperature: float) -> None:
    """Over all completions of up to two tokens, weighted by their probability; the KL by its definition."""
    prompt = [0, 9, 17]
    first = stock_step_logps(policies[1], [prompt], temperature)[0]
    ref_first = stock_step_logps(policies[0], [prompt])[0]
    size = len(first)
    prefixes = [[*prompt, token] for token in range(size)]
    second = stock_step_logps(policies[1], prefixes, temperature)
    ref_second = stock_step_logps(policies[0], prefixes)

    logps = first[:, None] + second
    log_ratios = logps - ref_first[:, None] - ref_second
    pair_terms = logps.exp() * log_ratios  # (V, V), of completions of two tokens
    end_term = first[EOS].exp() * (first[EOS] - ref_first[EOS])
    kl = float(pair_terms.sum() - pair_terms[EOS].sum() + end_term)

    # One completion of each first token: the step KLs do not depend on the last token.
    likeliest = second.argmax(1).tolist()
    completions = [[token, likeliest[token]] for token in range(size)]
    completions[EOS] = [EOS]
    samples = Samples([completions], [[""] * size], [[False] * size], "")
    ((found,),) = divergences(policies[1:], policies[0], [[prompt]], [[samples]], [temperature])

    assert kl > 0.05
    assert float(first.exp() @ found.step_kls[0]) == pytest.approx(kl, abs=1e-5)


def test_what_is_never_taken_adds_nothing_to_a_kl() -> None:
    logps = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.double).log()
    ref_logps = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.9, 0.0]], dtype=torch.double).log()
    assert kl_of_steps(logps, ref_logps).tolist() == pytest.approx([math.log(2), math.log(10)])


def test_padding_of_the_larger_vocabulary_is_cut() -> None:
    logps = normal_values(5, 11, seed=4).log_softmax(1)
    ref_logps = normal_values(5, 11, seed=5).log_softmax(1)
    actions = torch.tensor([0, 3, 10, 2, 2])
    expected = divergence_of_steps(logps, ref_logps, actions, 0.7)

    padding = torch.full((5, 3), -50.0, dtype=torch.double)
    padded = torch.cat([logps, padding], 1)
    ref_padded = torch.cat([ref_logps, padding], 1)
    assert torch.equal(divergence_of_steps(padded, ref_logps, actions, 0.7), expected)
    assert torch.equal(divergence_of_steps(logps, ref_padded, actions, 0.7), expected)


def test_samples_keep_the_eos_only_where_there_is_one(sampled: Sampled) -> None:
    for samples in sampled.samples:
        for completions, has_eos in zip(samples.ids, samples.has_eos, strict=True):
            assert has_eos == [ids[-1] == EOS for ids in completions]
            for ids in completions:
                assert EOS not in ids[:-1]
                assert 1 <= len(ids) <= 60


# ---------------------------------------------------------------- rewards


def make_reward_model(base: str, path: str) -> None:
    """A random head on a policy, whose mean reward over its training completions is 0.25."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.reward_mean = 0.25
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)


def stock_reward(path: str, prompt: str, completion: str, end: list[int]) -> float:
    """The reward by transformers' own classifier, less the mean; the completion is encoded by itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    ids = tokenizer(prompt).input_ids
    ids += tokenizer(completion, add_special_tokens=False).input_ids
    with torch.no_grad():
        return model(torch.tensor([ids + end])).logits.item() - 0.25


def test_a_reward_model_scores_what_stock_transformers_scores(policies: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "rm")
    make_reward_model(policies[0], path)
    cut_off = Example("", 0, "bade lo,", [Completion("fi sapa", is_finished=False)])
    finished, unfinished = rewards_of(path, [prompt_example("bade", "do"), cut_off])

    assert finished == pytest.approx(stock_reward(path, "bade", "do", [EOS]), abs=1e-4)
    assert unfinished == pytest.approx(stock_reward(path, "bade lo,", "fi sapa", []), abs=1e-4)


def test_rewards_of_sets_are_those_of_single_completions(policies: list[str], tmp_path: Path) -> None:
    """Several sets at once, several completions a prompt; the order of sets, prompts and completions is kept."""
    rm = str(tmp_path / "rm")
    make_reward_model(policies[0], rm)
    examples = [prompt_example(row["prompt"]) for row in tiny.make_rows(3, seed=6, k=1)]
    args = make_args(num_samples=2, max_new_tokens=6)
    sets = []
    for path in policies:
        _, drawn = sample_policy(path, examples, args, 2)
        sets.append(drawn)

    rewards = rewards_of_sets(rm, examples, sets)

    for drawn, values in zip(sets, rewards, strict=True):
        for i, example in enumerate(examples):
            for k in range(2):
                completion = Completion(drawn.texts[i][k], drawn.has_eos[i][k], True, drawn.ids[i][k], drawn.vocabulary)
                single = Example("", 0, example.prompt, [completion])
                (expected,) = rewards_of(rm, [single])
                assert float(values[i, k]) == pytest.approx(expected, abs=2e-4)


def test_equal_completions_tie_whatever_they_are_packed_with(policies: list[str], tmp_path: Path) -> None:
    rm = str(tmp_path / "rm")
    make_reward_model(policies[0], rm)
    texts = ["fi sapa", "do", "fi sapa, bade lo bade do. fi", "fi sapa"]
    (among_others,) = completion_rewards(rm, [prompt_example("bade lo,", *texts)])
    (alone,) = rewards_of(rm, [prompt_example("bade lo,", "fi sapa")])
    assert among_others[0] == among_others[3] == alone


def test_the_chosen_completion_is_the_preferred_one() -> None:
    first = Completion("a")
    second = Completion("b")
    ranked = Example("", 0, "", [first, second], scores=[[0.0], [1.0]])
    scored = Example("", 0, "", [first, second], ranked=False, scores=[[1.0, -2.0], [0.0, 0.5]])
    unscored = Example("", 0, "", [first, second], ranked=False)
    assert [chosen_of(example) for example in (ranked, scored, unscored)] == [first, second, first]


def test_rows_are_judged_as_finished_unless_they_say_otherwise(policies: list[str], tmp_path: Path) -> None:
    rm = str(tmp_path / "rm")
    make_reward_model(policies[0], rm)
    finished = prompt_example("bade lo,", "fi sapa")
    cut_off = Example("", 0, "bade lo,", [Completion("fi sapa", is_finished=False)])

    rewards = rewards_of_rows(rm, [finished, cut_off])

    assert rewards.shape == (2, 1)
    assert rewards[0].item() == pytest.approx(stock_reward(rm, "bade lo,", "fi sapa", [EOS]), abs=1e-4)
    assert rewards[1].item() == pytest.approx(stock_reward(rm, "bade lo,", "fi sapa", []), abs=1e-4)
    assert abs(rewards[0] - rewards[1]) > 1e-3


# ---------------------------------------------------------------- the best of N


def tied_scores(n: int, m: int, seed: int) -> Tensor:
    """Scores of which many are equal."""
    return (2 * normal_values(n, m, seed=seed)).round()


def mean_over_subsets(scores: list[float], values: list[float], size: int) -> float:
    """The mean value of the best of each subset, and of all its best where scores are equal."""
    means = []
    for subset in itertools.combinations(range(len(scores)), size):
        highest = max(scores[k] for k in subset)
        best = [values[k] for k in subset if scores[k] == highest]
        means.append(sum(best) / len(best))
    return sum(means) / len(means)


@pytest.mark.parametrize("size", range(1, 8))
def test_selection_equals_the_mean_over_all_subsets(size: int) -> None:
    scores = tied_scores(6, 7, seed=1)
    values = normal_values(6, 7, seed=2)
    weights = selection_weights(scores, size)

    for i in range(6):
        expected = mean_over_subsets(scores[i].tolist(), values[i].tolist(), size)
        assert float(weights[i] @ values[i]) == pytest.approx(expected, abs=1e-12)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 6)


def test_selection_among_many_samples_is_the_best_of_independent_ones() -> None:
    """M = 4,000 draws of a known distribution: P(the best of 5 ≤ r) = F(r)^5."""
    rewards = torch.tensor([-1.0, 0.0, 2.5, 3.0], dtype=torch.double)
    probabilities = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.double)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probabilities, 4_000, replacement=True, generator=generator)
    scores = rewards[drawn][None]

    below = probabilities.cumsum(0) ** 5
    expected = float(rewards @ below.diff(prepend=torch.zeros(1)))
    found = float((selection_weights(scores, 5) * scores).sum())
    assert found == pytest.approx(expected, abs=0.08)
    assert abs(found - float(scores.mean())) > 1


def test_the_bound_is_the_kl_of_the_best_of_many_different_completions() -> None:
    """10,000 equally likely completions without ties: the n-th is the best of 4 with (n/10⁴)⁴ - ((n-1)/10⁴)⁴."""
    edges = torch.linspace(0, 1, 10_001, dtype=torch.double) ** 4
    probabilities = edges.diff()
    kl = float((probabilities * (probabilities * 10_000).log()).sum())
    assert kl_bound(4) == pytest.approx(kl, abs=1e-4)
    assert kl <= kl_bound(4)
    assert kl_bound(1) == 0.0


def test_the_best_of_n_by_one_reward_is_judged_by_another() -> None:
    rewards = tied_scores(5, 6, seed=3)
    selector = normal_values(5, 6, seed=4)
    chosen = tied_scores(5, 1, seed=5)
    baseline = tied_scores(5, 4, seed=6)
    outcome = Outcome(made_up_samples(5, 6), rewards, selector_rewards=selector)

    numbers = summarise_best_of(outcome, Opponents(baseline, chosen), (3,), seed=0)["3"]

    for i in range(5):
        scores = selector[i].tolist()
        wins = ((rewards[i] - chosen[i]).sign() + 1) / 2
        values = {"reward": rewards[i], "selector_reward": selector[i], "win_rate_rows": wins}
        for name, sample_values in values.items():
            expected = mean_over_subsets(scores, sample_values.tolist(), 3)
            assert numbers["by_prompt"][name][i] == pytest.approx(expected, abs=1e-12)
    reward = numbers["by_prompt"]["reward"]
    assert numbers["reward"]["mean"] == pytest.approx(sum(reward) / 5)
    assert numbers["reward"]["interval"] == pytest.approx(bootstrap(torch.tensor(reward), 0), abs=1e-6)
    assert "win_rate" in numbers


def test_the_best_of_n_is_not_compared_with_the_samples_it_is_one_of() -> None:
    rewards = tied_scores(5, 6, seed=3)
    outcome = Outcome(made_up_samples(5, 6), rewards)
    numbers = summarise_best_of(outcome, Opponents(rewards), (1, 6), seed=0)
    assert "win_rate" not in numbers["1"]
    assert numbers["6"]["by_prompt"]["reward"] == rewards.amax(1).tolist()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def rows_with_chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chosen") / "rows.jsonl"
    tiny.make_rows(5, seed=8, path=path)
    return path


def results_of(policies: list[str], rows: Path, folder: Path, **options: object) -> dict:
    """What the command writes for two policies, judged by a reward model."""
    rm = folder / "rm"
    if not rm.exists():
        make_reward_model(policies[0], str(rm))
    output = folder / "results.json"
    named = (f"a={policies[0]}", f"b={policies[1]}")
    options = {"max_new_tokens": 6, "reward": str(rm), **options}
    evaluate.main(make_args(policies=named, rows=rows, output=output, **options))
    return json.loads(output.read_text())


def test_each_temperature_is_that_of_a_run_of_its_own(
    policies: list[str], rows_with_chosen: Path, tmp_path: Path
) -> None:
    several = results_of(policies, rows_with_chosen, tmp_path, temperatures=(0.0, 0.5, 1.0))
    assert list(several["by_temperature"]) == ["0", "0.5", "1"]
    assert "policies" not in several
    for temperature in (0.5, 1.0):
        alone = results_of(policies, rows_with_chosen, tmp_path, temperature=temperature)
        for name, numbers in alone["policies"].items():
            same = several["by_temperature"][f"{temperature:g}"][name]
            assert same["completions"] == numbers["completions"]
            assert same["lengths"] == numbers["lengths"]
            for measure in ("rewards", "kls", "step_kls"):
                torch.testing.assert_close(tensor(same[measure]), tensor(numbers[measure]), atol=2e-4, rtol=0)

    greedy = several["by_temperature"]["0"]["b"]
    likeliest = results_of(policies, rows_with_chosen, tmp_path, top_k=1)["policies"]["b"]
    assert greedy["completions"] == [texts[:1] for texts in likeliest["completions"]]
    assert greedy["kls"] == greedy["step_kls"]
    assert "kl" not in likeliest


def test_the_command_writes_rows_and_the_best_of_n(
    policies: list[str], rows_with_chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"against_rows": True, "best_of": (1, 3), "select_by": str(tmp_path / "rm")}
    results = results_of(policies, rows_with_chosen, tmp_path, **options)

    rows = tiny.read_jsonl(rows_with_chosen)
    expected = [stock_reward(str(tmp_path / "rm"), row["prompt"], row["chosen"], [EOS]) for row in rows]
    assert results["row_rewards"] == pytest.approx(expected, abs=1e-3)
    for numbers in results["policies"].values():
        assert numbers["selector_rewards"] == numbers["rewards"]
        best = numbers["best_of"]["3"]["by_prompt"]
        assert best["reward"] == pytest.approx([max(values) for values in numbers["rewards"]])
        assert numbers["best_of"]["1"]["reward"]["mean"] == pytest.approx(numbers["reward"]["mean"])

    printed = capsys.readouterr().out
    assert "a, best of 3" in printed
    assert "win rate, rows" in printed


def test_a_measure_that_a_policy_lacks_is_left_blank() -> None:
    number = {"mean": 1.0, "interval": (0.0, 2.0)}
    table = comparison_table({"a": {"reward": number}, "b": {"reward": number, "kl_bound": 0.5}})
    assert table.splitlines() == [
        "policy  reward             KL at most",
        "a       1.00 [0.00, 2.00]",
        "b       1.00 [0.00, 2.00]  0.50",
    ]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": (0.5, 0.5)}, "--temperatures 0.5 0.5: each must be given once"),
        ({"temperatures": (1.0, -0.5)}, "--temperatures 1 -0.5: must be finite numbers of at least 0"),
        ({"temperatures": (math.inf,)}, "--temperatures inf: must be finite numbers of at least 0"),
        ({"temperatures": (1.0,), "temperature": 0.5}, "either --temperature or --temperatures"),
        ({"best_of": (1, 4)}, "--best-of 4: must be at least 1 and at most --num-samples 3"),
        ({"best_of": (0,)}, "--best-of 0: must be at least 1"),
        ({"best_of": (2,), "temperatures": (0.0, 1.0)}, "--best-of: at temperature 0 there is one completion"),
        ({"select_by": "rm"}, "give each N with --best-of"),
        ({"against_rows": True}, "line 1: --against-rows needs a completion; the row has a prompt alone"),
        ({"select_by": "rm", "best_of": (2,)}, "model rm: "),
    ],
)
def test_measures_are_checked_before_sampling(
    options: dict, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    refused(message, make_args(policies=("a=x",), rows=sources["good"], output=output, **options))
    assert not output.exists()


def test_a_completion_that_is_not_to_be_learnt_is_not_chosen(tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "completion": "lost lamp.", "label": False}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    args = make_args(policies=("a=x",), rows=rows, against_rows=True)
    refused("line 1: --against-rows needs a chosen completion; the label of this one is false", args)


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
