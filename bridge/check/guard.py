"""Whether packets of a client to the networks behind its gateways can leave in the clear while it has no CHILD_SA for
them: a route leads there, and nothing of lower priority than the CHILD_SA's policy stops them (docs/security.md).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from bridge.charon.vici_types import ChildConfig, GuardInfo
from bridge.charon.vpns import Vpn
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, ok, warn

Network = IPv4Network | IPv6Network
Route = dict[str, Any]

SECONDS: Final = 5.0
USERSPACE: Final = "kernel-libipsec"
"""the plugin of charon's own ESP, which installs no policies that drop"""
_ANY: Final = "dynamic"
_EVERYTHING: Final = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
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


def guard(vpn: Vpn, charon: CharonAnswer, table: Callable[[str], list[Route]] = main_table) -> list[Finding]:
    """One finding for a VPN with networks behind its gateways. Of a VPN for everything (0.0.0.0/0, ::/0) only a packet
    filter is a guard, which is not looked for."""
    connections = [charon.connections[one.connection] for one in vpn.gateways if one.connection in charon.connections]
    wanted = {
        network: child
        for connection in connections
        for child in connection.children
        for network in _networks(child.remote_ts)
        if network.prefixlen
    }
    if not wanted:
        return []
    userspace = USERSPACE in charon.plugins
    guards = [] if userspace else charon.guards
    routes = {4: table("-4"), 6: table("-6")}
    open_ones = sorted(
        str(network)
        for network, child in wanted.items()
        if not _stopped(network, child, guards) and _routed(network, routes[network.version])
    )
    if not open_ones:
        return [ok("guard", f"VPN {vpn.name}: no packet leaves in the clear while there is no CHILD_SA")]
    text = f"VPN {vpn.name}: packets to {', '.join(open_ones)} leave in the clear while there is no CHILD_SA"
    fix = f"ip route add blackhole {open_ones[0]} metric 4294967295, at each start"
    if userspace:
        fix += f" ({USERSPACE} is loaded: a child with `mode = drop` has no effect)"
    else:
        fix += "; or a child with `mode = drop` and `start_action = trap` (docs/security.md)"
    return [warn("guard", text, fix)]


def _networks(selectors: Iterable[str]) -> Iterable[Network]:
    """The networks of traffic selectors, whatever protocol and ports they are about."""
    for selector in selectors:
        try:
            # behind it may be protocol and ports: [tcp/443]
            yield ip_network(selector.partition("[")[0])
        except ValueError:
            # `dynamic`, or a range that is no network
            continue


def _stopped(network: Network, child: ChildConfig, guards: Iterable[GuardInfo]) -> bool:
    """Whether an installed policy stops all packets of a child to a network."""
    sources = [one for one in _networks(child.local_ts) if one.version == network.version]
    sources = sources or [_EVERYTHING[network.version]]
    return any(
        _within(network, _whole(one.remote_ts))
        and (_ANY in one.local_ts or all(_within(source, _whole(one.local_ts)) for source in sources))
        for one in guards
    )


def _whole(selectors: Iterable[str]) -> list[Network]:
    """The networks of those traffic selectors that are about all protocols and ports."""
    return list(_networks(one for one in selectors if "[" not in one))


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
