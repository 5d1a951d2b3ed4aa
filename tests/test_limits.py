"""Protocol rule 4 at a real gateway: cookies, and the limits on unconfirmed SAs."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge.ike.resumption_answer import parse_response
from bridge.ike.sync_messages import CookieChallenge, OrdinaryResponse, SyncResponse
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import connect, counter, fresh, resume, spis, status, the_sa
from probe_support import configured, rebuilt, refused, request, send, the_stub
from wire_support import Capture, packets

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


BURST = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for line in sys.stdin.read().split():
    sock.sendto(bytes.fromhex(line), (sys.argv[1], 4500))
"""


def burst(topology: Topology, messages: list[bytes]) -> None:
    """Send messages to gw2 as fast as they go."""
    lines = "".join((bytes(4) + message).hex() + "\n" for message in messages)
    topology.client.run(sys.executable, "-c", BURST, topology.gw2.address, stdin=lines)


def seen_by_charon(topology: Topology) -> int:
    """How many packets from the probe's port gw2's charon got."""
    return topology.gw2.charon.text().count("received packet: from 192.168.50.10[4501]")


def test_a_request_without_a_cookie_costs_a_gateway_that_asks_for_one_nothing_but_the_question(
    topology: Topology,
) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
        charons = seen_by_charon(topology)
        message = request(stub)
        [octets] = send(topology, message)
        assert isinstance(parse_response(octets, message), CookieChallenge)
        assert len(octets) < len(message)
        told = status(topology, "gw2")
        assert told["unconfirmed"] == 0
        assert told["counters"]["cookies_total[unconfirmed]"] == 1
        assert told["counters"]["cookies_demanded"] == 1
        assert told["counters"]["bank_get_seconds_count"] == 0
        assert seen_by_charon(topology) == charons
        assert rebuilt(topology) == 0


