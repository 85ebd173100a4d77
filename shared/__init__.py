"""The small layer under the algorithms. Here: the ways in which a run may end early."""


class UserError(Exception):
    """Arguments, data or model are wrong: exit 2, before the first step."""


class NonFinite(Exception):
    """A loss or gradient is not finite: exit 3, before the update."""


class StorageError(Exception):
    """A checkpoint or a result could not be written or read: exit 4."""


class Preempted(BaseException):
    """The run was asked to stop, and its state is saved: exit 75.

    It does not derive from `Exception`, so that no handler of ordinary errors catches it on its way out.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]
