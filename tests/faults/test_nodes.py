"""A run on several machines, one of which dies: the others end by themselves, and any machine goes on (fault j).

The machines are torchruns of this one, over the loopback interface, with a cache each.
"""

import os
import signal
from pathlib import Path

import pytest
from harness import Started, close, lines, run, start_nodes, workers
from marks import fault, slow


def workers_of(machine: Started) -> list[int]:
    """The processes that a torchrun started."""
    pids = []
    for pid in workers(machine.out):
        _, _, after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        if int(after_name.split()[1]) == machine.pid:
            pids.append(pid)
    return pids


@fault("j")
@pytest.mark.parametrize(
    "processes, node, rendezvous",
    [
        (1, 1, "static"),
        pytest.param(1, 0, "static", marks=slow),
        pytest.param(2, 1, "static", marks=slow),
        pytest.param(1, 1, "c10d", marks=slow),
    ],
)
def test_a_machine_dies(
    run_options: dict, through: Path, tmp_path: Path, processes: int, node: int, rendezvous: str
) -> None:
    """Weights are sharded over the processes of a machine, and each machine holds a replica."""
    out = tmp_path / "out"
    slower = {**run_options, "micro_batch_tokens": 64}
    machines = start_nodes(out, 2, processes, rendezvous, shard_size=processes, **slower)
    machines[0].until(lambda: len(lines(out)) > 2)
    pids = workers_of(machines[node])
    assert len(pids) == processes
    for pid in [machines[node].pid, *pids]:
        os.kill(pid, signal.SIGKILL)

    survivor = machines[1 - node]
    assert survivor.end(30), survivor.log[-3000:]
    assert not workers(out)
    assert survivor.status["state"] == "failed", survivor.status
    assert survivor.status["reason"].startswith("another process or its machine has died"), survivor.status
    assert 2 <= survivor.status["step"] < run_options["max_steps"], survivor.status

    run(out, resume=True, **run_options)
    close(out, through, losses=1e-4)
