"""The load generator's clients: one session each, from its stub to its first protected exchange. No I/O.

PREPARED --request--> ASKED --answer, PROOF right--> ANSWERED --first protected exchange--> CONFIRMED
                        '---cookie: asked again         (its request has message ID 1)

CONFIRMED --delete--> LEAVING --answer--> ENDED
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address

import msgspec

from bridge.bench import child
from bridge.ike.encrypted_payload import Protection, protect, unprotect
from bridge.ike.key_exchange import KeyExchange
from bridge.ike.keys import NONCE_OCTETS, Resumption
from bridge.ike.message import ExchangeType, Flag, NotifyType, PayloadType, parse_header
from bridge.ike.resumption_answer import parse_response, verify_response
from bridge.ike.resumption_request import build_request
from bridge.ike.stub_exchange import StubSa
from bridge.ike.sync_messages import CookieChallenge, SyncRefusal, SyncResponse
from bridge.ike.transforms import Suite
from bridge.stub.stub import Index, Stub
from bridge.stub.types import ChildSa, Endpoint, Identity, IdType

FIRST_MESSAGE_ID = 1
ESP_SPI = 0xC0000000
"""of the first session's CHILD_SA; each further one has the next"""
_FIRST_VIP = int(IPv4Address("10.64.0.0"))
_DELETE_IKE_SA = bytes((1, 0, 0, 0))
"""body of a Delete payload: protocol IKE, no SPIs (RFC 7296 section 3.11)"""


class State(IntEnum):
    PREPARED = 0
    ASKED = 1
    ANSWERED = 2
    CONFIRMED = 3
    LEAVING = 4
    ENDED = 5


class Children(StrEnum):
    """How a session gets its CHILD_SA back."""

    NONE = "none"
    AT_ONCE = "at-once"
    """in the round trip of the IKE_SA"""
    CREATE = "create"
    """by CREATE_CHILD_SA, which confirms the IKE_SA too"""


class Unproven(Exception):
    """An answer that proves nothing: a normal response, or one without a valid PROOF. A client waits on (rule 6).
    So is, for a benchmark, one that does not give what it measures."""


