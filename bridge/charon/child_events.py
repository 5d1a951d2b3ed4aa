"""Which CHILD_SAs other software waits for charon's `child-updown` of: charon raises it where they come by an exchange,
and not where they come over the HA channel (docs/hooks.md).

updown scripts      in the child's configuration
inactivity          likewise: charon starts that timer with the event
connmark, forecast  plugins that act on a CHILD_SA with marks
lookip              a plugin that tells its clients; whether it has any, its socket shows

farp answers ARP for virtual IPs, which the sidecar does itself (bridge.gateway.return_path). Whether a program listens
to VICI's events cannot be known.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

MARKING: Final = frozenset({"connmark", "forecast"})
"""plugins that need the event of CHILD_SAs with marks"""
LOOKIP: Final = "lookip"
LOOKIP_SOCKET: Final = "charon.lkp"
UNIX_SOCKETS: Final = Path("/proc/net/unix")
_CONNECTED = "03"


class ChildEvents:
    """What is known of it. `plugins`: those that charon has loaded; `wanting` and `marked`: children, by (connection,
    child), with an updown script or a time of inactivity, and with marks."""

    def __init__(
        self,
        plugins: Collection[str] = (),
        wanting: Collection[tuple[str, str]] = (),
        marked: Collection[tuple[str, str]] = (),
        *,
        sockets: Path = UNIX_SOCKETS,
    ) -> None:
        self._children = {*wanting, *(marked if MARKING & set(plugins) else ())}
        self._all = LOOKIP in plugins and _has_clients(sockets)

    def needed(self, connection: str, child: str) -> bool:
        """Whether somebody waits for the event of this CHILD_SA."""
        return self._all or (connection, child) in self._children


def _has_clients(sockets: Path) -> bool:
    """Whether a program is connected to lookip's socket."""
    try:
        lines = sockets.read_text().splitlines()
    except OSError:
        return False
    rows = [line.split() for line in lines if line.endswith(LOOKIP_SOCKET)]
    return any(row[5] == _CONNECTED for row in rows if len(row) > 7)
