"""What a request with IKE_SA_SYNC gets, once its stub was looked up: a rebuilt SA with its answer, or a refusal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from bridge.charon.charon import Charon
from bridge.charon.ha_commands import Install
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa, Trait, new_conditions
from bridge.config import SyncConfig, children_policy
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.refusal import Refusal
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.gateway.uniqueness import Uniqueness
from bridge.ike.key_exchange import KeyExchange, can_exchange
from bridge.ike.keys import NONCE_OCTETS, Resumption
from bridge.ike.nat_detection import nat_hash
from bridge.ike.resumption_answer import build_response
from bridge.ike.resumption_request import SyncRequest, is_for, verify_request
from bridge.ike.transforms import least_nonce
from bridge.net.interface import Packet
from bridge.stub.child_sa import grant, stays
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

NONE: AbstractSet[bytes] = frozenset()
RESUMED = Trait.AUTHENTICATION_INHERITED | Trait.COMPANION
SPI_OCTETS = 8
ATTEMPTS_PER_STUB = 4
"""unconfirmed SAs from one stub at most: a client may start again, and an old request of a client may be replayed"""


class _Exchanged(NamedTuple):
    """What forward secrecy adds: KEr (group and public value), and g^ir."""

    answer: tuple[int, bytes] | None
    g_ir: bytes

    def __repr__(self) -> str:
        return "_Exchanged(...)"


NOT_EXCHANGED = _Exchanged(None, b"")


class Decision:
    """Judges requests, and rebuilds the SAs of those that pass. `tag`: what their SPIr ends with, so that the packet
    filter finds requests on them (bridge.net.queue_rules)."""

    def __init__(
        self,
        charon: Charon,
        known: KnownSessions,
        handout: ClientStubs,
        unconfirmed: Unconfirmed,
        admission: Admission,
        holders: AddressHolders,
        sync: SyncConfig,
        tag: bytes = b"",
        *,
        random: Callable[[int], bytes] = os.urandom,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._endings = known.endings
        self._living = known.living
        self._uniqueness = Uniqueness(charon, known.living)
        self._revocations = known.revocations
        self._handout = handout
        self.unconfirmed = unconfirmed
        self._admission = admission
        self.holders = holders
        self._sync = sync
        self._tag = tag
        self._children = children_policy(sync.children_in_exchange, sync.children_at_once)
        self._random = random
        self._wall = wall

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
        if stub.expires <= self._wall():
            return Refusal.STUB_EXPIRED
        if request.proof is None:
            if self._sync.proof == "required" or request.sync.attributes:
                return Refusal.PROOF_MISSING
        elif not verify_request(request, stub.suite.prf, stub.sk_d):
            return Refusal.PROOF_WRONG
        if not is_for(request, stub.suite):
            return Refusal.PROPOSAL_DIFFERS
        if 0 < authenticated_until(stub) <= self._wall():
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
        return self._rebuild(packet, request, digest, stub, exchanged, tagged=tagged)

    def _exchange(self, request: SyncRequest, group: int) -> _Exchanged | Refusal:
        """With forward secrecy, this gateway's half of the exchange; nothing without."""
        policy = self._sync.forward_secrecy
        if policy == "off" or not request.forward_secrecy or not can_exchange(group):
            return Refusal.FORWARD_SECRECY_MISSING if policy == "required" else NOT_EXCHANGED
        try:
            ours = KeyExchange(group)
            return _Exchanged((group, ours.public), ours.shared(request.public_value))
        except ValueError:
            return Refusal.PUBLIC_VALUE_WRONG

    def _rebuild(
        self, packet: Packet, request: SyncRequest, digest: bytes, stub: Stub, exchanged: _Exchanged, *, tagged: bool
    ) -> Rebuilt:
        tag = self._tag if tagged else b""
        ike_id = IkeId.of(request.spi_i, self._random(SPI_OCTETS - len(tag)) + tag, False)
        nonce = self._random(NONCE_OCTETS)
        suite = stub.suite
        local, remote = Endpoint(packet.dst, packet.dport), Endpoint(packet.src, packet.sport)
        resumption = Resumption(suite, stub.sk_d, request.nonce, nonce, ike_id.spi_i, ike_id.spi_r, exchanged.g_ir)
        now = int(self._wall())
        until = self._authenticated_until(stub, now)
        lifetime = self._lifetime(stub)
        if until:
            lifetime = min(lifetime, until - now)
        moved = {stub.local.address, stub.remote.address} - {local.address, remote.address}
        # Until the client has confirmed, this may be a replay, and its CHILD_SAs would take the traffic of the session
        # that is here from it, or that went on here since; and those of two attempts would share policies, which go
        # with the first that ends. Then they come up by CREATE_CHILD_SA, under keys that a replay has not.
        leftovers = self.holders.beside(stub) - self.unconfirmed.made_from(stub.index)
        alone = (
            self._children != "never"
            and not self._living.clashes(stub)
            and not leftovers
            and not self.unconfirmed.attempts(stub.index)
        )
        granted = grant(
            stub.children,
            request.sync.children if alone else (),
            request.sync.old_children,
            lambda child: (
                self._charon.takes_at_once(stub.connection, child.name, self._children) and stays(child, moved)
            ),
            self._charon.spis.next,
            request.nonce,
            nonce,
        )
        conditions = new_conditions(
            stub.conditions,
            initiator=False,
            nat_here=_differs(request.nat_destination, request.spi_i, local),
            nat_there=_differs(request.nat_source, request.spi_i, remote),
        )
        sa = IkeSa(
            id=ike_id,
            suite=suite,
            sk_d=resumption.sk_d(),
            local_id=stub.local_id,
            remote_id=stub.remote_id,
            eap_id=stub.eap_id,
            local=local,
            remote=remote,
            connection=stub.connection,
            conditions=conditions,
            extensions=stub.extensions,
            remote_vips=stub.remote_vips,
            # charon reports nothing about what it is given
            children=tuple(new.child for new in granted.children),
            established=now,
            expires=now + lifetime,
            authenticated_until=until,
            traits=RESUMED,
            predecessor=stub.index,
        )
        response = build_response(
            request,
            spi_r=ike_id.spi_r,
            nonce=nonce,
            prf=suite.prf,
            sk_d_old=stub.sk_d,
            lifetime=lifetime,
            children=granted.answer,
            sealed_stub=self._handout.seal(sa) if request.sync.attributes else None,
            gateways=self._handout.gateways(),
            key_exchange=exchanged.answer,
            nat=(local.address, local.port, remote.address, remote.port),
            auth_lifetime=until - now if until else None,
        )
        install = Install.of(
            sa,
            sk_d_old=stub.sk_d,
            nonce_i=request.nonce,
            nonce_r=nonce,
            local_vips=stub.local_vips,
            remote_vips=stub.remote_vips,
            children=granted.children,
            g_ir=exchanged.g_ir,
        )
        known = self._charon.tracker.sas
        return Rebuilt(
            digest,
            response,
            stub,
            sa,
            install,
            resumption,
            tuple(known[spis].id for spis in leftovers if spis in known),
            tagged,
        )

    def _authenticated_until(self, stub: Stub, now: int) -> int:
        """Until when the client is authenticated here: no longer than where it was, nor than this gateway's own policy
        is for a client that has just authenticated itself. 0: for ever."""
        connection = self._charon.connection(stub.connection)
        own = now + connection.reauth_time if connection and connection.reauth_time else 0
        return min(filter(None, (authenticated_until(stub), own)), default=0)

    def _lifetime(self, stub: Stub) -> int:
        """What charon will give the rebuilt SA: that of a fresh one of its connection."""
        connection = self._charon.connection(stub.connection)
        return connection.lifetime if connection and connection.lifetime else int(stub.expires - self._wall())


def authenticated_until(stub: Stub) -> int:
    """When the authentication of a stub's session ends, in Unix seconds; 0: never. Of a stub of release 0.1, when its
    IKE_SA was to be reauthenticated."""
    return stub.authenticated_until or stub.reauth_at


def _differs(hashes: Sequence[bytes], spi_i: bytes, seen: Endpoint) -> bool:
    """NAT detection (RFC 7296 section 2.23): the peer sent hashes and none is of the address seen here."""
    return bool(hashes) and nat_hash(spi_i, bytes(8), seen.address, seen.port) not in hashes
