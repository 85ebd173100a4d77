"""Figures 2 and 3 of "From r to Q*", Rafailov et al. 2024, arXiv 2404.12358, and its Eq 16, on the notices.

Reads what `scripts/quickstart.py` left in a directory: `sft/`, `pairs.jsonl` and `held_out_pairs.jsonl`. Trains
policies, each with a command that also works by hand, and writes into `token_figures/` there:

    beams.png            Fig. 2: oracle reward, win rate against the pair's preferred summary, and length, by beams
    likelihoods.png      Fig. 3: implicit rewards of held-out pairs while DPO trains, once from the SFT model, which
                         wrote the pairs, and once from a model that was first trained on their chosen summaries
    token_figures.md     the numbers, and each statement of the paper beside the number that was found
    token_figures.json   the same and the commands

    E_{a~π_ref}[β log π(a|s) - β log π_ref(a|s)] = -β KL(π_ref(·|s) ‖ π(·|s))                               (Eq 16)

is computed over the whole vocabulary at every state of completions sampled from π_ref. Intervals of means over prompts
are 95% bootstrap percentiles; those of Fig. 3 are the range over seeds.

    python scripts/token_figures.py --run-dir runs/quickstart
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from scripts.lab import plots
from scripts.lab.commands import checked_command
from scripts.lab.eq_16 import check_eq_16
from scripts.lab.policies import (
    Samples,
    collect_samples,
    encode_prompts,
    lengths_of,
    plain_prompt,
    prompt_example,
    rewards_of,
    rewards_of_samples,
)
from scripts.lab.row_files import first_examples, read_jsonl, write_jsonl
from scripts.lab.sampling import Sampling, load_sampler, prompt_room, search_completions
from scripts.lab.stages import Stages, shell_path
from scripts.lab.statistics import interval_text, mean_and_interval, win_rates
from scripts.lab.tables import markdown_table
from shared import UserError
from shared.command import Above, AtLeast
from shared.files import replacing, write_text

INPUTS = ("sft/config.json", "pairs.jsonl", "held_out_pairs.jsonl")
RECORD = "token_figures.json"  # the commands that were run and the numbers; it also marks the directory as ours
BETAS = (0.1, 0.3, 1.0)  # of Fig. 2
WIDTHS = (1, 2, 5, 10, 20)
BETA = 0.1  # of Fig. 3, the paper's
SEEDS = 3  # runs of each curve of Fig. 3
STARTS = {"sft": "without SFT on chosen", "preferred": "after SFT on chosen"}  # the model that DPO starts from, π_ref
NEW_TOKENS = 64  # of a completion, at most; a perfect summary has 17
SAMPLES = 2  # of π_ref per prompt, for Eq 16
MEASURES = {"reward": "oracle reward (facts)", "win_rate": "win rate against chosen", "length": "length (tokens)"}
FORMATS = {"reward": ".2f", "win_rate": ".3f", "length": ".1f"}
REWARDS = ("chosen", "average", "rejected")  # implicit rewards, and the mean of both
LINE_STYLES = ("-", ":", "--")
COLORS = (plots.BLUE, plots.GREEN, plots.ORANGE)
MARKERS = ("o", "s", "^")


@dataclass(kw_only=True)
class Args:
    """Figures 2 and 3 of From r to Q* on the notices."""

    run_dir: Path = Path("runs/quickstart")
    """directory that `quickstart.py` has written"""
    steps: Annotated[int, Above(0)] = 96
    """optimizer steps of every policy, of 32 pairs each"""
    num_prompts: Annotated[int, Above(0)] = 256
    """held-out pairs, the first of the file"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the order of the rows, the samples and the bootstrap; the runs of Fig. 3 take this and the next ones"""


# ---------------------------------------------------------------- stages


def train(algorithm: str, model: str, name: str, rate: float, seed: int, args: Args, options: str = "") -> str:
    """The command line of one training on the pairs, whose result is {out}/`name`."""
    data = f"--train-data {{run}}/pairs.jsonl --output-dir {{out}}/{name}"
    length = f"--batch-size 32 --max-steps {args.steps}"
    schedule = f"--learning-rate {rate} --warmup-steps {args.steps // 6}"
    line = f"algos/{algorithm}.py --model {model} {data} {length} {schedule} --save-every 0 --seed {seed} {options}"
    return line.rstrip()


