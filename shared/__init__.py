"""The small layer under the algorithms. Here: the ways a run may end, which `run.command` turns into exit codes."""


class UserError(Exception):
    """Arguments, data or model are wrong: exit 2, before the first step."""


class NonFinite(Exception):
    """A loss or gradient is not finite: exit 3, before the update."""


class StorageError(Exception):
    """A checkpoint or a result could not be written or read: exit 4."""


class Preempted(Exception):
    """Asked to stop; the state is saved: exit 75."""
