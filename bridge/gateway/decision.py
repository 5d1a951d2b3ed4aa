"""What a request with IKE_SA_SYNC gets, once its stub was looked up: a rebuilt SA with its answer, or a refusal."""

from __future__ import annotations

import time
from collections.abc import Set as AbstractSet

from bridge.charon.charon import Charon
from bridge.config import SyncConfig
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.rebuild import NOT_EXCHANGED, Exchanged, Rebuilder, authenticated_until
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.refusal import Refusal
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.gateway.uniqueness import Uniqueness
from bridge.ike.key_exchange import KeyExchange, can_exchange
from bridge.ike.resumption_request import is_for, verify_request
from bridge.ike.sync_messages import SyncRequest
from bridge.ike.transforms import least_nonce
from bridge.net.interface import Packet
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

NONE: AbstractSet[bytes] = frozenset()
ATTEMPTS_PER_STUB = 4
"""unconfirmed SAs from one stub at most: a client may start again, and an old request of a client may be replayed"""


class Decision:
    """Judges requests; `rebuilder` makes the SAs of those that pass."""

    def __init__(
        self,
        charon: Charon,
        known: KnownSessions,
        unconfirmed: Unconfirmed,
        admission: Admission,
        holders: AddressHolders,
        sync: SyncConfig,
        rebuilder: Rebuilder,
    ) -> None:
        self._charon = charon
        self._endings = known.endings
        self._living = known.living
        self._uniqueness = Uniqueness(charon, known.living)
        self._revocations = known.revocations
        self.unconfirmed = unconfirmed
        self._admission = admission
        self.holders = holders
        self._sync = sync
        self._rebuilder = rebuilder

    def of(
        self,
        packet: Packet,
        request: SyncRequest,
        digest: bytes,
        stub: Stub,
        moved_away: AbstractSet[bytes] = NONE,
        *,
        tagged: bool = True,
    ) -> Rebuilt | Refusal:
        """Rules 1 and 7: a proven request and the sealed stub alone decide. `digest` is the request's. SAs that
        `moved_away` (both SPIs) hold no address. `tagged`: its client's first requests are to come here."""
        if stub.index in self._endings:
            # while the stubs of this batch were fetched
            return Refusal.NO_STUB
        if self._revocations.revoked(stub):
            return Refusal.REVOKED
        if stub.expires <= time.time():
            return Refusal.STUB_EXPIRED
        if request.proof is None:
            if self._sync.proof == "required" or request.sync.attributes:
                return Refusal.PROOF_MISSING
        elif not verify_request(request, stub.suite.prf, stub.sk_d):
            return Refusal.PROOF_WRONG
        if not is_for(request, stub.suite):
            return Refusal.PROPOSAL_DIFFERS
        if 0 < authenticated_until(stub) <= time.time():
            return Refusal.AUTHENTICATION_ENDED
        if len(request.nonce) < least_nonce(stub.suite.prf):
            return Refusal.NONCE_SHORT
        if self._charon.connection(stub.connection) is None:
            return Refusal.CONNECTION_MISSING
        if self.holders.of_others(stub) - self.unconfirmed.made_from(stub.index) - moved_away:
            return Refusal.ADDRESS_TAKEN
        own = self.unconfirmed.made_from(stub.index) | moved_away | self.holders.beside(stub)
        if self._uniqueness.forbids(stub, Endpoint(packet.src, packet.sport), own):
            return Refusal.NOT_UNIQUE
        if (
            len(self.unconfirmed) >= self._sync.max_unconfirmed
            or self.unconfirmed.attempts(stub.index) >= ATTEMPTS_PER_STUB
        ):
            return Refusal.TOO_MANY_UNCONFIRMED
        if self._admission.full(packet.src):
            return Refusal.SOURCE_UNCONFIRMED
        exchanged = self._exchange(request, stub.suite.group)
        if isinstance(exchanged, Refusal):
            return exchanged
        # Until the client has confirmed, this may be a replay, and its CHILD_SAs would take the traffic of the session
        # that is here from it, or that went on here since; and those of two attempts would share policies, which go
        # with the first that ends. Then they come up by CREATE_CHILD_SA, under keys that a replay has not.
        leftovers = self.holders.beside(stub) - self.unconfirmed.made_from(stub.index)
        alone = not self._living.clashes(stub) and not leftovers and not self.unconfirmed.attempts(stub.index)
        return self._rebuilder.rebuilt(
            packet, request, digest, stub, exchanged, alone=alone, leftovers=leftovers, tagged=tagged
        )

    def _exchange(self, request: SyncRequest, group: int) -> Exchanged | Refusal:
        """With forward secrecy, this gateway's half of the exchange; nothing without."""
        policy = self._sync.forward_secrecy
        if policy == "off" or not request.forward_secrecy or not can_exchange(group):
            return Refusal.FORWARD_SECRECY_MISSING if policy == "required" else NOT_EXCHANGED
        try:
            ours = KeyExchange(group)
            return Exchanged((group, ours.public), ours.shared(request.public_value))
        except ValueError:
            return Refusal.PUBLIC_VALUE_WRONG
