"""What a client's requests on a rebuilt IKE_SA are, while the gateway's charon does not process them yet: liveness
checks, which can be answered without it, and others, which cannot. No I/O.

A liveness check is an INFORMATIONAL request with an empty Encrypted payload (RFC 7296 section 1.4). Its answer is what
charon would send: empty, under the same Message ID, protected with the keys of the responder. Requests are answered one
after the other (window size 1, section 2.3); the last one, with the same octets, gets the same answer again
(section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

from bridge.ike.encrypted_payload import Protection, is_authentic, protect, unprotect
from bridge.ike.key_confirmation import MESSAGE_ID
from bridge.ike.keys import Resumption
from bridge.ike.message import ExchangeType, Flag, MalformedMessage, PayloadType, parse, parse_header
from bridge.ike.transforms import UnsupportedSuite

ESTABLISHED: Final = frozenset({int(ExchangeType.CREATE_CHILD_SA), int(ExchangeType.INFORMATIONAL)})
"""exchange types of requests on an IKE_SA that is up"""
_RESPONSE: Final = int(Flag.RESPONSE)
_INITIATOR: Final = int(Flag.INITIATOR)


class Kind(StrEnum):
    """What a message is."""

    LIVENESS = "liveness check"
    REPEATED = "the request that was answered last"
    OTHER = "another request"
    """authentic, under the next Message ID; one fragment of it, perhaps"""
    NOTHING = "nothing to be answered"
    """not authentic, not the next request, or malformed"""


class Answered(NamedTuple):
    """A liveness check, and its answer."""

    request: bytes
    answer: bytes


class ClientRequests:
    """The client's side of one rebuilt IKE_SA; the client is the original initiator. Raises UnsupportedSuite (check
    bridge.ike.key_confirmation.possible first)."""

    def __init__(self, resumption: Resumption, *, random: Callable[[int], bytes]) -> None:
        keys = resumption.keys()
        self.expected = MESSAGE_ID
        """the Message ID of the client's next request"""
        self._theirs = Protection.of(resumption.suite, keys, initiator=True)
        self._ours = Protection.of(resumption.suite, keys, initiator=False)
        self._spis = (resumption.spi_i, resumption.spi_r)
        self._random = random
        self.last: Answered | None = None
        """the request that was answered last: with the same octets it gets the same answer again"""

    def __repr__(self) -> str:
        return f"ClientRequests(expected={self.expected})"

    def kind(self, data: bytes) -> Kind:
        """What a message is. Changes nothing."""
        if self.repeats(data):
            return Kind.REPEATED
        try:
            header = parse_header(data)
            if (
                (header.spi_i, header.spi_r) != self._spis
                or header.message_id != self.expected
                or header.flags & (_RESPONSE | _INITIATOR) != _INITIATOR
                or header.exchange not in ESTABLISHED
            ):
                return Kind.NOTHING
            if header.exchange == ExchangeType.INFORMATIONAL and not _is_fragment(data):
                _, payloads = unprotect(self._theirs, data)
                return Kind.OTHER if payloads else Kind.LIVENESS
            return Kind.OTHER if is_authentic(self._theirs, data) else Kind.NOTHING
        except (MalformedMessage, UnsupportedSuite):
            return Kind.NOTHING

    def repeats(self, data: bytes) -> bool:
        """Whether it is the request that was answered last, octet for octet."""
        return self.last is not None and data == self.last.request

    def answer(self, check: bytes) -> bytes:
        """The answer to a liveness check; the next request has the next Message ID then."""
        answer = protect(
            self._ours,
            spi_i=self._spis[0],
            spi_r=self._spis[1],
            exchange=ExchangeType.INFORMATIONAL,
            flags=Flag.RESPONSE,
            message_id=self.expected,
            payloads=(),
            iv=self._random(self._ours.iv_length),
        )
        self.last = Answered(check, answer)
        self.expected += 1
        return answer


def _is_fragment(data: bytes) -> bool:
    """Whether it is one of an encrypted message (RFC 7383). Raises MalformedMessage."""
    payloads = parse(data).payloads
    return bool(payloads) and payloads[-1].type == PayloadType.SKF
