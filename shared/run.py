"""What surrounds every training loop: command line, output directory, log, evaluation, status and exit codes."""

import argparse
import dataclasses
import fcntl
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from shared import NonFinite, Preempted, StorageError, UserError, checkpoint, writing
from shared.data import Batch, Batches, Groups, Needs, describe, load
from shared.distributed import all_sum, from_main, inference, setup

EXIT = {UserError: 2, NonFinite: 3, StorageError: 4, OSError: 4, Preempted: 75, KeyboardInterrupt: 130}
# what may differ between a run and its resumption; all else would change the result
FREE = "output_dir resume micro_batch_tokens shard_size activation_checkpointing".split()
FREE += "log_every eval_every save_every keep track".split()

# ---------------------------------------------------------------- command line


def command(main: Callable, arguments: type) -> None:
    """Read the arguments, run `main`, and end the process with the exit code and status that say how it went."""
    code, reason = 0, ""
    try:
        try:
            args = parse(arguments, sys.modules[main.__module__].__doc__ or "")
            if not hasattr(args, "resume"):  # a `Run` checks its own, so that its status.json tells of them
                check_arguments(args)
            main(args)
        finally:  # what ends already, however it ends, is not asked to once more
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except tuple(EXIT) as error:
        code = next(c for kind, c in EXIT.items() if isinstance(error, kind))
        reason = "interrupted" if code == 130 else str(error)
        if code == 4 or int(os.environ.get("RANK", 0)) == 0:  # the others end for the same reason
            print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    except Exception as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
        if Run.current is not None and "timed out" in reason.lower():
            reason += f"; waited for rank {Run.current.place.silent()}"
    if Run.current is not None:
        Run.current.close(code, reason)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and dist.is_initialized():
        dist.barrier()
    os._exit(code)  # gloo's threads can abort an ordinary interpreter exit


def parse(arguments: type, doc: str):
    """The dataclass from the command line; what `--config run.json` holds comes first, so that flags override it."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    file, argv = files.parse_known_args()
    if file.config is not None:
        try:
            values = json.loads(Path(file.config).read_text(encoding="utf-8"))
            values = values.get("args", values)
            if unknown := values.keys() - {field.name for field in dataclasses.fields(arguments)}:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            argv = [*_words(values), *argv]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--config {file.config}: not a run.json of this algorithm ({error})") from None
    about = doc.partition("\n")[0] + " --config FILE: arguments of a run.json, under those given beside it."
    return tyro.cli(arguments, args=argv, description=about)


def _words(values: dict) -> list[str]:
    """Arguments as a command line writes them."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


ABOVE_0 = (
    "beta tau lam beta_r epsilon batch_size micro_batch_tokens shard_size epochs max_steps max_length "
    "max_prompt_length max_grad_norm log_every keep num_completions reference_samples temperature top_p "
    "repetition_penalty max_new_tokens batch_tokens max_rows num_prompts num_samples steps"
).split()
AT_LEAST_0 = (
    "learning_rate weight_decay warmup_steps eval_every save_every label_smoothing seed gamma_start gamma_end top_k"
).split()
AT_MOST = {"label_smoothing": 0.5, "epsilon": 0.5, "top_p": 1, "seed": 2**32 - 1}  # at 0.5 a label says nothing


def check_arguments(args) -> None:
    """Numbers out of their range, and empty names, end the run before anything is loaded."""
    above_0 = set(ABOVE_0) - ({"beta"} if hasattr(args, "proxy") else set())  # a proxy may steer by nothing
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"--{name.replace('_', '-')}: must not be empty")
        if value is None or name not in ABOVE_0 + AT_LEAST_0:
            continue
        least, most = "above" if name in above_0 else "of at least", AT_MOST.get(name, math.inf)
        if not 0 <= value <= most or value == math.inf or (value == 0 and name in above_0):
            most = "" if most == math.inf else f" and at most {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number {least} 0{most}")


