"""Whether packets of a client to the networks behind its gateways can leave in the clear while it has no CHILD_SA for
them: a route leads there, and nothing of lower priority than the CHILD_SA's policy stops them (docs/security.md).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from bridge.charon.vici_types import ConnectionInfo
from bridge.charon.vpns import Vpn
from bridge.check.finding import Finding, ok, warn

Network = IPv4Network | IPv6Network
Route = dict[str, Any]

SECONDS: Final = 5.0
DROP: Final = "DROP"
"""mode of a child that drops packets, of lower priority than those of CHILD_SAs"""
REJECTING: Final = ("blackhole", "unreachable", "prohibit")
"""types of routes that lead nowhere"""


def main_table(family: str) -> list[Route]:
    """The routes of table main, where charon has none of its own. `family`: -4 or -6."""
    try:
        command = ("ip", "-json", family, "route", "show", "table", "main")
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        found = json.loads(done.stdout or b"[]")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []
    return [route for route in found if isinstance(route, dict) and "dst" in route]


def guard(
    vpn: Vpn, connections: dict[str, ConnectionInfo], table: Callable[[str], list[Route]] = main_table
) -> list[Finding]:
    """One finding for a VPN with networks behind its gateways. Of a VPN for everything (0.0.0.0/0, ::/0) only a packet
    filter is a guard, which is not looked for."""
    dropped = [one for info in connections.values() for one in _networks(info, drops=True)]
    mine = [connections[entry.connection] for entry in vpn.gateways if entry.connection in connections]
    wanted = {one for info in mine for one in _networks(info, drops=False) if one.prefixlen}
    if not wanted:
        return []
    routes = {4: table("-4"), 6: table("-6")}
    open_ones = sorted(str(one) for one in wanted if not _within(one, dropped) and _routed(one, routes[one.version]))
    if not open_ones:
        return [ok("guard", f"VPN {vpn.name}: no packet leaves in the clear while there is no CHILD_SA")]
    text = f"VPN {vpn.name}: packets to {', '.join(open_ones)} leave in the clear while there is no CHILD_SA"
    fix = (
        f"ip route add blackhole {open_ones[0]} metric 4294967295, at each start; or a child with `mode = drop` "
        "(docs/security.md)"
    )
    return [warn("guard", text, fix)]


def _networks(info: ConnectionInfo, *, drops: bool) -> Iterable[Network]:
    """The networks of a connection's children, of those with `mode = drop` or of the others."""
    for child in info.children:
        if (child.mode == DROP) is not drops:
            continue
        for selector in child.remote_ts:
            try:
                # behind it may be protocol and ports: [tcp/443]
                yield ip_network(selector.partition("[")[0])
            except ValueError:
                # `dynamic`, or a range that is no network
                continue


def _within(one: Network, others: Iterable[Network]) -> bool:
    return any(one.version == other.version and one.subnet_of(other) for other in others)  # type: ignore[arg-type]


def _routed(network: Network, routes: Iterable[Route]) -> bool:
    """Whether a packet to the network has a way: the most specific of the routes for all of it, or one for a part."""
    found: list[tuple[int, int, bool]] = []
    for route in routes:
        open_route = route.get("type", "unicast") not in REJECTING
        text = "::/0" if network.version == 6 else "0.0.0.0/0"
        try:
            to = ip_network(text if route["dst"] == "default" else route["dst"])
        except ValueError:
            continue
        if to.version != network.version:
            continue
        if network.subnet_of(to):  # type: ignore[arg-type]
            # of two with one length the smaller metric counts
            found.append((to.prefixlen, -int(route.get("metric", 0)), open_route))
        elif open_route and to.subnet_of(network):  # type: ignore[arg-type]
            return True
    return max(found)[2] if found else False