def test_the_same_request_with_the_cookie_is_served_and_with_another_one_is_not(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
        [octets] = send(topology, request(stub))
        challenge = parse_response(octets, request(stub))
        assert isinstance(challenge, CookieChallenge)
        wrong = request(stub, cookie=bytes(len(challenge.cookie)))
        [octets] = send(topology, wrong)
        assert isinstance(parse_response(octets, wrong), CookieChallenge)
        elsewhere = request(stub, cookie=challenge.cookie)
        [octets] = send(topology, elsewhere, port=4502)
        assert isinstance(parse_response(octets, elsewhere), CookieChallenge)
        assert rebuilt(topology) == 0
        right = request(stub, cookie=challenge.cookie)
        [octets] = send(topology, right)
        assert isinstance(parse_response(octets, right), SyncResponse)
        assert rebuilt(topology) == 1


def test_a_client_answers_to_the_question_and_resumes(topology: Topology) -> None:
    connect(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
        assert counter(topology, "gw2", "cookies_total[unconfirmed]") == 1
        assert topology.client.ping(SITE) == 3


AGAIN = """
import sys
from bridge.net.raw_socket import RawUdp
RawUdp().send(sys.argv[1], 4500, sys.argv[2], 4500, bytes.fromhex(sys.stdin.read()), True)
"""


def test_what_a_client_sent_before_it_had_resumed_is_no_handshake_for_a_gateway_under_load(topology: Topology) -> None:
    connect(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0), Capture(topology.client) as capture:
        outcome = resume(topology, "--to", topology.gw2.address)
        assert outcome["result"] == "resumed"
        capture.wait_for(bytes.fromhex(outcome["spi_i"] + outcome["spi_r"]), "the captured packets")
        requests = [packet for packet in packets(capture.file) if packet.resumes and not packet.is_answer]
        last = requests[-1]
        assert (last.src, last.sport) == (topology.client.address, 4500)
        wait_until(lambda: counter(topology, "gw2", "resumptions_total") == 1, "the confirmed SA")
        handshakes = topology.gw2.charon.text().count("is initiating an IKE_SA")
        addresses = (topology.client.address, topology.gw2.address)
        topology.client.run(sys.executable, "-c", AGAIN, *addresses, stdin=last.octets.hex())
        wait_until(lambda: counter(topology, "gw2", "retransmissions_total") == 1, "the late request")
        assert counter(topology, "gw2", "refusals_total[no-stub]") == 0
        assert topology.gw2.charon.text().count("is initiating an IKE_SA") == handshakes
        assert spis(the_sa(topology.gw2)) == (outcome["spi_i"], outcome["spi_r"])
    assert topology.client.ping(SITE) == 3


def test_a_request_that_is_served_is_not_asked_for_a_cookie_when_it_comes_again(topology: Topology) -> None:
    connect(topology)
    message = request(the_stub(topology))
    charon = topology.gw2.charon
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=1), ThreadPoolExecutor(1) as beside:
        # so that the request stays in the making: charon takes in nothing
        os.kill(charon.pid, signal.SIGSTOP)
        try:
            first = beside.submit(send, topology, message)
            wait_until(lambda: counter(topology, "gw2", "requests_total") == 1, "the request")
            burst(topology, [message])
            wait_until(lambda: counter(topology, "gw2", "retransmissions_total") == 1, "the request, again")
        finally:
            os.kill(charon.pid, signal.SIGCONT)
        [answer] = first.result()
        assert isinstance(parse_response(answer, message), SyncResponse)
        # and once it is answered
        assert send(topology, message) == [answer]
        told = status(topology, "gw2")["counters"]
        assert told["retransmissions_total"] == 2
        assert told["cookies_demanded"] == 1
        assert told["cookies_total[unconfirmed]"] == 0
        assert rebuilt(topology) == 1


def test_a_request_that_is_served_stays_the_sidecars_when_its_source_has_sent_too_many(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0, source_rate=1):
        [octets] = send(topology, request(stub))
        challenge = parse_response(octets, request(stub))
        assert isinstance(challenge, CookieChallenge)
        message = request(stub, cookie=challenge.cookie)
        answers = [send(topology, message)[0] for _ in range(2)]
        handshakes = topology.gw2.charon.text().count("is initiating an IKE_SA")
        burst(topology, [message] * 5)
        wait_until(lambda: counter(topology, "gw2", "retransmissions_total") == 6, "the request, again and again")
        assert answers[0] == answers[1]
        assert isinstance(parse_response(answers[0], message), SyncResponse)
        assert counter(topology, "gw2", "refusals_total[source-rate]") == 0
        assert topology.gw2.charon.text().count("is initiating an IKE_SA") == handshakes
        assert rebuilt(topology) == 1


def test_ordinary_handshakes_are_never_asked_for_a_cookie_by_the_sidecar(topology: Topology) -> None:
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
        connect(topology, "home-gw2")
        assert counter(topology, "gw2", "requests_total") == 0


def test_a_refused_request_reaches_charon_cookie_and_all_and_gets_the_normal_response(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
        bare = request(stub, sk_d_old=bytes(32))
        [octets] = send(topology, bare)
        challenge = parse_response(octets, bare)
        assert isinstance(challenge, CookieChallenge)
        assert refused(topology, request(stub, sk_d_old=bytes(32), cookie=challenge.cookie))


def test_past_the_rate_of_a_source_it_is_asked_and_then_refused(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", source_rate=1):
        unproved = [request(stub, spi_i=bytes((n,)) * 8, sk_d_old=bytes(32)) for n in range(1, 11)]
        answers = send(topology, *unproved)
        assert counter(topology, "gw2", "cookies_total[source-rate]") >= 1
        challenges = [(octets[:8], parse_response(octets, octets)) for octets in answers]
        # with their cookies one is within the rate, and others beyond it are refused
        proved = [
            request(stub, spi_i=spi_i, cookie=challenge.cookie, refusable=True)
            for spi_i, challenge in challenges
            if isinstance(challenge, CookieChallenge)
        ]
        answers = send(topology, *proved[:3])
        assert {type(parse_response(octets, octets)) for octets in answers} == {SyncResponse, OrdinaryResponse}
        assert counter(topology, "gw2", "refusals_total[source-rate]") >= 1
        assert rebuilt(topology) == 1


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("max_unconfirmed", "too-many-unconfirmed"), ("max_unconfirmed_per_source", "source-unconfirmed")],
)
def test_no_more_sas_are_unconfirmed_than_may_be_cookie_or_not(topology: Topology, limit: str, reason: str) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", cookie_threshold=0, confirm_timeout=60, **{limit: 1}):
        for number in (1, 2):
            bare = request(stub, spi_i=bytes((number,)) * 8)
            [octets] = send(topology, bare)
            challenge = parse_response(octets, bare)
            assert isinstance(challenge, CookieChallenge)
            proved = request(stub, spi_i=bytes((number,)) * 8, cookie=challenge.cookie, refusable=True)
            [octets] = send(topology, proved)
            assert isinstance(parse_response(octets, proved), SyncResponse if number == 1 else OrdinaryResponse)
        assert counter(topology, "gw2", f"refusals_total[{reason}]") == 1
        assert status(topology, "gw2")["unconfirmed"] == rebuilt(topology) == 1


def test_many_refusals_are_counted_each_and_logged_in_few_lines(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    gateway = topology.gateways["gw2"]
    with configured(gateway, "sync", source_rate=1000, cookie_threshold=1000):
        before = gateway.text().count("resumption-refused")
        burst(topology, [request(stub, spi_i=n.to_bytes(8), sk_d_old=bytes(32)) for n in range(1, 401)])
        wait_until(lambda: counter(topology, "gw2", "refusals_total[proof-wrong]") == 400, "400 refusals")
        assert gateway.text().count("resumption-refused") - before < 200
        send(topology, request(stub, spi_i=b"\xff" * 8, sk_d_old=bytes(32)))
        assert "not_logged_before=" in gateway.text()
