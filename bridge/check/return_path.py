"""Whether what is sent to a client can find the gateway that has its session: docs/network.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from bridge.check.braces import blocks
from bridge.check.finding import Finding, ok, warn
from bridge.check.proxy_arp import without_proxy
from bridge.check.udp import process_name
from bridge.config import GatewayConfig
from bridge.ike.address import Pool
from bridge.net.neighbour import Connected, connected_networks

TABLE = "220"
"""the routing table that charon puts its routes into"""
DAEMONS = {"bird": "/etc/bird/bird.conf", "zebra": "/etc/frr/frr.conf"}
"""routing daemons, and their configuration"""
CHOOSES = {"bird": "-c", "zebra": "-f"}
"""the option that names another configuration"""
_KERNEL: Final = re.compile(r"\b(?:protocol|template)\s+kernel\b(?P<name>[^{};]*)\{")
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
    takers = exporting(_daemons())
    if all(_family(pool) in takers for pool in foreign):
        names = " and ".join(sorted({takers[_family(pool)] for pool in foreign}))
        return [ok("return path", f"{names} takes in table {TABLE}, where charon has its clients' routes")]
    foreign = [pool for pool in foreign if _family(pool) not in takers]
    foreign = without_proxy(foreign)
    if not foreign:
        return [ok("return path", "this host answers for the pools by proxy ARP or proxy neighbour discovery")]
    names = ", ".join(f"{pool.name} ({pool.text})" for pool in foreign)
    text = f"no routing daemon here announces the clients of {names}: after a move servers do not reach them"
    return [warn("return path", text, FIX)]


def _is_connected(pool: Pool, networks: Iterable[Connected]) -> bool:
    first = ip_address(pool.base)
    return any(first in network and first + max(pool.size - 1, 0) in network for _, network in networks)


def _family(pool: Pool) -> int:
    return ip_address(pool.base).version


def exporting(daemons: Iterable[tuple[str, Path]]) -> dict[int, str]:
    """The address families (4, 6) whose routes in charon's table a routing daemon takes in, with its name; `daemons`
    are those that run, with their configurations."""
    takers: dict[int, str] = {}
    for name, file in daemons:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for family in READERS[name](text):
            takers.setdefault(family, name)
    return takers


def _taken_by_bird(text: str) -> Iterator[int]:
    """Each protocol of kernel routes has a table, and a channel for its address family."""
    text = re.sub(r"/\*.*?\*/|#[^\n]*", " ", text, flags=re.DOTALL)
    for protocol in blocks(_KERNEL, text):
        if re.search(rf"\bkernel\s+table\s+{TABLE}\s*;", protocol.body):
            # one without a channel is of BIRD 1, which is of IPv4 under this name
            yield from {int(family) for family in re.findall(r"\bipv([46])\b", protocol.body)} or {4}


def _taken_by_frr(text: str) -> Iterator[int]:
    """A line each; what redistributes a table does so for the address family that it stands in."""
    family: int | None = None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["router"]:
            family = 6 if words[1:2] == ["ospf6"] else 4
        elif words[:1] == ["address-family"]:
            family = {"ipv4": 4, "ipv6": 6}.get(words[1]) if words[2:] in ([], ["unicast"]) else None
        elif words[:1] == ["exit-address-family"]:
            family = 4
        elif words[:3] == ["ip", "import-table", TABLE]:
            yield 4
        elif words[:3] == ["redistribute", "table-direct", TABLE] and family is not None:
            yield family


READERS: Final[Mapping[str, Callable[[str], Iterator[int]]]] = {"bird": _taken_by_bird, "zebra": _taken_by_frr}


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
        yield name, Path(words[words.index(option) + 1] if option in words[:-1] else DAEMONS[name])
