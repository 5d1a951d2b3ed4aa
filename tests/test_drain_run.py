"""A drain, from its first Move to its end (bridge.gateway.drain_run), without root and without a lab: the clients, the
bank and the clock are made up. With real hosts: test_drain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from bank_support import stub_of
from bridge.charon.ike_sa import IkeSa, sa_of, stub_sa
from bridge.cli.drain import _bounded, _print
from bridge.gateway.drain import ANY, Drain
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.ike.stub_exchange import MoveStatus, StubMessage, build_moving, parse_stub_message
from bridge.stub.stub import Index
from role_support import FakeBank, FakeTime, Wire, fake_charon

HERE, THERE, THIRD = "192.0.2.1", "192.0.2.2", "192.0.2.3"


class Elsewhere:
    """Ends IKE_SAs whose session went on elsewhere, one after the other."""

    def __init__(self, loop: FakeTime) -> None:
        self._loop = loop
        self._free_at = 0.0
        self.seconds = 0.0
        """that charon takes for one"""
        self.fails = False
        self.ended: list[IkeSa] = []

    def end(self, sa: IkeSa, new: Index, ended: Callable[[bool], None]) -> None:
        def done() -> None:
            self.ended.append(sa)
            ended(not self.fails)

        self._free_at = max(self._free_at, self._loop.time()) + self.seconds
        self._loop.call_at(self._free_at, done)


class Scene:
    """A gateway that is drained."""

    def __init__(self, loop: FakeTime, clients: int) -> None:
        self.loop = loop
        self.charon, _, _ = fake_charon("home")
        self.bank, self.wire, self.elsewhere = FakeBank(), Wire(), Elsewhere(loop)
        self.bank.alive = {HERE, THERE}
        self.use(self.wire)
        self.sas = [sa_of(stub_of(number.to_bytes(8))) for number in range(1, clients + 1)]
        for sa in self.sas:
            self.charon.tracker.adopt(sa)

    def use(self, wire: Wire) -> None:
        """Send over this."""
        self.wire = wire
        self.drain = Drain(
            self.charon,
            self.bank.as_bank(),
            wire,
            HERE,
            cast(SessionElsewhere, self.elsewhere),
            clock=self.loop.time,
            wall=lambda: 1_800_000_000.0,
        )

    def begin(self, share: float = 1.0) -> dict[str, Any]:
        return self.loop.run(self.drain.start({"to": THERE, "share": share, "rate": 1000.0}))

    def told(self) -> dict[str, Any]:
        return self.loop.run(self.drain.progress({}))

    def moves(self, sa: IkeSa) -> list[StubMessage]:
        """The Moves that the client of an IKE_SA got."""
        found = [parse_stub_message(octets) for _, octets in self.wire.sent]
        return [message for message in found if message.spis == sa.id.spis]

    def report(self, sa: IkeSa, status: MoveStatus) -> None:
        """Its client reports."""
        assert sa.published is not None
        octets = build_moving(stub_sa(sa, sa.published), self.moves(sa)[-1], status, b"n" * 32)

        async def arrive() -> None:
            self.drain.moving(parse_stub_message(octets))

        self.loop.run(arrive())

    def arrives(self, sa: IkeSa) -> None:
        """The target has confirmed its session."""
        assert sa.published is not None
        self.bank.went_on[sa.published] = Index(THERE, b"rebuilt!")


def test_a_client_that_arrives_has_moved_and_its_sa_here_is_ended(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.begin()
    loop.pass_time(0.2)
    scene.report(sa, MoveStatus.MOVING)
    scene.arrives(sa)
    loop.pass_time(0.2)
    assert (scene.told()["state"], scene.told()["moved"]) == ("done", 1)
    assert scene.elsewhere.ended == [sa]


def test_a_client_that_arrives_without_a_report_has_moved_too(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.begin()
    loop.pass_time(0.2)
    scene.arrives(scene.sas[0])
    loop.pass_time(0.2)
    assert scene.told()["moved"] == 1


def test_a_client_without_a_sidecar_is_asked_three_times_and_left_alone(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.begin()
    loop.pass_time(5.0)
    assert len(scene.moves(scene.sas[0])) == 3
    assert scene.told()["outcomes"] == [
        {"result": "left alone", "reason": "no sidecar at the client answered", "sessions": 1}
    ]


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (MoveStatus.NOT_CONFIGURED, "left"),
        (MoveStatus.BUSY, "left"),
        (MoveStatus.NO_ANSWER, "failed"),
        (MoveStatus.REFUSED, "failed"),
    ],
)
@pytest.mark.parametrize("after", [(), (MoveStatus.MOVING,)], ids=["asked", "moving"])
def test_a_client_that_reports_why_not_is_counted_once(
    loop: FakeTime, status: MoveStatus, result: str, after: tuple[MoveStatus, ...]
) -> None:
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.begin()
    loop.pass_time(0.2)
    for one in (*after, status, status):
        scene.report(sa, one)
    loop.pass_time(1.0)
    told = scene.told()
    assert (told["state"], told[result], told["moved"] + told["left"] + told["failed"]) == ("done", 1, 1)


def test_a_report_that_comes_while_the_bank_is_asked_counts_once(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.begin()
    loop.pass_time(0.2)
    scene.report(sa, MoveStatus.MOVING)
    scene.arrives(sa)
    asked = scene.bank.asked["moved"]
    while scene.bank.asked["moved"] == asked:
        loop.pass_time(0.001)
    scene.report(sa, MoveStatus.REFUSED)
    loop.pass_time(1.0)
    told = scene.told()
    assert (told["state"], told["moved"] + told["left"] + told["failed"]) == ("done", 1)


def test_a_client_that_moves_and_does_not_arrive_has_failed_after_30_s(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.begin()
    loop.pass_time(0.2)
    scene.report(scene.sas[0], MoveStatus.MOVING)
    loop.pass_time(29.0)
    assert scene.told()["under_way"] == 1
    loop.pass_time(2.0)
    assert scene.told()["outcomes"] == [{"result": "failed", "reason": "the client did not arrive", "sessions": 1}]


def test_a_session_that_ends_meanwhile_is_left_alone(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.begin()
    loop.pass_time(0.2)
    scene.charon.tracker.forget(scene.sas[0].id)
    loop.pass_time(0.2)
    assert scene.told()["left"] == 1


def moving(loop: FakeTime, clients: int = 1, share: float = 1.0) -> Scene:
    """Clients that report that they move."""
    scene = Scene(loop, clients)
    scene.begin(share)
    loop.pass_time(0.2)
    for sa in scene.sas:
        if scene.moves(sa):
            scene.report(sa, MoveStatus.MOVING)
    return scene


def has_tombstone(scene: Scene, sa: IkeSa) -> None:
    """Its session has ended, so the bank says: any process that writes to the bank could have said so."""
    assert sa.published is not None
    scene.bank.over.add(sa.published)


def test_a_tombstone_alone_ends_nothing_here(loop: FakeTime) -> None:
    scene = moving(loop)
    [sa] = scene.sas
    has_tombstone(scene, sa)
    loop.pass_time(0.5)
    told = scene.told()
    assert scene.elsewhere.ended == []
    assert (told["state"], told["moved"], told["unconfirmed"], told["left"]) == ("done", 0, 1, 0)
    [outcome] = told["outcomes"]
    assert (outcome["result"], "release 0.1" in outcome["reason"]) == ("not confirmed", True)


def test_a_mark_that_is_found_after_its_tombstone_counts(loop: FakeTime) -> None:
    scene = moving(loop)
    [sa] = scene.sas
    has_tombstone(scene, sa)
    asked = scene.bank.asked["ended"]
    while scene.bank.asked["ended"] == asked:
        loop.pass_time(0.001)
    scene.arrives(sa)
    loop.pass_time(0.5)
    assert (scene.elsewhere.ended, scene.told()["moved"]) == ([sa], 1)


@pytest.mark.parametrize("status", [None, MoveStatus.MOVING])
def test_a_mark_that_cannot_be_read_is_waited_for(loop: FakeTime, status: MoveStatus | None) -> None:
    """As while a node of a Redis Cluster is away: the event of the mark had its IKE_SA ended here before that."""
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.begin()
    loop.pass_time(0.2)
    if status is not None:
        scene.report(sa, status)
    assert sa.published is not None
    scene.bank.unread.add(sa.published)
    scene.arrives(sa)
    has_tombstone(scene, sa)
    scene.charon.tracker.forget(sa.id)
    loop.pass_time(0.5)
    assert (scene.told()["state"], scene.told()["under_way"]) == ("running", 1)
    scene.bank.unread.clear()
    loop.pass_time(0.5)
    assert (scene.told()["state"], scene.told()["moved"]) == ("done", 1)


def test_those_not_confirmed_count_for_the_share(loop: FakeTime) -> None:
    scene = moving(loop, clients=10, share=0.3)
    for sa in scene.sas:
        has_tombstone(scene, sa)
    loop.pass_time(0.5)
    told = scene.told()
    assert (told["state"], told["unconfirmed"]) == ("done", 3)
    assert sum(bool(scene.moves(sa)) for sa in scene.sas) == 3


def test_a_session_that_ends_here_while_its_client_moves_has_not_moved(loop: FakeTime) -> None:
    """By its client, or by a rekey: this gateway then leaves the tombstone itself."""
    scene = moving(loop)
    [sa] = scene.sas
    scene.charon.tracker.forget(sa.id)
    has_tombstone(scene, sa)
    loop.pass_time(0.5)
    told = scene.told()
    assert scene.elsewhere.ended == []
    assert (told["state"], told["moved"], told["unconfirmed"], told["left"]) == ("done", 0, 0, 1)


def test_no_more_are_asked_than_the_share_needs(loop: FakeTime) -> None:
    scene = Scene(loop, 10)
    assert scene.begin(0.3)["wanted"] == 3
    loop.pass_time(0.2)
    asked = [sa for sa in scene.sas if scene.moves(sa)]
    assert len(asked) == 3
    scene.report(asked[0], MoveStatus.BUSY)
    for sa in asked[1:]:
        scene.arrives(sa)
    loop.pass_time(0.2)
    for sa in scene.sas:
        scene.arrives(sa)
    loop.pass_time(0.5)
    assert (scene.told()["moved"], scene.told()["left"], scene.told()["state"]) == (3, 1, "done")


def test_a_bank_that_is_away_only_delays(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.begin()
    loop.pass_time(0.2)
    scene.report(scene.sas[0], MoveStatus.MOVING)
    scene.bank.away = True
    loop.pass_time(5.0)
    scene.arrives(scene.sas[0])
    scene.bank.away = False
    loop.pass_time(0.5)
    assert scene.told()["moved"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda scene: scene.bank.alive.discard(THERE), "no gateway lives"),
        (lambda scene: setattr(scene.bank, "away", True), "the bank does not answer"),
    ],
)
def test_a_target_that_could_resume_nothing_is_refused(
    loop: FakeTime, change: Callable[[Scene], None], reason: str
) -> None:
    scene = Scene(loop, 1)
    change(scene)
    assert reason in scene.begin()["error"]
    assert scene.wire.sent == []


class Clients(Wire):
    """The clients of a scene, all with a sidecar: they follow their first Move. A target finishes one resumption after
    the other, `seconds` (by target, a hundredth by default) each."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._scene = scene
        self._by_spis = {sa.id.spis: sa for sa in scene.sas}
        self._free_at: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.waited: list[float] = []
        """of each, from its request until it was resumed"""
        self.asked_at: dict[bytes, float] = {}

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        super().send(src, sport, dst, dport, payload, marker)
        message, now = parse_stub_message(payload), self._scene.loop.time()
        assert message.move is not None
        if message.spis in self.asked_at:
            return
        self.asked_at[message.spis] = now
        sa, target = self._by_spis[message.spis], message.move.target
        assert sa.published is not None
        report = build_moving(stub_sa(sa, sa.published), message, MoveStatus.MOVING, b"n" * 32)
        self._scene.loop.call_later(0.005, lambda: self._scene.drain.moving(parse_stub_message(report)))
        at = self._free_at[target] = max(self._free_at.get(target, 0.0), now) + self.seconds.get(target, 0.001)
        self.waited.append(at - now)
        self._scene.loop.call_at(at, self._scene.arrives, sa)


