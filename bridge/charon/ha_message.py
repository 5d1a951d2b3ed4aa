"""The messages of strongSwan's ha plugin as data; bridge.charon.ha_codec makes octets of them, and back."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Any, NamedTuple

from msgspec import Struct

PORT = 4510
"""UDP port of both ends, fixed in charon."""
VERSIONS = (3, 4, 5)
ADDITIONAL_KEY_EXCHANGES_SINCE = 4
PRIVATE_WORDS_SINCE = 5
"""from here on CONDITIONS and EXTENSIONS come twice, the second time with bit 31 set and meanings of their own"""


class HaError(ValueError):
    """Octets that are no message of the ha plugin, or a value its format cannot hold."""


class MessageType(IntEnum):
    IKE_ADD = 1
    IKE_UPDATE = 2
    IKE_MID_INITIATOR = 3
    IKE_MID_RESPONDER = 4
    IKE_DELETE = 5
    CHILD_ADD = 6
    CHILD_DELETE = 7
    SEGMENT_DROP = 8
    SEGMENT_TAKE = 9
    STATUS = 10
    RESYNC = 11
    IKE_IV = 12


class Attr(IntEnum):
    """The attributes, in the order of version 5; bridge.charon.ha_codec has each version's numbers."""

    IKE_ID = 1
    IKE_REKEY_ID = auto()
    LOCAL_ID = auto()
    REMOTE_ID = auto()
    REMOTE_EAP_ID = auto()
    LOCAL_ADDR = auto()
    REMOTE_ADDR = auto()
    CONFIG_NAME = auto()
    CONDITIONS = auto()
    EXTENSIONS = auto()
    LOCAL_VIP = auto()
    REMOTE_VIP = auto()
    PEER_ADDR = auto()
    INITIATOR = auto()
    NONCE_I = auto()
    NONCE_R = auto()
    SECRET = auto()
    ADD_SECRET = auto()
    OLD_SKD = auto()
    ALG_PRF = auto()
    ALG_OLD_PRF = auto()
    ALG_ENCR = auto()
    ALG_ENCR_LEN = auto()
    ALG_INTEG = auto()
    ALG_KE = auto()
    ALG_ADD_KES = auto()
    IPSEC_MODE = auto()
    IPCOMP = auto()
    INBOUND_SPI = auto()
    OUTBOUND_SPI = auto()
    INBOUND_CPI = auto()
    OUTBOUND_CPI = auto()
    LOCAL_TS = auto()
    REMOTE_TS = auto()
    MID = auto()
    SEGMENT = auto()
    ESN = auto()
    IKE_VERSION = auto()
    LOCAL_DH = auto()
    REMOTE_DH = auto()
    PSK = auto()
    IV = auto()
    AUTH_METHOD = auto()


class IkeId(Struct, frozen=True, gc=False):
    """An IKE_SA as charon names it: `spis` are both SPIs, 16 octets, the key of all tables; and whether this host
    initiated it."""

    spis: bytes
    initiator: bool

    @classmethod
    def of(cls, spi_i: bytes, spi_r: bytes, initiator: bool) -> IkeId:
        """That of two SPIs of 8 octets."""
        return cls(spi_i + spi_r, initiator)

    @property
    def spi_i(self) -> bytes:
        return self.spis[:8]

    @property
    def spi_r(self) -> bytes:
        return self.spis[8:]

    @property
    def logged(self) -> dict[str, str]:
        """The SPI pair, as every event of the log that is about an SA has it."""
        return {"spi_i": self.spi_i.hex(), "spi_r": self.spi_r.hex()}


Value = Any  # int, str, bytes, IkeId, Identity, Endpoint or Selector, by the attribute's kind


class HaMessage(NamedTuple):
    version: int
    type: MessageType
    attributes: list[tuple[Attr, Value]]

    def first(self, attribute: Attr, default: Value = None) -> Value:
        """The first value of `attribute`, or `default`."""
        return next((value for name, value in self.attributes if name == attribute), default)

    def all(self, attribute: Attr) -> tuple[Value, ...]:
        """All values of `attribute`, in order."""
        return tuple(value for name, value in self.attributes if name == attribute)

    def __repr__(self) -> str:
        # attribute values include keys: names only
        return f"HaMessage({self.type.name}, {[name.name for name, _ in self.attributes]})"
