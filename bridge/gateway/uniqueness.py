"""`unique = replace | keep` of a connection holds for a resumption as for a handshake: one IKE_SA of a peer.

charon applies the policy to handshakes: it counts IKE_SAs with the same identities, by the EAP identity where there is
one, and of the same address family. `replace` ends those that were there, `keep` refuses the new one unless it comes
from the same address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import Unique
from bridge.gateway.living import LivingSas
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

log = structlog.get_logger()


class Uniqueness:
    """Looks at the IKE_SAs that live here."""

    def __init__(self, charon: Charon, living: LivingSas) -> None:
        self._charon = charon
        self._living = living
        self._ending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop."""
        await end(*self._ending)

    def forbids(self, stub: Stub, remote: Endpoint, own: AbstractSet[bytes]) -> bool:
        """Whether the session of a stub may not come here from `remote`, since its peer has another one; `own` are the
        IKE_SAs of the same session, by both SPIs."""
        return self._policy(stub.connection) is Unique.KEEP and any(
            other.remote is not None and other.remote.address != remote.address
            for other in self._living.of_peer(stub.local_id, stub.eap_id or stub.remote_id)
            if _same_family(other.remote, remote) and other.id.spis not in own | {stub.spi_i + stub.spi_r}
        )

    def resumed(self, sa: IkeSa) -> None:
        """A session went on here as `sa`: end the others of its peer, where the policy says so."""
        if self._policy(sa.connection) is not Unique.REPLACE or sa.local_id is None:
            return
        peer = sa.eap_id or sa.remote_id
        if peer is None:
            return
        for other in self._living.of_peer(sa.local_id, peer):
            if other is not sa and _same_family(other.remote, sa.remote):
                task = spawn("replace", self._end(other))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    def _policy(self, connection: str) -> Unique:
        found = self._charon.connection(connection)
        return found.unique if found is not None else Unique.NO

    async def _end(self, sa: IkeSa) -> None:
        log.info("sa-replaced", connection=sa.connection, reason="unique = replace", **sa.id.logged)
        try:
            await self._charon.end_surely(sa)
        except ChannelError as error:
            log.warning("duplicate-not-ended", reason=str(error), **sa.id.logged)


def _same_family(one: Endpoint | None, other: Endpoint | None) -> bool:
    return one is not None and other is not None and (":" in one.address) == (":" in other.address)
