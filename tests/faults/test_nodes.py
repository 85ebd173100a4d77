"""A run on several machines, one of which dies: the others end by themselves, and any machine goes on (fault j).

The machines are torchruns of this one, over the loopback interface, with a cache each.
"""

import os
import signal
from pathlib import Path

import pytest
from harness import Started, close, lines, run, start_nodes, workers
from marks import fault, slow

STEPS = 30


@pytest.fixture(scope="module")
def options(run_options: dict) -> dict:
    """Steps slow enough that one machine can die amid them."""
    return {**run_options, "max_steps": STEPS, "micro_batch_tokens": 64, "save_every": 2}


def kill_machine(machine: Started, node: int) -> None:
    """SIGKILL to a torchrun and to its workers."""
    variable = f"\0GROUP_RANK={node}\0"
    pids = [pid for pid in workers(machine.out) if variable in Path(f"/proc/{pid}/environ").read_text()]
    assert pids
    for pid in [machine.pid, *pids]:
        os.kill(pid, signal.SIGKILL)


@fault("j")
@pytest.mark.parametrize("processes, node", [(1, 1), pytest.param(1, 0, marks=slow), pytest.param(2, 1, marks=slow)])
def test_a_machine_dies(options: dict, tmp_path: Path, processes: int, node: int) -> None:
    """Weights are sharded over the processes of a machine, and each machine holds a replica."""
    out = tmp_path / "out"
    machines = start_nodes(out, 2, processes, shard_size=processes, **options)
    machines[0].until(lambda: len(lines(out)) > 4)
    kill_machine(machines[node], node)

    survivor = machines[1 - node]
    assert survivor.end(30), survivor.log[-3000:]
    assert not workers(out)
    assert survivor.status["state"] == "failed", survivor.status
    assert survivor.status["step"] < STEPS, survivor.status
    print(survivor.status)

    through = tmp_path / "through"
    run(out, resume=True, **options)
    run(through, **options)
    close(out, through, losses=1e-4)
