"""Write checkpoints of a run as model directories, while the run goes on or after its end.

    --step N        the checkpoint of this step
    --best METRIC   of the checkpoints that are there, the one with the best held-out metric in metrics.jsonl
    --every N       each checkpoint at a multiple of N steps, and as long as the run goes on also those that appear

The model is bit for bit the one that a run which ended at that step would export. Any number of processes may have
written the checkpoint. The run's starting model is read again, and must be as it was. It is looked for where the run
found it, from the directory where the command starts; `--model` says where else it is. The rows are needed for a reward
model alone, whose pad token is one that they do not hold, and whose `reward_mean` is computed over them.

A run keeps its newest checkpoints alone (`--keep`). For a curve over training, save often and export what appears:

    python algos/dpo.py … --save-every 100 --output-dir runs/dpo &
    python scripts/export.py runs/dpo --every 100
    for model in runs/dpo/models/step-*; do python scripts/evaluate.py --policies dpo=$model …; done

    python scripts/export.py runs/dpo --step 200 --output-dir runs/dpo_200
    python scripts/export.py runs/dpo --best rewards/accuracies
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import tyro

from scripts.lab.commands import checked_command
from scripts.lab.model_files import is_written, new_directory, refuse_existing
from shared import UserError, checkpoint, first_line
from shared.batches import Batches, load_batches
from shared.command import PositiveInt
from shared.distributed import Ranks, all_sum, from_main, join_processes
from shared.export import export, model_card, read_json
from shared.groups import Requires
from shared.loading import REWARD_HEAD, load_policy, load_reward_model, load_tokenizer
from shared.model import Policy, RewardModel, mean_reward

POLL_SECONDS = 1.0  # between looks at a run that goes on
LOWER_IS_BETTER = ("loss",)  # by the last part of a metric's name
HIGHER_IS_BETTER = ("accuracies", "margins", "chosen")


@dataclass(kw_only=True)
class Args:
    """Write checkpoints of a run as model directories."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """output directory of the run"""
    step: PositiveInt | None = None
    """write the checkpoint of this step"""
    best: str | None = None
    """write the checkpoint with the best value of this held-out metric, such as loss"""
    better: Literal["lower", "higher"] | None = None
    """which values of the metric are better; known for losses, accuracies, margins and what is chosen"""
    every: PositiveInt | None = None
    """write every checkpoint at a multiple of so many steps, until the run ends"""
    output_dir: Path | None = None
    """directory to write, with --every the one of all models; default: models/step-000100 in that of the run"""
    model: str | None = None
    """directory or hub id of the starting model of the run, if it has moved"""
    train_data: str | None = None
    """rows of training of a reward model, if they have moved"""
    eval_data: str | None = None
    """held-out rows of a reward model, if they have moved"""


def main(args: Args) -> None:
    """Choose the checkpoints, and write them as models."""
    choices = [args.step, args.best, args.every]
    if choices.count(None) != len(choices) - 1:
        raise UserError("give one of --step, --best and --every")
    if args.every is not None:
        wait_for_start(args.run)
    description = read_json(args.run / "run.json")
    if description is None:
        raise UserError(f"{args.run}: is no run, it has no run.json")
    ranks = join_processes(description["args"]["dtype"], None)
    write_models(args, ranks)


def write_models(args: Args, ranks: Ranks) -> None:
    """Write the models that the arguments choose."""
    if args.every is not None:
        follow(args, ranks)
        return
    paths = from_main(checkpoint.published(args.run / "checkpoints"))
    path = choose(args, paths, from_main(log_lines(args.run)))
    output_dir = args.output_dir or args.run / "models" / path.name
    refuse_existing(output_dir)
    check_intact(path, ranks)
    Exporter(args, path, ranks).write(path, output_dir)


# ---------------------------------------------------------------- which checkpoints


def choose(args: Args, paths: list[Path], lines: list[dict]) -> Path:
    """The checkpoint of --step or --best. Raises UserError if there is none."""
    path_of = {checkpoint.step_of(path): path for path in paths}
    if not path_of:
        raise UserError(f"{args.run}: has no checkpoints yet; --save-every says when a run writes them")
    if args.best is not None:
        return path_of[best_step(args, list(path_of), lines)]
    assert args.step is not None
    if args.step not in path_of:
        raise UserError(f"--step {args.step}: {args.run} has checkpoints of the steps {listed(path_of)}")
    return path_of[args.step]


def best_step(args: Args, steps: list[int], lines: list[dict]) -> int:
    """The step with the best value of a held-out metric, of those with a checkpoint; the first of equals."""
    assert args.best is not None
    name = "eval/" + args.best.removeprefix("eval/")
    better = args.better or direction(name)
    values = held_out_values(args.run, lines, name)
    candidates = {step: values[step] for step in steps if step in values}
    if not candidates:
        evaluated = f"the metric was evaluated at the steps {listed(values)}, checkpoints are of {listed(steps)}"
        raise UserError(f"--best {args.best}: {evaluated}; let --save-every be a multiple of --eval-every")

    choose_one = min if better == "lower" else max
    step = choose_one(candidates, key=lambda step: candidates[step])
    say(f"{args.run}: step {step} has the {better[:-2]}est {name}, {values[step]:.4g}, of {listed(candidates)}")
    best = choose_one(values, key=lambda step: values[step])
    if values[best] != values[step]:
        say(f"{args.run}: better was {values[best]:.4g} at step {best}, of which there is no checkpoint")
    return step


def direction(name: str) -> str:
    """Whether a lower or a higher value of a metric is better. Raises UserError if its name does not tell."""
    last = name.rpartition("/")[2]
    if last in LOWER_IS_BETTER:
        return "lower"
    if last in HIGHER_IS_BETTER:
        return "higher"
    raise UserError(f"--best {name}: give --better lower or --better higher")


def held_out_values(run: Path, lines: list[dict], name: str) -> dict[int, float]:
    """{step: value} of a held-out metric. Raises UserError if the run has not logged it."""
    values = {}
    names = set()
    for line in lines:
        names |= {known for known in line if known.startswith("eval/")}
        if line.get(name) is not None:  # as a value that is not finite
            values[line["step"]] = line[name]
    if not names:
        raise UserError(f"{run}: has evaluated no held-out rows; train with --eval-data")
    if not values:
        known = ", ".join(sorted(name.removeprefix("eval/") for name in names))
        raise UserError(f"--best {name.removeprefix('eval/')}: not in metrics.jsonl, which has {known}")
    return values


def log_lines(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def listed(steps: Iterable[int]) -> str:
    return ", ".join(str(step) for step in sorted(steps))


def say(line: str) -> None:
    """Print a line from the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# ---------------------------------------------------------------- a run that goes on


