"""Rebuilt IKE_SAs until the gateway's charon has them active, on the wire: real charons, and a client whose packets the
test makes itself.

A handshake in progress in each of charon's segments keeps rebuilt SAs from being activated. So they stay PASSIVE for as
long as a test needs, and then are activated.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from bridge.bench.sessions import Children, Session, State
from bridge.charon.ha_segments import MAX_SEGMENTS
from bridge.ike.encrypted_payload import protect
from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.message import ExchangeType, Flag, PayloadType
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.lab.host import Host
from bridge.lab.releases import RELEASES
from bridge.lab.topology import SITE
from bridge.stub.types import Endpoint
from failover_support import connect, counter, established, fresh, replaced, resume, spis, status, stub_key, the_sa
from net_support import inside
from probe_support import the_stub
from test_releases_activation import begin_handshakes, connecting, peers

pytestmark = pytest.mark.lab

HALF_OPEN_SECONDS = 60
OWN_PORT, PORT = 4501, 4500
MARKER = bytes(4)
HERE, THERE = {"IPv4": "192.168.50.10", "IPv6": "fd00:50::10"}, {"IPv4": "192.168.50.2", "IPv6": "fd00:50::2"}
DELETE_IKE_SA = (PayloadType.DELETE, bytes((1, 0, 0, 0)))
ANSWER_SECONDS = 5.0
SILENCE_SECONDS = 0.5
"""in which a gateway that answers has answered"""


@pytest.fixture(
    scope="module",
    params=[RELEASES[0], *(pytest.param(release, marks=pytest.mark.releases) for release in RELEASES[1:])],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """gw2 has one of the releases."""
    with Lab() as lab:
        built = standard(lab, start=False, releases={"gw2": request.param})
        built.agent.config["resume_on_down"] = False
        built.gw2.charon.settings |= {"charon.half_open_timeout": HALF_OPEN_SECONDS, "charon.cookie_threshold": 0}
        for address in peers().values():
            built.client.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    """No SA anywhere, and gw2's charon has confirmed a rebuilt one: the next ones are confirmed by the sidecar."""
    fresh(topology)
    connect(topology)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    fresh(topology)


def block(topology: Topology) -> None:
    """From now on charon activates nothing."""
    begin_handshakes(topology, MAX_SEGMENTS)


def unblock(topology: Topology) -> None:
    """It does again."""
    for sa in connecting(topology):
        topology.gw2.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)
    wait_until(lambda: not connecting(topology), "the end of the handshakes")


class Client:
    """A client that resumes the session of the lab's client at gw2, from a port of its own."""

    def __init__(self, topology: Topology, children: Children = Children.NONE, family: str = "IPv4") -> None:
        connect(topology)
        stub = the_stub(topology)
        self.stub = msgspec.structs.replace(stub, remote=Endpoint(HERE[family], OWN_PORT))
        self.session = Session.of(self.stub, os.urandom(8), 0x40000001)
        self.session.children = children
        self.gateway = THERE[family]
        with inside(topology.client.namespace):
            kind = socket.AF_INET if family == "IPv4" else socket.AF_INET6
            self._socket = socket.socket(kind, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HERE[family], OWN_PORT))
        self.first = b""

    def close(self) -> None:
        self._socket.close()

    def send(self, octets: bytes) -> None:
        self._socket.sendto(MARKER + octets, (self.gateway, PORT))

    def receive(self, seconds: float = ANSWER_SECONDS) -> bytes | None:
        """The next message from the gateway; None if there is none in time. Not a Move or the like."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                octets = self._socket.recv(65536)
            except TimeoutError:
                return None
            if octets[:4] == MARKER and octets[4 + 18] != ExchangeType.STUB:
                return octets[4:]
        return None

    def ask(self, octets: bytes, seconds: float = ANSWER_SECONDS) -> bytes | None:
        self.send(octets)
        return self.receive(seconds)

    def resume(self) -> None:
        """Have the answer to SYN; `first` is then the first protected request."""
        request = self.session.prepare(self.gateway, PORT, fresh_public_value(self.session.suite.group))
        answer = self.ask(request, 20.0)
        assert answer is not None
        first = self.session.answer(answer, self.gateway, PORT)
        assert first is not None
        self.first = first

    def message(self, message_id: int, payloads: Any = (), exchange: int = ExchangeType.INFORMATIONAL) -> bytes:
        ours = self.session.outgoing
        assert ours is not None
        return protect(
            ours,
            spi_i=self.session.spi_i,
            spi_r=self.session.spi_r,
            exchange=exchange,
            flags=Flag.INITIATOR,
            message_id=message_id,
            payloads=payloads,
            iv=os.urandom(ours.iv_length),
        )

    def confirm(self) -> bytes:
        """The first request and its answer, which is authentic; gives the answer."""
        answer = self.ask(self.first)
        assert answer is not None
        assert self.session.protected_message(answer) is None
        assert self.session.state is State.CONFIRMED
        return answer

    @property
    def spis(self) -> tuple[str, str]:
        return self.session.spi_i.hex(), self.session.spi_r.hex()


@pytest.fixture
def client(topology: Topology, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client that has its answer; gw2's charon has its SA, and does not activate it until `unblock`."""
    made = Client(topology, *getattr(request, "param", ()))
    block(topology)
    made.resume()
    assert state_of(topology, made) == "PASSIVE"
    yield made
    made.close()
    unblock(topology)


