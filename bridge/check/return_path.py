"""Whether what is sent to a client can find the gateway that has its session: docs/network.md."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path

from bridge.check.finding import Finding, ok, warn
from bridge.check.proxy_arp import without_proxy
from bridge.check.udp import process_name
from bridge.config import GatewayConfig
from bridge.ike.address import Pool
from bridge.net.neighbour import Connected, connected_networks

TABLE = "220"
"""the routing table that charon puts its routes into"""
DAEMONS = {
    "bird": ("/etc/bird/bird.conf", (f"kernel table {TABLE}",)),
    "zebra": ("/etc/frr/frr.conf", (f"import-table {TABLE}", f"table-direct {TABLE}")),
}
"""routing daemons: their configuration, and what is in it where they take in that table"""
CHOOSES = {"bird": "-c", "zebra": "-f"}
"""the option that names another configuration"""
FIX = (
    "have BIRD or FRR announce table 220 (strongswan-conf/network/), or say how it is done: "
    "network.return_path: routed, announced or external (docs/network.md)"
)


def return_path(config: GatewayConfig, pools: Iterable[Pool]) -> list[Finding]:
    """A way back for each pool: by a routing daemon, out of a directly connected network, or by other means."""
    every = list(pools)
    if not every:
        return []
    if config.network.return_path is not None:
        return [ok("return path", f"network.return_path: {config.network.return_path}")]
    networks = connected_networks()
    foreign = [pool for pool in every if not _is_connected(pool, networks)]
    if not foreign:
        return [ok("return path", "the pools are of connected networks: the sidecar announces their addresses")]
    if (daemon := exporting(_daemons())) is not None:
        return [ok("return path", f"{daemon} takes in table {TABLE}, where charon has its clients' routes")]
    foreign = without_proxy(foreign)
    if not foreign:
        return [ok("return path", "this host answers for the pools by proxy ARP or proxy neighbour discovery")]
    names = ", ".join(f"{pool.name} ({pool.text})" for pool in foreign)
    text = f"no routing daemon here announces the clients of {names}: after a move servers do not reach them"
    return [warn("return path", text, FIX)]


def _is_connected(pool: Pool, networks: Iterable[Connected]) -> bool:
    first = ip_address(pool.base)
    return any(first in network and first + max(pool.size - 1, 0) in network for _, network in networks)


def exporting(daemons: Iterable[tuple[str, Path]]) -> str | None:
    """Of routing daemons with their configurations, one that takes in charon's table."""
    for name, file in daemons:
        try:
            text = " ".join(file.read_text(errors="replace").split())
        except OSError:
            continue
        if any(words in text for words in DAEMONS[name][1]):
            return name
    return None


def _daemons() -> Iterator[tuple[str, Path]]:
    """The routing daemons of this network namespace, with the configuration of each."""
    here = os.stat("/proc/self/ns/net").st_ino
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or (name := process_name(int(entry.name))) not in DAEMONS:
            continue
        try:
            if os.stat(entry / "ns/net").st_ino != here:
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        option = CHOOSES[name]
        yield name, Path(words[words.index(option) + 1] if option in words[:-1] else DAEMONS[name][0])
