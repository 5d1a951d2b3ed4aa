"""After the answer: the rebuilt SA into charon, the old one out of it, and the CHILD_SAs up; or a full handshake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError, IkeId
from bridge.charon.ike_sa import IkeSa, Trait, new_conditions
from bridge.charon.install import Install
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.charon.vpns import Vpn
from bridge.client.sessions import Session, Sessions
from bridge.client.sync_request import Answer, Target
from bridge.config import ResumeConfig, children_policy
from bridge.ike import key_confirmation
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import Resumption
from bridge.net import address_removal
from bridge.service.tasks import end
from bridge.stub.child_sa import NOTHING, Offer, offer, stays
from bridge.stub.types import Endpoint

log = structlog.get_logger()

NEWS_SECONDS = 0.5
"""how long the HA channel may take to report an IKE_SA that VICI has"""
LOOK_SECONDS = 0.01
"""between two looks for that"""
END_SECONDS = 1.0
"""how long charon has to end an IKE_SA"""

Confirm = Callable[[Confirmation, Answer], Awaitable[bool]]
"""carries the first protected exchange of an SA; whether it was answered in time"""


class Switchover:
    """Makes the client's charon go on with an IKE_SA at another gateway."""

    def __init__(
        self,
        charon: Charon,
        sessions: Sessions,
        config: ResumeConfig,
        *,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        remove_address: Callable[[str], None] = address_removal.remove,
    ) -> None:
        self._charon = charon
        self._sessions = sessions
        self._patience = config.initiate_timeout
        self._children = children_policy(config.children_in_exchange, config.children_at_once)
        self._random = random
        self._clock = clock
        self._wall = wall
        self._remove_address = remove_address

    def offer(self, sa: IkeSa, gateway: Target, local: Endpoint) -> Offer:
        """The CHILD_SAs of an SA to ask a gateway for in the exchange, from `local`: none where the exchange that then
        has to confirm them cannot be made."""
        if self._children == "never" or not key_confirmation.possible(sa.suite):
            return NOTHING
        assert sa.local is not None
        assert sa.remote is not None
        moved = {sa.local.address, sa.remote.address} - {local.address, gateway.address}
        return offer(
            sa.children,
            lambda child: (
                self._charon.takes_at_once(gateway.connection, child.name, self._children) and stays(child, moved)
            ),
            self._charon.spis.next,
        )

    async def resume(
        self,
        session: Session,
        old: IkeSa,
        gateway: Target,
        answer: Answer,
        confirmed_by: Confirm,
        *,
        stay: bool,
        origin: IkeSa,
    ) -> tuple[IkeSa, list[str], float]:
        """The new SA in place of `old`, the names of its CHILD_SAs that are up, and since when (clock seconds). With
        `stay` the old SA is there until all of that has succeeded. It is resumed from `origin`: `old`, or what the
        gateway rekeyed to it, which goes too.

        Raises ViciError, ChannelError or HaError; what could be resumed before still can.
        """
        if self._charon.connection(gateway.connection) is None:
            raise ViciError(f"charon has no connection {gateway.connection!r}: add it to swanctl.conf")
        # the end of the old one is no news either: its gateway may learn of the new one first
        with self._sessions.owning(answer.ike_id.spis), self._sessions.owning(old.id.spis):
            try:
                new, names, up = await self._switched(old, origin, gateway, answer, confirmed_by, stay)
            except (ViciError, ChannelError, HaError):
                # the new SA never worked: the old stub stays what can be resumed (rule 6)
                await self._remove_if_possible(answer.ike_id)
                if old.id.spis not in self._charon.tracker.sas:
                    self._sessions.lose(session, old)
                raise
            self._sessions.moved(session, new)
            if origin is not old:
                await self._remove_if_possible(origin.id)
        self._charon.reconcile_soon()
        return new, names, up

    async def _switched(
        self, old: IkeSa, origin: IkeSa, gateway: Target, answer: Answer, confirmed_by: Confirm, stay: bool
    ) -> tuple[IkeSa, list[str], float]:
        wanted = self._children_of(old, gateway)
        at_once = {made.child.name for made in answer.children}
        left = [name for name in wanted if name not in at_once]
        spi_i, spi_r = answer.ike_id.spi_i, answer.ike_id.spi_r
        resumption = Resumption(origin.suite, origin.sk_d, answer.nonce_i, answer.nonce_r, spi_i, spi_r, answer.g_ir)
        # without a CREATE_CHILD_SA to come, nothing else would show that both sides have the keys; where no messages of
        # this suite can be made here, charon's own liveness check has to do
        confirmation: Confirmation | None = None
        if (at_once or not left) and key_confirmation.possible(origin.suite):
            confirmation = Confirmation(origin.suite, resumption.keys(), spi_i, spi_r, random=self._random)
        # charon has removed the old SA: there is nothing that its gateway could end too early
        lost = not stay and old.id.spis not in self._charon.tracker.sas
        confirmed: asyncio.Future[bool] | None = None
        if confirmation is not None and lost:
            # no time is lost: it travels and is answered while the SA is made ready and charon installs it
            confirmed = asyncio.ensure_future(confirmed_by(confirmation, answer))
            await asyncio.sleep(0)
        try:
            new = self._rebuilt(origin, gateway, answer, resumption.sk_d())
            # with one connection for both, charon would make the CHILD_SAs that are left on the old SA
            shared = old.connection == gateway.connection
            replaces = None if stay or (left and not shared) else old
            listed, up = await self._install(new, origin, answer, replaces, confirming=confirmation is not None)
            if confirmation is not None and confirmed is None:
                # only now: the old gateway ends its SA once it learns that the session went on here, and then the
                # CHILD_SAs of the new one have to be there
                confirmed = asyncio.ensure_future(confirmed_by(confirmation, answer))
            self._charon.tracker.adopt(new)
            names = self._installed(new, answer, listed)
            if confirmed is not None and not await confirmed:
                raise ViciError("the gateway did not answer under the new keys")
            there = replaces is None
            left = [name for name in wanted if name not in names]
            if left:
                if shared and there:
                    await self._drop(old)
                    there = False
                names += await self._bring_up(gateway.connection, left, new)
                up = self._clock()
            if wanted and not names:
                raise ViciError(f"none of the CHILD_SAs {', '.join(wanted)} came up")
            if there:
                # last: until the new CHILD_SAs are there, its policies keep packets from leaving in the clear
                await self._drop(old)
        finally:
            if confirmed is not None:
                await end(confirmed)
        return new, names, up

    async def _install(
        self,
        new: IkeSa,
        origin: IkeSa,
        answer: Answer,
        replaces: IkeSa | None,
        *,
        confirming: bool,
    ) -> tuple[SaInfo, float]:
        """Have charon take `new` in with the CHILD_SAs of the answer, in the place of `replaces`; what VICI says of it
        then, and when that was done (clock seconds)."""
        install = Install.of(
            new,
            sk_d_old=origin.sk_d,
            nonce_i=answer.nonce_i,
            nonce_r=answer.nonce_r,
            g_ir=answer.g_ir,
            local_vips=new.local_vips,
            remote_vips=(),
            children=answer.children,
            replaces=replaces.id if replaces is not None else None,
            # the confirming request is not charon's
            message_id=key_confirmation.MESSAGE_ID + 1 if confirming else key_confirmation.MESSAGE_ID,
        )
        if replaces is None:
            return await self._charon.install_surely(install)
        try:
            done = await self._charon.install_surely(install)
            self._charon.tracker.forget(replaces.id)
        except (ViciError, ChannelError):
            # charon may have removed it already
            await self._drop(replaces)
            raise
        self._sessions.dropped(replaces)
        return done

    def _installed(self, new: IkeSa, answer: Answer, listed: SaInfo) -> list[str]:
        """Take charon's word for the CHILD_SAs that came with the answer: the names of those that it has."""
        installed = {child.spi_in for child in listed.children if child.works}
        for made in answer.children:
            if made.child.spi_in in installed:
                # charon reports nothing about what it is given
                self._charon.tracker.put_child(new, made.child)
            else:
                log.warning("child-not-installed", connection=new.connection, child=made.child.name, **new.id.logged)
        return list(dict.fromkeys(child.name for child in new.children))

    async def handshake(self, session: Session | None, gateway: Target) -> list[str]:
        """An IKE_SA by a full handshake, in place of the session's; names of the CHILD_SAs that came up.

        Raises ViciError without any, ChannelError, HaError.
        """
        old = session.last if session is not None else None
        names = self._children_of(old, gateway)
        if old is not None and old.connection == gateway.connection:
            # charon would ask for the CHILD_SAs on the old SA
            await self._leave(old)
        if session is None:
            return await self._initiate(gateway.connection, names)
        with self._sessions.expecting(session, gateway.connection):
            up = await self._initiate(gateway.connection, names)
            new = await self._noticed(session, gateway.connection, old)
        # without a new IKE_SA, that of another session has the CHILD_SAs
        self._sessions.moved(session, new)
        if old is not None and old.connection != gateway.connection:
            await self._take_addresses(old)
            await self._leave(old)
        return up

    async def _take_addresses(self, old: IkeSa) -> None:
        """Take the virtual IPs that go with an IKE_SA from this host before charon ends it. charon removes the policies
        first, and the route to the networks behind the gateways is the new IKE_SA's by then: a packet from the old
        address would follow it in the clear, past routes that lead nowhere."""
        if not old.local_vips or old.id.spis not in self._charon.tracker.sas:
            return
        try:
            listed = await self._charon.vici.list_sas()
            kept = {vip for info in listed if info.spis != old.id.spis for vip in info.local_vips}
        except ViciError as error:
            log.warning("address-not-removed", reason=str(error), connection=old.connection, **old.id.logged)
            return
        for vip in old.local_vips:
            try:
                if vip not in kept:
                    self._remove_address(vip)
            except OSError as error:
                # charon does it, a moment after the policies
                log.warning("address-not-removed", address=vip, reason=error.strerror, **old.id.logged)

    async def _noticed(self, session: Session, connection: str, old: IkeSa | None) -> IkeSa | None:
        """The IKE_SA that a session has now: what the HA channel has to say of it may come after VICI's answer."""
        deadline = self._clock() + NEWS_SECONDS
        while True:
            for sa in session.sas.values():
                if sa.connection == connection and sa is not old:
                    return sa
            if self._clock() > deadline:
                return None
            await asyncio.sleep(LOOK_SECONDS)

    async def end_half_open(self, session: Session, vpn: Vpn) -> None:
        """End the handshakes that charon itself still tries for a session that is up again (dpd_action = restart): each
        would become a second session once its gateway is back."""
        sa = session.last
        for connection in dict.fromkeys(entry.connection for entry in vpn.gateways):
            if not self._sessions.is_superfluous(session, connection):
                continue
            for info in await self._charon.vici.list_sas(connection):
                if info.state == "CONNECTING" and info.initiator:
                    log.info("half-open-ended", connection=connection, gateway=info.remote.address, **sa.id.logged)
                    await self._end(info)

    def _rebuilt(self, old: IkeSa, gateway: Target, answer: Answer, sk_d: bytes) -> IkeSa:
        """The new SA: keys per draft-xu-ike-sa-sync-01 section 3.3, all else as in the old one."""
        new = IkeSa(
            id=answer.ike_id,
            suite=old.suite,
            sk_d=sk_d,
            up=True,
            local_id=old.local_id,
            remote_id=old.remote_id,
            eap_id=old.eap_id,
            local=answer.local,
            remote=answer.remote,
            connection=gateway.connection,
            conditions=new_conditions(
                old.conditions, initiator=True, nat_here=answer.nat_here, nat_there=answer.nat_there
            ),
            extensions=old.extensions,
            established=int(self._wall()),
            expires=old.expires,
            # a gateway of release 0.1 says nothing of it
            authenticated_until=int(self._wall()) + answer.auth_lifetime
            if answer.auth_lifetime is not None
            else old.authenticated_until,
            traits=Trait.AUTHENTICATION_INHERITED,
        )
        new.local_vips = old.local_vips
        return new

    def _children_of(self, old: IkeSa | None, gateway: Target) -> list[str]:
        """Names of the CHILD_SAs to bring up: those of the old SA that the connection has; else all it has."""
        connection = self._charon.connection(gateway.connection)
        configured = [child.name for child in connection.children] if connection else []
        wanted = list(dict.fromkeys(child.name for child in old.children)) if old is not None else []
        return [name for name in wanted if name in configured] or configured

    async def _drop(self, sa: IkeSa) -> None:
        """Remove an SA from charon without a DELETE to the peer or an updown event."""
        await self._remove(sa.id)
        self._sessions.dropped(sa)

    async def _remove(self, ike_id: IkeId) -> None:
        with self._sessions.owning(ike_id.spis):
            self._charon.tracker.forget(ike_id)
            await self._charon.installer.delete([ike_id])
            await self._charon.channel.drained()

    async def _remove_if_possible(self, ike_id: IkeId) -> None:
        """The same. What charon cannot be told now, it is told later (bridge.charon.installer)."""
        with contextlib.suppress(ChannelError):
            await self._remove(ike_id)

    async def _leave(self, sa: IkeSa) -> None:
        """End an SA in whose place another gateway set up one: its own may live, and no mark in the bank reports it."""
        if sa.id.spis in self._charon.tracker.sas:
            with self._sessions.owning(sa.id.spis):
                await self._charon.end_surely(sa)
        self._sessions.dropped(sa)

    async def _end(self, info: SaInfo) -> None:
        """End an IKE_SA that this sidecar made, or does not want."""
        with self._sessions.owning(info.spis), contextlib.suppress(ViciError):
            await self._charon.vici.end_sa(info.unique_id, END_SECONDS)

    async def _initiate(self, connection: str, children: list[str]) -> list[str]:
        """An IKE_SA by a full handshake; names of the CHILD_SAs that came up. Raises ViciError without any: what did
        not come up in time is ended, so that it does not later."""
        before = {info.unique_id for info in await self._charon.vici.list_sas(connection)}
        used: set[str] = set()
        up = await self._bring_up(connection, children, used=used)
        if not up:
            for info in await self._charon.vici.list_sas(connection):
                if info.unique_id in used - before and not any(child.works for child in info.children):
                    await self._end(info)
            raise ViciError(f"{connection}: no CHILD_SA came up")
        return up

    async def _bring_up(
        self, connection: str, children: list[str], new: IkeSa | None = None, used: set[str] | None = None
    ) -> list[str]:
        """Initiate CHILD_SAs; the names of those that came up. Where not even the first does, no other is tried. `used`
        gets the unique IDs of the IKE_SAs that charon worked on."""
        up: list[str] = []
        for name in children:
            try:
                await self._charon.vici.initiate(connection, name, self._patience, set() if used is None else used)
            except ViciError as error:
                if await self._works(connection, name, new):
                    # charon calls it a failure that the CHILD_SA is there already
                    up.append(name)
                    continue
                pair = new.id.logged if new is not None else {}
                log.warning("child-not-up", connection=connection, child=name, reason=str(error), **pair)
                if not up:
                    break
            else:
                up.append(name)
        return up

    async def _works(self, connection: str, name: str, new: IkeSa | None) -> bool:
        """Whether a CHILD_SA of this name is up: of the IKE_SA `new`, or of any."""
        return any(
            child.name == name and child.works
            for info in await self._charon.vici.list_sas(connection)
            if info.state == "ESTABLISHED" and (new is None or info.spis == new.id.spis)
            for child in info.children
        )
