"""VRRP by a real keepalived, with the shipped example and its notify script."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.service import shipped_files

EXAMPLE = "strongswan-conf/keepalived/keepalived.conf"
NOTIFY = "strongswan-conf/keepalived/notify"


class Keepalived(Daemon):
    """keepalived of one gateway; the one with the higher priority becomes VRRP's master."""

    def __init__(self, host: Host, priority: int) -> None:
        super().__init__(host, "keepalived")
        self._priority = priority
        self._file = host.directory / "keepalived.conf"
        self._pids = {kind: host.directory / f"{kind}.pid" for kind in ("keepalived", "vrrp")}

    def configure(self) -> None:
        """Write its files, as `start` does."""
        script = shipped_files.path(NOTIFY).read_text()
        self.host.write(
            "/etc/ike-sa-sync/notify", script.replace("exec ike-sa-sync", f"exec {shlex.join(program())}"), 0o755
        )
        text = shipped_files.path(EXAMPLE).read_text()
        self._file.write_text(text.replace("priority 100", f"priority {self._priority}"))

    def complaints(self) -> str:
        """What keepalived has to say about its configuration; "" where nothing is wrong with it."""
        self.configure()
        done = self.host.run("keepalived", "--config-test", "--log-console", f"--use-file={self._file}", check=False)
        return (done.stdout + done.stderr).strip() if done.returncode else ""

    def start(self) -> None:
        """Start it, without waiting for anything."""
        self.configure()
        pids = (f"--pid={self._pids['keepalived']}", f"--vrrp_pid={self._pids['vrrp']}")
        self.spawn("keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={self._file}", *pids)

    def kill(self) -> None:
        """SIGKILL to both of its processes: neither gives its address up, as the one that does VRRP does when it loses
        its parent, nor is started again."""
        if self.process is not None:
            with contextlib.suppress(OSError, ValueError):
                # its parent would start it again
                os.kill(self.pid, signal.SIGSTOP)
                os.kill(int(self._pids["vrrp"].read_text()), signal.SIGKILL)
        super().kill()
