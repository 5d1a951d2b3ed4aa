"""The VPNs of this host: gateways that stand for each other, and which connection leads to which of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.config import DEFAULT_VPN, ClientConfig, GatewayEntry, is_name


class Vpn(NamedTuple):
    """One VPN; its gateways, best first."""

    name: str
    gateways: tuple[GatewayEntry, ...]
    resume_on_down: bool

    def has(self, connection: str) -> bool:
        """Whether a connection leads to one of its gateways."""
        return any(entry.connection == connection for entry in self.gateways)


class Vpns(Protocol):
    """All VPNs, in order."""

    by_initiative: bool
    """whether only sessions that this host initiated belong to them"""

    def __iter__(self) -> Iterator[Vpn]: ...

    def of(self, connection: str) -> Vpn | None:
        """The VPN that a connection belongs to."""

    def named(self, connection: str, gateways: Sequence[str]) -> None:
        """A gateway of a session of this connection names others that resume too."""


Connections = Callable[[], dict[str, ConnectionInfo]]
"""charon's, by name, as they are known now"""


def vpns_of(config: ClientConfig, connections: Connections) -> Vpns:
    """The VPNs that are configured; where there are none, those that charon's connections show."""
    if config.gateways or config.vpns:
        return ConfiguredVpns(config)
    return LearnedVpns(connections, config.resume_on_down)


class ConfiguredVpns:
    """The VPNs of client.yaml."""

    by_initiative = False

    def __init__(self, config: ClientConfig) -> None:
        self._vpns = [Vpn(name, vpn.gateways, vpn.resume_on_down) for name, vpn in config.vpns.items()]
        if config.gateways:
            self._vpns.insert(0, Vpn(DEFAULT_VPN, config.gateways, config.resume_on_down))
        self._by_connection = {entry.connection: vpn for vpn in self._vpns for entry in vpn.gateways}

    def __iter__(self) -> Iterator[Vpn]:
        return iter(self._vpns)

    def of(self, connection: str) -> Vpn | None:
        """The VPN that a connection belongs to."""
        return self._by_connection.get(connection)

    def named(self, connection: str, gateways: Sequence[str]) -> None:
        """The configuration alone counts."""


class LearnedVpns:
    """Those of charon's connections that lead to an address: connections with the same remote identity and the same
    children are of one VPN, which has the name of its first connection. Its gateways are the addresses of them all, and
    those that its gateways have named."""

    by_initiative = True

    def __init__(self, connections: Connections, resume_on_down: bool) -> None:
        self._connections = connections
        self._resume_on_down = resume_on_down
        self._named: dict[str, tuple[str, ...]] = {}
        self._read: dict[str, ConnectionInfo] = {}
        self._vpns: list[Vpn] = []
        self._by_connection: dict[str, Vpn] = {}

    def __iter__(self) -> Iterator[Vpn]:
        self._refresh()
        return iter(self._vpns)

    def of(self, connection: str) -> Vpn | None:
        """The VPN that a connection belongs to."""
        self._refresh()
        return self._by_connection.get(connection)

    def named(self, connection: str, gateways: Sequence[str]) -> None:
        """A gateway of a session of this connection names others that resume too."""
        if self._named.get(connection) != tuple(gateways):
            self._named[connection] = tuple(gateways)
            self._group()

    def _refresh(self) -> None:
        connections = self._connections()
        # a charon that is away, or about to load them, says nothing about them
        if connections and connections is not self._read:
            self._read = connections
            self._group()

    def _group(self) -> None:
        groups: dict[object, list[ConnectionInfo]] = {}
        for connection in self._read.values():
            if any(_leads_to_one(address) for address in connection.remote_addresses):
                # without an identity nothing says that two gateways are of one VPN
                shape = (connection.remote_ids, _children(connection)) if connection.remote_ids else connection.name
                groups.setdefault(shape, []).append(connection)
        self._vpns = [Vpn(group[0].name, self._gateways(group), self._resume_on_down) for group in groups.values()]
        self._by_connection = {entry.connection: vpn for vpn in self._vpns for entry in vpn.gateways}

    def _gateways(self, group: Sequence[ConnectionInfo]) -> tuple[GatewayEntry, ...]:
        entries = [
            GatewayEntry(address, connection.name)
            for connection in group
            for address in filter(_leads_to_one, connection.remote_addresses)
        ]
        known = {entry.address for entry in entries}
        for connection in group:
            for address in self._named.get(connection.name, ()):
                if address not in known:
                    known.add(address)
                    entries.append(GatewayEntry(address, connection.name))
        return tuple(entries)


def fits(sa: IkeSa, own: ConnectionInfo | None, other: ConnectionInfo | None) -> bool:
    """Whether a session with this IKE_SA, of the connection `own`, may go on under the connection `other`: they are of
    one uplink and one identity. What is not configured, or not known yet, fits anything."""
    if other is None or (own is not None and own.name == other.name):
        return True
    address = sa.local.address if sa.local is not None else None
    uplink = (
        not other.local_addresses
        or (own is not None and own.local_addresses == other.local_addresses)
        or any(_covers(configured, address) for configured in other.local_addresses)
    )
    identity = (
        not other.local_ids
        or (own is not None and (not own.local_ids or own.local_ids == other.local_ids))
        or (sa.local_id is not None and sa.local_id.text in other.local_ids)
    )
    return uplink and identity


def _children(connection: ConnectionInfo) -> tuple[ChildConfig, ...]:
    """What a connection's CHILD_SAs are about. In ipsec.conf each has the name of its connection, so that the name says
    nothing about what it has in common with others."""
    return tuple(child._replace(name="") if child.name == connection.name else child for child in connection.children)


def _leads_to_one(configured: str) -> bool:
    """Whether one of `remote_addrs` is an address or a name, and no range or subnet."""
    return is_address(configured) or is_name(configured)


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _covers(configured: str, address: str | None) -> bool:
    """Whether an address is one of `local_addrs`; a name, or a range, may be any."""
    if address is None:
        return True
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(configured, strict=False)
    except ValueError:
        return True
