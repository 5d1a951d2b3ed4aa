"""A session of this gateway, as the program of `hooks.session` is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, NamedTuple

from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.stub.stub import Index
from bridge.stub.types import ChildSa

CHILDREN_MAX: Final = 64
"""CHILD_SAs whose octets are known one by one"""


class Name(NamedTuple):
    """A session at a gateway."""

    gateway: str
    spi: bytes
    """the gateway's, of the first IKE_SA of the session there"""

    @property
    def text(self) -> str:
        return str(Index(*self))

    @property
    def facts(self) -> dict[str, str]:
        return {"gateway": self.gateway, "session": self.text}


class Octets:
    """The octets of all CHILD_SAs that a session has had, (to this gateway, from this gateway)."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[int, int]] = {}
        self._over: set[int] = set()
        """those of them that ended, whose figures are the last"""
        self._ended = (0, 0)

    def put(self, info: SaInfo) -> None:
        """What VICI says of them now; a CHILD_SA that has ended is not in later reports."""
        for child in info.children:
            known = self._children.get(child.spi_in, (0, 0))
            self._children[child.spi_in] = max(known[0], child.octets_in), max(known[1], child.octets_out)
        while len(self._children) > CHILDREN_MAX:
            spi = next(iter(self._children))
            oldest = self._children.pop(spi)
            self._over.discard(spi)
            self._ended = self._ended[0] + oldest[0], self._ended[1] + oldest[1]

    def put_last(self, info: SaInfo) -> None:
        """What VICI says of a CHILD_SA that ended."""
        self.put(info)
        self._over.update(child.spi_in for child in info.children)

    def are_last(self, children: Iterable[ChildSa]) -> bool:
        """Whether the last figures of these are known."""
        return all(child.spi_in in self._over for child in children)

    @property
    def both(self) -> tuple[int, int]:
        every = [self._ended, *self._children.values()]
        return sum(one for one, _ in every), sum(one for _, one in every)


class Session:
    """One session here; `previous` is what it was at the gateway that it came from."""

    def __init__(self, name: Name, sa: IkeSa, previous: Name | None = None) -> None:
        self.name = name
        self.sa = sa
        self.previous = previous
        self.children = sa.children
        """those that it had last"""
        self.octets = Octets()
        self.begun: asyncio.Task[None] | None = None
        """tells of its beginning, a moment later"""
        self.told = False
        """of its beginning"""
        self.key = ""
        """of its first event, by which its events are in order: its virtual IP may become known later"""
        self.down = asyncio.Event()
        """VICI has reported the end of its IKE_SA"""
        self.counted = asyncio.Event()
        """and after that the ends of all CHILD_SAs, with their last figures"""
        self.moved = False
        self.to: str | None = None
        """the gateway that it moved to"""

    def check_counted(self) -> None:
        """VICI has reported an end."""
        if self.down.is_set() and self.octets.are_last(self.sa.children):
            self.counted.set()
