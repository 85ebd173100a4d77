"""Numbers and verdicts of the distillation experiments, from made-up outputs of their stages."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.experiments import distillation
from scripts.experiments.distillation import (
    BIASES,
    METHODS,
    SHARES,
    SHORT,
    STRENGTHS,
    STUDY,
    Controlled,
    Members,
    Success,
)
from scripts.lab import notices
from scripts.lab.experiments import reproduction_of
from scripts.lab.pipeline import Artifact, Plan, Stage

NUM_PROMPTS = 64


def artifact(path: Path, contents: Any) -> Artifact:
    """A file with these contents, or with one of them on each line if it is a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(contents)]
    if path.suffix == ".jsonl":
        texts = [json.dumps(line) for line in contents]
    path.write_text("\n".join(texts))
    return Artifact(Stage(path.stem, "", {}, path.parent, ""), path.name)


def verdict_of(number: str, runs: list) -> str:
    (experiment,) = [experiment for experiment in STUDY.experiments if experiment.number == number]
    return reproduction_of(experiment.check(runs)).value


# ---------------------------------------------------------------- numbers


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


def test_a_prompt_is_judged_by_what_the_other_half_selects() -> None:
    rewards = normal(3, 10)
    selectors = normal(3, 10, seed=1)
    for chosen_by in (None, selectors):
        used = rewards if chosen_by is None else selectors
        expected = []
        for i in range(10):
            others = [j for j in range(10) if j % 2 != i % 2]
            sums = [sum(used[k, j].item() for j in others) for k in range(3)]
            expected.append(rewards[sums.index(max(sums)), i].item())
        assert distillation.selected_on_the_other_half(rewards, chosen_by).tolist() == expected


def probe_of(rows: int) -> distillation.Probe:
    oracle = normal(rows, 2)
    lengths = normal(rows, 2, seed=1) + oracle
    scores = 0.7 * oracle - 0.3 * lengths + 0.1 * normal(rows, 2, seed=2)
    return distillation.Probe(oracle, lengths, scores.unsqueeze(2))


def repeated(values: Tensor, counts: Tensor) -> Tensor:
    """The numbers of all completions, those of each prompt as often as it counts."""
    rows = values.repeat_interleave(counts, 0)
    return rows.flatten()


def test_the_coefficient_of_length_is_that_of_least_squares() -> None:
    probe = probe_of(20)
    counts = torch.stack([torch.ones(20), torch.arange(20) % 3]).double()
    measured = distillation.length_slope_of(probe.scores[:, :, 0], probe)(counts)
    for weights, slope in zip(counts.long(), measured, strict=True):
        oracle = repeated(probe.oracle, weights)
        lengths = repeated(probe.lengths, weights)
        scores = repeated(probe.scores, weights)
        x = torch.stack([torch.ones_like(oracle), oracle, lengths], 1)
        expected = torch.linalg.lstsq(x, scores[:, None]).solution[2, 0]
        assert slope.item() == pytest.approx(expected.item(), rel=1e-9)
        assert slope.item() == pytest.approx(-0.3, abs=0.1)


def test_the_correlation_is_pearsons() -> None:
    probe = probe_of(20)
    counts = (torch.arange(20) % 3).double()
    columns = [repeated(values, counts.long()) for values in (probe.oracle, probe.lengths)]
    expected = torch.corrcoef(torch.stack(columns))[0, 1]
    measured = distillation.correlation_of(probe.oracle, probe.lengths)(counts[None])
    assert measured.item() == pytest.approx(expected.item(), rel=1e-9)


def test_every_resample_chooses_its_own_strength() -> None:
    rewards = torch.tensor([[1.0, 0, 0], [0, 1, 2]]).double()
    counts = torch.tensor([[1.0, 1, 1], [3, 0, 0], [3, 1, 0]]).double()
    measured = distillation.log_strength_of(rewards)(counts)
    assert measured.tolist() == pytest.approx([0, -1, -1])


