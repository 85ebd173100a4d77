"""One self-contained report.html of a quickstart: training curves, SFT against DPO, and samples with their mistakes.

Reads what `scripts/quickstart.py` leaves in a directory: `sft/` and `dpo/` (run.json, metrics.jsonl), `results.json`
of `scripts/evaluate.py`, and `quickstart.json` with the commands that were run.

    python scripts/report.py --run-dir runs/quickstart
"""

import html
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import notices
import tyro
from figures import BLUE, GREEN, GREY, ORANGE, PURPLE

from shared import UserError

POLICY_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
MEASURES = {
    "reward": ("Reward", "oracle reward, at most 5", ".2f"),
    "kl": ("KL to the reference", "nats", ".2f"),
    "length": ("Length", "tokens", ".1f"),
    "win_rate": ("Win rate", "share of pairs won", ".3f"),
}
SAMPLES_PER_POLICY = 2


@dataclass(kw_only=True)
class Args:
    """One self-contained report.html of a quickstart."""

    run_dir: Path = Path("runs/quickstart")
    """directory that `quickstart.py` has written"""
    output: Path | None = None
    """html file to write; default: report.html in the run directory"""


@dataclass
class Line:
    """One curve; `metric` is the metric's name, on held-out rows it stands after `eval/`."""

    label: str
    held_out: str
    color: str
    metric: str


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises UserError where they cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


# ---------------------------------------------------------------- pictures


