"""Statements of a paper about trained models as functions, what they find in a small world, and the verdicts.

An experiment is a generator of findings with the number that the statement has in scripts/papers. The first paragraph
of its docstring is the paper's statement. The rest says how it is tried here, and where the effect does not show, what
else was tried and why it may not. `stages` names its stages for one seed. The function gets what this returned for each
of the seeds.

    STUDY = Study("dpo", "Direct Preference Optimization")

    class Frontier(NamedTuple):
        dpo: Stage

    def frontier(plan: Plan, seed: int) -> Frontier:
        sft = world_a(plan, seed).sft
        ...

    @STUDY.experiment("E1", "§6.1, Fig 2", frontier, quick=True)
    def dpo_has_the_best_frontier(runs: list[Frontier]) -> Iterator[Finding]:
        \"\"\"On IMDB sentiment DPO has the best frontier of reward against KL of all methods.

        Five values of β, three seeds.
        \"\"\"
        rewards = [torch.tensor(...) for run in runs]
        yield above_by_interval("reward less that of SFT", 0, mean_over_seeds(rewards))

    def main(args: Args) -> None:
        experiments_command(STUDY, args)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

from scripts.lab.claim_files import WORLD, print_findings, save_figure, statement_as_json
from scripts.lab.claims import Finding, Statement
from scripts.lab.commands import ROOT
from scripts.lab.pipeline import Plan
from scripts.lab.plots import require_matplotlib
from scripts.lab.statistics import interval_text
from shared import UserError
from shared.command import Above
from shared.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = TypeVar("Run")  # the stages of one seed, as an experiment names them
Check = Callable[[list[Run]], Iterable[Finding]]
Draw = Callable[[list[Run]], "Figure"]


class Reproduction(str, Enum):
    """What the findings of an experiment amount to."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT = "not reproduced"


@dataclass(frozen=True, kw_only=True)
class Experiment(Statement):
    """A statement that is tried on trained models."""

    stages: Callable[[Plan, int], Any]
    is_quick: bool


class Picture(NamedTuple):
    """A figure of what the stages have made."""

    caption: str
    stages: Callable[[Plan, int], Any]
    draw: Callable[[list], "Figure"]
    is_quick: bool


@dataclass
class Study:
    """The experiments and the figures on one paper, in order."""

    paper: str  # the name of its file in scripts/papers
    title: str
    experiments: list[Experiment] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)

    def experiment(
        self, number: str, where: str, stages: Callable[[Plan, int], Run], quick: bool = False
    ) -> Callable[[Check[Run]], Check[Run]]:
        """Register a function that tries a statement. `where` is its place in the paper; --quick runs quick ones alone.

        `stages` adds the stages of one seed to a plan, and returns those that the function needs.
        """

        def register(check: Check[Run]) -> Check[Run]:
            experiment = Experiment(number=number, where=where, check=check, stages=stages, is_quick=quick)
            self.experiments.append(experiment)
            return check

        return register

    def figure(
        self, caption: str, stages: Callable[[Plan, int], Run], quick: bool = False
    ) -> Callable[[Draw[Run]], Draw[Run]]:
        """Register a function that draws a figure. The caption says what it shows."""

        def register(draw: Draw[Run]) -> Draw[Run]:
            self.figures.append(Picture(caption, stages, draw, quick))
            return draw

        return register


@dataclass(kw_only=True)
class Args:
    """Run a paper's experiments."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the worlds, the models and the samples"""

    quick: bool = False
    """run the first seed and the quick experiments alone"""

    experiment: str | None = None
    """number of a single experiment, such as E1: print all its findings and write nothing"""

    plan: bool = False
    """print the command lines that all this takes, and end"""

    jobs: Annotated[int, Above(0)] = 2
    """stages that run at a time, each with one thread"""

    runs_dir: Path = ROOT / "runs" / "reproduce"
    """directory of the stages; what is finished there is not repeated, and the papers' programs share it"""

    output_dir: Path = ROOT / "results"
    """directory of the JSON file and the figures"""


# ---------------------------------------------------------------- findings with intervals


def above_by_interval(statement: str, bound: float, number: dict, form: str = ".2f") -> Finding:
    """State that a number is larger than a bound: its whole interval is. `form` is the format of what is shown."""
    low, _ = number["interval"]
    return _judged(statement, f"> {bound:g}", number, form, low > bound)


def below_by_interval(statement: str, bound: float, number: dict, form: str = ".2f") -> Finding:
    """State that a number is smaller than a bound: its whole interval is."""
    _, high = number["interval"]
    return _judged(statement, f"< {bound:g}", number, form, high < bound)


def between_by_interval(statement: str, least: float, largest: float, number: dict, form: str = ".2f") -> Finding:
    """State that a number lies between two bounds, such as ±δ for "about equal": its whole interval does."""
    low, high = number["interval"]
    holds = least < low and high < largest
    return _judged(statement, f"in [{least:g}, {largest:g}]", number, form, holds)


def reported_with_interval(statement: str, number: dict, form: str = ".2f") -> Finding:
    """A number for which nothing is expected, with its interval."""
    return _judged(statement, "", number, form, None)