def follow(args: Args, ranks: Ranks) -> None:
    """Write each checkpoint at a multiple of --every that has no model yet, until the run has ended."""
    assert args.every is not None
    directory = args.output_dir or args.run / "models"
    exporter = None
    goes_on = True
    while goes_on:
        goes_on = from_main(is_running(args.run))  # first, so that no checkpoint comes between
        for path in from_main(due_checkpoints(args.run, args.every, directory)):
            exporter = write_if_there(args, exporter, path, directory / path.name, ranks)
        if goes_on:
            time.sleep(POLL_SECONDS)
    report_missing(args.run, args.every, directory)


def write_if_there(
    args: Args, exporter: "Exporter | None", path: Path, output_dir: Path, ranks: Ranks
) -> "Exporter | None":
    """Write a checkpoint, unless the run has deleted it meanwhile. Returns the exporter, which the first one makes."""
    try:
        check_intact(path, ranks)
        exporter = exporter or Exporter(args, path, ranks)
        exporter.write(path, output_dir)
    except UserError:
        if from_main(path.exists()):
            raise
    return exporter


def due_checkpoints(run: Path, every: int, directory: Path) -> list[Path]:
    """The checkpoints at a multiple of so many steps that have no model yet, oldest first."""
    due = []
    for path in checkpoint.published(run / "checkpoints"):
        if checkpoint.step_of(path) % every == 0 and not is_written(directory / path.name):
            due.append(path)
    return due


