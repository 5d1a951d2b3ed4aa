"""A real FreeRADIUS, for the charon of its host or for those of others."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host

SECRET = "testing123"
FOLDER = "/etc/ike-sa-sync/raddb"
CONFIG = """
libdir = /usr/lib/freeradius
security {
    reject_delay = 0
}
client gateways {
    ipaddr = 0.0.0.0/0
    secret = testing123
}
modules {
    detail {
        filename = ACCOUNTS
    }
    eap {
        default_eap_type = md5
        md5 {
        }
    }
    files {
        filename = ${confdir}/users
    }
}
server default {
    listen {
        type = auth
        ipaddr = *
        port = 1812
    }
    listen {
        type = acct
        ipaddr = *
        port = 1813
    }
    accounting {
        detail
    }
    authorize {
        files
        eap
    }
    authenticate {
        eap
    }
}
"""


class Radius(Daemon):
    """FreeRADIUS with EAP-MD5; `users` is its file of that name. It serves `clients`, or its own host."""

    def __init__(self, host: Host, users: str, clients: Sequence[Host] = (), *, accounting: bool = False) -> None:
        super().__init__(host, "radius")
        self._accounts = host.directory / "accounts"
        for client in clients or (host,):
            client.charon.settings.update(
                {
                    "charon.plugins.eap-radius.servers.local.address": host.address if clients else "127.0.0.1",
                    "charon.plugins.eap-radius.servers.local.secret": SECRET,
                    "charon.plugins.eap-radius.accounting": "yes" if accounting else "no",
                }
            )
        config = CONFIG.replace("ACCOUNTS", str(self._accounts))
        for name, text in (("radiusd.conf", config), ("users", users), ("dictionary", "")):
            host.write(f"{FOLDER}/{name}", text)

    def accounts(self) -> list[dict[str, str]]:
        """The accounting requests since `forget_accounts`, in their order."""
        text = self._accounts.read_text() if self._accounts.exists() else ""
        found = []
        for entry in text.split("\n\n"):
            pairs = [line.strip().partition(" = ") for line in entry.splitlines()[1:]]
            if pairs:
                found.append({name: value.strip('"') for name, _, value in pairs})
        return found

    def forget_accounts(self) -> None:
        """Begin a new list."""
        self._accounts.unlink(missing_ok=True)

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.spawn("freeradius", "-f", "-l", "stdout", "-d", FOLDER)
        self.await_alive(lambda: "Ready to process requests" in self.text(), "it served")
