"""Figures 2 and 3 of "From r to Q*", Rafailov et al. 2024, arXiv 2404.12358, and its Eq 16, on the embedded world.

Reads what `scripts/quickstart.py` left in a directory: `sft/`, `pairs.jsonl` and `held_out_pairs.jsonl`. Trains
policies, each with a command that also works by hand, and writes into `token_figures/` there:

    beams.png            Fig. 2: oracle reward, win rate against the pair's preferred summary and length, by beams
    likelihoods.png      Fig. 3: implicit rewards of held-out pairs while DPO trains, from the SFT model, which wrote
                         the pairs, and from one that was first trained on their chosen summaries
    token_figures.md     the numbers, and beside each statement of the paper what was found
    token_figures.json   the same and the commands

    E_{a~π_ref}[β log π(a|s) - β log π_ref(a|s)] = -β KL(π_ref(·|s) ‖ π(·|s))                               (Eq 16)

is computed over the whole vocabulary at every state of completions drawn from π_ref. Intervals of means over prompts
are 95% bootstrap percentiles; those of Fig. 3 are the range over seeds.

    python scripts/token_figures.py --run-dir runs/quickstart
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evaluate
import figures
import notices
import quickstart
import streaming
import torch
import torch.nn.functional as F
from family import shown
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from algos.token_dpo_beam import token_rewards
from shared import UserError
from shared.model import load_generator
from shared.run import command

INPUTS = ("sft/config.json", "pairs.jsonl", "held_out_pairs.jsonl")
RECORD = "token_figures.json"  # the commands that were run and the numbers; it also marks the directory as ours
BETAS = (0.1, 0.3, 1.0)  # of Fig. 2
WIDTHS = (1, 2, 5, 10, 20)
BETA = 0.1  # of Fig. 3, the paper's
SEEDS = 3  # runs of each curve of Fig. 3
STARTS = {"sft": "without SFT on chosen", "preferred": "after SFT on chosen"}  # what DPO starts from, π_ref
NEW_TOKENS = 64  # of a completion, at most; a perfect summary has 17
SAMPLES = 2  # of π_ref per prompt, for Eq 16
SEQUENCES = 64  # whose logits over the vocabulary are in memory together
MEASURES = {"reward": "oracle reward (facts)", "win_rate": "win rate against chosen", "length": "length (tokens)"}
REWARDS = ("chosen", "average", "rejected")  # implicit rewards, and the mean of both
COLORS = (figures.BLUE, figures.GREEN, figures.ORANGE)


@dataclass(kw_only=True)
class Args:
    """Figures 2 and 3 of From r to Q* on the embedded world."""

    run_dir: Path = Path("runs/quickstart")
    """directory that `quickstart.py` has written"""
    steps: int = 96
    """optimizer steps of every policy, of 32 pairs each"""
    num_prompts: int = 256
    """held-out pairs, the first of the file"""
    seed: int = 0
    """of the order of the rows, the draws and the bootstrap; the runs of Fig. 3 take this one and those after it"""


def train(algorithm: str, model: str, name: str, rate: float, seed: int, args: Args, options: str = "") -> str:
    """The command line of one training on the pairs, whose result is {out}/`name`."""
    data = f"--train-data {{run}}/pairs.jsonl --output-dir {{out}}/{name} --batch-size 32 --max-steps {args.steps}"
    fixed = f"--learning-rate {rate} --warmup-steps {args.steps // 6} --save-every 0 --seed {seed}"
    return f"algos/{algorithm}.py --model {model} {data} {fixed} {options}".rstrip()


def stages(args: Args) -> list[str]:
    """The command lines, in order, with {run} and {out} for the directories."""
    models, held_out = {"sft": "{run}/sft", "preferred": "{out}/preferred"}, "--eval-data {out}/held_out.jsonl"
    widths = f"--beam-widths {','.join(map(str, WIDTHS))}"
    decoding = f"{held_out} --eval-every 0 {widths} --num-prompts {args.num_prompts} --max-new-tokens {NEW_TOKENS}"
    evaluation = f"--beta {BETA} {held_out} --eval-every {max(1, args.steps // 8)}"
    # a rate at which a small β over-optimises, and one at which β = 0.1 does not
    beams = [
        train("token_dpo_beam", models["sft"], f"beams_{beta}", 5e-4, args.seed, args, f"--beta {beta} {decoding}")
        for beta in BETAS
    ]
    likelihoods = [
        train("dpo", models[start], f"dpo_{start}_{i}", 2e-4, args.seed + i, args, evaluation)
        for start in STARTS
        for i in range(SEEDS)
    ]
    return [*beams, train("sft", models["sft"], "preferred", 2e-4, args.seed, args), *likelihoods]


def prepare(run: Path, out: Path, args: Args) -> None:
    """An empty directory with the held-out pairs.

    Raises UserError where a file of the quickstart is missing, another program's are in the way, a held-out prompt is
    no notice, or nothing can draw.
    """
    for name in INPUTS:
        if not (run / name).exists():
            raise UserError(f"--run-dir {run}: {name} is missing; run scripts/quickstart.py first")
    if out.exists() and not (out / RECORD).exists():
        raise UserError(f"{out}: is there, but not from this program; move it away")
    figures.check()
    found = streaming.first(str(run / "held_out_pairs.jsonl"), args.num_prompts)
    rows = [{"prompt": e.prompt, **dict(zip(("chosen", "rejected"), e.completions, strict=False))} for e in found]
    evaluate.score("notices", [row["prompt"] for row in rows], [""] * len(rows))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    record(out, {})
    notices.write_rows(out / "held_out.jsonl", rows)


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that appears under its name only when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def record(out: Path, contents: dict) -> None:
    """Write what has been done."""
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    whole(out / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def read(path: Path) -> list[dict]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- numbers


def measured(values: Tensor, seed: int) -> dict:
    """Mean and 95% interval of one value per prompt, (n,)."""
    return {"mean": float(values.mean()), "interval": evaluate.bootstrap(values, seed)}


def over_seeds(values: list[float]) -> dict:
    """Mean and range of one value per run."""
    return {"mean": sum(values) / len(values), "interval": (min(values), max(values))}


def beam_values(rows: list[dict], pairs: list[dict]) -> dict[str, Tensor]:
    """Each of MEASURES (n, W), by width, of the n rows of a beams.jsonl.

    The win rate is that of one completion against the pair's preferred one: 1, 0, or 0.5 at equal rewards.
    """
    chosen = {tuple(notices.words(pair["prompt"])): pair["chosen"] for pair in pairs}
    prompts = [row["prompt"] for row in rows]
    columns = [*zip(*(row["completions"] for row in rows), strict=True)]  # W times n
    columns.append([chosen[tuple(notices.words(prompt))] for prompt in prompts])
    rewards = torch.tensor([evaluate.score("notices", prompts, column) for column in columns], dtype=torch.double)
    *found, baseline = rewards[:, :, None]  # (n, 1) each
    return {
        "reward": torch.cat(found, 1),
        "win_rate": torch.stack([evaluate.win_rates(one, baseline) for one in found], 1),
        "length": torch.tensor([row["lengths"] for row in rows], dtype=torch.double),
    }


def curves(path: Path) -> dict[str, list[float]]:
    """Implicit rewards of held-out pairs in nats by step, from a metrics.jsonl; before the first step they are 0."""
    lines = [line for line in read(path) if "eval/loss" in line]
    found = {name: [0.0, *(line[f"eval/rewards/{name}"] for line in lines)] for name in ("chosen", "rejected")}
    average = [(a + b) / 2 for a, b in zip(*found.values(), strict=True)]
    return {"step": [0, *(line["step"] for line in lines)], "average": average, **found}


def eq_16(logps: Tensor, ref_logps: Tensor, actions: Tensor, beta: float) -> Tensor:
    """Both sides of Eq 16 at T states, and the token reward of the action that was drawn there.

    logps, ref_logps (T, V), log π(·|s) and log π_ref(·|s); actions (T,) → (T, 3): E_{a~π_ref}[r(s, a)], from the
    token rewards of all actions; -β KL(π_ref ‖ π), without them; r(s, a).
    """
    rewards = token_rewards(logps, ref_logps, beta)  # (T, V)
    divergences = F.kl_div(logps, ref_logps, reduction="none", log_target=True).sum(1)
    drawn = rewards.gather(1, actions[:, None])[:, 0]
    return torch.stack([(ref_logps.exp() * rewards).sum(1), -beta * divergences, drawn], 1)


@torch.inference_mode()
def states(policy, reference, prompts: list[list[int]], completions: list[list[int]], beta: float) -> list[Tensor]:
    """`eq_16` at every state of n completions y of prompts x, all token ids → n times (|y|, 3), float64."""
    found, pairs = [], list(zip(prompts, completions, strict=True))
    for start in range(0, len(pairs), SEQUENCES):
        some = pairs[start : start + SEQUENCES]
        ids = pad_sequence([torch.tensor(x + y) for x, y in some], batch_first=True)  # no state sees what follows it
        both = [model(ids).logits.double().log_softmax(-1) for model in (policy, reference)]
        for (x, y), *logps in zip(some, *both, strict=True):
            found.append(eq_16(*(each[len(x) - 1 :][: len(y)] for each in logps), torch.tensor(y), beta))
    return found


def identity(policies: list[Path], reference: Path, prompts: list[str], seed: int) -> dict:
    """Eq 16 at the states of SAMPLES completions per prompt, drawn from π_ref, and summed over each completion.

    The mean of the sums is, by the chain rule, -β KL(π_ref(y|x) ‖ π(y|x)) of whole completions.
    """
    sampling = {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS, "seed": seed}
    args = evaluate.Args(policies=(), rows=Path(), output=Path(), **sampling)
    encoded, drawn = evaluate.draw(str(reference), prompts, args)
    xs, ys = [x for x in encoded for _ in range(SAMPLES)], [y for some in drawn.ids for y in some]
    ref, *models = (load_generator(str(path), torch.double, "cpu") for path in (reference, *policies))
    found = [states(model, ref, xs, ys, BETA) for model in models]  # policies, completions, (|y|, 3)
    sides = torch.stack([torch.cat(some) for some in found])  # (policies, N, 3)
    sums = torch.stack([torch.stack([each.sum(0) for each in some]) for some in found])  # (policies, n SAMPLES, 3)
    gaps = (sums[..., 2] - sums[..., 0]).view(len(found), len(prompts), SAMPLES)
    return {
        "states": sides.shape[1],
        "deviation": float((sides[..., 0] - sides[..., 1]).abs().max()),
        "largest": float(sides[..., 0].max()),
        "state": float(sides[..., 0].mean()),
        "drawn_state": float(sides[..., 2].mean()),
        "expected": sums[..., 0].mean(1).tolist(),
        "drawn": sums[..., 2].mean(1).tolist(),
        "gap": measured(gaps.mean((0, 2)), seed),
    }


def results_of(run: Path, out: Path, args: Args) -> dict:
    """The numbers of both figures and of Eq 16, and the paper's statements."""
    pairs, models = read(out / "held_out.jsonl"), {"sft": run / "sft", "preferred": out / "preferred"}
    values = {beta: beam_values(read(out / f"beams_{beta}" / "beams.jsonl"), pairs) for beta in BETAS}
    runs = {start: [curves(out / f"dpo_{start}_{i}" / "metrics.jsonl") for i in range(SEEDS)] for start in STARTS}
    prompts = [pair["prompt"] for pair in pairs]
    checks = {
        start: identity([out / f"dpo_{start}_{i}" for i in range(SEEDS)], models[start], prompts, args.seed)
        for start in STARTS
    }
    beams = {
        str(beta): {measure: [measured(column, args.seed) for column in found[measure].T] for measure in MEASURES}
        for beta, found in values.items()
    }
    claims = [line for beta, found in values.items() for line in beam_claims(beta, found, args.seed)]
    claims += likelihood_claims(last(runs), checks["preferred"]["expected"]) + eq_16_claims(checks)
    return {"beams": beams, "runs": runs, "eq_16": checks, "claims": claims}


