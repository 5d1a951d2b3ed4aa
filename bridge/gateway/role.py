"""The gateway role of a sidecar: its parts put together, started and stopped (bridge.sidecar says in which order)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from bridge.bank import open_bank
from bridge.bank.interface import StubBank
from bridge.charon import metrics as charon_metrics
from bridge.charon.charon import Charon
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.status import charon_status, sa_rows
from bridge.charon.vici_types import SaInfo
from bridge.config import ConfigError, GatewayConfig
from bridge.gateway import shared_addresses
from bridge.gateway.address_book import AddressBook
from bridge.gateway.address_keeper import AddressKeeper
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission
from bridge.gateway.authentication_end import AuthenticationEnd
from bridge.gateway.bank_followers import BankFollowers
from bridge.gateway.bank_reconciler import BankReconciler
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.decision import Decision
from bridge.gateway.downloads import Downloads
from bridge.gateway.drain import Drain
from bridge.gateway.duplicates import Duplicates
from bridge.gateway.endings import Endings
from bridge.gateway.failover import Failover
from bridge.gateway.gateway_bank import GatewayBank
from bridge.gateway.interception import Interception
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.left_in_kernel import LeftInKernel
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.moving_sessions import MovingSessions
from bridge.gateway.postings import Postings
from bridge.gateway.previous_gateways import PreviousGateways
from bridge.gateway.publisher import Publisher
from bridge.gateway.rebuild import Rebuilder
from bridge.gateway.responder import Responder
from bridge.gateway.return_path import ReturnPath
from bridge.gateway.revocation import LockOut, Revocations
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.gateway.session_hooks import SessionHooks
from bridge.gateway.shared_addresses import SharedAddresses
from bridge.gateway.stub_lookup import StubLookup
from bridge.gateway.takeover_barriers import Barriers
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.gateway.uniqueness import Uniqueness
from bridge.ike.cookie import Cookies
from bridge.net.interface import Packet, Sender
from bridge.net.queue_rules import TAG_OCTETS
from bridge.service.control import Answer, Command, ControlServer
from bridge.service.process import code, log_level, raw_udp, serve_metrics
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.stub import Stub

ADDRESSES_SECONDS: Final = 5.0
"""that the start waits for charon to give out addresses: there may be no connection loaded yet"""


def load_keyring(key_file: str | Path) -> Keyring:
    """The gateways' keys. Raises ConfigError for a file that cannot be used."""
    try:
        return Keyring.load(key_file)
    except (SealError, OSError) as error:
        raise ConfigError(f"bank.key_file: {error}") from error


