"""CHILD_SAs in the same round trip as their IKE_SA (docs/protocol.md). No I/O.

    KEYMAT = prf+(SK_d_new, Ni_k | Nr_k), with Ni_k = Ni | SPI_client_k and Nr_k = Nr | SPI_gateway_k

Child k is the one that received on the k-th ESP SPI of OLD_CHILDREN at the old gateway, or without that attribute the
k-th of the stub. SPIs on the wire are those of ESP; in a Child they are charon's in-memory values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from bridge.ike.sync import SPI_OCTETS
from bridge.stub import Child

TRANSPORT, TUNNEL = 1, 2
"""charon's modes of a CHILD_SA that can be rebuilt so"""
_FIRST_SPI: Final = 0x40000000
_SPI_BITS: Final = 0x7FFFFFFF
"""SPIs up to 0xbfffffff: what charon takes itself begins at 0xc0000000 (charon.spi_min)"""
MAX_SELECTORS: Final = 40
"""more may not fit into one message to charon"""
_LAST_RESERVED: Final = 255
"""RFC 4303 section 2.1"""


class NewChild(NamedTuple):
    """A CHILD_SA to install: as this host has it, with its new SPIs, and the nonces of its keys."""

    child: Child
    nonce_i: bytes
    nonce_r: bytes

    def __repr__(self) -> str:
        return f"NewChild({self.child.name!r})"


def wire_spi(value: int) -> int:
    """The ESP SPI that charon has as `value` in its memory, which is in network order there; and the reverse."""
    return int.from_bytes(value.to_bytes(SPI_OCTETS, sys.byteorder))


def fresh_spi(random: Callable[[int], bytes]) -> int:
    """An inbound ESP SPI from outside the range that charon takes its own from."""
    return _FIRST_SPI + (int.from_bytes(random(SPI_OCTETS)) & _SPI_BITS)


def is_plain(child: Child) -> bool:
    """Whether a CHILD_SA can be rebuilt from nonces alone: no key exchange of its own (PFS), no IPComp."""
    return (
        not child.groups
        and not child.ipcomp
        and child.mode in (TRANSPORT, TUNNEL)
        and len(child.local_ts) + len(child.remote_ts) <= MAX_SELECTORS
    )


class Offer(NamedTuple):
    """What a client asks for: all CHILD_SAs of its old SA by number, and its inbound SPIs of those it wants at once."""

    children: tuple[Child, ...]
    spis: dict[int, int]

    @property
    def requested(self) -> list[tuple[int, int]]:
        """For CHILD attributes: (number, SPI)."""
        return list(self.spis.items())

    @property
    def old_spis(self) -> list[int]:
        """For OLD_CHILDREN: the old gateway's inbound SPIs, by number."""
        return [wire_spi(child.spi_out) for child in self.children] if self.spis else []


NOTHING: Final = Offer((), {})


def offer(children: Iterable[Child], wanted: Callable[[Child], bool], random: Callable[[int], bytes]) -> Offer:
    """Ask for those of an old SA's CHILD_SAs that are plain and `wanted`."""
    every = tuple(children)
    spis = {number: fresh_spi(random) for number, child in enumerate(every) if is_plain(child) and wanted(child)}
    return Offer(every, spis) if spis else NOTHING


def granted(offered: Offer, answer: Sequence[tuple[int, int]], ni: bytes, nr: bytes) -> tuple[NewChild, ...]:
    """The client's part: the CHILD_SAs that a proven answer grants of those that were offered."""
    made = []
    left = dict(offered.spis)
    for number, spi_gateway in answer:
        spi_client = left.pop(number, None)
        if spi_client is not None and spi_gateway > _LAST_RESERVED:
            made.append(_new(offered.children[number], True, ni, spi_client, nr, spi_gateway))
    return tuple(made)


class Grant(NamedTuple):
    """What a gateway gives: CHILD attributes for the answer, and the CHILD_SAs to install."""

    answer: tuple[tuple[int, int], ...]
    children: tuple[NewChild, ...]


def grant(
    children: Sequence[Child],
    requested: Sequence[tuple[int, int]],
    old_spis: Sequence[int] | None,
    allowed: Callable[[Child], bool],
    random: Callable[[int], bytes],
    ni: bytes,
    nr: bytes,
) -> Grant:
    """The gateway's part: those of a stub's `children` that are `requested`, plain and `allowed`; each once."""
    if old_spis is None:
        numbered = dict(enumerate(children))
    else:
        known = {wire_spi(child.spi_in): child for child in children}
        numbered = {number: known.pop(spi) for number, spi in enumerate(old_spis) if spi in known}
    answer: list[tuple[int, int]] = []
    made: list[NewChild] = []
    seen: set[int] = set()
    for number, spi_client in requested:
        child = numbered.pop(number, None)
        if child is None or spi_client <= _LAST_RESERVED or spi_client in seen:
            continue
        if is_plain(child) and allowed(child):
            seen.add(spi_client)
            spi_gateway = fresh_spi(random)
            answer.append((number, spi_gateway))
            made.append(_new(child, False, ni, spi_client, nr, spi_gateway))
    return Grant(tuple(answer), tuple(made))


def _new(child: Child, client: bool, ni: bytes, spi_client: int, nr: bytes, spi_gateway: int) -> NewChild:
    here, there = (spi_client, spi_gateway) if client else (spi_gateway, spi_client)
    new = msgspec.structs.replace(child, spi_in=wire_spi(here), spi_out=wire_spi(there), initiator=client)
    return NewChild(new, ni + spi_client.to_bytes(SPI_OCTETS), nr + spi_gateway.to_bytes(SPI_OCTETS))
