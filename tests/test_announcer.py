"""How a failed gateway's clients are told to come (bridge.gateway.announcer)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank_support import stub_of as bank_stub
from bridge.gateway.announced_failure import HEAD_START
from bridge.gateway.announcer import ATTEMPTS, CONCURRING, PAUSE_SECONDS, TRIAL, TRIAL_SECONDS, TURN_SECONDS, Announcer
from bridge.gateway.other_gateways import order
from bridge.gateway.pace import WINDOW_START
from bridge.ike.stub_exchange import MoveStatus, StubSa, build_moving, parse_stub_message
from bridge.stub.stub import Index, Stub

HERE, OTHER, DEAD = "192.0.2.2", "192.0.2.3", "192.0.2.1"
MODEL = bank_stub(gateway=DEAD)


def stub_of(number: int) -> Stub:
    spi_r = index_of(number).spi
    return msgspec.structs.replace(MODEL, index=index_of(number), spi_i=b"I" + spi_r[1:], spi_r=spi_r, initiator=False)


def index_of(number: int) -> Index:
    return Index(DEAD, b"R" + number.to_bytes(7))


class Network:
    """An announcer, and what it has sent: the stubs' numbers."""

    def __init__(self, sessions: int, able: tuple[str, ...] = (HERE,), rate: float = 1e6) -> None:
        self.now = 1000.0
        self.sent: list[int] = []
        self.octets: dict[int, bytes] = {}
        self.announcer = Announcer(HERE, lambda stub: HERE, self._send, lambda: (1 << 31) + 7, rate=rate)
        self.announcer.tick(self.now - 1)
        self.announcer.begin(DEAD, self.now)
        self.announcer.add(DEAD, [(stub_of(number), able) for number in range(sessions)], complete=True)
        self.tick()

    def _send(self, stub: Stub, octets: bytes) -> None:
        number = int.from_bytes(stub.spi_r[1:])
        self.sent.append(number)
        self.octets[number] = octets

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.announcer.tick(self.now)

    def report(self, number: int, status: MoveStatus, sk_d: bytes | None = None) -> bool:
        stub = stub_of(number)
        sa = StubSa(stub.spi_i, stub.spi_r, True, stub.index, stub.suite.prf, sk_d or stub.sk_d)
        moving = build_moving(sa, parse_stub_message(self.octets[number]), status, b"n" * 32)
        return self.announcer.report(parse_stub_message(moving), self.now)

    def state(self) -> dict[str, object]:
        [failure] = self.announcer.status(self.now)
        told: dict[str, object] = msgspec.to_builtins(failure)
        return told


def test_a_few_sessions_are_announced_first_and_the_rest_when_no_client_contradicts() -> None:
    net = Network(50)
    assert len(net.sent) == TRIAL
    net.tick(TRIAL_SECONDS / 2)
    assert len(net.sent) == TRIAL
    net.tick(TRIAL_SECONDS)
    assert sorted(net.sent) == list(range(50))


def test_a_client_that_says_that_its_gateway_lives_stops_all_of_it() -> None:
    net = Network(50)
    assert net.report(net.sent[0], MoveStatus.GATEWAY_LIVES)
    for _ in range(9):
        net.tick(PAUSE_SECONDS / 10)
    assert len(net.sent) == TRIAL
    assert net.announcer.false_alarms == 1
    assert (net.state()["state"], net.state()["reason"]) == ("stopped", "a client says that it lives")


def test_a_gateway_that_lives_without_a_heartbeat_is_asked_for_again_until_it_fails_or_is_back() -> None:
    net = Network(50)
    net.report(net.sent[0], MoveStatus.GATEWAY_LIVES)
    net.tick(PAUSE_SECONDS + 0.01)
    again = net.sent[TRIAL:]
    assert len(again) == TRIAL
    net.report(again[0], MoveStatus.GATEWAY_LIVES)
    assert net.announcer.false_alarms == 1
    # now it fails
    net.tick(PAUSE_SECONDS + 0.01)
    for number in net.sent[2 * TRIAL :]:
        net.report(number, MoveStatus.MOVING)
    net.tick(1.0)
    net.tick(PAUSE_SECONDS)
    assert sorted(set(net.sent)) == list(range(50))


def test_what_a_gateway_lost_is_announced_although_it_is_back() -> None:
    net = Network(50)
    net.announcer.back(DEAD, net.now)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    assert sorted(net.sent) == list(range(50))


def test_what_a_gateway_that_is_back_still_has_is_not_announced() -> None:
    net = Network(50)
    net.report(net.sent[0], MoveStatus.GATEWAY_LIVES)
    net.announcer.back(DEAD, net.now)
    net.tick(0.1)
    again = net.sent[TRIAL:]
    assert len(again) == TRIAL
    net.report(again[0], MoveStatus.GATEWAY_LIVES)
    assert net.state()["state"] == "stopped"
    assert not net.announcer.busy