def state_of(topology: Topology, client: Client) -> str:
    """The state of its SA at gw2; empty without one."""
    return next((sa["state"] for sa in topology.gw2.charon.sas() if spis(sa) == client.spis), "")


def is_active(topology: Topology, client: Client) -> bool:
    return state_of(topology, client) == "ESTABLISHED"


def stub_is_new(topology: Topology, client: Client) -> bool:
    """Whether the bank has the stub of the client's new SA, and no other."""
    return topology.bank.stubs() == [stub_key(client.gateway, client.spis[1])]


def remote_of(topology: Topology, client: Client) -> tuple[str, str]:
    [sa] = [sa for sa in topology.gw2.charon.sas() if spis(sa) == client.spis]
    return sa["remote-host"], sa["remote-port"]


@pytest.mark.parametrize("client", [(Children.NONE, family) for family in HERE], indirect=True, ids=list(HERE))
def test_a_client_is_confirmed_while_its_sa_is_passive_and_charon_continues(topology: Topology, client: Client) -> None:
    before = counter(topology, "gw2", "resumptions_total")
    answer = client.confirm()
    wait_until(lambda: stub_is_new(topology, client), "the stub of the new SA")
    assert counter(topology, "gw2", "resumptions_total") == before + 1
    assert state_of(topology, client) == "PASSIVE"
    # the same request, the same octets; the next one another answer
    assert client.ask(client.first) == answer
    second = client.message(2)
    answers = [client.ask(second) for _ in range(2)]
    assert answers[0] == answers[1] != answer
    assert answers[0] is not None
    assert client.session.protected_message(answers[0]) is None
    unblock(topology)
    wait_until(lambda: is_active(topology, client), "the activation")
    assert remote_of(topology, client) == (client.stub.remote.address, str(OWN_PORT))
    # a late one is not charon's to answer otherwise
    assert client.ask(second) == answers[0]
    third = client.message(3)
    answer = client.ask(third) or b""
    assert client.session.protected_message(answer) is None
    assert client.ask(third) == answer
    assert client.ask(second, SILENCE_SECONDS) in (None, answers[0])
    _charon_asks(topology, client)


def _charon_asks(topology: Topology, client: Client) -> None:
    """charon's own requests begin with Message ID 0: here a DELETE."""
    [sa] = [sa for sa in topology.gw2.charon.sas() if spis(sa) == client.spis]
    ending = threading.Thread(
        target=topology.gw2.swanctl, args=("--terminate", "--ike-id", sa["uniqueid"], "--timeout", "20")
    )
    ending.start()
    request = client.receive()
    assert request is not None
    assert int.from_bytes(request[20:24]) == 0
    answer = client.session.protected_message(request)
    assert answer is not None
    client.send(answer)
    ending.join()
    wait_until(lambda: state_of(topology, client) == "", "the end of the SA")


def test_a_client_that_begins_with_create_child_sa_has_it_from_charon(topology: Topology) -> None:
    client = Client(topology, Children.CREATE)
    block(topology)
    client.resume()
    # again and again, as a client that waits does
    assert client.ask(client.first, SILENCE_SECONDS) is None
    client.send(client.first)
    assert state_of(topology, client) == "PASSIVE"
    # it has no answer yet, and could go on elsewhere
    assert not stub_is_new(topology, client)
    unblock(topology)
    answer = client.receive(20.0)
    assert answer is not None
    client.session.protected_message(answer)
    assert client.session.state is State.CONFIRMED
    assert is_active(topology, client)
    wait_until(lambda: stub_is_new(topology, client), "the stub of the new SA")
    client.close()


