"""CHILD_SAs that charon is given with rebuilt IKE_SAs: whether it took them, VICI is asked once an IKE_SA is confirmed.
No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo


@dataclass(slots=True)
class _Granted:
    names: dict[int, str]
    """by inbound SPI"""
    confirmed: float | None = None
    """since when the IKE_SA is, in clock seconds"""


class GrantedChildren:
    """By both SPIs of their IKE_SAs, what VICI has not listed yet."""

    def __init__(self) -> None:
        self.not_taken: Callable[[IkeSa, tuple[str, ...]], None] = lambda sa, names: None
        """called for a rebuilt SA that is confirmed, with the names of CHILD_SAs that charon was given and lacks"""
        self._granted: dict[bytes, _Granted] = {}

    def put(self, sa: IkeSa) -> None:
        """An adopted SA that charon is given CHILD_SAs with."""
        if sa.children:
            self._granted[sa.id.spis] = _Granted({child.spi_in: child.name for child in sa.children})

    def verified(self, spis: bytes, now: float) -> None:
        """A request on the SA verified."""
        granted = self._granted.get(spis)
        if granted is not None and granted.confirmed is None:
            granted.confirmed = now

    def child_ended(self, spis: bytes, spi_in: int) -> None:
        """charon reports the end of a CHILD_SA. Before its peer confirmed the SA it can have ended none: charon
        reports in this way one that it could not install."""
        granted = self._granted.get(spis)
        if granted is not None and granted.confirmed is not None:
            granted.names.pop(spi_in, None)

    def listed(self, sa: IkeSa, info: SaInfo, since: float) -> None:
        """VICI, asked at `since`, lists the SA."""
        granted = self._granted.get(sa.id.spis)
        if granted is None or granted.confirmed is None or since <= granted.confirmed:
            return
        del self._granted[sa.id.spis]
        listed = {child.spi_in for child in info.children}
        missing = tuple(dict.fromkeys(name for spi_in, name in granted.names.items() if spi_in not in listed))
        if missing:
            self.not_taken(sa, missing)

    def drop(self, spis: bytes) -> None:
        """The SA has ended."""
        self._granted.pop(spis, None)

    def clear(self) -> None:
        """charon has lost all SAs."""
        self._granted.clear()
