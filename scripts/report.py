"""One self-contained report.html of a quickstart: training curves, SFT against DPO, and samples with their mistakes.

Reads what `scripts/quickstart.py` leaves in a directory: `sft/` and `dpo/` (run.json, metrics.jsonl), `results.json`
of `scripts/evaluate.py`, and `quickstart.json` with the commands that were run.

    python scripts/report.py --run-dir runs/quickstart
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scripts.lab import notices
from scripts.lab.commands import checked_command
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, require_matplotlib, to_svg
from scripts.lab.runs import HELD_OUT, read_json, read_log, series
from scripts.lab.statistics import interval_text
from shared import StorageError, UserError
from shared.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POLICY_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
GRID_COLOR = "#e4e4e4"
SAMPLES_PER_POLICY = 2
BIN = 0.5  # of the rewards, the oracle's step


class Measure(NamedTuple):
    """One of the measures that policies are compared by."""

    title: str
    unit: str
    form: str


MEASURES = {
    "reward": Measure("Reward", "oracle reward, at most 5", ".2f"),
    "kl": Measure("KL to the reference", "nats", ".2f"),
    "length": Measure("Length", "tokens", ".1f"),
    "win_rate": Measure("Win rate", "share of pairs won", ".3f"),
}


@dataclass(kw_only=True)
class Args:
    """One self-contained report.html of a quickstart."""

    run_dir: Path = Path("runs/quickstart")
    """directory that `quickstart.py` has written"""
    output: Path | None = None
    """html file to write; default: report.html in the run directory"""


@dataclass
class Curve:
    """One metric over the steps of a run; for held-out rows its name is `metric` after `eval/`."""

    metric: str
    color: str
    label: str = "training"
    held_out_label: str = "held out"


# ---------------------------------------------------------------- plots


def new_axes(x_label: str, y_label: str, width: float = 4.6) -> tuple["Figure", "Axes"]:
    """A figure of one panel, `width` x 3 inches, with horizontal lines behind what is plotted."""
    figure, panels = canvas([["panel"]], (width, 3))
    axes = panels["panel"]
    axes.spines[["left", "bottom"]].set_edgecolor(GREY)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def training_plot(metrics: list[dict], curves: list[Curve], y_label: str) -> str:
    """Metrics over optimizer steps: training as a line, held-out rows as points if there are any."""
    figure, axes = new_axes("optimizer step", y_label)
    for curve in curves:
        values = series(metrics, curve.metric)
        axes.plot(list(values), list(values.values()), color=curve.color, linewidth=1.5, label=curve.label)

        held_out = series(metrics, HELD_OUT + curve.metric)
        if held_out:
            axes.plot(
                list(held_out),
                list(held_out.values()),
                color=curve.color,
                marker="o",
                markersize=5,
                linestyle="none",
                markeredgecolor="white",
                label=curve.held_out_label,
            )
    # above the axes, where it hides no point
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return to_svg(figure)


def comparison_plot(policies: dict[str, dict], measure: str) -> str:
    """One measure of all policies: means as points, 95% intervals as bars."""
    _, unit, form = MEASURES[measure]
    figure, axes = new_axes("", unit, width=3)
    for i, (policy, color) in enumerate(zip(policies.values(), POLICY_COLORS, strict=False)):
        mean = policy[measure]["mean"]
        low, high = policy[measure]["interval"]
        bars = [[mean - low], [high - mean]]
        axes.errorbar(i, mean, bars, fmt="o", color=color, capsize=5, markersize=7, linewidth=2)
        axes.annotate(format(mean, form), (i, mean), (12, 0), textcoords="offset points", va="center", color=color)

    axes.set_xticks(range(len(policies)), list(policies))
    axes.set_xlim(-0.6, len(policies) - 0.4)
    axes.margins(y=0.25)
    if measure == "kl":
        bottom, _ = axes.get_ylim()
        axes.set_ylim(bottom=min(0.0, bottom))
    return to_svg(figure)


def reward_plot(policies: dict[str, dict]) -> str:
    """The share of samples at each reward."""
    rewards = {}
    for name, policy in policies.items():
        rewards[name] = [reward for prompt_rewards in policy["rewards"] for reward in prompt_rewards]
    low = min(min(values) for values in rewards.values())
    high = max(max(values) for values in rewards.values())
    num_edges = round((high - low) / BIN) + 2
    edges = [low - BIN / 2 + BIN * i for i in range(num_edges)]

    figure, axes = new_axes(f"oracle reward of a sample (bins of {BIN})", "share of samples")
    for (name, values), color in zip(rewards.items(), POLICY_COLORS, strict=False):
        shares = [1 / len(values)] * len(values)
        axes.hist(values, edges, weights=shares, color=color, alpha=0.22)
        axes.hist(values, edges, weights=shares, color=color, histtype="step", linewidth=1.5, label=name)
    axes.legend(frameon=False, loc="upper left")
    return to_svg(figure)


def panel(title: str, svg: str) -> str:
    """A plot under its title."""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


# ---------------------------------------------------------------- texts


def mark_html(prompt: str, completion: str) -> str:
    """The completion as HTML: correct facts green, wrong ones red, clauses without a new fact grey."""
    pieces = []
    clause: list[tuple[str, int]] = []
    for word, mark in notices.mark_words(prompt, completion):
        if re.match(r"\w", word):
            clause.append((word, mark))
        else:
            pieces.append(clause_html(clause) + html.escape(word))
            clause = []
    pieces.append(clause_html(clause))

    text = " ".join(piece for piece in pieces if piece)
    return text or "<i>(empty)</i>"


def clause_html(clause: list[tuple[str, int]]) -> str:
    """The words between two punctuation marks; a clause without a new fact is superfluous."""
    if not clause:
        return ""
    if all(mark == notices.NEITHER for _, mark in clause):
        text = " ".join(html.escape(word) for word, _ in clause)
        return span("superfluous", text)

    words = []
    for word, mark in clause:
        text = html.escape(word)
        if mark == notices.CORRECT:
            text = span("correct", text)
        elif mark == notices.WRONG:
            text = span("wrong", text)
        words.append(text)
    return " ".join(words)


def span(name: str, text: str) -> str:
    """HTML in the style of one of the marks."""
    return f'<span class="{name}">{text}</span>'


def samples_html(results: dict) -> str:
    """Posts, and below each of them a few summaries of every policy with their rewards."""
    blocks = []
    for i, prompt in enumerate(results["prompts"]):
        rows = []
        for name, policy in results["policies"].items():
            samples = list(zip(policy["completions"][i], policy["rewards"][i], strict=True))
            for text, reward in samples[:SAMPLES_PER_POLICY]:
                cells = f'<th>{html.escape(name)}</th><td class="number">{reward:.1f}</td>'
                rows.append(f"<tr>{cells}<td>{mark_html(prompt, text)}</td></tr>")

        post = html.escape(prompt.removesuffix(notices.CUE).strip())
        blocks.append(f'<div class="sample"><p class="post">{post}</p><table>{"".join(rows)}</table></div>')
    return "".join(blocks)


def table_html(policies: dict[str, dict]) -> str:
    """Means with their 95% intervals, one row per policy."""
    headings = ""
    for measure in MEASURES.values():
        headings += f"<th>{measure.title}<br><small>{measure.unit}</small></th>"

    rows = ""
    for name, policy in policies.items():
        cells = ""
        for key, measure in MEASURES.items():
            mean, interval = interval_text(policy[key], measure.form).split(" ", 1)
            cells += f"<td>{mean}<br><small>{interval}</small></td>"
        rows += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{headings}</tr>{rows}</table></div>'


def commands_html(quickstart: dict) -> str:
    """The commands as they were run, each with its seconds."""
    lines = []
    for stage in quickstart["commands"]:
        lines.append(f"{html.escape(stage['command'])}  <i># {stage['seconds']:.0f} s</i>")
    return "<pre>" + "\n".join(lines) + "</pre>"


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; color: #222; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 20px; margin: 44px 0 12px; }
p { max-width: 44em; margin: 0 0 12px; }
small, .note { color: #666; font-size: 13.5px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); gap: 20px 24px; }
.panels.four { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
figure { margin: 0; max-width: 480px; }
.four figure { max-width: 320px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.numbers { min-width: 560px; width: 100%; margin-bottom: 20px; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { text-align: left; vertical-align: top; padding: 8px 14px 8px 0; }
.numbers tr { border-bottom: 1px solid #e4e4e4; }
.numbers small { font-weight: 400; }
.sample { padding: 14px 0; border-top: 1px solid #e4e4e4; }
.sample th, .sample td { text-align: left; vertical-align: top; padding: 2px 14px 2px 0; font-weight: 400; }
.sample th { color: #666; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.post { font-style: italic; margin-bottom: 8px; max-width: 60em; }
.correct { color: #00704f; font-weight: 600; }
.wrong { color: #c1121f; font-weight: 600; text-decoration: underline wavy 1px; text-underline-offset: 3px; }
.superfluous { color: #8a8a8a; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 14px; font-size: 13px;
  line-height: 1.6; border-radius: 4px; }
pre i { color: #777; }
"""


