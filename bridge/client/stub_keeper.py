"""What a client holds itself: for each of its sessions the stub that its gateway sealed for it, and, if asked to, the
sessions in a file (draft-xu-ike-sa-sync-01 section 3.5, fourth form).

A stub is fetched with GET Stub when an IKE_SA came up, was rekeyed, or changed, and again before it expires. A gateway
that gives none is asked ever more seldom.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from bridge.charon.ike_sa import IkeSa, client_sa, sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.client.session_file import Session, SessionFileError, load, pack, write
from bridge.config import HeldConfig
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.message import MalformedMessage
from bridge.ike.stub_exchange import StubMessage, build_get, parse_stub_message, verify
from bridge.net.interface import Sender
from bridge.net.packet import has_marker
from bridge.service.tasks import end, spawn
from bridge.stub.stub import StubError

log = structlog.get_logger()

SETTLE_SECONDS: Final = 1.0
"""after a change, before the new stub is fetched: the gateway has to learn of it too, and changes come in groups"""
RETRANSMIT_SECONDS: Final = (0.5, 1.0, 2.0)
"""how long each request waits for its answer"""
RETRY_MIN, RETRY_MAX = 60.0, 3600.0
"""between attempts at a gateway that does not answer"""
REFRESH_SHARE: Final = 0.5
"""a stub is fetched again after this share of its life"""
NAMED_SECONDS: Final = 600.0
"""between two requests to a gateway that gives no stub, but names the other gateways"""
SAVE_SECONDS: Final = 0.1
"""changes within this time are written together"""


@dataclass(slots=True, eq=False)
class _Holding:
    """What is held of one IKE_SA."""

    sealed: bytes | None = field(default=None, repr=False)
    until: float = 0.0
    shape: object = None
    """what it looked like when its stub was fetched"""
    request: StubMessage | None = None
    """waits for its answer"""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class StubKeeper:
    """Holds the client's stubs. `sessions` gives the IKE_SAs that could be resumed now, those lost included; `named`
    is called with the other gateways that the gateway of an IKE_SA names."""

    def __init__(
        self,
        config: HeldConfig,
        tracker: SaTracker,
        sender: Sender,
        sessions: Callable[[], Iterable[IkeSa]],
        named: Callable[[IkeSa, Sequence[str]], None],
        *,
        random: Callable[[int], bytes] = os.urandom,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._fetches = config.fetch
        self._file = Path(config.file) if config.file is not None else None
        self._tracker = tracker
        self._sender = sender
        self._sessions = sessions
        self._named = named
        self.kept: Callable[[], Set[bytes]] = frozenset
        """gives more of them, by both SPIs, that may be resumed while this process runs"""
        self._random = random
        self._wall = wall
        self._held: dict[bytes, _Holding] = {}
        self._written = b""
        self._dirty = asyncio.Event()
        self._saving: asyncio.Task[None] | None = None

    def restore(self) -> list[IkeSa]:
        """The sessions in the file that have not expired."""
        if self._file is None:
            return []
        try:
            sessions = load(self._file)
        except SessionFileError as error:
            log.error("sessions-not-restored", reason=str(error))
            return []
        found = []
        for session in sessions:
            if session.stub.expires <= self._wall():
                continue
            sa = sa_of(session.stub)
            self._held[sa.id.spis] = _Holding(session.sealed, session.until, _shape(sa))
            found.append(sa)
        log.info("sessions-restored", sessions=len(found), file=str(self._file))
        return found

    async def close(self) -> None:
        """Stop; what is held on disk stays."""
        tasks = [holding.task for holding in self._held.values()]
        await end(*(task for task in (*tasks, self._saving) if task is not None))

    # what is held

    def stub_of(self, sa: IkeSa) -> bytes | None:
        """The sealed stub of an IKE_SA, if one is held and still good."""
        holding = self._held.get(sa.id.spis)
        return holding.sealed if holding is not None and holding.until > self._wall() else None

    def given(self, sa: IkeSa, sealed: bytes | None, lifetime: int | None) -> None:
        """An IKE_SA was resumed, perhaps with a first stub of its own."""
        if sealed is not None and self._fetches:
            holding = self._held.setdefault(sa.id.spis, _Holding())
            holding.sealed, holding.until = sealed, self._wall() + (lifetime or 0)
        self.changed(sa)

    def changed(self, sa: IkeSa) -> None:
        """An IKE_SA to a configured gateway is up, or is another than before."""
        self.save_soon()
        if not self._fetches:
            return
        holding = self._held.setdefault(sa.id.spis, _Holding())
        if holding.shape != _shape(sa):
            holding.shape = _shape(sa)
            if holding.task is not None:
                holding.task.cancel()
            holding.task = spawn(f"hold {sa.connection}", self._keep(sa, holding))

    async def _keep(self, sa: IkeSa, holding: _Holding) -> None:
        pause, retry = SETTLE_SECONDS, RETRY_MIN
        while True:
            await asyncio.sleep(pause)
            if self._tracker.sas.get(sa.id.spis) is not sa:
                return
            if await self._fetch(sa, holding):
                left = (holding.until - self._wall()) * REFRESH_SHARE
                pause, retry = max(left, RETRY_MIN) if holding.sealed is not None else NAMED_SECONDS, RETRY_MIN
            else:
                log.debug("no-stub-received", connection=sa.connection, **sa.id.logged)
                pause, retry = retry, min(2 * retry, RETRY_MAX)

    async def _fetch(self, sa: IkeSa, holding: _Holding) -> bool:
        """GET Stub; whether an answer came."""
        assert sa.local is not None
        assert sa.remote is not None
        request = build_get(client_sa(sa), self._random(NONCE_OCTETS))
        holding.request = parse_stub_message(request)
        holding.answered.clear()
        marker = has_marker(sa.local.port, sa.remote.port)
        try:
            for wait in RETRANSMIT_SECONDS:
                try:
                    self._sender.send(*_from_to(sa), request, marker)
                except OSError as error:
                    log.info("request-not-sent", gateway=sa.remote.address, reason=error.strerror, **sa.id.logged)
                try:
                    async with asyncio.timeout(wait):
                        await holding.answered.wait()
                except TimeoutError:
                    continue
                return True
        finally:
            holding.request = None
        return False

    def received(self, message: StubMessage) -> None:
        """A message of exchange type 240 that a gateway sent; accepted if it is the proved answer to our request."""
        holding = self._held.get(message.spis)
        sa = self._tracker.sas.get(message.spis)
        if (
            holding is None
            or holding.request is None
            or sa is None
            or (message.sealed_stub is None and not message.sync.gateways)
            or not verify(message, sa.suite.prf, sa.sk_d, before=holding.request)
        ):
            return
        self._named(sa, message.sync.gateways)
        holding.answered.set()
        if message.sealed_stub is None:
            return
        holding.sealed, holding.until = message.sealed_stub, self._wall() + (message.lifetime or 0)
        log.info(
            "stub-held",
            connection=sa.connection,
            octets=len(message.sealed_stub),
            seconds=message.lifetime,
            **sa.id.logged,
        )
        self.save_soon()

    # the file

    def save_soon(self) -> None:
        """The sessions are others than before, or their stubs are."""
        self._dirty.set()
        if self._saving is None:
            self._saving = spawn("save", self._save())

    async def _save(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(SAVE_SECONDS)
            self._dirty.clear()
            sessions = [sa for sa in self._sessions() if sa.local is not None and sa.local_id is not None]
            self._prune({sa.id.spis for sa in sessions} | self.kept())
            if self._file is None:
                continue
            try:
                octets = pack([self._session(sa) for sa in sessions])
                if octets != self._written:
                    # fsync takes its time
                    await asyncio.to_thread(write, self._file, octets)
                    self._written = octets
            except (SessionFileError, StubError, ValueError) as error:
                log.error("sessions-not-saved", reason=str(error))

    def _session(self, sa: IkeSa) -> Session:
        holding = self._held.get(sa.id.spis) or _Holding()
        stub = sa.stub(sa.index_there(), with_secret=False, expires=sa.expires)
        return Session(stub, holding.sealed, holding.until)

    def _prune(self, alive: set[bytes]) -> None:
        for spis in [spis for spis in self._held if spis not in alive and spis not in self._tracker.sas]:
            task = self._held.pop(spis).task
            if task is not None:
                task.cancel()


def gateway_message(octets: bytes) -> StubMessage | None:
    """A message of exchange type 240 that claims to be a gateway's; None for any other."""
    try:
        message = parse_stub_message(octets)
    except MalformedMessage as error:
        log.debug("stub-message-malformed", reason=str(error))
        return None
    return message if message.sync.from_gateway else None


def _from_to(sa: IkeSa) -> tuple[str, int, str, int]:
    assert sa.local is not None
    assert sa.remote is not None
    return sa.local.address, sa.local.port, sa.remote.address, sa.remote.port


def _shape(sa: IkeSa) -> object:
    """What a stub says about an IKE_SA and can change while it lives."""
    return (sa.remote, sa.local_vips, tuple(child.spi_in for child in sa.children))
