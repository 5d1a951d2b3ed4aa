"""What is known of IKE_SAs, compared with all that VICI lists: what is missing, what has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bridge.charon.sa_recovery import unreported
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo


class Unreported(NamedTuple):
    """A CHILD_SA that charon lists, and that is not known of its IKE_SA."""

    ike_spis: bytes
    spi_in: int
    name: str
    unique_id: str
    """of the IKE_SA"""


class Comparison:
    """What a tracker knows against all that VICI lists, which comes in parts."""

    def __init__(self, tracker: SaTracker, *, since: float) -> None:
        """Begin; the list was asked for at `since` (clock seconds)."""
        self._tracker = tracker
        self._since = since
        self._early = tracker.early()
        self._present: set[bytes] = set()
        self._missing: dict[bytes, SaInfo] = {}
        self.unreported: set[Unreported] = set()
        """those of known IKE_SAs: their report is on its way, or was lost"""

    def take(self, infos: Sequence[SaInfo]) -> None:
        """Some of the list."""
        for info in infos:
            self._present.add(info.spis)
            if info.remote_vips:
                self._tracker.virtual_ips.put(info.spis, info.remote_vips, self._since)
            if info.version == 2 and info.state == "ESTABLISHED":
                if not self._tracker.listed(info, since=self._since):
                    self._missing[info.spis] = info
                elif (known := self._tracker.sas.get(info.spis)) is not None and known.up:
                    for child in unreported(known, info):
                        self.unreported.add(Unreported(info.spis, child.spi_in, child.name, info.unique_id))
            elif info.state == "DELETING" and (sa := self._tracker.sas.get(info.spis)) is not None and sa.up:
                if sa.requests is not None:
                    sa.requests.deleting = True
                self._tracker.on_deleting(sa)
        self._missing |= {info.spis: info for info in self._tracker.recall.awaited(infos)}

    def end(self) -> dict[bytes, SaInfo]:
        """That was all of it. Gives the SAs whose keys are missing; and for those that were rekeyed before they were
        recalled, and lack CHILD_SAs, what they were before."""
        self._tracker.unlisted(self._present, self._early, since=self._since)
        return self._missing
