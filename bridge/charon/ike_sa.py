"""One IKE_SA of the local charon, as the sidecar knows it: what HA messages and VICI say together, and its stub."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from functools import lru_cache
from sys import intern
from typing import Final, TypeVar

from bridge.charon.ha_message import IkeId
from bridge.ike.stub_exchange import StubSa
from bridge.ike.transforms import Suite
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Index, Stub
from bridge.stub.types import ChildSa, Endpoint, Identity

Value = TypeVar("Value")


@lru_cache(maxsize=1024)
def _first_of_its_kind(value: object) -> object:
    return value


def _shared(value: Value) -> Value:
    """An equal value that was seen before, if any."""
    return _first_of_its_kind(value)  # type: ignore[return-value]


class Condition(IntFlag):
    """charon's IKE_SA conditions (ike_condition_t) that matter here."""

    NAT_ANY = 1 << 0
    NAT_HERE = 1 << 1
    NAT_THERE = 1 << 2
    ORIGINAL_INITIATOR = 1 << 6
    STALE = 1 << 7
    REAUTHENTICATING = 1 << 10
    REDIRECTED = 1 << 11
    PPK = 1 << 13
    PRIVATE = 1 << 31
    """marks a second set of conditions with meanings of their own (strongSwan 6.0.2 on)"""


# plain numbers: to calculate with flags takes far longer
_PRIVATE, _ORIGINAL_INITIATOR = int(Condition.PRIVATE), int(Condition.ORIGINAL_INITIATOR)
_NAT_HERE, _NAT_THERE = int(Condition.NAT_ANY | Condition.NAT_HERE), int(Condition.NAT_ANY | Condition.NAT_THERE)
_NOT_KEPT = int(Condition.ORIGINAL_INITIATOR | Condition.STALE | Condition.REAUTHENTICATING | Condition.REDIRECTED)


SAME_SECONDS = 2
"""two times of one event that VICI reported at different moments differ by no more"""


@dataclass(slots=True)
class Requests:
    """The last protected requests on an IKE_SA, in the tracker's clock."""

    own: float = float("-inf")
    """when charon reported one that it sent"""
    own_next: int = 0
    """the Message ID that follows it"""
    of_peer: float = float("-inf")
    """when charon reported one of the peer that verified"""
    deleting: bool = False
    """VICI listed the SA as DELETING: charon waits for the answer to its own DELETE"""


class Trait(IntFlag):
    """What an IKE_SA has of its session; a rekeyed one has that of the one before."""

    COMPANION = 1
    """its client's sidecar sent a message about it"""
    AUTHENTICATION_INHERITED = 2
    """`authenticated_until` comes from the session before; its own reauthentication time can only shorten it"""
    TAKEN_OVER = 4
    """it came here from another gateway as it is"""


NO_TRAIT: Final = Trait(0)


@dataclass(slots=True, eq=False)
class _Seldom:
    """What few IKE_SAs have."""

    local_vips: tuple[str, ...] = ()
    requests: Requests | None = None
    first_spi: bytes = b""
    derivation: Derivation | None = field(default=None, repr=False)


_NOTHING: Final = _Seldom()


