"""Which gateways have failed, by their heartbeats (bridge.gateway.peer_watch)."""

from __future__ import annotations

from bridge.gateway.peer_watch import TRANSITIONS, PeerState, PeerWatch, Sign

GW = "192.0.2.1"
DETECT = 1.0


class Watch:
    """A watch whose bank has been calm for long, and what it said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.watch = PeerWatch(
            DETECT,
            lambda gateway, _: self.said.append(f"{gateway} failed"),
            lambda g: self.said.append(f"{g} back"),
            0.0,
        )


def test_a_heartbeat_that_expires_while_the_bank_works_means_that_its_gateway_has_failed() -> None:
    it = Watch()
    it.watch.heartbeat(GW)
    it.watch.expired(GW, 10.0)
    assert it.said == [f"{GW} failed"]
    it.watch.expired(GW, 11.0)
    assert it.said == [f"{GW} failed"]


def test_a_failed_gateway_with_a_heartbeat_is_back() -> None:
    it = Watch()
    it.watch.expired(GW, 10.0)
    it.watch.heartbeat(GW)
    assert it.said == [f"{GW} failed", f"{GW} back"]


def test_a_gateway_that_says_itself_that_it_is_gone_is_believed_immediately() -> None:
    it = Watch()
    it.watch.disturbed(10.0)
    it.watch.deleted(GW)
    assert it.said == [f"{GW} failed"]


def test_nothing_is_concluded_after_this_gateways_own_heartbeat_failed() -> None:
    it = Watch()
    it.watch.own_heartbeat(False, 2.0, 10.0)
    it.watch.expired(GW, 10.5)
    assert it.said == []
    assert it.watch.suspects == [GW]


def test_nothing_is_concluded_from_a_bank_that_was_slow() -> None:
    """A Redis that stalls for 2 s on fsync: all heartbeats expire before those that wait are read."""
    it = Watch()
    it.watch.own_heartbeat(True, 2.0, 10.0)
    it.watch.expired(GW, 10.0)
    it.watch.heartbeat(GW)
    it.watch.look([GW], 13.0)
    assert it.said == []


def test_a_suspect_that_is_still_missing_once_the_bank_is_calm_has_failed() -> None:
    it = Watch()
    it.watch.disturbed(10.0)
    it.watch.expired(GW, 10.1)
    it.watch.look([], 11.0)
    assert it.said == []
    it.watch.look([], 12.0)
    assert it.said == [f"{GW} failed"]


def test_a_suspect_that_is_there_again_has_not() -> None:
    it = Watch()
    it.watch.disturbed(10.0)
    it.watch.expired(GW, 10.1)
    it.watch.look([GW], 12.5)
    assert it.said == []
    assert it.watch.state(GW) is PeerState.ALIVE


def test_every_state_has_a_transition_for_every_sign() -> None:
    assert set(TRANSITIONS) == {(state, sign) for state in PeerState for sign in Sign}