def stages(args: Args) -> list[str]:
    """The command lines, in order, with {run} and {out} for the directories."""
    models = {"sft": "{run}/sft", "preferred": "{out}/preferred"}
    held_out = "--eval-data {out}/held_out.jsonl"
    lines = []

    # A small β over-optimises at this learning rate. The one of Fig. 3 is so low that β = 0.1 does not.
    for beta in BETAS:
        options = f"--beta {beta}"
        lines.append(train("token_dpo_beam", models["sft"], f"beams_{beta}", 5e-4, args.seed, args, options))

    lines.append(train("sft", models["sft"], "preferred", 2e-4, args.seed, args))

    eval_every = max(1, args.steps // 8)
    options = f"--beta {BETA} {held_out} --eval-every {eval_every}"
    for start, model in models.items():
        for i in range(SEEDS):
            lines.append(train("dpo", model, f"dpo_{start}_{i}", 2e-4, args.seed + i, args, options))
    return lines


def read_held_out(run: Path, out: Path, num_prompts: int) -> list[dict]:
    """The held-out pairs.

    Raises UserError if a file of the quickstart is missing, files of another program are in the way, or a prompt is
    not a notice.
    """
    for name in INPUTS:
        if not (run / name).exists():
            raise UserError(f"--run-dir {run}: {name} is missing; run scripts/quickstart.py first")
    if out.exists() and not (out / RECORD).exists():
        raise UserError(f"{out}: is there, but not from this program; move it away")

    rows = []
    source = str(run / "held_out_pairs.jsonl")
    for example in first_examples(source, num_prompts):
        row = {"prompt": plain_prompt(example.prompt)}
        row.update(zip(("chosen", "rejected"), example.texts, strict=False))
        rows.append(row)

    rewards_of("notices", [prompt_example(row["prompt"], "") for row in rows])
    return rows


# ---------------------------------------------------------------- numbers


def results_of(run: Path, out: Path, args: Args) -> dict:
    """The numbers of both figures and of Eq 16, and the paper's statements."""
    pairs = read_jsonl(out / "held_out.jsonl")
    prompts = [pair["prompt"] for pair in pairs]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, seed=args.seed)
    claims = []
    beams = {}
    for beta in BETAS:
        samples = search_policy(out / f"beams_{beta}", prompts, sampling)
        values = beam_values(samples, pairs)
        claims += beam_claims(beta, values, args.seed)
        beams[str(beta)] = means_by_width(values, args.seed)

    models = {"sft": run / "sft", "preferred": out / "preferred"}
    runs = {}
    checks = {}
    for start in STARTS:
        directories = [out / f"dpo_{start}_{i}" for i in range(SEEDS)]
        runs[start] = [curves(directory / "metrics.jsonl") for directory in directories]
        checks[start] = check_eq_16(directories, models[start], prompts, sampling, SAMPLES, BETA)

    claims += likelihood_claims(last_values(runs), checks["preferred"]["expected"])
    claims += eq_16_claims(checks)
    return {"beams": beams, "runs": runs, "eq_16": checks, "claims": claims}


def search_policy(policy: Path, prompts: list[str], limits: Sampling) -> list[Samples]:
    """The best completion of each prompt at each of WIDTHS, as `scripts/sample.py --beams` finds it."""
    model, tokenizer, eos_ids = load_sampler(str(policy), limits.dtype)
    examples = [prompt_example(prompt) for prompt in prompts]
    prompt_ids = encode_prompts(str(policy), examples, tokenizer, prompt_room(model, limits.max_new_tokens))

    samples = []
    for width in tqdm(WIDTHS, f"search {policy.name}", unit="width"):
        best = search_completions(model, eos_ids, prompt_ids, 1, width, 0.0, limits)
        completions = ([ids] for ((ids, _),) in best)
        samples.append(collect_samples(prompt_ids, completions, tokenizer, eos_ids))
    return samples


