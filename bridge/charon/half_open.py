"""The IKE_SAs that charon has in state CONNECTING: handshakes in progress, and those that came to nothing. No I/O.

VICI knows all of them. charon's ha plugin reports some: it sends IKE_ADD once keys are derived, which a responder does
when IKE_AUTH comes, and IKE_UPDATE when the SA is up; of a handshake that fails in between most releases send nothing.
charon keeps what nothing follows for half_open_timeout, 30 s by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

REQUEST_SECONDS: Final = 1.0
"""a request that charon got this long ago has become an IKE_SA, which charon reported, or none"""
REQUESTS_MAX: Final = 4096
"""requests that are remembered; in a flood charon demands cookies, and most become no IKE_SA"""


class HalfOpenSas:
    """Those SAs, by both SPIs, with the address of their peer; and requests on their way to charon, by SPIi."""

    def __init__(self) -> None:
        self._addresses: dict[bytes, tuple[str, float]] = {}
        self._requests: dict[bytes, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def addresses(self) -> Iterator[str]:
        """The peers' addresses."""
        return (address for address, _ in self._addresses.values())

    def requested(self, now: float) -> Iterator[str]:
        """Where requests came from that charon may be working on."""
        while self._requests:
            spi, (_, at) = next(iter(self._requests.items()))
            if at > now - REQUEST_SECONDS:
                break
            del self._requests[spi]
        return (address for address, _ in self._requests.values())

    def request(self, spi_i: bytes, address: str, now: float) -> None:
        """An IKE_SA_INIT request from `address` goes on to charon (clock seconds)."""
        if len(self._requests) < REQUESTS_MAX:
            self._requests.setdefault(spi_i, (address, now))

    def began(self, spis: bytes, address: str, now: float) -> None:
        """charon has derived keys with `address` (clock seconds)."""
        self._requests.pop(spis[:8], None)
        self._addresses[spis] = (address, now)

    def ended(self, spis: bytes) -> None:
        """That SA is up, or gone."""
        self._addresses.pop(spis, None)

    def clear(self) -> None:
        """charon has been restarted."""
        self._addresses.clear()
        self._requests.clear()

    def also(self, connecting: Mapping[bytes, str], since: float) -> None:
        """VICI, asked at `since`, lists these in state CONNECTING, and perhaps others."""
        self._addresses |= {spis: (address, since) for spis, address in connecting.items()}

    def listed(self, connecting: Mapping[bytes, str], since: float) -> None:
        """VICI, asked at `since`, lists these in state CONNECTING, and no other that began before."""
        later = {spis: entry for spis, entry in self._addresses.items() if entry[1] >= since}
        self._addresses = {spis: (address, since) for spis, address in connecting.items()} | later