def wait_for_start(run: Path) -> None:
    """Wait until a run has a run.json, which it writes before its first step. Raises UserError if it ended earlier."""
    if not (run / "run.json").exists():
        say(f"waiting for {run}/run.json")
    while not (run / "run.json").exists():
        status = read_json(run / "status.json")
        if status is not None and status["state"] != "running":
            raise UserError(f"{run}: ended before its first step: {status['reason']}")
        time.sleep(POLL_SECONDS)


def is_running(run: Path) -> bool:
    """Whether the run says so. One that was killed says it until it is resumed."""
    status = read_json(run / "status.json")
    return status is not None and status["state"] == "running"


def report_missing(run: Path, every: int, directory: Path) -> None:
    """Say for which steps there is no model."""
    last = max((line["step"] for line in log_lines(run)), default=0)
    missing = []
    for step in range(every, last + 1, every):
        if not is_written(directory / f"step-{step:06d}"):
            missing.append(step)
    if missing:
        say(f"{run}: there was no checkpoint of the steps {listed(missing)}; see --save-every and --keep")


# ---------------------------------------------------------------- a model


def check_intact(path: Path, ranks: Ranks) -> None:
    """Raises UserError if a checkpoint is damaged or gone. Each process reads its share of the files."""
    problem = checkpoint.problem_of(path, ranks)
    problems = torch.tensor(float(problem is not None), device=ranks.device)
    if all_sum(problems):
        raise UserError(f"{path}: {problem or 'is damaged'}; a run deletes all but its newest --keep checkpoints")


class Exporter:
    """The starting model of a run in memory, to be given the weights of its checkpoints."""

    def __init__(self, args: Args, path: Path, ranks: Ranks):
        self.run = args.run
        self.ranks = ranks
        self.train: Batches | None = None  # of a reward model
        state = read_state(path)
        settings = SimpleNamespace(**{"lora_rank": None, "lora_alpha": None, **state["args"]})  # older runs have none
        settings.output_dir = str(args.run)
        settings.resume = True  # so that a chat template writes the date of the run
        for name in ("model", "train_data", "eval_data"):
            moved = getattr(args, name)
            if moved is not None:
                setattr(settings, name, moved)
        self.tokenizer, config = load_tokenizer(settings.model)
        self.model: Policy | RewardModel
        with reading(path):
            names = checkpoint.tensor_names(path)
        settings.compile = False
        if f"lm.{REWARD_HEAD}" in names:
            requires = Requires("ranking")
            self.train, held_out = load_batches(settings, ranks, self.tokenizer, config, requires)
            if self.train.groups.report["sha256"] != state["data"]["train"]:
                raise UserError(f"{settings.train_data}: has changed since the run {self.run}")
            self.model = load_reward_model(settings, ranks, self.tokenizer, self.train, held_out)
        else:
            settings.activation_checkpointing = False
            self.model = load_policy(settings, ranks)
        if self.model.fingerprints["model"] != state["weights"]["model"]:
            raise UserError(f"model {settings.model}: has changed since the run {self.run} started from it")

    def write(self, path: Path, output_dir: Path) -> None:
        """Write an intact checkpoint as a model directory."""
        state = read_state(path)
        with reading(path):
            checkpoint.load_weights(path, self.model, self.ranks)
        step = state["step"]
        if self.train is not None:
            assert isinstance(self.model, RewardModel)
            self.model.lm.config.reward_mean = mean_reward(self.model, self.train)

        card = model_card(state["algorithm"], state["args"], f"This is the checkpoint of step {step}.\n\n")
        with ExitStack() as stack:
            directory = output_dir
            if self.ranks.is_main:
                directory = stack.enter_context(new_directory(output_dir))
            export(self.model, self.tokenizer, directory, card, self.ranks)
        say(f"{output_dir}: the model of step {step} of {self.run}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a checkpoint into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def read_state(path: Path) -> dict:
    """What a checkpoint says about its run. Raises UserError if it cannot be read."""
    state = read_json(path / "state.json")
    if state is None:
        raise UserError(f"{path}: has no readable state.json")
    return state


if __name__ == "__main__":
    checked_command(main, Args)
