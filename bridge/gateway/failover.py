"""The failure of another gateway: noticed by its heartbeat, its stubs fetched, its clients asked to resume here.

`peer_watch` decides who has failed, `announcer` which clients are asked when; here are the bank, the event loop and the
network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from bridge.bank import gateway_facts, recent_traffic
from bridge.bank.failover_progress import SHOWN_SECONDS, FailoverProgress
from bridge.bank.gateway_facts import Facts
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.bank.redis_gateways import GATEWAYS_MAX
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import Condition, is_set
from bridge.config import FailoverConfig
from bridge.gateway.announcer import Announcer
from bridge.gateway.due_heartbeats import DueHeartbeats
from bridge.gateway.other_family import family
from bridge.gateway.other_gateways import OtherGateways
from bridge.gateway.peer_watch import SAID_ITSELF, PeerState, PeerWatch
from bridge.ike.stub_exchange import StubMessage, move_message_id
from bridge.net.interface import Sender
from bridge.net.packet import PORT_NAT_T, has_marker
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

TICK_SECONDS: Final = 0.02
"""between two looks at what is to be announced"""
MISSING: Final = 2.0
"""times `detect` that a heartbeat is missing in the bank before its gateway counts as failed without an event of it"""
AGAIN_SECONDS: Final = 0.2
"""between two questions to a bank that does not answer"""
DOWNLOADS: Final = 8
"""failed gateways whose stubs are read at a time"""
ENDS: Final = frozenset({"del", "expired"})
"""keyspace events after which there is no stub any more"""

FIRST_BATCH: Final = 64
"""stubs of sessions with traffic that are read at a time"""
FIRST_SECONDS: Final = 0.5
"""that these may take"""

Needs = tuple[str, frozenset[str]]
"""a connection, and the children of a session"""
Turns = Callable[[Stub], list[str]]
"""the gateways that could announce a session and resume it"""

ANNOUNCED: Final = {
    "announcements_announced": "sessions of failed gateways whose clients were asked to resume here",
    "announcements_resumed": "of these, sessions that were resumed or ended",
    "announcements_refused": "of these, sessions whose client does not have this gateway, or moves already",
    "announcements_silent": "of these, sessions whose client did not answer or arrive: left to its dead peer detection",
    "announcements_false_alarms": "failures that a client has contradicted: its gateway answered",
}
"""what is counted of announcements"""


class Failover:
    """Watches the other gateways' heartbeats. `address` is this gateway's, None where it is not configured: nothing is
    announced then. `spent` returns whether a session ended or was resumed here."""

    def __init__(
        self,
        config: FailoverConfig,
        address: str | None,
        bank: StubBank,
        prefetch: Prefetch,
        charon: Charon,
        sender: Sender,
        spent: Callable[[Index], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._address = address
        self._bank = bank
        self._prefetch = prefetch
        self._charon = charon
        self._sender = sender
        self._spent = spent
        self._clock = clock
        self._announcer = Announcer(
            address or "", self._source, self._send, lambda: move_message_id(time.time()), rate=float(config.rate)
        )
        self.watch = PeerWatch(config.detect, self._failed, self._back, clock())
        self.beats = DueHeartbeats(config.detect, bank.gateways, clock=clock)
        """of the other gateways, by the events of the keyspace"""
        self._sources: dict[int, str] = {}
        """this gateway's address by family (4, 6), as its sessions have it"""
        self._aliases: dict[str, list[str]] = {}
        """other addresses in the index of gateways that failed"""
        self._seen: dict[str, float] = {}
        """when (monotonic seconds) this gateway last saw the heartbeats of others in the bank. Events count for these
        alone: each that an attacker forges would cost memory and a download"""
        self._downloading = asyncio.Semaphore(DOWNLOADS)
        self._missing: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._again: dict[str, bool] = {}
        """gateways that failed again while their stubs were read, and whether they have lost their sessions"""

    def start(self) -> None:
        """Begin to announce what fails from now on."""
        self._tasks = [spawn("announce", self._announce()), spawn("heartbeats", self.beats.run())]

    async def close(self) -> None:
        """End."""
        await end(*self._fetching.values(), *self._tasks)

    # what is known of the other gateways

    def heartbeat_event(self, happened: Event) -> None:
        """Something happened to a gateway's heartbeat in the bank."""
        event, gateway = happened.event, bank_keys.gateway_name(happened.key.removeprefix(bank_keys.HEARTBEAT))
        if gateway is None or gateway == self._address or gateway not in self._seen:
            return
        if event == "set":
            self.beats.beat(gateway)
            self.watch.heartbeat(gateway)
        elif event == "expired":
            self.beats.gone(gateway)
            self.watch.expired(gateway, self._clock())
        elif event == "del":
            self.beats.gone(gateway)
            self.watch.deleted(gateway)

    def stub_event(self, event: Event) -> None:
        """Something happened to a stub in the bank."""
        if event.event in ENDS and self._announcer.busy:
            try:
                self._announcer.over(Index.parse(event.key), self._clock())
            except StubError:
                return

    def has_failed(self, gateway: str) -> bool:
        """Whether another gateway counts as failed now."""
        return self.watch.state(gateway) is PeerState.FAILED

    def gauges(self, metrics: Metrics) -> None:
        """What became of announcements, for `status`."""
        for outcome, text in ANNOUNCED.items():
            metrics.total(outcome, text, partial(self.total, outcome.removeprefix("announcements_")))

    def disturbed(self) -> None:
        """The bank did not answer, or is another one than before."""
        self.watch.disturbed(self._clock())

    async def own_heartbeat(self, written: bool, seconds: float, alive: Collection[str] | None) -> None:
        """This gateway's heartbeat was written or not, in so many seconds, and then these others are `alive` in the
        bank. Decides about gateways whose heartbeat has expired while the bank did not work, and finds those whose end
        was not received."""
        now = self._clock()
        self.watch.own_heartbeat(written, seconds, now)
        if alive is None:
            return
        for gateway in alive:
            self._seen[gateway] = now
            self.watch.heartbeat(gateway)
        self._forget()
        # one that is missing now may come back with its next heartbeat: the bank may have been emptied
        self._missing = {gateway: self._missing.get(gateway, now) for gateway in self._seen.keys() - set(alive)}
        for gateway, missing in self._missing.items():
            # what was read may be older than the last event
            since = max(missing, self.beats.written.get(gateway, missing))
            if now - since >= MISSING * self._config.detect and self.watch.state(gateway) is PeerState.ALIVE:
                self.watch.expired(gateway, now)
        if self.watch.suspects and self.watch.calm(now):
            self.watch.look(alive, now)

    def _forget(self) -> None:
        """Of more gateways than there can be, forget those that were not seen for the longest time."""
        for gateway in sorted(self._seen, key=self._seen.__getitem__)[: max(len(self._seen) - GATEWAYS_MAX, 0)]:
            del self._seen[gateway]
            self.beats.forget(gateway)
            self._aliases.pop(gateway, None)
            self.watch.forget(gateway)

    def report(self, message: StubMessage) -> bool:
        """A client's Moving, not proved yet; whether it is about an announcement of this gateway."""
        return self._announcer.report(message, self._clock())

    def expects(self, spis: bytes) -> bool:
        """Whether a report about the SA with these SPIs is expected."""
        return self._announcer.expects(spis)

    def status(self) -> list[dict[str, Any]]:
        """How far the announcements of each failure are."""
        rows: list[dict[str, Any]] = msgspec.to_builtins(self._announcer.status(self._clock()))
        return rows

    def progress(self) -> list[FailoverProgress]:
        """The same of those that go on, or ended not long ago."""
        return self._announcer.status(self._clock(), SHOWN_SECONDS)

    def total(self, outcome: str) -> float:
        """Sessions whose announcement had this outcome, of all failures; "false_alarms": failures."""
        return self._announcer.false_alarms if outcome == "false_alarms" else self._announcer.totals[outcome]

    # a failure

    def _failed(self, gateway: str, reason: str) -> None:
        log.warning("gateway-failed", gateway=gateway, reason=reason)
        lost, announces = reason == SAID_ITSELF, self._config.announce and self._address is not None
        if not (lost and announces):
            self._prefetch.fetch(gateway)
        if not announces:
            return
        running = self._fetching.get(gateway)
        if running is not None and not running.done():
            self._again[gateway] = lost or self._again.get(gateway, False)
            return
        task = self._fetching[gateway] = spawn(f"announce {gateway}", self._prepare(gateway, lost))
        task.add_done_callback(partial(self._prepared, gateway))

    def _prepared(self, gateway: str, task: asyncio.Task[None]) -> None:
        if self._fetching.get(gateway) is task:
            del self._fetching[gateway]

    def _back(self, gateway: str) -> None:
        log.info("gateway-back", gateway=gateway)
        self._announcer.back(gateway, self._clock())
        for address in (gateway, *self._aliases.pop(gateway, ())):
            self._prefetch.drop(address)

    async def _prepare(self, gateway: str, lost: bool) -> None:
        """Begin to announce the failure of `gateway`, and the next one where it fails again while its stubs are read:
        what was announced before may have ended, and it may have other sessions."""
        while not await self._prepare_one(gateway, lost):
            lost = self._again.pop(gateway) or lost

    async def _prepare_one(self, gateway: str, lost: bool) -> bool:
        """Begin to announce a failure: the sessions that had traffic last, and once all its stubs are here, the others.
        `lost`: also if it is back by then. Whether it did not fail again meanwhile."""
        begun = False
        while True:
            try:
                async with self._downloading:
                    addresses = await self._addresses_of(gateway)
                    turns = await self._turns(gateway)
                    if not begun:
                        begun = await self._begin(gateway, lost, addresses, turns)
                    if lost:
                        # those clients come immediately, and would wait while stubs are read and decoded; clients that
                        # ask a dead gateway in vain come later
                        await self._first_gone_on(gateway)
                    await self._fetch_all(addresses)
                    if gateway in self._again:
                        return False
                    stubs = [stub for address in addresses async for page in self._stubs(address) for stub in page]
            except BankUnavailable as error:
                log.info(error.event, component="announcements", gateway=gateway, reason=str(error))
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            break
        if gateway in self._again:
            return False
        if begun or self._open(gateway, lost):
            self._announcer.add(gateway, [(stub, turns(stub)) for stub in stubs], complete=True)
        if self.watch.state(gateway) is not PeerState.FAILED:
            # what was fetched since it is back
            for address in addresses:
                self._prefetch.drop(address)
        return True

    async def _first_gone_on(self, gateway: str) -> None:
        while self._announcer.first_under_way(gateway, self._clock()):  # noqa: ASYNC110 - the clock ends it too
            await asyncio.sleep(TICK_SECONDS)

    async def _begin(self, gateway: str, lost: bool, addresses: Collection[str], turns: Turns) -> bool:
        """Begin with the sessions that had traffic last, as far as `gateway` has posted which these are; whether there
        are any."""
        begun = False
        # that costs little, and what it is worth ends with the download of all
        with contextlib.suppress(BankUnavailable, TimeoutError):
            async with asyncio.timeout(FIRST_SECONDS):
                posted = recent_traffic.decode(await self._bank.posted(bank_keys.TRAFFIC_KIND, gateway))
                first = [index for index in posted if index.gateway in addresses]
                for start in range(0, len(first), FIRST_BATCH):
                    answer = await self._bank.get(first[start : start + FIRST_BATCH])
                    stubs = [stub for stub in answer if stub is not None]
                    if stubs and not begun and not (begun := self._open(gateway, lost)):
                        break
                    self._announcer.add(gateway, [(stub, turns(stub)) for stub in stubs], complete=False)
        return begun

    def _open(self, gateway: str, lost: bool) -> bool:
        """Begin with no session, unless the gateway is back and may have them still."""
        failed = self.watch.state(gateway) is PeerState.FAILED
        if failed or lost:
            self._announcer.begin(gateway, self._clock())
            if not failed:
                self._announcer.back(gateway, self._clock())
            self._wake.set()
        return failed or lost

    async def _addresses_of(self, gateway: str) -> list[str]:
        """All under which stubs of a gateway may be. Raises BankUnavailable."""
        facts = gateway_facts.decode(await self._bank.posted(bank_keys.FACTS_KIND, gateway) or b"")
        signs = await self._bank.gateways()
        # what a gateway posts is cleartext: no gateway makes another one fail by it
        aliases = [one for one in (facts.addresses if facts else ()) if one not in signs]
        self._aliases[gateway] = aliases
        return [gateway, *aliases]

    async def _fetch_all(self, addresses: Iterable[str]) -> None:
        """Have all stubs under these addresses here."""
        for address in addresses:
            self._prefetch.fetch(address)
        for address in addresses:
            await self._prefetch.fetched(address)

    def _source(self, stub: Stub) -> str:
        """This gateway's address of the family of a stub's client; empty where it has none."""
        kind = family(stub.remote.address)
        if kind not in self._sources:
            self._sources[kind] = self._address_of(kind, stub.remote.address)
        return self._sources[kind]

    def _address_of(self, kind: int, peer: str) -> str:
        """The configured one, that of an SA here, or the one that the kernel would send from."""
        own = (sa.local.address for sa in self._charon.tracker.established() if sa.local is not None)
        for address in (self._address or "", *own):
            if address and family(address) == kind:
                return address
        try:
            with socket.socket(socket.AF_INET6 if kind == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
                # nothing is sent: the kernel chooses the route and the address
                probe.connect((peer, PORT_NAT_T))
                return str(probe.getsockname()[0])
        except OSError:
            return ""

    async def _stubs(self, gateway: str) -> AsyncIterator[list[Stub]]:
        held = self._prefetch.held(gateway)
        if held is not None:
            yield list(held)
            return
        async for page in self._bank.download(gateway):
            yield page

    async def _turns(self, gateway: str) -> Turns:
        """Which living gateways could announce and resume a stub, this one among them. Raises BankUnavailable."""
        others = await OtherGateways.ask(self._bank, self._address)
        others.facts.pop(gateway, None)
        if self._address is not None:
            connections = self._charon.tracker.connections
            others.facts[self._address] = Facts(
                {name: [child.name for child in info.children] for name, info in connections.items()}
            )
        known: dict[Needs, list[str]] = {}
        self._sources = {}

        def turns(stub: Stub) -> list[str]:
            # `initiator` says who rekeyed last
            if is_set(Condition.ORIGINAL_INITIATOR, stub.conditions) or not self._source(stub):
                return []
            needs = stub.connection, frozenset(child.name for child in stub.children)
            if needs not in known:
                known[needs] = others.able(*needs)
            return known[needs]

        return turns

    async def _announce(self) -> None:
        while True:
            await self._wake.wait()
            for index in self._announcer.under_way():
                if self._spent(index):
                    self._announcer.over(index, self._clock())
            self._announcer.tick(self._clock())
            if not self._announcer.busy:
                self._wake.clear()
            await asyncio.sleep(TICK_SECONDS)

    def _send(self, stub: Stub, octets: bytes) -> None:
        port, peer = stub.local.port, stub.remote
        try:
            self._sender.send(self._source(stub), port, peer.address, peer.port, octets, has_marker(port, peer.port))
        except OSError as error:
            log.info("announcement-not-sent", peer=peer.address, reason=error.strerror)
