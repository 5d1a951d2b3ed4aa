"""What a gateway remembers of the ends of authentication (bridge.gateway.authentication_end), without a lab."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import msgspec

from bank_support import stub_of
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import sa_of
from bridge.gateway.authentication_end import SPARE, AuthenticationEnd
from bridge.gateway.metrics import GatewayMetrics


def test_a_session_that_is_resumed_again_and_again_leaves_nothing_behind() -> None:
    charon = SimpleNamespace(tracker=SimpleNamespace(sas={}))
    ends = AuthenticationEnd(cast(Charon, charon), GatewayMetrics(), wall=lambda: 1000.0)
    for _ in range(3 * SPARE):
        sa = sa_of(msgspec.structs.replace(stub_of(), authenticated_until=90_000))
        ends.watch(sa)
        ends.forget(sa)
    assert ends._watched == {}
    assert len(ends._due) <= SPARE + 2