@dataclass(slots=True, eq=False)
class IkeSa:
    """An IKE_SA. `local` is this host. Times in Unix seconds, 0 = never.

    Its size counts: a gateway has tens of thousands. What few have is in `_seldom`; what matters for a moment, and what
    one role alone needs, is in tables of the tracker or of that role.
    """

    id: IkeId
    suite: Suite
    sk_d: bytes = field(repr=False)
    shared_secret: bytes | None = field(default=None, repr=False)
    up: bool = False
    seen: float = 0.0
    """when the first message of it came, in the tracker's clock; since when charon has it, where it was rebuilt"""
    local_id: Identity | None = None
    remote_id: Identity | None = None
    eap_id: Identity | None = None
    local: Endpoint | None = None
    remote: Endpoint | None = None
    reported_at: float = 0.0
    """when the last VICI event about it came, in the tracker's clock"""
    connection: str = ""
    conditions: tuple[int, ...] = ()
    extensions: tuple[int, ...] = ()
    peer_addresses: tuple[Endpoint, ...] = ()
    remote_vips: tuple[str, ...] = ()
    children: tuple[ChildSa, ...] = ()
    """oldest first"""
    children_at: float = 0.0
    """when charon reported the last of them, in the tracker's clock"""
    established: int = 0
    rekey_at: int = 0
    reauth_at: int = 0
    expires: int = 0
    authenticated_until: int = 0
    """when the peer's authentication ends, by the policy of the gateway that authenticated it"""
    revision: int = 0
    resumable: bool = True
    published_at: str = ""
    """the gateway's address in the index that its stub was stored under last"""
    stub_expires: int = 0
    """when the stub stored last expires"""
    adopted: bool = False
    """its keys came from a stub, not from charon"""
    unique_id: str = ""
    """by which charon names it, once VICI reported it"""
    predecessor: Index | None = None
    """the index that it was resumed from here, if it was"""
    traits: Trait = NO_TRAIT
    _seldom: _Seldom = field(default=_NOTHING, init=False, repr=False)
    """_NOTHING is that of all that have none"""

    def _own(self) -> _Seldom:
        if self._seldom is _NOTHING:
            self._seldom = _Seldom()
        return self._seldom

    @property
    def local_vips(self) -> tuple[str, ...]:
        """This host's own virtual IPs: a client has some."""
        return self._seldom.local_vips

    @local_vips.setter
    def local_vips(self, addresses: tuple[str, ...]) -> None:
        if addresses != self.local_vips:
            self._own().local_vips = addresses

    @property
    def requests(self) -> Requests | None:
        """Kept where the client role asks for it."""
        return self._seldom.requests

    @requests.setter
    def requests(self, requests: Requests | None) -> None:
        self._own().requests = requests

    @property
    def first_spi(self) -> bytes:
        """This host's SPI of the IKE_SA that the session began with here, where that is followed."""
        return self._seldom.first_spi

    @first_spi.setter
    def first_spi(self, spi: bytes) -> None:
        if spi != self.first_spi:
            self._own().first_spi = spi

    @property
    def derivation(self) -> Derivation | None:
        """What takes it over, at an address that gateways share."""
        return self._seldom.derivation

    @derivation.setter
    def derivation(self, derivation: Derivation | None) -> None:
        if derivation is not self.derivation:
            self._own().derivation = derivation

    @property
    def companion(self) -> bool:
        """Whether its client's sidecar sent a message about it."""
        return Trait.COMPANION in self.traits

    @property
    def authentication_inherited(self) -> bool:
        """Whether `authenticated_until` comes from the session before."""
        return Trait.AUTHENTICATION_INHERITED in self.traits

    @property
    def taken_over(self) -> bool:
        """Whether it came here from another gateway as it is."""
        return Trait.TAKEN_OVER in self.traits

    @property
    def local_spi(self) -> bytes:
        return self.id.spi_i if self.id.initiator else self.id.spi_r

    @property
    def remote_spi(self) -> bytes:
        return self.id.spi_r if self.id.initiator else self.id.spi_i

    @property
    def outlives_authentication(self) -> bool:
        """Whether charon would let it live beyond the end of its authentication."""
        return bool(self.authenticated_until) and not 0 < self.reauth_at <= self.authenticated_until + SAME_SECONDS

    @property
    def published(self) -> Index | None:
        """The index that its stub was stored under last."""
        return Index(self.published_at, self.local_spi) if self.published_at else None

    def put_child(self, child: ChildSa) -> None:
        """One more CHILD_SA, or one that is known as it is now."""
        self.children = (*(one for one in self.children if one.spi_in != child.spi_in), child)

    def drop_child(self, spi_in: int) -> bool:
        """Forget the CHILD_SA with this inbound ESP SPI; whether there was one."""
        left = tuple(one for one in self.children if one.spi_in != spi_in)
        dropped, self.children = len(left) < len(self.children), left
        return dropped

    def share(self) -> None:
        """Have what many SAs have alike in memory once."""
        self.suite = _shared(self.suite)
        self.connection = intern(self.connection)
        self.local_id = _shared(self.local_id)
        self.local = _shared(self.local)
        self.conditions = _shared(self.conditions)
        self.extensions = _shared(self.extensions)
        if self.peer_addresses == (self.remote,):
            self.remote = self.peer_addresses[0]

    def has(self, condition: Condition) -> bool:
        """Whether charon set `condition` on the SA."""
        return is_set(condition, self.conditions)

    def index_here(self, gateway: str | None = None) -> Index:
        """The index of its stub where this host is the gateway (draft-xu-ike-sa-sync-01 section 3.2)."""
        local = self.local.address if self.local else ""
        # gateways that share an address have one index for each session
        return Index(local if self.derivation is not None else gateway_address(gateway, local), self.local_spi)

    def index_there(self) -> Index:
        """The same stub's index seen from the client: the gateway's address and SPI."""
        return Index(self.remote.address if self.remote else "", self.remote_spi)

    def stub(self, index: Index, *, with_secret: bool, expires: int) -> Stub:
        """The stub of this SA as it is now. Raises ValueError while the SA is not up."""
        if self.local is None or self.remote is None or self.local_id is None or self.remote_id is None:
            raise ValueError("an IKE_SA that is not up has no stub")
        return Stub(
            index=index,
            spi_i=self.id.spi_i,
            spi_r=self.id.spi_r,
            initiator=self.id.initiator,
            local_id=self.local_id,
            remote_id=self.remote_id,
            eap_id=self.eap_id,
            suite=self.suite,
            sk_d=self.sk_d,
            shared_secret=self.shared_secret if with_secret else None,
            local=self.local,
            remote=self.remote,
            connection=self.connection,
            local_vips=self.local_vips,
            remote_vips=self.remote_vips,
            conditions=self.conditions,
            extensions=self.extensions,
            peer_addresses=self.peer_addresses,
            children=self.children,
            established=self.established,
            rekey_at=self.rekey_at,
            reauth_at=self.reauth_at,
            expires=expires,
            revision=self.revision,
            authenticated_until=self.authenticated_until,
            predecessor=self.predecessor,
            session_spi=b"" if self.first_spi == self.local_spi else self.first_spi,
            derivation=self.derivation,
        )