def training_html(sft: list[dict], dpo: list[dict]) -> str:
    """The curves of both runs, from their metrics."""
    sft_loss = Curve("loss", BLUE)
    dpo_loss = Curve("loss", ORANGE)
    margins = Curve("rewards/margins", ORANGE)
    accuracies = Curve("rewards/accuracies", ORANGE)
    chosen = Curve("logps/chosen", GREEN, "chosen", "chosen, held out")
    rejected = Curve("logps/rejected", PURPLE, "rejected", "rejected, held out")

    panels = [
        panel("SFT: loss", training_plot(sft, [sft_loss], "nats per token")),
        panel("DPO: loss", training_plot(dpo, [dpo_loss], "nats per pair")),
        panel("DPO: reward margin", training_plot(dpo, [margins], "β · log-ratio (nats)")),
        panel("DPO: accuracy", training_plot(dpo, [accuracies], "share of pairs ranked right")),
        panel("DPO: log-probabilities", training_plot(dpo, [chosen, rejected], "log π(y|x) (nats)")),
    ]
    return f'<div class="panels">{"".join(panels)}</div>'


def introduction(results: dict, sft: dict, dpo: dict) -> str:
    """Three sentences on how the results came about, from the arguments and counts of the runs."""
    demonstrations = sft["data"]["train"]
    pairs = dpo["data"]["train"]
    settings = results["settings"]
    return (
        f"<p>A Llama of about a million parameters, randomly initialised, learned by SFT ({sft['steps']} steps of "
        f"{sft['args']['batch_size']}) to summarise notices from {demonstrations['kept']:,} imperfect demonstrations. "
        f"It wrote two summaries of each of {pairs['rows']:,} new posts, an oracle that knows every fact said which of "
        f"the two is better, and DPO (β = {dpo['args']['beta']}, {dpo['steps']} steps of "
        f"{dpo['args']['batch_size']}) trained it on the {pairs['kept']:,} usable pairs. Both policies then wrote "
        f"{settings['num_samples']} summaries of each of {settings['num_prompts']} held-out posts, at temperature "
        f"{settings['temperature']:g}; the oracle's reward counts correct facts, minus wrong ones, minus 0.5 per "
        f"superfluous clause.</p>"
    )


