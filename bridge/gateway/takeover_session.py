"""One session that is taken over as it is: whether that can be done, and what charon gets of it. No I/O.

The IKE_SA keeps its keys and message IDs. Its CHILD_SAs keep SPIs and selectors, and get random nonces: keys that
no host has, until they are rekeyed. So no ESP key has two senders, and none comes from the bank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from msgspec.structs import replace

from bridge.charon.ha_message import ADDITIONAL_KEY_EXCHANGES_SINCE, IkeId
from bridge.charon.ike_sa import IkeSa, Trait, new_conditions, sa_of
from bridge.charon.install import Install
from bridge.charon.vici_types import ConnectionInfo
from bridge.gateway.rebuild import authenticated_until
from bridge.gateway.takeover_state import SESSION, Event, State
from bridge.ike.encrypted_payload import Protection
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.transforms import Suite, UnsupportedSuite
from bridge.net.packet import Datagram
from bridge.stub.child_sa import MAX_SELECTORS, NewChild
from bridge.stub.stub import Stub

NO_DERIVATION: Final = "its stub has no keys to take it over with: takeover.addresses is not set at its gateway"
OWNED_BY_ANOTHER: Final = "another gateway than --from has it"
HERE: Final = "it is here already"
ENDED: Final = "it ended"
EXPIRED: Final = "its stub has expired"
REVOKED: Final = "its identity is locked out"
AUTHENTICATION_ENDED: Final = "its authentication has ended"
CONNECTION_MISSING: Final = "its connection is not configured here"
CHILD_MISSING: Final = "a CHILD_SA of it is not configured here"
CLASHES: Final = "its client has another session here"
OLDER: Final = "its client has a newer session"
OLD_CHARON: Final = "it was rekeyed with several key exchanges, which the ha plugin of this charon does not accept"
SELECTORS: Final = "a CHILD_SA of it has too many traffic selectors for a message to charon"
SUITE: Final = "its algorithms cannot be verified here: the message ID of its client cannot be found"
IPCOMP: Final = "a CHILD_SA of it uses IPComp"
CHANGED: Final = "its stub was changed or taken over by another gateway meanwhile"
NOT_KEPT: Final = "charon did not keep it: see its log"
SILENT: Final = "its client answers no request: left to the client"
NOT_ANSWERED: Final = "its client sends requests and answers none: removed, so that the client connects again"
REFUSES_KEYS: Final = "its client refuses new keys: ended, so that the client connects again"
CHILD_LOST: Final = "its client has another CHILD_SA than its stub: ended, so that the client connects again"
UNFIT: Final = "it does not fit the format of charon's ha plugin"


@dataclass(slots=False, eq=False)
class Session:
    """A session at a shared address."""

    stub: Stub
    """as its new owner stores it"""
    sa: IkeSa
    install: Install | None
    """None: charon has it, and the sidecar was restarted before its CHILD_SAs had new keys"""
    began: float
    state: State = SESSION.first
    request: Datagram | None = None
    """the last that its client sent while charon did not take any"""
    confirmed: bool = False
    """charon verified a request of its client"""
    unique_id: str = ""
    waits_since: float | None = None
    """when charon sent the last request of its own"""
    offsets: list[int] = field(default_factory=list)
    """message IDs still to be tried, from the stub's on"""
    refused: bool = False
    """charon did not take the last command to rekey"""
    sent: bool = False
    """charon has sent a request since it was asked last"""
    id_known: bool = False
    """the message ID of its next request is right: the client has answered, or the IKE_SA was rekeyed"""
    refuses_since: float | None = None
    """when its client first answered without new keys"""
    unkeyed: int = 0
    """its CHILD_SAs without new keys when it was looked at last"""
    earlier: set[bytes] = field(default_factory=set)
    """both SPIs of the IKE_SAs that it had before the IKE_SA was rekeyed"""
    heard: bool = False
    """its client sent something after it was left alone"""
    tried: bool = False
    """another message ID than the stub's was tried, and not answered so far"""
    age: tuple[int, int] = field(init=False)
    """as `age` gives it for the stub that its owner before stored"""

    def __post_init__(self) -> None:
        self.age = age(self.stub)

    def on(self, event: Event) -> None:
        """Something happened to it (bridge.gateway.takeover_state)."""
        self.state = SESSION.after(self.state, event)

    def follow(self, heir: IkeSa) -> None:
        """Its client has rekeyed the IKE_SA: the CHILD_SAs without new keys are at `heir`."""
        self.earlier.add(self.sa.id.spis)
        self.sa, self.unique_id, self.waits_since, self.request = heir, heir.unique_id, None, None
        self.refuses_since = None
        # those of a new IKE_SA begin at 0
        self.id_known = True
        if heir.derivation is not None:
            heir.derivation = replace(heir.derivation, unkeyed=True)

    @cached_property
    def from_peer(self) -> Protection:
        """How its client protects what it sends."""
        stub, derivation = self.stub, self.stub.derivation
        assert derivation is not None
        keys = derivation.keys(stub.suite, stub.spi_i, stub.spi_r)
        return Protection.of(stub.suite, keys, initiator=not stub.initiator)

    @property
    def lost(self) -> bool:
        """Whether a CHILD_SA is gone without another one of its name: the client has one that is not known here."""
        return bool({child.name for child in self.stub.children} - {child.name for child in self.sa.children})

    @property
    def left(self) -> list[str]:
        """CHILD_SAs that have no new keys yet, by name."""
        old = {child.spi_in: child.name for child in self.stub.children}
        left = [child.name for child in self.sa.children if child.spi_in in old]
        for child in self.sa.children:
            if child.spi_in not in old and child.name in left:
                left.remove(child.name)
        return left