def last(runs: dict[str, list[dict]]) -> dict[str, dict[str, list[float]]]:
    """What DPO started from → each of REWARDS, at the end of each run."""
    return {start: {name: [run[name][-1] for run in some] for name in REWARDS} for start, some in runs.items()}


# ---------------------------------------------------------------- what the paper states


def claim(text: str, found: dict, sign: int, form: str = ".3f") -> dict:
    """A number of which the paper states that it is above 0 (sign 1), below (-1) or neither (0), and what was found."""
    low, high = found["interval"]
    side = (low > 0) - (high < 0)
    resolved = side or low == high
    verdict = "as in the paper" if side == sign else "NOT as in the paper" if resolved else "not resolved"
    return {"statement": f"{text} {('= 0', '> 0', '< 0')[sign]}", "found": shown(found, form), "verdict": verdict}


def beam_claims(beta: float, values: dict[str, Tensor], seed: int) -> list[dict]:
    """Section 5.2, as differences between widths on the same prompts."""
    claims = []
    for measure, more, fewer, sign, form in (
        ("win_rate", 5, 1, 1, ".3f"),
        ("win_rate", 20, 5, -1, ".3f"),
        ("length", 20, 1, 1, ".1f"),
    ):
        difference = values[measure][:, WIDTHS.index(more)] - values[measure][:, WIDTHS.index(fewer)]
        text = f"Fig. 2, β = {beta}: {MEASURES[measure]}, {more} beams less {fewer}"
        claims.append(claim(text, measured(difference, seed), sign, form))
    return claims


