"""Which side ended an IKE_SA, by what charon reports of requests (bridge.client.set_up_again)."""

from __future__ import annotations

import pytest

from bridge.charon.ike_sa import Requests
from bridge.client.set_up_again import ended_by_peer

NEVER = float("-inf")


@pytest.mark.parametrize(
    ("own", "of_peer", "at", "by_peer"),
    [
        (NEVER, NEVER, 10.0, False),
        (NEVER, 10.0, 10.0, True),
        (NEVER, 10.0, 10.9, True),
        (NEVER, 10.0, 12.0, False),
        (9.0, 10.0, 10.4, True),
        # a liveness check of this host's, answered, then the peer's DELETE
        (9.8, 10.0, 10.01, True),
        # a DELETE of this host's, a liveness check of the peer's, the answer
        (9.8, 10.0, 10.2, False),
        # a request of the peer's, then a DELETE of this host's
        (10.0, 9.9, 10.01, False),
        (10.0, NEVER, 10.1, False),
    ],
)
def test_the_request_that_an_end_follows_tells_who_ended_it(
    own: float, of_peer: float, at: float, by_peer: bool
) -> None:
    assert ended_by_peer(Requests(own=own, of_peer=of_peer), at) is by_peer


def test_what_charon_lists_as_deleting_this_host_ended() -> None:
    assert not ended_by_peer(Requests(of_peer=10.0, deleting=True), 10.0)
