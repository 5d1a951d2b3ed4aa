"""Whether a session of the same client lives here (bridge.gateway.living)."""

from __future__ import annotations

import os

import msgspec

from bank_support import stub_of
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.living import SHARED_MAX, LivingSas
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Identity


class Nobody:
    def changed(self, sa: IkeSa) -> None: ...
    def gone(self, sa: IkeSa) -> None: ...
    def verified(self, ike_id: object) -> None: ...
    def down(self, sa: object) -> None: ...


def tracker_with(*stubs: Stub) -> tuple[SaTracker, LivingSas, list[IkeSa]]:
    tracker = SaTracker(Nobody(), wall=lambda: 0.0, clock=lambda: 0.0)
    living = LivingSas(tracker)
    sas = [sa_of(stub) for stub in stubs]
    for sa in sas:
        tracker.sas[sa.id.spis] = sa
        living.put(sa)
    return tracker, living, sas


def other(stub: Stub, **changes: object) -> Stub:
    """A stub that shares nothing with `stub` but `changes`."""
    fresh = msgspec.structs.replace(
        stub_of(), remote_vips=("10.20.0.99",), remote_id=Identity(3, b"other@example"), eap_id=None
    )
    return msgspec.structs.replace(fresh, **changes)


def test_a_session_clashes_with_itself() -> None:
    stub = stub_of()
    assert tracker_with(stub)[1].clashes(stub)


def test_a_stranger_clashes_with_nothing() -> None:
    stub = stub_of()
    assert not tracker_with(stub)[1].clashes(other(stub))


def test_a_living_sa_with_the_same_identity_clashes() -> None:
    stub = stub_of()
    assert tracker_with(stub)[1].clashes(other(stub, remote_id=stub.remote_id))


def test_the_eap_identity_counts_where_there_is_one() -> None:
    eap = Identity(3, b"alice")
    stub = msgspec.structs.replace(stub_of(), eap_id=eap)
    _, living, _ = tracker_with(stub)
    assert living.clashes(other(stub, eap_id=eap))
    # many clients show the same IKE identity, and another one by EAP
    assert not living.clashes(other(stub, remote_id=stub.remote_id, eap_id=Identity(3, b"bob")))


def test_a_living_sa_that_was_resumed_from_the_same_stub_clashes() -> None:
    captured = other(stub_of())
    living_here = msgspec.structs.replace(stub_of(), predecessor=captured.index)
    assert tracker_with(living_here)[1].clashes(captured)


async def test_an_sa_that_ended_clashes_no_longer_whether_that_was_reported_or_not() -> None:
    stub = stub_of()
    like = other(stub, remote_id=stub.remote_id)
    tracker, living, [sa] = tracker_with(stub)
    del tracker.sas[sa.id.spis]
    assert not living.clashes(like)
    await living.forget_ended()
    living.take_out(sa)
    tracker.sas[sa.id.spis] = sa
    living.put(sa)
    assert living.clashes(like)
    living.take_out(sa)
    assert not living.clashes(like)


def test_an_identity_that_many_clients_share_costs_no_memory_for_each() -> None:
    stubs = [
        msgspec.structs.replace(stub_of(), remote_vips=(), index=Index("192.0.2.1", os.urandom(8))) for _ in range(100)
    ]
    _, living, _ = tracker_with(*stubs)
    assert living.clashes(other(stubs[0], remote_id=stubs[0].remote_id))
    assert sum(map(len, living._spis.values())) <= SHARED_MAX
