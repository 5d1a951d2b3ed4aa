"""The IKE_SAs that are known, compared with all that VICI lists: what is missing, what has ended."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo


class Comparison:
    """What a tracker knows against all that VICI lists, which comes in parts."""

    def __init__(self, tracker: SaTracker, *, since: float) -> None:
        """Begin; the list was asked for at `since` (clock seconds)."""
        self._tracker = tracker
        self._since = since
        self._early = tracker.early()
        self._present: set[bytes] = set()
        self._missing: dict[bytes, SaInfo] = {}

    def take(self, infos: Sequence[SaInfo]) -> None:
        """Some of the list."""
        for info in infos:
            self._present.add(info.spis)
            if info.remote_vips:
                self._tracker.virtual_ips.put(info.spis, info.remote_vips, self._since)
            if info.version == 2 and info.state == "ESTABLISHED" and not self._tracker.listed(info, since=self._since):
                self._missing[info.spis] = info
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
