"""One charon of the lab: Debian's charon-systemd, unmodified, with the shipped drop-in."""

import os
import shutil
import signal
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vici

from bridge.lab import space
from bridge.lab.daemon import Daemon
from bridge.lab.esp import Esp
from bridge.lab.space import LabError
from bridge.service import shipped_files

if TYPE_CHECKING:
    from bridge.lab.host import Host

VICI_SOCKET = "/run/charon.vici"

# Debian's configuration of each plugin, as the packages ship it; below the root that strongSwan is installed in.
PLUGIN_DEFAULTS = "usr/share/strongswan/templates/config/plugins"

MAIN = """\
charon {
    load_modular = yes
    plugins {
        include strongswan.d/charon/*.conf
    }
}
include strongswan.d/*.conf
"""

# Read after the shipped drop-in. resolve would write the machine's resolv.conf; the others listen or act on
# networks in ways the lab has no use for.
LAB = """\
charon {
    filelog {
        lab {
            path = %(log)s
            time_format = %%b %%e %%T
            time_add_ms = yes
            append = yes
            flush_line = yes
            ike_name = yes
            default = 1
        }
    }
    plugins {
        bypass-lan { load = no }
        connmark { load = no }
        dhcp { load = no }
        farp { load = no }
        forecast { load = no }
        resolve { load = no }
        stroke { load = %(stroke)s }
        kernel-libipsec {
            load = %(libipsec)s
            allow_peer_ts = yes
        }
    }
}
"""


def render(settings: Mapping[str, Any]) -> str:
    """strongswan.conf text of nested settings; keys may be dotted paths (`charon.retransmit_tries`)."""
    lines = []
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = f"{name} {{\n{render(value)}\n}}" if isinstance(value, Mapping) else f"{name} = {value}"
        lines.append("".join(f"{section} {{\n" for section in sections) + inner + "\n}" * len(sections))
    return "\n".join(lines)


# starter runs the charon of its own package, which AppArmor would confine to the machine's own files.
STARTER = ("/usr/lib/ipsec/starter", "--nofork")
STARTED = "/run/charon.pid"


class Charon(Daemon):
    """charon of one host. `log` is charon's own log file."""

    def __init__(self, host: "Host") -> None:
        super().__init__(host, "charon")
        self.ipsec_conf = False  # started by starter, which loads /etc/ipsec.conf of the host, in place of systemd
        self.settings: dict[str, Any] = {}  # strongswan.conf, by dotted path; read at start()

    def configure(self) -> None:
        """Write strongswan.conf, as `start` does."""
        etc = self.host.etc
        (etc / "strongswan.conf").write_text(MAIN)
        drop_ins = etc / "strongswan.d"
        shutil.copytree(self.host.root / PLUGIN_DEFAULTS, drop_ins / "charon", dirs_exist_ok=True)
        shutil.copy(shipped_files.path("strongswan-conf/ike-sa-sync.conf"), drop_ins)
        libipsec = "yes" if self.host.esp is Esp.USERSPACE else "no"
        stroke = "yes" if self.ipsec_conf else "no"
        (drop_ins / "lab.conf").write_text(LAB % {"log": self.log, "libipsec": libipsec, "stroke": stroke})
        (drop_ins / "lab_settings.conf").write_text(render(self.settings) + "\n")

    def start(self, load: bool = True) -> None:
        """Start charon, wait until it answers on VICI, and load `/etc/swanctl`.

        A sidecar has to be started before, or no process receives the keys that charon reports.
        """
        self.configure()
        self.spawn(*(STARTER if self.ipsec_conf else ("charon-systemd",)))
        self.await_alive(self.answers, "it answered on VICI")
        if load:
            self.load()

    def answers(self) -> bool:
        """Whether its VICI socket accepts a connection."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.host.path(VICI_SOCKET)))
            except OSError:
                return False
        return True

    def load(self) -> None:
        """Load connections, pools, secrets and certificates from `/etc/swanctl`."""
        self.host.swanctl("--load-all", "--noprompt")

    def vici(self) -> vici.Session:
        """A VICI session with this charon, for the caller to use and forget."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.host.path(VICI_SOCKET)))
        return vici.Session(connection)

    def sas(self) -> list[dict[str, Any]]:
        """Its IKE_SAs as VICI `list-sas` gives them (strings), each with its connection as `name`."""
        found = []
        for entry in self.vici().list_sas():
            for name, sa in entry.items():
                found.append({"name": name} | _text(sa))
        return found

    def initiate(self, child: str, connection: str, timeout: float = 30.0) -> None:
        """Bring a CHILD_SA up. LabError with charon's words if it does not come up."""
        self.host.swanctl("--initiate", "--child", child, "--ike", connection, timeout=timeout)

    def crash(self) -> None:
        """SIGKILL, on a machine that lives: the kernel goes on with its SAs, policies and routes."""
        if self.process is not None:
            self.process.kill()
            super().forget()
        self._end_starter()

    def kill(self) -> None:
        """SIGKILL, as on a machine that is dead: its SAs, policies and routes are gone too."""
        self.crash()
        space.forget_sas(self.host.namespace)

    def _end_starter(self) -> None:
        if self.ipsec_conf:
            # starter, which would have started it again, is gone; the next one takes a zombie for a charon
            started = self.host.path(STARTED)
            os.kill(int(started.read_text()), signal.SIGKILL)
            started.unlink()

    def forget(self) -> None:
        """Reap it after someone killed it, and take its SAs out of the kernel."""
        super().forget()
        space.forget_sas(self.host.namespace)


def _text(value: Any) -> Any:
    """VICI's octets as text, all the way down."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _text(item) for key, item in value.items()}
    raise LabError(f"VICI gave a {type(value).__name__}")