def versions_text(run: dict) -> str:
    """Versions and commit of a run, from its run.json."""
    parts = [f"{name} {version}" for name, version in run["versions"].items()]
    if run["commit"]:
        parts.append(f"commit {run['commit'][:12]}")
    return ", ".join(parts)


def page(run_dir: Path) -> str:
    """The whole report as HTML."""
    results = read_json(run_dir / "results.json")
    quickstart = read_json(run_dir / "quickstart.json")
    sft = read_json(run_dir / "sft" / "run.json")
    dpo = read_json(run_dir / "dpo" / "run.json")
    sft_metrics = read_log(run_dir / "sft" / "metrics.jsonl")
    dpo_metrics = read_log(run_dir / "dpo" / "metrics.jsonl")

    policies = results["policies"]
    comparison = ""
    for key, measure in MEASURES.items():
        comparison += panel(measure.title, comparison_plot(policies, key))
    rewards = panel("Distribution of the reward", reward_plot(policies))
    reference = html.escape(results["settings"]["reference"])
    footer = html.escape(f"{versions_text(dpo)}, {dpo['device']}; {quickstart['seconds']:.0f} s in all.")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quickstart: SFT, then DPO</title><style>{STYLE}</style></head><body>
<h1>Quickstart: SFT, then DPO</h1>
{introduction(results, sft, dpo)}
<h2>SFT against DPO</h2>
<p class="note">Means over the held-out posts with 95% bootstrap intervals (posts resampled). The KL is estimated on
each policy's own samples, to {reference}; the win rate compares all pairs of samples of the same post, ties
count half, and the first policy is the baseline.</p>
{table_html(policies)}
<div class="panels four">{comparison}</div>
<h2>Rewards of single samples</h2>
<div class="panels">{rewards}</div>
<h2>Training</h2>
<p class="note">Lines: means over the training rows since the last logged step. Points: held-out rows; those of SFT
are perfect summaries, unlike its training rows, and so have the lower loss.</p>
{training_html(sft_metrics, dpo_metrics)}
<h2>Samples</h2>
<p class="note">Facts that are <span class="correct">correct</span> or <span class="wrong">wrong</span>, and
<span class="superfluous">clauses that state no new fact</span>. The number is the oracle's reward. The first
completions drawn, not picked.</p>
{samples_html(results)}
<h2>How to run this again</h2>
{commands_html(quickstart)}
<p class="note">{footer}</p>
</body></html>
"""


def main(args: Args) -> None:
    """Write the report."""
    require_matplotlib()
    output = args.output or args.run_dir / "report.html"
    try:
        write_text(output, page(args.run_dir))
    except StorageError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    checked_command(main, Args)
