"""Which sessions a client has (bridge.client.sessions): up, lost and to be resumed, or forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.charon.ike_sa import IkeSa, Trait
from bridge.charon.vpns import vpns_of
from bridge.client.sessions import LOST_SECONDS, Session, Sessions
from bridge.config import ClientConfig, GatewayEntry, VpnConfig
from role_support import fake_charon, ike_sa
from test_initiator import ONE, TWO, info

WORK = VpnConfig(gateways=(GatewayEntry("192.0.2.11", "work1"),))
CONFIG = ClientConfig(gateways=(GatewayEntry(ONE, "gw1"), GatewayEntry(TWO, "gw2")), vpns={"work": WORK})


class Scene:
    """Sessions, and a charon that says what happens."""

    def __init__(self) -> None:
        self.charon, _, _ = fake_charon("gw1", "gw2", "work1")
        self.now, self.wall = 1000.0, 1_800_000_000.0
        self.sessions = Sessions(
            self.charon,
            vpns_of(CONFIG, lambda: self.charon.tracker.connections),
            clock=lambda: self.now,
            wall=lambda: self.wall,
        )

    def up(self, connection: str = "gw1", **changes: Any) -> tuple[IkeSa, Session | None]:
        sa = ike_sa(connection, ONE)
        for name, value in changes.items():
            setattr(sa, name, value)
        self.charon.tracker.adopt(sa)
        return sa, self.sessions.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        self.charon.tracker.forget(sa.id)
        self.sessions.gone(sa)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_an_ike_sa_that_comes_up_is_a_session_of_its_vpn(scene: Scene) -> None:
    _, session = scene.up("work1")
    assert session is not None
    assert (session.vpn, session.up, list(scene.sessions)) == ("work", True, [session])


def test_an_ike_sa_of_no_vpn_is_none_of_ours(scene: Scene) -> None:
    assert scene.up("other")[1] is None
    assert list(scene.sessions) == []


def test_a_session_whose_last_ike_sa_goes_is_lost_and_can_be_resumed_for_a_day(scene: Scene) -> None:
    sa, session = scene.up()
    scene.gone(sa)
    assert session is not None
    assert (session.up, scene.sessions.resumable_sas()) == (False, [sa])
    scene.now += LOST_SECONDS + 1
    assert list(scene.sessions) == []


def test_or_until_its_ike_sa_would_have_expired(scene: Scene) -> None:
    sa, _ = scene.up(expires=1_800_000_100)
    scene.gone(sa)
    assert scene.sessions.resumable_sas() == [sa]
    scene.wall += 101
    assert scene.sessions.resumable_sas() == []


@pytest.mark.parametrize("vici_first", [True, False])
def test_a_session_that_one_of_the_sides_ended_is_forgotten_whichever_channel_reports_first(
    scene: Scene, vici_first: bool
) -> None:
    sa, _ = scene.up()
    if vici_first:
        scene.sessions.ended(info(sa, "DELETING"))
        scene.gone(sa)
    else:
        scene.gone(sa)
        scene.sessions.ended(info(sa, "DELETING"))
    assert list(scene.sessions) == []


def test_a_session_that_cannot_be_resumed_is_forgotten_when_it_is_gone(scene: Scene) -> None:
    sa, _ = scene.up(resumable=False)
    scene.gone(sa)
    assert list(scene.sessions) == []


def test_a_session_that_is_set_up_again_is_the_same_one(scene: Scene) -> None:
    sa, session = scene.up()
    scene.gone(sa)
    new, again = scene.up()
    assert again is session
    assert again is not None
    assert (again.up, again.last) == (True, new)


def test_a_handshake_that_is_expected_belongs_to_the_session_that_expects_it(scene: Scene) -> None:
    sa, session = scene.up()
    scene.gone(sa)
    assert session is not None
    with scene.sessions.expecting(session, "gw2"):
        _, again = scene.up("gw2")
    assert again is session


def test_what_the_sidecar_itself_does_is_no_news(scene: Scene) -> None:
    sa, session = scene.up()
    with scene.sessions.owning(sa.id.spis):
        scene.gone(sa)
    assert session is not None
    assert session.up


def test_an_operator_means_a_session_that_was_lost_rather_than_one_that_is_up(scene: Scene) -> None:
    _, _ = scene.up("gw1")
    lost, session = scene.up("work1")
    scene.gone(lost)
    assert scene.sessions.chosen(None, None) is session
    assert scene.sessions.chosen("default", None) is not session
    assert scene.sessions.chosen("other", None) is None


def test_a_session_that_was_restored_is_lost_and_to_be_resumed(scene: Scene) -> None:
    sa = ike_sa("gw1", ONE)
    other = ike_sa("other", ONE)
    scene.sessions.unplaced = [sa, other]
    [session] = scene.sessions.restore()
    assert (session.up, session.last) == (False, sa)
    # kept until its VPN is known
    assert scene.sessions.unplaced == [other]
    assert scene.sessions.resumable_sas() == [other, sa]


@pytest.mark.parametrize("placed_first", [True, False])
def test_the_end_of_an_authentication_that_was_kept_is_known_after_a_restart(scene: Scene, placed_first: bool) -> None:
    kept = ike_sa("gw1", ONE)
    kept.authenticated_until = 1_800_003_600
    kept.traits |= Trait.AUTHENTICATION_INHERITED
    scene.sessions.unplaced = [kept]
    again = ike_sa("gw1", ONE)
    again.id = kept.id
    if placed_first:
        assert len(scene.sessions.restore()) == 1
    scene.charon.tracker.adopt(again)
    session = scene.sessions.changed(again)
    if not placed_first:
        # it is no lost session: charon has it
        assert scene.sessions.restore() == []
    assert list(scene.sessions) == [session]
    assert session is not None
    assert session.last is again
    assert (again.authenticated_until, again.authentication_inherited) == (1_800_003_600, True)
