"""Figures 2 and 3 of From r to Q*: the tables by brute force, Eq 16 in plain float64, a whole small run."""

import importlib
import json
import math
import random
import shlex
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import tyro
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from scripts import sample, token_figures
from scripts.lab import eq_16, notices, stages
from scripts.lab.policies import Samples, divergences, prompt_example, sample_policy
from scripts.lab.sampling import Sampling
from shared import UserError
from shared.command import check_arguments

POST = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
OTHER_POST = POST.replace("lamp", "kettle")
FIVE_FACTS = "lost lamp, at school, tag five, in may, call anna."
TWO_FACTS = "lost lamp, at school."
ONE_RIGHT_ONE_WRONG = "lost guitar, at school."
SUPERFLUOUS = "lost lamp, thank you all."
SMALL = {"BETAS": (0.3,), "SEEDS": 1, "WIDTHS": (1, 2, 5, 20), "NEW_TOKENS": 12, "SAMPLES": 2}


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def normal_values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def verdicts(claims: list[dict]) -> list[str]:
    return [claim["verdict"] for claim in claims]


# ---------------------------------------------------------------- Eq 16


def left_side(p: list[float], q: list[float], beta: float) -> float:
    """E_{a~q}[β log p(a)/q(a)], action by action."""
    total = 0.0
    for p_action, q_action in zip(p, q, strict=True):
        total += q_action * beta * (math.log(p_action) - math.log(q_action))
    return total


def right_side(p: list[float], q: list[float], beta: float) -> float:
    """-β KL(q ‖ p), as cross-entropy less entropy."""
    entropy = -sum(q_action * math.log(q_action) for q_action in q)
    cross_entropy = -sum(q_action * math.log(p_action) for p_action, q_action in zip(p, q, strict=True))
    return -beta * (cross_entropy - entropy)