RETRANSMIT_SECONDS = 0.4
"""a client sends its request again then (`resume.retransmit`)"""


def with_clients(loop: FakeTime, clients: int) -> tuple[Scene, Clients]:
    scene = Scene(loop, clients)
    wire = Clients(scene)
    scene.use(wire)
    return scene, wire


def test_ends_that_are_slow_keep_no_client_waiting(loop: FakeTime) -> None:
    """As charon took 0.33 s for each of 3,000: 12 a second moved."""
    scene, wire = with_clients(loop, 1000)
    scene.elsewhere.seconds = 0.33
    scene.begin()
    loop.pass_time(5.0)
    assert len(wire.asked_at) == 1000
    told = scene.told()
    # what charon was not asked to end yet has not moved yet
    assert told["moved"] == len(scene.elsewhere.ended) < 20
    assert (told["state"], told["under_way"], told["moved"] + told["ending"]) == ("running", 0, 1000)
    loop.pass_time(330.0)
    told = scene.told()
    assert (told["state"], told["moved"], told["ending"], told["failed"]) == ("done", 1000, 0, 0)


def test_what_moved_and_is_not_ended_yet_is_shown(loop: FakeTime, capsys: pytest.CaptureFixture[str]) -> None:
    scene, _ = with_clients(loop, 3)
    scene.elsewhere.seconds = 1.5
    scene.begin()
    loop.pass_time(2.0)
    _print(scene.told())
    shown = capsys.readouterr().out
    assert "1 of 3 sessions wanted moved" in shown
    assert "2 more sessions moved, and charon has yet to end them here" in shown


