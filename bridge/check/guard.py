"""Whether packets can leave in the clear while there is no CHILD_SA for them: those of a client to the networks behind
its gateways, and those that a gateway forwards to the virtual IPs of clients. A route leads there, and nothing of lower
priority than the CHILD_SA's policy stops them (docs/security.md).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final, NamedTuple

from bridge.charon.vici_types import ChildConfig, GuardInfo
from bridge.charon.vpns import Vpn
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, ok, warn
from bridge.ike.address import Pool

Network = IPv4Network | IPv6Network
Route = dict[str, Any]

SECONDS: Final = 5.0
USERSPACE: Final = "kernel-libipsec"
"""the plugin of charon's own ESP, which installs no policies that drop"""
_ANY: Final = "dynamic"
_EVERYTHING: Final = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
REJECTING: Final = ("blackhole", "unreachable", "prohibit")
"""types of routes that lead nowhere"""
CHILD: Final = "a child with `mode = drop` and `start_action = trap`"
UNIT: Final = "in /etc/ike-sa-sync/guard, and systemctl enable --now ike-sa-sync-guard (docs/security.md)"


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
    ways = {4: _ways(table("-4"), 4), 6: _ways(table("-6"), 6)}
    unstopped = [network for network, child in wanted.items() if not _stopped(network, child, guards)]
    open_ones = sorted(str(one) for one in unstopped if _routed(one, ways[one.version]))
    if not open_ones:
        # a route to one of these leads nowhere
        half = [] if userspace else sorted(str(one) for one in unstopped if _best(one, ways[one.version]))
        if half:
            text = f"VPN {vpn.name}: routes alone stop packets to {', '.join(half)}: with ESP in the kernel, those from"
            text += " other addresses than the virtual IP leave in the clear by charon's route while a session is up"
            return [warn("guard", text, f"{CHILD}, beside the routes (docs/security.md)")]
        return [ok("guard", f"VPN {vpn.name}: no packet leaves in the clear while there is no CHILD_SA")]
    text = f"VPN {vpn.name}: packets to {', '.join(open_ones)} leave in the clear while there is no CHILD_SA"
    fix = f"{', '.join(open_ones)} {UNIT}"
    if userspace:
        fix += f"; {USERSPACE} is loaded: a child with `mode = drop` has no effect"
    else:
        fix += f", and {CHILD}"
    return [warn("guard", text, fix)]


def gateway_guard(pools: Iterable[Pool], table: Callable[[str], list[Route]] = main_table) -> list[Finding]:
    """One finding for a gateway with pools: whether packets to a client without a CHILD_SA here follow the default
    route. More specific routes, to a router inside or of a connected network, are the operator's choice."""
    every = list(pools)
    if not every:
        return []
    ways = {4: _ways(table("-4"), 4), 6: _ways(table("-6"), 6)}
    open_ones = [pool for pool in every if _by_default(ip_network(pool.base), ways)]
    if not open_ones:
        return [ok("guard", "no packet to a client leaves in the clear while its session is not here")]
    names = ", ".join(f"{pool.name} ({pool.text})" for pool in open_ones)
    text = f"packets to clients of {names} leave in the clear by the default route while their session is not here"
    return [warn("guard", text, f"the pools of all gateways {UNIT}")]


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


class _Way(NamedTuple):
    """A route. Of several that lead to one network the greatest counts."""

    length: int
    preference: int
    """of two routes with one length the one with the smaller metric counts"""
    open: bool
    """whether it leads somewhere"""
    to: Network


def _ways(routes: Iterable[Route], version: int) -> list[_Way]:
    found = []
    for route in routes:
        try:
            to = _EVERYTHING[version] if route["dst"] == "default" else ip_network(route["dst"])
        except ValueError:
            continue
        is_open = route.get("type", "unicast") not in REJECTING
        found.append(_Way(to.prefixlen, -int(route.get("metric", 0)), is_open, to))
    return found


def _best(network: Network, ways: Iterable[_Way]) -> _Way | None:
    """The route that packets to all of a network take, but for more specific ones."""
    return max((way for way in ways if _within(network, [way.to])), key=lambda way: way[:3], default=None)


def _routed(network: Network, ways: list[_Way]) -> bool:
    """Whether a packet to the network has a way: the most specific of the routes for all of it, or one for a part."""
    best = _best(network, ways)
    return (best is not None and best.open) or any(way.open and _within(way.to, [network]) for way in ways)


def _by_default(network: Network, ways: dict[int, list[_Way]]) -> bool:
    best = _best(network, ways[network.version])
    return best is not None and best.open and not best.length
