"""Which IKE_SAs of one charon have which virtual IP. No I/O.

A virtual IP belongs to one session: two CHILD_SAs with the same selectors share a reqid, and the later one gets the
traffic of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Set


class VirtualIps:
    """Addresses that charon's peers were assigned, by IKE_SA (both SPIs), and the other way round.

    It has SAs of every kind: those without a key here and those of IKEv1 have addresses too.
    """

    def __init__(self) -> None:
        self._of: dict[bytes, tuple[str, ...]] = {}
        self._holders: dict[str, tuple[bytes, ...]] = {}
        """almost always one: a set would take four times the memory"""
        self._seen: dict[bytes, float] = {}

    def __len__(self) -> int:
        """How many SAs have a virtual IP."""
        return len(self._of)

    def put(self, spis: bytes, addresses: tuple[str, ...], now: float) -> None:
        """An SA has these addresses and no others, as was reported at `now` (monotonic seconds)."""
        if self._of.get(spis, ()) != addresses:
            self.drop(spis)
            for address in dict.fromkeys(addresses):
                self._holders[address] = (*self._holders.get(address, ()), spis)
            if addresses:
                self._of[spis] = addresses
        if addresses:
            self._seen[spis] = now

    def of(self, spis: bytes) -> tuple[str, ...]:
        """The addresses of an SA."""
        return self._of.get(spis, ())

    def drop(self, spis: bytes) -> None:
        """The SA has ended."""
        self._seen.pop(spis, None)
        for address in dict.fromkeys(self._of.pop(spis, ())):
            left = tuple([one for one in self._holders[address] if one != spis])
            if left:
                self._holders[address] = left
            else:
                del self._holders[address]

    def clear(self) -> None:
        """charon has lost all SAs."""
        self._of.clear()
        self._holders.clear()
        self._seen.clear()

    def keep(self, present: Set[bytes], *, since: float) -> None:
        """Drop the SAs that charon, asked at `since`, did not list; those reported later stay."""
        for spis in [spis for spis, seen in self._seen.items() if seen < since and spis not in present]:
            self.drop(spis)

    def holders(self, addresses: Iterable[str]) -> set[bytes]:
        """The SAs that have one of these addresses."""
        found: set[bytes] = set()
        for address in addresses:
            found.update(self._holders.get(address, ()))
        return found

    def shared(self) -> dict[str, set[bytes]]:
        """Addresses that more than one SA has. A rekey makes that true for a moment."""
        return {address: set(holders) for address, holders in self._holders.items() if len(holders) > 1}