def beam_values(samples: list[Samples], pairs: list[dict]) -> dict[str, Tensor]:
    """Each of MEASURES (n, W), by width. samples: of each width, one completion of each pair's prompt.

    The win rate is that of one completion against the pair's preferred one: 1, 0, or 0.5 if their rewards are equal.
    """
    examples = [prompt_example(pair["prompt"]) for pair in pairs]
    preferred = [prompt_example(pair["prompt"], pair["chosen"]) for pair in pairs]
    chosen_rewards = torch.tensor(rewards_of("notices", preferred), dtype=torch.double).unsqueeze(1)

    rewards = []
    wins = []
    lengths = []
    for samples_of_width in samples:
        width_rewards = rewards_of_samples("notices", examples, samples_of_width)
        rewards.append(width_rewards)
        wins.append(win_rates(width_rewards, chosen_rewards))
        lengths.append(lengths_of(samples_of_width))
    return {"reward": torch.cat(rewards, 1), "win_rate": torch.stack(wins, 1), "length": torch.cat(lengths, 1)}


def means_by_width(values: dict[str, Tensor], seed: int) -> dict[str, list[dict]]:
    """For each of MEASURES, the mean over prompts and its interval at each width. values: what `beam_values` gives."""
    means = {}
    for measure in MEASURES:
        columns = values[measure].unbind(1)
        means[measure] = [mean_and_interval(column, seed) for column in columns]
    return means


def curves(path: Path) -> dict[str, list[float]]:
    """Implicit rewards of held-out pairs in nats, by step, from a metrics.jsonl."""
    steps = []
    chosen = []
    rejected = []
    average = []
    for line in read_jsonl(path):
        if "eval/loss" not in line:
            continue
        steps.append(line["step"])
        chosen.append(line["eval/rewards/chosen"])
        rejected.append(line["eval/rewards/rejected"])
        average.append((chosen[-1] + rejected[-1]) / 2)
    return {"step": steps, "average": average, "chosen": chosen, "rejected": rejected}


def last_values(runs: dict[str, list[dict]]) -> dict[str, dict[str, list[float]]]:
    """For each start of DPO, each of REWARDS at the end of each run."""
    values: dict[str, dict[str, list[float]]] = {}
    for start, start_runs in runs.items():
        values[start] = {}
        for name in REWARDS:
            values[start][name] = [run[name][-1] for run in start_runs]
    return values


def mean_and_range(values: list[float]) -> dict:
    """Mean and range over runs of one value per run."""
    mean = sum(values) / len(values)
    return {"mean": mean, "interval": (min(values), max(values))}


# ---------------------------------------------------------------- statements of the paper


def claim(text: str, number: dict, sign: int, form: str = ".3f") -> dict:
    """A statement that a number is above 0 (sign 1), below 0 (-1) or equal to 0 (0), the number, and the verdict."""
    low, high = number["interval"]
    found_sign = 0
    if low > 0:
        found_sign = 1
    if high < 0:
        found_sign = -1

    verdict = "not resolved"
    if found_sign == sign:
        verdict = "as in the paper"
    elif found_sign != 0 or low == high:
        verdict = "NOT as in the paper"

    relation = {0: "= 0", 1: "> 0", -1: "< 0"}[sign]
    return {"statement": f"{text} {relation}", "found": interval_text(number, form), "verdict": verdict}


def beam_claims(beta: float, values: dict[str, Tensor], seed: int) -> list[dict]:
    """Section 5.2, as differences between widths on the same prompts."""
    claims = []
    for measure, more, fewer, sign in (("win_rate", 5, 1, 1), ("win_rate", 20, 5, -1), ("length", 20, 1, 1)):
        with_more = values[measure][:, WIDTHS.index(more)]
        with_fewer = values[measure][:, WIDTHS.index(fewer)]
        difference = mean_and_interval(with_more - with_fewer, seed)
        text = f"Fig. 2, β = {beta}: {MEASURES[measure]}, {more} beams less {fewer}"
        claims.append(claim(text, difference, sign, FORMATS[measure]))
    return claims


