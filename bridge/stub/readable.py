"""What people may read of a stub without its key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from msgspec import Struct

from bridge.ike.transforms import Suite
from bridge.stub.stub import Index, Stub
from bridge.stub.types import printable


class Readable(Struct, frozen=True):
    """What people may read of a stub without its key. Anyone who can write to the bank can forge it."""

    index: Index
    id_i: str
    id_r: str
    eap_id: str
    """"" where there is none"""
    spi_i: str
    """hex"""
    spi_r: str
    """hex"""
    proposal: str
    connection: str
    vips: tuple[str, ...]
    established: int
    """Unix seconds"""
    expires: int
    """Unix seconds"""
    revision: int
    owner: str = ""
    """the gateway that has the session, where gateways share the address"""
    epoch: int = 0
    """grows with each takeover; 0 where no gateways share the address"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the index as `gateway` and `spi` (hex), the rest by name; the owner only at a shared address."""
        fields: dict[str, Any] = {"gateway": self.index.gateway, "spi": self.index.spi.hex()}
        names = self.__struct_fields__[1:] if self.epoch else self.__struct_fields__[1:-2]
        for name in names:
            fields[name] = getattr(self, name)
        fields["vips"] = list(self.vips)
        return fields


READABLE: Final = (
    "id_i",
    "id_r",
    "eap_id",
    "spi_i",
    "spi_r",
    "proposal",
    "connection",
    "vips",
    "established",
    "expires",
    "revision",
    "owner",
    "epoch",
)
"""fields for people, in the order of redis/store.lua"""


def readable_fields(stub: Stub) -> tuple[str, ...]:
    """The values of READABLE for a stub; "" where there is none. The SPI that the key names is not repeated."""
    local, remote = stub.local_id.text, stub.remote_id.text
    return (
        local if stub.initiator else remote,
        remote if stub.initiator else local,
        stub.eap_id.text if stub.eap_id is not None else "",
        "" if stub.spi_i == stub.index.spi else stub.spi_i.hex(),
        "" if stub.spi_r == stub.index.spi else stub.spi_r.hex(),
        _proposal(stub.suite),
        stub.connection,
        " ".join(stub.remote_vips or stub.local_vips),
        str(stub.established),
        str(stub.expires),
        str(stub.revision),
        "" if stub.derivation is None else stub.derivation.owner,
        "" if stub.derivation is None else str(stub.derivation.epoch),
    )


FIELD_OCTETS: Final = 1_000
"""of a field that are shown"""
_NUMBER: Final = re.compile("[0-9]{1,15}")
"""seconds or milliseconds of Unix time"""

_KEYWORDS: Final = (
    ("_cbc", ""),
    (r"_(ctr|[gc]cm_\d+)_(\d+)", r"\2\1"),
    (r"hmac_sha2_(\d+)(_\d+)?", r"sha\1"),
    ("hmac_", ""),
    (r"_96\b", ""),
    (r"aes128_(xcbc|cmac)", r"aes\1"),
    ("curve_", "x"),
    (r"modp_(\d+)_(\d+)", r"modp\1s\2"),
    (r"(?<!ke\d)(?<!sha1)_", ""),
)
"""what makes strongSwan's keywords of IANA's names in small letters: patterns and what replaces them, in this order"""


@lru_cache(maxsize=256)
def _proposal(suite: Suite) -> str:
    """As swanctl.conf has it, the prf left out where the integrity algorithm names it: aes128-sha256-x25519.

    Short, since a hash that is some octets longer may take 128 more in Redis.
    """
    text = suite.name.lower()
    for pattern, keyword in _KEYWORDS:
        text = re.sub(pattern, keyword, text)
    words = text.split("/")
    named = {f"prf{word}" for word in words}
    return "-".join(word for word in words if word not in named)


def readable(index: Index, values: Sequence[bytes | None]) -> Readable:
    # anyone can write these: bounded before they are read as numbers or shown
    texts = [printable((value or b"")[:FIELD_OCTETS].decode(errors="backslashreplace")) for value in values]
    id_i, id_r, eap_id, spi_i, spi_r, proposal, connection, vips = texts[:8]
    established, expires, revision = (int(text) if _NUMBER.fullmatch(text) else 0 for text in texts[8:11])
    owner, epoch = texts[11:]
    own = index.spi.hex()
    return Readable(
        index,
        id_i,
        id_r,
        eap_id,
        spi_i or own,
        spi_r or own,
        proposal,
        connection,
        tuple(vips.split()),
        established,
        expires,
        revision,
        owner,
        int(epoch) if _NUMBER.fullmatch(epoch) else 0,
    )
