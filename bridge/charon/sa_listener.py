"""Who receives what happens to the IKE_SAs of one charon."""

from __future__ import annotations

from typing import Protocol

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo


class Listener(Protocol):
    """What happens to the SAs. Called from SaTracker's methods, in order."""

    def changed(self, sa: IkeSa) -> None:
        """`sa` came up, was rekeyed, moved, or its CHILD_SAs or virtual IPs changed."""

    def gone(self, sa: IkeSa) -> None:
        """`sa` ended: deleted by either side, timed out, or replaced by its rekeyed successor."""

    def verified(self, ike_id: IkeId) -> None:
        """charon received a request on `ike_id` that verified under its keys."""

    def down(self, sa: SaInfo) -> None:
        """VICI says that an IKE_SA went down; its state is DELETING if one of the sides asked for that."""


class Listeners:
    """Listener that passes on everything to those in `each`, in their order: there are none before charon's news is
    read, and one for each role of the sidecar afterwards."""

    def __init__(self) -> None:
        self.each: tuple[Listener, ...] = ()

    def changed(self, sa: IkeSa) -> None:
        """See Listener."""
        for listener in self.each:
            listener.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        """See Listener."""
        for listener in self.each:
            listener.gone(sa)

    def verified(self, ike_id: IkeId) -> None:
        """See Listener."""
        for listener in self.each:
            listener.verified(ike_id)

    def down(self, sa: SaInfo) -> None:
        """See Listener."""
        for listener in self.each:
            listener.down(sa)