def test_clients_that_do_not_answer_keep_no_other_waiting() -> None:
    net = Network(2000, rate=2000.0)
    answered: set[int] = set()
    while len(answered) < 400 and net.now < 1010:
        before = len(net.sent)
        net.tick(0.02)
        # one of five has a sidecar, and is here a moment after it was asked
        for number in net.sent[before:]:
            if number % 5 == 0 and number not in answered:
                answered.add(number)
                net.report(number, MoveStatus.MOVING)
                net.announcer.over(index_of(number), net.now + 0.05)
    assert len(answered) == 400
    assert net.now < 1006


def test_clients_whose_gateways_daemon_alone_answers_are_asked_again_after_a_pause_a_few_first() -> None:
    net = Network(500)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    asked = len(net.sent)
    for number in net.sent[:CONCURRING]:
        net.report(number, MoveStatus.DAEMON_ANSWERS)
    for _ in range(5):
        net.tick(PAUSE_SECONDS / 6)
    assert len(net.sent) == asked
    assert net.announcer.false_alarms == 1
    net.tick(PAUSE_SECONDS / 6 + 0.01)
    again = net.sent[asked:]
    assert len(again) == TRIAL
    # still so: a pause again, and no other alarm
    for number in again:
        net.report(number, MoveStatus.DAEMON_ANSWERS)
    net.tick(PAUSE_SECONDS / 2)
    assert len(net.sent) == asked + TRIAL
    assert net.announcer.false_alarms == 1
    # the daemon is gone: clients move, and the others follow
    net.tick(PAUSE_SECONDS / 2 + 0.01)
    for number in net.sent[-TRIAL:]:
        net.report(number, MoveStatus.MOVING)
    net.tick(1.0)
    assert len(net.sent) > asked + 3 * TRIAL


def test_one_client_that_was_deceived_about_its_gateways_daemon_stops_no_other() -> None:
    net = Network(50)
    net.report(net.sent[0], MoveStatus.DAEMON_ANSWERS)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    assert sorted(net.sent) == list(range(50))
    net.report(net.sent[1], MoveStatus.MOVING)
    for number in net.sent[2:10]:
        net.report(number, MoveStatus.DAEMON_ANSWERS)
    # they stay, since others move, and are asked later again
    assert net.state()["state"] == "running"
    assert net.announcer.false_alarms == 0
    for number in range(50):
        net.announcer.over(index_of(number), net.now)
    net.tick(PAUSE_SECONDS)
    assert not net.announcer.busy


def test_the_only_session_whose_gateways_daemon_answers_is_asked_again() -> None:
    net = Network(1)
    net.report(0, MoveStatus.DAEMON_ANSWERS)
    net.tick(PAUSE_SECONDS / 2)
    assert net.sent == [0]
    net.tick(PAUSE_SECONDS)
    assert net.sent == [0, 0]
    net.announcer.end(DEAD, "it is back", net.now)
    assert not net.announcer.busy


def test_a_report_that_is_not_proved_changes_nothing() -> None:
    net = Network(50)
    net.report(net.sent[0], MoveStatus.GATEWAY_LIVES, sk_d=b"?" * 32)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    assert len(net.sent) > TRIAL
    assert net.announcer.false_alarms == 0


def test_a_client_that_does_not_answer_is_asked_again_and_then_left_to_dpd() -> None:
    net = Network(1)
    for seconds in ATTEMPTS:
        net.tick(seconds)
    assert net.sent == [0] * len(ATTEMPTS)
    net.tick(0.1)
    assert net.state()["silent"] == 1
    assert not net.announcer.busy


def test_a_client_that_is_coming_is_not_asked_again() -> None:
    net = Network(1)
    net.report(0, MoveStatus.MOVING)
    net.tick(5.0)
    assert net.sent == [0]
    net.announcer.over(index_of(0), net.now)
    net.tick(0.1)
    assert net.state()["resumed"] == 1
    assert not net.announcer.busy


def test_a_client_that_has_not_this_gateway_is_not_asked_again() -> None:
    net = Network(1)
    net.report(0, MoveStatus.NOT_CONFIGURED)
    net.tick(5.0)
    assert net.sent == [0]
    assert net.state()["refused"] == 1


def test_no_more_are_under_way_than_the_window_and_it_grows_with_those_that_come() -> None:
    net = Network(4000)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    first = list(net.sent)
    assert len(first) == WINDOW_START
    for number in first:
        net.announcer.over(index_of(number), net.now)
    net.tick(0.01)
    assert len(net.sent) == len(first) + 2 * WINDOW_START


def test_clients_that_are_resumed_late_are_followed_by_fewer() -> None:
    net = Network(4000)
    for number in net.sent:
        net.report(number, MoveStatus.MOVING)
    for number in net.sent[:]:
        net.announcer.over(index_of(number), net.now + 0.05)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    first = net.sent[TRIAL:]
    for number in first:
        net.report(number, MoveStatus.MOVING)
    for number in first:
        net.announcer.over(index_of(number), net.now + 1.0)
    net.tick(0.01)
    assert len(net.sent) < TRIAL + 2 * len(first)


