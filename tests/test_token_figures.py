"""Figures 2 and 3 of From r to Q*: the tables by brute force, Eq 16 in plain float64, a whole small run."""

import importlib
import json
import math
import random
import shlex
import subprocess
from itertools import islice
from pathlib import Path

import evaluate
import notices
import pytest
import token_figures
import torch
import tyro
import worlds

from shared import UserError
from shared.run import check_arguments

POST = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
OTHER = POST.replace("lamp", "kettle")
WHOLE = "lost lamp, at school, tag five, in may, call anna."  # 5 facts
TEXTS = {WHOLE: 5.0, "lost lamp, at school.": 2.0, "lost guitar, at school.": 0.0, "lost lamp, thank you all.": 0.5}
TINY = {"BETAS": (0.3,), "SEEDS": 1, "WIDTHS": (1, 2, 5, 20), "NEW_TOKENS": 12, "SAMPLES": 2, "SEQUENCES": 3}


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


# ---------------------------------------------------------------- Eq 16


def plain_sides(p: list[float], q: list[float], beta: float) -> tuple[float, float]:
    """E_{a~q}[β log p(a)/q(a)] action by action, and -β KL(q ‖ p) as cross-entropy less entropy."""
    left = sum(b * beta * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    cross, entropy = (-sum(b * math.log(x) for x, b in zip(some, q, strict=True)) for some in (p, q))
    return left, -beta * (cross - entropy)


def test_both_sides_of_eq_16_and_the_drawn_reward() -> None:
    p, q = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]
    actions = torch.tensor([2, 0])
    found = token_figures.eq_16(tensor(*p).log(), tensor(*q).log(), actions, 0.3)
    for row, one, other, action in zip(found.tolist(), p, q, actions, strict=True):
        assert row[:2] == pytest.approx(plain_sides(one, other, 0.3), abs=1e-15)
        assert row[2] == pytest.approx(0.3 * math.log(one[action] / other[action]), abs=1e-15)
    assert found[0, 0] < -0.01 and found[1].tolist() == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_eq_16_at_every_state_of_packed_up_completions(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(token_figures, "SEQUENCES", 3)
    paths = [worlds.make_model(tmp_path / str(seed), architecture, seed=seed) for seed in (0, 1)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.double).eval() for path in paths)
    rng = random.Random(0)
    prompts, completions = ([[rng.randrange(400) for _ in range(rng.randint(1, 9))] for _ in range(7)] for _ in "xy")
    found = token_figures.states(policy, reference, prompts, completions, 0.7)
    assert len(found) == 7
    for x, y, rows in zip(prompts, completions, found, strict=True):
        assert rows.shape == (len(y), 3)
        for t, (left, right, drawn) in enumerate(rows.tolist()):
            with torch.no_grad():
                p, q = (model(torch.tensor([x + y[:t]])).logits[0, -1] for model in (policy, reference))
            p, q = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
            kl = float(torch.distributions.kl_divergence(q, p))
            assert left == pytest.approx(-0.7 * kl, rel=1e-9) and right == pytest.approx(-0.7 * kl, rel=1e-9)
            assert kl > 0.01
            ratio = p.log_prob(torch.tensor(y[t])) - q.log_prob(torch.tensor(y[t]))
            assert drawn == pytest.approx(0.7 * float(ratio), rel=1e-9)


# ---------------------------------------------------------------- the numbers of the tables


def test_values_of_beams_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_figures, "WIDTHS", (1, 2))
    best, two, none, half = TEXTS
    assert [notices.oracle(POST, text) for text in TEXTS] == list(TEXTS.values())
    pairs = [{"prompt": OTHER.upper(), "chosen": half}, {"prompt": POST, "chosen": two}, {"prompt": "x", "chosen": ""}]
    rows = [
        {"prompt": POST, "completions": [best, two], "lengths": [17, 7]},
        {"prompt": OTHER, "completions": [half, none], "lengths": [8, 7]},  # the lamp is wrong there
    ]
    found = token_figures.beam_values(rows, pairs)
    assert found["reward"].tolist() == [[5, 2], [-1.5, 0]]
    assert found["win_rate"].tolist() == [[1, 0.5], [0.5, 1]]  # against 2, and against -1.5
    assert found["length"].tolist() == [[17, 7], [8, 7]]


