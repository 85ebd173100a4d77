"""A process that starts stages as copies of itself, once it has imported the libraries that nearly all of them need.

Importing torch and transformers takes several seconds, as long as many a stage. A copy is a process of its own, with
the libraries in place and nothing of the project, and runs its script as `python` does. No stage outlives this process.

Requests and answers are lines of JSON, on the standard input and output:

    {"start": ["scripts/score.py", "--rows", ...], "log": "runs/a/0.log"}    →    the process's number
    {"exit_code_of": 1234}                                                  →    its exit code, or null if it still runs
"""

import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence

LIBRARIES = ("torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "tokenizers", "tyro")


def main(libraries: Sequence[str]) -> None:
    """Import the libraries and answer until the input ends. Stages that still run then are killed."""
    for name in libraries:
        importlib.import_module(name)

    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run_stage(request["start"], request["log"])
                return
            running.add(pid)
            answer: int | None = pid
        else:
            pid = request["exit_code_of"]
            answer = exit_code_of(pid)
            if answer is not None:
                running.remove(pid)
        print(json.dumps(answer), flush=True)

    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)


def run_stage(arguments: list[str], log: str) -> None:
    """Run a script; what it prints is appended to the log."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


def exit_code_of(pid: int) -> int | None:
    """The exit code of a stage, or None if it still runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended == 0:
        return None
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(sys.argv[1:])
