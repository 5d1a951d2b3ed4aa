"""CHILD_SAs in the same round trip as their IKE_SA (docs/protocol.md). No I/O.

    KEYMAT = prf+(SK_d_new, Ni_k | Nr_k), with Ni_k = Ni | SPI_client_k and Nr_k = Nr | SPI_gateway_k

Child k is the one that received on the k-th ESP SPI of OLD_CHILDREN at the old gateway, or without that attribute the
k-th of the stub. SPIs on the wire are those of ESP; in a Child they are charon's in-memory values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from bridge.ike.sync_payload import SPI_OCTETS
from bridge.stub.types import ChildSa

TRANSPORT, TUNNEL = 1, 2
"""charon's modes of a CHILD_SA that can be rebuilt so"""
_FIRST_SPI: Final = 0x40000000
_SPI_BITS: Final = 0x7FFFFFFF
"""SPIs up to 0xbfffffff: what charon takes itself begins at 0xc0000000 (charon.spi_min)"""
MAX_SELECTORS: Final = 40
"""more may not fit into one message to charon"""
AT_ONCE: Final = 32
"""CHILD_SAs that come up so at most, for the size of the messages; others follow by CREATE_CHILD_SA"""
_LAST_RESERVED: Final = 255
"""RFC 4303 section 2.1"""
_SCAN_FIRST: Final = 10_000
"""SPIs chosen before those that ended meanwhile are forgotten, at least"""


class NewChild(NamedTuple):
    """A CHILD_SA to install: as this host has it, with its new SPIs, and the nonces of its keys."""

    child: ChildSa
    nonce_i: bytes
    nonce_r: bytes

    def __repr__(self) -> str:
        return f"NewChild({self.child.name!r})"


def wire_spi(value: int) -> int:
    """The ESP SPI that charon has as `value` in its memory, which is in network order there; and the reverse."""
    return int.from_bytes(value.to_bytes(SPI_OCTETS, sys.byteorder))


class SpiChoice:
    """Chooses inbound ESP SPIs from outside the range that charon takes its own from. `in_use` gives those of all
    CHILD_SAs that are known, as charon has them in memory."""

    def __init__(self, in_use: Callable[[], Iterable[int]], *, random: Callable[[int], bytes] = os.urandom) -> None:
        self._in_use = in_use
        self._random = random
        self._taken: set[int] = set()
        self._scan_at = 0

    def next(self) -> int:
        """One that no CHILD_SA has, and that was not given before as far as is remembered."""
        if len(self._taken) >= self._scan_at:
            self._taken = {wire_spi(spi) for spi in self._in_use()}
            self._scan_at = 2 * len(self._taken) + _SCAN_FIRST
        while (spi := _FIRST_SPI + (int.from_bytes(self._random(SPI_OCTETS)) & _SPI_BITS)) in self._taken:
            pass
        self._taken.add(spi)
        return spi


def is_plain(child: ChildSa) -> bool:
    """Whether a CHILD_SA can be rebuilt from nonces alone: no key exchange of its own (PFS), no IPComp."""
    return (
        not child.groups
        and not child.ipcomp
        and child.mode in (TRANSPORT, TUNNEL)
        and len(child.local_ts) + len(child.remote_ts) <= MAX_SELECTORS
    )


def stays(child: ChildSa, moved: Collection[str]) -> bool:
    """Whether a CHILD_SA means the same once the addresses `moved`, of either peer, are no more those of the IKE_SA:
    transport mode never does, nor does a selector of just such an address."""
    return not moved or (
        child.mode == TUNNEL
        and not any(one.first == one.last and one.first in moved for one in (*child.local_ts, *child.remote_ts))
    )


class Offer(NamedTuple):
    """What a client asks for: CHILD_SAs of its old SA by number, and its inbound SPI for each."""

    children: tuple[ChildSa, ...]
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


def offer(children: Iterable[ChildSa], wanted: Callable[[ChildSa], bool], choose: Callable[[], int]) -> Offer:
    """Ask for those of an old SA's CHILD_SAs that are plain and `wanted`. `choose` gives inbound ESP SPIs."""
    every = tuple([child for child in children if is_plain(child) and wanted(child)][:AT_ONCE])
    spis = {number: choose() for number in range(len(every))}
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
    children: Sequence[ChildSa],
    requested: Sequence[tuple[int, int]],
    old_spis: Sequence[int] | None,
    allowed: Callable[[ChildSa], bool],
    choose: Callable[[], int],
    ni: bytes,
    nr: bytes,
) -> Grant:
    """The gateway's part: those of a stub's `children` that are `requested`, plain and `allowed`; each once. `choose`
    gives inbound ESP SPIs."""
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
        if child is None or spi_client <= _LAST_RESERVED or spi_client in seen or len(made) == AT_ONCE:
            continue
        if is_plain(child) and allowed(child):
            seen.add(spi_client)
            spi_gateway = choose()
            answer.append((number, spi_gateway))
            made.append(_new(child, False, ni, spi_client, nr, spi_gateway))
    return Grant(tuple(answer), tuple(made))


def _new(child: ChildSa, client: bool, ni: bytes, spi_client: int, nr: bytes, spi_gateway: int) -> NewChild:
    here, there = (spi_client, spi_gateway) if client else (spi_gateway, spi_client)
    new = msgspec.structs.replace(child, spi_in=wire_spi(here), spi_out=wire_spi(there), initiator=client)
    return NewChild(new, ni + spi_client.to_bytes(SPI_OCTETS), nr + spi_gateway.to_bytes(SPI_OCTETS))
