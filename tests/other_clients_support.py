"""IKEv2 daemons that are not charon as clients of the lab: libreswan 5.2 and OpenIKED 7.4 of Debian 13
(bridge/lab/unpacked.py), on the client's host in place of its charon, with a preshared key, a virtual IP, and ESP in
the kernel."""

from __future__ import annotations

import re
import shlex
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from bridge.lab import Topology
from bridge.lab.daemon import SLOWNESS, Daemon
from bridge.lab.unpacked import IKED, LIBRESWAN, OPENIKED, PLUTO, Unpacked
from takeover_support import SHARED

IDENTITY = "client@example.org"
GATEWAY = "vpn.example.org"
NETWORK = "10.10.0.0/16"
LIVENESS = round(2 * SLOWNESS)
"""seconds after which a client checks whether its silent gateway lives"""

WRAPPER = """\
#!/bin/sh
exec {loader} --argv0 "$0" {rest} "$@"
"""


def wrapped(package: Unpacked, path: str, file: Path) -> str:
    """Make `file` a program of the package that others start by its path, as pluto and iked do."""
    loader, *rest = package.program(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(WRAPPER.format(loader=loader, rest=shlex.join(rest)))
    file.chmod(0o755)
    return str(file)


class OtherClient(Daemon):
    """One of them, configured for the standard lab. It connects to the shared address when it is started."""

    gateway: ClassVar[dict[str, Any]]
    """what the connection of the gateways has to have for it"""
    liveness_checks = 3
    liveness_seconds = 30.0
    """in which it makes so many of them"""

    def __init__(self, topology: Topology, name: str) -> None:
        super().__init__(topology.client, name)
        self.topology = topology
        self.configure()

    @abstractmethod
    def configure(self) -> None:
        """Write its files, once."""

    @abstractmethod
    def command(self) -> list[str]:
        """What it is started by."""

    @abstractmethod
    def rekey_child(self) -> None:
        """Have it rekey its CHILD_SA."""

    def ike_rekeys(self) -> list[Callable[[], None]]:
        """What has it rekey its IKE_SA; nothing where it has no command for that."""
        return []

    @abstractmethod
    def end(self) -> None:
        """Have it delete its IKE_SA."""

    def start(self) -> None:
        """Start it, again if it runs, and wait until it is connected."""
        self.stop()
        for what in ("state", "policy"):
            self.host.run("ip", "xfrm", what, "flush")
        self.spawn(*self.command())
        self.await_alive(lambda: len(self.esp()) == 2, "it had a CHILD_SA")

    def esp(self) -> dict[str, str]:
        """The keys of the ESP SAs in its kernel, by SPI."""
        found = {}
        for text in re.split(r"\n(?=src )", self.host.run("ip", "xfrm", "state").stdout):
            if spi := re.search(r"proto esp spi 0x([0-9a-f]+)", text):
                found[spi[1]] = " ".join(re.findall(r" (0x[0-9a-f]{32,})", text))
        return found


class Libreswan(OtherClient):
    """pluto."""

    gateway = {"proposals": "aes256-sha256-ecp256"}  # noqa: RUF012

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology, "pluto")

    def configure(self) -> None:
        host = self.host
        host.write("/etc/ipsec.secrets", f': PSK "{self.topology.secret}"\n', 0o600)
        updown = LIBRESWAN.directory / "usr/libexec/ipsec/_updown.xfrm"
        host.write(
            "/etc/ipsec.conf",
            f"""\
conn home
    auto=start
    authby=secret
    left={host.address}
    leftid={IDENTITY}
    leftmodecfgclient=yes
    leftsubnet=0.0.0.0/0
    leftupdown="{updown} --route yes"
    right={SHARED}
    rightid=@{GATEWAY}
    rightsubnet={NETWORK}
    narrowing=yes
    ike=aes256-sha2_256-dh19
    esp=aes_gcm128
    pfs=no
    dpddelay={LIVENESS}s
""",
        )
        host.run("mkdir", "-p", "/run/pluto", "/run/nss")
        host.run(*LIBRESWAN.program("/usr/bin/certutil"), "-N", "-d", "sql:/run/nss", "--empty-password")
        # pluto does not start without it
        wrapped(LIBRESWAN, "/usr/libexec/ipsec/addconn", host.directory / "libexec/ipsec/addconn")
        host.run("mount", "-n", "--bind", str(host.directory / "libexec"), "/usr/libexec")

    def command(self) -> list[str]:
        return [*LIBRESWAN.program(PLUTO), "--nofork", "--stderrlog", "--nssdir", "/run/nss"]

    def _whack(self, *arguments: str) -> None:
        self.host.run(*LIBRESWAN.program("/usr/libexec/ipsec/whack"), "--asynchronous", "--name", "home", *arguments)

    def rekey_child(self) -> None:
        self._whack("--rekey-child")

    def ike_rekeys(self) -> list[Callable[[], None]]:
        return [lambda: self._whack("--rekey-ike")]

    def end(self) -> None:
        self._whack("--terminate")


class OpenIked(OtherClient):
    """iked. On Linux it has no AEAD for ESP and sets no route to the network behind its gateway."""

    gateway = {  # noqa: RUF012
        "proposals": "aes256-sha256-ecp256",
        "children.net.esp_proposals": "aes256-sha512",
    }
    liveness_checks = 1
    liveness_seconds = 360.0
    """on Linux it looks at IKE alone, and waits for 300 s"""
    LIFETIME = 64
    """kilobytes that a CHILD_SA carries: there is no command that rekeys it"""
    USER = "_iked:x:64999:65534::/run/iked:/usr/sbin/nologin\n"
    """what Debian's package adds to /etc/passwd"""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology, "iked")

    def configure(self) -> None:
        host = self.host
        host.write(
            "/etc/iked.conf",
            f"""\
set nomobike
set dpd_check_interval {LIVENESS}
ikev2 "home" active esp from 0.0.0.0/0 to {NETWORK} local {host.address} peer {SHARED} \\
    ikesa auth hmac-sha2-256 enc aes-256 prf hmac-sha2-256 group ecp256 \\
    childsa auth hmac-sha2-512 enc aes-256 \\
    srcid {IDENTITY} dstid {GATEWAY} ikelifetime 0 lifetime 3h bytes {self.LIFETIME}K \\
    psk "{self.topology.secret}" request address any iface eth0
""",
            0o600,
        )
        (host.etc / "passwd").unlink()
        host.write("/etc/passwd", Path("/etc/passwd").read_text() + self.USER)
        for directory in ("ca", "certs", "crls", "private", "pubkeys"):
            (host.etc / "iked" / directory).mkdir(parents=True)
        key = ("-genkey", "-name", "prime256v1", "-noout", "-out", "/etc/iked/private/local.key")
        host.run("openssl", "ecparam", *key)
        host.run("mkdir", "/run/iked")

    def command(self) -> list[str]:
        return [wrapped(OPENIKED, IKED, self.host.directory / "bin/iked"), "-d", "-v"]

    def start(self) -> None:
        super().start()
        lease = re.findall(r"obtained lease: (\S+)", self.text())[-1]
        self.host.run("ip", "route", "replace", NETWORK, "dev", "eth0", "src", lease)

    def rekey_child(self) -> None:
        ping = ("ping", "-n", "-q", "-i", "0.01", "-c", str(self.LIFETIME), "-s", "1200", "10.10.0.1")
        self.host.run(*ping, check=False)

    def end(self) -> None:
        self.host.run(*OPENIKED.program("/usr/sbin/ikectl"), "reset", "sa")