def likelihood_claims(ends: dict[str, dict[str, list[float]]], expected: list[float]) -> list[dict]:
    """Section 5.4, in the values after training.

    ends: what `last_values` gives. expected: -β KL(π_ref ‖ π) after SFT on chosen, of each run.
    """
    without_sft = ends["sft"]
    after_sft = ends["preferred"]
    margins = differences(after_sft["chosen"], after_sft["rejected"])
    gaps = differences(after_sft["chosen"], expected)
    falls = differences(after_sft["chosen"], without_sft["chosen"])

    statements = (
        (f"{STARTS['preferred']}: chosen", after_sft["chosen"], -1),
        (f"{STARTS['preferred']}: rejected", after_sft["rejected"], -1),
        (f"{STARTS['preferred']}: chosen less rejected", margins, 1),
        (f"{STARTS['preferred']}: chosen less -β KL(π_ref ‖ π)", gaps, 0),
        (f"{STARTS['sft']}: chosen", without_sft["chosen"], 1),
        (f"{STARTS['sft']}: average", without_sft["average"], 0),
        (f"chosen, {STARTS['preferred']} less {STARTS['sft']}", falls, -1),
    )
    claims = []
    for text, values, sign in statements:
        claims.append(claim(f"Fig. 3, {text} (nats)", mean_and_range(values), sign))
    return claims


def differences(values: list[float], others: list[float]) -> list[float]:
    """Of each run, the first value less the other."""
    return [value - other for value, other in zip(values, others, strict=True)]


def eq_16_claims(checks: dict[str, dict]) -> list[dict]:
    """What follows from Eq 16 for any two policies."""
    claims = []
    for start, check in checks.items():
        text = f"Eq 16, π_ref {STARTS[start]}"
        left_side = mean_and_range(check["expected"])
        claims.append(claim(f"{text}: left side (nats per completion)", left_side, -1))
        claims.append(claim(f"{text}: drawn tokens less left side (nats per completion)", check["gap"], 0))
    return claims


# ---------------------------------------------------------------- tables


def markdown(results: dict) -> str:
    """All numbers, intervals or ranges in brackets."""
    claim_cells = [list(line.values()) for line in results["claims"]]
    note = (
        "The SFT model wrote both summaries of a pair: without SFT on chosen, Eq 16 is about their average.\n"
        "The paper's base model wrote neither."
    )
    paragraphs = [
        "## Fig. 2: beam search",
        beam_table(results["beams"]),
        f"## Fig. 3: implicit rewards of held-out pairs after training (nats), β = {BETA}",
        likelihood_table(last_values(results["runs"]), results["eq_16"]),
        note,
        f"## Eq 16 at the states of completions drawn from π_ref (nats), β = {BETA}",
        eq_16_table(results["eq_16"]),
        "## Statements of the paper",
        markdown_table(("statement", "found", ""), claim_cells),
    ]
    return "\n\n".join(paragraphs) + "\n"


def beam_table(beams: dict[str, dict]) -> str:
    """A line for each β and width."""
    rows = []
    for beta, numbers in beams.items():
        for i, width in enumerate(WIDTHS):
            cells = [beta, str(width)]
            for measure, form in FORMATS.items():
                cells.append(interval_text(numbers[measure][i], form))
            rows.append(cells)
    return markdown_table(("β", "beams", *MEASURES.values()), rows)


def likelihood_table(ends: dict[str, dict[str, list[float]]], checks: dict[str, dict]) -> str:
    """A line for each π_ref."""
    rows = []
    for start, name in STARTS.items():
        columns = [ends[start][reward] for reward in REWARDS]
        columns.append(checks[start]["expected"])
        rows.append([name, *map(range_text, columns)])
    return markdown_table(("π_ref", *REWARDS, "-β KL(π_ref ‖ π), Eq 16"), rows)


def eq_16_table(checks: dict[str, dict]) -> str:
    """A line for each π_ref."""
    columns = ["π_ref", "states", "largest difference of the sides", "largest left side", "mean left side"]
    columns += ["mean reward of the drawn tokens", "left side per completion", "drawn tokens per completion"]
    columns += ["difference"]

    rows = []
    for start, name in STARTS.items():
        check = checks[start]
        cells = [name, str(check["states"])]
        for number in ("deviation", "largest", "state", "drawn_state"):
            cells.append(f"{check[number]:.1e}")
        cells.append(range_text(check["expected"]))
        cells.append(range_text(check["drawn"]))
        cells.append(interval_text(check["gap"], ".3f"))
        rows.append(cells)
    return markdown_table(columns, rows)


