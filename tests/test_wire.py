"""What goes over the wire while a session is resumed, captured, and read by tshark.

The client, the gateways and their addresses are real ones; the only keys used here are those that charon logged.
"""

from __future__ import annotations

import hashlib
import hmac
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.message import ExchangeType, NotifyType, PayloadType
from bridge.ike.resumption_request import build_request
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from failover_support import Outcome, connect, resume
from probe_support import configured
from vectors.record import logged
from wire_support import (
    Capture,
    Packet,
    as_codec_reads,
    as_tshark_reads,
    packets,
    proof_of,
    suite_as_tshark_reads,
    tree_of,
    values,
)

pytestmark = pytest.mark.lab

PROPOSAL = "aes128-sha256-prfsha256-x25519"
SUITE = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519)
ADDRESSES = {"IPv4": "192.168.50.{}", "IPv6": "fd00:50::{}"}


@dataclass
class Resumption:
    """One resumption, and all IKE packets from the gateway's death on that the client sent and got."""

    capture: Path
    seen: list[Packet]
    outcome: Outcome
    old: dict[str, Any]
    """the client's old IKE_SA, as VICI gives it"""
    again: Outcome
    """the same session resumed once more, at a gateway that asks for cookies"""
    sk_d_old: bytes
    sk_d: bytes
    client: str
    gateway: str

    def _init(self, outcome: Outcome) -> list[Packet]:
        """The IKE_SA_INIT messages of the attempt that an SA came from."""
        spi_i = bytes.fromhex(outcome["spi_i"])
        return [one for one in self.seen if one.exchange == ExchangeType.IKE_SA_INIT and one.octets[:8] == spi_i]

    @property
    def exchange(self) -> tuple[Packet, Packet]:
        """The last request of the client and the answer to it."""
        first, second = self._init(self.outcome)[-2:]
        return first, second

    @property
    def with_cookie(self) -> tuple[Packet, Packet, Packet, Packet]:
        """A request, the cookie, the request with it, and the answer."""
        init = self._init(self.again)
        cookies = [packet for packet in init if packet.is_answer and not packet.resumes]
        request, answer = init[-2:]
        return init[0], cookies[-1], request, answer

    @property
    def on_port_500(self) -> tuple[Packet, Packet]:
        """The request that this test sent, and the answer to it."""
        first, second = [packet for packet in self.seen if packet.resumes and not packet.marker]
        return first, second


@pytest.fixture(scope="module", params=list(ADDRESSES))
def resumption(request: pytest.FixtureRequest) -> Iterator[Resumption]:
    form = ADDRESSES[request.param]
    with Lab() as lab:
        topology = standard(lab, start=False)
        _reach_by(topology, form)
        for host, names in ((topology.gw1, ("gw",)), (topology.gw2, ("gw",)), (topology.client, ("home", "home-gw2"))):
            host.charon.settings["charon.filelog.lab.ike"] = 4
            own = {f"connections.{name}.proposals": PROPOSAL for name in names}
            host.configure(render(own) + "\n", "proposal.conf")
        topology.start()
        old = connect(topology)
        sk_d_old = bytes.fromhex(logged(topology.client.charon.text(), "Sk_d secret")[-1])
        topology.kill_gateway(topology.gw1)
        with Capture(topology.client) as capture:
            outcome = resume(topology)
            topology.client.swanctl("--rekey", "--child", "net")
            new = bytes.fromhex(outcome["spi_i"] + outcome["spi_r"])
            # dumpcap writes now and then: something that comes later than all that is looked at
            wait_until(lambda: capture.file.read_bytes().count(new) >= 4, "the captured packets")
            sk_d = bytes.fromhex(logged(topology.client.charon.text(), "Sk_d secret")[-1])
            ask_on_port_500(topology, form.format(2), bytes.fromhex(outcome["spi_r"]), sk_d)
            wait_until(lambda: capture.file.read_bytes().count(BY_HAND) == 2, "the exchange on port 500")
            with configured(topology.gateways["gw2"], "sync", cookie_threshold=0):
                again = resume(topology, "--to", form.format(2))
                topology.client.swanctl("--rekey", "--child", "net")
                newer = bytes.fromhex(again["spi_i"] + again["spi_r"])
                wait_until(lambda: capture.file.read_bytes().count(newer) >= 4, "the packets with a cookie")
        seen = packets(capture.file)
        yield Resumption(capture.file, seen, outcome, old, again, sk_d_old, sk_d, form.format(10), form.format(2))