@pytest.mark.parametrize("checks", [0, 2])
def test_a_client_that_ends_its_sa_before_it_is_active_has_ended_it(
    topology: Topology, client: Client, checks: int
) -> None:
    for number in range(1, 1 + checks):
        assert client.ask(client.message(number)) is not None
    assert client.ask(client.message(1 + checks, [DELETE_IKE_SA]), SILENCE_SECONDS) is None
    unblock(topology)
    answer = client.receive(20.0)
    assert answer is not None
    assert int.from_bytes(answer[20:24]) == 1 + checks
    wait_until(lambda: state_of(topology, client) == "", "the end of the SA")
    wait_until(lambda: topology.bank.stubs() == [], "the end of its stub")


def test_strays_have_no_answer(topology: Topology, client: Client) -> None:
    octets = client.message(1)
    child = client.message(1, [(PayloadType.NONCE, os.urandom(32))], ExchangeType.CREATE_CHILD_SA)
    strays = {
        "a wrong checksum": octets[:-1] + bytes((octets[-1] ^ 1,)),
        "CREATE_CHILD_SA, a wrong checksum": child[:-1] + bytes((child[-1] ^ 1,)),
        "a Message ID to come": client.message(2),
        "one that was": client.message(0),
        "cut": octets[:36],
    }
    assert {name: client.ask(stray, SILENCE_SECONDS) for name, stray in strays.items()} == dict.fromkeys(strays)
    assert status(topology, "gw2")["unconfirmed"] == 1
    answer = client.confirm()
    # from another address, the same octets move nothing
    with inside(topology.bank.host.namespace):
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    other.settimeout(SILENCE_SECONDS)
    other.sendto(MARKER + client.first, (topology.gw2.address, PORT))
    with pytest.raises(TimeoutError):
        other.recv(65536)
    other.close()
    assert client.ask(client.first) == answer


def test_when_charon_dies_before_the_activation_nothing_is_answered_in_its_name_and_the_stub_stays(
    topology: Topology, client: Client
) -> None:
    client.confirm()
    wait_until(lambda: stub_is_new(topology, client), "the stub of the new SA")
    topology.gw2.charon.crash()
    assert client.ask(client.message(2), SILENCE_SECONDS) is None
    topology.gw2.charon.start()
    topology.gateways["gw2"].wait_ready()
    assert client.ask(client.message(2), SILENCE_SECONDS) is None
    assert state_of(topology, client) == ""
    assert stub_is_new(topology, client)
    wait_until(lambda: counter(topology, "gw2", "not_activated") == 0, "the end of what waited")


def test_when_the_sidecar_dies_before_the_activation_the_next_one_has_charon_continue(
    topology: Topology, client: Client
) -> None:
    client.confirm()
    assert client.ask(client.message(2)) is not None
    wait_until(lambda: stub_is_new(topology, client), "the stub of the new SA")
    topology.gateways["gw2"].kill()
    assert client.ask(client.message(3), SILENCE_SECONDS) is None
    topology.gateways["gw2"].start()
    unblock(topology)
    wait_until(lambda: is_active(topology, client), "the activation", 30)
    assert remote_of(topology, client) == (client.stub.remote.address, str(OWN_PORT))
    answer = client.ask(client.message(3)) or b""
    assert client.session.protected_message(answer) is None
    wait_until(lambda: spis_known(topology) == [client.spis], "the SA, known again")
    assert stub_is_new(topology, client)


def test_when_the_sidecar_dies_before_its_client_confirmed_the_sa_goes(topology: Topology, client: Client) -> None:
    stubs = topology.bank.stubs()
    topology.gateways["gw2"].kill()
    topology.gateways["gw2"].start()
    wait_until(lambda: state_of(topology, client) == "", "the end of the SA", 30)
    assert topology.bank.stubs() == stubs


def test_a_sidecar_that_stops_leaves_what_is_confirmed_to_charon(topology: Topology) -> None:
    client = Client(topology)
    client.resume()
    client.confirm()
    topology.gateways["gw2"].stop()
    assert is_active(topology, client)
    assert client.session.protected_message(client.ask(client.message(2)) or b"") is None
    topology.gateways["gw2"].start()
    wait_until(lambda: spis_known(topology) == [client.spis], "the SA, known again")
    client.close()


def spis_known(topology: Topology) -> list[tuple[str, str]]:
    """The IKE_SAs that gw2's sidecar knows."""
    return [(sa["spi_i"], sa["spi_r"]) for sa in status(topology, "gw2")["sas"]]