def _judged(statement: str, expected: str, number: dict, form: str, holds: bool | None) -> Finding:
    low, high = number["interval"]
    return Finding(statement, expected, interval_text(number, form), holds, interval=(low, high))


def reproduction_of(findings: Iterable[Finding]) -> Reproduction:
    """The verdict that follows from an experiment's findings.

    What the paper says is reproduced if all of it holds, partly if some of it does. Numbers known beforehand have to be
    met for more than "partly". Raises ValueError if nothing is judged by a number with an interval.
    """
    paper = []
    known = []
    num_intervals = 0
    for finding in findings:
        if finding.role == "paper" and finding.holds is not None:
            paper.append(finding.holds)
            num_intervals += int(finding.interval is not None)
        if finding.role == "given" and finding.holds is not None:
            known.append(finding.holds)

    if num_intervals == 0:
        raise ValueError("an experiment needs a finding that is judged by a number with an interval")
    if all(paper + known):
        return Reproduction.REPRODUCED
    if any(paper):
        return Reproduction.PARTLY
    return Reproduction.NOT


# ---------------------------------------------------------------- the command


class Tried(NamedTuple):
    """What an experiment has found."""

    experiment: Experiment
    findings: list[Finding]
    verdict: Reproduction


class Runs:
    """What each function that names stages has named, for each of the seeds."""

    def __init__(self, plan: Plan, seeds: Iterable[int]):
        self.plan = plan
        self.seeds = list(seeds)
        self.named: dict[Callable[[Plan, int], Any], list] = {}

    def of(self, stages: Callable[[Plan, int], Run]) -> list[Run]:
        """The stages of each seed, added to the plan."""
        if stages not in self.named:
            self.named[stages] = [stages(self.plan, seed) for seed in self.seeds]
        return self.named[stages]


def experiments_command(study: Study, args: Args) -> None:
    """Run the stages of a paper's experiments, judge these, print the verdicts, and write them with the figures.

    The file is `{paper}_world.json`. With --experiment all findings of one are printed, and nothing is written.
    """
    experiments = chosen_experiments(study, args)
    figures = chosen_figures(study, args)
    runs = Runs(Plan(args.runs_dir), chosen_seeds(args))
    for stages in [*(experiment.stages for experiment in experiments), *(figure.stages for figure in figures)]:
        runs.of(stages)
    if args.plan:
        print("\n".join(runs.plan.command_lines()))
        return

    if figures:
        require_matplotlib()
    runs.plan.run(args.jobs)
    outcomes = [tried(experiment, runs) for experiment in experiments]
    if args.experiment is not None:
        for outcome in outcomes:
            print_findings(*outcome)
        return

    print_verdicts(study, outcomes)
    write_study(study, outcomes, figures, runs, args.output_dir)


def chosen_experiments(study: Study, args: Args) -> list[Experiment]:
    """The experiment of --experiment, the quick ones, or all. Raises UserError for a number that there isn't."""
    if args.experiment is not None:
        chosen = [experiment for experiment in study.experiments if experiment.number == args.experiment]
        if not chosen:
            numbers = ", ".join(experiment.number for experiment in study.experiments)
            raise UserError(f"--experiment {args.experiment}: the experiments on {study.title} are {numbers}")
        return chosen
    return [experiment for experiment in study.experiments if experiment.is_quick or not args.quick]


def chosen_figures(study: Study, args: Args) -> list[Picture]:
    """None beside a single experiment, the quick ones, or all."""
    if args.experiment is not None:
        return []
    return [figure for figure in study.figures if figure.is_quick or not args.quick]


def chosen_seeds(args: Args) -> tuple[int, ...]:
    """The seeds, or the first one for --quick. Raises UserError if there is none, or one twice."""
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: give at least one seed, and none twice")
    if args.quick:
        return args.seeds[:1]
    return args.seeds


def tried(experiment: Experiment, runs: Runs) -> Tried:
    """Judge an experiment whose stages have run."""
    findings = list(experiment.check(runs.of(experiment.stages)))
    return Tried(experiment, findings, reproduction_of(findings))


def print_verdicts(study: Study, outcomes: Iterable[Tried]) -> None:
    """Print each experiment with its verdict."""
    print(f"\n{study.title}: experiments\n")
    for experiment, _, verdict in outcomes:
        print(f"  {experiment.number:5} {experiment.where:24} {verdict.value:16} {experiment.statement}")


def write_study(
    study: Study, outcomes: Iterable[Tried], figures: Iterable[Picture], runs: Runs, directory: Path
) -> None:
    """Write the figures and all that docs/results.md shows of the experiments."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for figure in figures:
        name = f"{study.paper}{WORLD}_{figure.draw.__name__}.png"
        draw = partial(figure.draw, runs.of(figure.stages))
        drawn.append(save_figure(draw, figure.caption, name, directory))

    path = directory / f"{study.paper}{WORLD}.json"
    contents = {
        "command": f"python scripts/experiments/{study.paper}.py",
        "seeds": runs.seeds,
        "experiments": [statement_as_json(*outcome) for outcome in outcomes],
        "figures": drawn,
    }
    write_json(path, contents)
    print(f"\nwritten: {path}")