class GatewayRole:
    """Stores a stub of each of charon's IKE_SAs in the bank, and resumes from it. It is a Listener of charon's
    (bridge.charon.sa_tracker)."""

    @classmethod
    async def open(cls, config: GatewayConfig, keyring: Keyring, charon: Charon, stack: AsyncExitStack) -> GatewayRole:
        """The role with its bank and its raw socket, closed with `stack`. Raises StartError."""
        raw = raw_udp(stack)
        bank = await open_bank(config.bank, keyring, serve=True)
        role = cls(config, keyring, charon, bank, raw)
        role._bank.close_with(stack)
        stack.push_async_callback(role._endings.close)
        stack.push_async_callback(role._hooks.close)
        stack.push_async_callback(role._uniqueness.close)
        return role

    def __init__(self, config: GatewayConfig, keyring: Keyring, charon: Charon, bank: StubBank, sender: Sender) -> None:
        self._config = config
        self._charon = charon
        self._metrics = GatewayMetrics()
        self._bank = around = GatewayBank(config, keyring, charon, bank, self._metrics)
        prefetch, writer, heartbeat, events = around.prefetch, around.writer, around.heartbeat, around.events
        self._endings = endings = Endings(config.state)
        self._failover = failover = Failover(
            config.failover, config.address, bank, prefetch, charon, sender, endings.__contains__
        )
        around.on_heartbeat = failover.own_heartbeat
        self._revocations = revocations = Revocations(bank, keyring, config.state)
        living = LivingSas(charon.tracker)
        known = KnownSessions(endings, living, revocations)
        self._lock_out = lock_out = LockOut(revocations, bank, charon, endings, writer, config.address)
        self._uniqueness = Uniqueness(charon, living)
        self._authentication = AuthenticationEnd(charon, self._metrics)
        self._publisher = Publisher(config, writer, bank, known)
        self._elsewhere = SessionElsewhere(charon, bank, self._metrics, rekeyed=self._publisher.rekeys.stubs)
        self._publisher.locked_out = lock_out.soon
        charon.tracker.on_deleting = self._publisher.deleting
        self._stubs = ClientStubs(
            config.sync.client_stub,
            keyring,
            charon.tracker,
            sender,
            config.address,
            self._metrics,
        )
        if config.sync.tell_gateways:
            self._stubs.gateways = self._others
        self._stubs.expected = failover.expects
        self._stubs.alive = lambda: heartbeat.charon_alive
        lookup = StubLookup(
            prefetch,
            bank,
            self._stubs,
            known,
            self._metrics,
            reachable=lambda: heartbeat.bank_reachable,
            timeout=config.bank.get_timeout,
        )
        self._drain = Drain(charon, bank, sender, config.address, self._elsewhere)
        unconfirmed = Unconfirmed(
            charon,
            endings,
            lookup.ended,
            self._stubs,
            writer,
            self._metrics,
            confirm_timeout=config.sync.confirm_timeout,
        )
        unconfirmed.on_resumed = self._resumed
        admission = Admission(config.sync, Cookies(), unconfirmed.of_source)
        holders = AddressHolders(charon, bank, config.address, heir=self._publisher.rekeys.heir)
        tag = os.urandom(TAG_OCTETS)
        rebuilder = Rebuilder(charon, self._stubs, config.sync, tag)
        decision = Decision(charon, known, unconfirmed, admission, holders, config.sync, rebuilder)
        self._responder = Responder(
            charon,
            lookup,
            admission,
            decision,
            sender,
            config.sync,
            self._metrics,
        )
        self._responder.on_stub_message = self._stub_message
        self._responder.able = lambda: self._interception.shows_first_requests() and heartbeat.bank_writable
        self._duplicates = Duplicates(charon, AddressBook(bank), config.sync, self._metrics, config.address)
        self._keeper = AddressKeeper(charon, AddressBook(bank), limit=config.ha.placeholders)
        self._return_path = ReturnPath(enabled=config.network.return_path in (None, "announced"))
        previous = PreviousGateways(failover.has_failed, failover.beats.written, detect=config.failover.detect)
        self._hooks = SessionHooks(config.hooks, charon.tracker, self._metrics, config.address, previous, config.state)
        charon.on_connected = self._keeper.charon_connected
        self._duplicates.before_end = self._keeper.keep
        self._moving = MovingSessions(self._hooks, living, self._keeper)
        self._moving.on_came += [self._uniqueness.resumed, self._authentication.watch, self._return_path.changed]
        self._moving.on_came.append(self._keeper.taken)
        self._moving.on_gone += [self._duplicates.gone, self._authentication.forget, self._return_path.gone]
        self._elsewhere.before_end = self._moving.moving_away
        self._interception = Interception(
            config.intercept,
            self._responder.packets,
            self._responder.busy,
            lambda: self._responder.flooded,
            tag=tag,
        )
        charon.handshakes.hold = self._interception
        self._reconciler = BankReconciler(config, bank, charon, self._publisher, known, self._elsewhere)
        self._reconciler.on_ending = self._keeper.ended
        charon.tracker.on_lost.append(self._stubs.lost.put)
        charon.tracker.on_lost.append(lambda _: self._publisher.rekeys.lost())
        self._left = LeftInKernel(charon, bank, config.address)
        self._left.removed = self._return_path.gone
        charon.tracker.on_lost.append(self._left.lost)
        self._elsewhere.charon_answers = lambda: heartbeat.charon_alive is True
        self._elsewhere.not_asked = self._left.over
        self._postings: Postings | None = None
        if config.address is not None:
            self._postings = Postings(config.address, bank, charon, self._publisher, failover, self._metrics)
        self._downloads = Downloads(bank, prefetch, config.address, events)
        self._shared: SharedAddresses | None = None
        if config.takeover.addresses:
            self._shared = SharedAddresses(
                config,
                charon,
                bank,
                self._publisher,
                writer,
                Barriers(charon, endings, living, revocations),
                self._moving,
            )
            taking = [bank_keys.posted_key(bank_keys.TAKEOVER_KIND, one) for one in sorted(config.takeover.addresses)]
            announced = self._shared.announced
            events.follow(bank_keys.TAKEOVER, lambda it: announced(it.key.removeprefix(bank_keys.TAKEOVER)), *taking)
        followers = BankFollowers(
            prefetch, failover, self._reconciler, self._elsewhere, lock_out, around.rotation, self._left, self._shared
        )
        followers.follow(events)
        bank.on_return = followers.returned
        self._gauges()

    async def start(self, stack: AsyncExitStack) -> None:
        """Begin to serve metrics and the control socket, and to answer; ended with `stack`. Raises StartError,
        ControlError."""
        serve_metrics(stack, self._metrics, self._config.metrics)
        commands: dict[str, Command] = {
            "status": self._status,
            "counters": self._counters,
            "log-level": log_level,
            "fetch": self._downloads.fetch,
            "fetched": self._downloads.progress,
            "drain": self._drain.start,
            "drained": self._drain.progress,
            "drain-stop": self._drain.stop,
        }
        if self._shared is not None:
            commands |= self._shared.commands()
        control = ControlServer(self._config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)
        self._responder.start()
        stack.push_async_callback(self._responder.close)
        stack.push_async_callback(self._drain.close)

    async def follow(self, stack: AsyncExitStack) -> None:
        """What follows charon: the bank is kept in step, and requests are intercepted; ended with `stack`."""
        self._failover.start()
        stack.push_async_callback(self._failover.close)
        self._bank.events.start()
        stack.push_async_callback(self._bank.events.close)
        self._reconciler.start()
        stack.push_async_callback(self._reconciler.close)
        self._bank.heartbeat.start()
        stack.push_async_callback(self._bank.heartbeat.close)
        posted = (
            ()
            if self._postings is None
            else (
                ("stats", self._postings.keep_stats()),
                ("traffic", self._postings.keep_traffic()),
                ("facts", self._postings.keep_facts()),
            )
        )
        for name, work in (
            *posted,
            ("keys", self._bank.rotation.run()),
            ("endings", self._endings.keep()),
            ("lock-out", self._lock_out.run()),
            ("rekeys", self._publisher.rekeys.run()),
            ("elsewhere", self._elsewhere.run()),
            ("left-in-kernel", self._left.run()),
            ("duplicates", self._duplicates.run()),
            ("authentication-end", self._authentication.run()),
            ("addresses", self._keeper.run()),
            ("session-hooks", self._hooks.run(self._charon.reconciled)),
        ):
            stack.push_async_callback(end, spawn(name, work))
        stack.push_async_callback(self._return_path.close)
        if self._shared is not None:
            await self._shared.start(stack)
        stack.push_async_callback(self._interception.close)
        await self._interception.start()
        # until then no handshake of a client gets an address
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._keeper.settled.wait(), ADDRESSES_SECONDS)
        # before all else ends: that takes longer on a busy machine than others wait for a heartbeat
        stack.push_async_callback(self._bank.heartbeat.close)

    # charon's news (bridge.charon.sa_tracker.Listener)

    def changed(self, sa: IkeSa) -> None:
        """An SA of this gateway came up or changed."""
        self._publisher.publish(sa)
        self._duplicates.changed(sa)
        self._authentication.watch(sa)
        self._return_path.changed(sa)
        self._hooks.changed(sa)
        if self._shared is not None:
            self._shared.sessions.changed(sa)

    def _resumed(self, sa: IkeSa, old: Stub) -> None:
        """A session went on here as `sa`."""
        self._hooks.resumed(sa, old)
        self._publisher.publish(sa)
        self._moving.came(sa)

    def gone(self, sa: IkeSa) -> None:
        """An SA of this gateway ended."""
        self._responder.unconfirmed.gone(sa)
        self._responder.activation.gone(sa.id.spis)
        self._moving.gone(sa)
        if self._shared is not None:
            self._shared.sessions.gone(sa)
        if sa.up:
            self._publisher.gone(sa, self._charon.tracker.heirs(sa))

    def verified(self, ike_id: IkeId) -> None:
        """A request of a client was verified."""
        self._responder.unconfirmed.verified(ike_id)
        self._responder.activation.verified(ike_id.spis)
        self._publisher.rekeys.answered(ike_id.spis)
        if self._shared is not None:
            self._shared.sessions.verified(ike_id)

    def down(self, info: SaInfo) -> None:
        """The HA channel reports the same, in order; after this VICI has no more figures of it."""
        self._hooks.down(info)

    async def recover(self, infos: list[SaInfo]) -> list[IkeSa] | None:
        """SAs that charon has and this sidecar does not know, from the bank (bridge.charon.charon.Recover)."""
        ours = await self._shared.foreign(infos) if self._shared is not None else infos
        if ours is None:
            return None
        found = await self._publisher.recover(ours)
        for sa in found or ():
            self._authentication.watch(sa)
            self._duplicates.known(sa)
            self._hooks.known(sa)
        if self._shared is not None:
            self._shared.recovered(found or (), infos)
        return found

    def _stub_message(self, packet: Packet) -> None:
        """A client's request for its stub; or its report, not proved yet, about an announcement or a Move."""
        if not self._stubs.concerns(packet):
            self._responder.strays.take(packet)
            return
        report = self._stubs.received(packet)
        if report is not None and not self._failover.report(report):
            self._drain.moving(report)

    # its state

    def _gauges(self) -> None:
        charon_metrics.of_charon(self._metrics, self._charon)
        for part in (
            self._interception,
            self._failover,
            self._bank,
            self._keeper,
            self._return_path,
            self._duplicates,
            self._hooks,
            self._lock_out,
            self._left,
        ):
            part.gauges(self._metrics)
        shared_addresses.gauges(self._metrics, self._shared)
        gauge, responder = self._metrics.gauge, self._responder
        gauge(
            "toggle_seconds",
            "how long the last activation kept the IKE_SAs of one segment from answering, at most",
            lambda: self._charon.installer.toggle_seconds,
        )
        gauge("unconfirmed", "rebuilt IKE_SAs not confirmed yet", lambda: len(responder.unconfirmed))
        gauge("not_activated", "rebuilt IKE_SAs that charon has PASSIVE", lambda: len(responder.activation))
        gauge(
            "clients_sync_last",
            "clients that sent IKE_SA_SYNC last within a day, as release 0.1 does; seen with intercept.match anywhere",
            lambda: responder.sync_last,
        )
        gauge("cookies_demanded", "1 while every request must carry a cookie", lambda: float(responder.demanding))

    def _others(self) -> Sequence[str]:
        """The addresses of the other gateways that live, of both families."""
        return [*self._bank.heartbeat.others, *(self._postings.others if self._postings is not None else ())]

    async def _counters(self, _: dict[str, Any]) -> Answer:
        return {"counters": self._metrics.values()}

    async def _status(self, _: dict[str, Any]) -> Answer:
        return {
            "role": "gateway",
            "code": code(),
            "address": self._config.address,
            "time": int(time.time()),
            "charon": charon_status(self._charon),
            "bank": self._bank.status(),
            "unconfirmed": len(self._responder.unconfirmed),
            "clients_sync_last": self._responder.sync_last,
            "failovers": self._failover.status(),
            "hooks": self._hooks.status(),
            "takeover": self._shared.status() if self._shared is not None else None,
            "sas": await sa_rows(self._charon),
            "counters": self._metrics.values(),
        }