def likelihood_claims(ends: dict[str, dict[str, list[float]]], expected: list[float]) -> list[dict]:
    """Section 5.4, in the values after training. expected: -β KL(π_ref ‖ π) after SFT on chosen, of each run."""
    plain, after = (ends[start] for start in ("sft", "preferred"))
    margins = [a - b for a, b in zip(after["chosen"], after["rejected"], strict=True)]
    falls = [b - a for a, b in zip(plain["chosen"], after["chosen"], strict=True)]
    rests = [a - b for a, b in zip(after["chosen"], expected, strict=True)]
    wanted = (
        (f"{STARTS['preferred']}: chosen", after["chosen"], -1),
        (f"{STARTS['preferred']}: rejected", after["rejected"], -1),
        (f"{STARTS['preferred']}: chosen less rejected", margins, 1),
        (f"{STARTS['preferred']}: chosen less -β KL(π_ref ‖ π)", rests, 0),
        (f"{STARTS['sft']}: chosen", plain["chosen"], 1),
        (f"{STARTS['sft']}: average", plain["average"], 0),
        (f"chosen, {STARTS['preferred']} less {STARTS['sft']}", falls, -1),
    )
    return [claim(f"Fig. 3, {text} (nats)", over_seeds(values), sign) for text, values, sign in wanted]


