"""A command line becomes arguments, a call of `main`, and an exit code."""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import torch.distributed as dist
import tyro

from shared import NonFinite, Preempted, StorageError, UserError

EXIT_CODES = {UserError: 2, NonFinite: 3, StorageError: 4, OSError: 4, Preempted: 75, KeyboardInterrupt: 130}
UNEXPECTED = 1
# in the errors of collectives, by gloo and by NCCL
SIGNS_OF_DEATH = ("Connection closed by peer", "Connection reset by peer", "remote process exited")

ALIASES = {"lr": "learning-rate"}
# Flags of TRL's scripts, and what stands here for them.
NAMES_ELSEWHERE = {
    "--model-name-or-path": "--model",
    "--dataset-name": "--train-data",
    "--ref-model-name-or-path": "--reference",
    "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size counts the groups of a step over all processes",
    "--gradient-accumulation-steps": "--batch-size counts the groups of a step, --micro-batch-tokens those of a pass",
    "--gradient-checkpointing": "--activation-checkpointing",
    "--lr-scheduler-type": "--lr-schedule",
    "--warmup-ratio": "--warmup-steps",
    "--bf16": "--dtype bfloat16",
    "--logging-steps": "--log-every",
    "--eval-steps": "--eval-every",
    "--save-steps": "--save-every",
    "--eval-strategy": "--eval-every",
    "--save-strategy": "--save-every",
    "--save-total-limit": "--keep",
    "--resume-from-checkpoint": "--resume",
    "--report-to": "--track writes TensorBoard events",
    "--loss-type": "each loss has a file of its own in algos/",
    "--use-peft": "--lora-rank",
    "--lora-r": "--lora-rank",
    "--precompute-ref-log-probs": "they always are",
    "--attn-implementation": "attention over packed rows is built in",
    "--trust-remote-code": "code from the hub is never run",
    "--push-to-hub": "the output directory is a model that can be uploaded",
    "--overwrite-output-dir": "delete the directory, or name another one",
}

# Called with the exit code and the reason before the process ends. A run writes its status.json there.
exit_hooks: list[Callable[[int, str], None]] = []


def command(main: Callable[[Any], None], arguments: Any) -> None:
    """Read the dataclass `arguments` from the command line, call `main` with it, and end the process.

    The exit code says how it went (EXIT_CODES). A user's mistake is one line on stderr.
    """
    code = 0
    reason = ""
    try:
        _run_main(main, arguments)
    except tuple(EXIT_CODES) as error:
        code = _exit_code(error)
        reason = str(error)
        if code == EXIT_CODES[KeyboardInterrupt]:
            reason = "interrupted"

        # An ordinary error ends all processes of a machine for the same reason. A disk may fail for one of them alone.
        if _is_first_of_machine() or code == EXIT_CODES[StorageError]:
            print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    except Exception as error:
        code = UNEXPECTED
        reason = _reason_of(error)
        traceback.print_exc()

    end(code, reason)


def end(code: int, reason: str) -> NoReturn:
    """Run the exit hooks, and end the process."""
    for hook in exit_hooks:
        hook(code, reason)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and dist.is_initialized():
        dist.barrier()
    os._exit(code)  # gloo's threads can abort an ordinary interpreter exit


def _is_first_of_machine() -> bool:
    """Whether this process speaks for those of its machine."""
    rank = os.environ.get("RANK", "0")
    return int(os.environ.get("LOCAL_RANK", rank)) == 0


def _run_main(main: Callable[[Any], None], arguments: Any) -> None:
    """Call `main` with its arguments, and ignore SIGTERM from then on, because the process is ending."""
    try:
        documentation = sys.modules[main.__module__].__doc__ or ""
        main(parse_arguments(arguments, documentation))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _reason_of(error: Exception) -> str:
    """What status.json says of an unexpected error, and before it, in plain words, that another process has died."""
    reason = f"{type(error).__name__}: {error}"
    if any(sign in reason for sign in SIGNS_OF_DEATH):
        reason = f"another process or its machine has died, see its log; {reason}"
    return reason


def _exit_code(error: BaseException) -> int:
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return UNEXPECTED


# ---------------------------------------------------------------- arguments


