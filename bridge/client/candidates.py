"""Which gateways a session may go on at, in which order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vpns import Vpn, is_address
from bridge.client.sessions import Session, Sessions
from bridge.client.sync_request import Target
from bridge.config import is_name
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

RESOLVE_SECONDS = 2.0
"""how long an attempt waits for a name of which no address is known"""
KNOWN_SECONDS = 0.1
"""the same where all have one from before: the resolver may be behind the gateway that failed"""


class Candidates:
    """The gateways of a VPN as addresses. Names are resolved at each attempt."""

    def __init__(self, charon: Charon, sessions: Sessions) -> None:
        self._charon = charon
        self._sessions = sessions
        self._resolved: dict[str, tuple[str, ...]] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}
        """names that the resolver has not answered yet: each occupies a thread"""

    async def close(self) -> None:
        """Wait for no name any more."""
        await end(*self._asked.values())

    async def resolve(self, vpn: Vpn) -> None:
        """Look the names of a VPN's gateways up, for a while; what the resolver said before holds until it answers."""
        names = {entry.address for entry in vpn.gateways if is_name(entry.address)}
        if not names:
            return
        for name in names - self._asked.keys():
            self._asked[name] = spawn(f"resolve {name}", self._look_up(name))
        known = names <= self._resolved.keys()
        asked = [self._asked[name] for name in names]
        await asyncio.wait(asked, timeout=KNOWN_SECONDS if known else RESOLVE_SECONDS)
        for name in sorted(names & self._asked.keys() - self._resolved.keys()):
            log.warning("gateway-not-resolved", name=name, reason="the resolver does not answer")

    async def _look_up(self, name: str) -> None:
        try:
            await self._resolve(name)
        finally:
            del self._asked[name]

    async def _resolve(self, name: str) -> None:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            log.warning("gateway-not-resolved", name=name, reason=str(error))
            return
        addresses = tuple(dict.fromkeys(str(ip_address(str(row[4][0]).partition("%")[0])) for row in found))
        if addresses:
            self._resolved[name] = addresses

    def addresses(self, vpn: Vpn) -> set[str]:
        """The addresses of a VPN's gateways, as far as they are known."""
        return {target.address for target in self._targets(vpn)}

    def _targets(self, vpn: Vpn) -> Iterator[Target]:
        for entry in vpn.gateways:
            connection = self._charon.connection(entry.connection)
            sources = tuple(filter(is_address, connection.local_addresses)) if connection is not None else ()
            for address in self._resolved.get(entry.address, ()) if is_name(entry.address) else (entry.address,):
                yield Target(address, entry.connection, sources)

    def of(self, vpn: Vpn, session: Session | None, to: str | None, *, restored: bool) -> list[Target]:
        """The gateways to try, those of `to` alone where it is given. In the order of the configuration, but the
        gateway that the session is on comes last; or first, where it was this host that failed (`restored`).

        Entries of the session's own uplink and identity come before others, which count only while they are no other
        session's own.
        """
        sa = session.last if session is not None else None
        found = [target for target in self._targets(vpn) if to in (None, target.address)]
        if sa is not None:
            own = [target for target in found if self._sessions.fits(sa, target.connection)]
            others = [other.last for other in self._sessions if other is not session and other.vpn == vpn.name]
            found = own + [
                target
                for target in found
                if target not in own and not any(self._sessions.fits(other, target.connection) for other in others)
            ]
        here = sa.remote.address if sa is not None and sa.remote is not None else None
        return sorted(self._loaded(found), key=lambda target: (target.address == here) is not restored)

    def _loaded(self, targets: list[Target]) -> list[Target]:
        """Those whose connection charon has; all where it has none, for it may be about to load them."""
        known = [target for target in targets if self._charon.connection(target.connection) is not None]
        for connection in sorted({target.connection for target in targets} - {target.connection for target in known}):
            log.error("connection-missing", connection=connection, fix="add it to swanctl.conf and load it")
        return known or targets

    def is_here(self, sa: IkeSa, target: Target) -> bool:
        """Whether an IKE_SA is at this gateway."""
        return sa.remote is not None and sa.remote.address == target.address
