"""Which packets the rules match, and that they come and go without a trace."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from bridge.lab.daemon import wait_until
from bridge.net import firewall, queue_rules
from bridge.net.liveness import Liveness
from bridge.net.queue_rules import Match
from net_support import (
    COOKIE,
    CREATE_CHILD_SA,
    FAMILIES,
    GET_STUB,
    IKE_AUTH,
    IKE_SA_INIT,
    INFORMATIONAL,
    INITIATOR,
    NAT_DETECTION_SOURCE_IP,
    RESPONSE,
    SA,
    SYNC,
    Wire,
    ike,
    inside,
    wire,
    with_notification,
)

QUEUE = 4510
FLOOD_RATE = 100
MARKER = bytes(4)
TAG = b"\x7f\xa5"
RULES = queue_rules.rules(QUEUE, tag=TAG)


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture
def host(cable: Wire) -> Iterator[Wire]:
    yield cable
    with inside(cable.host.namespace):
        firewall.remove(RULES)


def ruleset() -> str:
    """All rules of the present network namespace, counters aside."""
    saved = "".join(
        subprocess.run([tool], capture_output=True, text=True, check=True).stdout
        for tool in ("iptables-legacy-save", "ip6tables-legacy-save")
    )
    listed = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"#.*\n|\[\d+:\d+\]", "", saved) + listed


def counted(text: str) -> int:
    return sum(int(number) for number in re.findall(r"counter packets (\d+)", text))


SHOWN = [
    pytest.param(500, ike(IKE_SA_INIT), id="request with SYN first"),
    pytest.param(500, with_notification(COOKIE, SYNC), id="request with SYN after a cookie"),
    pytest.param(500, ike(GET_STUB), id="GET Stub request"),
    pytest.param(4500, MARKER + ike(IKE_SA_INIT), id="request with SYN first on port 4500"),
    pytest.param(4500, MARKER + with_notification(COOKIE, SYNC), id="request with SYN after a cookie on port 4500"),
    pytest.param(4500, MARKER + ike(GET_STUB, flags=0), id="GET Stub request of an original responder"),
]
FULL_HANDSHAKE = [
    pytest.param(500, ike(IKE_SA_INIT, first=SA), id="request for a full handshake"),
    pytest.param(500, with_notification(COOKIE, SA), id="request for a full handshake with a cookie"),
    pytest.param(500, with_notification(NAT_DETECTION_SOURCE_IP, SYNC), id="SYN after another notification"),
    pytest.param(4500, MARKER + ike(IKE_SA_INIT, first=SA), id="request for a full handshake on port 4500"),
    pytest.param(4500, MARKER + with_notification(COOKIE, SA), id="the same with a cookie"),
]
NOT_SHOWN = [
    pytest.param(500, ike(IKE_AUTH), id="IKE_AUTH request"),
    pytest.param(500, ike(IKE_SA_INIT, flags=RESPONSE), id="IKE_SA_INIT response"),
    pytest.param(500, ike(GET_STUB, flags=RESPONSE | INITIATOR), id="GET Stub response"),
    pytest.param(500, MARKER + ike(IKE_SA_INIT), id="non-ESP marker on port 500"),
    pytest.param(500, b"", id="empty datagram"),
    pytest.param(4500, MARKER + ike(IKE_AUTH), id="IKE_AUTH request on port 4500"),
    pytest.param(4500, ike(IKE_SA_INIT), id="ESP that looks like IKE_SA_INIT"),
    pytest.param(4500, b"\xc0\0\0\1" + ike(IKE_SA_INIT), id="ESP that looks like IKE_SA_INIT after a marker"),
    pytest.param(4500, b"\xff", id="NAT keepalive"),
    pytest.param(501, ike(IKE_SA_INIT), id="another port"),
]


def protected(exchange: int, message_id: int, *, tag: bytes = TAG, flags: int = INITIATOR) -> bytes:
    """A message on an IKE_SA whose SPIr ends with `tag`."""
    octets = ike(exchange, flags, size=80, first=46)
    return octets[:8] + b"\x01" * 6 + tag + octets[16:20] + message_id.to_bytes(4) + octets[24:]


TAGGED = [
    pytest.param(500, protected(INFORMATIONAL, 1), id="first INFORMATIONAL"),
    pytest.param(500, protected(CREATE_CHILD_SA, 2, flags=0), id="CREATE_CHILD_SA of the original responder"),
    pytest.param(4500, MARKER + protected(INFORMATIONAL, 31), id="INFORMATIONAL on port 4500"),
    pytest.param(4500, MARKER + protected(CREATE_CHILD_SA, 1), id="CREATE_CHILD_SA on port 4500"),
]
NOT_TAGGED = [
    pytest.param(500, protected(INFORMATIONAL, 1, tag=b"\xa5\x7f"), id="another tag"),
    pytest.param(4500, MARKER + protected(INFORMATIONAL, 1, tag=b"\x7f\xa4"), id="another tag on port 4500"),
    pytest.param(500, protected(INFORMATIONAL, 32), id="a later request"),
    pytest.param(4500, MARKER + protected(INFORMATIONAL, 0x10001), id="a much later request"),
    pytest.param(500, protected(INFORMATIONAL, 1, flags=RESPONSE), id="an answer"),
    pytest.param(500, protected(IKE_AUTH, 1), id="IKE_AUTH"),
    pytest.param(4500, protected(INFORMATIONAL, 1), id="ESP that looks like it"),
]


class Counting:
    """The rules of one backend without their queue: what they count can be told on any kernel."""

    def __init__(self, host: Wire, backend: firewall.Backend, match: Match = "first") -> None:
        self._host, self._backend = host.host, backend
        self._rules = queue_rules.rules(QUEUE, match, tag=TAG, flood_rate=FLOOD_RATE)

    def set_up(self) -> None:
        with inside(self._host.namespace):
            if self._backend == "nftables":
                feed(self._rules.nftables.replace(f"queue num {QUEUE} bypass", "counter"), "nft", "-f", "-")
                feed(queue_rules.nftables_meter(FLOOD_RATE), "nft", "-f", "-")
            else:
                firewall.install(self._rules, backend="iptables")

    def view(self) -> firewall.View:
        with inside(self._host.namespace):
            return firewall.look(self._rules, firewall.Placed(self._backend))

    def matched(self) -> int:
        return queue_rules.matched(self.view())


def feed(text: str, *command: str) -> None:
    subprocess.run(command, input=text, text=True, check=True)


@pytest.mark.lab
@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("family", FAMILIES)
class TestMatch:
    def matched(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes, match: Match = "first"
    ) -> int:
        counting = Counting(host, backend, match)
        counting.set_up()
        charon = host.host.udp(family, port)
        client = host.peer.udp(family, 0)
        client.sendto(payload, (host.host.address(family), port))
        assert charon.recv(65535) == payload
        charon.close()
        return counting.matched()

    @pytest.mark.parametrize(("port", "payload"), SHOWN)
    def test_a_request_to_resume_is_for_the_queue(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes
    ) -> None:
        assert self.matched(host, backend, family, port, payload) == 1

    @pytest.mark.parametrize(("port", "payload"), FULL_HANDSHAKE)
    def test_a_full_handshake_never_enters_the_queue(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes
    ) -> None:
        assert self.matched(host, backend, family, port, payload) == 0

    @pytest.mark.parametrize(("port", "payload"), [*SHOWN, *FULL_HANDSHAKE])
    def test_with_match_anywhere_every_first_request_is(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes
    ) -> None:
        assert self.matched(host, backend, family, port, payload, "anywhere") == 1

    @pytest.mark.parametrize("match", ["first", "anywhere"])
    @pytest.mark.parametrize(("port", "payload"), TAGGED)
    def test_a_first_request_on_a_rebuilt_ike_sa_is(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes, match: Match
    ) -> None:
        assert self.matched(host, backend, family, port, payload, match) == 1

    @pytest.mark.parametrize("match", ["first", "anywhere"])
    @pytest.mark.parametrize(("port", "payload"), [*NOT_SHOWN, *NOT_TAGGED])
    def test_anything_else_is_not(
        self, host: Wire, backend: firewall.Backend, family: str, port: int, payload: bytes, match: Match
    ) -> None:
        assert self.matched(host, backend, family, port, payload, match) == 0


@pytest.mark.lab
@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("family", FAMILIES)
class TestMeter:
    """More requests than FLOOD_RATE and its burst let pass."""

    COUNT = 4 * FLOOD_RATE

    def sent(self, host: Wire, backend: firewall.Backend, family: str, payload: bytes, *, flood: bool) -> Counting:
        counting = Counting(host, backend)
        counting.set_up()
        placed = firewall.Placed(backend)
        with inside(host.host.namespace):
            liveness = Liveness(lambda: None, lambda: None)
            liveness.start(cast(Any, SimpleNamespace(call_later=Mock())), placed)
            if flood:
                liveness.flood()
        client = host.peer.udp(family, 0)
        for _ in range(self.COUNT):
            client.sendto(payload, (host.host.address(family), 500))
        liveness.stop()
        return counting

    @pytest.mark.parametrize(
        "payload", [pytest.param(ike(IKE_SA_INIT), id="SYN"), pytest.param(ike(GET_STUB), id="GET")]
    )
    def test_without_a_flood_all_pass(self, host: Wire, backend: firewall.Backend, family: str, payload: bytes) -> None:
        counting = self.sent(host, backend, family, payload, flood=False)
        assert (counting.matched(), queue_rules.metered(counting.view())) == (self.COUNT, 0)

    KINDS = (
        pytest.param(ike(IKE_SA_INIT), 1.0, id="SYN"),
        pytest.param(with_notification(COOKIE, SYNC), 2.0, id="cookie"),
        pytest.param(ike(GET_STUB), queue_rules.STRAYS_RATE / queue_rules.FLOOD_RATE, id="GET"),
    )

    @pytest.mark.parametrize(("payload", "share"), KINDS)
    def test_in_a_flood_each_kind_has_its_rate(
        self, host: Wire, backend: firewall.Backend, family: str, payload: bytes, share: float
    ) -> None:
        counting = self.sent(host, backend, family, payload, flood=True)
        passed, dropped = counting.matched(), queue_rules.metered(counting.view())
        assert passed + dropped == self.COUNT
        assert passed >= share * FLOOD_RATE // 10
        assert dropped

    def test_in_a_flood_requests_of_rebuilt_ike_sas_go_past_the_queue(
        self, host: Wire, backend: firewall.Backend, family: str
    ) -> None:
        with host.host.udp(family, 500) as charon:
            charon.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            counting = self.sent(host, backend, family, protected(INFORMATIONAL, 1), flood=True)
            assert counting.matched() < self.COUNT
            assert queue_rules.metered(counting.view()) == 0
            charon.settimeout(5)
            # no process reads the queue: what is for it arrives too
            for _ in range(self.COUNT):
                charon.recv(65535)

    @pytest.mark.parametrize(
        "payload", [pytest.param(with_notification(COOKIE, SYNC), id="cookie"), pytest.param(ike(GET_STUB), id="GET")]
    )
    def test_a_flood_of_one_kind_takes_no_other_kinds_place(
        self, host: Wire, backend: firewall.Backend, family: str, payload: bytes
    ) -> None:
        counting = self.sent(host, backend, family, payload, flood=True)
        before = counting.matched()
        client = host.peer.udp(family, 0)
        client.sendto(ike(IKE_SA_INIT), (host.host.address(family), 500))
        assert counting.matched() == before + 1


MAIN_MODE, AGGRESSIVE_MODE = 2, 4
BEGINNINGS = [
    *FULL_HANDSHAKE,
    pytest.param(500, ike(MAIN_MODE, flags=0, first=1), id="Main Mode of IKEv1"),
    pytest.param(4500, MARKER + ike(AGGRESSIVE_MODE, flags=0, first=1), id="Aggressive Mode of IKEv1"),
]


@pytest.mark.lab
@pytest.mark.parametrize("match", ["first", "anywhere"])
@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("family", FAMILIES)
class TestHold:
    """While segments of charon's change hands."""

    @pytest.fixture
    def counting(self, host: Wire, backend: firewall.Backend, match: Match) -> Iterator[Counting]:
        counting = Counting(host, backend, match)
        counting.set_up()
        with inside(host.host.namespace):
            liveness = Liveness(lambda: None, lambda: None)
            liveness.start(cast(Any, SimpleNamespace(call_later=Mock())), firewall.Placed(backend))
            assert liveness.hold()
        yield counting
        liveness.stop()

    def sent(self, host: Wire, family: str, port: int, payload: bytes) -> None:
        charon, client = host.host.udp(family, port), host.peer.udp(family, 0)
        client.sendto(payload, charon.getsockname())
        # no process reads the queue
        assert charon.recv(65535) == payload
        charon.close()

    @pytest.mark.parametrize(("port", "payload"), BEGINNINGS)
    def test_what_may_begin_a_handshake_is_for_the_queue(
        self, host: Wire, counting: Counting, family: str, port: int, payload: bytes
    ) -> None:
        self.sent(host, family, port, payload)
        assert counting.matched() == 1

    @pytest.mark.parametrize(("port", "payload"), NOT_SHOWN)
    def test_anything_else_is_not(self, host: Wire, counting: Counting, family: str, port: int, payload: bytes) -> None:
        self.sent(host, family, port, payload)
        assert counting.matched() == 0

    def test_the_kernel_forgets_it(self, host: Wire, counting: Counting, family: str) -> None:
        request = ike(MAIN_MODE, flags=0, first=1)
        sent = 0

        def forgotten() -> bool:
            nonlocal sent
            self.sent(host, family, 500, request)
            sent += 1
            return counting.matched() < sent

        wait_until(forgotten, "a request that is not for the queue", 3 * queue_rules.HOLD_SECONDS)
        assert sent > 1