def to_svg(figure) -> str:
    """The figure as inline SVG that scales with the page and refers to nothing outside it."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # in HTML the namespaces are known; the size comes from the style sheet
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )


def new_axes(x_label: str, y_label: str, width: float = 4.6):
    """A figure of one panel, `width` x 3 inches, its frame reduced to two axes, its text left as text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": GREY}
    pyplot.rcParams.update(style | {"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(width, 3), layout="constrained")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def curves(metrics: list[dict], lines: list[Line], y_label: str) -> str:
    """Metrics over optimizer steps: training as a line, held-out rows as points where there are any."""
    figure, axes = new_axes("optimizer step", y_label)
    for line in lines:
        points = [(row["step"], row[line.metric]) for row in metrics if line.metric in row]
        axes.plot(*zip(*points, strict=True), color=line.color, linewidth=1.5, label=line.label)
        name = f"eval/{line.metric}"
        held_out = [(row["step"], row[name]) for row in metrics if name in row]
        if held_out:
            style = dict(color=line.color, marker="o", markersize=5, linestyle="none", markeredgecolor="white")
            axes.plot(*zip(*held_out, strict=True), **style, label=line.held_out)
    axes.legend(frameon=False, fontsize=9)
    return to_svg(figure)


def intervals(policies: dict, measure: str) -> str:
    """One measure of all policies: means as points, 95% intervals as bars."""
    _, unit, form = MEASURES[measure]
    figure, axes = new_axes("", unit, width=3)
    for i, (policy, color) in enumerate(zip(policies.values(), POLICY_COLORS, strict=False)):
        mean, (low, high) = policy[measure]["mean"], policy[measure]["interval"]
        axes.errorbar(
            i, mean, [[mean - low], [high - mean]], fmt="o", color=color, capsize=5, markersize=7, linewidth=2
        )
        axes.annotate(f"{mean:{form}}", (i, mean), (12, 0), textcoords="offset points", va="center", color=color)
    axes.set_xticks(range(len(policies)), list(policies))
    axes.set_xlim(-0.6, len(policies) - 0.4)
    axes.margins(y=0.25)
    if measure == "kl":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return to_svg(figure)


def histogram(policies: dict) -> str:
    """The share of samples at each reward, in bins of half a point (the oracle's step)."""
    figure, axes = new_axes("oracle reward of a sample (bins of 0.5)", "share of samples")
    values = {name: [r for row in policy["rewards"] for r in row] for name, policy in policies.items()}
    low = min(map(min, values.values()))
    high = max(map(max, values.values()))
    edges = [low - 0.25 + 0.5 * i for i in range(round(2 * (high - low)) + 2)]
    for (name, rewards), color in zip(values.items(), POLICY_COLORS, strict=False):
        weights = [1 / len(rewards)] * len(rewards)
        axes.hist(rewards, edges, weights=weights, color=color, alpha=0.22)
        axes.hist(rewards, edges, weights=weights, color=color, histtype="step", linewidth=1.5, label=name)
    axes.legend(frameon=False, loc="upper left")
    return to_svg(figure)


def panel(title: str, svg: str) -> str:
    """A picture under its title."""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


# ---------------------------------------------------------------- texts


def mark_html(prompt: str, completion: str) -> str:
    """The completion as HTML: correct facts green, wrong ones red, clauses without a new fact grey."""
    out, clause = [], []
    for word, mark in [*notices.mark_words(prompt, completion), ("", notices.NEITHER)]:
        if re.match(r"\w", word):
            clause.append((word, mark))
            continue
        out.append(clause_html(clause) + html.escape(word))
        clause = []
    return " ".join(filter(None, out)) or "<i>(empty)</i>"


def clause_html(clause: list[tuple[str, int]]) -> str:
    """The words between two punctuation marks; one without a new fact is superfluous."""
    text = " ".join(html.escape(word) for word, _ in clause)
    if not any(mark for _, mark in clause):
        return f'<span class="superfluous">{text}</span>' if text else ""
    classes = {notices.CORRECT: "correct", notices.WRONG: "wrong"}
    words = [
        f'<span class="{classes[mark]}">{html.escape(word)}</span>' if mark in classes else html.escape(word)
        for word, mark in clause
    ]
    return " ".join(words)


def samples_html(results: dict) -> str:
    """Posts, and below each a few summaries of every policy with their rewards."""
    blocks = []
    for i, prompt in enumerate(results["prompts"]):
        rows = []
        for name, policy in results["policies"].items():
            drawn = zip(policy["completions"][i], policy["rewards"][i], strict=True)
            for text, reward in islice(drawn, SAMPLES_PER_POLICY):
                cells = f'<th>{html.escape(name)}</th><td class="number">{reward:.1f}</td>'
                rows.append(f"<tr>{cells}<td>{mark_html(prompt, text)}</td></tr>")
        post = html.escape(prompt.removesuffix(notices.CUE).strip())
        blocks.append(f'<div class="sample"><p class="post">{post}</p><table>{"".join(rows)}</table></div>')
    return "".join(blocks)


def table_html(policies: dict) -> str:
    """Means with their 95% intervals, one row per policy."""
    head = "".join(f"<th>{title}<br><small>{unit}</small></th>" for title, unit, _ in MEASURES.values())
    rows = []
    for name, policy in policies.items():
        cells = []
        for key, (_, _, form) in MEASURES.items():
            mean, (low, high) = policy[key]["mean"], policy[key]["interval"]
            cells.append(f"<td>{mean:{form}}<br><small>[{low:{form}}, {high:{form}}]</small></td>")
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def commands_html(quickstart: dict) -> str:
    """The commands as they were run, each with its seconds."""
    lines = [f"{html.escape(c['command'])}  <i># {c['seconds']:.0f} s</i>" for c in quickstart["commands"]]
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
    """The curves of both runs."""

    def one(color: str, metric: str) -> list[Line]:
        return [Line("training", "held out", color, metric)]

    likelihoods = [
        Line("chosen", "chosen, held out", GREEN, "logps/chosen"),
        Line("rejected", "rejected, held out", PURPLE, "logps/rejected"),
    ]
    panels = [
        panel("SFT: loss", curves(sft, one(BLUE, "loss"), "nats per token")),
        panel("DPO: loss", curves(dpo, one(ORANGE, "loss"), "nats per pair")),
        panel("DPO: reward margin", curves(dpo, one(ORANGE, "rewards/margins"), "β · log-ratio (nats)")),
        panel("DPO: accuracy", curves(dpo, one(ORANGE, "rewards/accuracies"), "share of pairs ranked right")),
        panel("DPO: log-probabilities", curves(dpo, likelihoods, "log π(y|x) (nats)")),
    ]
    return f'<div class="panels">{"".join(panels)}</div>'


def introduction(results: dict, sft: dict, dpo: dict) -> str:
    """What was done, in three sentences, from the arguments and counts of the runs."""
    demonstrations, pairs, settings = sft["data"]["train"], dpo["data"]["train"], results["settings"]
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


def page(run_dir: Path) -> str:
    """The whole report as HTML."""
    results, quickstart = read_json(run_dir / "results.json"), read_json(run_dir / "quickstart.json")
    sft, dpo = (read_json(run_dir / name / "run.json") for name in ("sft", "dpo"))
    sft_metrics, dpo_metrics = (read_metrics(run_dir / name / "metrics.jsonl") for name in ("sft", "dpo"))
    policies = results["policies"]
    comparison = "".join(panel(MEASURES[name][0], intervals(policies, name)) for name in MEASURES)
    versions = ", ".join(f"{name} {version}" for name, version in dpo["versions"].items())
    commit = f", commit {dpo['commit'][:12]}" if dpo["commit"] else ""
    reference = html.escape(results["settings"]["reference"])
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
<div class="panels">{panel("Distribution of the reward", histogram(policies))}</div>
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
<p class="note">{html.escape(f"{versions}{commit}, {dpo['device']}; {quickstart['seconds']:.0f} s in all.")}</p>
</body></html>
"""


def main(args: Args) -> None:
    """Write the report."""
    output = args.output or args.run_dir / "report.html"
    try:
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_text(page(args.run_dir), encoding="utf-8")
        os.replace(temporary, output)
    except (UserError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ImportError as error:
        print(
            f'report.py: {error}; install the pictures\' library with pip install -e ".[plot]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
