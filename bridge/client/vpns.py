"""The VPNs of this host: gateways that stand for each other, and which connection leads to which of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ConnectionInfo
from bridge.config import DEFAULT_VPN, ClientConfig, GatewayEntry


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

    def __iter__(self) -> Iterator[Vpn]: ...

    def of(self, connection: str) -> Vpn | None:
        """The VPN that a connection belongs to."""


class ConfiguredVpns:
    """The VPNs of client.yaml."""

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


def _covers(configured: str, address: str | None) -> bool:
    """Whether an address is one of `local_addrs`; a name, or a range, may be any."""
    if address is None:
        return True
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(configured, strict=False)
    except ValueError:
        return True