def test_ipo_has_the_gap_of_its_beta() -> None:
    assert METHODS["ipo"].strength(0.1) == "--tau 0.05"  # 1/(2τ) = 1/β
    assert METHODS["e"].strength(1.0) == "--beta 1"


def test_the_columns_of_the_probe_are_the_models_of_the_command_line(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    template = distillation.probed(plan, 0).stage.template
    models = re.findall(r"{(rm_[^}]+)}", template)
    for share in SHARES:
        assert models[distillation.column_of(share)] == f"rm_{share}"
        for bias in BIASES:
            assert models[distillation.column_of(share, bias)] == f"rm_{share}_{bias}"


def test_no_two_sets_of_pairs_have_one_seed() -> None:
    seeds = []
    for seed in range(3):
        for share in SHARES:
            seeds += [distillation.own_seed(seed, share, bias) for bias in (0, *BIASES)]
    assert len(set(seeds)) == 36


# ---------------------------------------------------------------- the grid

# the advantage of each method at each ρ, as the paper has it
ADVANTAGES = {
    0.1: {"dpo": 0.5, "ipo": 0.5, "d": 1.0, "p": 0.6, "pd": 1.0, "e": 1.5},
    0.5: {"dpo": 2.0, "ipo": 2.0, "d": 2.15, "p": 2.0, "pd": 2.15, "e": 2.15},
    0.9: {"dpo": 2.6, "ipo": 2.5, "d": 3.2, "p": 2.7, "pd": 2.9, "e": 3.0},
}


def evaluation_of(path: Path, means: dict[str, float]) -> Artifact:
    """A results file of policies with these mean rewards; two samples for each prompt."""
    policies = {}
    for i, (name, mean) in enumerate(means.items()):
        rewards = mean + 0.05 * normal(NUM_PROMPTS, 2, seed=i)
        policies[name] = {"rewards": rewards.tolist()}
    return artifact(path / "results.json", {"policies": policies})


def grid_of(directory: Path, factor: float = 1.0, best: tuple[float, ...] = (1.0, 1.0, 0.1)) -> distillation.Grid:
    """Evaluations with `factor` times the paper's advantages; `best` is the better strength at each ρ."""
    results = {}
    for share, best_beta in zip(SHARES, best, strict=True):
        means = {"sft": 0.0}
        for name, advantage in ADVANTAGES[share].items():
            for beta in STRENGTHS:
                loss = 0.0 if beta == best_beta else 0.3
                means[f"{name}_{beta:g}"] = factor * (advantage - loss)
        results[share] = evaluation_of(directory / f"{share}", means)
    return results


GRID = ("X4", "X5", "X6", "X7", "X8", "X9", "X10", "X11", "X12")


@pytest.mark.parametrize("number", GRID)
def test_the_grid_of_the_paper_is_reproduced(number: str, tmp_path: Path) -> None:
    runs = [grid_of(tmp_path / str(seed)) for seed in range(2)]
    assert verdict_of(number, runs) == "reproduced"


@pytest.mark.parametrize("number", GRID)
def test_the_opposite_grid_is_not(number: str, tmp_path: Path) -> None:
    # a method's own strength is always the best one, unless it is the same for every ρ
    best = (1.0, 1.0, 1.0) if number == "X12" else (1.0, 1.0, 0.1)
    assert verdict_of(number, [grid_of(tmp_path, -5, best)]) == "not reproduced"


# ---------------------------------------------------------------- the reward models


def probe_file(directory: Path, slopes: list[float], best_is_longest: bool = True) -> Artifact:
    """Pairs of summaries, with scores of models that see length alone: each has a slope per token."""
    kind = notices.KINDS[0]
    rows = []
    for i in range(NUM_PROMPTS):
        facts = {slot: values[i % 8] for slot, values in notices.SLOTS.items()}
        post = " ".join(kind.posts[0]).format(**facts)
        better = [*kind.summary, *["thanks"] * (i % 3)]
        worse = [*kind.summary[: 1 + i % 4], *["thanks"] * (i % 2)]
        if not best_is_longest:
            worse += ["and so it is then"] * 8
        texts = [notices.write_summary(clauses, facts) for clauses in (better, worse)]
        scores = [[slope * len(notices.words(text)) for slope in slopes] for text in texts]
        rows.append({"prompt": post, "chosen": texts[0], "rejected": texts[1], "scores": scores})
    return artifact(directory / "rows.jsonl", rows)


def labelled_file(directory: Path, longer: int) -> Artifact:
    """A hundred pairs of which the longer one is preferred in so many, and as many pairs of about equal lengths."""
    words = ["a b c d e f g h i j", "a b c d e f g h i j k l"]  # with the EOS 11 and 13 tokens
    rows = [{"chosen": words[i < longer], "rejected": words[i >= longer]} for i in range(100)]
    rows += [{"chosen": words[0], "rejected": words[0] + " k"}] * 100
    return artifact(directory / "rows.jsonl", rows)


@pytest.mark.parametrize(("longer", "verdict"), [(61, "reproduced"), (90, "partly"), (30, "not reproduced")])
def test_the_share_of_longer_ones(longer: int, verdict: str, tmp_path: Path) -> None:
    runs = [labelled_file(tmp_path / str(seed), longer) for seed in range(20)]  # of so many rows for a narrow interval
    assert verdict_of("X1", runs) == verdict
    assert distillation.longer_is_preferred(runs[0]).mean() == longer / 100


# r_ρ, and r_ρ,b in the order of b, for each ρ in turn
SLOPES = [-1.0, -0.5, 0.1, 0.5, 0.2, -0.5, 0.1, 0.5, 1.0, -0.5, 0.1, 0.5]


def test_length_of_reward_models(tmp_path: Path) -> None:
    as_in_the_paper = [probe_file(tmp_path / "a", SLOPES)]
    assert verdict_of("X2", as_in_the_paper) == "reproduced"
    assert verdict_of("X3", as_in_the_paper) == "reproduced"

    mirrored = [probe_file(tmp_path / "b", [-slope for slope in SLOPES], best_is_longest=False)]
    assert verdict_of("X2", mirrored) == "not reproduced"
    assert verdict_of("X3", mirrored) == "not reproduced"


def members_of(directory: Path, pick: int, results: Artifact) -> Members:
    """Outputs of an e-DPO that distilled the member of this index alone, without error."""
    scores = normal(NUM_PROMPTS, 2, len(BIASES))
    gaps = scores[:, 0, pick] - scores[:, 1, pick]
    logps = {"sft": [[-5.0, -5.0]] * NUM_PROMPTS}
    logs = {}
    for beta in STRENGTHS:
        chosen = -5 + gaps / beta
        logps[f"e_{beta:g}"] = [[value, -5.0] for value in chosen.tolist()]
        lines = [{"step": 0, "eval/loss": 1.0}]
        for step in range(1, 6):
            lines.append({"step": step} | {f"rm/{i}": float(i == pick) for i in range(len(BIASES))})
        logs[beta] = artifact(directory / f"{beta:g}" / "metrics.jsonl", lines)
    rows = artifact(directory / "rows.jsonl", [{"scores": row} for row in scores.tolist()])
    return Members(rows, artifact(directory / "logps.json", {"logps": logps}), logs, results)


def test_which_member_is_distilled(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    picks = {"opposite": (2, 1, 0), "same": (0, 1, 2)}
    verdicts = {}
    for words, indices in picks.items():
        run = {}
        for share, pick in zip(SHARES, indices, strict=True):
            run[share] = members_of(tmp_path / words / f"{share}", pick, grid[share])
            assert distillation.best_matches(run[share]).mean(0).argmax() == pick
            assert distillation.best_matches(run[share])[:, pick].min() == 1
        verdicts[words] = verdict_of("X13", [run])
    assert verdicts == {"opposite": "reproduced", "same": "not reproduced"}


def success_of(directory: Path, pick: int, slopes: list[float], control: float) -> Success:
    """At the smallest ρ, e-DPO that distilled a member, and its reward by checkpoints instead."""
    grid = grid_of(directory)[SHORT]
    by_checkpoints = evaluation_of(directory / "control", {f"e_{beta:g}": control for beta in STRENGTHS})
    members = members_of(directory, pick, grid)
    return Success(members, probe_file(directory / "probe", slopes), Controlled(grid, by_checkpoints))


def test_why_the_ensemble_is_better(tmp_path: Path) -> None:
    better = success_of(tmp_path / "better", 2, SLOPES, control=1.0)
    worse = success_of(tmp_path / "worse", 2, [-slope for slope in SLOPES], control=2.0)
    assert verdict_of("X14", [better]) == "reproduced"
    assert verdict_of("X14", [worse]) == "not reproduced"
    assert verdict_of("X15", [better.controlled]) == "reproduced"
    assert verdict_of("X15", [worse.controlled]) == "not reproduced"


# ---------------------------------------------------------------- the likelihoods


def logs_of(directory: Path, log_ratios: dict[str, float]) -> dict[str, Artifact]:
    """The logs of methods whose log-ratios of chosen completions are these at the end, and 9 before."""
    logs = {}
    for i, (name, log_ratio) in enumerate(log_ratios.items()):
        strength = 0.05 if name == "ipo" else 0.1
        late = log_ratio + 0.1 * normal(10, seed=i)
        rewards = [9.0] * 20 + (strength * late).tolist()
        logs[name] = artifact(directory / name / "metrics.jsonl", [{"rewards/chosen": reward} for reward in rewards])
    return logs


def test_the_likelihood_of_the_preferred(tmp_path: Path) -> None:
    falls = {"dpo": -9.0, "ipo": -5.0, "d": -3.0, "p": -8.0, "pd": -2.0, "e": -1.0}
    rises = {name: -log_ratio for name, log_ratio in falls.items()}
    logs = logs_of(tmp_path / "falls", falls)
    of_ipo = distillation.last_log_ratios(logs["ipo"], "ipo")
    assert of_ipo.mean().item() == pytest.approx(-5, abs=0.2)
    assert verdict_of("X16", [logs]) == "reproduced"
    assert verdict_of("X16", [logs_of(tmp_path / "rises", rises)]) == "not reproduced"


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grids = [grid_of(tmp_path / str(seed)) for seed in range(2)]
    picked = {share: members_of(tmp_path / f"{share}", 1, grids[0][share]) for share in SHARES}
    figure = distillation.advantage(grids)
    (axes,) = figure.axes
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["DPO", "IPO", "d-DPO", "p-DPO", "pd-DPO", "e-DPO"]
    assert len(distillation.strengths(grids).axes) == len(SHARES)
    bars = distillation.members_distilled([picked]).axes[0].patches
    heights = [bar.get_bbox().height for bar in bars]  # type: ignore[attr-defined]
    assert heights == [0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("fall", "reward", "verdict"), [(-20, -1.0, "reproduced"), (-20, 1.0, "partly"), (-3, 1.0, "not reproduced")]
)
def test_overfitting(fall: float, reward: float, verdict: str, tmp_path: Path) -> None:
    logps = {"sft": [[-5.0, -5.0]] * NUM_PROMPTS, "dpo": [[-5.0 + fall, -50.0]] * NUM_PROMPTS}
    path = artifact(tmp_path / "logps.json", {"logps": logps})
    results = evaluation_of(tmp_path / "evaluated", {"sft": 0.0, "dpo": reward})
    assert verdict_of("T8", [distillation.Overfitted(path, results)]) == verdict
