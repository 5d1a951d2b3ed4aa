"""`bench outage`: what its generated clients do (bridge.bench.standby), and that they go on at a real gateway."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from bank_support import stub_of
from bridge.bank.recent_traffic import decode
from bridge.bench import cli, outage
from bridge.bench.aims import aims
from bridge.bench.cli import bench
from bridge.bench.clients import Clients
from bridge.bench.outage import DETECT, FAILURES, PATIENCE, STOPPED, failure, fill, in_failures, section
from bridge.bench.rig import rig
from bridge.bench.sessions import Session
from bridge.bench.standby import PROBE_SECONDS, PROBES, Standby, Standbys
from bridge.charon.reconcile import RECONCILE_SECONDS
from bridge.ike.message import ExchangeType
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubMessage,
    StubSa,
    build_announcement,
    build_here,
    build_move,
    parse_stub_message,
    verify,
)
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.net.packet import parse_datagram
from bridge.stub.bank_keys import TRAFFIC_KIND, posted_key
from clear_support import Sent

HERE, OTHER = "192.0.2.1", "192.0.2.2"
ID = (1 << 31) + 7


class Scene:
    """One generated client with a session at HERE."""

    def __init__(self) -> None:
        self.sent: list[tuple[StubMessage, str]] = []
        self.moved: list[str] = []
        self.clients = Standbys(HERE, self._send, lambda session, gateway: self.moved.append(gateway))
        stub = stub_of()
        self.session = Session.of(stub, os.urandom(8), 1)
        self.session.spi_r = os.urandom(8)
        self.clients.add(self.session, os.urandom(8), b"")
        self.now = 100.0

    @property
    def client(self) -> Standby:
        return self.clients.by_spi[self.session.spi_i]

    @property
    def sa(self) -> StubSa:
        """The gateway's view."""
        mine = self.session.stub_sa(HERE)
        return StubSa(mine.spi_i, mine.spi_r, False, mine.index, mine.prf, mine.sk_d)

    def _send(self, octets: bytes, source: str, gateway: str) -> None:
        assert source == self.session.address
        self.sent.append((parse_stub_message(octets), gateway))

    def gets(self, octets: bytes) -> None:
        self.clients.message(self.client, octets, self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.clients.tick(self.now)

    @property
    def said(self) -> list[tuple[MoveStatus, str]]:
        return [(message.move.status, to) for message, to in self.sent if message.move is not None]


def test_it_moves_to_the_gateway_that_announces_once_its_own_does_not_answer() -> None:
    scene = Scene()
    announcement = build_announcement(scene.sa, OTHER, ID)
    scene.gets(announcement)
    for _ in range(PROBES + 1):
        scene.passes(PROBE_SECONDS)
    assert scene.said == [(MoveStatus.PROBE, HERE)] * PROBES + [(MoveStatus.MOVING, OTHER)]
    assert scene.moved == [OTHER]
    report = scene.sent[-1][0]
    assert verify(report, scene.sa.prf, scene.sa.sk_d, before=parse_stub_message(announcement))
    # the same again brings the report again
    scene.gets(announcement)
    assert scene.said[-1] == (MoveStatus.MOVING, OTHER)
    assert scene.moved == [OTHER]


def test_it_stays_where_its_gateway_answers() -> None:
    scene = Scene()
    scene.gets(build_announcement(scene.sa, OTHER, ID))
    scene.passes(0.0)
    scene.gets(build_here(scene.sa, scene.sent[-1][0]))
    for _ in range(PROBES + 1):
        scene.passes(PROBE_SECONDS)
    assert scene.said == [(MoveStatus.PROBE, HERE), (MoveStatus.GATEWAY_LIVES, OTHER)]
    assert scene.moved == []
    assert scene.clients.contradicted == 1


def test_it_moves_immediately_where_its_gateway_has_lost_it() -> None:
    scene = Scene()
    scene.gets(build_announcement(scene.sa, OTHER, ID))
    scene.passes(0.0)
    scene.gets(build_here(scene.sa, scene.sent[-1][0], MoveStatus.NOT_HERE))
    assert scene.said == [(MoveStatus.PROBE, HERE), (MoveStatus.MOVING, OTHER)]
    assert scene.moved == [OTHER]


def test_it_follows_a_move() -> None:
    scene = Scene()
    scene.gets(build_move(scene.sa, OTHER, ID))
    assert scene.said == [(MoveStatus.MOVING, HERE)]
    assert scene.moved == [OTHER]


def test_what_is_not_proved_is_nothing() -> None:
    scene = Scene()
    foreign = StubSa(scene.sa.spi_i, scene.sa.spi_r, False, scene.sa.index, scene.sa.prf, b"?" * 32)
    scene.gets(build_announcement(foreign, OTHER, ID))
    scene.gets(build_move(foreign, OTHER, ID))
    scene.passes(1.0)
    assert (scene.said, scene.moved) == ([], [])


def made_up(kind: str, sessions: int, moved: int) -> dict[str, Any]:
    """The figures of a failure, as far as a command line needs them."""
    return {
        "kind": kind,
        "sessions": sessions,
        "moved": moved,
        "failures": sessions - moved,
        "seconds": 1.5,
        "clients": {"clients": 2, "moved": 2, "silence_ms": {"p50": 100}},
        "silence_ms": {"p50": 10, "p99": 20},
        "sent_twice_percent": 0.5,
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, without a lab: of 100 sessions 99 move."""
    kinds: list[str] = []

    @contextmanager
    def no_lab(clients: int, detect: float) -> Iterator[Mock]:
        yield Mock()

    def fail(built: Mock, kind: str, sessions: int, told: Callable[[str, float], None]) -> dict[str, Any]:
        kinds.append(kind)
        for share in (0.0, 0.01, 0.5, 1.0):
            told(kind, share)
        return made_up(kind, sessions, sessions - 1)

    monkeypatch.setattr(cli, "rig", no_lab)
    monkeypatch.setattr(cli, "lab_machine", lambda target: {})
    monkeypatch.setattr(outage, "failure", fail)
    return kinds


def test_one_kind_of_failure_is_measured_alone_and_its_progress_shown(measured: list[str]) -> None:
    done = CliRunner().invoke(bench, ["outage", "--only", STOPPED, "--sessions", "100", "--json"])
    assert measured == [STOPPED]
    [row] = json.loads(done.stdout)["failures"]
    assert (row["kind"], row["moved"], row["detect"]) == (STOPPED, 99, DETECT)
    assert [line.split("s  ")[1] for line in done.stderr.splitlines()[:4]] == [
        f"{STOPPED}: the lab starts",
        STOPPED,
        f"{STOPPED} 50 %",
        f"{STOPPED} 100 %",
    ]
    assert "99 of 100 sessions" in done.stderr
    assert (done.exit_code, "1 sessions were not resumed" in done.stderr) == (1, True)


def test_a_kind_that_there_is_not_and_a_plot_of_one_kind_are_refused(measured: list[str], tmp_path: Path) -> None:
    refused = CliRunner().invoke(bench, ["outage", "--only", "fire"])
    assert (refused.exit_code, "systemctl stop" in refused.stderr) == (2, True)
    refused = CliRunner().invoke(bench, ["outage", "--only", STOPPED, "--plot", str(tmp_path / "outage.svg")])
    assert refused.exit_code == 2
    assert measured == []


@pytest.mark.lab
def test_generated_and_real_clients_go_on_when_their_gateway_is_killed() -> None:
    with rig(1, DETECT) as built:
        built.take_model()
        row = failure(built, next(iter(FAILURES)), 20, lambda what, share: None)
    assert (row["moved"], row["failures"]) == (20, 0), row
    assert (row["clients"]["clients"], row["clients"]["moved"]) == (1, 1)
    assert row["failover"]["announced"] >= 21
    assert row["handshakes"]["count"] > 0
    result = {"failures": [row | {"detect": 1.0}], "short": row | {"detect": 0.3}, "false alarms": []}
    text, plot = section(result)
    page = in_failures("# Failures\n<!-- bench outage -->\nold\n<!-- end of bench outage -->\n", result, "Taken today.")
    assert "| charon and sidecar killed, detect 0.3 s |" in page
    assert "old" not in page
    assert "charon and sidecar killed, detect 0.3 s" in text
    assert plot.startswith("<svg")
    assert any(aim.what == "outage: sessions not resumed" and aim.met for aim in aims({"outage": result}))


@pytest.mark.lab
def test_all_sessions_that_a_restarted_charon_has_lost_go_on_elsewhere() -> None:
    with rig(1, DETECT) as built:
        built.take_model()
        row = failure(built, "charon killed and restarted", 200, lambda what, share: None)
    assert (row["moved"], row["failures"]) == (200, 0), row
    assert row["clients"]["moved"] == 1


class Announced(Sent):
    """The clients that a gateway announces a failure to, in the order of its first message to each."""

    def __init__(self, gateway: Host) -> None:
        super().__init__(gateway)
        self.clients: dict[str, None] = {}

    def take(self, protocol: int, octets: bytes) -> None:
        datagram = parse_datagram(octets, answers=True)
        if datagram is not None and datagram.ike[18] == ExchangeType.STUB:
            self.clients.setdefault(datagram.dst)


@pytest.mark.lab
def test_clients_with_traffic_are_announced_to_before_idle_ones() -> None:
    with rig(3, DETECT) as built:
        built.take_model()
        fill(built, 300)
        topology = built.topology
        posted = posted_key(TRAFFIC_KIND, topology.gw1.address)
        wait_until(
            lambda: len(decode(topology.bank.cli("GET", posted).encode())) == 3,
            "charon's list, and what the gateway posts of it",
            RECONCILE_SECONDS + PATIENCE,
        )
        with Announced(topology.gw2) as announced:
            topology.gw1.charon.kill()
            wait_until(lambda: len(announced.clients) > 100, "announcements to idle clients too")
        real = {host.address for host, _ in built.clients.hosts}
        assert set(list(announced.clients)[:3]) == real


def test_a_storm_without_real_clients_has_no_silence() -> None:
    assert Clients(Mock(), 0).traffic() == {"sent": 0, "lost": 0, "silence_ms": 0}
