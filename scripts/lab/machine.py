"""What the machine says of itself and of a process."""

import platform
from pathlib import Path
from typing import Literal


def resident_bytes(kind: Literal["VmRSS", "VmHWM"]) -> int:
    """Resident memory of this process: now (VmRSS), or at its highest so far (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    _, _, rest = status.partition(f"{kind}:")
    kilobytes = rest.split()[0]
    return 1024 * int(kilobytes)


def proportional_bytes() -> int:
    """Memory of this process: its private pages, and of those that it shares with others its part (Pss)."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    _, _, rest = rollup.partition("Pss:")
    kilobytes = rest.split()[0]
    return 1024 * int(kilobytes)


def processor_name() -> str:
    """The model of the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            _, _, name = line.partition(": ")
            return name
    return platform.machine()
