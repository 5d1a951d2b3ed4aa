"""A real FreeRADIUS on a gateway, for its charon alone."""

from __future__ import annotations

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host

SECRET = "testing123"
FOLDER = "/etc/ike-sa-sync/raddb"
CONFIG = """
libdir = /usr/lib/freeradius
security {
    reject_delay = 0
}
client gateway {
    ipaddr = 127.0.0.1
    secret = testing123
}
modules {
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
        ipaddr = 127.0.0.1
        port = 1812
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
    """FreeRADIUS with EAP-MD5; `users` is its file of that name."""

    def __init__(self, host: Host, users: str) -> None:
        super().__init__(host, "radius")
        host.charon.settings.update(
            {
                "charon.plugins.eap-radius.servers.local.address": "127.0.0.1",
                "charon.plugins.eap-radius.servers.local.secret": SECRET,
            }
        )
        for name, text in (("radiusd.conf", CONFIG), ("users", users), ("dictionary", "")):
            host.write(f"{FOLDER}/{name}", text)

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.spawn("freeradius", "-f", "-l", "stdout", "-d", FOLDER)
        self.await_alive(lambda: "Ready to process requests" in self.text(), "it served")