def test_both_sides_of_eq_16_and_the_sampled_reward() -> None:
    policy = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]
    reference = [[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]
    actions = [2, 0]
    sides = eq_16.eq_16(tensor(*policy).log(), tensor(*reference).log(), torch.tensor(actions), 0.3)

    for state, p, q, action in zip(sides.tolist(), policy, reference, actions, strict=True):
        left, right, sampled = state
        assert left == pytest.approx(left_side(p, q, 0.3), abs=1e-15)
        assert right == pytest.approx(right_side(p, q, 0.3), abs=1e-15)
        assert sampled == pytest.approx(0.3 * math.log(p[action] / q[action]), abs=1e-15)
    assert sides[0, 0] < -0.01
    assert sides[1].tolist() == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_eq_16_at_every_state_of_padded_completions(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    models = []
    for seed in (0, 1):
        path = tiny.make_model(tmp_path / str(seed), architecture, seed=seed)
        models.append(AutoModelForCausalLM.from_pretrained(path, dtype=torch.double).eval())
    policy, reference = models
    rng = random.Random(0)
    prompts = random_ids(rng, 7)
    completions = random_ids(rng, 7)

    monkeypatch.setattr(eq_16, "BATCH_SIZE", 3)
    sides = eq_16.eq_16_of_completions(policy, reference, prompts, completions, 0.7)
    assert len(sides) == 7
    for prompt, completion, states in zip(prompts, completions, sides, strict=True):
        assert states.shape == (len(completion), 3)
        for t, (left, right, sampled) in enumerate(states.tolist()):
            state = prompt + completion[:t]
            p = next_token(policy, state)
            q = next_token(reference, state)
            divergence = float(kl_divergence(q, p))
            action = torch.tensor(completion[t])
            log_ratio = float(p.log_prob(action) - q.log_prob(action))

            assert divergence > 0.01
            assert left == pytest.approx(-0.7 * divergence, rel=1e-9)
            assert right == pytest.approx(-0.7 * divergence, rel=1e-9)
            assert sampled == pytest.approx(0.7 * log_ratio, rel=1e-9)


def random_ids(rng: random.Random, n: int) -> list[list[int]]:
    """n sequences of different lengths."""
    sequences = []
    for _ in range(n):
        length = rng.randint(1, 9)
        sequences.append([rng.randrange(400) for _ in range(length)])
    return sequences


def next_token(model, state: list[int]) -> Categorical:
    with torch.no_grad():
        logits = model(torch.tensor([state])).logits
    return Categorical(logits=logits[0, -1])


# ---------------------------------------------------------------- the numbers of the tables


def made_samples(*completions: tuple[int, str]) -> Samples:
    """One completion of each prompt: how many tokens it has, and its text."""
    ids = [[[1] * length] for length, _ in completions]
    texts = [[text] for _, text in completions]
    has_eos = [[True] for _ in completions]
    return Samples(ids, texts, has_eos, "")


def test_values_of_beams_counted_by_hand() -> None:
    assert notices.oracle(POST, FIVE_FACTS) == 5
    assert notices.oracle(POST, TWO_FACTS) == 2
    assert notices.oracle(POST, ONE_RIGHT_ONE_WRONG) == 0
    assert notices.oracle(POST, SUPERFLUOUS) == 0.5
    pairs = [
        {"prompt": POST, "chosen": TWO_FACTS},
        {"prompt": OTHER_POST, "chosen": SUPERFLUOUS},  # the lamp is wrong there
    ]
    samples = [
        made_samples((17, FIVE_FACTS), (8, SUPERFLUOUS)),
        made_samples((7, TWO_FACTS), (7, ONE_RIGHT_ONE_WRONG)),
    ]
    values = token_figures.beam_values(samples, pairs)
    assert values["reward"].tolist() == [[5, 2], [-1.5, 0]]
    assert values["win_rate"].tolist() == [[1, 0.5], [0.5, 1]]  # against 2, and against -1.5
    assert values["length"].tolist() == [[17, 7], [8, 7]]


def test_statements_of_figure_2_are_differences_on_the_same_prompts() -> None:
    of_prompt = 100 * normal_values(40, 1, seed=0)  # the same at every width: it drops out of the differences
    values = {
        "win_rate": of_prompt + tensor(0, 9, 0.25, 9, 0.125),
        "length": of_prompt + tensor(1, 9, 9, 9, 4),
        "reward": of_prompt.expand(40, 5),
    }
    claims = token_figures.beam_claims(0.3, values, 0)
    assert verdicts(claims) == ["as in the paper"] * 3
    assert [claim["found"] for claim in claims] == [
        "0.250 [0.250, 0.250]",
        "-0.125 [-0.125, -0.125]",
        "3.0 [3.0, 3.0]",
    ]

    turned = {name: 1 - value for name, value in values.items()}
    assert verdicts(token_figures.beam_claims(0.3, turned, 0)) == ["NOT as in the paper"] * 3

    unrelated = dict.fromkeys(values, normal_values(40, 5, seed=1))
    assert verdicts(token_figures.beam_claims(0.3, unrelated, 0)) == ["not resolved"] * 3


@pytest.mark.parametrize(
    ("interval", "sign", "verdict"),
    [
        ((0.1, 0.2), 1, "as in the paper"),
        ((0.1, 0.2), -1, "NOT as in the paper"),
        ((0.1, 0.2), 0, "NOT as in the paper"),
        ((-0.2, -0.1), -1, "as in the paper"),
        ((-0.2, -0.1), 1, "NOT as in the paper"),
        ((-0.1, 0.2), 0, "as in the paper"),
        ((-0.1, 0.2), 1, "not resolved"),
        ((0.0, 0.2), -1, "not resolved"),
        ((0.0, 0.0), 1, "NOT as in the paper"),
        ((0.0, 0.0), 0, "as in the paper"),
    ],
)
def test_verdicts(interval: tuple[float, float], sign: int, verdict: str) -> None:
    claim = token_figures.claim("x", {"mean": 0.0, "interval": interval}, sign)
    assert claim["verdict"] == verdict


@pytest.mark.parametrize(("sign", "statement"), [(1, "x > 0"), (-1, "x < 0"), (0, "x = 0")])
def test_statements_say_what_the_paper_does(sign: int, statement: str) -> None:
    claim = token_figures.claim("x", {"mean": 0.0, "interval": (0.0, 0.0)}, sign)
    assert claim["statement"] == statement


def test_statements_of_figure_3() -> None:
    without_sft = {"chosen": [0.1, 0.2], "average": [-0.3, 0.1], "rejected": [-0.7, 0.0]}
    after_sft = {"chosen": [-1.0, -0.5], "average": [-2.0, -2.0], "rejected": [-3.0, -3.5]}
    claims = token_figures.likelihood_claims({"sft": without_sft, "preferred": after_sft}, [-1.1, -0.4])
    assert verdicts(claims) == ["as in the paper"] * 7
    _, _, chosen_less_rejected, chosen_less_divergence, _, _, fall = claims
    assert chosen_less_rejected["found"] == "2.500 [2.000, 3.000]"
    assert chosen_less_divergence["found"] == "0.000 [-0.100, 0.100]"
    assert fall["found"] == "-0.900 [-1.100, -0.700]"

    turned = token_figures.likelihood_claims({"sft": after_sft, "preferred": without_sft}, [-0.1, -0.1])
    assert verdicts(turned) == [
        "NOT as in the paper",
        "not resolved",
        "as in the paper",
        "NOT as in the paper",
        "NOT as in the paper",
        "NOT as in the paper",
        "NOT as in the paper",
    ]


def test_curves_leave_training_lines_out(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval/loss": 0.7, "eval/rewards/chosen": 0.0, "eval/rewards/rejected": 0.0},
        {"step": 1, "loss": 0.7, "rewards/chosen": 9.0, "rewards/rejected": 9.0},
        {"step": 2, "eval/loss": 0.6, "eval/rewards/chosen": 0.5, "eval/rewards/rejected": -1.0},
    ]
    metrics = tiny.write_jsonl(tmp_path / "metrics.jsonl", lines)
    assert token_figures.curves(metrics) == {
        "step": [0, 2],
        "chosen": [0, 0.5],
        "average": [0, -0.25],
        "rejected": [0, -1.0],
    }


# ---------------------------------------------------------------- the whole


def make_run(folder: Path, n: int = 20) -> Path:
    """What the quickstart leaves, small: a random model, and pairs of made-up summaries of n posts."""
    rng = random.Random(0)
    rows = []
    for prompt, kind in islice(notices.unique_notices(rng), n):
        superfluous = notices.make_summary(prompt, kind, rng, 0.0, 1)
        wrong = notices.make_summary(prompt, kind, rng, 0.9, 0)
        row = {"prompt": prompt, "completions": [superfluous, wrong]}
        rows.append(notices.prefer_row(row, rng))

    folder.mkdir()
    tiny.write_jsonl(folder / "pairs.jsonl", rows[:-6])
    tiny.write_jsonl(folder / "held_out_pairs.jsonl", rows[-6:])
    tiny.make_model(folder / "sft", initializer_range=0.1)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of everything, with real command lines, at one β with one seed."""
    folder = tmp_path_factory.mktemp("run")
    run_dir = make_run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(token_figures, name, value)
        patch.setattr(eq_16, "BATCH_SIZE", 3)
        for name, value in tiny.environment(folder / "cache").items():
            patch.setenv(name, value)
        token_figures.main(token_figures.Args(run_dir=run_dir, steps=2, num_prompts=5, seed=3))
    return run_dir / "token_figures"


@pytest.fixture(scope="module")
def results(finished: Path) -> dict:
    return json.loads((finished / "token_figures.json").read_text(encoding="utf-8"))


def table_rows(path: Path, first_cell: str) -> list[list[str]]:
    """The rows of a Markdown file whose first cell begins so."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| {first_cell}"):
            rows.append(line[2:-2].split(" | "))
    return rows


def mean_of(cell: str) -> float:
    """The mean of "mean [low, high]"."""
    return float(cell.split()[0])


def win(reward: float, baseline: float) -> float:
    if reward == baseline:
        return 0.5
    return float(reward > baseline)


def test_the_table_of_beams_holds_the_means_over_what_sampling_finds(
    finished: Path, results: dict, tmp_path: Path
) -> None:
    pairs = tiny.read_jsonl(finished / "held_out.jsonl")
    assert len(pairs) == 5

    chosen_rewards = [notices.oracle(pair["prompt"], pair["chosen"]) for pair in pairs]
    table = table_rows(finished / "token_figures.md", "0.3 | ")
    assert [row[1] for row in table] == ["1", "2", "5", "20"]
    for i, (_, width, reward_cell, win_rate_cell, length_cell) in enumerate(table):
        output = tmp_path / width
        sample.main(
            sample.Args(
                model=str(finished / "beams_0.3"),
                rows=str(finished / "held_out.jsonl"),
                output=output,
                num_completions=1,
                beams=int(width),
                max_new_tokens=12,
            )
        )
        rows = tiny.read_jsonl(output)
        rewards = [notices.oracle(row["prompt"], row["completions"][0]) for row in rows]
        wins = [win(reward, chosen) for reward, chosen in zip(rewards, chosen_rewards, strict=True)]
        lengths = [len(row["completion_ids"][0]) for row in rows]
        numbers = {measure: columns[i] for measure, columns in results["beams"]["0.3"].items()}
        check_number(numbers["reward"], rewards, reward_cell)
        check_number(numbers["win_rate"], wins, win_rate_cell)
        check_number(numbers["length"], lengths, length_cell)


def check_number(number: dict, values: list[float], cell: str) -> None:
    """A number is the mean of these values, and its cell says so."""
    low, high = number["interval"]
    assert number["mean"] == pytest.approx(sum(values) / len(values))
    assert min(values) <= low <= number["mean"] <= high <= max(values)
    assert mean_of(cell) == pytest.approx(number["mean"], abs=0.051)


def test_implicit_rewards_are_those_of_training(finished: Path, results: dict) -> None:
    for start, name in token_figures.STARTS.items():
        directory = finished / f"dpo_{start}_0"
        evaluations = [line for line in tiny.read_jsonl(directory / "metrics.jsonl") if "eval/loss" in line]
        (run,) = results["runs"][start]
        assert run["step"] == [0, 1, 2]
        assert run["chosen"] == [line["eval/rewards/chosen"] for line in evaluations]
        assert run["rejected"] == [line["eval/rewards/rejected"] for line in evaluations]

        chosen = run["chosen"][-1]
        rejected = run["rejected"][-1]
        (row,) = [row for row in table_rows(finished / "token_figures.md", name) if len(row) == 5]
        means = [mean_of(cell) for cell in row[1:4]]
        assert means == pytest.approx([chosen, (chosen + rejected) / 2, rejected], abs=6e-4)

        record = json.loads((directory / "run.json").read_text())
        assert Path(record["args"]["model"]).name == start


def test_eq_16_holds_between_the_trained_models(finished: Path, results: dict) -> None:
    prompts = [pair["prompt"] for pair in tiny.read_jsonl(finished / "held_out.jsonl")]
    references = {"sft": finished.parent / "sft", "preferred": finished / "preferred"}
    sampling = Sampling(max_new_tokens=12, seed=3)
    num_completions = 5 * 2
    for start, reference in references.items():
        check = results["eq_16"][start]
        assert check["deviation"] < 1e-12
        assert check["largest"] <= 1e-15
        assert 10 < check["states"] <= num_completions * 12

        (expected,) = check["expected"]
        (sampled,) = check["drawn"]
        states_of_completion = check["states"] / num_completions
        assert expected == pytest.approx(check["state"] * states_of_completion, rel=1e-9)
        assert expected < -1e-6
        assert sampled == pytest.approx(check["drawn_state"] * states_of_completion, rel=1e-9)
        assert check["gap"]["mean"] == pytest.approx(sampled - expected, rel=1e-9)

        prompt_ids, samples = sample_policy(str(reference), [prompt_example(prompt) for prompt in prompts], sampling, 2)
        policy = finished / f"dpo_{start}_0"
        ((found,),) = divergences([str(policy)], str(reference), [prompt_ids], [[samples]])
        assert sampled == pytest.approx(0.1 * float(found.log_ratios.mean()), abs=1e-6)
        assert abs(sampled) > 1e-5


def test_files_are_whole_and_of_their_kind(finished: Path, results: dict) -> None:
    assert not list(finished.glob("*.tmp"))
    assert not list(finished.glob(".*"))
    for name in ("beams.png", "likelihoods.png"):
        contents = (finished / name).read_bytes()
        assert contents.startswith(b"\x89PNG")
        assert contents.endswith(b"IEND\xaeB`\x82")
        assert len(contents) > 20_000

    assert len(results["commands"]) == 4
    assert results["seconds"] > 0
    assert len(results["claims"]) == 3 + 7 + 4
    statements = [row[0] for row in table_rows(finished / "token_figures.md", "Fig. 2, β = 0.3")]
    assert statements == [
        "Fig. 2, β = 0.3: win rate against chosen, 5 beams less 1 > 0",
        "Fig. 2, β = 0.3: win rate against chosen, 20 beams less 5 < 0",
        "Fig. 2, β = 0.3: length (tokens), 20 beams less 1 > 0",
    ]


# ---------------------------------------------------------------- command lines


def parse_command_line(line: str) -> tuple[str, Any]:
    """The algorithm and its arguments."""
    script, *words = shlex.split(line.format(run="runs/q", out="runs/q/token_figures"))
    assert (tiny.ROOT / script).exists()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    args = tyro.cli(module.Args, args=words)
    check_arguments(args)
    return Path(script).stem, args


def test_every_command_line_is_one_that_its_program_takes() -> None:
    lines = token_figures.stages(token_figures.Args(steps=7, num_prompts=11, seed=3))
    sft_is_done = False
    names = []
    for algorithm, args in map(parse_command_line, lines):
        name = Path(args.output_dir).name
        names.append(name)
        assert args.max_steps == 7
        assert args.train_data == "runs/q/pairs.jsonl"

        model = "runs/q/sft"
        if name.startswith("dpo_preferred"):
            assert sft_is_done
            model = "runs/q/token_figures/preferred"
        assert args.model == model

        if algorithm == "sft":
            sft_is_done = True
        elif algorithm == "dpo":
            assert args.seed == 3 + int(name[-1])
            assert args.beta == 0.1
            assert args.eval_every == 1
        else:
            assert algorithm == "token_dpo_beam"
            assert name == f"beams_{args.beta}"
    assert len(names) == 3 + 1 + 6
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- mistakes


def refused(run_dir: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_figures.main(token_figures.Args(run_dir=run_dir))


def test_mistakes_end_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "run_stage", pytest.fail)
    run_dir = make_run(tmp_path / "run")
    out = run_dir / "token_figures"
    held_out = run_dir / "held_out_pairs.jsonl"
    rows = tiny.read_jsonl(held_out)

    tiny.write_jsonl(held_out, [{**rows[0], "prompt": "no post"}])
    refused(run_dir, "not a notice")
    held_out.write_text("{")
    refused(run_dir, "held_out_pairs.jsonl")
    held_out.unlink()
    refused(run_dir, "held_out_pairs.jsonl is missing; run scripts/quickstart.py first")
    assert not out.exists()

    tiny.write_jsonl(held_out, rows)
    out.mkdir()
    (out / "mine").write_text("")
    refused(run_dir, "not from this program")
    assert (out / "mine").exists()

    line = tiny.command("scripts/token_figures.py", 1, {"run_dir": run_dir})
    ended = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "not from this program" in ended.stderr