class Session:
    """One client. Times in seconds of the generator's clock."""

    __slots__ = (
        "address",
        "answered",
        "asked",
        "began",
        "child",
        "children",
        "confirmed",
        "cookie",
        "esp_spi",
        "exchange",
        "incoming",
        "index",
        "ke_value",
        "nonce",
        "outgoing",
        "protected",
        "request",
        "sk_d",
        "spi_i",
        "spi_r",
        "state",
        "suite",
        "tries",
    )

    def __init__(
        self, address: str, index: Index, suite: Suite, sk_d: bytes, child: ChildSa, spi_i: bytes, esp_spi: int
    ) -> None:
        self.address = address
        self.index = index
        self.suite = suite
        self.sk_d = sk_d
        self.child = child
        self.children = Children.NONE
        self.exchange: KeyExchange | None = None
        """its half of the exchange that forward secrecy needs, where it asks for that"""
        self.esp_spi = esp_spi
        self.spi_i = spi_i
        self.spi_r = bytes(8)
        self.nonce = os.urandom(NONCE_OCTETS)
        self.cookie: bytes | None = None
        self.ke_value = b""
        self.state = State.PREPARED
        self.request = b""
        self.protected = b""
        self.outgoing: Protection | None = None
        self.incoming: Protection | None = None
        self.began = self.asked = self.answered = self.confirmed = 0.0
        self.tries = 0

    @classmethod
    def of(cls, stub: Stub, spi_i: bytes, esp_spi: int) -> Session:
        """The client of a stub."""
        [child] = stub.children
        return cls(stub.remote.address, stub.index, stub.suite, stub.sk_d, child, spi_i, esp_spi)

    def successor(self, gateway: str, spi_i: bytes) -> Session:
        """The same session once it moves on from `gateway`, where it is up."""
        index = Index(gateway, self.spi_r)
        return Session(self.address, index, self.suite, self.sk_d, self.child, spi_i, self.esp_spi)

    @property
    def spis(self) -> bytes:
        """Both SPIs of the IKE_SA that is up."""
        return self.spi_i + self.spi_r

    def stub_sa(self, gateway: str) -> StubSa:
        """What messages about the IKE_SA at `gateway` need of it."""
        return StubSa(self.spi_i, self.spi_r, True, (gateway, self.spi_r), self.suite.prf, self.sk_d)

    def prepare(self, gateway: str, port: int, ke_value: bytes) -> bytes:
        """The request to `gateway`, which is kept for retransmissions."""
        self.ke_value = ke_value
        self.request = build_request(
            spi_i=self.spi_i,
            suite=self.suite,
            ke_value=ke_value,
            nonce=self.nonce,
            sync_index=(self.index.gateway, self.index.spi),
            prf=self.suite.prf,
            sk_d_old=self.sk_d,
            children=[(0, self.esp_spi)] if self.children is Children.AT_ONCE else (),
            nat=(self.address, port, gateway, port),
            refusable=True,
            forward_secrecy=self.exchange is not None,
            cookie=self.cookie,
        )
        return self.request

    def answer(self, data: bytes, gateway: str, port: int) -> bytes | None:
        """Take an answer in; what is to be sent next. Raises Unproven, MalformedMessage."""
        response = parse_response(data, self.request)
        if isinstance(response, CookieChallenge):
            self.cookie = response.cookie
            # all else as it was (RFC 7296 section 2.6)
            return self.prepare(gateway, port, self.ke_value)
        if isinstance(response, SyncRefusal):
            raise Unproven(f"refused: {response.reason}")
        if not isinstance(response, SyncResponse):
            told = response.error == NotifyType.RESUMPTION_REFUSED
            raise Unproven("refused, without a proof" if told else "an answer of charon")
        if not verify_response(response, self.request, self.suite.prf, self.sk_d):
            raise Unproven("PROOF wrong")
        assert response.sync is not None
        if self.children is Children.AT_ONCE and [number for number, _ in response.sync.children] != [0]:
            raise Unproven("no CHILD_SA")
        g_ir = b""
        if self.exchange is not None:
            if response.key_exchange is None:
                raise Unproven("no KEr")
            g_ir = self.exchange.shared(response.key_exchange[1])
        keys = Resumption(self.suite, self.sk_d, self.nonce, response.nonce, self.spi_i, response.spi_r, g_ir).keys()
        self.spi_r = response.spi_r
        self.sk_d = keys.sk_d
        self.outgoing = Protection.of(self.suite, keys, initiator=True)
        self.incoming = Protection.of(self.suite, keys, initiator=False)
        self.state = State.ANSWERED
        if self.children is Children.CREATE:
            payloads = child.request(self.child, self.esp_spi, os.urandom(NONCE_OCTETS))
            self.protected = self._protected(ExchangeType.CREATE_CHILD_SA, Flag.INITIATOR, FIRST_MESSAGE_ID, payloads)
        else:
            self.protected = self._protected(ExchangeType.INFORMATIONAL, Flag.INITIATOR, FIRST_MESSAGE_ID)
        return self.protected

    def delete(self) -> bytes:
        """The request that ends the IKE_SA (RFC 7296 section 1.4.1)."""
        self.state = State.LEAVING
        payloads = [(PayloadType.DELETE, _DELETE_IKE_SA)]
        self.protected = self._protected(ExchangeType.INFORMATIONAL, Flag.INITIATOR, FIRST_MESSAGE_ID + 1, payloads)
        return self.protected

    def protected_message(self, data: bytes) -> bytes | None:
        """Take a protected message in; the answer to it, if it is a request of the gateway's.

        Raises NotAuthentic, MalformedMessage; Unproven where a CHILD_SA was asked for and refused.
        """
        assert self.incoming is not None
        header, payloads = unprotect(self.incoming, data)
        if not header.flags & Flag.RESPONSE:
            # an empty answer, as to a liveness check (RFC 7296 section 1.4)
            return self._protected(ExchangeType.INFORMATIONAL, Flag.INITIATOR | Flag.RESPONSE, header.message_id)
        if header.message_id == FIRST_MESSAGE_ID and self.state is State.ANSWERED:
            if self.children is Children.CREATE and not child.granted(payloads):
                raise Unproven("no CHILD_SA")
            self.state = State.CONFIRMED
        elif header.message_id == FIRST_MESSAGE_ID + 1 and self.state is State.LEAVING:
            self.state = State.ENDED
        return None

    def _protected(
        self, exchange: ExchangeType, flags: int, message_id: int, payloads: Sequence[tuple[int, bytes]] = ()
    ) -> bytes:
        assert self.outgoing is not None
        return protect(
            self.outgoing,
            spi_i=self.spi_i,
            spi_r=self.spi_r,
            exchange=exchange,
            flags=flags,
            message_id=message_id,
            payloads=payloads,
            iv=os.urandom(self.outgoing.iv_length),
        )


def is_answer(data: bytes) -> bool:
    """Whether a message for a client answers its IKE_SA_INIT request."""
    return parse_header(data).exchange == ExchangeType.IKE_SA_INIT


def imagine(template: Stub, number: int, address: str, now: float, gateway: str | None = None) -> Stub:
    """The stub of a session that never was, at the gateway and with all that `template` has but for its keys, SPIs,
    identity and addresses. `gateway`: at another one."""
    spi_i, spi_r = os.urandom(8), os.urandom(8)
    endpoint = Endpoint(address, template.remote.port)
    vip = str(IPv4Address(_FIRST_VIP + number))
    [old], esp_spis = template.children, os.urandom(8)
    [selector] = old.remote_ts
    made = msgspec.structs.replace(
        old,
        spi_in=int.from_bytes(esp_spis[:4]),
        spi_out=int.from_bytes(esp_spis[4:]),
        remote_ts=(msgspec.structs.replace(selector, first=vip, last=vip),),
    )
    return Stub(
        index=Index(gateway or template.index.gateway, spi_r),
        spi_i=spi_i,
        spi_r=spi_r,
        initiator=False,
        local_id=template.local_id,
        remote_id=Identity(IdType.ID_FQDN, b"client%d.load.example.org" % number),
        eap_id=None,
        suite=template.suite,
        sk_d=os.urandom(len(template.sk_d)),
        shared_secret=os.urandom(32) if template.shared_secret is not None else None,
        local=template.local,
        remote=endpoint,
        connection=template.connection,
        local_vips=(),
        remote_vips=(vip,),
        conditions=template.conditions,
        extensions=template.extensions,
        peer_addresses=(endpoint,),
        children=(made,),
        established=int(now),
        rekey_at=template.rekey_at,
        reauth_at=template.reauth_at,
        expires=template.expires,
        revision=int(now * 1000),
    )