def range_text(values: list[float]) -> str:
    """Mean and range over runs."""
    return interval_text(mean_and_range(values), ".3f")


# ---------------------------------------------------------------- figures


def plot_beams(path: Path, beams: dict[str, dict]) -> None:
    """Fig. 2: one panel per measure, one line per β, 95% intervals."""
    figure, panels = plots.canvas([[measure] for measure in MEASURES], (3.4, 6))
    lines: list[Any] = []  # one per β, of the last panel
    for i, numbers in enumerate(beams.values()):
        positions = [width * 1.08 ** (i - 1) for width in WIDTHS]  # side by side
        look: dict[str, Any] = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2}
        for measure, axes in panels.items():
            means = torch.tensor([number["mean"] for number in numbers[measure]])
            intervals = torch.tensor([number["interval"] for number in numbers[measure]])
            errors = (intervals - means.unsqueeze(1)).abs()
            line = axes.errorbar(positions, means, errors.T, **look)
        lines.append(line)

    for measure, axes in panels.items():
        axes.set_xscale("log")
        axes.set_xticks(WIDTHS, list(map(str, WIDTHS)))
        axes.minorticks_off()
        plots.label_axes(axes, "", "", MEASURES[measure])
    panels["length"].set_xlabel("beams")

    # Lines run through every corner of a panel.
    names = [f"β = {beta}" for beta in beams]
    figure.legend(lines, names, loc="outside upper center", ncols=len(beams), fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=300)


def plot_likelihoods(path: Path, runs: dict[str, list[dict]], checks: dict[str, dict]) -> None:
    """Fig. 3: one panel per π_ref, a thin line per run and a thick one for their mean."""
    figure, panels = plots.canvas([[start] for start in STARTS], (3.4, 5))
    for start, axes in panels.items():
        steps = runs[start][0]["step"]
        axes.axhline(0, color=plots.GREY, linewidth=0.8)
        for name, style, color in zip(REWARDS, LINE_STYLES, COLORS, strict=True):
            values = torch.tensor([run[name] for run in runs[start]])  # (seeds, evaluations)
            axes.plot(steps, values.T, style, color=color, linewidth=0.6, alpha=0.6)
            axes.plot(steps, values.mean(0), style, color=color, label=name)

        ends = checks[start]["expected"]
        last_step = [steps[-1]] * len(ends)
        axes.plot(last_step, ends, "k*", markersize=4, clip_on=False, label="−β KL(π_ref ‖ π)")
        plots.label_axes(axes, STARTS[start], "", "implicit reward (nats)")

    panels["preferred"].set_xlabel("optimizer steps")
    legend = panels["preferred"].get_legend()
    assert legend is not None, "the lines of both panels have labels"
    legend.remove()  # the other panel has the same
    panels["preferred"].sharey(panels["sft"])
    figure.savefig(path, format="png", dpi=300)


# ---------------------------------------------------------------- command line


def main(args: Args) -> None:
    """All stages, then numbers, figures and tables."""
    started = time.perf_counter()
    run = args.run_dir.resolve()
    out = run / "token_figures"
    held_out = read_held_out(run, out, args.num_prompts)
    plots.require_matplotlib()

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    lines = [line.format(run=shell_path(run), out=shell_path(out)) for line in stages(args)]
    all_stages = Stages(out / RECORD, lines)
    all_stages.write_record()
    write_jsonl(out / "held_out.jsonl", held_out)
    all_stages.run()

    results = results_of(run, out, args)
    text = markdown(results)
    with replacing(out / "beams.png") as temporary:
        plot_beams(temporary, results["beams"])
    with replacing(out / "likelihoods.png") as temporary:
        plot_likelihoods(temporary, results["runs"], results["eq_16"])
    write_text(out / "token_figures.md", text)

    seconds = time.perf_counter() - started
    all_stages.write_record(seconds=seconds, **results)
    print(f"\n{text}\n{seconds:.0f} s in all; the same in {out / 'token_figures.md'}, the figures beside it")


if __name__ == "__main__":
    checked_command(main, Args)