def test_an_end_that_fails_is_told(loop: FakeTime) -> None:
    scene, _ = with_clients(loop, 3)
    scene.elsewhere.fails = True
    scene.begin()
    loop.pass_time(1.0)
    told = scene.told()
    assert (told["state"], told["moved"]) == ("done", 3)
    [outcome] = told["outcomes"]
    assert outcome["result"] == "moved"
    assert "still here" in outcome["reason"]


@pytest.mark.parametrize("seconds", [0.0007, 0.002, 0.01])
def test_a_target_gets_as_many_as_it_finishes(loop: FakeTime, seconds: float) -> None:
    scene, wire = with_clients(loop, 1000)
    wire.seconds[THERE] = seconds
    began = loop.time()
    scene.begin()
    while scene.told()["state"] == "running":
        loop.pass_time(0.05)
    took = loop.time() - began
    assert scene.told()["moved"] == 1000
    late = sum(waited > RETRANSMIT_SECONDS for waited in wire.waited)
    assert late <= 0.05 * len(wire.waited), f"{late} of {len(wire.waited)} send their request again"
    # it hardly ever has nothing to do
    assert took < max(1000 * seconds * 1.5, 3.0)


def test_a_slow_target_does_not_hold_up_another(loop: FakeTime) -> None:
    scene, wire = with_clients(loop, 600)
    scene.bank.alive.add(THIRD)
    wire.seconds[THIRD] = 1.0
    loop.run(scene.drain.start({"to": ANY, "share": 1.0, "rate": 1000.0}))
    loop.pass_time(5.0)
    to_third = scene.told()["under_way"]
    assert 0 < to_third < 100
    # all of the other half
    assert 200 < scene.told()["moved"] < 400
    moves = [parse_stub_message(octets) for _, octets in wire.sent]
    there = {message.spis for message in moves if message.move is not None and message.move.target == THERE}
    assert scene.told()["moved"] >= len(there)