def parse_arguments(arguments: Any, documentation: str) -> Any:
    """The dataclass `arguments`, from the command line. The values of `--config run.json` come first.

    Raises UserError if that file is not a run.json with the same arguments.
    """
    description = documentation
    words = sys.argv[1:]
    _check_given_once(words)
    if dataclasses.is_dataclass(arguments):
        _check_names(words, arguments)
        description += "\n    --config FILE: arguments of a run.json, under those given beside it."
        config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        config_parser.add_argument("--config")
        known, words = config_parser.parse_known_args()
        if known.config is not None:
            words = [*_config_words(known.config, arguments), *words]
    return tyro.cli(arguments, args=words, description=description)


def _flags_in(words: list[str]) -> list[str]:
    """The flags of a command line, as `flag_of` writes them."""
    names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--") and word != "--"]
    return [flag_of(ALIASES.get(name, name)) for name in names]


def _check_given_once(words: list[str]) -> None:
    """Raises UserError for a flag that is given twice, of which one value would be lost."""
    seen: set[str] = set()
    for flag in _flags_in(words):
        if flag in seen:
            raise UserError(f"{flag}: is given twice")
        seen.add(flag)


def _check_names(words: list[str], arguments: Any) -> None:
    """Raises UserError for a flag that has another name here, in a command that has that one."""
    flags = {flag_of(field.name) for field in dataclasses.fields(arguments)}
    for flag in _flags_in(words):
        here = NAMES_ELSEWHERE.get(flag, "")
        is_known = flag in flags or not here
        if not is_known and (here.partition(" ")[0] in flags or not here.startswith("--")):
            raise UserError(f"{flag}: there is no such flag; {here}")


def _config_words(path: str, arguments: Any) -> list[str]:
    """The arguments of a run.json, as words of a command line."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        program = Path(sys.argv[0]).stem
        if content.get("algorithm", program) != program:
            raise ValueError(f"it is one of {content['algorithm']}")
        values = content.get("args", content)
        names = {field.name for field in dataclasses.fields(arguments)}
        unknown = values.keys() - names
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--config {path}: not a run.json of this algorithm, in JSON ({error})") from None

    words = []
    for name, value in values.items():
        words += _argument_words(name, value)
    return words


def _argument_words(name: str, value: object) -> list[str]:
    flag = flag_of(name)
    if value is True:
        return [flag]
    if value is False:
        return ["--no-" + flag.removeprefix("--")]
    if value is None:
        return []
    return [flag, str(value)]


def flag_of(name: str) -> str:
    """The flag of an argument: --max-length for max_length."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Above:
    """The range of a number that must be larger than `low`: `beta: Annotated[float, Above(0)] = 0.1`."""

    low: float
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low < value <= self.at_most and value != math.inf

    def __str__(self) -> str:
        return f"above {self.low}{_upper_limit(self.at_most)}"


@dataclass(frozen=True)
class AtLeast:
    """The range of a number that may be as small as `low`: `seed: Annotated[int, AtLeast(0)] = 0`."""

    low: float
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.at_most and value != math.inf

    def __str__(self) -> str:
        return f"of at least {self.low}{_upper_limit(self.at_most)}"


def _upper_limit(at_most: float) -> str:
    if at_most == math.inf:
        return ""
    return f" and at most {at_most}"


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Seed = Annotated[int, AtLeast(0, at_most=2**32 - 1)]


def check_arguments(args: Any) -> None:
    """Raises UserError for a number outside the range in its annotation, and for an empty text."""
    annotations = get_type_hints(type(args), include_extras=True)
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"{flag_of(name)}: must not be empty")
        allowed = _range_in(annotations[name])
        if isinstance(value, float) and not math.isfinite(value) and allowed is None:
            raise UserError(f"{flag_of(name)} {value}: must be a finite number")
        if value is None or allowed is None:
            continue
        if value not in allowed:
            raise UserError(f"{flag_of(name)} {value}: must be a finite number {allowed}")


def _range_in(annotation: Any) -> Above | AtLeast | None:
    """The range in an annotation such as `Annotated[float, Above(0)]` or `PositiveInt | None`."""
    for part in get_args(annotation):
        if isinstance(part, Above | AtLeast):
            return part
        inner = _range_in(part)
        if inner is not None:
            return inner
    return None
