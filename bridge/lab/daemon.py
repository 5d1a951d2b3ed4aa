"""A long-running program inside a host: started, stopped, killed, its output kept."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.lab.space import LabError

if TYPE_CHECKING:
    from bridge.lab.host import Host

# How many times slower this machine is than a real one: an emulator sets it, and all time limits grow with it.
SLOWNESS = float(os.environ.get("IKE_SA_SYNC_LAB_SLOWNESS", "1"))

# Seconds; generous, since many may share few cores.
START_PATIENCE = 30.0
STOP_PATIENCE = 60.0


def wait_until(condition: Callable[[], bool], what: str, timeout: float = START_PATIENCE) -> None:
    """Look every 20 ms until the condition holds. LabError naming `what` after `timeout` s, later on a slow machine."""
    timeout *= SLOWNESS
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: waited {timeout:g} s in vain")
        time.sleep(0.02)


class Daemon:
    """Base of charon, the sidecar and the bank's server."""

    def __init__(self, host: "Host", name: str) -> None:
        self.host = host
        self.name = name
        self.log: Path = host.directory / f"{name}.log"
        self.process: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, as seen from everywhere."""
        if self.process is None:
            raise LabError(f"{self.name} on {self.host.name} is not running")
        return self.process.pid

    def spawn(self, *argv: str) -> None:
        """Start the program; standard output and error are appended to the log."""
        if self.running:
            raise LabError(f"{self.name} on {self.host.name} is running already")
        with self.log.open("a") as log:
            self.process = self.host.popen(*argv, stdout=log, stderr=log)

    def await_alive(self, condition: Callable[[], bool], what: str, timeout: float = START_PATIENCE) -> None:
        """Wait for a condition, but no longer than the program lives. LabError with the end of its log."""

        def holds_or_dead() -> bool:
            return condition() or not self.running

        try:
            wait_until(holds_or_dead, what, timeout)
        except LabError as error:
            raise LabError(f"{self.name} on {self.host.name}: {error}\n{self.tail()}") from None
        if not self.running:
            raise LabError(f"{self.name} on {self.host.name} ended before {what}\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.text().splitlines()[-lines:])

    def text(self) -> str:
        """Its whole log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        """SIGTERM, and wait for the end; SIGKILL and LabError if that does not come."""
        if self.process is None:
            return
        process, self.process = self.process, None
        lived = process.poll() is None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_PATIENCE * SLOWNESS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise LabError(f"{self.name} on {self.host.name} ignored SIGTERM for {STOP_PATIENCE:g} s") from None
        if lived:
            self.check_end(process.returncode)

    def check_end(self, status: int) -> None:
        """See that it ended in order after SIGTERM. LabError with the end of its log."""

    def kill(self) -> None:
        """SIGKILL: it ends without a word to anyone."""
        if self.process is not None:
            self.process.kill()
            self.forget()

    def forget(self) -> None:
        """Reap it after someone killed it."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_PATIENCE)
            self.process = None
