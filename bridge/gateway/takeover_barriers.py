"""What keeps a gateway from taking a session over, apart from what its stub says. No I/O."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import Unique
from bridge.gateway import takeover_session as reasons
from bridge.gateway.endings import Endings
from bridge.gateway.living import LivingSas
from bridge.gateway.revocation import Revocations
from bridge.stub.stub import Stub


class Barriers(NamedTuple):
    """What keeps a gateway from having a session, apart from what its stub says."""

    charon: Charon
    endings: Endings
    living: LivingSas
    revocations: Revocations

    def of(self, stub: Stub) -> str:
        """The reason why this gateway cannot have a session; "" where it can."""
        epoch = self.endings.epoch(stub.index)
        # where another gateway has taken it over since, it did not end
        if stub.index in self.endings and (not epoch or epoch >= _epoch(stub)):
            return reasons.ENDED
        if self.revocations.revoked(stub):
            return reasons.REVOKED
        if self.living.resumed_from(stub.index):
            return reasons.CLASHES
        return ""

    def keys(self, stub: Stub) -> list[Hashable]:
        """What at most one session here has: virtual IPs, and the peer where its connection allows one session."""
        keys: list[Hashable] = list(stub.remote_vips)
        connection = self.charon.connection(stub.connection)
        if connection is not None and connection.unique is not Unique.NO:
            keys.append((stub.local_id, stub.eap_id or stub.remote_id, ":" in stub.remote.address))
        return keys

    def rivals(self, stub: Stub) -> list[IkeSa]:
        """The IKE_SAs here that have one of these."""
        tracker = self.charon.tracker
        found = {
            spis: tracker.sas[spis] for spis in tracker.virtual_ips.holders(stub.remote_vips) if spis in tracker.sas
        }
        connection = self.charon.connection(stub.connection)
        if connection is not None and connection.unique is not Unique.NO:
            for sa in self.living.of_peer(stub.local_id, stub.eap_id or stub.remote_id):
                if sa.remote is not None and (":" in sa.remote.address) == (":" in stub.remote.address):
                    found[sa.id.spis] = sa
        return list(found.values())


def _epoch(stub: Stub) -> int:
    return stub.derivation.epoch if stub.derivation is not None else 0
