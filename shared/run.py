"""A training run: its output directory, its log, evaluation, checkpoints, and how it is stopped and resumed."""

import dataclasses
import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from shared import NonFinite, Preempted, UserError, checkpoint
from shared.batches import Batches
from shared.command import UNEXPECTED, check_arguments, exit_hooks
from shared.directory import OutputDirectory
from shared.distributed import all_sum, from_main, inference, join_processes, unsharded
from shared.export import model_card
from shared.files import storage_errors
from shared.metrics import Meter, Totals, add_totals, means
from shared.model import PackedModel

# arguments that may change when a run is resumed, because they do not change its result; of rows and models the
# contents are compared, not the names
FREE_ON_RESUME = (
    "output_dir",
    "resume",
    "model",
    "reference",
    "train_data",
    "eval_data",
    "micro_batch_tokens",
    "shard_size",
    "activation_checkpointing",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "track",
)
# what a line on the console leaves out
HIDDEN = ("step", "epoch", "seconds", "logps/", "token_rewards/", "negative_tokens/", "rm/")
WHAT_NEXT = "docs/metrics.md explains the curves (scripts/plot.py), and scripts/evaluate.py compares the policies"

Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class StopSignal:
    """SIGTERM: asks a run to save its state and stop.

    While steps are running, the signal is noted, and all processes agree on it at the end of a step. Before the first
    step there is nothing to save, and after the last one everything is saved, so then the process stops at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.steps_have_begun = False
        self.can_resume_from_last_step = False  # the steps are over, and the last one is saved
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if self.asked:
            return
        self.asked = True
        if not self.steps_have_begun:
            raise Preempted("asked to stop before the first step; start again")
        if self.can_resume_from_last_step:
            raise Preempted("asked to stop after the last step; continue with --resume")


class Run:
    """One training run, as the loop in `main` sees it."""

    # set by `resume`
    _model: PackedModel
    _optimizer: Optimizer
    _train: Batches
    _data_reports: dict[str, dict]  # what became of the rows of each set

    def __init__(self, args: Any):
        """Join the other processes and claim the output directory.

        Raises UserError if another run has the directory, or an argument is out of its range.
        """
        if not args.output_dir:
            raise UserError("--output-dir: must not be empty")
        self.args = args
        self.algorithm = Path(str(sys.modules[type(args).__module__].__file__)).stem
        self.directory = Path(args.output_dir)
        self.stop_signal = StopSignal()
        self.ranks = join_processes(args.dtype, args.shard_size)
        self.meter = Meter(self.ranks)

        self.step = 0  # the last one that is done
        self._steps_done = 0  # when this process began
        self.stopping = False  # a process was asked to stop, and all know it
        self._output = OutputDirectory(self.directory)
        self._bar: tqdm | None = None
        self._events: Any = None  # the TensorBoard writer
        # since the last line of the log, over all processes
        self._totals: Totals = {}
        self._tokens = 0
        self._timed_steps = 0  # of this process
        self._clock = 0.0

        problem = None
        if self.ranks.is_main:
            problem = self._claim_directory()
        problem = from_main(problem)
        if problem:
            raise UserError(f"--output-dir {self.directory}: {problem}")
        if not self.ranks.is_main:
            exit_hooks.append(self._close)
        check_arguments(args)

    def _claim_directory(self) -> str | None:
        problem = self._output.claim(may_hold_run=self.args.resume)
        if problem is None:
            exit_hooks.append(self._close)  # from here on, status.json says how the run ends
            self._output.write_status("running", self.step, "")
        return problem

    def _close(self, code: int, reason: str) -> None:
        """Write how the run ended to status.json."""
        if self._bar is not None:
            self._bar.close()
        if code == UNEXPECTED and "timed out" in reason.lower():
            reason += f"; waited for rank {self.ranks.unresponsive_ranks()}"
        self._output.write_final_status(code, self.step, reason, self.ranks.is_main)
        if code == 0:
            self.say(f"{self.directory}: done; {WHAT_NEXT}")

    # ---------------------------------------------------------------- before the first step

    def resume(self, model: PackedModel, optimizer: Optimizer, train: Batches, held_out: Batches | None) -> int:
        """Start the steps. With --resume, continue after the newest intact checkpoint.

        Returns the last step that is done, 0 for a new run.
        Raises UserError if the checkpoint was written by a run that computes something else.
        """
        self._model = model
        self._optimizer = optimizer
        self._train = train
        if self.args.warmup_steps > train.last_step:
            raise UserError(f"--warmup-steps {self.args.warmup_steps}: the run has {train.last_step} steps")
        self._data_reports = {"train": train.groups.report}
        if held_out is not None:
            self._data_reports["eval"] = held_out.groups.report
        self.stop_signal.steps_have_begun = True

        if self.args.resume:
            path = checkpoint.newest(self.directory, self.ranks)
            if path is not None:
                self._restore(path)
        if self.ranks.is_main:
            self._truncate_log()
            self._write_run_file()
            if self.args.track:
                self._events = _event_writer(self.directory, self.step)

        hide = self.ranks.hides_progress
        self._bar = tqdm(total=train.last_step, initial=self.step, desc="train", disable=hide)
        self._clock = time.perf_counter()
        self._note_last_step()
        self._steps_done = self.step
        return self.step

    def _restore(self, path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        differences = self._differences(state)
        if differences:
            hint = ""
            if any(difference.startswith(("epochs", "max_steps")) for difference in differences):
                hint = "; its learning rate depends on the number of steps, unless --lr-schedule is constant"
            raise UserError(f"--resume: {path} was written by another run: {', '.join(differences)}{hint}")
        if state["step"] > self._train.last_step:
            raise UserError(f"--resume: {path} is beyond the last step, {self._train.last_step}")

        self.step = state["step"]
        self._totals = state["totals"]
        self.say(f"resumed from {path}")
        checkpoint.load(path, self.step, self._model, self._optimizer, self.ranks)

    def _differences(self, state: dict) -> list[str]:
        """The settings that differ from those of the checkpoint's run and would change the result."""
        saved = {"algorithm": state["algorithm"], **state["args"]}
        current = {"algorithm": self.algorithm, **dataclasses.asdict(self.args)}
        free = list(FREE_ON_RESUME)
        if not self._depends_on_last_step():
            free += ["epochs", "max_steps"]

        differences = []
        for name, value in current.items():
            if name not in free and saved.get(name) != value:
                differences.append(f"{name} {saved.get(name)!r} → {value!r}")
        if state["data"]["train"] != self._train.groups.report["sha256"]:
            differences.append("the train rows")
        for name, fingerprint in self._model.fingerprints.items():
            if state["weights"].get(name) != fingerprint:
                differences.append(f"the {name}'s weights")
        return differences

    def _depends_on_last_step(self) -> bool:
        """Whether the result of a step depends on the number of steps.

        It does if the learning rate decays, or if an argument changes over the run: a pair, NAME_start and NAME_end.
        """
        if self.args.lr_schedule != "constant":
            return True
        for name, start in vars(self.args).items():
            end = getattr(self.args, name.removesuffix("_start") + "_end", start)
            if name.endswith("_start") and start != end:
                return True
        return False

    def _truncate_log(self) -> None:
        """Remove from metrics.jsonl what an interrupted run wrote after the step that this one resumes from."""
        path = self.directory / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                is_whole = line.endswith("}")
                if is_whole and json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
        self._output.write("metrics.jsonl", "".join(kept))

    def _write_run_file(self) -> None:
        versions = {"python": platform.python_version()}
        for name in ("torch", "transformers"):
            if name in sys.modules:
                versions[name] = sys.modules[name].__version__
        run = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(self.args),
            "data": self._data_reports,
            "steps": self._train.last_step,
            "processes": self.ranks.world_size,
            "device": str(self.ranks.device),
            "versions": versions,
            "commit": _git_commit(),
        }
        self._output.write("run.json", json.dumps(run, indent=2) + "\n")

    # ---------------------------------------------------------------- a step

    def reduce_metrics(self) -> Totals:
        """The sums and counts of the step's losses and metrics over all processes."""
        totals, self.stopping = self.meter.reduce(self.stop_signal.asked)
        return totals

    def stop_if_not_finite(self, step: int, totals: Totals, grad_norm: Tensor) -> None:
        """Call it before the update.

        Raises NonFinite, with the rows to blame, if the loss or the gradient norm is not a finite number.
        """
        loss = means(totals)["loss"]
        norm = float(unsharded(grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            culprits = self._rows_without_finite_loss(step)
            raise NonFinite(f"step {step}: loss {loss}, gradient norm {norm}; {culprits}; the weights were not updated")

    def _rows_without_finite_loss(self, step: int) -> str:
        """The ranks and rows of micro-batches whose loss is not finite, or all rows of the step if there is none."""
        row_numbers = self._train.groups.row_numbers
        local_rows: list[int] = []
        for batch, loss_sum in zip(self._train.of_step(step), self.meter.loss_sums, strict=True):
            if not loss_sum.isfinite():
                local_rows += row_numbers[batch.group_index.cpu()].tolist()

        rows_of_ranks: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(rows_of_ranks, local_rows)
        culprits = [f"rank {rank}, rows {rows}" for rank, rows in enumerate(rows_of_ranks) if rows]
        if culprits:
            return "; ".join(culprits)
        return f"all ranks, rows {row_numbers[self._train.groups_of(step)].tolist()}"

    # ---------------------------------------------------------------- after a step

    def log(self, step: int, totals: Totals, grad_norm: Tensor) -> None:
        """Count the step as done. Every `--log-every` steps, write a line of the log.

        It holds the means over all groups since the last line; the gradient norm and the learning rate are the step's.
        """
        self.step = step
        self._totals = add_totals(self._totals, totals)
        self._timed_steps += 1
        self._tokens += int(self._train.group_sizes[self._train.groups_of(step)].sum())
        assert self._bar is not None
        self._bar.update()
        if not self._is_due(self.args.log_every, step):
            return

        now = time.perf_counter()
        seconds = now - self._clock
        line = {
            "step": step,
            "epoch": step / self._train.steps_per_epoch,
            **means(self._totals),
            "grad_norm": float(unsharded(grad_norm)),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "seconds": seconds / self._timed_steps,
            "tokens_per_second": self._tokens / seconds,
        }
        self._clock = now
        self._totals = {}
        self._tokens = 0
        self._timed_steps = 0
        self._write_line(line, [name for name in line if not name.startswith(HIDDEN)])

    def evaluates_at(self, step: int) -> bool:
        """Whether held-out rows are evaluated after this step; 0 is the start of a run, and not of its continuation."""
        is_known = step > 0 and step == self._steps_done
        return self.args.eval_data is not None and self._is_due(self.args.eval_every, step) and not is_known

    def evaluate(
        self, step: int, objective: Objective, model: PackedModel, held_out: Batches | None, choose: Any = None
    ) -> None:
        """Every `--eval-every` steps, write a line with the objective and its metrics over all held-out rows.

        choose: computes, from all of them, the objective's last argument. A run that is asked to stop gives the
        evaluation up, so that there is time to save.
        """
        if held_out is None or not self.evaluates_at(step):
            return

        started = time.perf_counter()
        progress = max(0, step - 1) / max(1, self._train.last_step - 1)  # of training, which γ depends on
        chosen: tuple = ()
        if choose is not None:
            chosen = (choose(model, held_out.all_batches(), self.args),)
        with inference(model):
            for batch in held_out.all_batches():
                batch.progress = progress
                losses, metrics = objective(model, batch, self.args, *chosen)
                self.meter.add(losses, metrics)
                asked = torch.tensor(float(self.stop_signal.asked))
                self.stopping = self.stopping or bool(all_sum(asked) > 0)
                if self.stopping:
                    return

        totals, self.stopping = self.meter.reduce(self.stop_signal.asked)
        values = {f"eval/{name}": value for name, value in means(totals).items()}
        self._write_line({"step": step, **values}, values)
        self._clock += time.perf_counter() - started  # evaluation does not count as time of the steps

    def save(self, step: int, model: PackedModel, optimizer: Optimizer) -> None:
        """Every `--save-every` steps, and when the run is asked to stop, write a checkpoint.

        It holds everything that the next step depends on. Raises Preempted if the run was asked to stop.
        """
        if self.stopping or self._is_due(self.args.save_every, step):
            state = {
                "algorithm": self.algorithm,
                "args": dataclasses.asdict(self.args),
                "data": {name: report["sha256"] for name, report in self._data_reports.items()},
                "weights": model.fingerprints,
                "totals": self._totals,
            }
            checkpoint.save(self.directory, step, model, optimizer, state, self.args.keep, self.ranks)
        if self.stopping:
            raise Preempted(f"asked to stop; saved at step {step}, continue with --resume")
        self._note_last_step()

    def _note_last_step(self) -> None:
        if self.step == self._train.last_step and self.args.save_every:
            self.stop_signal.can_resume_from_last_step = True

    def _is_due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens after this step."""
        return every > 0 and (step % every == 0 or step == self._train.last_step)

    # ---------------------------------------------------------------- what is written

    def model_card(self) -> str:
        """The README.md of the trained model: what it is, and how to train it again."""
        return model_card(self.algorithm, dataclasses.asdict(self.args))

    def _write_line(self, line: dict[str, float], shown: Iterable[str]) -> None:
        """Append a line to metrics.jsonl, and print some of its values."""
        if self.ranks.is_main:
            finite = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
            path = self.directory / "metrics.jsonl"
            with storage_errors(path), open(path, "a") as file:
                file.write(json.dumps(finite) + "\n")
            if self._events is not None:
                for name in line.keys() - {"step"}:
                    self._events.add_scalar(name, line[name], line["step"])

        values = " | ".join(f"{name} {line[name]:.4g}" for name in shown)
        self.say(f"step {line['step']}/{self._train.last_step} | {values}")

    def say(self, text: str) -> None:
        """Print one line from the first process, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(text)


def _git_commit() -> str | None:
    """The commit of this checkout, or None outside of one and without git."""
    command = "git rev-parse HEAD"
    process = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    return process.stdout.strip() or None


def _event_writer(directory: Path, step: int) -> Any:
    """A TensorBoard writer that hides what an interrupted run wrote after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--track needs TensorBoard: pip install -e '.[track]'") from None
    return SummaryWriter(directory / "events", purge_step=step + 1)
