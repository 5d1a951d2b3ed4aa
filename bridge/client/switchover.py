"""After the answer: the rebuilt SA into charon, the old one out of it, and the CHILD_SAs up; or all of it anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_commands import Install
from bridge.charon.ha_message import HaError
from bridge.charon.ike_sa import IkeSa, new_conditions
from bridge.charon.vici_types import ViciError
from bridge.client.sessions import Sessions
from bridge.client.sync_request import Answer
from bridge.config import GatewayEntry, ResumeConfig
from bridge.ike import key_confirmation
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import derive_keys, derive_sk_d, skeyseed_resume
from bridge.service.tasks import end
from bridge.stub.child_sa import NOTHING, Offer, offer, stays
from bridge.stub.types import Endpoint

log = structlog.get_logger()

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
    ) -> None:
        self._charon = charon
        self._sessions = sessions
        self._patience = config.initiate_timeout
        self._children_at_once = config.children_at_once
        self._random = random
        self._clock = clock
        self._wall = wall

    def offer(self, sa: IkeSa, gateway: GatewayEntry, local: Endpoint) -> Offer:
        """The CHILD_SAs of an SA to ask a gateway for at once, from `local`: none where the exchange that then has to
        confirm them cannot be made."""
        if not self._children_at_once or not key_confirmation.possible(sa.suite):
            return NOTHING
        assert sa.local is not None
        assert sa.remote is not None
        moved = {sa.local.address, sa.remote.address} - {local.address, gateway.address}
        return offer(
            sa.children,
            lambda child: self._charon.takes_at_once(gateway.connection, child.name) and stays(child, moved),
            self._charon.spis.next,
        )

    async def resume(
        self, old: IkeSa, gateway: GatewayEntry, answer: Answer, confirmed_by: Confirm
    ) -> tuple[IkeSa, list[str], float]:
        """The new SA in place of `old`, the names of its CHILD_SAs that are up, and since when (clock seconds).

        Raises ViciError, ChannelError or HaError; what could be resumed before still can.
        """
        new = self._rebuilt(old, gateway, answer)
        if self._charon.connection(gateway.connection) is None:
            raise ViciError(f"charon has no connection {gateway.connection!r}: add it to swanctl.conf")
        wanted = self._children_of(old, gateway)
        at_once = {made.child.name for made in answer.children}
        left = [name for name in wanted if name not in at_once]
        # without a CREATE_CHILD_SA to come, nothing else would show that both sides have the keys
        confirmation = self._confirmation(old, answer) if at_once or not left else None
        confirmed = None if confirmation is None else asyncio.ensure_future(confirmed_by(confirmation, answer))
        try:
            await self._charon.install_surely(self._install(old, new, answer, confirmation is not None))
            self._charon.tracker.adopt(new)
            # the new SA holds the virtual IP before the old one lets go of it
            await self._drop(old)
            await self._charon.installer.add_children(new.id, answer.children)
            up = self._clock()
            names = await self._installed(new, answer)
            if confirmed is not None and not await confirmed:
                raise ViciError("the gateway did not answer under the new keys")
            left = [name for name in wanted if name not in names]
            if left:
                names += await self._bring_up(gateway.connection, left, new)
                up = self._clock()
            if wanted and not names:
                raise ViciError(f"none of the CHILD_SAs {', '.join(wanted)} came up")
        except (ViciError, ChannelError, HaError):
            # the new SA never worked: the old stub stays what can be resumed (rule 6)
            await self._drop(new)
            self._sessions.lose(old)
            raise
        finally:
            if confirmed is not None:
                await end(confirmed)
        self._sessions.replaced(old.connection)
        self._charon.reconcile_soon()
        return new, names, up

    def _confirmation(self, old: IkeSa, answer: Answer) -> Confirmation | None:
        """None where no messages of this suite can be made here: then charon's own liveness check has to do."""
        suite, ike_id = old.suite, answer.ike_id
        if not key_confirmation.possible(suite):
            return None
        seed = skeyseed_resume(suite.prf, old.sk_d, answer.nonce_i, answer.nonce_r)
        keys = derive_keys(suite, seed, answer.nonce_i, answer.nonce_r, ike_id.spi_i, ike_id.spi_r)
        return Confirmation(suite, keys, ike_id.spi_i, ike_id.spi_r, random=self._random)

    async def _installed(self, new: IkeSa, answer: Answer) -> list[str]:
        """Take charon's word for the CHILD_SAs that came with the answer: the names of those that it has."""
        if not answer.children:
            return []
        listed = await self._charon.vici.find_sa(new.connection, new.id.spis)
        installed = {child.spi_in for child in listed.children if child.works} if listed is not None else set()
        for made in answer.children:
            if made.child.spi_in in installed:
                # charon tells nobody of what it is given
                self._charon.tracker.put_child(new, made.child)
            else:
                log.warning("child-not-installed", connection=new.connection, child=made.child.name, **new.id.logged)
        return list(dict.fromkeys(child.name for child in new.children))

    async def anew(self, old: IkeSa | None, gateway: GatewayEntry) -> list[str]:
        """An IKE_SA by an ordinary handshake, in place of `old`; names of the CHILD_SAs that came up.

        Raises ViciError without any, ChannelError, HaError.
        """
        names = self._children_of(old, gateway)
        if old is not None and old.connection == gateway.connection:
            # charon would ask for the CHILD_SAs on the old SA
            await self._drop(old)
        up = await self._initiate(gateway.connection, names)
        if old is not None and old.connection != gateway.connection:
            await self._drop(old)
        return up

    def _rebuilt(self, old: IkeSa, gateway: GatewayEntry, answer: Answer) -> IkeSa:
        """The new SA: keys per draft-xu-ike-sa-sync-01 section 3.3, all else as in the old one."""
        suite, ike_id = old.suite, answer.ike_id
        seed = skeyseed_resume(suite.prf, old.sk_d, answer.nonce_i, answer.nonce_r)
        return IkeSa(
            id=ike_id,
            suite=suite,
            sk_d=derive_sk_d(suite, seed, answer.nonce_i, answer.nonce_r, ike_id.spi_i, ike_id.spi_r),
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
            local_vips=old.local_vips,
            established=int(self._wall()),
            expires=old.expires,
        )

    @staticmethod
    def _install(old: IkeSa, new: IkeSa, answer: Answer, confirming: bool) -> Install:
        return Install.of(
            new,
            sk_d_old=old.sk_d,
            nonce_i=answer.nonce_i,
            nonce_r=answer.nonce_r,
            local_vips=new.local_vips,
            remote_vips=(),
            # the confirming request is not charon's
            message_id=key_confirmation.MESSAGE_ID + 1 if confirming else key_confirmation.MESSAGE_ID,
        )

    def _children_of(self, old: IkeSa | None, gateway: GatewayEntry) -> list[str]:
        """Names of the CHILD_SAs to bring up: those of the old SA that the connection has; else all it has."""
        connection = self._charon.connection(gateway.connection)
        configured = [child.name for child in connection.children] if connection else []
        wanted = list(dict.fromkeys(child.name for child in old.children)) if old is not None else []
        return [name for name in wanted if name in configured] or configured

    async def _drop(self, sa: IkeSa) -> None:
        """Remove an SA from charon in silence: no DELETE to the peer, no updown event."""
        with self._sessions.leaving(sa):
            self._charon.tracker.forget(sa.id)
            self._sessions.replaced(sa.connection)
            await self._charon.installer.delete([sa.id])
            await self._charon.channel.drained()

    async def _initiate(self, connection: str, children: list[str]) -> list[str]:
        """An IKE_SA by an ordinary handshake; names of the CHILD_SAs that came up. Raises ViciError without any: what
        did not come up in time is ended, so that it does not later."""
        up = await self._bring_up(connection, children)
        if not up:
            with contextlib.suppress(ViciError):
                await self._charon.vici.terminate(connection, 1.0, force=True)
            raise ViciError(f"{connection}: no CHILD_SA came up")
        return up

    async def _bring_up(self, connection: str, children: list[str], new: IkeSa | None = None) -> list[str]:
        """Initiate CHILD_SAs; the names of those that came up. Where not even the first does, no other is tried."""
        up: list[str] = []
        for name in children:
            try:
                await self._charon.vici.initiate(connection, name, self._patience)
            except ViciError as error:
                pair = new.id.logged if new is not None else {}
                log.warning("child-not-up", connection=connection, child=name, reason=str(error), **pair)
                if not up:
                    break
            else:
                up.append(name)
        return up