def gateway_address(configured: str | None, local: str) -> str:
    """A gateway's address in the index of an SA that has `local` as its own. The `configured` one stands for its family
    only: a client that came by the other one names the gateway by the address it knows."""
    if configured is None or (local and (":" in configured) != (":" in local)):
        return local
    return configured


def new_conditions(conditions: tuple[int, ...], *, initiator: bool, nat_here: bool, nat_there: bool) -> tuple[int, ...]:
    """The conditions for a rebuilt SA, from those of the old one.

    The client is the initiator of what it resumes, whichever side initiated the old SA. NAT found on the new path is
    added to what was there: a NAT_ANY that charon faked (for UDP encapsulation) has to stay.
    """
    added = 0
    if initiator:
        added |= _ORIGINAL_INITIATOR
    if nat_here:
        added |= _NAT_HERE
    if nat_there:
        added |= _NAT_THERE
    return tuple([word if word & _PRIVATE else word & ~_NOT_KEPT | added for word in conditions or (0,)])


def is_set(condition: Condition, conditions: tuple[int, ...]) -> bool:
    """Whether charon set `condition` in these words, of an IKE_SA or a stub."""
    wanted = int(condition)
    return any(word & wanted and not word & _PRIVATE for word in conditions)


def stub_sa(sa: IkeSa, index: tuple[str, bytes]) -> StubSa:
    """What messages of exchange type 240 about an SA need of it."""
    return StubSa(sa.id.spi_i, sa.id.spi_r, sa.id.initiator, index, sa.suite.prf, sa.sk_d)


def client_sa(sa: IkeSa) -> StubSa:
    """What messages of exchange type 240 about an SA of the client's need of it."""
    return StubSa(sa.id.spi_i, sa.id.spi_r, sa.id.initiator, sa.index_there(), sa.suite.prf, sa.sk_d)


def sa_of(stub: Stub) -> IkeSa:
    """The SA of a stub that this gateway made."""
    sa = IkeSa(
        id=IkeId.of(stub.spi_i, stub.spi_r, stub.initiator),
        suite=stub.suite,
        sk_d=stub.sk_d,
        shared_secret=stub.shared_secret,
        up=True,
        local_id=stub.local_id,
        remote_id=stub.remote_id,
        eap_id=stub.eap_id,
        local=stub.local,
        remote=stub.remote,
        connection=stub.connection,
        conditions=stub.conditions,
        extensions=stub.extensions,
        peer_addresses=stub.peer_addresses,
        remote_vips=stub.remote_vips,
        children=stub.children,
        established=stub.established,
        rekey_at=stub.rekey_at,
        reauth_at=stub.reauth_at,
        expires=stub.expires,
        authenticated_until=stub.authenticated_until,
        traits=Trait.AUTHENTICATION_INHERITED,
        revision=stub.revision,
        published_at=stub.index.gateway,
        stub_expires=stub.expires,
        predecessor=stub.predecessor,
    )
    sa.local_vips, sa.first_spi, sa.derivation = stub.local_vips, stub.session_spi, stub.derivation
    return sa