def test_a_bank_that_is_slow_keeps_no_client_waiting(loop: FakeTime) -> None:
    scene = Scene(loop, 32)
    scene.bank.seconds = 0.5
    loop.run(scene.drain.start({"to": THERE, "share": 1.0, "rate": 1000.0}))
    loop.pass_time(0.2)
    assert sum(bool(scene.moves(sa)) for sa in scene.sas) == 16
    # they do not answer, and give up their places; the first are asked again
    loop.pass_time(0.6)
    assert all(scene.moves(sa) for sa in scene.sas)
    assert sum(len(scene.moves(sa)) == 2 for sa in scene.sas) == 16


def test_clients_without_a_sidecar_keep_no_other_waiting(loop: FakeTime) -> None:
    scene = Scene(loop, 1000)
    scene.begin()
    loop.pass_time(10.0)
    assert (scene.told()["state"], scene.told()["left"]) == ("done", 1000)


def test_the_rate_is_not_exceeded(loop: FakeTime) -> None:
    scene, wire = with_clients(loop, 100)
    loop.run(scene.drain.start({"to": THERE, "share": 1.0, "rate": 10.0}))
    loop.pass_time(5.0)
    assert 50 <= len(wire.asked_at) <= 52


def evening(scene: Scene, **sessions: int) -> dict[str, Any]:
    """A drain to `there` until sessions are even, where the other gateways say that they have so many."""
    for name, count in sessions.items():
        address = {"there": THERE, "third": THIRD}[name]
        scene.bank.alive.add(address)
        scene.bank.posts["stats", address] = json.dumps({"ike_sas": float(count)}).encode()
    request = {"to": THERE, "share": 1.0, "rate": 1000.0, "until_even": True}
    return scene.loop.run(scene.drain.start(request))


