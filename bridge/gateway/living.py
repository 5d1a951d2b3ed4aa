"""The IKE_SAs that live here, by what a session of the same client would share with them: the identity, and the index
that they were resumed from. (By virtual IP: bridge.gateway.addresses.)

A rebuilt SA gets CHILD_SAs before it is confirmed only where none of these lives here: those of a replay would take the
traffic of the client's living session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Identity

Key = Identity | Index

SLICE: Final = 2048
"""keys that are looked at before the event loop has its turn"""
SHARED_MAX: Final = 8
"""SAs remembered of one key: an identity that more clients share answers the question as well"""


class LivingSas:
    """Finds SAs of `tracker`. It gets SAs by `put`, and looks itself whether they still are what they were."""

    def __init__(self, tracker: SaTracker) -> None:
        self._tracker = tracker
        self._spis: dict[Key, tuple[bytes, ...]] = {}

    def put(self, sa: IkeSa) -> None:
        """An SA that is up, or that has changed."""
        spis = sa.id.spis
        for key in _keys_of_sa(sa):
            known = self._spis.get(key, ())
            if spis in known:
                continue
            if len(known) >= SHARED_MAX:
                known = tuple([one for one in known if self._has(one, key)])[: SHARED_MAX - 1]
            self._spis[key] = (*known, spis)

    def take_out(self, sa: IkeSa) -> None:
        """An SA that ended."""
        spis = sa.id.spis
        for key in _keys_of_sa(sa):
            known = self._spis.get(key, ())
            if spis in known:
                left = tuple([one for one in known if one != spis])
                if left:
                    self._spis[key] = left
                else:
                    del self._spis[key]

    async def forget_ended(self) -> None:
        """Forget SAs that ended without a word, as those do that the sidecar itself removed."""
        for number, key in enumerate(list(self._spis)):
            if number % SLICE == 0:
                await asyncio.sleep(0)
            known = self._spis.get(key, ())
            if any(spis not in self._tracker.sas for spis in known):
                left = tuple([spis for spis in known if spis in self._tracker.sas])
                if left:
                    self._spis[key] = left
                else:
                    del self._spis[key]

    def of_peer(self, local_id: Identity, peer: Identity) -> list[IkeSa]:
        """The SAs of a peer, by its EAP identity where it has one, with this identity of ours."""
        sas = [self._tracker.sas[spis] for spis in self._spis.get(peer, ()) if self._has(spis, peer)]
        return [sa for sa in sas if sa.local_id == local_id]

    def resumed_from(self, index: Index) -> list[IkeSa]:
        """The SAs that the session of a stub went on as here."""
        return [self._tracker.sas[spis] for spis in self._spis.get(index, ()) if self._has(spis, index)]

    def clashes(self, stub: Stub) -> bool:
        """Whether an SA lives here that the stub is of, or that has its identity, or came from it."""
        if stub.spi_i + stub.spi_r in self._tracker.sas:
            return True
        return any(self._has(spis, key) for key in _keys_of_stub(stub) for spis in self._spis.get(key, ()))

    def _has(self, spis: bytes, key: Key) -> bool:
        sa = self._tracker.sas.get(spis)
        return sa is not None and sa.up and key in _keys_of_sa(sa)


def _keys_of_sa(sa: IkeSa) -> Iterator[Key]:
    identity = sa.eap_id or sa.remote_id
    if identity is not None:
        yield identity
    if sa.predecessor is not None:
        yield sa.predecessor


def _keys_of_stub(stub: Stub) -> Iterator[Key]:
    yield stub.eap_id or stub.remote_id
    yield stub.index
