"""The load generator's clients: one session each, from its stub to its first protected exchange. No I/O.

PREPARED --request--> ASKED --answer, PROOF right--> ANSWERED --first protected exchange--> CONFIRMED
                        '---cookie: asked anew          (its request has message ID 1)
"""

from __future__ import annotations

import os
from enum import IntEnum

from bridge.ike.exchange import CookieChallenge, OrdinaryResponse, build_request, parse_response, verify_response
from bridge.ike.keys import derive_keys, skeyseed_resume
from bridge.ike.message import ExchangeType, Flag, parse_header
from bridge.ike.protect import Protection, protect, unprotect
from bridge.stub import Endpoint, Identity, IdType, Index, Stub

NONCE_OCTETS = 32
FIRST_MESSAGE_ID = 1


class State(IntEnum):
    PREPARED = 0
    ASKED = 1
    ANSWERED = 2
    CONFIRMED = 3


class Unproven(Exception):
    """An answer that proves nothing: an ordinary one, or one without a valid PROOF. A client listens on (rule 6)."""


class Session:
    """One client. Times in seconds of the generator's clock."""

    __slots__ = (
        "address",
        "answered",
        "asked",
        "began",
        "confirmed",
        "cookie",
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

    def __init__(self, stub: Stub, spi_i: bytes) -> None:
        self.address = stub.remote.address
        self.index = stub.index
        self.suite = stub.suite
        self.sk_d = stub.sk_d
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
            nat=(self.address, port, gateway, port),
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
        if isinstance(response, OrdinaryResponse):
            raise Unproven("ordinary")
        if not verify_response(response, self.request, self.suite.prf, self.sk_d):
            raise Unproven("PROOF wrong")
        seed = skeyseed_resume(self.suite.prf, self.sk_d, self.nonce, response.nonce)
        keys = derive_keys(self.suite, seed, self.nonce, response.nonce, self.spi_i, response.spi_r)
        self.spi_r = response.spi_r
        self.sk_d = keys.sk_d
        self.outgoing = Protection.of(self.suite, keys, initiator=True)
        self.incoming = Protection.of(self.suite, keys, initiator=False)
        self.state = State.ANSWERED
        self.protected = self._informational(Flag.INITIATOR, FIRST_MESSAGE_ID)
        return self.protected

    def protected_message(self, data: bytes) -> bytes | None:
        """Take a protected message in; the answer to it, if it is a request of the gateway's.

        Raises NotAuthentic, MalformedMessage.
        """
        assert self.incoming is not None
        header, _ = unprotect(self.incoming, data)
        if header.flags & Flag.RESPONSE:
            if header.message_id == FIRST_MESSAGE_ID:
                self.state = State.CONFIRMED
            return None
        return self._informational(Flag.INITIATOR | Flag.RESPONSE, header.message_id)

    def _informational(self, flags: int, message_id: int) -> bytes:
        """An empty INFORMATIONAL message, as a liveness check is (RFC 7296 section 1.4)."""
        assert self.outgoing is not None
        return protect(
            self.outgoing,
            spi_i=self.spi_i,
            spi_r=self.spi_r,
            exchange=ExchangeType.INFORMATIONAL,
            flags=flags,
            message_id=message_id,
            payloads=(),
            iv=os.urandom(self.outgoing.iv_length),
        )


def is_answer(data: bytes) -> bool:
    """Whether a message for a client answers its IKE_SA_INIT request."""
    return parse_header(data).exchange == ExchangeType.IKE_SA_INIT


def imagine(template: Stub, number: int, address: str, now: float) -> Stub:
    """The stub of a session that never was, at the gateway and with all that `template` has but for its keys, SPIs,
    identity and address. Without virtual IPs and CHILD_SAs, since there is nobody to send packets."""
    spi_i, spi_r = os.urandom(8), os.urandom(8)
    endpoint = Endpoint(address, template.remote.port)
    return Stub(
        index=Index(template.index.gateway, spi_r),
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
        remote_vips=(),
        conditions=template.conditions,
        extensions=template.extensions,
        peer_addresses=(endpoint,),
        children=(),
        established=int(now),
        rekey_at=template.rekey_at,
        reauth_at=template.reauth_at,
        expires=template.expires,
        revision=int(now * 1000),
    )