def test_statements_of_figure_2_are_differences_on_the_same_prompts() -> None:
    zeros = torch.zeros(40, 5, dtype=torch.double)
    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    shifts = {
        "win_rate": tensor(0, 9, 0.25, 9, 0.125),
        "length": tensor(1, 9, 9, 9, 4),
        "reward": tensor(0, 0, 0, 0, 0),
    }
    # what a prompt adds at every width drops out of the differences
    values = {name: zeros + 100 * noise + shift for name, shift in shifts.items()}
    found = token_figures.beam_claims(0.3, values, 0)
    assert [line["verdict"] for line in found] == ["as in the paper"] * 3
    shown = ["0.250 [0.250, 0.250]", "-0.125 [-0.125, -0.125]", "3.0 [3.0, 3.0]"]
    assert [line["found"] for line in found] == shown
    turned = {name: 1 - value for name, value in values.items()}
    assert [line["verdict"] for line in token_figures.beam_claims(0.3, turned, 0)] == ["NOT as in the paper"] * 3
    unrelated = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    same = token_figures.beam_claims(0.3, dict.fromkeys(values, unrelated), 0)
    assert [line["verdict"] for line in same] == ["not resolved"] * 3


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
def test_verdicts(interval: tuple, sign: int, verdict: str) -> None:
    line = token_figures.claim("x", {"mean": 0.0, "interval": interval}, sign)
    assert line["verdict"] == verdict and line["statement"] == f"x {'=><'[sign]} 0"


def test_statements_of_figure_3() -> None:
    plain = {"chosen": [0.1, 0.2], "average": [-0.3, 0.1], "rejected": [-0.7, 0.0]}
    after = {"chosen": [-1.0, -0.5], "average": [-2.0, -2.0], "rejected": [-3.0, -3.5]}
    found = token_figures.likelihood_claims({"sft": plain, "preferred": after}, [-1.1, -0.4])
    assert [line["verdict"] for line in found] == ["as in the paper"] * 7
    shown = ["2.500 [2.000, 3.000]", "0.000 [-0.100, 0.100]", "-0.900 [-1.100, -0.700]"]
    assert [found[i]["found"] for i in (2, 3, 6)] == shown
    turned = token_figures.likelihood_claims({"sft": after, "preferred": plain}, [-0.1, -0.1])
    verdicts = ["NOT as in the paper", "not resolved", "as in the paper", *["NOT as in the paper"] * 4]
    assert [line["verdict"] for line in turned] == verdicts


def test_curves_start_at_zero_and_leave_training_lines_out(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 0.7, "rewards/chosen": 9.0, "rewards/rejected": 9.0},
        {"step": 2, "eval/loss": 0.6, "eval/rewards/chosen": 0.5, "eval/rewards/rejected": -1.0},
        {"step": 3, "eval/loss": 0.5, "eval/rewards/chosen": 0.25, "eval/rewards/rejected": -2.0},
    ]
    found = token_figures.curves(worlds.write_jsonl(tmp_path / "metrics.jsonl", lines))
    assert found == {
        "step": [0, 2, 3],
        "chosen": [0, 0.5, 0.25],
        "average": [0, -0.25, -0.875],
        "rejected": [0, -1.0, -2.0],
    }


# ---------------------------------------------------------------- the whole


def make_run(folder: Path, n: int = 20) -> Path:
    """What the quickstart leaves, small: a random model, and pairs of made-up summaries of n posts."""
    rng, rows = random.Random(0), []
    for prompt, kind in islice(notices.unique_notices(rng), n):
        completions = [notices.make_summary(prompt, kind, rng, 0.0, 1), notices.make_summary(prompt, kind, rng, 0.9, 0)]
        rows.append(notices.prefer_row({"prompt": prompt, "completions": completions}, rng))
    folder.mkdir()
    worlds.write_jsonl(folder / "pairs.jsonl", rows[: n - 6])
    worlds.write_jsonl(folder / "held_out_pairs.jsonl", rows[n - 6 :])
    worlds.make_model(folder / "sft", initializer_range=0.1)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of everything, real command lines and all, at one β with one seed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(token_figures, name, value)
        for name, value in worlds.environment(folder / "cache").items():
            patch.setenv(name, value)
        token_figures.main(token_figures.Args(run_dir=make_run(folder / "run"), steps=2, num_prompts=5, seed=3))
    return folder / "run" / "token_figures"