def learning_rate(step: int, last_step: int, args) -> float:
    """The rate of step 1, 2, ..., S: linear warm-up to the full rate, then constant, or down to 0 just after S."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    left = (last_step - step + 1) / (last_step - args.warmup_steps)
    scale = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return args.learning_rate * scale[args.lr_schedule]


# ---------------------------------------------------------------- a run


class Run:
    """The output directory of one run, its log and its place among the processes."""

    current: "Run | None" = None

    def __init__(self, args):
        if not args.output_dir:
            raise UserError("--output-dir: must not be empty")
        self.args, self.out = args, Path(args.output_dir)
        self.algorithm, self.step, self.signalled, self.stopping = Path(sys.argv[0]).stem, 0, False, False
        self.train: Batches | None = None
        self.over = False  # the last step is done and saved
        self.sums: dict[str, list[Tensor]] = {}  # of this step and process, on the device
        self.counts: Counter[str] = Counter()
        self.totals: dict[str, list[float]] = {}  # sum and count since the last line, over all processes
        self.bar = self.events = None
        signal.signal(signal.SIGTERM, self._asked)
        self.place = setup(args.dtype, args.shard_size)
        problem = from_main(self._claim() if self.place.main else None)
        if problem:
            raise UserError(f"--output-dir {self.out}: {problem}")
        Run.current = self
        check_arguments(args)

    def _claim(self) -> str | None:
        """Lock the output directory; what is wrong with it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another run is writing there"
        except OSError as error:
            return f"cannot be written ({error.strerror})"
        if not self.args.resume and any((self.out / f).exists() for f in ("metrics.jsonl", "model.safetensors")):
            return "holds another run; give --resume or another directory"
        Run.current = self  # from here on status.json says how it ends
        self._status("running", "")

    def _asked(self, *_) -> None:
        """SIGTERM: before the first step there is nothing to save, after the last all is; between, `check` and
        `evaluate` agree on it."""
        first, self.signalled = not self.signalled, True
        if first and self.train is None:
            raise Preempted("asked to stop before the first step; start again")
        if first and self.over and self.args.save_every:
            raise Preempted("asked to stop after the last step; continue with --resume")

    def _status(self, state: str, reason: str) -> None:
        self.write("status.json", json.dumps({"state": state, "step": self.step, "reason": reason}))

    def write(self, name: str, text: str) -> None:
        """A file of the output directory, which appears whole or not at all."""
        temporary = self.out / f".{name}.{os.getpid()}.tmp"
        with writing(self.out / name):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.out / name)

    def close(self, code: int, reason: str) -> None:
        """Write how the run ended to status.json."""
        if self.bar is not None:
            self.bar.close()
        names = {0: "done", 2: "refused", 3: "not finite", 4: "storage", 75: "preempted", 130: "interrupted"}
        try:
            state = json.loads((self.out / "status.json").read_text(encoding="utf-8"))["state"]
            # the first process to end says why; the others may end for no other reason than that
            if state == "running" and (code or self.place.main):
                self._status(names.get(code, "failed"), reason)
        except FileNotFoundError:
            pass  # it could not be written in the first place, which is the reason
        except (StorageError, OSError, ValueError) as error:
            print(f"{self.out}/status.json: cannot be written ({error})", file=sys.stderr)

    # -------- data

    def load_batches(self, tokenizer, config, needs: Needs) -> tuple[Batches, Batches | None]:
        """Training and held-out micro-batches; prints and keeps what happened to the rows, and one decoded example."""
        args, positions = self.args, getattr(config, "max_position_embeddings", None)
        length = args.max_length or positions or sys.maxsize
        if positions and length > positions:
            raise UserError(f"--max-length {length}: the model has {positions} positions")
        found, self.report = {"eval": None}, {}
        for name, source in (("train", args.train_data), ("eval", args.eval_data)):
            if source is None:
                continue
            groups = load(source, tokenizer, needs, length, args.max_prompt_length)
            check_fit(groups, config, source)
            self.report[name] = {"source": source, **groups.report}
            self.say(f"{name}: {source}: {describe(groups.report)}")
            seed = args.seed if args.shuffle and name == "train" else None
            found[name] = Batches(groups, args.batch_size, args.micro_batch_tokens, seed, self.place)
        train = found["train"]
        self.say(example(train.groups, tokenizer))
        steps = max(1, math.ceil(round(args.epochs * train.per_epoch, 6)))
        self.last_step = train.last_step = args.max_steps or steps
        return train, found["eval"]

    def say(self, text: str) -> None:
        """Print one line from the first process, above the progress bar."""
        if self.place.main:
            tqdm.write(text)

    # -------- the loop

    def steps(self, model: nn.Module, optimizer: Optimizer, train: Batches) -> Iterator[int]:
        """The steps still to do: 1 to S, or those after the newest checkpoint with --resume."""
        self.train, self.optimizer = train, optimizer
        if self.args.resume and (path := checkpoint.newest(self.out, self.place)):
            self._restore(json.loads((path / "state.json").read_text()), model, path)
            checkpoint.load(path, self.step, model, optimizer, self.place)
        if self.place.main:
            self._keep_lines()
            self._write_run()
            self.events = _events(self.out, self.step) if self.args.track else None
        self.bar = tqdm(total=self.last_step, initial=self.step, desc="train", disable=not self.place.main or None)
        self.clock, self.tokens = time.perf_counter(), 0
        yield from range(self.step + 1, self.last_step + 1)
        self.over = True

    def _restore(self, state: dict, model: nn.Module, path: Path) -> None:
        now = {"algorithm": self.algorithm, **dataclasses.asdict(self.args)}
        saved = {"algorithm": state["algorithm"], **state["args"]}
        same = self.args.lr_schedule == "constant" and now.get("gamma_start") == now.get("gamma_end")
        free = FREE + (["epochs", "max_steps"] if same else [])  # else the course depends on the last step
        changed = [f"{k} {saved.get(k)!r} → {now[k]!r}" for k in now if k not in free and saved.get(k) != now[k]]
        changed += [f"the {k} rows" for k, data in self.report.items() if state["data"].get(k) != data["sha256"]]
        changed += [f"the {name}'s weights" for name, sha in model.sha256.items() if state["weights"].get(name) != sha]
        if changed:
            raise UserError(f"--resume: {path} was written by another run: {', '.join(changed)}")
        if state["step"] > self.last_step:
            raise UserError(f"--resume: {path} is beyond the last step, {self.last_step}")
        self.step, self.totals = state["step"], state["totals"]
        self.say(f"resumed from {path}")

    def _keep_lines(self) -> None:
        """Cut metrics.jsonl after the step that is resumed from."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        self.write("metrics.jsonl", "".join(line + "\n" for line in kept))

    def _write_run(self) -> None:
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers") if m in sys.modules}
        shell = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
        commit = subprocess.run("git rev-parse HEAD", **shell).stdout.strip() or None  # None, too, without git
        run = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(self.args),
            "data": self.report,
            "steps": self.last_step,
            "processes": self.place.world,
            "device": str(self.place.device),
            "versions": {"python": platform.python_version(), **versions},
            "commit": commit,
        }
        self.write("run.json", json.dumps(run, indent=2) + "\n")

    def add(self, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        """Sum up one micro-batch for the log, without waiting for the device."""
        for name, values in {"loss": losses, **metrics}.items():
            self.sums.setdefault(name, []).append(values.detach().double().sum())
            self.counts[name] += values.numel()

    def _reduce(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric over the processes, in one exchange, with whether one was asked to stop."""
        self.sums["stop"] = [torch.tensor(self.signalled, dtype=torch.double, device=self.place.device)]
        names, (sums, counts) = list(self.sums), (self.sums, self.counts)
        self.sums, self.counts = {}, Counter()
        local = torch.stack([torch.stack(sums[name]).sum() for name in names])
        both = torch.stack([local, local.new_tensor([counts[name] for name in names])])
        totals = dict(zip(names, zip(*all_sum(both).tolist(), strict=True), strict=True))
        self.stopping = totals.pop("stop")[0] > 0
        return totals

    def check(self, step: int, grad_norm: Tensor) -> None:
        """Sum the step's metrics over the processes; a value that is not finite ends the run before the update."""
        losses, totals = self.sums["loss"], self._reduce()
        self.grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        loss = totals["loss"][0] / totals["loss"][1]
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            problem = f"step {step}: loss {loss}, gradient norm {self.grad_norm}; {self._blame(step, losses)}"
            raise NonFinite(f"{problem}; the weights were not updated")
        for name, (total, count) in totals.items():
            before = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = [before[0] + total, before[1] + count]
        self.tokens += int(self.train.sizes[self.train.rows(step)].sum())
        self.step = step

    def _blame(self, step: int, losses: list[Tensor]) -> str:
        """Which processes had which rows in micro-batches whose loss is not finite; else all rows of the step."""
        batches, groups = self.train(step), self.train.groups
        bad = [batch.rows.cpu() for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
        found = [None] * self.place.world
        dist.all_gather_object(found, [row for rows in bad for row in groups.rows[rows].tolist()])
        named = [f"rank {rank}, rows {rows}" for rank, rows in enumerate(found) if rows]
        return "; ".join(named) or f"all ranks, rows {groups.rows[self.train.rows(step)].tolist()}"

    def log(self, step: int) -> None:
        """Every `log_every` steps one line: the means over all groups since the last one, the rest as of this step."""
        self.bar.update()
        if not self.due(self.args.log_every, step):
            return
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        steps = (step - 1) % self.args.log_every + 1
        line = {
            "step": step,
            "epoch": step / self.train.per_epoch,
            **_means(self.totals),
            "grad_norm": self.grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds / steps,
            "tokens_per_second": self.tokens / seconds,
        }
        self.totals, self.tokens = {}, 0
        self._write(line, [name for name in SHOWN if name in line])

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens at this one."""
        return every > 0 and (step % every == 0 or step == self.last_step)

    def evaluate(self, step: int, objective: Callable, model: nn.Module, held_out: Iterable[Batch] | None) -> None:
        """The objective over all held-out rows, without gradients, as one line of `eval/` metrics.

        When asked to stop it is given up, so that there is time to save.
        """
        if self.args.eval_data is None or not self.due(self.args.eval_every, step):
            return
        started = time.perf_counter()
        with inference(model):
            for batch in held_out:
                batch.progress = (step - 1) / max(1, self.last_step - 1)
                self.add(*objective(model, batch, self.args))
                self.stopping = self.stopping or all_sum(torch.tensor(float(self.signalled))) > 0
                if self.stopping:
                    return
        means = {f"eval/{name}": value for name, value in _means(self._reduce()).items()}
        self._write({"step": step, **means}, means)
        self.clock += time.perf_counter() - started

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Every `save_every` steps, and when asked to stop, a checkpoint of everything that the next step needs."""
        if self.stopping or self.due(self.args.save_every, step):
            data = {name: report["sha256"] for name, report in self.report.items()}
            state = {"algorithm": self.algorithm, "args": dataclasses.asdict(self.args), "data": data}
            state |= {"weights": model.sha256, "totals": self.totals}
            checkpoint.save(self.out, step, model, optimizer, state, self.args.keep, self.place)
        if self.stopping:
            raise Preempted(f"asked to stop; saved at step {step}, continue with --resume")

    def card(self) -> str:
        """The model card: what this model is and how to make it again."""
        tags = f"---\nlibrary_name: transformers\nbase_model: {self.args.model}\ntags: [{self.algorithm}]\n---\n"
        settings = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(self.args).items())
        return f"{tags}\n# {self.args.model}, trained by {self.algorithm} with cleanpo\n\n{settings}\n"

    def _write(self, line: dict, shown: Iterable[str]) -> None:
        """A line of metrics.jsonl, of which some values are printed."""
        if self.place.main:
            with writing(self.out / "metrics.jsonl"), open(self.out / "metrics.jsonl", "a") as file:
                finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
                file.write(json.dumps(finite) + "\n")
            for name in line.keys() - {"step"} if self.events else ():
                self.events.add_scalar(name, line[name], line["step"])
        values = " | ".join(f"{name} {line[name]:.4g}" for name in shown)
        self.say(f"step {line['step']}/{self.last_step} | {values}")


