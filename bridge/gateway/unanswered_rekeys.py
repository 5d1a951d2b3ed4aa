"""IKE_SAs that their clients have rekeyed, while the clients may lack the answer: their stubs stay in the bank until a
request shows that they have it.

charon reports the end of the old SA before it completes the new one. So what an SA that ended was being rekeyed to may
be half made: its session then ended, or another rekey of it was completed, and its stub must not stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bridge.charon.ike_sa import IkeSa
from bridge.stub.stub import Index

UP_SECONDS: Final = 5.0
"""how long a new SA may take to come up once the old one has ended"""


@dataclass(slots=True, eq=False)
class _Rekey:
    """`heirs`: both SPIs of what `old` may have been rekeyed to; once it is `complete`, of what it was."""

    old: IkeSa
    heirs: tuple[bytes, ...]
    complete: bool = False


class UnansweredRekeys:
    """Calls `take_back` with each old SA whose stub has served its time; `run` is a task."""

    def __init__(self, take_back: Callable[[IkeSa], None]) -> None:
        self._take_back = take_back
        self._rekeys: dict[bytes, _Rekey] = {}
        """by both SPIs of each SA that takes part"""
        self._incomplete: list[_Rekey] = []
        self._wake = asyncio.Event()

    def heir(self, spis: bytes) -> bytes | None:
        """Both SPIs of what a client has rekeyed this SA to, while its stub stays."""
        rekey = self._rekeys.get(spis)
        return rekey.heirs[0] if rekey is not None and rekey.old.id.spis == spis else None

    def stubs(self) -> Iterator[tuple[Index, bytes]]:
        """The stubs that stay after a rekey, by index, each with both SPIs of the new SA."""
        for spis, rekey in self._rekeys.items():
            if rekey.old.published is not None and spis != rekey.old.id.spis:
                yield rekey.old.published, spis

    def begin(self, old: IkeSa, heirs: Sequence[IkeSa]) -> None:
        """An SA ended; it may have been rekeyed to one of these, which are not up yet."""
        self.answered(old.id.spis)
        # what its client rekeyed it to first
        spis = tuple([sa.id.spis for sa in sorted(heirs, key=lambda sa: sa.id.initiator)])
        rekey = _Rekey(old, spis)
        self._rekeys |= dict.fromkeys((old.id.spis, *spis), rekey)
        self._incomplete.append(rekey)
        self._wake.set()

    def came_up(self, sa: IkeSa) -> None:
        """An SA is up: if it comes of a rekey, that is complete. Where this gateway rekeyed, it has the answer."""
        spis = sa.id.spis
        rekey = self._rekeys.get(spis)
        if rekey is None or rekey.complete or spis not in rekey.heirs:
            return
        if sa.id.initiator:
            self._end(rekey)
            return
        rekey.complete = True
        for other in rekey.heirs:
            if other != spis:
                self._rekeys.pop(other, None)
        rekey.heirs = (spis,)

    def answered(self, spis: bytes) -> None:
        """A request of a client verified on an SA (both SPIs), or the SA ended. If it comes of a rekey, or was rekeyed,
        the old SA has served its time: the client deletes it once it has the answer."""
        rekey = self._rekeys.get(spis)
        if rekey is not None:
            self._end(rekey)

    def lost(self) -> None:
        """charon is gone with all its SAs; their stubs stay, since clients resume from them."""
        self._rekeys.clear()
        self._incomplete.clear()

    async def run(self) -> None:
        """End what is not completed in time, until it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            begun, self._incomplete = self._incomplete, []
            await asyncio.sleep(UP_SECONDS)
            for rekey in begun:
                if not rekey.complete and self._rekeys.get(rekey.old.id.spis) is rekey:
                    self._end(rekey)

    def _end(self, rekey: _Rekey) -> None:
        for spis in (rekey.old.id.spis, *rekey.heirs):
            if self._rekeys.get(spis) is rekey:
                del self._rekeys[spis]
        self._take_back(rekey.old)