def eq_16_claims(checks: dict[str, dict]) -> list[dict]:
    """What follows from Eq 16 for any two policies."""
    return [
        claim(f"Eq 16, π_ref {STARTS[start]}: {text} (nats per completion)", found, sign)
        for start, check in checks.items()
        for text, found, sign in (
            ("left side", over_seeds(check["expected"]), -1),
            ("drawn tokens less left side", check["gap"], 0),
        )
    ]


# ---------------------------------------------------------------- tables and figures


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)] + [""]


def markdown(results: dict) -> str:
    """All numbers, intervals or ranges in brackets."""
    forms, ends = dict(zip(MEASURES, (".2f", ".3f", ".1f"), strict=True)), last(results["runs"])
    beams = [
        [beta, str(width), *(shown(numbers[measure][i], form) for measure, form in forms.items())]
        for beta, numbers in results["beams"].items()
        for i, width in enumerate(WIDTHS)
    ]
    rewards, sides = [], []
    for start, name in STARTS.items():
        check = results["eq_16"][start]
        rewards.append([name, *(shown(over_seeds(ends[start][r]), ".3f") for r in REWARDS)])
        rewards[-1].append(shown(over_seeds(check["expected"]), ".3f"))
        numbers = [f"{check[n]:.1e}" for n in ("deviation", "largest", "state", "drawn_state")]
        means = [shown(over_seeds(check[n]), ".3f") for n in ("expected", "drawn")]
        sides.append([name, str(check["states"]), *numbers, *means, shown(check["gap"], ".3f")])
    columns = ["π_ref", "states", "largest difference of the sides", "largest left side", "mean left side"]
    columns += ["mean reward of the drawn tokens", "left side per completion", "drawn tokens per completion"]
    lines = ["## Fig. 2: beam search", "", *table(["β", "beams", *MEASURES.values()], beams)]
    lines += [f"## Fig. 3: implicit rewards of held-out pairs after training (nats), β = {BETA}", ""]
    lines += table(["π_ref", *REWARDS, "-β KL(π_ref ‖ π), Eq 16"], rewards)
    lines += ["The SFT model wrote both summaries of a pair: without SFT on chosen, Eq 16 is about their average."]
    lines += ["The paper's base model wrote neither.", ""]
    lines += [f"## Eq 16 at the states of completions drawn from π_ref (nats), β = {BETA}", ""]
    lines += table([*columns, "difference"], sides)
    claims = [list(line.values()) for line in results["claims"]]
    return "\n".join([*lines, "## Statements of the paper", "", *table(["statement", "found", ""], claims)])