@pytest.mark.lab
@pytest.mark.parametrize("family", FAMILIES)
def test_nftables_see_a_request_in_ip_fragments_whole(host: Wire, family: str) -> None:
    """iptables: test_nfqueue, by way of the queue."""
    counting = Counting(host, "nftables")
    counting.set_up()
    with inside(host.host.namespace):
        feed(queue_rules.NFTABLES_WHOLE, "nft", "-f", "-")
    long = ("meta", "length", ">", "3000", "counter")
    host.host.run("nft", "insert", "rule", "inet", queue_rules.NAME, "input", *long)
    charon, client = host.host.udp(family, 500), host.peer.udp(family, 0)
    client.sendto(ike(size=3000), charon.getsockname())
    assert len(charon.recv(65535)) == 3000
    assert counting.matched() == 1
    assert counted(host.host.run("nft", "list", "chain", "inet", queue_rules.NAME, "input")) == 1
    charon.close()


@pytest.mark.lab
class TestInstall:
    def test_rules_are_present_once_installed(self, host: Wire) -> None:
        with inside(host.host.namespace):
            assert not queue_rules.present()
            firewall.install(RULES)
            assert queue_rules.present()
            assert queue_rules.present(QUEUE)
            assert not queue_rules.present(QUEUE + 1)

    def test_rules_leave_no_trace(self, host: Wire) -> None:
        with inside(host.host.namespace):
            before = ruleset()
            firewall.install(RULES)
            assert ruleset() != before
            firewall.remove(RULES)
            assert ruleset() == before

    def test_rules_of_a_killed_sidecar_are_replaced(self, host: Wire) -> None:
        with inside(host.host.namespace):
            before = ruleset()
            firewall.install(RULES)
            once = ruleset()
            firewall.install(queue_rules.rules(QUEUE + 1))
            firewall.install(RULES)
            assert ruleset() == once
            firewall.remove(RULES)
            assert ruleset() == before

    def test_removing_what_is_not_there_does_nothing(self, host: Wire) -> None:
        with inside(host.host.namespace):
            before = ruleset()
            firewall.remove(RULES)
            assert ruleset() == before

    def test_rules_of_others_in_the_same_table_stay(self, host: Wire) -> None:
        theirs = ("-t", firewall.TABLE, "-A", "INPUT", "-p", "udp", "--dport", "1", "-j", "ACCEPT")
        host.host.run("iptables-nft", *theirs)
        host.host.run("iptables-nft", "-t", firewall.TABLE, "-N", "theirs")
        with inside(host.host.namespace):
            before = ruleset()
            firewall.install(RULES, backend="iptables")
            firewall.remove(RULES)
            assert ruleset() == before
        host.host.run("nft", "delete", "table", "ip", firewall.TABLE)

    def test_legacy_iptables_serve_where_the_others_cannot(self, host: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
        if shutil.which("iptables-legacy") is None:
            pytest.skip("no iptables-legacy")
        monkeypatch.setattr(firewall, "_KINDS", ("-legacy",))
        with inside(host.host.namespace):
            firewall.install(RULES, backend="iptables")
            saved = [run_text(f"{family}tables-legacy-save") for family in ("ip", "ip6")]
            assert all(text.count("NFQUEUE") == 1 for text in saved)
            assert queue_rules.present(QUEUE)
            firewall.remove(RULES)
            saved = [run_text(f"{family}tables-legacy-save") for family in ("ip", "ip6")]
            assert not any(queue_rules.NAME in text for text in saved)

    def test_looking_for_rules_registers_no_legacy_table(self, cable: Wire) -> None:
        names = cable.peer.run("cat", "/proc/thread-self/net/ip_tables_names")
        with inside(cable.peer.namespace):
            firewall.remove(RULES)
            assert not queue_rules.present()
        assert cable.peer.run("cat", "/proc/thread-self/net/ip_tables_names") == names

    def test_detecting_changes_nothing(self, host: Wire) -> None:
        with inside(host.host.namespace):
            before = ruleset()
            backend = firewall.detect(RULES)
            assert ruleset() == before
            assert firewall.install(RULES).backend == backend

    def test_both_families_are_covered(self, host: Wire) -> None:
        with inside(host.host.namespace):
            backend = firewall.install(RULES).backend
            if backend == "iptables":
                for family in ("ip", "ip6"):
                    listed = run_text("nft", "list", "table", family, firewall.TABLE)
                    assert listed.count(f"queue num {QUEUE} bypass") == 1

    def test_a_host_that_can_do_neither_gets_the_reason(self, host: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(firewall, "_found", lambda tool: False)
        with pytest.raises(
            firewall.RulesError, match=r"nft is not installed; iptables is not installed.*rules: external"
        ):
            firewall.install(RULES)

    def test_a_backend_that_was_asked_for_is_the_only_one_tried(self, host: Wire) -> None:
        with inside(host.host.namespace):
            if nft_queue_works():
                assert firewall.install(RULES, backend="nftables").backend == "nftables"
            else:
                with pytest.raises(firewall.RulesError, match="nft: "):
                    firewall.install(RULES, backend="nftables")
                assert not queue_rules.present()


@pytest.mark.lab
def test_nft_understands_the_rules_and_queues_with_bypass(host: Wire) -> None:
    """nft shows the code it would load even where the kernel then lacks nft_queue."""
    with inside(host.host.namespace):
        done = subprocess.run(
            ["nft", "--check", "--debug=netlink", "-f", "-"],
            input=RULES.nftables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.count(f"[ queue num {QUEUE} bypass ]") == 1
    assert "syntax error" not in done.stderr


def test_without_permission_the_error_says_so() -> None:
    done = subprocess.run(
        ["unshare", "--user", "--", sys.executable, "-c", UNPRIVILEGED],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(firewall.__file__).parents[2],
    )
    if done.stderr.startswith("unshare:"):
        pytest.skip("this host allows no user namespaces")
    assert "Run as root" in done.stdout, done.stderr


def run_text(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nft_queue_works() -> bool:
    command, text = ["nft", "--check", "-f", "-"], RULES.nftables
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0


UNPRIVILEGED = """
from bridge.net import firewall, queue_rules
try:
    firewall.install(queue_rules.rules(4510))
except firewall.RulesError as error:
    print(error)
"""