@contextlib.contextmanager
def resumed_and_passive(topology: Topology) -> Iterator[tuple[str, str]]:
    """The lab's client has resumed its session at gw2, whose charon has the IKE_SA PASSIVE until the end; its SPIs."""
    wait_until(lambda: resumed_while_blocked(topology), "a resumption before gw2 finds the handshakes", 60)
    [of_sa] = [spis(sa) for sa in topology.gw2.charon.sas() if sa["state"] == "PASSIVE"]
    assert of_sa == spis(the_sa(topology.client))
    try:
        yield of_sa
    finally:
        unblock(topology)
    wait_until(lambda: len(established(topology.gw2)) == 1, "the activation")


def resumed_while_blocked(topology: Topology) -> bool:
    """Whether the client's session was resumed at gw2 with a handshake in each segment. Where gw2's sidecar has found
    them, by a comparison, before the request came, it answers after an activation only, which does not come."""
    connect(topology)
    block(topology)
    if resume(topology, "--to", topology.gw2.address)["result"] == "resumed":
        return True
    unblock(topology)
    fresh(topology)
    return False


def carries(topology: Topology) -> None:
    """Echo requests are answered, each way through the client's CHILD_SA and through that of gw2."""
    before = [packets(host) for host in (topology.client, topology.gw2)]
    assert topology.client.ping(SITE) == 3
    after = [packets(host) for host in (topology.client, topology.gw2)]
    assert [now - then for now, then in zip(sum(after, ()), sum(before, ()), strict=True)] == [3] * 4


def packets(host: Host) -> tuple[int, int]:
    """How many packets a host's one CHILD_SA has brought it and taken from it, whatever state its IKE_SA is in."""
    [child] = [it for sa in host.charon.sas() for it in sa["child-sas"].values() if it["state"] == "INSTALLED"]
    return int(child["packets-in"]), int(child["packets-out"])


def test_traffic_passes_while_the_sa_is_passive(topology: Topology) -> None:
    with resumed_and_passive(topology) as of_sa:
        [sa] = [sa for sa in topology.gw2.charon.sas() if spis(sa) == of_sa]
        assert sa["state"] == "PASSIVE"
        carries(topology)
    carries(topology)
    assert spis(the_sa(topology.gw2)) == spis(the_sa(topology.client)) == of_sa


@pytest.mark.parametrize("side", ["client", "gw2"])
def test_an_sa_that_was_passive_is_rekeyed_from_either_side_and_its_client_checked_by_charon(
    topology: Topology, side: str
) -> None:
    host = topology.lab.hosts[side]
    with dpd_at(topology.gw2):
        with resumed_and_passive(topology) as of_sa:
            carries(topology)
        asked(topology.gw2)
        child = list(the_sa(host)["child-sas"])
        host.swanctl("--rekey", "--child", "net")
        wait_until(lambda: list(the_sa(host)["child-sas"]) not in ([], child), "the rekeyed CHILD_SA")
        one_child(topology)
        carries(topology)
        host.swanctl("--rekey", "--ike", {"client": "home-gw2", "gw2": "gw"}[side])
        wait_until(lambda: replaced(host, of_sa), "the rekeyed IKE_SA")
        for end in (topology.client, topology.gw2):
            wait_until(lambda end=end: len(end.charon.sas()) == 1, "the end of the old one")  # type: ignore[misc]
        carries(topology)
        asked(topology.gw2)


def one_child(topology: Topology) -> None:
    """Wait for the end of the CHILD_SA that was rekeyed, at both ends."""
    for host in (topology.client, topology.gw2):
        wait_until(lambda host=host: len(the_sa(host)["child-sas"]) == 1, "the end of the old CHILD_SA")  # type: ignore[misc]


@contextlib.contextmanager
def dpd_at(host: Host) -> Iterator[None]:
    """charon of a gateway checks silent clients, sooner than theirs checks it: a request is a sign of life."""
    host.configure(f"connections {{ gw {{ dpd_delay = {SLOWNESS:.0f}s }} }}\n", "dpd.conf")
    host.charon.load()
    yield
    (host.etc / "swanctl/conf.d/dpd.conf").unlink()
    host.charon.load()


DPD = re.compile("sending DPD request.*parsed INFORMATIONAL response", re.DOTALL)


def asked(host: Host) -> None:
    """Wait until charon has asked whether the client lives, and has an answer."""
    said = len(host.charon.text())
    wait_until(
        lambda: bool(DPD.search(host.charon.text(), said)),
        "a liveness check by charon, answered",
        60,
    )