def draw_beams(path: Path, beams: dict[str, dict]) -> None:
    """Fig. 2: one panel per measure, one line per β, 95% intervals."""
    figure, axes = figures.canvas([[measure] for measure in MEASURES], (3.4, 6))
    for i, (beta, numbers) in enumerate(beams.items()):
        at = [width * 1.08 ** (i - 1) for width in WIDTHS]  # side by side
        for measure, panel in axes.items():
            means = torch.tensor([number["mean"] for number in numbers[measure]])
            ends = torch.tensor([number["interval"] for number in numbers[measure]])
            name = f"β = {beta}" if measure == "length" else None
            look = {"color": COLORS[i], "marker": "os^"[i], "markersize": 4, "capsize": 2, "label": name}
            panel.errorbar(at, means, (ends - means[:, None]).abs().T, **look)
    for measure, panel in axes.items():
        panel.set_xscale("log")
        panel.set_xticks(WIDTHS, WIDTHS)
        panel.minorticks_off()
        figures.label(panel, "", "beams" if measure == "length" else "", MEASURES[measure])
    panel.get_legend().remove()  # lines run through every corner of a panel
    figure.legend(loc="outside upper center", ncols=len(beams), fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=300)


def draw_likelihoods(path: Path, runs: dict[str, list[dict]], checks: dict[str, dict]) -> None:
    """Fig. 3: one panel per π_ref, a thin line per run and a thick one for their mean."""
    figure, axes = figures.canvas([[start] for start in STARTS], (3.4, 5))
    for start, panel in axes.items():
        steps, first = runs[start][0]["step"], start == "sft"
        panel.axhline(0, color=figures.GREY, linewidth=0.8)
        for color, style, name in zip(COLORS, ("-", ":", "--"), REWARDS, strict=True):
            values = torch.tensor([run[name] for run in runs[start]])  # (seeds, evaluations)
            panel.plot(steps, values.T, style, color=color, linewidth=0.6, alpha=0.6)
            panel.plot(steps, values.mean(0), style, color=color, label=name if first else None)
        ends, name = checks[start]["expected"], "−β KL(π_ref ‖ π)" if first else None
        panel.plot([steps[-1]] * len(ends), ends, "k*", markersize=4, clip_on=False, label=name)
        figures.label(panel, STARTS[start], "" if first else "optimizer steps", "implicit reward (nats)")
    axes["preferred"].sharey(axes["sft"])
    figure.savefig(path, format="png", dpi=300)


# ---------------------------------------------------------------- command line


def main(args: Args) -> None:
    """All stages, then numbers, figures and tables."""
    started, run, commands = time.perf_counter(), args.run_dir.resolve(), []
    out = run / "token_figures"
    prepare(run, out, args)
    inside = run.relative_to(quickstart.ROOT) if run.is_relative_to(quickstart.ROOT) else run
    words = {"run": shlex.quote(str(inside)), "out": shlex.quote(str(inside / out.name))}
    for line in stages(args):
        commands.append(quickstart.run(line.format(**words)))
        record(out, {"commands": commands})
    results = results_of(run, out, args)
    text = markdown(results)
    whole(out / "beams.png", lambda path: draw_beams(path, results["beams"]))
    whole(out / "likelihoods.png", lambda path: draw_likelihoods(path, results["runs"], results["eq_16"]))
    whole(out / "token_figures.md", lambda path: path.write_text(text, encoding="utf-8"))
    seconds = time.perf_counter() - started
    record(out, {"commands": commands, "seconds": seconds, **results})
    print(f"\n{text}\n{seconds:.0f} s in all; the same in {out / 'token_figures.md'}, the figures beside it")


if __name__ == "__main__":
    command(main, Args)