BY_HAND = b"by hand!"
ASK = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
sock = socket.socket(family, socket.SOCK_DGRAM)
sock.bind(("", 501))
sock.settimeout(5)
sock.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 500))
sock.recv(65536)
"""


def ask_on_port_500(topology: Topology, gateway: str, spi: bytes, sk_d: bytes) -> None:
    """A request to resume a session at its gateway, from port 501; charon has 500. ESP in userspace never uses 500."""
    message = build_request(
        spi_i=BY_HAND,
        suite=SUITE,
        ke_value=fresh_public_value(SUITE.group),
        nonce=bytes(range(32)),
        sync_index=(gateway, spi),
        prf=SUITE.prf,
        sk_d_old=sk_d,
    )
    topology.client.run(sys.executable, "-c", ASK, gateway, message.hex())


def _reach_by(topology: Topology, form: str) -> None:
    """Let the client reach its gateways by these addresses."""
    for number, name in enumerate(("home", "home-gw2"), 1):
        address = form.format(number)
        topology.client.configure(render({f"connections.{name}.remote_addrs": address}) + "\n", f"to-{name}.conf")
        topology.gateways[f"gw{number}"].config["address"] = address
        topology.agent.config["gateways"][number - 1]["address"] = address


def test_a_session_is_resumed_in_one_round_trip(resumption: Resumption) -> None:
    assert resumption.outcome["result"] == "resumed"
    request, answer = resumption.exchange
    before = resumption.seen[: resumption.seen.index(answer) + 1]
    init = [packet for packet in before if packet.exchange == ExchangeType.IKE_SA_INIT]
    assert {packet.octets for packet in init} == {request.octets, answer.octets}
    assert not request.is_answer
    assert answer.is_answer
    assert not [packet for packet in resumption.seen if packet.exchange == ExchangeType.IKE_AUTH]


def test_the_answer_takes_the_requests_way_back(resumption: Resumption) -> None:
    request, answer = resumption.exchange
    assert (request.src, request.dst) == (resumption.client, resumption.gateway)
    # the port of the old SA, at both ends, with the marker that belongs to it
    assert (request.sport, request.dport, request.marker) == (4500, 4500, True)
    assert (answer.src, answer.sport, answer.dst, answer.dport) == (
        request.dst,
        request.dport,
        request.src,
        request.sport,
    )
    assert answer.marker
    request, answer = resumption.on_port_500
    assert (request.sport, request.dport, request.marker) == (501, 500, False)
    assert (answer.sport, answer.dport, answer.marker) == (500, 501, False)


def test_codec_and_tshark_read_every_field_of_the_exchange_the_same(resumption: Resumption) -> None:
    for packet in (*resumption.exchange, *resumption.on_port_500, *resumption.with_cookie):
        assert as_tshark_reads(packet.layers) == as_codec_reads(packet.octets)
        assert not values(packet.layers, "_ws.malformed")
        assert not values(packet.layers, "_ws.expert")


def test_request_and_answer_hold_the_payloads_of_the_draft_and_ours(resumption: Resumption) -> None:
    request, answer = resumption.exchange
    nat = [PayloadType.NOTIFY, PayloadType.NOTIFY]
    (header, payloads), (answer_header, answer_payloads) = (
        as_tshark_reads(packet.layers) for packet in (request, answer)
    )
    assert [kind for kind, *_ in payloads] == [
        PayloadType.SYNC,
        PayloadType.SA,
        PayloadType.KE,
        PayloadType.NONCE,
        *nat,
    ]
    assert [kind for kind, *_ in answer_payloads] == [PayloadType.NONCE, *nat, PayloadType.SYNC]
    spi_i, spi_r = bytes.fromhex(resumption.outcome["spi_i"]), bytes.fromhex(resumption.outcome["spi_r"])
    assert header[:2] == (spi_i, bytes(8))
    assert answer_header[:2] == (spi_i, spi_r)


def test_the_index_is_the_old_gateways_address_and_spi(resumption: Resumption) -> None:
    for packet in resumption.exchange:
        [(from_gateway, gateway, spi, _)] = [
            fields for kind, _, _, fields in as_tshark_reads(packet.layers)[1] if kind == PayloadType.SYNC
        ]
        assert from_gateway is packet.is_answer
        assert gateway == resumption.old["remote-host"]
        assert spi.hex() == resumption.old["responder-spi"]


def test_the_child_sas_are_named_by_what_the_old_gateway_received_on(resumption: Resumption) -> None:
    request, _ = resumption.exchange
    [child] = resumption.old["child-sas"].values()
    assert values(request.layers, "ike_sa_sync.old_child.spi") == ["0x" + child["spi-out"]]
    assert values(request.layers, "ike_sa_sync.child.number") == ["0"]


def test_a_gateway_that_asks_for_a_cookie_gets_the_same_request_with_it_in_front(resumption: Resumption) -> None:
    assert resumption.again["result"] == "resumed"
    bare, asked, full, answer = resumption.with_cookie
    (header, cookie), (_, [sync, *without]), (_, [first, sync_again, *rest]) = (
        as_tshark_reads(one.layers) for one in (asked, bare, full)
    )
    assert header[:2] == (bare.octets[:8], bytes(8))
    [(kind, critical, length, (notification, value))] = cookie
    assert (kind, critical, length, notification) == (PayloadType.NOTIFY, False, 25, NotifyType.COOKIE)
    assert len(value) == 17
    assert first == cookie[0]
    # all but PROOF as it was
    assert rest == without
    (*_, with_cookie), (*_, plain) = sync_again[3], sync[3]
    assert with_cookie[:-1] == plain[:-1]
    assert with_cookie[-1] != plain[-1]
    assert answer.octets[8:16].hex() == resumption.again["spi_r"]


def test_the_proposal_is_what_charon_calls_that_of_the_old_sa(resumption: Resumption) -> None:
    request, _ = resumption.exchange
    suite = suite_as_tshark_reads(tree_of(request.layers, PayloadType.SA))
    old = resumption.old
    assert suite.name == "/".join(
        (f"{old['encr-alg']}_{old['encr-keysize']}", old["integ-alg"], old["prf-alg"], old["dh-group"])
    )


def test_public_value_and_nonces_have_their_lengths(resumption: Resumption) -> None:
    request, answer = resumption.exchange
    assert len(values(request.layers, "isakmp.key_exchange.data")[0].split(":")) == 32
    nonces = [values(packet.layers, "isakmp.nonce")[0] for packet in (request, answer)]
    assert [len(nonce.split(":")) for nonce in nonces] == [32, 32]
    assert nonces[0] != nonces[1]


def test_the_proofs_are_those_of_the_captured_octets(resumption: Resumption) -> None:
    def prf(key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, "sha256")

    for packets_of, sk_d in (
        (resumption.exchange, resumption.sk_d_old),
        (resumption.on_port_500, resumption.sk_d),
    ):
        request, answer = (
            proof_of(resumption.capture, int(packet.layers["frame"]["frame.number"])) for packet in packets_of
        )
        assert request[1] == prf(prf(sk_d, b"IKE_SA_SYNC initiator"), request[0])
        assert answer[1] == prf(prf(sk_d, b"IKE_SA_SYNC responder"), request[0] + answer[0])


def test_nat_detection_is_not_answered_where_it_was_not_asked_for(resumption: Resumption) -> None:
    for packet in resumption.on_port_500:
        assert not values(packet.layers, "isakmp.notify.msgtype")


def test_nat_detection_is_over_the_addresses_in_the_packets(resumption: Resumption) -> None:
    for packet in resumption.exchange:
        header, payloads = as_tshark_reads(packet.layers)
        told = [fields for kind, _, _, fields in payloads if kind == PayloadType.NOTIFY]
        ends = ((packet.src, packet.sport), (packet.dst, packet.dport))
        hashes = [
            hashlib.sha1(header[0] + header[1] + ip_address(address).packed + port.to_bytes(2)).digest()
            for address, port in ends
        ]
        assert told == [
            (NotifyType.NAT_DETECTION_SOURCE_IP, hashes[0]),
            (NotifyType.NAT_DETECTION_DESTINATION_IP, hashes[1]),
        ]


def test_the_clients_next_request_has_message_id_1(resumption: Resumption) -> None:
    _, answer = resumption.exchange
    later = resumption.seen[resumption.seen.index(answer) + 1 :]
    from_client = [packet for packet in later if packet.src == resumption.client and not packet.is_answer]
    assert from_client[0].message_id == 1
    assert from_client[0].octets[:16].hex() == resumption.outcome["spi_i"] + resumption.outcome["spi_r"]
    # charon itself protected it, and the gateway's charon answered
    assert from_client[0].exchange in (ExchangeType.CREATE_CHILD_SA, ExchangeType.INFORMATIONAL)
    assert any(packet.message_id == 1 and packet.is_answer and packet.src == resumption.gateway for packet in later)