def cells(path: Path, first: str) -> list[list[str]]:
    """The rows of a markdown file whose first cell begins so."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line[2:-2].split(" | ") for line in lines if line.startswith(f"| {first}")]


def test_the_table_of_beams_holds_the_means_over_the_files(done: Path) -> None:
    pairs, beams = (worlds.read_jsonl(done / name) for name in ("held_out.jsonl", "beams_0.3/beams.jsonl"))
    assert [row["prompt"] for row in beams] == [pair["prompt"] for pair in pairs] and len(pairs) == 5
    found = json.loads((done / "token_figures.json").read_text(encoding="utf-8"))["beams"]["0.3"]
    rows = cells(done / "token_figures.md", "0.3 | ")
    assert [row[1] for row in rows] == ["1", "2", "5", "20"] == [str(width) for width in beams[0]["widths"]]
    for i, (_, _, *shown) in enumerate(rows):
        rewards = [notices.oracle(row["prompt"], row["completions"][i]) for row in beams]
        wins = [
            (r > c) + (r == c) / 2
            for r, c in zip(rewards, (notices.oracle(p["prompt"], p["chosen"]) for p in pairs), strict=True)
        ]
        lengths = [row["lengths"][i] for row in beams]
        for name, values, text in zip(("reward", "win_rate", "length"), (rewards, wins, lengths), shown, strict=True):
            mean, (low, high) = found[name][i]["mean"], found[name][i]["interval"]
            assert mean == pytest.approx(sum(values) / 5) and min(values) <= low <= mean <= high <= max(values)
            assert float(text.split()[0]) == pytest.approx(mean, abs=0.051)


def test_implicit_rewards_are_those_of_training(done: Path) -> None:
    found = json.loads((done / "token_figures.json").read_text(encoding="utf-8"))
    for start, name in token_figures.STARTS.items():
        (run,) = found["runs"][start]
        lines = [line for line in worlds.read_jsonl(done / f"dpo_{start}_0" / "metrics.jsonl") if "eval/loss" in line]
        assert run["step"] == [0, 1, 2] and run["chosen"][1:] == [line["eval/rewards/chosen"] for line in lines]
        assert run["rejected"][1:] == [line["eval/rewards/rejected"] for line in lines]
        row = next(row for row in cells(done / "token_figures.md", name) if len(row) == 5)
        means = [float(cell.split()[0]) for cell in row[1:4]]
        chosen, rejected = run["chosen"][-1], run["rejected"][-1]
        assert means == pytest.approx([chosen, (chosen + rejected) / 2, rejected], abs=6e-4)
    references = [json.loads((done / f"dpo_{s}_0" / "run.json").read_text())["args"]["model"] for s in found["runs"]]
    assert [Path(path).name for path in references] == ["sft", "preferred"]


def test_eq_16_holds_between_the_trained_models(done: Path) -> None:
    prompts = [pair["prompt"] for pair in worlds.read_jsonl(done / "held_out.jsonl")]
    args = evaluate.Args(policies=(), rows=Path(), output=Path(), num_samples=2, max_new_tokens=12, seed=3)
    found = json.loads((done / "token_figures.json").read_text(encoding="utf-8"))
    for (start, check), reference in zip(
        found["eq_16"].items(), (done.parent / "sft", done / "preferred"), strict=True
    ):
        assert check["deviation"] < 1e-12 and check["largest"] <= 1e-15
        assert 10 < check["states"] <= 5 * 2 * 12
        (expected,), (drawn,) = check["expected"], check["drawn"]
        assert expected == pytest.approx(check["state"] * check["states"] / 10, rel=1e-9) and expected < -1e-6
        assert drawn == pytest.approx(check["drawn_state"] * check["states"] / 10, rel=1e-9)
        assert check["gap"]["mean"] == pytest.approx(drawn - expected, rel=1e-9)
        encoded, samples = evaluate.draw(str(reference), prompts, args)
        (ratios,) = evaluate.log_ratios([str(done / f"dpo_{start}_0")], str(reference), [encoded], [samples])
        assert drawn == pytest.approx(0.1 * float(ratios.mean()), abs=1e-6) and abs(drawn) > 1e-5


def test_files_are_whole_and_of_their_kind(done: Path) -> None:
    assert not list(done.glob("*.tmp"))
    for name in ("beams.png", "likelihoods.png"):
        contents = (done / name).read_bytes()
        assert contents.startswith(b"\x89PNG") and contents.endswith(b"IEND\xaeB`\x82") and len(contents) > 20_000
    contents = json.loads((done / "token_figures.json").read_text(encoding="utf-8"))
    assert len(contents["commands"]) == 4 and contents["seconds"] > 0 and len(contents["claims"]) == 3 + 7 + 4
    assert [row[0] for row in cells(done / "token_figures.md", "Fig. 2, β = 0.3")] == [
        "Fig. 2, β = 0.3: win rate against chosen, 5 beams less 1 > 0",
        "Fig. 2, β = 0.3: win rate against chosen, 20 beams less 5 < 0",
        "Fig. 2, β = 0.3: length (tokens), 20 beams less 1 > 0",
    ]


def test_every_command_line_is_one_that_its_program_takes() -> None:
    lines = token_figures.stages(token_figures.Args(steps=7, num_prompts=11, seed=3))
    found = []
    for line in lines:
        script, *words = shlex.split(line.format(run="runs/q", out="runs/q/token_figures"))
        assert (worlds.ROOT / script).exists()
        args = tyro.cli(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args, args=words)
        check_arguments(args)
        found.append((Path(script).stem, Path(args.output_dir).name, args))
    names = [name for _, name, _ in found]
    assert len(set(names)) == len(names) == 3 + 1 + 6
    assert {args.max_steps for *_, args in found} == {7} and {args.train_data for *_, args in found} == {
        "runs/q/pairs.jsonl"
    }
    for algorithm, name, args in found:
        assert args.model == "runs/q/" + ("token_figures/preferred" if "dpo_preferred" in name else "sft")
        if algorithm == "dpo":
            assert args.seed == 3 + int(name[-1]) and args.beta == 0.1 and args.eval_every == 1
        if algorithm == "token_dpo_beam":
            assert f"beams_{args.beta}" == name and args.num_prompts == 11 and args.beam_widths == "1,2,5,10,20"
    made = [("preferred", i) for i, name in enumerate(names) if name == "preferred"]
    assert made[0][1] < min(i for i, name in enumerate(names) if "dpo_preferred" in name)


def test_mistakes_end_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_figures.quickstart, "run", lambda line: pytest.fail(line))
    run = make_run(tmp_path / "run")
    held_out, out = run / "held_out_pairs.jsonl", run / "token_figures"

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            token_figures.main(token_figures.Args(run_dir=run))

    rows = worlds.read_jsonl(held_out)
    worlds.write_jsonl(held_out, [{**rows[0], "prompt": "no post"}])
    refused("not a notice")
    held_out.write_text("{")
    refused("held_out_pairs.jsonl")
    held_out.unlink()
    refused("held_out_pairs.jsonl is missing; run scripts/quickstart.py first")
    assert not out.exists()
    worlds.write_jsonl(held_out, rows)
    out.mkdir()
    (out / "mine").write_text("")
    refused("not from this program")
    assert (out / "mine").exists()
    out = worlds.command("scripts/token_figures.py", 1, {"run_dir": run})
    ended = subprocess.run(out, cwd=worlds.ROOT, env=worlds.environment(tmp_path), capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "not from this program" in ended.stderr
