"""The client's first protected exchange on a rebuilt IKE_SA: an empty INFORMATIONAL request with message ID 1 (RFC 7296
section 1.4), and its answer. Both sides have then shown that they hold the keys. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bridge.ike.encrypted_payload import Protection, protect, unprotect
from bridge.ike.keys import IkeKeys
from bridge.ike.message import ExchangeType, Flag, MalformedMessage
from bridge.ike.transforms import Suite, UnsupportedSuite

MESSAGE_ID: Final = 1
"""IKE_SA_INIT with IKE_SA_SYNC was message 0"""


class Confirmation:
    """`request` is what to send, as often as need be. Raises UnsupportedSuite (check `possible` first)."""

    def __init__(
        self, suite: Suite, keys: IkeKeys, spi_i: bytes, spi_r: bytes, *, random: Callable[[int], bytes]
    ) -> None:
        ours = Protection.of(suite, keys, initiator=True)
        self._theirs = Protection.of(suite, keys, initiator=False)
        self._spis = (spi_i, spi_r)
        self.request = protect(
            ours,
            spi_i=spi_i,
            spi_r=spi_r,
            exchange=ExchangeType.INFORMATIONAL,
            flags=Flag.INITIATOR,
            message_id=MESSAGE_ID,
            payloads=(),
            iv=random(ours.iv_length),
        )

    def is_answered_by(self, data: bytes) -> bool:
        """Whether `data` is the gateway's answer, protected with its keys."""
        try:
            header, _ = unprotect(self._theirs, data)
        except MalformedMessage:
            return False
        return (
            (header.spi_i, header.spi_r) == self._spis
            and header.exchange == ExchangeType.INFORMATIONAL
            and header.message_id == MESSAGE_ID
            and bool(header.flags & Flag.RESPONSE)
            and not header.flags & Flag.INITIATOR
        )


def possible(suite: Suite) -> bool:
    """Whether protected messages of a suite can be made here."""
    nothing = Protection(suite, b"", b"")
    try:
        return nothing.iv_length > 0 and nothing.checksum_length > 0 and suite.prf_length > 0
    except UnsupportedSuite:
        return False
