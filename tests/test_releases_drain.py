"""A living gateway is drained on other releases of strongSwan: scenes of test_drain.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab
from drain_support import Clients, four
from releases_support import OTHERS
from test_drain import (  # noqa: F401 - fixtures and scenes
    _fresh,
    test_before_strongswan_stops_its_sessions_move,
    test_clients_move_with_their_traffic_and_one_without_a_sidecar_is_left_alone,
    test_one_lost_datagram_changes_nothing,
    test_some_clients_move_and_the_others_stay_each_with_its_reason,
    topology,
)

pytestmark = [pytest.mark.lab, pytest.mark.releases]


@pytest.fixture(scope="module", params=OTHERS)
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    with Lab() as lab:
        yield four(lab, request.param)
