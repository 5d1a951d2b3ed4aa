"""What processes used: CPU and memory, from /proc."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.lab.host import Host
from bridge.service.process import code

NANOSECONDS = 1e9


def cpu_seconds(pid: int) -> float:
    """CPU of all threads of a process, in nanosecond steps (schedstat), kernel time on their behalf included. What
    the kernel does in interrupts, that is most of the work on arriving packets, is counted for no process."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / NANOSECONDS


def memory_octets(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Meter:
    """CPU and memory of some processes between two moments."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.pids = dict(pids)
        self.restart()

    def restart(self) -> None:
        """Start again from zero."""
        self._began = time.monotonic()
        self._cpu = {name: cpu_seconds(pid) for name, pid in self.pids.items()}

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def read(self) -> dict[str, dict[str, float]]:
        """By name: `cpu_s` since the beginning, `rss_mb` now."""
        return {
            name: {
                "cpu_s": cpu_seconds(pid) - self._cpu[name],
                "rss_mb": memory_octets(pid) / 1e6,
            }
            for name, pid in self.pids.items()
        }


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie; 0 without values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    version = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "redis": version.split("v=")[1].split()[0],
        "code": code(),
    }


def lab_machine(host: Host) -> dict[str, Any]:
    """The same with the parts of a lab's host."""
    return {
        **machine(),
        "strongswan": host.charon.vici().version()["version"].decode(),
        "esp": host.esp.value,
    }
