"""The fields of a stub's hash that people read without its key, and nothing believes (redis/store.lua)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from bridge.bank.interface import Readable
from bridge.ike.transforms import Suite
from bridge.stub import Index, Stub, printable

READABLE: Final = (
    "id_i",
    "id_r",
    "spi_i",
    "spi_r",
    "proposal",
    "connection",
    "vips",
    "established",
    "expires",
    "revision",
)
"""fields for people, in the order of redis/store.lua"""


def readable_fields(stub: Stub) -> tuple[str, ...]:
    """The values of READABLE for a stub; "" where there is none. The SPI that the key names is not repeated."""
    local, remote = stub.local_id.text, stub.remote_id.text
    return (
        local if stub.initiator else remote,
        remote if stub.initiator else local,
        "" if stub.spi_i == stub.index.spi else stub.spi_i.hex(),
        "" if stub.spi_r == stub.index.spi else stub.spi_r.hex(),
        _proposal(stub.suite),
        stub.connection,
        " ".join(stub.remote_vips or stub.local_vips),
        str(stub.established),
        str(stub.expires),
        str(stub.revision),
    )


@lru_cache(maxsize=256)
def _proposal(suite: Suite) -> str:
    """strongSwan's notation, the PRF left out where the integrity algorithm names it, as in swanctl.conf."""
    parts = suite.name.split("/")
    return "/".join(
        part
        for part in parts
        if not (part.startswith("PRF_") and any(other.startswith(part.removeprefix("PRF_")) for other in parts))
    )


def readable(index: Index, values: Sequence[bytes | None]) -> Readable:
    texts = [printable((value or b"").decode(errors="backslashreplace")) for value in values]
    id_i, id_r, spi_i, spi_r, proposal, connection, vips = texts[:7]
    established, expires, revision = (int(text) if text.isdecimal() else 0 for text in texts[7:])
    own = index.spi.hex()
    return Readable(
        index,
        id_i,
        id_r,
        spi_i or own,
        spi_r or own,
        proposal,
        connection,
        tuple(vips.split()),
        established,
        expires,
        revision,
    )
