"""A flood of requests from made-up addresses, 20,000 a second for ten seconds, at a real gateway.

What has to hold whatever machine it is on is asserted; what depends on its speed is printed (`pytest -s`), and measured
by `ike-sa-sync bench flood`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.bench.flood import VISITOR, Flood, flood_lab, measure
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import established

pytestmark = [pytest.mark.lab, pytest.mark.alone, pytest.mark.timeout(600)]

RATES, SECONDS = (20_000, 20_000, 5_000, 1_500), 10
MEMORY_MB = 48
"""what the sidecar may grow by: thousands of packets that wait, and the sources it remembers"""


@pytest.fixture(scope="module")
def flood() -> Iterator[Flood]:
    with flood_lab() as made:
        yield made


@pytest.fixture(scope="module")
def measured(flood: Flood) -> dict[str, Any]:
    """The first flood of RATES that this machine has room for beside all else that it does: what the sidecar does not
    get round to is dropped."""
    for rate in RATES:
        figures = measure(flood, rate, SECONDS, quiet_moves=5)
        print(json.dumps(figures, indent=1))
        seen = figures["counters"]["requests_total"] / figures["sent"]["sent"]
        if seen > 0.9 and figures["flooded"]["resumed"] and figures["handshakes"]["count"]:
            break
    return figures


def test_a_client_resumes_while_it_lasts(measured: dict[str, Any]) -> None:
    assert measured["flooded"]["resumed"] >= 1
    assert measured["flooded"]["failed"] == 0


def test_full_handshakes_are_served_meanwhile(measured: dict[str, Any]) -> None:
    assert measured["handshakes"]["count"] >= 1


def test_it_leaves_nothing_behind(flood: Flood, measured: dict[str, Any]) -> None:
    assert measured["sidecar"]["rss_mb_after"] - measured["sidecar"]["rss_mb_before"] < MEMORY_MB
    wait_until(lambda: flood.counters()["unconfirmed"] == 0, "the end of all unconfirmed SAs")
    # half-open ones are charon's own, of requests that were refused
    peers = {sa["remote-host"] for sa in established(flood.target)}
    assert peers <= {flood.topology.client.address, VISITOR}


def test_almost_every_request_costs_a_cookie_and_no_look_up(measured: dict[str, Any]) -> None:
    counters = measured["counters"]
    cookies = sum(value for name, value in counters.items() if name.startswith("cookies_total"))
    assert counters["cookies_total[rate]"] > 0
    assert counters["requests_total"] - cookies < 3000
    assert counters["bank_get_seconds_count"] < 3000


def test_every_packet_of_the_queue_is_decided_and_accounted_for(measured: dict[str, Any]) -> None:
    counters = measured["counters"]
    decided = sum(
        value
        for name, value in counters.items()
        if name.startswith(("cookies_total", "refusals_total", "retransmissions_total", "resumptions_total"))
    )
    # what charon got of the flood it got before cookies were demanded
    assert counters["nfqueue_bypassed_total"] < 1000
    assert counters["nfqueue_waiting"] == 0
    assert counters["malformed_requests_total"] == 0
    # an attempt of the client's that a later one of its own overtook is rebuilt and ended, and counted as neither
    assert 0 <= counters["requests_total"] - decided <= 20
    # GET Stub of the client; full handshakes never come to the queue
    assert 0 <= counters["nfqueue_packets_total"] - counters["requests_total"] < counters["requests_total"] / 20


def test_once_it_is_over_no_cookie_is_asked_for_and_all_goes_on(flood: Flood, measured: dict[str, Any]) -> None:
    wait_until(lambda: flood.counters()["cookies_demanded"] == 0, "the end of the demand")
    before = flood.counters()
    assert flood.move(flood.target)["result"] == "resumed"
    after = flood.counters()
    assert after["cookies_total[rate]"] == before["cookies_total[rate]"]
    assert flood.topology.client.ping(SITE) == 3
