"""How a session goes on here, once that is decided (bridge.gateway.decision): the rebuilt IKE_SA, its keys, and the
answer to its client."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from bridge.charon.charon import Charon
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa, Trait, new_conditions
from bridge.charon.install import Install
from bridge.config import SyncConfig, children_policy
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.rebuilt import Rebuilt
from bridge.ike.keys import NONCE_OCTETS, Resumption
from bridge.ike.nat_detection import nat_hash
from bridge.ike.resumption_answer import build_response
from bridge.ike.sync_messages import SyncRequest
from bridge.net.interface import Packet
from bridge.stub.child_sa import grant, stays
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

RESUMED = Trait.AUTHENTICATION_INHERITED | Trait.COMPANION
SPI_OCTETS = 8


class Exchanged(NamedTuple):
    """What forward secrecy adds: KEr (group and public value), and g^ir."""

    answer: tuple[int, bytes] | None
    g_ir: bytes

    def __repr__(self) -> str:
        return "Exchanged(...)"


NOT_EXCHANGED = Exchanged(None, b"")


class Rebuilder:
    """Rebuilds the SAs of requests that passed. `tag`: what their SPIr ends with, so that the packet filter finds
    requests on them (bridge.net.queue_rules)."""

    def __init__(self, charon: Charon, handout: ClientStubs, sync: SyncConfig, tag: bytes = b"") -> None:
        self._charon = charon
        self._handout = handout
        self._tag = tag
        self._children = children_policy(sync.children_in_exchange, sync.children_at_once)

    def rebuilt(
        self,
        packet: Packet,
        request: SyncRequest,
        digest: bytes,
        stub: Stub,
        exchanged: Exchanged,
        *,
        alone: bool,
        leftovers: Collection[bytes],
        tagged: bool,
    ) -> Rebuilt:
        """The SA of `stub` for a proven request, with its answer. `alone`: nothing here has traffic of the session, so
        that its CHILD_SAs may come up before the client has confirmed. `leftovers`: SAs that its client left behind
        here, by both SPIs. `tagged`: the client's first requests are to come here."""
        tag = self._tag if tagged else b""
        ike_id = IkeId.of(request.spi_i, os.urandom(SPI_OCTETS - len(tag)) + tag, False)
        nonce = os.urandom(NONCE_OCTETS)
        suite = stub.suite
        local, remote = Endpoint(packet.dst, packet.dport), Endpoint(packet.src, packet.sport)
        resumption = Resumption(suite, stub.sk_d, request.nonce, nonce, ike_id.spi_i, ike_id.spi_r, exchanged.g_ir)
        now = int(time.time())
        until = self._authenticated_until(stub, now)
        lifetime = self._lifetime(stub)
        if until:
            lifetime = min(lifetime, until - now)
        moved = {stub.local.address, stub.remote.address} - {local.address, remote.address}
        granted = grant(
            stub.children,
            request.sync.children if alone and self._children != "never" else (),
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
        return connection.lifetime if connection and connection.lifetime else int(stub.expires - time.time())


def authenticated_until(stub: Stub) -> int:
    """When the authentication of a stub's session ends, in Unix seconds; 0: never. Of a stub of release 0.1, when its
    IKE_SA was to be reauthenticated."""
    return stub.authenticated_until or stub.reauth_at


def _differs(hashes: Sequence[bytes], spi_i: bytes, seen: Endpoint) -> bool:
    """NAT detection (RFC 7296 section 2.23): the peer sent hashes and none is of the address seen here."""
    return bool(hashes) and nat_hash(spi_i, bytes(8), seen.address, seen.port) not in hashes
