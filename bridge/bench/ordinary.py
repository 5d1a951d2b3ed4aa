"""Ordinary clients of the load generator, with sessions at an address that gateways share: they answer what the gateway
asks that has the address. Their stubs are made up, with keys that both sides know. No I/O."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from bridge.bench import child as create_child
from bridge.ike.encrypted_payload import Protection, protect, unprotect
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.message import ExchangeType, Flag, Payload, PayloadType
from bridge.stub.child_sa import wire_spi
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Stub
from bridge.stub.types import ChildSa

SECRET_OCTETS: Final = 32
FIRST_EXPECTED: Final = 2
"""message ID of the client's next request: IKE_SA_INIT and IKE_AUTH were 0 and 1"""
_DELETE_ESP: Final = struct.Struct("!BBHI")
"""body of a Delete payload with one SPI (RFC 7296 section 3.11)"""
_ESP: Final = struct.Struct("!II64x")


def with_known_keys(stub: Stub, owner: str) -> tuple[Stub, Protection, Protection]:
    """A stub of a gateway that `owner` owns, and how its client protects what it sends, and what it gets."""
    derivation = Derivation(
        os.urandom(NONCE_OCTETS),
        os.urandom(NONCE_OCTETS),
        os.urandom(SECRET_OCTETS),
        b"",
        b"",
        0,
        next_expected=FIRST_EXPECTED,
        owner=owner,
    )
    keys = derivation.keys(stub.suite, stub.spi_i, stub.spi_r)
    made = msgspec.structs.replace(stub, derivation=derivation, sk_d=keys.sk_d)
    return made, Protection.of(stub.suite, keys, initiator=True), Protection.of(stub.suite, keys, initiator=False)


@dataclass(slots=True, eq=False)
class Ordinary:
    """One client. Times in seconds of the generator's clock; 0: not yet."""

    spi_i: bytes
    spi_r: bytes
    address: str
    child: ChildSa
    """as the gateway has it"""
    outgoing: Protection
    incoming: Protection
    esp_spi: int
    """its inbound SPI of the next CHILD_SA"""
    asked: float = 0.0
    """when the gateway asked for new keys"""
    keyed: float = 0.0
    """when it had them: it deletes the old CHILD_SA then"""
    answered: int = -1
    """message ID of the last request, and its answer"""
    answer: bytes = field(default=b"", repr=False)
    sequence: int = 0

    def esp(self) -> bytes:
        """A packet of the old CHILD_SA, in UDP; the gateway cannot decrypt it."""
        self.sequence += 1
        return _ESP.pack(wire_spi(self.child.spi_in), self.sequence)

    def request(self, data: bytes, now: float) -> bytes | None:
        """Take in a request of the gateway; the answer to it. Raises NotAuthentic, MalformedMessage."""
        header, payloads = unprotect(self.incoming, data)
        if header.flags & Flag.RESPONSE:
            return None
        if header.message_id == self.answered:
            return self.answer
        if header.message_id != self.answered + 1:
            # as a client does: not the next one
            return None
        if header.exchange == ExchangeType.CREATE_CHILD_SA:
            self.asked = self.asked or now
            reply = self._new_child(payloads)
        else:
            reply = self._deleted(payloads, now)
        self.answered = header.message_id
        self.answer = protect(
            self.outgoing,
            spi_i=self.spi_i,
            spi_r=self.spi_r,
            exchange=header.exchange,
            flags=Flag.INITIATOR | Flag.RESPONSE,
            message_id=header.message_id,
            payloads=reply,
            iv=os.urandom(self.outgoing.iv_length),
        )
        return self.answer

    def _new_child(self, payloads: Sequence[Payload]) -> list[tuple[int, bytes]]:
        proposal, nonce, *_ = create_child.request(self.child, self.esp_spi, os.urandom(NONCE_OCTETS))
        same = [(one.type, bytes(one.body)) for one in payloads if one.type in (PayloadType.TS_I, PayloadType.TS_R)]
        return [proposal, nonce, *same]

    def _deleted(self, payloads: Sequence[Payload], now: float) -> list[tuple[int, bytes]]:
        if not any(one.type == PayloadType.DELETE for one in payloads):
            return []
        self.keyed = self.keyed or now
        gone = _DELETE_ESP.pack(create_child.PROTOCOL_ESP, 4, 1, wire_spi(self.child.spi_out))
        return [(PayloadType.DELETE, gone)]
