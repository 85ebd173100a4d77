"""How every command starts."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from shared.command import check_arguments
from shared.command import command as run_command

ROOT = Path(__file__).resolve().parents[2]  # the repository


def command(main: Callable[[Any], None], arguments: Any) -> None:
    """Read the dataclass `arguments` from the command line, check the ranges of its fields, call `main`, and exit.

    A union of dataclasses makes a command with sub-commands.
    """

    @wraps(main)  # the description in --help is the docstring of main's module
    def checked_main(args: Any) -> None:
        check_arguments(args)
        main(args)

    run_command(checked_main, arguments)
