"""The messages of a resumption as data, as a gateway and a client parse them. No I/O.

Apart from bridge.ike.resumption_request and bridge.ike.resumption_answer, since these are compiled: mypyc ignores what
a class statement says to msgspec.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import Struct

from bridge.ike.sync_payload import Attribute, SyncPayload

MAX_REASON: Final = 64
"""octets of a refusal's reason"""


class SyncRequest(Struct, frozen=True, gc=False):
    """An IKE_SA_INIT request with IKE_SA_SYNC. Nothing in it is proved before `verify_request`."""

    blank: bytes
    """the message with the octets of PROOF zero"""
    spi_i: bytes
    group: int
    """of KEi"""
    public_value: bytes
    """in KEi"""
    nonce: bytes
    sync: SyncPayload
    cookie: bytes | None
    nat_source: tuple[bytes, ...]
    nat_destination: tuple[bytes, ...]
    proposal: bytes
    """the body of SAi1"""

    def __repr__(self) -> str:
        return f"SyncRequest({self.spi_i.hex()})"

    @property
    def proof(self) -> bytes | None:
        """The value of PROOF."""
        return self.sync.first(Attribute.PROOF)

    @property
    def sealed_stub(self) -> bytes | None:
        """The value of SEALED_STUB."""
        return self.sync.first(Attribute.SEALED_STUB)

    @property
    def refusable(self) -> bool:
        """Whether its sender accepts a notification of a refusal, and does not go on with IKE_AUTH."""
        return self.sync.first(Attribute.REFUSAL) is not None

    @property
    def forward_secrecy(self) -> bool:
        """Whether its sender asks for KEr."""
        return self.sync.first(Attribute.FORWARD_SECRECY) is not None


class SyncResponse(Struct, frozen=True, gc=False):
    """An answer that claims to resume. Nothing in it is proved before `verify_response`."""

    blank: bytes
    spi_r: bytes
    key_exchange: tuple[int, bytes] | None
    """group and public value of KEr; None without forward secrecy"""
    nonce: bytes
    sync: SyncPayload | None
    """None in the plain draft form"""
    nat_source: tuple[bytes, ...]
    nat_destination: tuple[bytes, ...]
    auth_lifetime: int | None
    """seconds until the client has to authenticate again"""

    def __repr__(self) -> str:
        return f"SyncResponse({self.spi_r.hex()})"

    @property
    def lifetime(self) -> int | None:
        """Seconds that the gateway grants."""
        value = self.sync.first(Attribute.LIFETIME) if self.sync else None
        return int.from_bytes(value) if value is not None else None


class CookieChallenge(NamedTuple):
    """The gateway wants the request again, with this cookie in front (RFC 7296 section 2.6)."""

    cookie: bytes


class SyncRefusal(Struct, frozen=True, gc=False):
    """A gateway's refusal that claims to prove itself. Nothing in it is proved before `verify_refusal`."""

    blank: bytes
    sync: SyncPayload

    @property
    def reason(self) -> str:
        """What of it is printable ASCII."""
        value = (self.sync.first(Attribute.REFUSAL) or b"")[:MAX_REASON]
        return "".join(chr(octet) for octet in value if 0x20 < octet < 0x7F)


class OrdinaryResponse(NamedTuple):
    """What a gateway answers that does not resume: an IKE_SA_INIT response, or an error notification."""

    error: int | None
    """the notification's type, None for a normal response"""
