"""A gateway with hundreds of sessions is drained: real charons, the load generator's clients, one real client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge.bench.outage import DETECT, STOPPED, failure, fill
from bridge.bench.rig import rig
from bridge.lab.daemon import wait_until

pytestmark = pytest.mark.lab

SESSIONS = 300


def test_hundreds_of_sessions_move_and_charon_is_asked_to_end_each() -> None:
    with rig(1) as built:
        built.take_model()
        topology = built.topology
        gw1, sidecar = topology.gw1, topology.gateways["gw1"]
        fill(built, SESSIONS)
        deleted = gw1.charon.text().count("deleting IKE_SA gw[")
        with ThreadPoolExecutor(1) as beside:
            clients = beside.submit(built.order, "outage", 120.0)
            asked = sidecar.command("drain", "--json", "--to", topology.gw2.address, check=False, timeout=240)
            answered = clients.result()
        told = json.loads(asked.stdout)
        # the model's client has no sidecar any more
        assert (told["moved"], told["left"], told["failed"], told["ending"]) == (SESSIONS + 1, 1, 0, 0), told
        assert answered["sessions"] == len(answered["confirmed"]) == SESSIONS
        assert built.clients.at(topology.gw2) == 1
        # by a DELETE, as an operator ends them: with down scripts, accounting and the lease's release
        assert len(gw1.charon.sas()) == 1
        assert gw1.charon.text().count("deleting IKE_SA gw[") - deleted == SESSIONS + 1
        assert "sa-removed-without-events" not in sidecar.text()
        counters = sidecar.ask("counters")["counters"]
        assert (counters["moved_away_total"], counters["moved_away_failures_total"]) == (SESSIONS + 1, 0)
        wait_until(lambda: len(topology.gw2.charon.sas()) == SESSIONS + 1, "all sessions at the target")


def test_hundreds_of_sessions_move_before_strongswan_stops() -> None:
    with rig(1, DETECT) as built:
        built.take_model()
        row = failure(built, STOPPED, SESSIONS, lambda what, share: None)
    assert (row["moved"], row["failures"]) == (SESSIONS, 0), row
    assert row["clients"]["moved"] == 1
    assert (row["drain"]["moved"], row["drain"]["failed"]) == (SESSIONS + 1, 0), row
    # not one of them was refused by the target, or came to its charon
    assert row["unproven"] == {}
