"""How every command starts."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from shared.command import check_arguments, command

ROOT = Path(__file__).resolve().parents[2]  # the repository


def checked_command(main: Callable[[Any], None], arguments: Any) -> None:
    """Read the dataclass `arguments` from the command line, check the ranges of its fields, call `main`, and exit.

    A union of dataclasses makes a command with sub-commands.
    """

    @wraps(main)  # the description in --help is the docstring of main's module
    def checked_main(args: Any) -> None:
        check_arguments(args)
        main(args)

    command(checked_main, arguments)