def age(stub: Stub) -> tuple[int, int]:
    """Greater for the newer one of two sessions of one client: when it began, in seconds, and when its gateway stored
    it last. An IKE_SA may be rekeyed in the second in which it began, and its own stub is not stored after that."""
    return stub.established, stub.revision


def obstacle(
    stub: Stub, connection: ConnectionInfo | None, children: Collection[str], *, version: int, now: float
) -> str:
    """Why a session cannot be taken over by a gateway with this connection; "" where it can. `version` is that of
    charon's HA messages, `now` Unix seconds."""
    if stub.derivation is None:
        return NO_DERIVATION
    if stub.expires <= now:
        return EXPIRED
    if 0 < authenticated_until(stub) <= now:
        return AUTHENTICATION_ENDED
    if connection is None:
        return CONNECTION_MISSING
    if any(child.name not in children for child in stub.children):
        return CHILD_MISSING
    if stub.derivation.additional and version < ADDITIONAL_KEY_EXCHANGES_SINCE:
        return OLD_CHARON
    if any(len(child.local_ts) + len(child.remote_ts) > MAX_SELECTORS for child in stub.children):
        return SELECTORS
    if not _can_be_verified(stub.suite):
        return SUITE
    if any(child.ipcomp for child in stub.children):
        return IPCOMP
    return ""


def _can_be_verified(suite: Suite) -> bool:
    """Whether requests of this suite can be (bridge.ike.encrypted_payload)."""
    try:
        protection = Protection(suite, b"", b"")
        return protection.iv_length + protection.checksum_length > 0
    except UnsupportedSuite:
        return False


def owned(stub: Stub, owner: str, *, now: float, epochs: int = 1) -> Stub:
    """The stub as `owner` stores it who takes the session over."""
    assert stub.derivation is not None
    derivation = replace(stub.derivation, owner=owner, epoch=stub.derivation.epoch + epochs, unkeyed=True)
    return replace(stub, derivation=derivation, revision=max(stub.revision + 1, int(now * 1000)))


def session_of(
    stub: Stub,
    connection: ConnectionInfo,
    *,
    began: float,
    now: float,
    random: Callable[[int], bytes] = os.urandom,
) -> Session:
    """What makes charon have the session of `stub`, which this gateway owns."""
    derivation = stub.derivation
    assert derivation is not None
    sa = sa_of(stub)
    sa.traits |= Trait.TAKEN_OVER
    # charon's timers begin again, from the connection's configuration
    sa.established = int(now)
    sa.expires = int(now) + connection.lifetime if connection.lifetime else stub.expires
    sa.authenticated_until = authenticated_until(stub)
    children = tuple(NewChild(child, random(NONCE_OCTETS), random(NONCE_OCTETS)) for child in stub.children)
    install = Install(
        id=IkeId.of(stub.spi_i, stub.spi_r, stub.initiator),
        suite=stub.suite,
        sk_d_old=derivation.sk_d_old,
        nonce_i=derivation.nonce_i,
        nonce_r=derivation.nonce_r,
        local_id=stub.local_id,
        remote_id=stub.remote_id,
        eap_id=stub.eap_id,
        local=stub.local,
        remote=stub.remote,
        connection=stub.connection,
        conditions=new_conditions(stub.conditions, initiator=stub.initiator, nat_here=False, nat_there=False),
        extensions=stub.extensions,
        local_vips=stub.local_vips,
        remote_vips=stub.remote_vips,
        children=children,
        g_ir=derivation.secret,
        additional=derivation.additional,
        prf_old=derivation.prf_old,
        message_ids=(derivation.next_request, derivation.next_expected),
    )
    return Session(stub, sa, install, began)
