"""The client's sessions: each belongs to one VPN, outlives its IKE_SAs, and is up, or lost and can be resumed.

    an IKE_SA comes up --> up --its last IKE_SA goes, neither side ended it--> lost --resumed, or set up again--> up
                           |                                              |
                           '--one of the sides ended it--> forgotten <----'--its IKE_SA has expired

Sessions of one VPN are distinguished by what they came from: the connection, the local address, the identities. A
rekeyed or reauthenticated IKE_SA belongs to the session of the one before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, Trait
from bridge.charon.vici_types import SaInfo
from bridge.charon.vpns import Vpn, Vpns, fits

LOST_SECONDS = 86_400.0
"""how long an SA that charon gave up can still be resumed from here, unless it expires before"""
ENDED = 64
"""IKE_SAs that one of the sides ended, remembered until the HA channel says so too"""


@dataclass(slots=True, eq=False)
class Session:
    """One session. `last` is the youngest IKE_SA of it that was up."""

    vpn: str
    last: IkeSa
    sas: dict[bytes, IkeSa] = field(default_factory=dict)
    """those that are up, by SPIs, the youngest last"""
    until: float = 0.0
    """until when `last` can be resumed once it is lost, in clock seconds"""
    received: bool = False
    """whether packets came through any of its CHILD_SAs"""
    previous: IkeSa | None = None
    """what its gateway rekeyed to `last`, while that gateway may lack the answer: then there is a stub of it alone"""
    rekeyed: IkeSa | None = None
    """what ended while one of the sides rekeyed it, until one of `heirs` is up or a request shows that the gateway has
    the answer"""
    heirs: tuple[bytes, ...] = ()
    """both SPIs of what `rekeyed` may have been rekeyed to"""

    @property
    def resumable_spis(self) -> tuple[bytes, ...]:
        """Both SPIs of `last` and `previous`."""
        return tuple([sa.id.spis for sa in (self.last, self.previous) if sa is not None])

    @property
    def up(self) -> bool:
        """Whether charon has an IKE_SA of it."""
        return bool(self.sas)

    @property
    def connection(self) -> str:
        """The connection that it is on, or was."""
        return self.last.connection


class Sessions:
    """Keeps them by what charon says. `clock` gives monotonic seconds, `wall` Unix ones."""

    def __init__(
        self,
        charon: Charon,
        vpns: Vpns,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._vpns = vpns
        self._clock = clock
        self._wall = wall
        self._sessions: list[Session] = []
        self.unplaced: list[IkeSa] = []
        """from before this host went down: their VPN is not known yet"""
        self._own: set[bytes] = set()
        self._expected: list[tuple[Session, str]] = []
        self._ended: deque[bytes] = deque(maxlen=ENDED)

    def __iter__(self) -> Iterator[Session]:
        """Those that are up, and those that were lost and can be resumed, in the order of the VPNs."""
        self._sessions = [session for session in self._sessions if session.up or self._resumable(session)]
        for session in self._sessions:
            # a learned VPN has another name once a connection before its first one is loaded
            vpn = self._vpns.of(session.connection)
            session.vpn = vpn.name if vpn is not None else session.vpn
        order = {vpn.name: position for position, vpn in enumerate(self._vpns)}
        return iter(sorted(self._sessions, key=lambda session: order.get(session.vpn, len(order))))

    def resumable_sas(self) -> list[IkeSa]:
        """The IKE_SAs that could be resumed now, or once their VPN is known."""
        return [*self.unplaced, *(session.last for session in self if session.last.resumable)]

    def previous(self) -> set[bytes]:
        """Those, by both SPIs, that may be resumed in place of what their gateways rekeyed them to."""
        return {session.previous.id.spis for session in self if session.previous is not None}

    def has(self, session: Session) -> bool:
        """Whether a session is still there, up or lost."""
        return session in self._sessions and (session.up or self._resumable(session))

    def of(self, spis: bytes) -> Session | None:
        """The session that an IKE_SA belongs to, or was the last or the previous one of."""
        return next((one for one in self._sessions if spis in one.sas or spis in one.resumable_spis), None)

    def sa(self, spis: bytes) -> IkeSa | None:
        """An IKE_SA of a session, by both SPIs: one that is up, the last one of a session that was lost, or the
        previous one."""
        session = self.of(spis)
        if session is None:
            return None
        return next(
            (one for one in (session.last, session.previous) if one is not None and one.id.spis == spis),
            session.sas.get(spis),
        )

    def chosen(self, vpn: str | None, connection: str | None) -> Session | None:
        """The session that an operator means: one that was lost rather than one that is up, in the order of the
        VPNs."""
        found = [
            session
            for session in self
            if (vpn is None or session.vpn == vpn) and (connection is None or session.connection == connection)
        ]
        return next((one for one in found if not one.up), None) or next(iter(found), None)

    def _resumable(self, session: Session) -> bool:
        sa = session.last
        return session.until >= self._clock() and not (sa.expires and sa.expires < self._wall())

    # what the sidecar does

    def restore(self) -> list[Session]:
        """Those of `unplaced` whose VPN is known now, as lost sessions."""
        restored = []
        for sa in list(self.unplaced):
            vpn = self._vpns.of(sa.connection)
            if vpn is None:
                continue
            self.unplaced.remove(sa)
            known = self.of(sa.id.spis)
            if known is None:
                restored.append(Session(vpn.name, sa, until=self._clock() + LOST_SECONDS))
            else:
                _inherit_authentication(known.last, sa)
        self._sessions += restored
        return restored

    def moved(self, session: Session, sa: IkeSa | None) -> None:
        """A session goes on with this IKE_SA, and with no other; with None, another session stands for it."""
        if sa is None:
            self._forget(session)
            return
        for other in self._sessions:
            if other is not session:
                other.sas.pop(sa.id.spis, None)
        self._sessions = [one for one in self._sessions if one.up or one is session or one.last is not sa]
        session.last, session.sas, session.previous, session.rekeyed = sa, {sa.id.spis: sa}, None, None
        if session not in self._sessions:
            self._sessions.append(session)

    def lose(self, session: Session, sa: IkeSa) -> None:
        """The IKE_SA of a session is gone, and can be resumed."""
        session.last, session.sas, session.until = sa, {}, self._clock() + LOST_SECONDS
        if session.previous is sa:
            session.previous = None
        if session not in self._sessions:
            self._sessions.append(session)

    def dropped(self, sa: IkeSa) -> None:
        """The sidecar took an IKE_SA out of charon."""
        session = self.of(sa.id.spis)
        if session is None or session.sas.pop(sa.id.spis, None) is None:
            return
        if session.up:
            session.last = next(reversed(session.sas.values()))
        else:
            self.lose(session, sa)

    @contextmanager
    def owning(self, spis: bytes) -> Iterator[None]:
        """While the sidecar itself installs an IKE_SA or takes one out of charon, what happens to it is no news."""
        outermost = spis not in self._own
        self._own.add(spis)
        try:
            yield
        finally:
            if outermost:
                self._own.discard(spis)

    @contextmanager
    def expecting(self, session: Session, connection: str) -> Iterator[None]:
        """While a session is set up again by a handshake, an IKE_SA of the connection that comes up is its."""
        expected = (session, connection)
        self._expected.append(expected)
        try:
            yield
        finally:
            if expected in self._expected:
                self._expected.remove(expected)

    def is_superfluous(self, session: Session, connection: str) -> bool:
        """Whether a handshake of a connection could only give a session that is up a second IKE_SA: it is not the
        sidecar's own, and no other session waits for it."""
        return self.may_stand_for(connection, session) and not (
            any(expected == connection for _, expected in self._expected)
            or any(not one.up and self.may_stand_for(connection, one) for one in self if one is not session)
        )

    def is_own(self, spis: bytes) -> bool:
        """Whether the sidecar is at work on that IKE_SA just now."""
        return spis in self._own

    # what charon says

    def changed(self, sa: IkeSa) -> Session | None:
        """An IKE_SA is up; the session that it belongs to, None where it is of no VPN."""
        vpn = self._vpns.of(sa.connection)
        if vpn is None or self.is_own(sa.id.spis) or sa.id.spis in self._ended:
            return None
        session = self.of(sa.id.spis) or self._predecessor(sa, vpn)
        if session is None:
            session = Session(vpn.name, sa)
            self._sessions.append(session)
        if sa.id.spis not in session.sas:
            if session.last.id.spis == sa.id.spis:
                _inherit_authentication(sa, session.last)
            session.sas[sa.id.spis] = sa
        if session.rekeyed is not None and sa.id.spis in session.heirs:
            # the answer to its own rekey this host has; that the gateway has this one, nothing shows yet
            session.previous = None if sa.id.initiator else session.rekeyed
            session.rekeyed = None
        session.last = next(reversed(session.sas.values()))
        return session

    def _predecessor(self, sa: IkeSa, vpn: Vpn) -> Session | None:
        """The session that a new IKE_SA goes on with."""
        for position, (session, connection) in enumerate(self._expected):
            if connection == sa.connection:
                # the next one is another's
                del self._expected[position]
                return session
        mine = [session for session in self if session.vpn == vpn.name]
        alike = [session for session in mine if _alike(session.last, sa)]
        inbound = {child.spi_in for child in sa.children}
        return (
            # rekeyed: it has the CHILD_SAs of the one before
            next((one for one in alike if inbound & {child.spi_in for child in one.last.children}), None)
            or next((one for one in alike if one.last.local == sa.local or not one.up), None)
            or next((one for one in mine if not one.up and self.may_stand_for(sa.connection, one)), None)
        )

    def fits(self, sa: IkeSa, connection: str) -> bool:
        """Whether the session of an IKE_SA may go on under a connection."""
        connections = self._charon.tracker.connections
        return fits(sa, connections.get(sa.connection), connections.get(connection))

    def may_stand_for(self, connection: str, session: Session) -> bool:
        """Whether an IKE_SA of a connection would be one of a session."""
        vpn = self._vpns.of(connection)
        return vpn is not None and vpn.name == session.vpn and self.fits(session.last, connection)

    def gone(self, sa: IkeSa) -> None:
        """charon ended an IKE_SA. Until VICI says why, its session may have to be resumed."""
        spis = sa.id.spis
        session = self.of(spis)
        if session is None or self.is_own(spis) or session.sas.pop(spis, None) is None:
            return
        heirs = self._charon.tracker.heirs(sa)
        if heirs:
            session.previous, session.rekeyed = None, sa if sa.resumable else None
            session.heirs = tuple([heir.id.spis for heir in heirs])
        if session.up:
            session.last = next(reversed(session.sas.values()))
        elif spis in self._ended or not sa.resumable:
            self._forget(session)
        else:
            self.lose(session, sa)

    def verified(self, spis: bytes) -> None:
        """A request of a gateway verified on an IKE_SA: if that was rekeyed, or comes of a rekey, its gateway has the
        answer."""
        for session in self._sessions:
            if session.previous is not None and (spis in session.sas or session.previous.id.spis == spis):
                session.previous = None
            if session.rekeyed is not None and (spis in session.heirs or session.rekeyed.id.spis == spis):
                session.rekeyed = None

    def ended(self, info: SaInfo) -> Session | None:
        """One of the sides ended an IKE_SA: nothing to resume, unless its session has another one. The session that
        went with it."""
        self._ended.append(info.spis)
        session = self.of(info.spis)
        if session is None:
            return None
        if session.previous is not None and session.previous.id.spis == info.spis:
            session.previous = None
            return None
        session.sas.pop(info.spis, None)
        if session.up:
            session.last = next(reversed(session.sas.values()))
            return None
        self._forget(session)
        return session

    def _forget(self, session: Session) -> None:
        if session in self._sessions:
            self._sessions.remove(session)


def _inherit_authentication(sa: IkeSa, kept: IkeSa) -> None:
    """charon does not know until when a resumed IKE_SA is authenticated; what was kept of it from before does."""
    if kept is not sa and kept.authentication_inherited and not sa.authentication_inherited:
        sa.authenticated_until = kept.authenticated_until
        sa.traits |= Trait.AUTHENTICATION_INHERITED


def _alike(one: IkeSa, other: IkeSa) -> bool:
    """Whether two IKE_SAs are between the same peers under the same configuration."""
    return one.connection == other.connection and one.local_id == other.local_id and one.remote_id == other.remote_id
