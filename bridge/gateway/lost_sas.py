"""IKE_SAs of a charon that was restarted since: their clients may ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from bridge.charon.ike_sa import IkeSa

LOST_SECONDS: Final = 60.0
"""for which they, and so their keys, are kept"""


class LostSas:
    """Those of the last restart."""

    def __init__(self) -> None:
        self._sas: dict[bytes, IkeSa] = {}

    def put(self, sas: Iterable[IkeSa]) -> None:
        """charon was restarted, and has none of these. Call on the event loop."""
        lost = self._sas = {sa.id.spis: sa for sa in sas}
        asyncio.get_running_loop().call_later(LOST_SECONDS, lost.clear)

    def get(self, spis: bytes) -> IkeSa | None:
        """The one with these SPIs, for LOST_SECONDS."""
        return self._sas.get(spis)