def test_no_more_go_out_than_the_rate_allows() -> None:
    net = Network(1000, rate=100.0)
    net.tick(TRIAL_SECONDS)
    for _ in range(100):
        net.tick(0.01)
    assert 90 <= len(net.sent) <= 130


def test_a_session_that_another_gateway_has_resumed_is_not_announced() -> None:
    net = Network(20, able=(HERE, OTHER))
    mine = len([1 for number in range(20) if order(stub_of(number).index, (HERE, OTHER))[0] == HERE])
    for number in range(20):
        net.announcer.over(index_of(number), net.now)
    net.tick(TURN_SECONDS * 2)
    assert len(net.sent) <= min(mine, TRIAL)
    assert not net.announcer.busy


def test_every_session_has_one_gateway_that_announces_it_first_and_the_next_a_turn_later() -> None:
    first = Network(200, able=(HERE, OTHER))
    for _ in range(3):
        first.tick(TRIAL_SECONDS)
    mine = {number for number in range(200) if order(stub_of(number).index, (HERE, OTHER))[0] == HERE}
    assert set(first.sent) == mine
    assert 60 < len(mine) < 140
    for number in mine:
        first.announcer.over(index_of(number), first.now)
    first.tick(TURN_SECONDS)
    assert set(first.sent) == set(range(200))


def test_a_gateway_that_is_back_is_no_longer_announced() -> None:
    net = Network(50)
    net.announcer.end(DEAD, "it is back", net.now)
    net.tick(5.0)
    assert len(net.sent) == TRIAL
    assert net.announcer.false_alarms == 0


@given(
    st.sets(st.sampled_from([HERE, OTHER, "192.0.2.4", "2001:db8::5"]), min_size=1), st.binary(min_size=8, max_size=8)
)
def test_a_gateway_that_goes_changes_no_order_among_the_others(gateways: set[str], spi: bytes) -> None:
    whole = order(Index(DEAD, spi), gateways)
    for gone in gateways:
        assert order(Index(DEAD, spi), gateways - {gone}) == [gateway for gateway in whole if gateway != gone]


def some_first(first: int, sessions: int) -> Network:
    """The stubs of so many sessions, of which the last ones had traffic."""
    net = Network(0)
    net.announcer.begin(DEAD, net.now)
    stubs = [(stub_of(number), (HERE,)) for number in range(sessions)]
    net.announcer.add(DEAD, stubs[sessions - first :], complete=False)
    net.tick()
    net.announcer.add(DEAD, stubs, complete=True)
    net.tick()
    return net


def test_sessions_that_were_known_before_the_others_are_announced_before_them() -> None:
    net = some_first(TRIAL + 4, 100)
    net.tick(TRIAL_SECONDS)
    net.tick(HEAD_START)
    assert net.sent[: TRIAL + 4] == list(range(100 - TRIAL - 4, 100))
    assert sorted(set(net.sent)) == list(range(100))


def test_the_others_follow_once_those_with_traffic_are_here() -> None:
    net = some_first(2, 50)
    assert net.sent == [48, 49]
    net.tick(TRIAL_SECONDS)
    for number in (48, 49):
        net.report(number, MoveStatus.MOVING)
        assert len(net.sent) == 2
        net.announcer.over(index_of(number), net.now)
        net.tick()
    net.tick(TRIAL_SECONDS + 0.01)
    assert sorted(net.sent) == list(range(50))


def test_the_others_do_not_wait_for_clients_with_traffic_that_do_not_answer() -> None:
    net = some_first(2, 50)
    net.tick(HEAD_START - 0.01)
    assert net.sent == [48, 49]
    net.tick(0.02)
    net.tick(TRIAL_SECONDS + 0.01)
    assert sorted(set(net.sent)) == list(range(50))


@pytest.mark.parametrize("status", [MoveStatus.ASKED, MoveStatus.GONE, MoveStatus.PROBE, MoveStatus.HERE])
def test_what_is_no_report_is_none_of_the_announcers_business(status: MoveStatus) -> None:
    net = Network(1)
    assert not net.report(0, status)


def test_sessions_that_no_gateway_could_resume_are_counted_and_not_announced() -> None:
    net = Network(2)
    net.announcer.begin(DEAD, net.now)
    net.announcer.add(DEAD, [(stub_of(number), [HERE] if number else []) for number in range(5)], complete=True)
    assert (net.state()["stubs"], net.state()["sessions"]) == (5, 4)


def test_a_session_whose_end_is_reported_twice_is_counted_once() -> None:
    net = Network(3)
    for _ in range(2):
        net.announcer.over(stub_of(net.sent[0]).index, net.now)
    assert (net.state()["resumed"], net.state()["elsewhere"]) == (1, 0)


def test_a_session_that_went_on_unannounced_is_counted_once() -> None:
    net = Network(50)
    index = stub_of(next(number for number in range(50) if number not in net.sent)).index
    net.announcer.over(index, net.now)
    net.announcer.over(index, net.now)
    assert (net.state()["elsewhere"], net.state()["resumed"]) == (1, 0)
    net.tick(TRIAL_SECONDS)
    net.tick(TRIAL_SECONDS)
    assert len(net.sent) == 49
