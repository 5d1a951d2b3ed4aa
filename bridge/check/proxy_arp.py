"""Proxy ARP and proxy neighbour discovery on this host: another way in which servers of a LAN find virtual IPs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from bridge.ike.address import Pool

SYSCTL: Final = Path("/proc/sys/net")
COMMAND: Final = ("ip", "-json", "neigh", "show", "proxy")
SECONDS: Final = 5.0


def _entries() -> list[dict[str, Any]]:
    """Addresses that the kernel is told to answer for, one by one (`ip neigh add proxy`)."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, timeout=SECONDS, check=False)
        found = json.loads(done.stdout or b"[]")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []
    return [entry for entry in found if isinstance(entry, dict) and "dst" in entry]


def without_proxy(
    pools: Iterable[Pool], sysctl: Path = SYSCTL, entries: Callable[[], list[dict[str, Any]]] = _entries
) -> list[Pool]:
    """The pools that this host answers for neither by proxy ARP of an interface nor by entries of single addresses."""
    every = list(pools)
    if not every:
        return []
    arp, ndp = _switched(sysctl / "ipv4/conf", "proxy_arp"), _switched(sysctl / "ipv6/conf", "proxy_ndp")
    single = [ip_address(entry["dst"]) for entry in entries()]
    left = []
    for pool in every:
        base = ip_address(pool.base)
        entered = any(one.version == base.version and 0 <= int(one) - int(base) < pool.size for one in single)
        # proxy_ndp answers for entries only
        answered = (arp or entered) if base.version == 4 else (ndp and entered)
        if not answered:
            left.append(pool)
    return left


def _switched(folder: Path, name: str) -> bool:
    """Whether an interface has this sysctl set; `default` is for interfaces to come."""
    return any(
        file.read_text().strip() != "0"
        for file in folder.glob(f"*/{name}")
        if file.parent.name not in ("lo", "default")
    )