@pytest.mark.parametrize(
    ("here", "others", "moves"),
    [
        (4, {"there": 0}, 2),
        (5, {"there": 0}, 2),
        (5, {"there": 4}, 0),
        (2, {"there": 9}, 0),
        (15, {"there": 0, "third": 15}, 5),
        (15, {"there": 5, "third": 10}, 5),
        (10, {"there": 0, "third": 30}, 0),
        (16, {"there": 9, "third": 2}, 0),
        (4, {"there": -(10**9)}, 2),
    ],
)
def test_until_even_moves_what_is_more_than_the_mean_here_and_less_there(
    loop: FakeTime, here: int, others: dict[str, int], moves: int
) -> None:
    scene = Scene(loop, here)
    begun = evening(scene, **others)
    assert begun["wanted"] == moves
    assert list(begun["sessions_at"].values()) == [here, *(max(count, 0) for count in others.values())]
    for sa in scene.sas:
        scene.arrives(sa)
    loop.pass_time(1.0)
    assert (scene.told()["state"], scene.told()["moved"]) == ("done", moves)


def test_a_target_that_does_not_say_how_many_sessions_it_has_is_refused(loop: FakeTime) -> None:
    assert "does not say how many" in evening(Scene(loop, 3))["error"]


@pytest.mark.parametrize("stats", [b"[]", b"{", b'{"ike_sas": "many"}', b'{"ike_sas": 1e999}'])
def test_counters_that_no_gateway_writes_say_nothing(loop: FakeTime, stats: bytes) -> None:
    scene = Scene(loop, 3)
    scene.bank.posts["stats", THERE] = stats
    assert "does not say how many" in evening(scene)["error"]


def test_a_gateway_that_could_resume_no_session_here_counts_for_nothing(loop: FakeTime) -> None:
    scene = Scene(loop, 4)
    scene.bank.posts["facts", THIRD] = b'{"connections": {"another": ["net"]}}'
    begun = evening(scene, there=0, third=50)
    assert (begun["wanted"], THIRD in begun["sessions_at"]) == (2, False)


def test_two_operators_begin_one_drain(loop: FakeTime) -> None:
    scene = Scene(loop, 2)

    async def both() -> list[dict[str, Any]]:
        request = {"to": THERE, "share": 1.0, "rate": 1000.0}
        return list(await asyncio.gather(scene.drain.start(request), scene.drain.start(request)))

    answers = loop.run(both())
    assert ["error" in answer for answer in answers] == [False, True]


def test_a_drain_that_is_stopped_asks_no_more_and_waits_for_those_that_move(loop: FakeTime) -> None:
    scene = Scene(loop, 3)
    scene.loop.run(scene.drain.start({"to": THERE, "share": 1.0, "rate": 1.0}))
    loop.pass_time(0.2)
    [sa] = [sa for sa in scene.sas if scene.moves(sa)]
    scene.report(sa, MoveStatus.MOVING)

    async def stop() -> dict[str, Any]:
        asyncio.get_running_loop().call_later(2.0, scene.arrives, sa)
        return await scene.drain.stop({})

    told = loop.run(stop())
    assert (told["state"], told["moved"], told["under_way"]) == ("stopped", 1, 0)
    assert [len(scene.moves(one)) > 0 for one in scene.sas].count(True) == 1


def test_a_host_that_stops_does_not_wait_for_an_operators_drain(loop: FakeTime) -> None:
    scene = Scene(loop, 3)
    loop.run(scene.drain.start({"to": THERE, "share": 1.0, "rate": 0.1}))
    loop.pass_time(0.2)
    begun = loop.run(scene.drain.start({"to": ANY, "share": 1.0, "rate": 1000.0, "instead": True}))
    assert (begun["state"], begun["wanted"]) == ("running", 3)
    loop.pass_time(0.2)
    assert all(scene.moves(sa) for sa in scene.sas)


def test_a_sidecar_that_does_not_answer_keeps_no_host_from_stopping(tmp_path: Path) -> None:
    async def stop() -> None:
        path = str(tmp_path / "control")
        asked = asyncio.Event()

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asked.wait()
            writer.close()

        async with await asyncio.start_unix_server(say_nothing, path):
            with pytest.raises(TimeoutError):
                await _bounded(path, {"command": "drain"}, 0.05)
            asked.set()

    asyncio.run(asyncio.wait_for(stop(), 30))