def _events(out: Path, step: int):
    """A TensorBoard writer that hides what an interrupted run wrote after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--track needs TensorBoard: pip install 'cleanpo[track]'") from None
    return SummaryWriter(out / "events", purge_step=step + 1)


SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "tokens_per_second")


def _means(totals: dict) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items()}


def preference_metrics(rewards: Tensor, logps: Tensor | None = None) -> dict[str, Tensor]:
    """What every preference algorithm logs, per group: rewards (B, K), logps (B, K), preferred first → (B,) each.

    Chosen is column 0, rejected the mean of the others; a tie counts as wrong.
    """
    metrics = {}
    for name, values in {"rewards": rewards, "logps": logps}.items():
        if values is not None:
            metrics |= {f"{name}/chosen": values[:, 0], f"{name}/rejected": values[:, 1:].mean(1)}
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics | {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}


def plain_length(config) -> float:
    """The length up to which every token sees all before it, at the same rotary frequencies, as packed rows assume."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "sliding_window", None)]
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limits += [rope.get("original_max_position_embeddings"), config.max_position_embeddings]
    return min([limit for limit in limits if limit], default=math.inf)


def check_fit(groups: Groups, config, source: str) -> None:
    """Raises UserError for a token without an embedding, or more of them than the model sees as packed rows do."""
    largest, longest, most = int(groups.tokens.max()), groups.longest, plain_length(config)
    if largest >= config.vocab_size:
        raise UserError(f"{source}: token id {largest}, but the model embeds {config.vocab_size}")
    if longest > most:
        problem = f"beyond {most} tokens the model's attention window or rotary embedding changes; give --max-length"
        raise UserError(f"{source}: {longest} tokens, but {problem}")


def example(groups: Groups, tokenizer) -> str:
    """The first group as the model sees it, the boundary between prompt and first completion visible."""
    start, middle, end = groups.offsets[0, :3].tolist()
    prompt, completion = (tokenizer.decode(groups.tokens[a:b]) for a, b in ((start, middle), (middle, end)))
    return f"first row: {prompt[-300:]!r} | {completion[:300]!r}"
