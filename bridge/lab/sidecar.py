"""One sidecar of the lab: the installed command, run as an operator would."""

import asyncio
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from bridge.lab.daemon import Daemon
from bridge.lab.space import LabError
from bridge.service import control

if TYPE_CHECKING:
    from subprocess import CompletedProcess

    from bridge.lab.host import Host

Role = Literal["gateway", "client"]

# UDP port of both ends of the HA channel, as /proc/net/udp writes it.
HA_PORT = f"{4510:04X}"


def program() -> list[str]:
    """The command line of ike-sa-sync: the script installed beside this Python, else the module."""
    script = Path(sys.executable).with_name("ike-sa-sync")
    return [str(script)] if script.exists() else [sys.executable, "-m", "bridge"]


class Sidecar(Daemon):
    """`ike-sa-sync gateway|client` on a host. `config` may be changed before a start."""

    def __init__(self, host: "Host", role: Role, config: Mapping[str, Any]) -> None:
        super().__init__(host, role)
        self.role: Role = role
        self.config: dict[str, Any] = dict(config)
        self.program = program()
        """its command line, up to the subcommand; of another release, where a test sets it"""
        self.file = f"/etc/ike-sa-sync/{role}.yaml"
        self._seen = 0  # length of the log when it was last started

    def launch(self) -> None:
        """Write its configuration and start it, without waiting for anything."""
        self.host.write(self.file, yaml.safe_dump(self.config, sort_keys=False))
        self._seen = len(self.text())
        self.spawn(*self.program, self.role, "-c", self.file)

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until charon may be started. With `wait`, until it serves, which needs a charon."""
        self.launch()
        self.wait_held()
        if wait:
            self.wait_ready()

    def wait_held(self) -> None:
        """Wait until its end of the HA channel is bound: from then on charon may start."""
        self.await_alive(self.holds_address, "it held the HA address")

    def holds_address(self) -> bool:
        """Whether its end of the HA channel is bound, so that charon may start."""
        octets = str(self.config.get("ha", {}).get("listen", "127.0.0.2")).split(".")
        address = "".join(f"{int(octet):02X}" for octet in reversed(octets))
        table = Path(f"/proc/{self.host.pid}/net/udp").read_text()
        return f" {address}:{HA_PORT} " in table

    def wait_ready(self) -> None:
        """Wait until it has printed `ready`: it serves."""
        self.await_alive(lambda: "ready" in self.text()[self._seen :].splitlines(), "it was ready")

    def check_end(self, status: int) -> None:
        # while it starts, SIGTERM ends it as it does any command
        if status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise LabError(f"{self.name} on {self.host.name} ended with status {status}\n{self.tail()}")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What it answers on its control socket, without a process for the question. Raises ControlError."""
        path = self.host.path(self.config["control"])
        return asyncio.run(control.call(str(path), {"command": command, **arguments}))

    def command(self, *argv: str, check: bool = True, timeout: float = 60.0) -> "CompletedProcess[str]":
        """Run `ike-sa-sync ARGV -c FILE` with its configuration file, on its host."""
        return self.host.run(*self.program, *argv, "-c", self.file, check=check, timeout=timeout)

    def in_terminal(self, *argv: str, timeout: float = 120.0) -> "CompletedProcess[str]":
        """The same in a terminal: what it shows there, exit status not checked."""
        command = shlex.join([*self.program, *argv, "-c", self.file])
        return self.host.run("script", "--quiet", "--return", "-c", command, "/dev/null", check=False, timeout=timeout)
