"""The lab: real strongSwan hosts as network namespaces on a bridge.

Everything lives in namespaces of its own, so the machine's network, files and daemons stay as they are, and
several labs can run in parallel.
"""

import contextlib
import ipaddress
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from bridge.lab import esp, releases, space
from bridge.lab.host import Host
from bridge.lab.space import LabError

SWITCH = "switch"

# A hyphen separates it from the host's name.
NAME = re.compile(r"[a-z0-9]{1,16}")


class Lab:
    """A context manager: the lab is there inside, and every trace of it gone afterwards.

    That holds for the normal end, an exception, Ctrl-C and SIGTERM, and for a killed Python too: a small
    process of its own then removes the lab. With `keep`, it stays until `ike-sa-sync lab clean`.
    """

    def __init__(self, prefix: str | None = None, *, keep: bool = False, release: str | None = None) -> None:
        self.name = prefix or f"iss{secrets.token_hex(3)}"
        if not NAME.fullmatch(self.name):
            raise LabError(f"a lab's name is 1 to 16 letters and digits, unlike {self.name!r}")
        self.keep = keep
        self.release = release
        """the Debian release of its hosts' strongSwan; None: the machine's own"""
        self.hosts: dict[str, Host] = {}
        self.networks: list[str] = []
        self.esp = esp.Esp.KERNEL
        self._exit = contextlib.ExitStack()
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def switch(self) -> str:
        """The network namespace that holds the bridges."""
        return f"{self.name}-{SWITCH}"

    def __enter__(self) -> Self:
        space.need_root()
        directory = space.STATE / self.name
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise LabError(f"lab {self.name} exists: remove it with `ike-sa-sync lab clean`") from None
        # Hosts hold secrets there.
        directory.chmod(0o700)
        with self._exit:
            self._exit.enter_context(space.owned(self.name))
            if not self.keep:
                self._start_guard()
            self._exit.push(self._remove)
            self._terminate_as_exit()
            self._build_switch()
            self._exit = self._exit.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "bridge.lab.guard", self.name],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _terminate_as_exit(self) -> None:
        """Let SIGTERM unwind the stack as Ctrl-C does, unless other code handles it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return

        def leave(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        signal.signal(signal.SIGTERM, leave)
        self._exit.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)

    def _remove(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.keep and kind is None:
            return
        space.remove(self.name)
        if self._guard is not None:
            self._guard.communicate()

    def _build_switch(self) -> None:
        space.command("ip", "netns", "add", self.switch)
        self.esp = esp.detect(self.switch)
        self.add_network("lan")

    def add_network(self, name: str) -> None:
        """A network: a bridge in the switch that hosts attach to. `lan` is there from the start."""
        space.command("ip", "-n", self.switch, "link", "add", name, "type", "bridge")
        space.command("ip", "-n", self.switch, "link", "set", name, "up")
        self.networks.append(name)

    def add_host(
        self,
        name: str,
        *addresses: str,
        network: str = "lan",
        local: tuple[str, ...] = (),
        forward: bool = False,
        release: str | None = None,
    ) -> Host:
        """A host on a network, with `addresses` (with prefix length) on eth0 and `local` ones on lo.

        `forward` makes it a router. Its strongSwan is that of the Debian `release`, or the lab's.
        """
        release = release or self.release
        host = Host(name, self.name, self.esp, releases.root(release) if release else Path("/"))
        host.boot()
        self.hosts[name] = host
        settings = ["net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"]
        # an address that becomes good a second later is news that charon sends its peers
        settings += ["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"]
        if forward:
            settings += ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]
        host.run("sysctl", "-q", "-w", *settings)
        self.attach(host, *addresses, network=network)
        for address in local:
            space.command("ip", "-n", host.namespace, "address", "add", address, "dev", "lo")
        return host

    def plug(self, host: Host, network: str = "lan", interface: str = "eth0") -> None:
        """Connect a host's interface to a network again."""
        space.command("ip", "-n", self.switch, "link", "set", f"{host.name}-{interface}", "master", network)

    def unplug(self, host: Host, interface: str = "eth0") -> None:
        """Lose all that the interface sends and should get; the host itself sees no change of its links."""
        space.command("ip", "-n", self.switch, "link", "set", f"{host.name}-{interface}", "nomaster")

    def delay(self, host: Host, seconds: float, network: str = "lan", interface: str = "eth0") -> None:
        """Have all that the host sends and gets on an interface arrive `seconds` later. Once for an interface."""
        port, near, far = f"{host.name}-{interface}", f"{host.name}-near", f"{host.name}-far"
        python = [sys.executable, "-m", "bridge.lab.delay"]
        switch = ["ip", "-n", self.switch]
        space.command(*switch, "link", "set", port, "nomaster")
        space.command(*switch, "link", "add", near, "type", "veth", "peer", "name", far)
        space.command(*switch, "link", "set", near, "up")
        space.command(*switch, "link", "set", far, "master", network, "up")
        host.run(*python, "whole", interface)
        inside = space.in_network(self.switch)
        space.command(*inside, *python, "whole", far)
        line = subprocess.Popen(
            [*inside, *python, port, near, str(seconds)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._exit.callback(line.wait)
        self._exit.callback(line.kill)
        assert line.stdout is not None
        if line.stdout.readline() != "joined\n":
            raise LabError(f"no delay for {host.name}: the process that makes it ended")

    def attach(self, host: Host, *addresses: str, network: str = "lan") -> str:
        """Give a host one more interface, on a network; the interface's name (eth0, eth1, ...)."""
        interface = f"eth{len(host.interfaces())}"
        port = f"{host.name}-{interface}"
        if len(port) > 15:
            raise LabError(f"host name {host.name} is too long for an interface name: 10 letters at most")
        inside = ["ip", "-n", host.namespace]
        switch = ["ip", "-n", self.switch]
        space.command(*switch, "link", "add", port, "type", "veth", "peer", interface, "netns", host.namespace)
        space.command(*switch, "link", "set", port, "master", network, "up")
        space.command(*inside, "link", "set", interface, "up")
        for address in addresses:
            # Duplicate address detection would keep an IPv6 address unusable for a second.
            nodad = ["nodad"] if ":" in address else []
            space.command(*inside, "address", "add", address, "dev", interface, *nodad)
        if addresses and not host.address:
            host.address = str(ipaddress.ip_interface(addresses[0]).ip)
        return interface
